"""Models that are evaluated on a task: as they are, or a merged backbone with one of its heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from ..adapters.reading import WHOLE, is_adapter
from ..architectures import HERE_ALONE, TROUBLES, class_of, configuration_of, quietly
from ..calibrated import build, dtype_of
from ..compatibility import check, refuse_errors
from ..deltas.reading import WHOLE as WHOLE_OF_DELTA
from ..deltas.reading import behind
from ..diagnosis.comparing import NOT_CLASSES, is_causal
from ..findings import Refused, shortened
from ..folders import CONFIG, Change, Checkpoint, read_json
from ..headers import read_header
from ..heads.card import FOLDER, WEIGHTS
from ..heads.tasks import class_named, labels_of
from ..heads.telling import Backbone
from ..tensors import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE, EXPERT = "base", "expert"
LABELS, TOKENS = "labels", "tokens"
CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


class SavedHead(Checkpoint):
    """A head in the folder of a merge: its configuration, and a file with its tensors alone."""

    is_sharded = False


class Model(NamedTuple):
    """A model as far as its configuration and headers say.

    Attributes:
        weights: the folder with its weights, or an adapter or a task vector and its base.
        head: what an adapter keeps for its task; None for a model as it is.
    """

    weights: Checkpoint
    head: Checkpoint | None = None


@dataclass(frozen=True)
class Subject:
    """A model that is run on the inputs of a task.

    Attributes:
        name: what tables call it.
        weights: the folder with the weights of the model, or of its backbone; or what changes
            those of its base.
        head: the folder of the head that it gets, None for a model as it is.
        beside: whose tokenizer or processor reads its inputs where it has none; None for nobody's.
    """

    name: str
    weights: Checkpoint
    head: Checkpoint | None = None
    beside: Checkpoint | None = None

    @property
    def whole(self) -> Checkpoint:
        """The folder with weights of all tensors: its own, or its base's."""
        return self.weights.base if isinstance(self.weights, Change) else self.weights

    @property
    def described(self) -> Checkpoint:
        """The folder whose configuration is that of the model."""
        return self.whole if self.head is None else self.head

    @property
    def reader(self) -> Checkpoint:
        """The folder whose tokenizer or processor reads its inputs if it has one."""
        return self.weights if self.head is None else self.head

    @property
    def otherwise(self) -> Checkpoint:
        """Whose tokenizer or processor reads its inputs where that folder has none."""
        return self.beside or self.whole

    @property
    def place(self) -> tuple[Path, Path]:
        """Where its weights are, and its head: the same for one model."""
        own = self.weights
        place = own.place if isinstance(own, Change) else own.folder
        return place, self.described.folder


def model_of(name: str, place: Path, base: Checkpoint | None) -> Model:
    """A model in a folder, or as a change of its base, as far as configurations and headers say.

    Args:
        base: of adapters and task vectors; None where none was named.
    Raises: MergeError where there is none that can be used.
    """
    is_vector = behind(place) is not None
    if not (is_vector or is_adapter(place)):
        report = check(place, {})
        refuse_errors(report)
        return Model(report.base)
    if base is None:
        kind = "a task vector" if is_vector else "an adapter"
        cure = f"name its base: --base FOLDER; or {WHOLE_OF_DELTA if is_vector else WHOLE}"
        raise Refused(place, "a whole model, or a change of one beside its base", kind, cure)
    report = check(base.folder, {name: place})
    refuse_errors(report)
    return Model(report.experts[0], report.heads.get(name))


def subject_of(name: str, model: Model, task: str, beside: Checkpoint | None = None) -> Subject:
    """A model on a task: where its folder has heads, with the one that is called as the task.

    Args:
        beside: as of ``Subject``.
    Raises: Refused for a merge without a head of that name.
    """
    heads = model.weights.folder / FOLDER
    known = sorted(path.name for path in heads.iterdir()) if heads.is_dir() else []
    if model.head is not None or not known:
        return Subject(name, model.weights, model.head, beside)
    if task not in known:
        cure = "call the data as the head is called: --data HEAD=SOURCE"
        raise Refused(heads, f"a head called {task!r}", shortened(known, 8), cure)
    folder = heads / task
    headers = {WEIGHTS: read_header(folder / WEIGHTS)}
    head = SavedHead(task, folder, read_json(folder / CONFIG), headers)
    return Subject(name, model.weights, head, beside)


