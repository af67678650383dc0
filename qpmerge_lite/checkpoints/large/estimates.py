"""What merges take that hold more, or less, than tensors in double precision: those that run the
models, those by moments, and recipes. From headers, and from texts where they are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from os import cpu_count
from typing import TYPE_CHECKING, NamedTuple

from ..compatibility import Report
from ..folders import Change, Checkpoint
from ..headers import SIZES
from ..methods import OWN_PRECISION
from ..recipes.settings import TOGETHER
from .running import (
    DOUBLE,
    SINGLE,
    Amount,
    alike,
    memory_of_rows,
    memory_of_survey,
    size_of,
    widths_of,
)

if TYPE_CHECKING:
    from ..recipes.reading import Recipe

FOLDS = {"qp": 4}  # groups of calibration inputs with sums of their own, by default; else one
ON_OWN_INPUTS = ("regmean", "regmean_plus_plus", "lot", "esm")  # without sums over a drift
IN_DOUBLE = ("lot", "esm")  # which take products of activations in double precision
WITH_TABLES = ("qp", "sketched", "auto")  # which solve tables of tokens too
# forwards of a batch, else two: an expert's and the merge's; the five of auto, with its four
# programmes, are of every other input
STREAMS = {"auto": 2.5, "regmean": 1, "lot": 1, "esm": 1}
WAITING = 2**29  # bytes that forwards may hold in any case, as of ``engine.rerun``
AT_LAYERS, AT_BLOCKS = 5, 3.5  # states of the model that a forward holds while it waits there
BY_BLOCK = ("regmean_plus_plus",)  # whose blocks have other uses, and are not run again
SOLVING = 6  # copies of a layer's sums and updates that are held to solve it
# what thinning an update takes, in bytes for every number: magnitudes in single precision, sorted
# where they are, their places, and what sorting holds; chances, draws, what is kept, and that
# rescaled; ranks, which are sorted twice, and chances and draws
THINNED = {None: 0, "magnitude": 20, "outliers": 20, "random": 16, "ranks": 56}


class Kept(NamedTuple):
    """What a method that runs the models holds besides the sums of one layer; base and experts stay
    in their files.

    Attributes:
        merges: whole models that are made.
        besides: copies of the model in double precision.
        solved: whole models on the disk, of solved layers.
    """

    merges: int
    besides: int
    solved: int


class Memory(NamedTuple):
    """Bytes that a pass holds.

    Attributes:
        models: of whole models. layer: to solve the layers that take most, or to add up what they
            read.
        waiting: of forwards while they wait.
        at_least: of these where they run blocks again rather than wait inside of them.
        survey: to find out what the model does, before any of the others is there.
    """

    models: int
    layer: int
    waiting: int
    at_least: int
    survey: int

    @property
    def most(self) -> int:
        """Bytes at the peak."""
        return max(self.survey, self.models + self.layer + self.waiting)


ONE_MERGE = Kept(1, 0, 1)
# auto: four programmes, two spectral merges and the blend, and one programme more on all inputs
# when the former are gone; esm: the updates, which are kept on the disk in double precision too
KEPT = {"auto": Kept(7, 0, 5), "esm": Kept(1, 1, 4)}


def memory_of_pass(
    report: Report, method: str, options: Mapping[str, object], amount: Amount
) -> Memory:
    """Bytes that are held to merge by a pass over so many inputs."""
    kept = KEPT.get(method, ONE_MERGE)
    models = kept.merges * report.backbone.bytes + DOUBLE * kept.besides * report.parameters
    if method in OWN_PRECISION:  # which run experts of another dtype in copies of the base's
        dtypes = {entry.dtype for entry in report.backbone.entries.values()}
        others = [e for e in report.experts if {n.dtype for n in e.entries.values()} != dtypes]
        models += len(others) * report.backbone.bytes
    layer = memory_of_layer(report, method, options, amount)
    waiting, at_least = _waiting(report.backbone, method, amount.tokens)
    survey = memory_of_survey(report.backbone, amount.sequence)
    return Memory(models, layer, waiting, at_least, survey)


def disk_of_pass(report: Report, method: str) -> int:
    """Bytes on the disk, besides the output, while a pass is made: layers that are solved, and what
    experts have that is in no file as it is run."""
    total = KEPT.get(method, ONE_MERGE).solved * report.backbone.bytes
    for expert in report.experts:
        if isinstance(expert, Change):
            folded = [report.backbone.entries[name] for name in expert.files_of_tensors]
            total += sum(SINGLE * prod(entry.shape) for entry in folded)
        else:
            entries = report.backbone.entries.items()
            rounded = [e for name, e in entries if expert.entries[name].dtype != e.dtype]
            total += sum(entry.stop - entry.start for entry in rounded)
    return total


def memory_of_layer(
    report: Report, method: str, options: Mapping[str, object], amount: Amount | None = None
) -> int:
    """Bytes that are held to add up what layers read that read alike, and to solve them, of those
    that take most.

    Args:
        amount: of the inputs of a pass; None where sums are there already.
    """
    folds = options.get("folds", FOLDS.get(method, 1))
    folds, experts = folds if isinstance(folds, int) else 1, len(report.experts)
    base, most = report.backbone, 0
    tokens = None if amount is None else amount.different or amount.tokens
    number = DOUBLE if method in IN_DOUBLE else SINGLE
    tied, rows = base.config.get("tie_word_embeddings"), base.config.get("vocab_size")
    for (_, n), outputs in alike(base).items():
        m = max(outputs)
        if tied and m == rows:  # a table of tokens: numbers of these, and products with their rows
            g = min(tokens or m, m) if method in WITH_TABLES else 0
            whole = 2 * m * n if g else 0  # the table with its new rows
            most = max(most, DOUBLE * (g * n * (experts * (folds + 2) + SOLVING) + whole))
            continue
        answers = 0 if method in ON_OWN_INPUTS else sum(outputs)
        sums = experts * folds * (n**2 + answers * n)
        solving = experts * (folds + 2) * m * n + SOLVING * (n**2 + m * n)
        adding = memory_of_rows(base, amount, n, answers, number) if amount else 0
        most = max(most, DOUBLE * sums + max(DOUBLE * solving, adding))
    return most


def _waiting(base: Checkpoint, method: str, tokens: int) -> tuple[int, int]:
    """Bytes that forwards hold while they wait in front of the widest layer, what it reads and
    states of the model, no more than a pass allows, which may be what a block reads; and in front
    of blocks."""
    widths, size = widths_of(base) or [0], size_of(base)
    widest, state, streams = max(widths), min(widths), STREAMS.get(method, 2)
    allowed = max(WAITING, tokens * (widest + 10 * state) * size)
    most = min(allowed, int(tokens * streams * (widest + AT_LAYERS * state) * size))
    least = int(tokens * streams * AT_BLOCKS * state * size)
    return most, most if method in BY_BLOCK else min(most, least)


def memory_of_recipe(recipe: Recipe, report: Report) -> int:
    """Bytes that a recipe holds to merge the tensor that takes most, or as many like it as are
    merged at the same time, beside others that are read meanwhile."""
    models, threads = [report.backbone, *report.experts], cpu_count() or 1
    numbers = {name: prod(entry.shape) for name, entry in report.backbone.entries.items()}
    total, held = sum(numbers.values()), []
    for name, count in numbers.items():
        at_once = recipe.rule.at_once(count, threads)
        others = min(total, TOGETHER) - at_once * count
        read = sum(SIZES[model.entries[name].dtype] for model in models)
        held.append(at_once * _of_tensor(recipe, models, name) + max(others, 0) * read)
    return max(held, default=0)


def _of_tensor(recipe: Recipe, models: Sequence[Checkpoint], name: str) -> int:
    """Bytes that a recipe holds to merge one tensor."""
    rule, experts = recipe.rule, len(models) - 1
    stored = [model.entries[name] for model in models]
    count, size = prod(stored[0].shape), SIZES[recipe.dtype or stored[0].dtype]
    read = sum(entry.stop - entry.start for entry in stored)
    if recipe.dtype is not None:
        read += size * count * sum(entry.dtype != recipe.dtype for entry in stored)
    if recipe.method == "linear":  # the result, which is summed piece by piece
        return read + count * size
    if recipe.method == "slerp":
        return read + count * 7 * DOUBLE
    # base and updates, which take the place of experts; and what thins one, or all once more, which
    # are weighted and summed; those that elect a sign are summed piece by piece
    thinned = size * (experts + 1) + THINNED[rule.thinning]
    summed = size * (experts + 3 if rule.elects else 2 * experts + 3)
    return max(read, count * max(thinned, summed))
