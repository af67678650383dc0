"""Results of merges kept from one run to the next, for as long as nothing that they hang on
changes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

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
    if not _is_kept(path):
        with training.one_maker(path):
            if not _is_kept(path):
                write_json(path, make())
    return read_json(path)


def _is_kept(path: Path) -> bool:
    """Whether a file of results is there and not too old."""
    not_before = float(os.environ.get("QPMERGE_NOT_BEFORE", 0))
    return path.exists() and path.stat().st_mtime >= not_before


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
    reached = staleness.reached(root, starts, registered=set(REGISTRY.values()))
    return staleness.digest(root, reached | ({maker, CHOICE} & files.keys()))


def _experts_and_data(suite: Suite) -> str:
    """Hash of the experts, their heads, the data they are judged on, the device, and torch.

    It is made once for a suite, and anew when one of these tensors is another one or has been
    changed in place, of which torch keeps count.
    """
    tensors = _tensors(suite)
    versions = [(id(tensor), tensor._version) for tensor in tensors]
    last = suite.cached(("digest",), dict)
    if last.get("versions") != versions:
        facts = [training.digest(*tensors), str(suite.device), torch.__version__]
        sha256 = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        # the tensors are held so that no other one is given the identity of one of them
        last.update(versions=versions, tensors=tensors, sha256=sha256)
    return last["sha256"]


def _tensors(suite: Suite) -> list[Tensor]:
    """The weights of experts and heads, and the data that they are judged on."""
    tensors = []
    for task, split in product(suite.tasks, ("validation", "test")):
        inputs, labels = suite.tensors(task, split)
        tensors += [*inputs.values(), labels]
    for state in (*suite.experts.values(), *suite.heads.values()):
        tensors += state.values()
    return tensors
