"""Everything about a merge that can be seen before a weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .compatibility import Report, check, refuse_errors
from .findings import Refused
from .folders import INDEX, OTHERS, PROCESSOR, TOKENIZER
from .headers import Header
from .methods import BY_MOMENTS, MODEL, WEIGHTS_ONLY, at_once, check_options, chosen
from .moments.files import MomentsFile, read_all
from .orders import Order, check_calibration, check_heads, check_moments, downloaded
from .output import check_place, plain, versions
from .recipes.plans import plans, settle_dtypes, stored_headers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .calibration.feeds import Feed

READERS = (*TOKENIZER, *PROCESSOR)


@dataclass
class Plan:
    """An order that can be carried out, as far as can be seen before a weight is read.

    Attributes:
        order: what was asked for, with folders in place of references to the Hub.
        method, why: what is used, and why that.
        report: on its folders, without an error.
        inputs: calibration of the experts, None where the method needs none.
        moments: expert's name -> its files of moments, in place of calibration.
        stamps: path of every file that is used -> its bytes, and when it was changed, in
            nanoseconds.
        group: of ``torch.distributed``, whose processes share the forwards; None where one process
            does it all.
    """

    order: Order
    method: str
    why: str
    report: Report
    inputs: Feed | None
    moments: Mapping[str, Sequence[MomentsFile]]
    stamps: dict[str, tuple[int, int] | None]
    group: ProcessGroup | None = None

    @property
    def processes(self) -> int:
        """How many processes share the forwards."""
        return 1 if self.group is None else self.group.size()

    @property
    def headers(self) -> dict[str, Header]:
        """Those of the files to be written: the base's, or these in a recipe's dtype."""
        return stored_headers(self.order.recipe, self.report.base)

    @property
    def goes_by_tensor(self) -> bool:
        """Whether tensors are merged one by one, so that a later run can use finished files."""
        if self.moments:
            return False  # layer by layer, in the order of the forward
        if self.order.recipe is not None:
            return not self.order.recipe.rule.draws
        return at_once(self.method, self.order.options) != MODEL

    @property
    def digest(self) -> str:
        """The plan in a few digits: equal ones give equal bytes."""
        order = self.order
        places = {"base": order.base, **order.experts}
        moments = {name: list(map(str, files)) for name, files in order.moments.items()}
        ordered = [
            self.stamps,
            {name: str(path.resolve()) for name, path in places.items()},
            {name: str(place) for name, place in order.calibration.items()},
            moments,
            [self.method, plain(order.options), plain(order.columns)],
            [order.samples, order.max_length, order.batch_size, order.heads],
            order.recipe and order.recipe.as_json(order.random_seed),
            versions(self.inputs is not None),
        ]
        if self.processes > 1:
            ordered.append(self.processes)
        text = json.dumps(plain(ordered), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_of(
    order: Order,
    *,
    progress: bool = False,
    group: ProcessGroup | None = None,
    writes: bool = True,
) -> Plan:
    """The plan of an order.

    Args:
        progress: whether downloads show theirs.
        group: of ``torch.distributed``, whose processes share the forwards where there are any.
        writes: whether this process is to write the output, which has to have a place then.
    Raises: MergeError for whatever can be seen before a weight is read.
    """
    check_heads(order.heads)
    order, method, why = settled(order)
    if writes:
        check_place(order.out, [order.base, *order.experts.values()])
    order = downloaded(order, progress)
    report = check(order.base, order.experts, order.heads)
    refuse_errors(report)
    moments = {}
    if order.moments:
        moments = read_all(order.moments, report.backbone, report.experts, report.heads)
    inputs = None
    if order.recipe is not None:
        plans(order.recipe, report)  # which refuses what does not fit
        settle_dtypes(report)
    elif method in WEIGHTS_ONLY:
        from .weights_only import rehearse

        rehearse(method, list(order.experts), order.options)
    elif not moments:
        from .calibration.feeds import feed_of

        inputs = feed_of(order, report)
    stamps = stamps_of(order, report)
    shared_by = None if inputs is None else group
    return Plan(order, method, why, report, inputs, moments, stamps, shared_by)


def settled(order: Order) -> tuple[Order, str, str]:
    """An order with the options that follow from it, its method, and why it is that; refused where
    options or calibration do not fit it."""
    if order.recipe is not None:
        return order, order.recipe.method, "the recipe names it"
    method, why = chosen(order.method, bool(order.calibration), bool(order.moments))
    if order.moments and order.method is None:
        order = replace(order, options=BY_MOMENTS | order.options)
    check_options(method, order.options)
    if order.moments:
        check_moments(order, method)
    else:
        check_calibration(order, method)
    return order, method, why


def stamps_of(order: Order, report: Report) -> dict[str, tuple[int, int] | None]:
    """Bytes and time of change of every file that a merge uses; None for one that has gone, and for
    sources that are no files here."""
    paths = [Path(place) for place in order.calibration.values()]
    for files in order.moments.values():
        paths += files
    for checkpoint in (report.base, *report.experts):
        others = checkpoint.matching((*OTHERS, *READERS, INDEX, checkpoint.config_file))
        paths += [checkpoint.folder / name for name in (*checkpoint.headers, *others)]
    stamps: dict[str, tuple[int, int] | None] = {}
    for path in paths:
        known = path.stat() if path.exists() else None
        stamps[str(path.resolve())] = None if known is None else (known.st_size, known.st_mtime_ns)
    return stamps


def refuse_changes(plan: Plan) -> None:
    """Refused where a file that was used is not what it was when the merge began."""
    for path, stamp in stamps_of(plan.order, plan.report).items():
        if stamp != plan.stamps.get(path):
            state = "one that was changed meanwhile" if stamp else "one that has gone meanwhile"
            cure = "run the command again, when nothing else writes there"
            raise Refused(path, "a file that stays as it is during a merge", state, cure)
