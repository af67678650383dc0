"""Layers that an earlier run of a pass has solved are taken as they are, and the merge is the same,
bit for bit, also where the pass is made again because of what it found out on its way."""

import json

import pytest
import torch
from test_surveys import (
    ELEMENTS,
    Blocks,
    Inside,
    Rotated,
    Swapped,
    block,
    both,
    starting,
    tuned,
)
from toys import tokens, vision

import qpmerge_lite as q
from qpmerge_lite.engine.keeping import Solved, keeping

TOKENS, VISION = tokens(), vision()
PASSES = {
    "tokens": (*TOKENS, q.qp, {"basis": "rows"}),
    "pictures": (*VISION, q.qp, ELEMENTS),
    "by blocks": (*TOKENS, q.regmean_plus_plus, {}),
    "own inputs": (*VISION, q.regmean, {}),
}
ODD = {
    "swapped": (Swapped(), starting(1, -1)),
    "inside a block": (Blocks(Inside(), block()), starting(1, -1)),
    "in a circle": (Rotated(), starting(0, 1, 2)),
}
for name, (base, batches) in ODD.items():
    base = base.double()
    problem = base, tuned(base), both(*batches)
    PASSES[name] = (*problem, q.qp, ELEMENTS)
    PASSES[f"{name}, blocks run again"] = (*problem, q.qp, {**ELEMENTS, "activations": 1})


class Kept(dict):
    """Solved layers in memory.

    Attributes:
        count: how often some were taken.
    """

    count = 0

    def read(self, key):
        self.count += key in self
        return self.get(key)

    def write(self, key, solved):
        parts = {name: value.clone() for name, value in solved.parts.items()}
        self[key] = Solved(parts, json.loads(json.dumps(solved.rows)))


def without_time(merge):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in merge.table]


@pytest.mark.parametrize("name", PASSES)
def test_a_merge_is_the_same_whatever_was_solved_before(name):
    base, experts, calibration, method, options = PASSES[name]
    expected = method(base, experts, calibration, **options)
    whole = Kept()
    with keeping(whole):
        method(base, experts, calibration, **options)
    for share in (0, 1, 2, 3):
        kept = Kept(list(whole.items())[: len(whole) * share // 3])
        before = len(kept)
        with keeping(kept):
            merge = method(base, experts, calibration, **options)
        assert kept.count >= before and kept.keys() == whole.keys()
        assert without_time(merge) == without_time(expected)
        assert merge.averaged == expected.averaged
        for key, value in expected.state_dict.items():
            assert torch.equal(merge.state_dict[key], value)


def test_two_passes_of_one_merge_keep_their_layers_apart():
    base, experts, calibration, *_ = PASSES["tokens"]
    kept = Kept()
    with keeping(kept):
        first, second = (
            q.qp(base, experts, calibration, basis="rows", ridge=ridge) for ridge in (0.01, 10.0)
        )
    alone = q.qp(base, experts, calibration, basis="rows", ridge=10.0)
    assert kept.count == 0 and len(first.table) == len(second.table)
    assert all(torch.equal(second.state_dict[k], v) for k, v in alone.state_dict.items())


def test_nothing_is_kept_outside():
    base, experts, calibration, *_ = PASSES["tokens"]
    kept = Kept()
    with keeping(kept):
        pass
    q.qp(base, experts, calibration, basis="rows")
    assert not kept
