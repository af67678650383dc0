"""`python -m qpmerge_lite.companion.experiments.timing`: what a merge costs, in units of
unavoidable forwards.

Unavoidable are one run of every expert over its own calibration inputs and one run of the merged
model over all of them. Figures are medians of processor time on one thread, ratios of what ran in
turn in one process. Every row is a process of its own, because the peak of a process's memory never
falls; "adds" is by how much the first merge raised it.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.func import functional_call

from ... import QP, Recipe, RegMean, merge_together, qp
from ...diagnostic import RIDGES
from ..suites.encoders import VisionTransformer
from .costs import Measured, Stage, Work, clock, measured, price, seconds_of, stages_of, work_of

BASES = ("rows", "rotated_columns", "elements")
WANTED = {("elements", 1): 4.0, ("elements", 4): 5.0}  # of the forwards, by basis and folds
WANTED_OF_FLOOR = 1.6
WANTED_OF_GRID = 3.0  # of one of its eight merges
FACTORS = (1, 2, 4)
ALPHAS = tuple(0.6 + 0.05 * i for i in range(8))


@dataclass(frozen=True)
class Size:
    """A merge: width and depth of the model, how many experts, and calibration images of each."""

    width: int = 96
    depth: int = 4
    experts: int = 8
    images: int = 128


@dataclass(frozen=True)
class Run:
    """How rows are measured: on which device and how many threads, and how often."""

    device: str = "cpu"
    threads: int = 1
    repeats: int = 3


def perturbed(base: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict near that of a model, in place of an expert."""
    return {n: v + 0.01 * torch.randn_like(v) for n, v in base.state_dict().items()}


@torch.no_grad()
def forwards(base: nn.Module, experts, calibration) -> None:
    """What no merge can avoid: every batch through its expert, and through one other model."""
    for task, state in experts.items():
        for batch in calibration[task]:
            functional_call(base, state, (), batch)
            base(**batch)


class Problem:
    """A random vision transformer, its perturbed copies as experts, and calibration images."""

    def __init__(self, size: Size, run: Run):
        torch.set_num_threads(run.threads)
        torch.manual_seed(0)
        self.base = VisionTransformer(width=size.width, depth=size.depth).to(run.device).eval()
        self.experts, self.calibration = {}, {}
        for k in range(size.experts):
            self.experts[f"task{k}"] = perturbed(self.base)
            images = torch.randn(size.images, 1, 28, 28, device=run.device)
            self.calibration[f"task{k}"] = [{"pixels": x} for x in images.split(64)]

    def forwards(self) -> None:
        """The unavoidable passes."""
        forwards(self.base, self.experts, self.calibration)

    def stages(self) -> list[Stage]:
        """What is read in the model, and by which layers."""
        return stages_of(self.base, next(iter(self.calibration.values())))

    def merge(self, basis: str, folds: int) -> None:
        """The programme with a fixed ridge, or the best of all by folds held out."""
        ridge = 0.01 if folds == 1 else "cross-fitted"
        qp(self.base, self.experts, self.calibration, basis=basis, ridge=ridge, folds=folds)

    def together(self, recipes: dict[str, Recipe]) -> None:
        """Several merges in one pass."""
        merge_together(self.base, self.experts, self.calibration, recipes)


def seconds(size: Size, device="cpu", repeats: int = 2) -> float:
    """Least seconds of a merge with the defaults of ``qp``."""
    problem = Problem(size, Run(device))

    def merge():
        qp(problem.base, problem.experts, problem.calibration)

    return min(clock(merge, device) for _ in range(repeats))


def basis_row(size: Size, basis: str, folds: int, run: Run) -> tuple[Measured, float]:
    """A merge in units of the forwards, and seconds of the work that comes on top of them."""
    problem = Problem(size, run)

    def merge():
        problem.merge(basis, folds)

    merged = measured(merge, problem.forwards, run.repeats, run.device)
    work = work_of(problem.stages(), basis, size.experts, folds, len(RIDGES))
    return merged, price(work, run.device)


