"""What a merge in a folder, whoever made it, does to every expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...assess import audit
from ...calibration import Batch, check_calibration
from ...errors import MergeError
from ...experts import State, check_experts
from ..calibrated import Running, cast
from ..calibration.feeds import Feed, feed_of
from ..calibration.sources import SAMPLES
from ..compatibility import Report, check, refuse_errors
from ..findings import WARNING, Finding, Refused, shortened
from ..folders import CONFIG, MANIFEST, OTHERS, TOKENIZER, Checkpoint, read_json
from ..heads.running import functions_of, noting_arguments
from ..heads.tasks import has_task
from ..heads.telling import AUTO, OPTION, OWN
from ..heads.telling import MERGED as LIKE_THE_REST
from ..hub import local
from ..manifests import input_of, warnings_of
from ..orders import check_all_named, check_names, check_sizes
from ..outlines import outlined
from ..output import versions
from ..planning import READERS
from ..weights_only import located
from .certificates import certify_in_passing
from .comparing import (
    BASE,
    ENERGY,
    EXPERT,
    LOGITS,
    MERGED,
    PREDICTIONS,
    Text,
    compared,
    compared_by_head,
    estimates,
    what_is_returned,
)

NO_EXPERT = ""  # what the merge is called beside experts, which may have every other name


@dataclass
class Question:
    """Which merge is to be diagnosed, and on what.

    Attributes:
        merged: folder of the merge, or its reference at the Hub.
        base: folder of the model that the experts were tuned from, or its reference.
        experts: name -> folder, or reference, or ``delta:FILE``.
        calibration: expert's name -> file, folder, or address at the Hub, see ``sources``.
        columns: expert's name -> fields to read, where they are not called as is usual.
        samples: inputs of an expert at the most.
        max_length: tokens of a text at the most.
        batch_size: inputs of a forward.
    """

    merged: Path
    base: Path
    experts: dict[str, Path]
    calibration: dict[str, str | Path] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    samples: int = SAMPLES
    max_length: int = 128
    batch_size: int = 8


def diagnose_folders(question: Question, *, progress: bool = False) -> dict:
    """What a merge does to the outputs of every expert, and of every layer.

    Three models are in memory, and all experts for the certificates, which are those of the merge
    of all of them.

    Returns: ``compared`` (what of the outputs is), ``experts`` (name -> estimates and texts),
        ``layers`` (energy by expert and certificate of each, in forward order), ``left_out`` (why
        entries are in no layer), ``untouched`` (entries that some expert changed and the merge did
        not), ``recipe`` (the merge's own manifest), inputs with hashes, versions and warnings.
    Raises: MergeError before any weight is read for whatever can be seen by then, and later for
        weights and outputs that are not finite.
    """
    check_names("--calibration", question.calibration, question.experts)
    check_names("--column", question.columns, question.experts)
    told = "as what a merge does to an expert is seen on texts of its task"
    expected = "a file for every expert, for diagnose"
    check_all_named("--calibration", question.calibration, question.experts, expected, told)
    check_sizes(question, "samples", "max_length", "batch_size")
    with outlined() as outlines:
        checked(_placed(question, outlines.of))
    report, of_merge = checked(_placed(question, partial(local, progress=progress)))
    (merged,) = of_merge.experts
    recipe = recipe_of(merged)
    inputs = feed_of(question, report)
    calibration = inputs.as_json()
    warnings = seen_before(recipe, calibration) + warnings_of(report)
    warnings += [warning for warning in warnings_of(of_merge) if warning not in warnings]
    measured = _Measuring(report, merged, inputs).run(progress)
    return {
        "diagnosis": 1,
        "versions": versions(True),
        **measured,
        "recipe": recipe,
        "inputs": _inputs(report.base, merged, report.experts),
        "calibration": calibration,
        "warnings": warnings,
        "notes": inputs.notes,
    }


def _placed(question: Question, place: Callable[[Path], Path]) -> Question:
    """The question with other places of base, merge and experts."""
    experts = {name: place(expert) for name, expert in question.experts.items()}
    base, merged = place(question.base), place(question.merged)
    return replace(question, base=base, merged=merged, experts=experts)


def checked(question: Question) -> tuple[Report, Report]:
    """The experts beside their base, as the merge took them; and the merge beside it, which has all
    tensors of the base.

    Raises: MergeError where they do not fit.
    """
    of_merge = check(question.base, {NO_EXPERT: question.merged}, heads=LIKE_THE_REST)
    refuse_errors(of_merge)
    (merged,) = of_merge.experts
    merged.name = MERGED
    report = check(question.base, question.experts, heads=_heads_of(merged))
    for error in report.errors:
        if error.where == OPTION:  # which only those who merge can take back
            kept = shortened(recipe_of(merged)["heads"])
            expected = f"experts with the heads that the merge keeps, {kept}"
            cure = "give the experts as they were merged, with their heads"
            raise Refused("experts", expected, error.found, cure)
    refuse_errors(report)
    return report, of_merge


def _heads_of(merged: Checkpoint) -> str:
    """Whether experts' heads are their own, by what the merge is: it keeps them, or has one of a
    task that was merged like everything else, or none, so that the experts tell."""
    recipe = recipe_of(merged) or {}
    if recipe.get("heads"):
        return OWN
    return LIKE_THE_REST if has_task(merged) else AUTO


def recipe_of(merged: Checkpoint) -> dict | None:
    """What the merge says of how it was made, None where it says nothing."""
    return read_json(merged.folder / MANIFEST) if merged.matching([MANIFEST]) else None


def _inputs(base: Checkpoint, merged: Checkpoint, experts: Sequence[Checkpoint]) -> list[dict]:
    """Name, folder and hashes of every checkpoint."""
    models = [input_of(merged, (CONFIG, MANIFEST)), input_of(base, (*OTHERS, *TOKENIZER))]
    for expert in experts:
        models.append(input_of(expert, (expert.config_file, *READERS)))
    return models


def seen_before(recipe: dict | None, calibration: Mapping[str, dict]) -> list[dict]:
    """A warning for every file of texts that the merge was made on."""
    used = (recipe or {}).get("calibration")
    if not isinstance(used, dict):
        return []
    hashes = [given.get("sha256") for given in used.values() if isinstance(given, dict)]
    rows = []
    for name, given in calibration.items():
        if given["sha256"] in hashes:
            where = f"calibration of {name!r}, {given['file']}"
            seen = f"the file that {MANIFEST} says it was made on"
            cure = "the numbers flatter it; give other texts of the task"
            expected = "texts that the merge has not seen"
            rows.append(asdict(Finding(WARNING, where, expected, seen, cure)))
    return rows


class _Measuring:
    """Runs the models: a base, a merge, experts, and their inputs."""

    def __init__(
        self,
        report: Report,
        merged: Checkpoint,
        inputs: Feed,
    ):
        self.base, self.merged, self.experts = report.base, merged, report.experts
        self.running = Running(report)
        self.model = self.running.module
        self.model.config.return_dict = True
        # functions of the experts' own heads; None where these are merged, or predict no classes
        self.heads = functions_of(report.heads, self.model) if report.heads else None
        dtype = self.model.dtype
        self.batches = {name: cast(batches, dtype) for name, batches in inputs.batches.items()}

    def run(self, progress: bool) -> dict:
        """What of the result hangs on weights."""
        read = [self.base, self.merged, *self.experts]
        try:
            return self._run(progress)
        except MergeError as error:
            raise located(error, read, self.running.names) from error

    def _run(self, progress: bool) -> dict:
        from tqdm import tqdm

        state = self._state(self.merged)
        first = self.experts[0].name
        device = next(self.model.parameters()).device
        numbered = check_calibration(self.batches, list(self.batches), device)
        kind, field = what_is_returned(self.model, numbered[first][0])
        if self.heads is not None:
            kind, field = PREDICTIONS, LOGITS
        what = {"kind": kind, "field": field, "model": type(self.model).__name__}
        told: dict = {"compared": what | {"by_heads": self.heads is not None}}
        told["experts"], energies, changed = {}, {}, set[str]()
        before = self.running.stored(self.model.state_dict())
        for expert in tqdm(self.experts, desc="experts", disable=not progress):
            own = self._state(expert)
            states = {MERGED: state, EXPERT: own, BASE: self.model.state_dict()}
            told["experts"][expert.name] = self._told(states, numbered[expert.name], kind)
            energies[expert.name] = self._energies(expert.name, state, own)
            changed |= _differing(self.running.stored(own), before)
        untouched = changed - _differing(self.running.stored(state), before)
        certificates, left_out = self._certificates(state, progress)
        told["layers"] = _layers(energies, certificates)
        told["left_out"] = left_out
        told["untouched"] = [name for name in self.base.entries if name in untouched]
        return told

    def _state(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """The weights of a checkpoint as the model has them."""
        weights = self.running.state_of(checkpoint)
        return check_experts(self.model, {checkpoint.name: weights}, cast=True)[checkpoint.name]

    def _told(self, states: Mapping[str, State], batches: Sequence[Batch], kind: str) -> dict:
        """What is told of one expert, by models' weights and its own inputs."""
        if self.heads is None:
            return _of_expert(list(compared(self.model, states, batches, kind)))
        with noting_arguments(self.model):
            pairs = list(compared_by_head(self.model, states, batches, self.heads))
        told = _of_expert([predictions for predictions, _ in pairs])
        captured = estimates([outputs for _, outputs in pairs])["captured"]
        return told | {ENERGY: None if captured is None else asdict(captured)}

    def _energies(self, name: str, state, own) -> dict[str, float | None]:
        """Captured energy of every layer's output, on the texts of one expert."""
        return audit(self.model, state, {name: own}, {name: self.batches[name]})["layers"]

    def _certificates(self, state, progress: bool):
        """Certificate by layer; and why entries are in none, by reason."""
        experts = {expert.name: self._state(expert) for expert in self.experts}
        certificates, reasons = certify_in_passing(
            self.model, state, experts, self.batches, progress=progress
        )
        by_reason: dict[str, list[str]] = {}
        by_file = self.running.by_file(reasons)
        for name in self.base.entries:
            if name in by_file:
                by_reason.setdefault(by_file[name], []).append(name)
        return certificates, by_reason


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    """Names of entries that are not bit for bit the same."""
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


def _of_expert(texts: list[Text]) -> dict:
    """Estimates of one expert, and what they are made of."""
    numbers = {}
    for name, estimate in estimates(texts).items():
        numbers[name] = None if estimate is None else asdict(estimate)
    positions = sum(text.positions for text in texts)
    return {"positions": positions, **numbers, "texts": [asdict(text) for text in texts]}


def _layers(
    energies: Mapping[str, Mapping[str, float | None]],
    certificates: Mapping[str, Mapping[str, float]],
) -> list[dict]:
    """A row for every layer that some expert's texts reach, in forward order."""
    names = dict.fromkeys(name for of_one in energies.values() for name in of_one)
    rows = []
    for name in names:
        own = {expert: of_one.get(name) for expert, of_one in energies.items()}
        rows.append({"layer": name, "energy": own, "certificate": certificates.get(name)})
    return rows
