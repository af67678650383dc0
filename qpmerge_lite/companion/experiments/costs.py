"""What a merge cannot avoid: forwards, products and factorisations, priced at this machine's rates.

The work is listed from the sizes of a model's layers alone, as the formulas ask for it, without a
look at how a pass is written. Each piece is timed by itself, on operands that lie in the caches, so
that the sum is a floor and not a forecast. Norms, embeddings and sums are taken for nothing.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

SINGLE, DOUBLE = torch.float32, torch.float64
WIDE = 256  # inputs from which on ridges are compared by float32 eigenvectors
LEAST = 0.02  # seconds: what is quicker is repeated
STATUS = Path("/proc/self/status")
SHOWN = {SINGLE: "float32", DOUBLE: "float64"}


def clock(run: Callable[[], object], device="cpu") -> float:
    """Seconds of processor time of a call; on CUDA, seconds until the device has done its work."""
    if torch.device(device).type != "cuda":
        started = time.process_time()
        run()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def peak(device="cpu") -> float:
    """Most memory, in MiB, that this process has held so far; on CUDA, most that it held there."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if STATUS.exists():  # of this program alone: ru_maxrss starts from what the parent process held
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@dataclass(frozen=True)
class Stage:
    """Layers that read one tensor: ``inputs`` n with the constant of a bias, ``outputs`` m of each
    layer, and ``rows`` N that one task has of it."""

    inputs: int
    outputs: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class Work:
    """A piece of work.

    Attributes:
        kind: ``product`` of b matrices (m, k) and (k, n); ``triangle`` of the products of n columns
            with N rows; ``cholesky`` factorisation of an (n, n) matrix, solved for s right-hand
            sides; ``eigen`` decomposition of b matrices (n, n).
        shape: (b, m, k, n), (N, n), (n, s) or (b, n).
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def operations(self) -> float:
        """Additions and multiplications, those of an eigendecomposition by the usual count."""
        if self.kind == "product":
            b, m, k, n = self.shape
            return 2 * b * m * k * n
        if self.kind == "triangle":
            rows, n = self.shape
            return rows * n**2
        if self.kind == "cholesky":
            n, sides = self.shape
            return n**3 / 3 + 2 * n**2 * sides
        b, n = self.shape
        return 9 * b * n**3

    def __str__(self) -> str:
        return f"{self.kind} {' x '.join(map(str, self.shape))} {SHOWN[self.dtype]}"


@torch.no_grad()
def stages_of(model: nn.Module, batches: list[dict]) -> list[Stage]:
    """Dense layers and convolutions, grouped by what they read, with the rows of these batches."""
    rows, groups, hooks = Counter(), {}, []

    def hook(name):
        def seen(module, args, kwargs, output):
            read = next(iter((*args, *kwargs.values())))
            rows[name] += output.numel() // len(module.weight)
            groups.setdefault(id(read), (read, []))[1].append((name, module))

        return seen

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            hooks.append(module.register_forward_hook(hook(name), with_kwargs=True))
    layers_of: list[list] = []
    for batch in batches:
        groups.clear()  # which holds on to what was read: an address is not given twice
        model(**batch)
        layers_of = layers_of or [layers for _, layers in groups.values()]
    for handle in hooks:
        handle.remove()
    stages = []
    for layers in layers_of:
        name, first = layers[0]
        inputs = first.weight[0].numel() + (first.bias is not None)
        stages.append(Stage(inputs, tuple(len(m.weight) for _, m in layers), rows[name]))
    return stages


def work_of(stages: list[Stage], basis: str, tasks: int, folds: int, ridges: int) -> Counter[Work]:
    """How often each piece of work beside the forwards occurs, on merged inputs with own targets.

    Args:
        basis: ``rows``, ``rotated_columns`` or ``elements``.
        ridges: how many are compared where there are several ``folds``, each held out in turn.
    """
    work: Counter[Work] = Counter()
    for stage in stages:
        work += sums(stage, tasks, folds)
        for m in stage.outputs:
            work += SOLVED[basis](m, stage.inputs, tasks, folds, ridges)
    return work


def sums(stage: Stage, tasks: int, folds: int) -> Counter[Work]:
    """``ZᵀZ``, ``r = W D`` and ``rᵀZ`` of every task, and ``ΔC``."""
    n, m, rows = stage.inputs, sum(stage.outputs), stage.rows
    work = Counter({Work("triangle", (rows // folds, n), SINGLE): tasks * folds})
    work[Work("product", (1, rows, n, m), SINGLE)] += tasks
    work[Work("product", (1, m, rows // folds, n), SINGLE)] += tasks * folds
    work[Work("product", (1, m, n, n), DOUBLE)] += tasks * folds
    return work


def solved_elements(m: int, n: int, tasks: int, folds: int, ridges: int) -> Counter[Work]:
    """A factorisation, and for each fold held out one with the products that serve every ridge."""
    work = Counter({Work("cholesky", (n, m), DOUBLE): 1})
    if folds > 1:
        dtype = SINGLE if n >= WIDE else DOUBLE
        work[Work("eigen", (1, n), dtype)] += folds
        work[Work("product", (1, m, n, n), dtype)] += 2 * folds
        work[Work("product", (1, n, m, n), dtype)] += folds
        work[Work("product", (1, n, n, n), dtype)] += 2 * folds
    return work


def solved_rows(m: int, n: int, tasks: int, folds: int, ridges: int) -> Counter[Work]:
    """``Δ_k C`` of every fold, its products with all experts' rows, and small eigenvectors."""
    work = Counter({Work("product", (1, m, n, n), DOUBLE): tasks * folds})
    work[Work("product", (m, tasks, n, tasks), DOUBLE)] += folds
    work[Work("eigen", (m, tasks), DOUBLE)] += fits(folds)
    return work


