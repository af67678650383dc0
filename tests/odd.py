"""Wrong and odd arguments, batches and state dicts, each under a name that says what it is."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qpmerge_lite import Recipe, RegMean

# ------------------------------------------------------------------------------- plain values

VALUES = {
    "-1": -1, "0": 0, "1": 1, "2": 2, "3": 3, "million": 10**6, "beyond int64": 10**30,
    "0.5": 0.5, "1.5": 1.5, "-0.5": -0.5, "1e-300": 1e-300, "1e300": 1e300, "-1e300": -1e300,
    "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "complex": 1j,
    "None": None, "True": True, "False": False, "empty word": "", "a word": "nothing",
    "rows": "rows", "merged": "merged", "block": "block", "dense": "dense", "blocks": "blocks",
    "0 as a word": "0", "[]": [], "[0.5]": [0.5], "[0.5, 0.5]": [0.5, 0.5], "[2]": [2],
    "[nan, 1]": [float("nan"), 1.0], "[None]": [None], "words": ["rows", "layer"],
    "a word twice": ["rows", "rows"], "tuple": (0.1, 1.0), "{}": {}, "mapping": {"a": 0.5},
    "set": {0.5}, "bytes": b"rows", "object": object(), "class": nn.Linear, "function": len,
    "0-d tensor": torch.tensor(0.5), "tensor": torch.tensor([0.5, 0.5]), "array": np.ones(2),
    "numpy number": np.float64(0.5), "numpy integer": np.int64(2), "path": Path("file"),
    "generator": None, "module": nn.Linear(4, 4), "state": nn.Linear(4, 4).state_dict(),
}  # fmt: skip


def value(name):
    """A value by name, fresh where it can be used up."""
    return (x for x in (0.5, 0.5)) if name == "generator" else VALUES[name]


# ------------------------------------------------------------------------------------ tensors


def _with_infinity(z):
    flat = z.float().flatten()
    return flat.index_fill(0, torch.tensor([0]), float("inf")).view_as(z)


TENSORS = {
    "float16": lambda z: z.to(torch.float16),
    "bfloat16": lambda z: z.to(torch.bfloat16),
    "float64": lambda z: z.double(),
    "float8": lambda z: z.to(torch.float8_e4m3fn),
    "int": lambda z: z.long(),
    "int8": lambda z: z.to(torch.int8),
    "bool": lambda z: z.bool(),
    "complex": lambda z: z.to(torch.complex64),
    "nan": lambda z: torch.full_like(z, float("nan"), dtype=torch.float32),
    "one inf": _with_infinity,
    "huge": lambda z: z.float() * 3e38,
    "huge integers": lambda z: torch.full_like(z, 2**40, dtype=torch.long),
    "negative": lambda z: -z - 1,
    "zeros": lambda z: torch.zeros_like(z),
    "constant": lambda z: torch.ones_like(z),
    "an axis more": lambda z: z[..., None],
    "an axis before": lambda z: z[None],
    "transposed": lambda z: z.transpose(0, -1) if z.dim() else z,
    "flat": lambda z: z.flatten(),
    "one row less": lambda z: z[:-1] if z.dim() else z,
    "one row": lambda z: z[:1] if z.dim() else z,
    "last cut": lambda z: z[..., :-1] if z.dim() else z,
    "empty": lambda z: z.flatten()[:0],
    "no rows": lambda z: z[:0] if z.dim() else z,
    "0-d": lambda z: z.flatten()[0],
    "0-d zero": lambda z: torch.tensor(0),
    "meta": lambda z: z.to("meta"),
    "sparse": lambda z: z.to_sparse(),
    "sparse rows": lambda z: z.reshape(len(z) if z.dim() else 1, -1).to_sparse_csr(),
    "requires grad": lambda z: z.float().clone().requires_grad_(),
    "expanded": lambda z: z.flatten()[:1].expand(z.numel()).view(z.shape),
    "strided": lambda z: torch.stack([z, z], -1)[..., 0],
    "parameter": lambda z: nn.Parameter(z.float()),
    "nested": lambda z: torch.nested.nested_tensor([z, z[:1]] if z.dim() else [z]),
    "quantised": lambda z: torch.quantize_per_tensor(z.float(), 0.1, 0, torch.qint8),
    "array": lambda z: z.numpy(),
    "list": lambda z: z.tolist(),
    "list of tensors": lambda z: [z, z],
    "mapping": lambda z: {"a": z},
    "None": lambda z: None,
    "True": lambda z: True,
    "number": lambda z: 0.5,
    "word": lambda z: "word",
    "object": lambda z: object(),
    "module": lambda z: nn.Linear(4, 4),
}


# --------------------------------------------------------------------------------- containers


class Lazy(Mapping):
    """A mapping that is no dictionary, as lazily read checkpoints are."""

    def __init__(self, entries):
        self.entries = entries

    def __getitem__(self, key):
        return self.entries[key]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


def _without_last(entries):
    return dict(list(entries.items())[:-1])


def _adapter(entries):
    name = next(iter(entries))
    return {**entries, f"{name}.lora_A": torch.ones(2, 2)}


MAPPINGS = {
    "lazy": Lazy,
    "a copy": dict,
    "lacks the last": _without_last,
    "lacks all": lambda entries: {},
    "one more": lambda entries: {**entries, "extra": torch.ones(6)},
    "a number more": lambda entries: {**entries, "extra": 3},
    "None more": lambda entries: {**entries, "extra": None},
    "a number as key": lambda entries: {**entries, 0: next(iter(entries.values()))},
    "None as key": lambda entries: {**entries, None: next(iter(entries.values()))},
    "keys are numbers": lambda entries: dict(enumerate(entries.values())),
    "keys are bytes": lambda entries: {str(k).encode(): v for k, v in entries.items()},
    "prefixed": lambda entries: {f"model.{k}": v for k, v in entries.items()},
    "reversed": lambda entries: dict(reversed(entries.items())),
    "list of values": lambda entries: list(entries.values()),
    "list of pairs": lambda entries: list(entries.items()),
    "first value": lambda entries: next(iter(entries.values())),
    "keys": list,
    "in a list": lambda entries: [entries],
    "in a mapping": lambda entries: {"model": entries},
    "generator": lambda entries: (value for value in entries.values()),
    "an adapter": _adapter,
}


def _all_tensors(batches):
    return [z for batch in batches if isinstance(batch, dict) for z in batch.values()]


LISTS = {
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda batches: (batch for batch in batches),
    "first": lambda batches: batches[0],
    "empty": lambda batches: [],
    "one": lambda batches: batches[:1],
    "twice": lambda batches: batches * 2,
    "nested": lambda batches: [batches],
    "None among them": lambda batches: [*batches, None],
    "a number among them": lambda batches: [*batches, 3],
    "an empty one among them": lambda batches: [*batches, {}],
    "mapping": lambda batches: dict(enumerate(batches)),
    "tensors": _all_tensors,
}


# --------------------------------------------------------------------------------- functions

HEADS = {
    "None": lambda output: None,
    "number": lambda output: 0.5,
    "sum": lambda output: output.sum(),
    "detached": lambda output: output.detach(),
    "integers": lambda output: output.long(),
    "nan": lambda output: output * float("nan"),
    "one axis": lambda output: output[:, 0],
    "three axes": lambda output: output[:, None],
    "one class": lambda output: output[:, :1],
    "no class": lambda output: output[:, :0],
    "one for all": lambda output: output.mean(0, keepdim=True),
    "attribute": lambda output: output.logits,
    "too narrow": nn.Linear(2, 2),
    "float64": lambda output: output.double(),
}

SCORES = {
    "None": lambda state: None,
    "nan": lambda state: float("nan"),
    "word": lambda state: "high",
    "complex": lambda state: 1j,
    "tensor": lambda state: torch.tensor(0.5),
    "many": lambda state: torch.ones(3),
    "True": lambda state: True,
    "inf": lambda state: float("inf"),
}

SOLVERS = {
    "nothing": lambda moments, updates: None,
    "no row": lambda moments, updates: updates[0],
    "other shape": lambda moments, updates: (updates, {}),
    "a word": lambda moments, updates: (updates[0], "row"),
    "nan": lambda moments, updates: (updates[0] * float("nan"), {}),
    "class": RegMean,
}

GRIDS = {
    "unknown option": [{"nothing": 1}],
    "wrong option": [{"scale": "high"}],
    "empty": [],
    "number": 3,
    "mapping": {"scale": 0.5},
    "words": ["scale"],
    "numbers as keys": [{1: 2}],
    "sound": [{"scale": 0.5}, {"scale": 1}],
}

RECIPES = {
    "empty": {},
    "list": [Recipe(RegMean())],
    "one recipe": Recipe(RegMean()),
    "solvers": {"one": RegMean()},
    "None": {"one": None},
    "sound": {"one": Recipe(RegMean(), folds=1), "two": Recipe(RegMean(), "expert", folds=1)},
    "numbered": {1: Recipe(RegMean(), folds=1)},
    "no solver": {"one": Recipe(None, folds=1)},
}