def rates_of(size: Size, run: Run) -> list[tuple[Work, float]]:
    """Seconds of every piece of work that a table's rows may need, the slowest first."""
    stages, work = Problem(size, run).stages(), Counter()
    for basis in BASES:
        for folds in (1, 4):
            work += work_of(stages, basis, size.experts, folds, len(RIDGES))
    rates = [(piece, seconds_of(piece, run.device)) for piece in work]
    return sorted(rates, key=lambda entry: -entry[1])


def grid_of(kind: str) -> tuple[dict[str, Recipe], dict[str, Recipe]]:
    """Eight recipes that share a pass, and one of them.

    Args:
        kind: ``alphas`` of RegMean on the experts' own inputs, or ``programmes`` on merged ones,
            of two ridges and four targets.
    """
    recipes = {}
    if kind == "alphas":
        for alpha in ALPHAS:
            recipes[f"{alpha:g}"] = Recipe(
                RegMean(alpha), inputs="expert", targets="propagated", scope="weights", folds=1
            )
    else:
        for ridge in (0.01, 0.1):
            for beta in (1.0, 0.75, 0.5, 0.25):
                recipes[f"{ridge} {beta}"] = Recipe(QP("elements", ridge), targets=beta, folds=1)
    first = next(iter(recipes))
    return recipes, {first: recipes[first]}


def grid_row(size: Size, kind: str, run: Run) -> tuple[Measured, float | None]:
    """Eight merges in units of one, and what is possible where each has forwards of its own."""
    problem, (recipes, one) = Problem(size, run), grid_of(kind)

    def merge_all():
        problem.together(recipes)

    def merge_one():
        problem.together(one)

    merged = measured(merge_all, merge_one, run.repeats, run.device)
    if kind == "alphas":
        return merged, None
    work = price(work_of(problem.stages(), "elements", size.experts, 1, 1), run.device)
    passes = measured(problem.forwards, problem.forwards, run.repeats, run.device).seconds
    half = passes / 2  # are the experts', which the merges share, and half the merged model's
    return merged, (half + 8 * (half + work)) / (half + half + work)


def scaled(size: Size, axis: str, factor: int) -> Size:
    """The size with one axis times a factor."""
    return replace(size, **{axis: factor * getattr(size, axis)})


def merge_row(size: Size, folds: int, run: Run) -> Measured:
    """A merge over single entries, in units of the forwards."""
    problem = Problem(size, run)
    return measured(
        lambda: problem.merge("elements", folds), problem.forwards, run.repeats, run.device
    )


