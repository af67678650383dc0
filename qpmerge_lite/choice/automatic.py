"""A merge chosen without labels: programmes averaged with spectral merges, judged end to end on
calibration inputs that they were not solved on, and then solved on all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..calibration import Batch, check_calibration
from ..datafree import soup, task_arithmetic
from ..engine.recipes import Recipe
from ..errors import EmptyCalibration
from ..experts import check_experts
from ..forwards import is_encoder_decoder, refuse_what_cannot_run
from ..heads import Heads, inputs_of
from ..inputs import take
from ..merge import Computed, Merge, add_update, differences_one_by_one
from ..sequential import merge_together
from ..solvers import QP
from ..spectral.triplets import iso_c, tsv_merge
from .criteria import DIVERGENCE, Criterion

# β: weight of the experts' own outputs among the targets. The prior is long, as the penalty pulls
# towards it a tenth as hard as the data do.
BETAS = MappingProxyType({"quarter": 0.25, "half": 0.5, "own": 1.0})
PRIOR, RIDGE = 4.0, 0.1
SPECTRAL = MappingProxyType({"tsv": tsv_merge, "iso": iso_c})
A_LITTLE, MORE = {"tsv": 0.1, "iso": 0.1}, {"tsv": 0.2, "iso": 0.2}
# what is chosen from, the first unless another one is clearly better: weights of updates W_i - W_0
BLENDS = MappingProxyType(
    {
        "half, a little spectral": {"half": 0.7} | A_LITTLE,
        "half, more spectral": {"half": 0.4} | MORE,
        "half": {"half": 1.0},
        "half, shorter": {"half": 0.85},
        "quarter, a little spectral": {"quarter": 0.7} | A_LITTLE,
        "own, a little spectral": {"own": 0.7} | A_LITTLE,
        "short prior": {"short prior": 1.0},
    }
)
# scales of task arithmetic, which with soup and base is what a choice must not fall behind
ARITHMETIC = MappingProxyType({f"task arithmetic {scale:g}": scale for scale in (0.1, 0.3)})
BOUNDS = ("base", "soup", *ARITHMETIC)
NAMES = (*BLENDS, *BOUNDS)
CLEARLY = 2.0  # standard errors by which another blend has to lead


@dataclass
class AutoMerge(Merge):
    """A merge, and how it was chosen.

    Attributes:
        chosen: its name among the candidates.
        criterion: ``captured divergence`` with heads, else ``captured energy`` of the output.
        candidates: a row for everything that was judged: ``name``, ``captured`` (the criterion, on
            the inputs left out), by how much the chosen one leads (``lead``), and the standard
            ``error`` of that.
    """

    chosen: str = ""
    criterion: str = ""
    candidates: list[dict] = field(default_factory=list)


def auto(
    base: nn.Module,
    experts,
    calibration,
    *,
    heads: Heads | None = None,
    blocks=None,
    group=None,
    progress: bool = False,
) -> AutoMerge:
    """The merge to begin with: choices are made on calibration inputs, without labels.

    Programmes over single entries are solved on every other calibration input, averaged with TSV-M
    and Iso-C in a few ways (``BLENDS``), and judged on the inputs left out. The first blend is
    taken unless predictions say that another one is clearly better, by two standard errors paired
    over inputs; then its programme is solved on all inputs. Where soup, task arithmetic or the base
    are ahead of that, by predictions or, without heads, by the model's output, the best of all
    candidates is returned.

    Args:
        base, experts, calibration, blocks, group: as in :func:`merge_sequentially`; at least two
            inputs for every task.
        heads: task -> function from what the model returns to logits (N, classes). Without them
            there is no choice between blends: energies of outputs prefer short priors, which are
            worse (the book measures it).
    Returns: AutoMerge, with the layers' table of the programme. Cost: three to four times that of
        ``qp``.
    Raises: what :func:`merge_sequentially` raises; EmptyCalibration for a task with one input.
    """
    refuse_what_cannot_run(base)
    batches = checked(base, experts, calibration, heads)
    solved_on, left_out = halves(batches)
    options = {"blocks": blocks, "group": group, "progress": progress}
    tried = Candidates(base, experts, solved_on, **options)
    judge = Criterion(base, check_experts(base, experts, cast=True), left_out, heads, group)
    errors = {name: judge.errors(tried.merge(name).state_dict) for name in NAMES}
    chosen = choose(judge, errors)
    del tried  # whole models that are of no more use
    everything = {task: [batch.arguments for batch in own] for task, own in batches.items()}
    merge = Candidates(base, experts, everything, chosen, **options).merge(chosen)
    rows = candidate_rows(judge, errors, chosen)
    return AutoMerge(merge.state_dict, merge.table, merge.averaged, chosen, judge.name, rows)


def checked(base: nn.Module, experts, calibration, heads: Heads | None) -> dict[str, list[Batch]]:
    """Calibration batches of every expert's task; heads, where there are any, are checked too."""
    if heads is not None:
        return inputs_of(base, experts, calibration, heads)
    device = next(base.parameters()).device
    return check_calibration(calibration, list(experts), device, is_encoder_decoder(base))


