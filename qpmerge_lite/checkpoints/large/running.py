"""What a pass holds while models run: to find out what a model does, and to add up what layers read
of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ..calibration.sources import SAMPLES
from ..folders import Checkpoint
from ..headers import SIZES

if TYPE_CHECKING:
    from torch import Tensor

    from ..planning import Plan

DOUBLE, SINGLE = 8, 4  # bytes of a number
TOKENS, IN_A_BATCH = 128, 8  # of a text, where texts are not known, and texts, as of ``orders``
ROWS = 4096  # whose products are taken together, at least, as of ``engine.gather``
SEQUENCES = 9  # three of a batch, and thrice two of these, of which a survey keeps every call
COMPARED = 2  # copies in double precision of a matrix whose outputs a survey works out
STATES = 8  # of the model that a block has in flight, and of its widest layer's inputs:
WIDEST = 3  # what is multiplied, by what, and their product
# how classes are called whose models put out a number for every word of the vocabulary, a token
PREDICT_TOKENS = ("LM", "LMHeadModel", "ForPreTraining", "ForConditionalGeneration")
BESIDE_EACH_OTHER = 2  # sequences, whose outputs a survey compares in double precision:
PUT_OUT = 2  # times that it keeps predictions, as of their layer and as of the model
DIFFERING = 3  # one, another, and their difference


def alike(base: Checkpoint) -> dict[tuple[str, int], list[int]]:
    """Matrices that may read one tensor: (name of what they are in, inputs) -> their outputs."""
    alike: dict[tuple[str, int], list[int]] = {}
    for name, entry in base.entries.items():
        if len(entry.shape) == 2:
            m, n = entry.shape
            alike.setdefault((".".join(name.split(".")[:-2]), n), []).append(m)
    return alike


class Amount(NamedTuple):
    """How much the inputs of a pass are, in tokens, padding among them, or patches of pictures.

    Attributes:
        tokens: of all. of_batch, of_expert: of the batch, and of the expert, that has most.
        sequence: of the longest input.
        different: how many different ones occur; None where that is not known.
        batches: how many.
    """

    tokens: int
    of_batch: int
    of_expert: int
    sequence: int
    different: int | None
    batches: int


def amount_of(plan: Plan) -> Amount | None:
    """How much calibration a plan has; None where it has none."""
    if plan.inputs is None:
        return None
    inputs, config = plan.inputs, plan.report.base.config
    by_expert = [[_tokens_of(b, config) for b in some] for some in inputs.batches.values()]
    every = [batch for some in inputs.batches.values() for batch in some]
    return Amount(
        tokens=sum(map(sum, by_expert)),
        of_batch=max(map(max, by_expert), default=0),
        of_expert=max(map(sum, by_expert), default=0),
        sequence=max((_longest(batch, config) for batch in every), default=0),
        different=_different(every),
        batches=len(every),
    )


def usual_amount(experts: int) -> Amount:
    """As much as is taken of every expert at most, where inputs are not known."""
    batches, of_expert = SAMPLES // IN_A_BATCH, SAMPLES * TOKENS
    return Amount(
        experts * of_expert, IN_A_BATCH * TOKENS, of_expert, TOKENS, None, experts * batches
    )


def _tokens_of(batch: Mapping[str, Tensor], config: Mapping) -> int:
    """Tokens of a batch (B, S), or patches of its pictures (B, C, H, W)."""
    total = sum(v.numel() for name, v in batch.items() if name.endswith("input_ids"))
    if "pixel_values" in batch:
        count, _, *edges = batch["pixel_values"].shape
        patch = config.get("patch_size")
        patch = patch if isinstance(patch, int) else 1
        total += count * (prod(edge // patch for edge in edges) + 1)
    return total


def _longest(batch: Mapping[str, Tensor], config: Mapping) -> int:
    """Tokens of an input of a batch, padded as they are."""
    count = max((len(value) for value in batch.values()), default=0)
    return _tokens_of(batch, config) // max(count, 1)


def _different(batches: Sequence[Mapping[str, Tensor]]) -> int | None:
    """How many different tokens there are; None for inputs without any."""
    tokens = set[int]()
    for batch in batches:
        for name, value in batch.items():
            tokens |= {*value.unique().tolist()} if name.endswith("input_ids") else set()
    return len(tokens) or None


def widths_of(base: Checkpoint) -> list[int]:
    """How many inputs the matrices of a model have, each."""
    return [entry.shape[1] for entry in base.entries.values() if len(entry.shape) == 2]


def size_of(base: Checkpoint) -> int:
    """Bytes of a number of what a model reads and puts out."""
    return max((SIZES[entry.dtype] for entry in base.entries.values()), default=0)


def _predicted(base: Checkpoint) -> int:
    """Numbers that a model puts out for every token that it predicts; 0 where it predicts none."""
    names = base.config.get("architectures") or [""]
    rows = base.config.get("vocab_size") if names[0].endswith(PREDICT_TOKENS) else 0
    return rows if isinstance(rows, int) else 0


def _memory_of_block(base: Checkpoint, tokens: int) -> int:
    """Bytes that a block has in flight while it runs on a batch of so many tokens, or what predicts
    them behind the last one."""
    widths = widths_of(base) or [0]
    in_flight = WIDEST * max(widths) + STATES * min(widths)
    return tokens * max(in_flight, _predicted(base)) * size_of(base)


def memory_of_rows(base: Checkpoint, amount: Amount, n: int, answers: int, number: int) -> int:
    """Bytes of rows that layers of n inputs read, batch by batch and side by side, while products
    of them are taken; and of the block that is run for them.

    Args:
        answers: outputs of these layers that go with them, none where there are no others to
            compare with. number: bytes of one.
    """
    rows = min(ROWS + amount.of_batch, amount.of_expert)
    held = number * (2 * rows * (n + answers) + amount.of_batch * n)
    return held + _memory_of_block(base, amount.of_batch)


def memory_of_survey(base: Checkpoint, sequence: int) -> int:
    """Bytes of what layers read and put out on a few sequences of so many tokens, which are kept
    until all layers are looked at, and of the one that is."""
    numbers, largest = 0, 0
    for (_, n), outputs in alike(base).items():
        table = base.config.get("vocab_size") in outputs
        numbers += n + (0 if table else sum(outputs))
        largest = max(largest, 0 if table else max(outputs) * n)
    for entry in base.entries.values():
        numbers += 2 * prod(entry.shape) if len(entry.shape) == 1 else 0
    kept = SEQUENCES * sequence * numbers * size_of(base) + COMPARED * DOUBLE * largest
    words = sequence * _predicted(base)
    compared = BESIDE_EACH_OTHER * (DIFFERING * DOUBLE + size_of(base))
    return kept + words * (SEQUENCES * PUT_OUT * size_of(base) + compared)
