"""Merges within a stated amount of memory: refused before anything runs where that cannot be, and
else with forwards that run blocks again rather than hold more while they wait."""

from __future__ import annotations

import re
from math import inf
from typing import TYPE_CHECKING

from ..costs import estimated_plan
from ..findings import Refused, size
from .estimates import Memory, memory_of_pass
from .measured import taken
from .running import amount_of

if TYPE_CHECKING:
    from ..planning import Plan

OPTION = "--memory"
PYTHON = "Python and its packages"
AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def bytes_of(words: str) -> int:
    """Bytes of an amount such as ``8GB``, ``500 MB``, ``7.5GiB``, or a plain number of them.

    Raises: Refused for what is none.
    """
    found = AMOUNT.fullmatch(words.strip())
    if found is None or not float(found[1]):
        raise Refused(OPTION, "an amount such as 8GB or 500MB", repr(words), "write it so")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def least_of(plan: Plan, held: Memory | None) -> dict[str, int]:
    """The least that the whole process needs for a merge, from now on: what for -> bytes.

    Args:
        held: by its pass, None where no model is run.
    """
    own = taken()
    needed = {PYTHON: own.get("RssAnon", own["VmHWM"])}
    if held is None:
        costs = estimated_plan(plan)
        return needed | {f"{costs.at_once} at once": costs.memory}
    if held.survey > held.models + held.layer + held.at_least:
        return needed | {"a look at what the model does": held.survey}
    return needed | {
        "models that are made": held.models,
        "the layers that take most": held.layer,
        "forwards that wait": held.at_least,
    }


def allowance(plan: Plan) -> float:
    """Bytes that forwards may hold while they wait, so that the process takes no more memory than
    was ordered; infinity where nothing was, or no model is run.

    Raises: Refused where the merge needs more in any case.
    """
    budget = plan.order.memory
    if budget is None:
        return inf
    held, amount = None, amount_of(plan)
    if amount is not None:
        held = memory_of_pass(plan.report, plan.method, plan.order.options, amount)
    needed = least_of(plan, held)
    total = sum(needed.values())
    if total > budget:
        parts = ", ".join(f"{size(count)} for {what}" for what, count in needed.items())
        cure = "give more, or choose a method that takes less, see qpmerge check"
        if held is not None:
            cure = cure.replace("or choose", "take fewer inputs (--samples), or choose")
        raise Refused(OPTION, f"{size(total)} at least ({parts})", size(budget), cure)
    if held is None:
        return inf
    return budget - needed[PYTHON] - held.models - held.layer
