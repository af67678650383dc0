"""Experts of a suite: linear probe, joint fine-tuning, and a cache under the hash of all that
determines them. A suite's own numbers are its module's ``RECIPE``."""

import copy
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock  # torch needs it too
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ...errors import MergeError

# Raised whenever this file changes what an expert's weights are.
CODE_VERSION = 2
CHUNK = 512


@dataclass(frozen=True)
class Recipe:
    """How an expert is made: a linear probe on the base, then encoder (or one ``layer`` of it) and
    head together under AdamW.

    ``precision`` is that of the encoder's matrix products, under autocast; weights and heads are
    float32. ``chunk`` examples pass the encoder at a time where nothing is trained.
    """

    steps: int = 150
    batch: int = 128
    rate: float = 1e-3
    decay: float = 0.01
    warmup: float = 0.1
    probe_iterations: int = 100
    probe_decay: float = 1e-3
    layer: str | None = None
    precision: str = "float32"
    chunk: int = CHUNK


# Fields that were added when experts had been cached, with what keys mean that do not name them.
LATER = {"precision": "float32", "chunk": CHUNK}


def seeded(seed: int, *purpose: str) -> torch.Generator:
    """Generator for one purpose; independent of the order in which purposes are served."""
    name = json.dumps([seed, *purpose]).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the shapes, types and bytes of tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.contiguous().cpu().numpy().tobytes())
    return total.hexdigest()


def write_weights(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Save tensors of any shapes (…) as safetensors by way of a temporary file, so that a reader
    never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in state.items()},
        temporary,
        metadata=metadata,
    )
    os.replace(temporary, path)


def shipped(encoder: nn.Module, path: Path) -> tuple[nn.Module, str]:
    """Encoder with the weights of a safetensors file, in the encoder's own precision, and the
    file's SHA-256."""
    encoder.load_state_dict(load_file(path))
    return encoder, hashlib.sha256(path.read_bytes()).hexdigest()


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate: a linear warm-up over a share of the steps, then half a cosine
    to zero."""
    progress = torch.tensor(step / steps)
    cosine = float(0.5 + 0.5 * torch.cos(torch.pi * progress))
    return min((step + 1) / max(warmup * steps, 1), 1.0) * cosine


def tensors(dataset, collate, device="cpu", rows=None) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of the encoder (N, …) and labels (N,) for the chosen rows of a split, or for all of
    them.

    ``CHUNK`` rows are converted at a time; a split with a transform of its own keeps it.
    """
    dataset = dataset if dataset.format["type"] == "custom" else dataset.with_format("numpy")
    chosen = range(len(dataset)) if rows is None else rows.tolist()
    parts, labels = [], []
    for start in range(0, len(chosen), CHUNK):
        columns = dataset[chosen[start : start + CHUNK]]
        parts.append(collate(columns))
        labels.append(torch.as_tensor(columns["label"]))
    return placed(joined(parts), device), torch.cat(labels).to(device)


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches (B, …) of the same arguments as one, (ΣB, …), in order."""
    columns = {}
    for name in parts[0]:
        columns[name] = torch.cat([part[name] for part in parts])
    return columns


def placed(tensors: dict[str, Tensor], device) -> dict[str, Tensor]:
    """Named tensors, of any shapes (…), on a device."""
    return {name: value.to(device) for name, value in tensors.items()}


def batches(inputs: dict[str, Tensor], size: int = CHUNK) -> list[dict[str, Tensor]]:
    """The arguments of an encoder (N, …) as batches (at most size, …), in order."""
    parts = zip(*(value.split(size) for value in inputs.values()), strict=True)
    return [dict(zip(inputs, part, strict=True)) for part in parts]


def trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokenised sentences (B, L) without the columns in which all of them are padding; any other
    batch as it is."""
    if "attention_mask" not in batch:
        return batch
    longest = int(batch["attention_mask"].any(0).nonzero().max()) + 1
    return {k: v[:, :longest] for k, v in batch.items()}


