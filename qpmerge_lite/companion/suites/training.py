"""Experts of a suite: linear probe, joint fine-tuning, and a cache under the hash of all that
determines them."""

import copy
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
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


# Fields that were added when experts had been kept, with what keys mean that do not name them.
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
    """Save tensors as safetensors by way of a temporary file, so that a reader never sees half of
    one."""
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
    return min((step + 1) / max(warmup * steps, 1), 1.0) * float(
        0.5 + 0.5 * torch.cos(torch.pi * progress)
    )


def tensors(dataset, collate, device="cpu", rows=None) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of the encoder and labels for the chosen rows of a split, or for all of them.

    ``CHUNK`` rows are converted at a time; a split with a transform of its own keeps it.
    """
    dataset = dataset if dataset.format["type"] == "custom" else dataset.with_format("numpy")
    chosen = range(len(dataset)) if rows is None else rows.tolist()
    inputs, labels = [], []
    for start in range(0, len(chosen), CHUNK):
        columns = dataset[chosen[start : start + CHUNK]]
        inputs.append(collate(columns))
        labels.append(torch.as_tensor(columns["label"]))
    return {k: torch.cat([part[k] for part in inputs]).to(device) for k in inputs[0]}, torch.cat(
        labels
    ).to(device)


def batches(inputs: dict[str, Tensor], size: int = CHUNK):
    """Split the arguments of an encoder into batches, in order."""
    parts = zip(*(value.split(size) for value in inputs.values()), strict=True)
    return [dict(zip(inputs, part, strict=True)) for part in parts]


def trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokenised sentences without the columns in which all of them are padding; any other batch as
    it is."""
    if "attention_mask" not in batch:
        return batch
    longest = int(batch["attention_mask"].any(0).nonzero().max()) + 1
    return {k: v[:, :longest] for k, v in batch.items()}


def by_length(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokenised sentences from the shortest to the longest."""
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
    trained = (
        encoder if recipe.layer is None else encoder.get_submodule(recipe.layer)
    ).requires_grad_(True)
    one = next(trained.parameters())
    optimiser = torch.optim.AdamW(
        [*trained.parameters(), *heads.parameters()], weight_decay=recipe.decay, fused=True
    )
    streams = {}
    for task, (_, labels) in data.items():
        order, epochs = seeded(seed, task, "order"), -(-recipe.steps * recipe.batch // len(labels))
        streams[task] = torch.cat(
            [torch.randperm(len(labels), generator=order) for _ in range(epochs)]
        )
    for step in tqdm(
        range(recipe.steps), desc=", ".join(data), leave=False, disable=not progress, mininterval=1
    ):
        optimiser.param_groups[0]["lr"] = recipe.rate * schedule(step, recipe.steps, recipe.warmup)
        rows = {
            t: stream[step * recipe.batch : (step + 1) * recipe.batch].to(data[t][1].device)
            for t, stream in streams.items()
        }
        names = next(iter(data.values()))[0]
        batch = {name: torch.cat([data[t][0][name][r] for t, r in rows.items()]) for name in names}
        with autocast(one.device, recipe.precision):
            found = encoder(**batch).to(one)
        parts = zip(rows.items(), found.split([len(r) for r in rows.values()]))
        sum(cross_entropy(heads[t](z), data[t][1][r]) for (t, r), z in parts).backward()
        optimiser.step()
        optimiser.zero_grad()
    state = lambda module: {k: v.detach() for k, v in module.state_dict().items()}
    return state(encoder), {t: state(head) for t, head in heads.items()}


def content_key(**facts) -> str:
    """Hash of everything that determines an expert, code and torch version included."""
    release = ".".join(torch.__version__.split(".")[:2])
    text = json.dumps({**facts, "code": CODE_VERSION, "torch": release}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cached_expert(folder: Path, key: str, task: str, train) -> tuple[dict, dict]:
    """Read an expert and its head from the cache, or train and keep them.

    Raises: MergeError naming the file when it holds something else than its name says.
    """
    path = folder / f"{task}-{key[:16]}.safetensors"
    if not path.exists():
        encoder, head = train()
        parts = {
            f"{part}.{k}": v
            for part, s in (("encoder", encoder), ("head", head))
            for k, v in s.items()
        }
        write_weights(parts, path, {"key": key, "task": task})
    with safe_open(path, "pt") as file:
        found = (file.metadata() or {}).get("key")
    if found != key:
        raise MergeError(
            f"{path}: expected cache key {key}, found {found}; delete the file to train the expert again"
        )
    parts = load_file(path)
    return tuple(
        {k.partition(".")[2]: v for k, v in parts.items() if k.startswith(p)}
        for p in ("encoder.", "head.")
    )


_PROBES: dict[
    str, nn.Linear
] = {}  # experts of one task that differ in what is trained start from one probe


def _probe(base, facts, inputs, labels, recipe) -> nn.Linear:
    start = content_key(
        **facts,
        recipe={k: v for k, v in _recipe(recipe).items() if k.startswith("probe") or k in LATER},
    )
    if start not in _PROBES:
        _PROBES[start] = linear_probe(
            features(base, inputs, recipe),
            labels,
            facts["classes"],
            recipe,
            seeded(facts["seed"], facts["task"], "head"),
        )
    return _PROBES[start]


def _recipe(recipe) -> dict:
    """Fields of a recipe that a cache key holds."""
    return {k: v for k, v in asdict(recipe).items() if k not in LATER or v != LATER[k]}


def _facts(base, base_sha256, examples, classes, seed, task) -> dict:
    """What determines a task's probe and expert, the recipe apart."""
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
    placed = {
        t: ({k: v.to(device) for k, v in inputs.items()}, labels.to(device))
        for t, (inputs, labels) in examples.items()
    }
    return train(
        base,
        {t: _probe(base, facts[t], *placed[t], recipe) for t in placed},
        placed,
        recipe,
        seed,
        progress,
    )


def expert(base, base_sha256, examples, classes, recipe, seed, task, folder, progress=True):
    """One expert and its head from the cache of a suite, trained on ``examples`` (inputs, labels)
    when they are not there yet."""
    facts = _facts(base, base_sha256, examples, classes, seed, task)

    def make():
        encoder, heads = _train_placed(
            base, {task: facts}, {task: examples}, recipe, seed, progress
        )
        return encoder, heads[task]

    return cached_expert(folder, content_key(**facts, recipe=_recipe(recipe)), task, make)


def multitask(base, base_sha256, examples, classes, recipe, seed, folder, progress=True):
    """One encoder trained on all tasks at once, with their heads by task, likewise; ``examples``
    and ``classes`` by task."""
    facts = {t: _facts(base, base_sha256, examples[t], classes[t], seed, t) for t in examples}

    def make():
        encoder, heads = _train_placed(base, facts, examples, recipe, seed, progress)
        return encoder, {f"{t}.{k}": v for t, head in heads.items() for k, v in head.items()}

    encoder, flat = cached_expert(
        folder, content_key(tasks=list(facts.values()), recipe=_recipe(recipe)), "multitask", make
    )
    return encoder, {
        t: {k.removeprefix(f"{t}."): v for k, v in flat.items() if k.startswith(f"{t}.")}
        for t in examples
    }
