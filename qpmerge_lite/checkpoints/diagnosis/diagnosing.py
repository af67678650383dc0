"""What a merge in a folder, whoever made it, does to every expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...assess import audit
from ...calibration import check_calibration
from ...errors import MergeError
from ...experts import check_experts
from ..calibrated import build, cast
from ..calibration.feeds import Feed, feed_of
from ..calibration.sources import SAMPLES
from ..compatibility import check, refuse_errors
from ..findings import WARNING, Finding
from ..folders import CONFIG, OTHERS, TOKENIZER, Checkpoint, read_json
from ..heads.telling import MERGED as LIKE_THE_REST
from ..manifests import input_of, warnings_of
from ..orders import check_all_named, check_names, check_sizes, fetched
from ..output import MANIFEST, versions
from ..planning import READERS
from ..weights_only import located
from .certificates import certify_in_passing
from .comparing import BASE, EXPERT, MERGED, Text, compared, estimates, what_is_returned

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
    places = {NO_EXPERT: question.merged, **question.experts}
    base, folders = fetched(question.base, places, LIKE_THE_REST, progress)
    report = check(base, folders, heads=LIKE_THE_REST)
    refuse_errors(report)
    merged, *experts = report.experts
    merged.name = MERGED
    recipe = recipe_of(merged)
    inputs = feed_of(question, replace(report, experts=experts))  # whose findings are shared
    calibration = inputs.as_json()
    warnings = [*seen_before(recipe, calibration), *warnings_of(report)]
    measured = _Measuring(report.base, merged, experts, inputs).run(progress)
    return {
        "diagnosis": 1,
        "versions": versions(True),
        **measured,
        "recipe": recipe,
        "inputs": _inputs(report.base, merged, experts),
        "calibration": calibration,
        "warnings": warnings,
        "notes": inputs.notes,
    }


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
        base: Checkpoint,
        merged: Checkpoint,
        experts: Sequence[Checkpoint],
        inputs: Feed,
    ):
        self.base, self.merged, self.experts = base, merged, experts
        self.model, self.layout = build(base)
        self.model.config.return_dict = True
        dtype = self.model.dtype
        self.batches = {name: cast(batches, dtype) for name, batches in inputs.batches.items()}

    def run(self, progress: bool) -> dict:
        """What of the result hangs on weights."""
        read = [self.base, self.merged, *self.experts]
        try:
            return self._run(progress)
        except MergeError as error:
            raise located(error, read, list(self.base.entries)) from error

    def _run(self, progress: bool) -> dict:
        from tqdm import tqdm

        state = self._state(self.merged)
        first = self.experts[0].name
        device = next(self.model.parameters()).device
        numbered = check_calibration(self.batches, list(self.batches), device)
        kind, field = what_is_returned(self.model, numbered[first][0])
        told: dict = {"compared": {"kind": kind, "field": field, "model": _name(self.model)}}
        told["experts"], energies, changed = {}, {}, set[str]()
        before = self.layout.stored(self.model.state_dict())
        for expert in tqdm(self.experts, desc="experts", disable=not progress):
            own = self._state(expert)
            states = {MERGED: state, EXPERT: own, BASE: self.model.state_dict()}
            texts = list(compared(self.model, states, numbered[expert.name], kind))
            told["experts"][expert.name] = _of_expert(texts)
            energies[expert.name] = self._energies(expert.name, state, own)
            changed |= _differing(self.layout.stored(own), before)
        untouched = changed - _differing(self.layout.stored(state), before)
        certificates, left_out = self._certificates(state, progress)
        told["layers"] = _layers(energies, certificates)
        told["left_out"] = left_out
        told["untouched"] = [name for name in self.base.entries if name in untouched]
        return told

    def _state(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """The weights of a checkpoint as the model has them."""
        weights = self.layout.state_of(checkpoint)
        return check_experts(self.model, {checkpoint.name: weights}, cast=True)[checkpoint.name]

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
        for name in self.base.entries:
            reason = reasons.get(self._named(name))
            if reason is not None:
                by_reason.setdefault(reason, []).append(name)
        return certificates, by_reason

    def _named(self, name: str) -> str:
        """What the model calls an entry of the files."""
        return self.layout.in_model.get(name, name)


def _name(model: nn.Module) -> str:
    return type(model).__name__


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
