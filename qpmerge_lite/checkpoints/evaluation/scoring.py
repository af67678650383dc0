"""What models predict on inputs, and the numbers that follow, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor, nn

from ...calibration import IGNORED, Batch
from ..calibrated import cast
from ..calibration.feeds import pixels, processor_of
from ..calibration.records import IMAGE, TARGET
from ..calibration.sources import Row
from ..calibration.tokens import batches, checked_rows, longest, tokenizer_of, with_decoder
from ..diagnosis.comparing import (
    LEVEL,
    Estimate,
    exponential,
    output_of,
    positions_of,
    ratio,
    surprisal_of,
    tokens_of,
)
from ..findings import Refused
from .subjects import LABELS, Subject

QUANTILE = NormalDist().inv_cdf((1 + LEVEL) / 2)


@dataclass
class Scores:
    """What one model does on the inputs of a task, in their order.

    Attributes:
        right: one where the label that it predicts is the input's, else zero; of classifiers.
        surprisal: negative log-likelihood of the tokens that a text goes on with, in nats; this and
            what follows of models that predict tokens.
        targets: these tokens (P,).
        choices: the most likely ones in their places (P,).
        cut: how many texts were cut.
    """

    right: list[int] = field(default_factory=list)
    surprisal: list[float] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    choices: list[Tensor] = field(default_factory=list)
    cut: int = 0


class Inputs:
    """The inputs of a task as one model reads them.

    Args:
        subject: whose tokenizer or processor reads them.
        model: it, with or without its weights.
        rows: of the source.
        fields: what is read of a row: a picture; a text; or a text and its target.
        task: for messages.
        max_length: tokens of a text at the most.
        batch_size: inputs of a forward; a model that has no token for padding gets one at a time.
    Raises: Refused for what it cannot read.
    """

    def __init__(
        self,
        subject: Subject,
        model: nn.Module,
        rows: Sequence[Row],
        fields: Sequence[str],
        *,
        task: str,
        max_length: int,
        batch_size: int,
    ):
        self.task, self.rows, self.batch_size = task, rows, batch_size
        self._model, self.cut = model, 0
        self._processor, self._texts = None, None
        if tuple(fields) == (IMAGE,):
            self._processor = processor_of(subject.reader, subject.otherwise)
            return
        tokenizer = tokenizer_of(subject.reader, subject.otherwise)
        limit = longest(model, tokenizer, max_length)
        read, self.cut = checked_rows(rows, tokenizer, model, limit, TARGET in fields)
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        padding = config.pad_token_id  # which classifiers tell the last token of a text by
        if padding is None:
            self.batch_size, padding = 1, tokenizer.pad_token_id
        self._texts = batches(read, self.batch_size, padding)

    def __iter__(self) -> Iterator[tuple[Batch, Tensor | None]]:
        """Batches, and the labels (B, S) of a decoder's tokens where there is one. Pictures are
        opened as they are asked for."""
        for number, start in enumerate(range(0, len(self.rows), self.batch_size)):
            part = self.rows[start : start + self.batch_size]
            targets = None
            if self._texts is None:
                (arguments,) = pixels(part, self._processor, self._model, self.batch_size)
            else:
                arguments = dict(self._texts[number])
                targets = arguments.get("labels")
            if targets is not None:
                arguments = with_decoder(self._model, arguments)
            yield Batch(self.task, number, arguments, len(part), start), targets


def scores_of(
    model: nn.Module,
    name: str,
    inputs: Iterable[tuple[Batch, Tensor | None]],
    kind: str,
    classes: Sequence[int],
) -> Scores:
    """Run a model on all inputs of a task.

    Args:
        name: of the model, for messages.
        inputs: as of :class:`Inputs`.
        kind: ``labels`` or ``tokens``.
        classes: of every input; empty for ``tokens``.
    Raises: NonFinite for outputs that are not finite; Refused for other than one per input.
    """
    scores, state = Scores(), model.state_dict()
    dtype = next(model.parameters()).dtype
    for batch, targets in inputs:
        (arguments,) = cast([batch.arguments], dtype)
        batch = Batch(batch.task, batch.number, arguments, batch.size, batch.start)
        output = output_of(model, state, batch, name)
        if kind == LABELS:
            own = classes[batch.start : batch.start + batch.size]
            predicted = _classes(output, batch, name)
            scores.right += [int(a == b) for a, b in zip(predicted, own, strict=True)]
            continue
        for row in range(batch.size):
            _add_text(scores, output, batch, row, None if targets is None else targets[row])
    return scores


def _classes(output: Tensor, batch: Batch, name: str) -> list[int]:
    """The first choice for every input, out of logits (B, classes)."""
    if output.dim() != 2:
        where = f"{batch.task!r}, batch {batch.number}, outputs of {name}"
        cure = "evaluate it with transformers"
        expected = "logits of classes for every input"
        raise Refused(where, expected, f"shape {tuple(output.shape)}", cure)
    return output.argmax(-1).tolist()


def _add_text(scores: Scores, output: Tensor, batch: Batch, row: int, targets: Tensor | None):
    """Add one text to the scores.

    Args:
        output: logits (B, S, tokens).
        targets: the decoder's tokens (S,), None for a model that goes on with its text.
    """
    if targets is None:
        following = tokens_of(batch, row)[1:]
        logits = positions_of(output, batch, row)[:-1]
    else:
        is_there = targets != IGNORED
        following, logits = targets[is_there], output[row][is_there]
    scores.surprisal.append(surprisal_of(logits.double().log_softmax(-1), following))
    scores.targets.append(following)
    scores.choices.append(logits.argmax(-1))


def wilson(successes: int, count: int) -> Estimate:
    """A share with Wilson's 95 % interval (Wilson, 1927)."""
    share, square = successes / count, QUANTILE**2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return Estimate(share, max(middle - half, 0.0), min(middle + half, 1.0))


def estimates_of(scores: Scores, kind: str) -> dict[str, Estimate | None]:
    """What is told of a model by itself: ``accuracy`` with Wilson's interval, or ``perplexity``
    with a bootstrap's over texts."""
    if kind == LABELS:
        return {"accuracy": wilson(sum(scores.right), len(scores.right))}
    counts = [len(tokens) for tokens in scores.targets]
    return {"perplexity": ratio(scores.surprisal, counts, exponential)}


def estimates_beside(scores: Scores, expert: Scores, kind: str) -> dict[str, Estimate | None]:
    """What is told of a model beside the expert, with intervals of a bootstrap over inputs, which
    stay paired.

    ``ratio`` of the accuracies and their ``difference``; or the ``ratio`` of the perplexities, and
    the ``agreement``: the share of places in which both choose the same next token.
    """
    if kind == LABELS:
        fewer = [own - other for own, other in zip(scores.right, expert.right, strict=True)]
        return {
            "ratio": ratio(scores.right, expert.right),
            "difference": ratio(fewer, [1] * len(fewer)),
        }
    counts = [len(tokens) for tokens in scores.targets]
    equal, more = [], []
    for own, other in zip(scores.choices, expert.choices, strict=True):
        equal.append(int((own == other).sum()))
    for mine, its in zip(scores.surprisal, expert.surprisal, strict=True):
        more.append(mine - its)
    return {"ratio": ratio(more, counts, exponential), "agreement": ratio(equal, counts)}


def read_alike(scores: Scores, expert: Scores) -> bool:
    """Whether two models read their texts as the same tokens."""
    pairs = zip(scores.targets, expert.targets, strict=True)
    return all(torch.equal(own, other) for own, other in pairs)
