"""Whether checkpoints can be merged, from their configurations and headers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from math import prod
from pathlib import Path

from ..errors import MergeError
from .adapters.fitting import fit
from .adapters.reading import Adapter, is_adapter, read_adapter
from .comparison.fields import ARCHITECTURE, ONE_ARCHITECTURE, other_architecture, other_fields
from .deltas import reading as deltas
from .digests import sha256
from .findings import ERROR, INFO, LEVELS, WARNING, Finding, Refused, shortened
from .folders import (
    CONFIG,
    INDEX,
    PICKLED,
    SINGLE,
    TOKENIZER,
    Checkpoint,
    read_folder,
    under_names_of,
)
from .headers import Entry
from .heads.telling import AUTO, split


@dataclass
class Report:
    """What is known of checkpoints before a weight is read.

    Attributes:
        base, experts: as far as they could be read; where experts have heads of their own, these
            are experts without them.
        findings: errors first, then warnings, then what else is to be known.
        heads: expert's name -> its folder with the tensors of its own head alone.
        backbone: the base, where heads are kept with the tensors alone that are merged.
    """

    base: Checkpoint
    experts: list[Checkpoint]
    findings: list[Finding] = field(default_factory=list)
    heads: dict[str, Checkpoint] = field(default_factory=dict)
    backbone: Checkpoint = field(default=None)  # type: ignore[assignment]

    def __post_init__(self):
        if self.backbone is None:
            self.backbone = self.base

    @property
    def kept(self) -> list[str]:
        """Tensors of the base that the merge has as they are, as they are no part of the
        backbone."""
        merged = self.backbone.entries
        return [name for name in self.base.entries if name not in merged]

    @property
    def errors(self) -> list[Finding]:
        """Why these checkpoints are not merged."""
        return self.at(ERROR)

    def at(self, level: str) -> list[Finding]:
        """Findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    @property
    def bytes(self) -> int:
        """Bytes of weights that a merge reads."""
        return sum(checkpoint.bytes for checkpoint in (self.base, *self.experts))

    @property
    def parameters(self) -> int:
        """How many numbers the base has."""
        return sum(prod(entry.shape) for entry in self.base.entries.values())

    def as_json(self) -> dict:
        """The report in plain values."""
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "tensors": len(self.base.entries),
            "parameters": self.parameters,
            "bytes": self.bytes,
        }


def check(base: Path, experts: dict[str, Path], heads: str = AUTO) -> Report:
    """Everything to be known about a merge of these folders; no weight is read.

    Args:
        base: folder of the model that the experts were tuned from.
        experts: name -> folder, of a whole model or of an adapter of the base, or ``delta:FILE``.
        heads: whether experts' heads are their own, see ``heads.telling.split``.
    """
    origin, errors = read_folder("base", base)
    report = Report(origin, [], [*errors, *_by_itself(origin)])
    sound = []
    for name, folder in experts.items():
        expert, found = _read_expert(name, folder, origin)
        report.experts.append(expert)
        report.findings += found + _by_itself(expert)
        if not found and not errors:
            sound.append(expert)
    report.findings += _together(report, sound, heads)
    report.findings.sort(key=_severity)
    return report


def _together(report: Report, sound: list[Checkpoint], heads: str) -> list[Finding]:
    """What is to be known of the experts that could be read beside the base. Where their heads are
    their own, the report gets backbone and heads."""
    try:
        made, findings = split(report.base, sound, heads) if sound else (None, [])
    except Refused as refusal:
        return [refusal.finding]
    if made is not None:
        report.backbone, report.heads = made.backbone, made.heads
        merged = {expert.name: expert for expert in made.experts}
        report.experts = [merged.get(expert.name, expert) for expert in report.experts]
        sound = made.experts
    if any(finding.level == ERROR for finding in findings):
        return findings  # what else differs follows from these
    for expert in sound:
        findings += _compared(report.backbone, expert, has_head=made is not None)
    return findings


def _read_expert(name: str, folder: Path, base: Checkpoint) -> tuple[Checkpoint, list[Finding]]:
    if deltas.behind(folder) is not None:
        return deltas.read_delta(name, folder, base)
    return read_adapter(name, folder, base) if is_adapter(folder) else read_folder(name, folder)


def _severity(finding: Finding) -> int:
    return LEVELS.index(finding.level)


def _by_itself(checkpoint: Checkpoint) -> list[Finding]:
    """What is to be known of one checkpoint that could be read, or was read in part."""
    findings, where = [], checkpoint.folder / CONFIG
    quantised = checkpoint.config.get("quantization_config")
    if quantised is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        cure = "load the model dequantised, and save that"
        found = f"codes of quantised ones ({kind})"
        place = f"{where}, quantization_config"
        findings.append(Finding(ERROR, place, "weights that are numbers", found, cure))
    if checkpoint.config.get("auto_map"):
        findings.append(_remote_code(checkpoint))
    pickled = checkpoint.matching(PICKLED) if checkpoint.headers else []
    if pickled:
        cure = "nothing is to be done: they are never opened"
        place = str(checkpoint.folder / pickled[0])
        found = f"{len(pickled)} pickled file(s) beside them"
        findings.append(Finding(INFO, place, "weights in safetensors alone", found, cure))
    both = SINGLE in checkpoint.headers and (checkpoint.folder / INDEX).is_file()
    if both:
        cure = f"remove what is out of date; {SINGLE} is read, as transformers does"
        place = str(checkpoint.folder / INDEX)
        findings.append(Finding(WARNING, place, "one set of weights", "two", cure))
    return findings


