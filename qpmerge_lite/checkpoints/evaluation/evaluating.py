"""Models in folders, measured on data: merges with their heads, experts, and the base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from ..architectures import empty_model, fields_of, require_transformers
from ..calibration.feeds import check_fields
from ..calibration.records import IMAGE, TEXT
from ..calibration.sources import Source, read_source
from ..diagnosis.diagnosing import recipe_of, seen_before
from ..findings import Refused
from ..folders import CONFIG, MANIFEST, Checkpoint
from ..heads.card import FOLDER, WEIGHTS
from ..heads.files import READERS
from ..heads.tasks import numbers_of_labels
from ..hub import local
from ..manifests import input_of
from ..orders import check_sizes
from ..outlines import outlined
from ..output import versions
from .labels import classes_of
from .scoring import Inputs, Scores, estimates_beside, estimates_of, read_alike, scores_of
from .subjects import BASE, EXPERT, LABELS, Models, SavedHead, Subject, kind_of, loaded, model_of

# of a merge
SMALL_OF_HEADS = tuple(f"{FOLDER}/*/{name}" for name in (CONFIG, *READERS))
OF_HEADS = (*SMALL_OF_HEADS, f"{FOLDER}/*/{WEIGHTS}")
LABEL = "label"  # the field of labels, where none is named


@dataclass
class Evaluation:
    """What is to be measured, and on what.

    Attributes:
        models: what tables call a merge, or another model -> its folder, or its reference at the
            Hub.
        data: name of a task -> file, folder, or address at the Hub, see ``sources``. A merge with
            heads gets the head of that name.
        labels: task -> field with the labels, where it is not called ``label``.
        columns: task -> fields of inputs, where they are not called as is usual.
        experts: task -> folder of its expert, beside which models are put: a whole model, or an
            adapter; or ``delta:FILE``.
        base: folder of the model that the experts were tuned from; it gets the first merge's heads.
            Adapters and task vectors are changes of it.
        samples: inputs of a task at the most, None for all.
        max_length: tokens of a text at the most.
        batch_size: inputs of a forward.
    """

    models: dict[str, Path]
    data: dict[str, str | Path]
    labels: dict[str, str] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    experts: dict[str, Path] = field(default_factory=dict)
    base: Path | None = None
    samples: int | None = None
    max_length: int = 128
    batch_size: int = 8


@dataclass
class Task:
    """One source, and the models that are run on it.

    Attributes:
        name: of the task.
        kind: what the models predict of an input, ``labels`` or ``tokens``.
        fields: what is read of a row.
        source: as it was read.
        subjects: the models; an expert first, and the base last.
        classes: name of a model -> classes of the inputs by its own labels; empty for ``tokens``.
    """

    name: str
    kind: str
    fields: Sequence[str]
    source: Source
    subjects: list[Subject]
    classes: dict[str, list[int]]


def evaluate_folders(question: Evaluation, *, progress: bool = False) -> dict:
    """How well models do on the inputs of every task. One model is in memory at a time.

    Returns: ``tasks`` (name -> ``kind``, ``data``, and ``models``: what a model is called -> its
        estimates, and those beside the expert), ``inputs`` with hashes, versions, warnings, notes.
    Raises: MergeError before any weight is read for whatever can be seen by then, and later for
        outputs that are not finite.
    """
    _check(question)
    require_transformers()
    with outlined(SMALL_OF_HEADS) as outlines:
        models = models_of(_placed(question, outlines.of))
        tasks = [_task(question, name, models.subjects(name)) for name in question.data]
    download = partial(local, progress=progress, more=OF_HEADS)
    models = models_of(_placed(question, download))
    for task in tasks:
        task.subjects = models.subjects(task.name)
    scores = _run(question, tasks, progress)
    return {
        "evaluation": 1,
        "versions": versions(True),
        "tasks": {task.name: _told(task, scores[task.name]) for task in tasks},
        "inputs": _inputs(tasks),
        "warnings": _warnings(tasks, [model.weights for model in models.own.values()]),
        "notes": _notes(tasks, scores),
    }


def _check(question: Evaluation) -> None:
    """Refused for names and sizes that do not fit."""
    if not question.data:
        cure = "give one: --data NAME=SOURCE"
        raise Refused("--data", "labelled inputs, or texts, of a task at least", "none", cure)
    named: dict[str, Mapping] = {
        "--label": question.labels,
        "--column": question.columns,
        "--expert": question.experts,
    }
    for option, given in named.items():
        for name in given:
            if name not in question.data:
                expected = f"one of the tasks of --data ({', '.join(question.data)})"
                cure = f"call it as its data are called, or add --data {name}=SOURCE"
                raise Refused(option, expected, repr(name), cure)
    for name in question.models:
        if name in (BASE, EXPERT):
            cure = "give the model another name: NAME=FOLDER"
            raise Refused("MODEL", f"a name that is neither {BASE} nor {EXPERT}", repr(name), cure)
    check_sizes(question, "max_length", "batch_size")
    if question.samples is not None:
        check_sizes(question, "samples")


def _placed(question: Evaluation, place: Callable[[Path], Path]) -> Evaluation:
    """The question with other places of all models."""
    models = {name: place(folder) for name, folder in question.models.items()}
    experts = {name: place(folder) for name, folder in question.experts.items()}
    base = None if question.base is None else place(question.base)
    return replace(question, models=models, experts=experts, base=base)


def models_of(question: Evaluation) -> Models:
    """The models of a question whose places are folders. Raises: what :func:`model_of` raises."""
    base = None if question.base is None else model_of(BASE, question.base, None).weights
    own = {name: model_of(name, place, base) for name, place in question.models.items()}
    experts = {name: model_of(name, place, base) for name, place in question.experts.items()}
    return Models(own, experts, base)


def _task(question: Evaluation, name: str, subjects: list[Subject]) -> Task:
    """A task with its source, as far as it can be seen before a weight is read."""
    empty = {subject.name: empty_model(subject.described) for subject in subjects}
    kinds = {subject.name: kind_of(subject, empty[subject.name]) for subject in subjects}
    kind, model = kinds[subjects[0].name], empty[subjects[0].name]
    for subject in subjects:
        if kinds[subject.name] != kind:
            where, cure = str(subject.described.folder), "evaluate models of one kind together"
            other = f"one that predicts {kinds[subject.name]}"
            raise Refused(where, f"a model that predicts {kind}", other, cure)
    usual: Sequence[str]
    if kind == LABELS:
        usual = (IMAGE,) if model.main_input_name == "pixel_values" else (TEXT,)
    else:
        usual = fields_of(model, str(subjects[0].described.folder))
    fields = question.columns.get(name, usual)
    check_fields(name, fields, usual)
    place, label = question.data[name], _label_of(question, name, kind)
    source = read_source(name, place, fields, question.samples, usual == (IMAGE,), label)
    classes = {}
    for subject in subjects if kind == LABELS else ():
        numbers = numbers_of_labels(subject.described)
        classes[subject.name] = classes_of(source.rows, numbers, name)
    return Task(name, kind, usual, source, subjects, classes)


def _label_of(question: Evaluation, name: str, kind: str) -> str | None:
    """The field with the labels of a task; None where none are read."""
    given = question.labels.get(name)
    if kind == LABELS:
        if given is not None and Path(question.data[name]).is_dir():
            cure = "leave it out: names of the folders are the labels"
            raise Refused("--label", "none for a folder of pictures", repr(given), cure)
        return given or LABEL
    if given is not None:
        cure = "leave it out, or give a classifier"
        expected = "none for a model that predicts tokens"
        raise Refused("--label", expected, repr(given), cure)
    return None


def _run(
    question: Evaluation, tasks: Sequence[Task], progress: bool
) -> dict[str, dict[str, Scores]]:
    """Task -> model -> its scores. Models are taken one after the other, each for all tasks."""
    from tqdm import tqdm

    by_task: dict[str, dict[str, Scores]] = {task.name: {} for task in tasks}
    by_model: dict[tuple[Path, Path], list[tuple[Task, Subject]]] = {}
    for task in tasks:
        for subject in task.subjects:
            by_model.setdefault(subject.place, []).append((task, subject))
    total = sum(len(task.source.rows) * len(task.subjects) for task in tasks)
    with tqdm(total=total, desc="inputs", disable=not progress) as bar:
        for pairs in by_model.values():
            for task, subject, scores in _run_one(question, pairs, bar):
                by_task[task.name][subject.name] = scores
    return by_task


def _run_one(
    question: Evaluation, pairs: Sequence[tuple[Task, Subject]], bar
) -> Iterator[tuple[Task, Subject, Scores]]:
    """Scores of one model, which is let go afterwards, on every task that it is run on."""
    model = loaded(pairs[0][1])
    for task, subject in pairs:
        inputs = Inputs(
            subject,
            model,
            task.source.rows,
            task.fields,
            task=task.name,
            max_length=question.max_length,
            batch_size=question.batch_size,
        )
        classes = task.classes.get(subject.name, [])
        scores = scores_of(model, subject.name, _counted(inputs, bar), task.kind, classes)
        scores.cut = inputs.cut
        yield task, subject, scores


def _counted(inputs: Inputs, bar) -> Iterable:
    """The inputs, counted by a progress bar as they are used."""
    for batch, targets in inputs:
        yield batch, targets
        bar.update(batch.size)


def _told(task: Task, scores: Mapping[str, Scores]) -> dict:
    """What is told of a task."""
    expert = scores.get(EXPERT)
    models = {}
    for subject in task.subjects:
        own = scores[subject.name]
        numbers = estimates_of(own, task.kind)
        if expert is not None and subject.name != EXPERT:
            if not read_alike(own, expert):
                where = str(subject.described.folder)
                cure = "see that both have one tokenizer, or leave --expert out"
                expected = "a model that reads texts as the expert's tokens"
                raise Refused(where, expected, "others", cure)
            numbers |= estimates_beside(own, expert, task.kind)
        models[subject.name] = {
            name: None if estimate is None else asdict(estimate)
            for name, estimate in numbers.items()
        }
    return {"kind": task.kind, "data": task.source.as_json(), "models": models}


def _inputs(tasks: Sequence[Task]) -> list[dict]:
    """Name, folder and hashes of every model, and of every head, each once."""
    rows: dict[Path, dict] = {}
    for task in tasks:
        for subject in task.subjects:
            name = f"{task.name}: {EXPERT}" if subject.name == EXPERT else subject.name
            place, head = subject.place
            if place not in rows:
                own = (subject.weights.config_file, MANIFEST)
                rows[place] = input_of(subject.weights, own) | {"name": name}
            if isinstance(subject.head, SavedHead) and head not in rows:
                named = {"name": f"{name}, head of {task.name}"}
                rows[head] = input_of(subject.head, (CONFIG,)) | named
    return list(rows.values())


def _warnings(tasks: Sequence[Task], models: Iterable[Checkpoint]) -> list[dict]:
    """A warning for every source that a merge was made on."""
    given = {task.name: task.source.as_json() for task in tasks}
    rows: list[dict] = []
    for checkpoint in models:
        rows += seen_before(recipe_of(checkpoint), given)
    return rows


def _notes(tasks: Sequence[Task], scores: Mapping[str, Mapping[str, Scores]]) -> list[str]:
    """What is good to know of the inputs, a sentence each."""
    told = []
    for task in tasks:
        if task.source.blank:
            name = task.source.name
            told.append(f"{task.name}: {task.source.blank} rows of {name} have no words: left out")
        cut = {subject: own.cut for subject, own in scores[task.name].items() if own.cut}
        if cut:
            told.append(f"{task.name}: texts were cut, {max(cut.values())} of them at the most")
    return told