def solved_columns(m: int, n: int, tasks: int, folds: int, ridges: int) -> Counter[Work]:
    """Eigenvectors of C, every expert along them, small ones; every ridge's update elsewhere."""
    count = fits(folds)
    work = Counter({Work("eigen", (1, n), DOUBLE): count})
    work[Work("product", (1, m, n, n), DOUBLE)] += (tasks + 1) * count
    work[Work("product", (n, tasks, m, tasks), DOUBLE)] += count
    work[Work("eigen", (n, tasks), DOUBLE)] += count
    if folds > 1:
        work[Work("product", (1, m, n, n), DOUBLE)] += folds * ridges
        work[Work("product", (1, n, n, n), DOUBLE)] += 2 * folds
    return work


SOLVED = {"elements": solved_elements, "rows": solved_rows, "rotated_columns": solved_columns}


def fits(folds: int) -> int:
    """How often a programme is solved: with each fold held out if there are some, and with all."""
    return 1 if folds == 1 else folds + 1


def prepared(work: Work, device="cpu") -> Callable[[], object]:
    """A call that does the work once; of a triangle, a whole product."""
    draw = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=work.dtype, device=device, generator=draw)

    if work.kind == "product":
        b, m, k, n = work.shape
        left, right = random(b, m, k), random(b, k, n)
        return lambda: left @ right
    if work.kind == "triangle":
        rows = random(*work.shape)
        return lambda: rows.mT @ rows
    if work.kind == "cholesky":
        n, count = work.shape
        root, sides = random(n, n), random(n, count)
        matrix = root @ root.mT + n * torch.eye(n, dtype=work.dtype, device=device)
        return lambda: torch.cholesky_solve(sides, torch.linalg.cholesky(matrix))
    b, n = work.shape
    matrices = random(b, n, n)
    matrices = matrices + matrices.mT
    return lambda: torch.linalg.eigh(matrices)


def seconds_of(work: Work, device="cpu") -> float:
    """How long a piece of work takes, repeated for the clock to tell; a triangle half a product."""
    run, count = prepared(work, device), 1

    def repeated():
        for _ in range(count):
            run()

    taken = clock(repeated, device)
    while taken < LEAST:
        count *= 4
        taken = clock(repeated, device)
    return taken / count / (2 if work.kind == "triangle" else 1)


def price(work: Counter[Work], device="cpu") -> float:
    """Seconds of all pieces together."""
    return sum(count * seconds_of(piece, device) for piece, count in work.items())


@dataclass(frozen=True)
class Measured:
    """Medians over repeats.

    Attributes:
        seconds: of the call. unit: seconds of what it is measured by.
        ratio: of the two, taken repeat by repeat.
        added: MiB that the first call added to the peak of the process.
    """

    seconds: float
    unit: float
    ratio: float
    added: float


def measured(
    run: Callable[[], object], unit: Callable[[], object], repeats: int, device="cpu"
) -> Measured:
    """A call beside another one, in turn; nothing warms up, so that the first finds new memory."""
    before, added, pairs = peak(device), None, []
    for _ in range(repeats):
        taken = clock(run, device)
        added = peak(device) - before if added is None else added
        pairs.append((taken, clock(unit, device)))
    taken, units = (statistics.median(side) for side in zip(*pairs))
    return Measured(taken, units, statistics.median(a / b for a, b in pairs), added)
