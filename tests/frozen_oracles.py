"""Small experts, and what other people's implementations make of them: ours is held to it without
any of those installed.

``oracles.py`` calls the implementations. Rewrite the file on purpose only:
``python tests/oracles.py --freeze``.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import qpmerge_lite as q
from qpmerge_lite.companion.suites.encoders import VisionTransformer

FROZEN = Path(__file__).with_suffix(".safetensors")
SIZES = {"width": 4, "depth": 2, "heads": 2, "ratio": 2, "side": 4, "patch": 2}


@dataclass
class Problem:
    """State dicts in float64, and where there is a network, it and its calibration batches."""

    name: str
    base: dict[str, torch.Tensor]
    experts: dict[str, dict[str, torch.Tensor]]
    model: nn.Module | None = None
    calibration: dict[str, list[dict]] = field(default_factory=dict)

    def vectors(self, tasks):
        """Task vectors by name."""
        return [{k: self.experts[t][k] - v for k, v in self.base.items()} for t in tasks]


@dataclass
class Case:
    """What an implementation makes of some experts, and how ours is asked for the same; ``draws``
    are the random numbers ours must see."""

    whose: str
    method: str
    options: dict
    tasks: list[str]
    theirs: dict[str, torch.Tensor]
    note: str = ""
    tolerance: float = 0.0
    draws: torch.Tensor | None = None
    problem: str = ""

    def __str__(self):
        return " ".join(filter(None, (self.whose, self.method, self.note)))


class Parameters(nn.Module):
    """Tensors as parameters, under names that may hold dots, and no forward."""

    def __init__(self, state):
        super().__init__()
        self._parameters.update({name: nn.Parameter(value) for name, value in state.items()})


def replay(case, problem):
    """The same merge by our function, of the parameters that the oracle merged."""
    chosen = lambda state: {k: state[k] for k in case.theirs}
    base, experts = problem.model, {t: problem.experts[t] for t in case.tasks}
    if not case.method.startswith("regmean"):
        base, experts = Parameters(chosen(problem.base)), {t: chosen(s) for t, s in experts.items()}
    numbers = iter([] if case.draws is None else case.draws.tolist())
    rand = lambda shape, generator: torch.tensor(
        [next(numbers) for _ in range(shape.numel())], dtype=torch.float64
    ).reshape(shape)
    with nullcontext() if case.draws is None else patch.object(torch, "rand", rand):
        return getattr(q, case.method)(
            base, experts, problem.calibration, **case.options
        ).state_dict


def difference(case, problem):
    """Largest difference of ours in any tensor, relative to the largest entry of the oracle's
    update there."""
    ours, worst = replay(case, problem), 0.0
    for k, v in case.theirs.items():
        error, size = (ours[k] - v).abs().max(), (v - problem.base[k]).abs().max()
        worst = max(worst, float(error / size) if error else 0.0)
    return worst


def random_tensors():
    """Matrices, vectors and a 3-d tensor, one of them with small updates; two entries of a bias
    cancel between a and b."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"wide": (5, 8), "bias": (6,), "three": (2, 3, 5), "tall": (7, 4), "few": (3,)}
    normal = lambda k: torch.randn(shapes[k], generator=draw, dtype=torch.float64)
    base = {k: normal(k) for k in shapes}
    experts = {
        t: {k: v + (0.01 if k == "tall" else 1.0) * normal(k) for k, v in base.items()}
        for t in "abcd"
    }
    base["bias"][:2] = 0.0
    for t, values in zip("abcd", ([3.0, -2.0], [-3.0, 2.0], [0.0, 0.0], [0.0, 0.0])):
        experts[t]["bias"][:2] = torch.tensor(values, dtype=torch.float64)
    return Problem("tensors", base, experts)


def transformer(state=None):
    """A tiny vision transformer, random or with a state dict."""
    model = VisionTransformer(**SIZES).double().eval()
    if state is not None:
        model.load_state_dict(state)
    return model


def random_transformer():
    """Three experts around it, and two batches of images for each."""
    torch.manual_seed(0)
    model = transformer()
    experts = {
        t: {k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()} for t in "abc"
    }
    batches = {
        t: [{"pixels": torch.randn(n, 1, 4, 4, dtype=torch.float64)} for n in (5, 3)] for t in "abc"
    }
    return Problem("transformer", model.state_dict(), experts, model, batches)


def freeze(problems, cases):
    """Inputs and answers as tensors ``owner/part/name``; the rest of the cases as JSON in the
    header."""
    tensors, header = {}, []
    for p in problems:
        tensors |= {
            f"{p.name}/{t}/{k}": v
            for t, s in {"base": p.base, **p.experts}.items()
            for k, v in s.items()
        }
        tensors |= {
            f"{p.name}/batch {i}/{t}": b["pixels"]
            for t, batches in p.calibration.items()
            for i, b in enumerate(batches)
        }
    for i, case in enumerate(cases):
        facts = asdict(case)
        tensors |= {f"{i}/theirs/{k}": v.contiguous() for k, v in facts.pop("theirs").items()}
        draws = facts.pop("draws")
        tensors |= {} if draws is None else {f"{i}/draws/all": draws}
        header.append(facts)
    save_file(tensors, FROZEN, metadata={"cases": json.dumps(header)})


def thaw():
    """Problems by name, and cases."""
    tree = {}
    with safe_open(FROZEN, "pt") as held:
        for key in sorted(held.keys()):
            owner, part, name = key.split("/")
            tree.setdefault(owner, {}).setdefault(part, {})[name] = held.get_tensor(key)
        header = json.loads(held.metadata()["cases"])
    cases = [
        Case(**facts, theirs=tree[str(i)]["theirs"], draws=tree[str(i)].get("draws", {}).get("all"))
        for i, facts in enumerate(header)
    ]
    plain, small = tree["tensors"], tree["transformer"]
    batches = [small.pop(part) for part in sorted(small) if part.startswith("batch")]
    bases = {name: tree[name].pop("base") for name in ("tensors", "transformer")}
    calibration = {t: [{"pixels": b[t]} for b in batches] for t in small}
    problems = [
        Problem("tensors", bases["tensors"], plain),
        Problem(
            "transformer",
            bases["transformer"],
            small,
            transformer(bases["transformer"]),
            calibration,
        ),
    ]
    return {p.name: p for p in problems}, cases
