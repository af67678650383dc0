"""Results of merges kept from one run to the next, for as long as nothing that they hang on
changes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable

import torch

from .. import staleness
from ..paths import HOME, cache_folder
from ..records import read_json, write_json
from ..suites import REGISTRY, Suite, training

SUITES = "qpmerge_lite.companion.suites"  # calibration, evaluation, training
CHOICE = "qpmerge_lite.methods"  # whose ``tune`` chooses among the options of every method


def kept(
    suite: Suite, name: str, settings, make: Callable[[], dict], method: Callable | None = None
) -> dict:
    """What ``make`` returns, from the cache or computed and kept under the hash of all it depends
    on.

    Args:
        settings: whatever else decides the result, as JSON.
        method: the one method that ``make`` merges by; what other methods import does not count
            then. Without it, all that the module of ``make`` imports counts.
    The environment variable ``QPMERGE_NOT_BEFORE`` (seconds since the epoch) has results made again
    that were kept before that moment.
    """
    code = sources(suite, make, method)
    inputs = _experts_and_data(suite)
    facts = json.dumps([code, inputs, suite.tier, suite.seed, name, settings])
    key = hashlib.sha256(facts.encode()).hexdigest()
    path = cache_folder() / f"{suite.name}-{suite.tier}" / "merges" / f"{name}-{key[:16]}.json"
    if not path.exists() or path.stat().st_mtime < float(os.environ.get("QPMERGE_NOT_BEFORE", 0)):
        write_json(path, make())
    return read_json(path)


def sources(suite: Suite, make: Callable, method: Callable | None = None, root=HOME) -> str:
    """SHA-256 of the modules that a result hangs on; arguments as of :func:`kept`.

    They are those of the suite, and with ``method`` those that the method's module imports, beside
    the modules that call it.
    """
    files, maker = staleness.modules(root), make.__module__
    definition = REGISTRY.get((suite.name, suite.tier), SUITES)
    starts = {SUITES, definition, maker if method is None else method.__module__}
    if not starts <= files.keys():  # made by code outside the package, which may use any of it
        return staleness.digest(root, files)
    found = staleness.reached(root, starts, registered=set(REGISTRY.values()))
    return staleness.digest(root, found | ({maker, CHOICE} & files.keys()))


def _experts_and_data(suite: Suite) -> str:
    """Hash of the experts, their heads, the data they are judged on, the device, and torch."""
    judged = [suite.tensors(t, s) for t in suite.tasks for s in ("validation", "test")]
    data = [training.digest(*inputs.values(), labels) for inputs, labels in judged]
    states = [
        training.digest(*e.values()) for e in (*suite.experts.values(), *suite.heads.values())
    ]
    found = json.dumps([data, states, str(suite.device), torch.__version__])
    return hashlib.sha256(found.encode()).hexdigest()