def by_length(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokenised sentences (N, L) from the shortest to the longest."""
    order = inputs["attention_mask"].sum(1).argsort(stable=True)
    return {k: v[order] for k, v in inputs.items()}


def autocast(device, precision: str):
    """Context in which matrix products run in a precision, ``float32`` or ``bfloat16``."""
    return torch.autocast(
        torch.device(device).type, getattr(torch, precision), enabled=precision != "float32"
    )


@torch.no_grad()
def features(encoder: nn.Module, inputs: dict[str, Tensor], recipe: Recipe) -> Tensor:
    """Features (N, d) of an encoder, chunk by chunk in the precision of a recipe, in the type of
    its weights."""
    one = next(encoder.parameters())
    with autocast(one.device, recipe.precision):
        return torch.cat([encoder(**batch).to(one) for batch in batches(inputs, recipe.chunk)])


def linear_probe(
    x: Tensor, y: Tensor, classes: int, recipe: Recipe, generator: torch.Generator
) -> nn.Linear:
    """Multinomial logistic regression with a ridge on frozen features (N, d), by L-BFGS from a
    random start."""
    head = nn.Linear(x.shape[1], classes).to(x)
    with torch.no_grad():
        head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=generator))
        head.bias.zero_()
    solver = torch.optim.LBFGS(
        head.parameters(), max_iter=recipe.probe_iterations, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = cross_entropy(head(x), y) + recipe.probe_decay * head.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return head


def train(base, probes, data, recipe, seed, progress=True):
    """Train one encoder and the heads of one or several tasks together, from the base and probes on
    it.

    Args:
        base, probes: encoder, and by task a linear head fitted on its features; they are copied,
            not changed.
        data: task -> inputs, the keyword arguments of the encoder, each with N examples, and labels
            (N,) on the same device. Every step takes ``recipe.batch`` examples of each task.
    Returns: state dict of the encoder, and by task that of its head.
    """
    heads, encoder = copy.deepcopy(nn.ModuleDict(probes)), copy.deepcopy(base).train()
    trained = encoder if recipe.layer is None else encoder.get_submodule(recipe.layer)
    trained.requires_grad_(True)
    one = next(trained.parameters())
    optimiser = torch.optim.AdamW(
        [*trained.parameters(), *heads.parameters()], weight_decay=recipe.decay, fused=True
    )
    orders = {
        task: _order(len(labels), recipe, seeded(seed, task, "order"))
        for task, (_, labels) in data.items()
    }
    for step in tqdm(
        range(recipe.steps), desc=", ".join(data), leave=False, disable=not progress, mininterval=1
    ):
        optimiser.param_groups[0]["lr"] = recipe.rate * schedule(step, recipe.steps, recipe.warmup)
        taken = slice(step * recipe.batch, (step + 1) * recipe.batch)
        parts, labels = [], {}
        for task, (inputs, answers) in data.items():
            rows = orders[task][taken].to(answers.device)
            parts.append({name: value[rows] for name, value in inputs.items()})
            labels[task] = answers[rows]
        with autocast(one.device, recipe.precision):
            outputs = encoder(**joined(parts)).to(one)
        features = outputs.split([len(answers) for answers in labels.values()])
        losses = [
            cross_entropy(heads[task](own), labels[task]) for task, own in zip(labels, features)
        ]
        sum(losses).backward()
        optimiser.step()
        optimiser.zero_grad()
    return _weights(encoder), {task: _weights(head) for task, head in heads.items()}


def _order(count: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Rows in the order in which training takes them: (epochs x count,), every epoch shuffled
    anew."""
    epochs = -(-recipe.steps * recipe.batch // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in module.state_dict().items()}


def content_key(**facts) -> str:
    """Hash of everything that determines an expert, code and torch version included."""
    release = ".".join(torch.__version__.split(".")[:2])
    text = json.dumps({**facts, "code": CODE_VERSION, "torch": release}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def one_maker(path: Path) -> FileLock:
    """Context that one process at a time has of those that would make the file ``path``.

    The others wait, and then find it made. The lock of a process that dies is given up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def cached_expert(folder: Path, key: str, task: str, train) -> tuple[dict, dict]:
    """State dicts of an expert and its head, read from the cache, or trained and written to it by
    whichever process comes first.

    Raises: MergeError naming the file when it holds something else than its name says.
    """
    path = folder / f"{task}-{key[:16]}.safetensors"
    if not path.exists():
        with one_maker(path):
            if not path.exists():
                _train_into(path, key, task, train)
    with safe_open(path, "pt") as file:
        filed_key = (file.metadata() or {}).get("key")
    if filed_key != key:
        raise MergeError(
            f"{path}: expected cache key {key}, found {filed_key}; "
            "delete the file to train the expert again"
        )
    parts = load_file(path)
    return _under("encoder.", parts), _under("head.", parts)


def _train_into(path: Path, key: str, task: str, train) -> None:
    """Train an expert and its head, and write both to a file of the cache."""
    encoder, head = train()
    parts = {f"encoder.{name}": value for name, value in encoder.items()}
    parts |= {f"head.{name}": value for name, value in head.items()}
    write_weights(parts, path, {"key": key, "task": task})


def _under(prefix: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values whose names begin with a prefix, named without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


# Experts of one task that differ in what is trained start from one probe.
_PROBES: dict[str, nn.Linear] = {}


def _probe(base, facts, inputs, labels, recipe) -> nn.Linear:
    """The linear probe that an expert starts from; computed once."""
    relevant = {
        name: value
        for name, value in _recipe(recipe).items()
        if name.startswith("probe") or name in LATER
    }
    key = content_key(**facts, recipe=relevant)
    if key not in _PROBES:
        generator = seeded(facts["seed"], facts["task"], "head")
        x = features(base, inputs, recipe)
        _PROBES[key] = linear_probe(x, labels, facts["classes"], recipe, generator)
    return _PROBES[key]


def _recipe(recipe) -> dict:
    """Fields of a recipe that a cache key holds."""
    return {k: v for k, v in asdict(recipe).items() if k not in LATER or v != LATER[k]}


def _facts(base, base_sha256, examples, classes, seed, task) -> dict:
    """What determines a task's probe and expert, but for the recipe."""
    inputs, labels = examples
    device = next(base.parameters()).device
    return {
        "task": task,
        "seed": seed,
        "classes": classes,
        "base": base_sha256,
        "data": digest(*inputs.values(), labels),
        "device": device.type,
    }


def _train_placed(base, facts, examples, recipe, seed, progress):
    """Train on examples by task, put beside the base only now that they are needed, from each
    task's probe."""
    device = next(base.parameters()).device
    data, probes = {}, {}
    for task, (inputs, labels) in examples.items():
        data[task] = (placed(inputs, device), labels.to(device))
        probes[task] = _probe(base, facts[task], *data[task], recipe)
    return train(base, probes, data, recipe, seed, progress)


def expert(
    base, base_sha256, examples, *, task, classes, recipe, seed, folder, progress=True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of one expert and its head, from the cache of a suite or trained.

    Args:
        base: encoder; ``base_sha256`` is the hash of its weights.
        examples: arguments of the encoder (N, …) and labels (N,).
        classes: number of labels.
        folder: of the cache.
    """
    facts = _facts(base, base_sha256, examples, classes, seed, task)

    def make():
        encoder, heads = _train_placed(
            base, {task: facts}, {task: examples}, recipe, seed, progress
        )
        return encoder, heads[task]

    return cached_expert(folder, content_key(**facts, recipe=_recipe(recipe)), task, make)


def multitask(
    base, base_sha256, examples, *, classes, recipe, seed, folder, progress=True
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """State dicts of one encoder trained on all tasks at once, and by task of the heads trained
    with it, from the cache of a suite or trained.

    Args:
        base: encoder; ``base_sha256`` is the hash of its weights.
        examples: task -> arguments of the encoder (N, …) and labels (N,).
        classes: task -> number of labels.
        folder: of the cache.
    """
    facts = {
        task: _facts(base, base_sha256, examples[task], classes[task], seed, task)
        for task in examples
    }

    def make():
        encoder, heads = _train_placed(base, facts, examples, recipe, seed, progress)
        flat = {}
        for task, head in heads.items():
            flat |= {f"{task}.{name}": value for name, value in head.items()}
        return encoder, flat

    key = content_key(tasks=list(facts.values()), recipe=_recipe(recipe))
    encoder, flat = cached_expert(folder, key, "multitask", make)
    return encoder, {task: _under(f"{task}.", flat) for task in examples}
