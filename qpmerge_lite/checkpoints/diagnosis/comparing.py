"""What a merge does to the outputs of an expert, text by text, on one batch of outputs at a
time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...calibration import Batch
from ...errors import NonFinite, is_finite
from ...experts import State
from ...forwards import evaluating, main_output
from ...heads import Heads, logits_of, outputs_of
from ..findings import Refused

PREDICTIONS, OUTPUTS = "predictions", "outputs"
MERGED, EXPERT, BASE = "merged", "expert", "base"
ROLES = (MERGED, EXPERT, BASE)
LOGITS = "logits"
ENERGY = "energy"  # what is captured of the outputs that heads read
NOT_CLASSES = ("regression", "multi_label_classification")  # whose logits are no softmax
LEVEL, FEWEST = 0.95, 8  # of intervals; fewer texts than that have none
DRAWS, ROUNDS = 100, 20  # of the bootstrap: draws at a time, and how many times


@dataclass(frozen=True)
class Text:
    """Sums over the positions of one text that are no padding.

    Attributes:
        positions: how many there are; one where the model returns one vector for a text.
        lost: squared distance of the merge's outputs from the expert's, or the divergence of its
            predictions from the expert's, KL(expert ‖ merge), in nats.
        energy: the same with the base in the place of the merge.
        equal: model -> at how many positions it predicts what the expert does; empty for outputs.
        surprisal: model -> negative log-likelihood of the text's own next tokens, in nats; empty
            but for models that predict these.
        targets: how many next tokens there are.
    """

    positions: int
    lost: float
    energy: float
    equal: Mapping[str, int]
    surprisal: Mapping[str, float]
    targets: int


@dataclass(frozen=True)
class Estimate:
    """A number over texts with its 95 % interval; None where the texts are too few for one, or too
    much alike to tell how others would differ."""

    value: float
    low: float | None
    high: float | None


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    function: Callable[[float], float] = float,
) -> Estimate | None:
    """A monotone function of ``Σ a / Σ b`` over texts, and its percentile bootstrap interval over
    texts drawn whole, so that what is paired by text stays so.

    None where all denominators, which are never negative, are zero.
    """
    pairs = torch.tensor([numerators, denominators], dtype=torch.float64)
    above, below = pairs.sum(1).tolist()
    if below == 0:
        return None
    value, count = function(above / below), pairs.shape[1]
    if count < FEWEST:
        return Estimate(value, None, None)
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(ROUNDS):
        places = torch.randint(count, (DRAWS, count), generator=generator)
        sums = pairs[:, places].sum(2)
        drawn.append(sums[0, sums[1] > 0] / sums[1, sums[1] > 0])
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.cat(drawn).quantile(tails).tolist()
    if math.isclose(low, high, rel_tol=1e-6):
        return Estimate(value, None, None)
    ends = [function(end) for end in (low, high)]
    return Estimate(value, min(ends), max(ends))


def what_is_returned(model: nn.Module, batch: Batch) -> tuple[str, str]:
    """Whether a model of transformers returns ``predictions`` or other ``outputs``, and the name of
    what is compared, its main tensor.

    Raises: Refused for predictions that are no distribution over classes.
    """
    with torch.no_grad(), evaluating(model):
        output = outputs_of(model, model.state_dict(), batch)
    value = main_output(output)
    field = next(name for name, other in output.items() if other is value)
    kind = getattr(model.config, "problem_type", None)
    if field == LOGITS and value.shape[-1] > 1 and kind not in NOT_CLASSES:
        return PREDICTIONS, field
    if field.endswith(f"_{LOGITS}") and value.dim() == 2:
        where = type(model).__name__
        cure = "compare it from Python, with qpmerge_lite.audit"
        raise Refused(where, "logits of classes or tokens, or hidden states", field, cure)
    return OUTPUTS, field


def compared(
    model: nn.Module, states: Mapping[str, State], batches: Sequence[Batch], kind: str
) -> Iterator[Text]:
    """Every text of one expert.

    Args:
        model: the base; states: role -> weights, for ``ROLES``.
        batches: with ``input_ids`` and ``attention_mask``, both (B, S).
        kind: ``predictions`` or ``outputs``.
    Raises: NonFinite for outputs that are not finite; Refused for other than one per text.
    """
    predicts_next = kind == PREDICTIONS and is_causal(model)
    for batch in batches:
        outputs = {role: output_of(model, states[role], batch, role) for role in ROLES}
        for row in range(batch.size):
            own = {role: positions_of(output, batch, row) for role, output in outputs.items()}
            if kind == OUTPUTS:
                yield _text_of_outputs(own)
            else:
                yield _text_of_predictions(own, tokens_of(batch, row) if predicts_next else None)


def compared_by_head(
    model: nn.Module, states: Mapping[str, State], batches: Sequence[Batch], heads: Heads
) -> Iterator[tuple[Text, Text]]:
    """Every text of one expert: what its head predicts of the outputs of each model, and these
    outputs.

    Args:
        model: the backbone of the base; states: role -> weights, for ``ROLES``.
        batches: of the expert.
        heads: expert's name -> function from what the backbone returns to logits (N, classes), of
            N texts, or of their tokens one after the other.
    Raises: NonFinite for outputs that are not finite; Refused for other than one per text.
    """
    for batch in batches:
        outputs, logits = {}, {}
        for role in ROLES:
            with torch.no_grad(), evaluating(model):
                returned = outputs_of(model, dict(states[role]), batch)
                predicted = logits_of(heads, batch, returned)
            outputs[role] = _checked(main_output(returned), batch, role)
            logits[role] = predicted.split(_predictions_of_texts(batch, len(predicted)))
        for row in range(batch.size):
            predictions = {role: by_text[row] for role, by_text in logits.items()}
            own = {role: positions_of(output, batch, row) for role, output in outputs.items()}
            yield _text_of_predictions(predictions, None), _text_of_outputs(own)


def _predictions_of_texts(batch: Batch, count: int) -> list[int]:
    """How many predictions there are of each text, ``count`` of all: one, or one for a token."""
    if count == batch.size:
        return [1] * count
    return batch.arguments["attention_mask"].count_nonzero(1).tolist()


def is_causal(model: nn.Module) -> bool:
    """Whether a model predicts the next token at every position: it is of a class for that, and no
    encoder that reads both ways all the same, as a BERT does unless its configuration says
    ``is_decoder``."""
    from transformers.models.auto import modeling_auto as known

    if type(model).__name__ not in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return False
    encodes = model.config.model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES  # type: ignore[union-attr]
    return not (encodes and getattr(model.config, "is_decoder", None) is False)


@torch.no_grad()
def output_of(model: nn.Module, state: State, batch: Batch, role: str) -> Tensor:
    """What is compared of one model on a batch, (B, …, d)."""
    with evaluating(model):
        return _checked(main_output(outputs_of(model, dict(state), batch)), batch, role)


def _checked(output: Tensor, batch: Batch, role: str) -> Tensor:
    """What a model puts out, refused unless it is finite and there is one for each text."""
    where = f"{batch.task!r}, batch {batch.number}, outputs of {role}"
    if len(output) != batch.size:
        shape, cure = f"shape {tuple(output.shape)}", "compare models of one text, without choices"
        raise Refused(where, f"one for each of {batch.size} texts", shape, cure)
    if not is_finite(output):
        raise NonFinite(where, output, "look for overflow in the model or for damaged weights")
    return output


def positions_of(output: Tensor, batch: Batch, row: int) -> Tensor:
    """Outputs (P, d) of one text at the positions that are no padding, out of (B, S, d); or (1, d)
    out of (B, d), where there is one for a text. Of a picture, all of them."""
    if output.dim() < 3:
        return output[row : row + 1]
    masks = batch.arguments.get("attention_mask")
    if masks is None:  # pictures, which have no padding
        return output[row]
    mask = masks[row]
    if output.shape[1] != len(mask):
        where, cure = f"{batch.task!r}, batch {batch.number}", "compare it from Python"
        expected = f"outputs at {len(mask)} positions, as there are tokens"
        raise Refused(where, expected, f"at {output.shape[1]}", cure)
    return output[row][mask != 0]


def tokens_of(batch: Batch, row: int) -> Tensor:
    """Ids (P,) of one text, without padding."""
    return batch.arguments["input_ids"][row][batch.arguments["attention_mask"][row] != 0]


def _text_of_outputs(own: Mapping[str, Tensor]) -> Text:
    """Sums over the outputs (P, …, d) of one text."""
    wide = {role: output.double() for role, output in own.items()}
    lost = float((wide[MERGED] - wide[EXPERT]).square().sum())
    energy = float((wide[BASE] - wide[EXPERT]).square().sum())
    return Text(len(own[EXPERT]), lost, energy, {}, {}, 0)


def _text_of_predictions(own: Mapping[str, Tensor], tokens: Tensor | None) -> Text:
    """Sums over the logits (P, classes) of one text.

    Args:
        tokens: ids (P,) of the text, where every position predicts the next of them.
    """
    logs = {role: logits.double().log_softmax(-1) for role, logits in own.items()}
    expert, first = logs[EXPERT], own[EXPERT].argmax(-1)
    equal, surprisal = {}, {}
    for role, log in logs.items():
        equal[role] = int((own[role].argmax(-1) == first).sum())
        if tokens is not None:
            surprisal[role] = surprisal_of(log[:-1], tokens[1:])
    targets = 0 if tokens is None else len(tokens) - 1
    lost = float((expert.exp() * (expert - logs[MERGED])).sum())
    energy = float((expert.exp() * (expert - logs[BASE])).sum())
    return Text(len(first), lost, energy, equal, surprisal, targets)


def surprisal_of(log: Tensor, following: Tensor) -> float:
    """Negative log-likelihood, in nats, of tokens (P,) under log-probabilities (P, tokens)."""
    return -float(log.gather(1, following.unsqueeze(1)).sum())


def estimates(texts: Sequence[Text]) -> dict[str, Estimate | None]:
    """What is told of the texts of one expert, by name.

    ``captured`` is ``1 - Σ lost / Σ energy``. Where there are predictions, ``agreement`` and
    ``agreement_of_base`` are the shares of positions at which merge and base predict what the
    expert does. Where there are next tokens, ``perplexity_of_…`` are those of the three models, and
    ``perplexity_ratio`` is the merge's over the expert's.
    """
    positions = [text.positions for text in texts]
    lost, energy = [text.lost for text in texts], [text.energy for text in texts]
    told = {"captured": ratio(lost, energy, _captured)}
    if texts[0].equal:
        told["agreement"] = ratio([text.equal[MERGED] for text in texts], positions)
        told["agreement_of_base"] = ratio([text.equal[BASE] for text in texts], positions)
    if texts[0].surprisal:
        targets = [text.targets for text in texts]
        for role in ROLES:
            own = [text.surprisal[role] for text in texts]
            told[f"perplexity_of_{role}"] = ratio(own, targets, exponential)
        more = [text.surprisal[MERGED] - text.surprisal[EXPERT] for text in texts]
        told["perplexity_ratio"] = ratio(more, targets, exponential)
    return told


def _captured(share: float) -> float:
    return 1 - share


def exponential(power: float) -> float:
    """``e**power``, infinite where no float holds it."""
    return math.exp(power) if power < 700 else math.inf
