"""The embedded suites on the disk: checkpoints, texts, pictures, and some that do not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from ...suites import Suite, esm, language, vit

WORDS = "embeddings.word_embeddings.weight"  # of a checkpoint: the table of characters


def save(place: Path, suite: Suite, tasks: Iterable[str], adapted: str, rank: int) -> None:
    """Write base and experts as folders.

    Args:
        tasks: whose experts are written.
        adapted: the one of them that is written as an adapter of this ``rank``.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    base = suite.base.state_dict()
    esm.save(place / "base", base)
    for task in tasks:
        if task == adapted:
            esm.save_adapter(place / task, base, suite.experts[task], rank)
        else:
            esm.save(place / task, suite.experts[task])


def save_classifiers(place: Path, suite: Suite, tasks: Iterable[str], count: int) -> None:
    """Write the vision suite's base, experts with their heads, and test pictures in folders that
    are called as their labels.

    Args:
        tasks: whose experts are written, each with the first ``count`` of its test pictures.
    """
    vit.save(place / "pixels", suite.base.state_dict())
    for task in tasks:
        rows = suite.data[task]["test"]
        names = rows.features["label"].names
        vit.save(place / task, suite.experts[task], suite.heads[task], names)
        shown = rows.select(range(min(count, rows.num_rows)))
        labels = [names[label] for label in shown["label"]]
        vit.save_pictures(place / "test" / task, shown["image"], labels)


def save_texts(file: Path, suite: Suite, task: str, split: str, count: int) -> None:
    """Write the first texts of a split as JSON lines, without their labels."""
    rows = suite.data[task][split].select(range(count))["text"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_misfits(place: Path) -> None:
    """Write two experts that do not fit the base: ``longer`` knows one character more, and the
    weights of ``pickled`` are no safetensors."""
    told = json.loads((place / "base" / "config.json").read_text(encoding="utf-8"))
    state = load_file(place / "base" / "model.safetensors")
    for name in ("longer", "pickled"):
        (place / name).mkdir()
    (place / "pickled" / "config.json").write_text(json.dumps(told), encoding="utf-8")
    torch.save(state, place / "pickled" / "pytorch_model.bin")
    state[WORDS] = torch.cat([state[WORDS], state[WORDS][-1:]])
    told["vocab_size"] = len(state[WORDS])
    (place / "longer" / "config.json").write_text(json.dumps(told), encoding="utf-8")
    save_file(state, place / "longer" / "model.safetensors", {"format": "pt"})


def texts_of(file: Path) -> list[str]:
    """The texts of a file of JSON lines."""
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two entries of the same name and place, of tensors (…)."""
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


@torch.no_grad()
def captured(suite: Suite, merged: dict, expert: dict, texts: list[str]) -> dict[str, float]:
    """Captured energy of the output on some texts, by the suite's own encoder: at every
    ``character``, and of the mean over each ``text``, which is what heads read.

    Args:
        merged, expert: state dicts of :func:`language.build`.
    """
    rows = language.collate({"text": texts})
    letters = rows["attention_mask"].bool()
    states = {}
    for name, state in {"base": {}, "expert": expert, "merge": merged}.items():
        encoder = language.build().eval()
        encoder.load_state_dict(suite.base.state_dict() | state)
        states[name] = encoder.states(**rows)
    means = {name: language.build().pool(s, rows["attention_mask"]) for name, s in states.items()}
    characters = {name: value[letters] for name, value in states.items()}
    energies = {}
    for kind, outputs in {"character": characters, "text": means}.items():
        energy = (outputs["base"] - outputs["expert"]).square().sum()
        lost = (outputs["merge"] - outputs["expert"]).square().sum()
        energies[kind] = float(1 - lost / energy)
    return energies


def told(said: str, expert: str) -> float:
    """The captured energy that ``qpmerge diagnose`` has printed of an expert."""
    return float(re.search(rf"^{expert} +\d+ +(\S+)", said, re.MULTILINE)[1].replace("−", "-"))


@torch.no_grad()
def accuracy(suite: Suite, task: str, state: dict[str, Tensor], count: int) -> float:
    """Accuracy on the first ``count`` test examples of a task, by the suite's own encoder and head.

    Args:
        state: of the encoder.
    """
    inputs, labels = suite.tensors(task, "test")
    first = {name: value[:count] for name, value in inputs.items()}
    features = functional_call(suite.base, state, (), first)
    predicted = suite.classifiers()[task](features).argmax(1)
    return float((predicted == labels[:count]).double().mean())


def accuracies(said: str, task: str) -> dict[str, tuple[float, float, float]]:
    """What ``qpmerge evaluate`` has printed of a task: model -> accuracy and both ends of its
    interval."""
    found = re.findall(rf"^{task} +(\S+) +\d+ +(\S+) \[(\S+), (\S+)\]", said, re.MULTILINE)
    return {name: (float(value), float(low), float(high)) for name, value, low, high in found}


def framed(page: Path, height: int) -> str:
    """A page of HTML in a frame of another, so many pixels high, where none of it runs."""
    content = escape(page.read_text(encoding="utf-8"))
    style = f"width: 100%; height: {height}px; border: 1px solid #999; background: white"
    settings = f'title="what qpmerge diagnose reports" sandbox style="{style}"'
    return f'<div><iframe {settings} srcdoc="{content}"></iframe></div>'