def exponent(factors: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the logarithms: 1 where time grows in proportion."""
    x = [math.log(factor) for factor in factors]
    y = [math.log(value) for value in seconds]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - middle) * (b - level) for a, b in zip(x, y))
    return products / sum((a - middle) ** 2 for a in x)


def apart(function, *arguments):
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def verdict(ratio: float, wanted: float | None) -> str:
    """A wanted bound, and a mark where it is exceeded."""
    if wanted is None:
        return ""
    return f"≤ {wanted:g}{'' if ratio <= wanted else ' !'}"


def rates_table(size: Size, run: Run, shown: int = 12) -> Iterator[str]:
    """The slowest kinds of work of a merge, and the machine's rate at each."""
    yield f"\nThis machine's rates, the {shown} slowest pieces of work"
    yield f"{'work':44}{'ms':>9}{'Gflop/s':>9}"
    for work, seconds in apart(rates_of, size, run)[:shown]:
        yield f"{work!s:44}{1000 * seconds:>9.3f}{work.operations / seconds / 1e9:>9.1f}"


def basis_table(size: Size, run: Run) -> Iterator[str]:
    """Bases, with a fixed ridge and with four folds to choose among all ridges."""
    yield f"\nOne merge: {size}; floor: forwards, products and factorisations"
    yield (
        f"{'basis':17}{'ridge':>7}{'merge s':>9}{'forwards':>10}{'ratio':>7}{'wanted':>8}"
        f"{'floor':>7}{'ratio':>7}{'wanted':>8}{'adds MiB':>10}"
    )
    for folds, ridge in ((1, "fixed"), (4, "best")):
        for basis in BASES:
            merge, work = apart(basis_row, size, basis, folds, run)
            floor = merge.unit + work
            over = merge.seconds / floor
            yield (
                f"{basis:17}{ridge:>7}{merge.seconds:>9.2f}{merge.unit:>10.2f}{merge.ratio:>7.2f}"
                f"{verdict(merge.ratio, WANTED.get((basis, folds))):>8}"
                f"{floor / merge.unit:>7.2f}{over:>7.2f}{verdict(over, WANTED_OF_FLOOR):>8}"
                f"{merge.added:>10.0f}"
            )


def scaling_table(size: Size, run: Run, curves: dict) -> Iterator[str]:
    """Time against depth, experts and images; ``curves`` is given what a plot shows."""
    yield f"\nScaling from {size}: elements, seconds; 1 is linear"
    yield f"{'grows':9}{'ridge':>7}{'x 1':>9}{'x 2':>9}{'x 4':>9}{'exponent':>10}{'adds MiB':>10}"
    for folds, ridge in ((1, "fixed"), (4, "best")):
        start = apart(merge_row, size, folds, run)
        for axis in ("depth", "experts", "images"):
            rows = [apart(merge_row, scaled(size, axis, f), folds, run) for f in FACTORS[1:]]
            seconds = [row.seconds for row in (start, *rows)]
            curves[axis, ridge] = seconds
            times = "".join(f"{value:>9.2f}" for value in seconds)
            slope = exponent(FACTORS, seconds)
            yield f"{axis:9}{ridge:>7}{times}{slope:>10.2f}{rows[-1].added:>10.0f}"


def grid_table(size: Size, run: Run) -> Iterator[str]:
    """Eight merges of one pass in units of one merge."""
    yield f"\nEight merges in one pass, in units of one of them: {size}"
    yield (
        f"{'options':12}{'eight s':>9}{'one s':>7}{'ratio':>7}{'wanted':>8}{'floor':>7}"
        f"{'adds MiB':>10}"
    )
    for kind in ("alphas", "programmes"):
        merges, floor = apart(grid_row, size, kind, run)
        possible = "" if floor is None else f"{floor:.2f}"
        yield (
            f"{kind:12}{merges.seconds:>9.2f}{merges.unit:>7.2f}{merges.ratio:>7.2f}"
            f"{verdict(merges.ratio, WANTED_OF_GRID):>8}{possible:>7}{merges.added:>10.0f}"
        )


def plot(curves: dict, path: str) -> None:
    """Seconds against growth on logarithmic axes, beside a line of slope one, written to a file."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for (axis, ridge), seconds in curves.items():
        relative = [value / seconds[0] for value in seconds]
        label = f"{axis}, {ridge} ridge: {exponent(FACTORS, seconds):.2f}"
        axes.loglog(FACTORS, relative, "o-" if ridge == "fixed" else "s--", label=label)
    axes.loglog(FACTORS, FACTORS, color="0.7", zorder=0, label="linear")
    axes.set(xlabel="times as large", ylabel="times as long", xticks=FACTORS, yticks=FACTORS)
    for ticks in (axes.xaxis, axes.yaxis):
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_locator(pyplot.NullLocator())
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None, size: Size = Size()) -> None:  # noqa: B008
    """Print all tables for merges of a size, and half of it where it grows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", metavar="FILE", help="write how time grows to a PNG file")
    given = parser.parse_args(arguments)
    run = Run(given.device, given.threads, given.repeats)
    small = replace(size, depth=max(size.depth // 2, 1), experts=max(size.experts // 4, 1))
    small = replace(small, images=max(size.images // 2, 4))
    print(f"{run}, torch {torch.__version__}; ! is more than wanted")
    curves = {}
    tables = (
        rates_table(size, run),
        basis_table(size, run),
        scaling_table(small, run, curves),
        grid_table(size, run),
    )
    for table in tables:
        for line in table:
            print(line, flush=True)
    if given.plot:
        plot(curves, given.plot)


if __name__ == "__main__":
    main()
