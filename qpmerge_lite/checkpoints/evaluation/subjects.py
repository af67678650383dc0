"""Models that are evaluated on a task: as they are, or a merged backbone with one of its heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..adapters.reading import WHOLE, is_adapter
from ..architectures import HERE_ALONE, TROUBLES, class_of, quietly
from ..calibrated import build, dtype_of
from ..compatibility import check, refuse_errors
from ..diagnosis.comparing import NOT_CLASSES, is_causal
from ..findings import Refused, shortened
from ..folders import CONFIG, Checkpoint, read_json
from ..headers import read_header
from ..heads.card import FOLDER, WEIGHTS
from ..heads.tasks import class_named, labels_of
from ..tensors import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LABELS, TOKENS = "labels", "tokens"
CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


class SavedHead(Checkpoint):
    """A head in the folder of a merge: its configuration, and a file with its tensors alone."""

    is_sharded = False


@dataclass(frozen=True)
class Subject:
    """A model that is run on the inputs of a task.

    Attributes:
        name: what tables call it.
        weights: the folder with the weights of the model, or of its backbone.
        head: the folder of the head that it gets, None for a model as it is.
        beside: whose tokenizer or processor reads its inputs where it has none; None for nobody's.
    """

    name: str
    weights: Checkpoint
    head: Checkpoint | None = None
    beside: Checkpoint | None = None

    @property
    def described(self) -> Checkpoint:
        """The folder whose configuration is that of the model, and whose tokenizer or processor
        reads its inputs if it has one."""
        return self.weights if self.head is None else self.head

    @property
    def otherwise(self) -> Checkpoint:
        """Whose tokenizer or processor reads its inputs where that folder has none."""
        return self.beside or self.weights


def checkpoint_of(folder: Path) -> Checkpoint:
    """A folder with a whole model, as far as its configuration and headers say.

    Raises: MergeError where there is none that can be used.
    """
    if is_adapter(folder):
        raise Refused(folder, "a whole model", "an adapter", WHOLE)
    report = check(folder, {})
    refuse_errors(report)
    return report.base


def subject_of(name: str, weights: Checkpoint, task: str) -> Subject:
    """A model on a task: where its folder has heads, with the one that is called as the task.

    Raises: Refused for a merge without a head of that name.
    """
    heads = weights.folder / FOLDER
    known = sorted(path.name for path in heads.iterdir()) if heads.is_dir() else []
    if not known:
        return Subject(name, weights)
    if task not in known:
        cure = "call the data as the head is called: --data HEAD=SOURCE"
        raise Refused(heads, f"a head called {task!r}", shortened(known, 8), cure)
    folder = heads / task
    headers = {WEIGHTS: read_header(folder / WEIGHTS)}
    return Subject(name, weights, SavedHead(task, folder, read_json(folder / CONFIG), headers))


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
    if subject.head is None:
        return build(subject.weights)[0]
    from transformers import AutoConfig

    weights, head = subject.weights, subject.head
    try:
        with quietly():
            config = AutoConfig.from_pretrained(head.folder, **HERE_ALONE)
            model, told = class_of(head).from_pretrained(
                weights.folder,
                config=config,
                dtype=dtype_of(weights),
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **HERE_ALONE,
            )
            own = read_tensors(head, head.entries)
            unknown = model.load_state_dict(own, strict=False).unexpected_keys
    except TROUBLES as error:
        cure = "see that backbone and head are of one merge"
        expected = f"a backbone that {class_named(head.config)} loads, and its head"
        raise Refused(weights.folder, expected, f"{error}", cure) from error
    mismatched = [name for name, *_ in told["mismatched_keys"]]
    absent = [name for name in [*told["missing_keys"], *mismatched] if name not in own]
    if unknown or absent:
        single = f"{shortened([*unknown, *absent])} in one of them alone"
        cure = "see that backbone and head are of one merge"
        raise Refused(head.folder, "a head that completes the backbone", single, cure)
    return model.eval()