def _remote_code(checkpoint: Checkpoint) -> Finding:
    """A configuration that points to code: an error unless transformers has the model itself."""
    where = f"{checkpoint.folder / CONFIG}, auto_map"
    expected = "a model of transformers itself"
    names = checkpoint.config.get("architectures") or []
    if find_spec("transformers") is not None and names:
        import transformers

        if all(hasattr(transformers, str(name)) for name in names):
            cure = "nothing is to be done: transformers' own class is taken"
            return Finding(INFO, where, expected, "one that has code of its own too", cure)
    cure = (
        "no code of a checkpoint is run; merge its state dicts from Python, with a class you trust"
    )
    return Finding(ERROR, where, expected, "one that needs code from its folder", cure)


def _compared(base: Checkpoint, expert: Checkpoint, has_head: bool) -> list[Finding]:
    """What is to be known of an expert beside its base, or of its backbone beside the base's."""
    if isinstance(expert, (Adapter, deltas.Delta)):
        fitted = fit(expert) if isinstance(expert, Adapter) else deltas.fit(expert)
        return [*fitted, *_tokenizers(base, expert)]
    older = under_names_of(base, expert)
    other = other_architecture(base, expert, ["model_type"] if has_head else ARCHITECTURE)
    if other:
        return [*other, *_names(base, expert)]
    return [
        *_older(expert, older),
        *other_fields(base, expert),
        *_names(base, expert),
        *_tensors(base, expert),
        *_tokenizers(base, expert),
        *_layouts(base, expert),
    ]


def _names(base: Checkpoint, expert: Checkpoint) -> list[Finding]:
    wanted, found = base.entries, expert.entries
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    findings, where = [], str(expert.folder)
    if missing:
        absent = f"none for {shortened(missing)}"
        findings.append(Finding(ERROR, where, "every tensor of the base", absent, ONE_ARCHITECTURE))
    if unknown:
        other = shortened(unknown)
        expected = "tensors of the base alone"
        findings.append(Finding(ERROR, where, expected, other, ONE_ARCHITECTURE))
    return findings


def _older(expert: Checkpoint, names: list[str]) -> list[Finding]:
    """What is to be known of tensors that the base's files call otherwise."""
    if not names:
        return []
    cure, own = "nothing is to be done: the merge has the base's", shortened(names)
    return [Finding(INFO, str(expert.folder), "the base's names of norms", own, cure)]


def _tensors(base: Checkpoint, expert: Checkpoint) -> list[Finding]:
    """Shapes and dtypes that differ; tensors that differ in one way are one finding."""
    places: dict[tuple[str, str, str, str], list[str]] = {}
    files, wanted = expert.files_of_tensors, base.entries
    for name, entry in expert.entries.items():
        way = _difference(base, wanted[name], entry) if name in wanted else None
        if way is not None:
            where = f"{expert.folder / files[name]}, tensor {name!r}"
            places.setdefault(way, []).append(where)
    findings = []
    for (level, like, found, cure), same in places.items():
        more = f", as in {len(same) - 1} more tensors" if len(same) > 1 else ""
        findings.append(Finding(level, same[0], like, f"{found}{more}", cure))
    return findings


def _difference(base: Checkpoint, like: Entry, entry: Entry) -> tuple[str, str, str, str] | None:
    """Level, what was expected and found, and cure, where an entry is not as the base's is."""
    if entry.shape != like.shape:
        cure = _cure_of_shape(base, like.shape)
        return ERROR, f"shape {like.shape}", f"shape {entry.shape}", cure
    if entry.dtype == like.dtype:
        return None
    dtypes = f"dtype {like.dtype}", f"dtype {entry.dtype}"
    if entry.is_number and like.is_number:
        cure = f"nothing is to be done: it is merged in float64 and stored in {like.dtype}"
        return WARNING, *dtypes, cure
    return ERROR, *dtypes, "load base and expert in the same way, and save them again"


def _cure_of_shape(base: Checkpoint, shape: tuple[int, ...]) -> str:
    if shape and shape[0] == base.config.get("vocab_size"):
        return (
            "the vocabulary is another one: experts have to keep the base's tokens and their number"
        )
    return ONE_ARCHITECTURE


def _tokenizers(base: Checkpoint, expert: Checkpoint) -> list[Finding]:
    """Files of the tokenizer that differ from the base's, or are there in one folder alone."""
    findings = []
    wanted, found = base.matching(TOKENIZER), expert.matching(TOKENIZER)
    if not found:
        return []
    for name in sorted({*wanted, *found}):
        where = str(expert.folder / name)
        if name not in found:
            cure = "nothing is to be done: the merge gets the base's"
            findings.append(Finding(INFO, where, "the base's file", "none", cure))
        elif name not in wanted:
            cure = "nothing is to be done: the merge has none, as the base has none"
            findings.append(Finding(INFO, where, "only files that the base has", "one more", cure))
        elif sha256(base.folder / name) != sha256(expert.folder / name):
            cure = "the merge gets the base's; see that both number the same tokens alike"
            findings.append(Finding(WARNING, where, "the base's file", "another one", cure))
    return findings


def _layouts(base: Checkpoint, expert: Checkpoint) -> list[Finding]:
    if base.files_of_tensors == expert.files_of_tensors:
        return []
    cure = "nothing is to be done: the merge is laid out as the base is"
    counts = f"{len(base.headers)} file(s) as the base has", f"{len(expert.headers)} other(s)"
    return [Finding(INFO, str(expert.folder), *counts, cure)]


def refuse_errors(report: Report) -> None:
    """A MergeError with every error of a report, where there is one."""
    errors = report.errors
    if len(errors) == 1:
        only = errors[0]
        raise Refused(only.where, only.expected, only.found, only.cure)
    if errors:
        lines = "\n".join(f"  {error.message}" for error in errors)
        raise MergeError(f"{len(errors)} reasons not to merge these:\n{lines}")