def halves(
    batches: Mapping[str, list[Batch]],
) -> tuple[dict[str, list[dict]], dict[str, list[Batch]]]:
    """Every other input of each task, as calibration to solve on, and the others to judge by.

    Raises: EmptyCalibration for a task with one input.
    """
    solved_on: dict[str, list[dict]] = {}
    left_out: dict[str, list[Batch]] = {}
    for task, own in batches.items():
        if sum(batch.size for batch in own) < 2:
            raise EmptyCalibration(
                f"task {task!r}: expected at least two calibration inputs, one to solve on and one "
                "to judge by, found one; give more, or merge by qp"
            )
        solved_on[task] = [batch.arguments for batch in _every_other(own, 0)]
        left_out[task] = _every_other(own, 1)
    return solved_on, left_out


def _every_other(batches: list[Batch], first: int) -> list[Batch]:
    """The inputs of a task with even (``first`` 0) or odd (1) numbers, by the batches they are
    in."""
    parts = []
    for batch in batches:
        numbers = torch.arange(batch.size)
        rows = numbers[(numbers + batch.start) % 2 == first]
        if len(rows):
            parts.append(take(batch, rows))
    return parts


def recipes() -> dict[str, Recipe]:
    """The programmes that blends are made of, by name."""
    long = QP(basis="elements", ridge=RIDGE, prior=PRIOR, penalty="diagonal")
    short = QP(basis="elements", ridge=RIDGE, prior=1.0, penalty="diagonal")
    solved = {name: Recipe(long, targets=beta, folds=1) for name, beta in BETAS.items()}
    return solved | {"short prior": Recipe(short, targets=0.5, folds=1)}


class Candidates:
    """What is chosen from: blends, and the bounds that they have to reach.

    Args:
        base, experts, calibration, blocks, group, progress: as in ``merge_sequentially``.
        only: one candidate, if no other is wanted.
    """

    def __init__(self, base: nn.Module, experts, calibration, only: str | None = None, **options):
        self.base, self.experts = base, check_experts(base, experts)
        wanted = {part for name in BLENDS for part in BLENDS[name] if only in (None, name)}
        solved = {name: recipe for name, recipe in recipes().items() if name in wanted}
        self.programmes: dict[str, Merge] = {}
        if solved:
            self.programmes = merge_together(base, experts, calibration, solved, **options)
        spectral = {name: method for name, method in SPECTRAL.items() if name in wanted}
        self.spectral = {name: method(base, experts) for name, method in spectral.items()}

    def merge(self, name: str) -> Merge:
        """A candidate: ``W_0 + Σ_i w_i (W_i - W_0)`` for a blend, with table and averaged entries
        of its programme."""
        if name == "base":
            return Merge(dict(self.base.state_dict()))
        if name == "soup":
            return soup(self.base, self.experts)
        if name in ARITHMETIC:
            return task_arithmetic(self.base, self.experts, scale=ARITHMETIC[name])
        return self.blend(BLENDS[name])

    def blend(self, weights: Mapping[str, float]) -> Merge:
        """The base plus weighted updates of programmes and spectral merges, by name."""
        merges = self.programmes | self.spectral
        states = {name: merges[name].state_dict for name in weights}
        scales = torch.tensor(list(weights.values()), dtype=torch.float64)
        parts = differences_one_by_one(self.base, states)

        def update(name: str) -> Tensor:
            of_name = parts[name]
            return torch.tensordot(scales.to(of_name), of_name, dims=1)

        merge = add_update(self.base, self.experts, Computed(parts, update))
        for name in weights.keys() & self.programmes.keys():
            merge.table += self.programmes[name].table
            merge.averaged |= self.programmes[name].averaged
        return merge


def choose(judge: Criterion, errors: Mapping[str, dict[str, Tensor]]) -> str:
    """The first blend, or where predictions say so clearly the best; where a bound is ahead of it,
    the best candidate of all.

    Args:
        errors: name of a candidate -> task -> its errors (N,), as of ``judge``.
    """
    captured = {name: judge.captured(of_one) for name, of_one in errors.items()}
    chosen = next(iter(BLENDS))
    if judge.name == DIVERGENCE:
        best = max(BLENDS, key=captured.__getitem__)
        lead = judge.lead(errors[best], errors[chosen])
        if lead.difference > CLEARLY * lead.error:
            chosen = best
    if max(captured[name] for name in BOUNDS) > captured[chosen]:
        return max(NAMES, key=captured.__getitem__)
    return chosen


def candidate_rows(
    judge: Criterion, errors: Mapping[str, dict[str, Tensor]], chosen: str
) -> list[dict]:
    """A row for every candidate, see :class:`AutoMerge`; arguments as of :func:`choose`."""
    rows = []
    for name, of_one in errors.items():
        lead = judge.lead(errors[chosen], of_one)
        row = {"name": name, "captured": judge.captured(of_one)}
        rows.append(row | {"lead": lead.difference, "error": lead.error})
    return rows