@dataclass
class Models:
    """All models of an evaluation, as far as configurations and headers say.

    Attributes:
        own: name -> model.
        experts: task -> its expert.
        base: None where none was named.
    """

    own: dict[str, Model]
    experts: dict[str, Model]
    base: Checkpoint | None

    def subjects(self, task: str) -> list[Subject]:
        """The models of a task; an expert first, and the base last.

        Raises: what :func:`subject_of` raises.
        """
        subjects = [subject_of(name, model, task) for name, model in self.own.items()]
        experts = []
        if task in self.experts:
            beside = self.base or subjects[0].whole
            experts.append(subject_of(EXPERT, self.experts[task], task, beside))
        if self.base is not None:
            every = [*subjects, *experts]
            heads = [subject.head for subject in every if subject.head is not None]
            subjects.append(Subject(BASE, self.base, heads[0] if heads else None))
        return experts + subjects


def kind_of(subject: Subject, model: nn.Module) -> str:
    """Whether a model predicts ``labels`` of its inputs, or their next ``tokens``.

    Raises: Refused for other models.
    """
    decodes = model.config.is_encoder_decoder and model.can_generate()  # type: ignore[union-attr, operator]
    if decodes or is_causal(model):
        return TOKENS
    kind, problem = type(model).__name__, getattr(model.config, "problem_type", None)
    where = str(subject.described.folder)
    expected = "a classifier of texts or pictures, or a model that predicts the next token"
    if not any(name in kind for name in CLASSIFIERS):
        cure = "give the merge of experts with heads, which keeps these; or such a model"
        raise Refused(where, expected, kind, cure)
    count = len(labels_of(subject.described))
    if count < 2 or problem in NOT_CLASSES:
        numbers = problem or f"{count} label"
        cure = "evaluate it with transformers: accuracy is of one label out of several"
        raise Refused(f"{where}/{CONFIG}", "two labels or more, one for an input", numbers, cure)
    return LABELS


def loaded(subject: Subject) -> PreTrainedModel:
    """The model with its weights, in evaluation mode and in the dtype of most of them. No code of
    the folder is run, and nothing is asked of a network.

    Raises: Refused where it is not all there.
    """
    weights, head = subject.weights, subject.head
    if head is None and not isinstance(weights, Change):
        return build(weights)[0]
    made = class_of(subject.described)
    own = {} if head is None else read_tensors(head, head.entries)
    source, state = weights.folder, None
    if isinstance(weights, Change):
        source, state = None, _changed(weights, made.base_model_prefix) | own
    try:
        with quietly():
            model, told = made.from_pretrained(
                source,
                config=configuration_of(subject.described),
                state_dict=state,
                dtype=dtype_of(weights),
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **HERE_ALONE,
            )
            unknown = model.load_state_dict(own, strict=False).unexpected_keys
    except TROUBLES as error:
        cure = "see that backbone and head are of one merge"
        expected = f"a backbone that {class_named(subject.described.config)} loads, and its head"
        raise Refused(weights.folder, expected, f"{error}", cure) from error
    mismatched = [name for name, *_ in told["mismatched_keys"]]
    absent = [name for name in [*told["missing_keys"], *mismatched] if name not in own]
    if unknown or absent:
        single = f"{shortened([*unknown, *absent])} in one of them alone"
        cure = "see that backbone and head are of one merge"
        expected = "a head that completes the backbone"
        raise Refused(subject.described.folder, expected, single, cure)
    return model.eval()


def _changed(change: Change, prefix: str) -> dict[str, Tensor]:
    """All tensors of the base with their changes; those of a backbone under the names that they
    have in a model with a head.

    Args:
        prefix: of the backbone in such a model.
    """
    tensors = read_tensors(change, change.entries)
    if not isinstance(change.base, Backbone):
        return tensors
    start = change.base.prefix
    return {f"{prefix}.{name.removeprefix(start)}": value for name, value in tensors.items()}
