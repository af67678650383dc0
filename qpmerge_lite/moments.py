r"""Second moments of one layer, by task and fold: all the merge programme needs to know about its
data.

A layer is ``g`` independent copies of ``y = W x`` with ``x`` in R^n and ``y`` in R^m: ``g = 1`` for
a dense layer, one copy per channel for the gain and bias of a norm. With residual outputs
``r_t = y_t - W0 x_t`` the sums

    C_t = Σ x xᵀ      A_t = Σ r xᵀ      M_t = Σ r rᵀ      N_t

stream over batches and add over shards. Everything here is a sum; division by ``N_t`` happens once,
in :meth:`Moments.pool`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import EmptyCalibration, MergeError, NonFinite, ShapeMismatch, is_finite

WEIGHTS = ("tokens", "energy")


def diagonal(C: Tensor) -> Tensor:
    """Diagonals (…, n) of square matrices (…, n, n), as a view of them."""
    return C.diagonal(dim1=-2, dim2=-1)


def task_weights(count: Tensor, energy: Tensor, weights: str) -> Tensor:
    """Weights ``ω_t`` (…, T) of T tasks, from their numbers of samples and residual energies.

    Args:
        count, energy: ``N_t`` and ``‖R_t‖²``, (…, T) float64.
        weights: ``tokens`` for ``1/N_t``, or ``energy`` for ``1/‖R_t‖²``, 0 without a residual.
    """
    return 1 / count if weights == "tokens" else torch.where(energy > 0, 1 / energy, 0.0)


@dataclass(frozen=True)
class Pooled:
    r"""Task-weighted moments ``C = Σ_t ω_t C_t`` (g, n, n), ``A`` (g, m, n), ``M`` (g, m, m), all
    float64, and ``energy = E = ½ Σ_t ω_t ‖R_t‖²`` (output units squared, per token when ω_t =
    1/N_t). M is None where only E was kept. Where the copies have one output axis in common
    (``shared``), M is (1, m, m)."""

    C: Tensor
    A: Tensor
    M: Tensor | None
    energy: float | Tensor
    shared: bool = False
    rtol: float = 1e-10

    def loss(self, update: Tensor) -> float:
        """``L(W) = ½ tr(D C Dᵀ) - tr(D Aᵀ) + E`` of any merge, ``D = W - W0`` of shape (g, m,
        n)."""
        return float(self.loss_tensor(update))

    def loss_tensor(self, update: Tensor) -> Tensor:
        """``L(W)`` of an update (g, m, n) as a tensor without axes, which nothing waits for."""
        if update.shape != self.A.shape:
            raise ShapeMismatch("merged update", self.A.shape, update.shape)
        update = update.to(self.C)
        return ((update @ self.C) * update).sum() / 2 - (update * self.A).sum() + self.energy

    def captured(self, update: Tensor) -> float:
        """``1 - L(W)/E`` of an update (g, m, n): at most 1, negative if worse than the base.

        With nothing to capture (E = 0) it is 1 if, to rounding, nothing was added either, and else
        minus infinity: a number to choose by. Tables of merges and audits, which are read, have
        None there.
        """
        loss = self.loss(update)
        if self.energy == 0:
            rounding = 1e-18 * float(diagonal(self.C).sum())
            return 1.0 if loss <= rounding else float("-inf")
        return 1 - loss / float(self.energy)


@dataclass(frozen=True)
class Moments:
    r"""Sums over calibration samples of one layer.

    ``C`` (T, F, g, n, n), ``A`` (T, F, g, m, n), ``M`` (T, F, g, m, m), ``count`` (T, F): float64,
    T tasks, F folds of sequences. M may be kept as its diagonal (T, F, g, m), the energy of every
    output row, which is all that bases other than rotated rows need. Copies that share their output
    axis, the tokens of an embedding, have one M for all, g = 1 in its shape. Immutable in shape;
    :meth:`update` adds in place, ``+`` returns a new object.
    """

    layer: str
    tasks: tuple[str, ...]
    C: Tensor
    A: Tensor
    M: Tensor
    count: Tensor
    rtol: float = 1e-10

    @classmethod
    def zeros(
        cls,
        tasks: Iterable[str],
        n: int,
        m: int,
        *,
        g: int = 1,
        folds: int = 1,
        layer: str = "layer",
        device: torch.device | str | None = None,
        full_energy: bool = True,
        shared: bool = False,
    ) -> Moments:
        """Empty sums for ``tasks`` and a layer of shape (g, m, n); ``full_energy`` keeps all of M,
        not only its diagonal."""
        tasks = tuple(tasks)

        def sums(*shape: int) -> Tensor:
            """Zeros (T, F, *shape)."""
            return torch.zeros(len(tasks), folds, *shape, dtype=torch.float64, device=device)

        outputs = (1 if shared else g, m)
        M = sums(*outputs, m) if full_energy else sums(*outputs)
        return cls(layer, tasks, sums(g, n, n), sums(g, m, n), M, sums())

    @property
    def folds(self) -> int:
        """Number of folds F."""
        return self.count.shape[1]

    @property
    def full_energy(self) -> bool:
        """Whether M holds products of different outputs, not only the energy of each."""
        return self.M.dim() == 5

    @property
    def energies(self) -> Tensor:
        """Residual energy ``‖R‖²`` (T, F) of every task and fold."""
        return (diagonal(self.M) if self.full_energy else self.M).sum((-2, -1))

    @property
    def shared(self) -> bool:
        """Whether the copies have one output axis in common."""
        return self.M.shape[2] != self.A.shape[2]

    def update(self, task: str, inputs: Tensor, residuals: Tensor, fold: int | Tensor = 0) -> None:
        """Add N samples of one task.

        Args:
            inputs: (N, n) or (N, g, n), any floating dtype; the layer's inputs, constant 1 appended
                where a bias is folded in.
            residuals: (N, m) or (N, g, m); expert output minus base output on these inputs.
            fold: the fold of every sample, or one per sample (N,).
        Raises: ShapeMismatch, NonFinite, MergeError for an unknown task or fold, naming layer and
            task. Cost: N (n + m)² g flops in float64.
        """
        t, x, r = self._checked(task, inputs, residuals)
        fold = torch.as_tensor(fold, device=x.device).expand(len(x))
        if ((fold < 0) | (fold >= self.folds)).any():
            raise MergeError(
                f"layer {self.layer}, task {task}: folds are 0 to {self.folds - 1}, found "
                f"{fold.unique().tolist()}"
            )
        order, counts = fold.argsort(stable=True), fold.bincount(minlength=self.folds).tolist()
        inputs_of_folds, residuals_of_folds = x[order].split(counts), r[order].split(counts)
        for f in range(self.folds):
            xf = inputs_of_folds[f].transpose(0, 1)  # (g, N_f, n)
            rf = residuals_of_folds[f].transpose(0, 1)  # (g, N_f, m)
            self.C[t, f] += xf.mT @ xf
            self.A[t, f] += rf.mT @ xf
            self.M[t, f] += rf.mT @ rf if self.full_energy else rf.square().sum(1)
            self.count[t, f] += counts[f]

    def count_copies(self, task: str, counts: Tensor, update: Tensor) -> None:
        """Add samples of copies with a constant input (n = 1) that share their outputs, given how
        often each copy occurs.

        Args:
            counts: (F, g) occurrences.
            update: (g, m, 1), the expert's residual update, which is its residual output.
        """
        t, c, d = self.tasks.index(task), counts.to(self.C), update.to(self.C)[..., 0]
        self.C[t, :, :, 0, 0] += c
        self.A[t, ..., 0] += c[..., None] * d
        self.M[t, :, 0] += (
            torch.stack([(d.mT * f) @ d for f in c]) if self.full_energy else c @ d.square()
        )
        self.count[t] += c.sum(1)

    def _checked(self, task: str, inputs: Tensor, residuals: Tensor) -> tuple[int, Tensor, Tensor]:
        """Place of a task, its inputs (N, g, n) and residuals (N, g, m), in float64."""
        if task not in self.tasks:
            raise MergeError(
                f"layer {self.layer}: unknown task {task!r}; the moments were opened for "
                f"{list(self.tasks)}"
            )
        shapes = {
            "inputs": (inputs, self.C.shape[2:4]),
            "residuals": (residuals, self.A.shape[2:4]),
        }
        checked = []
        for name, (z, (g, width)) in shapes.items():
            z = z.unsqueeze(1) if z.dim() == 2 and g == 1 else z
            if z.shape != (len(inputs), g, width):
                raise ShapeMismatch(
                    f"layer {self.layer}, task {task}, {name}",
                    (len(inputs), g, width),
                    z.shape,
                    "rows are samples, all of them for both arguments",
                )
            if not is_finite(z):
                raise NonFinite(
                    f"layer {self.layer}, task {task}, {name}",
                    z,
                    "check this task's calibration data and weights",
                )
            checked.append(z.to(self.C))
        return self.tasks.index(task), checked[0], checked[1]

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sample sets together; either may be an empty shard."""
        if (self.tasks, self.layer) != (other.tasks, other.layer):
            raise MergeError(
                f"moments of different things: {self.layer} {self.tasks} and {other.layer} "
                f"{other.tasks}"
            )
        for mine, theirs in ((self.A, other.A), (self.M, other.M)):
            if mine.shape != theirs.shape:
                raise ShapeMismatch(f"layer {self.layer}: moments to add", mine.shape, theirs.shape)
        return replace(
            self,
            C=self.C + other.C,
            A=self.A + other.A,
            M=self.M + other.M,
            count=self.count + other.count,
        )

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Add up the sums of all processes of a ``torch.distributed`` group, in place."""
        for z in (self.C, self.A, self.M, self.count):
            torch.distributed.all_reduce(z, group=group)

    def only(self, tasks: Iterable[str]) -> Moments:
        """Moments of some of the tasks, in the order given."""
        tasks = tuple(tasks)
        places = [self.tasks.index(t) for t in tasks]
        C, A, M = self.C[places], self.A[places], self.M[places]
        return replace(self, tasks=tasks, C=C, A=A, M=M, count=self.count[places])

    def check_samples(self, folds: Sequence[int]) -> None:
        """EmptyCalibration naming the tasks without a sample in these folds together."""
        count = self.count[:, list(folds)].sum(1)
        empty = [t for t, c in zip(self.tasks, count.tolist()) if c == 0]
        if empty:
            raise EmptyCalibration(
                f"layer {self.layer}: no calibration tokens for {empty} in folds {list(folds)} of "
                f"{self.folds}; give at least one sequence per task and fold, or use fewer folds"
            )

    def pool(self, folds: Iterable[int] | None = None, weights: str = "tokens") -> Pooled:
        """Weighted sum over tasks on a subset of folds.

        Args:
            folds: indices, all by default.
            weights: ``tokens`` ω_t = 1/N_t, or ``energy`` ω_t = 1/‖R_t‖² (0 for a task with no
                residual).
        Raises: EmptyCalibration naming the tasks without a sample in these folds.
        """
        if weights not in WEIGHTS:
            raise MergeError(f"task weights: expected one of {WEIGHTS}, found {weights!r}")
        chosen = list(range(self.folds) if folds is None else folds)
        self.check_samples(chosen)
        pooled = self.pooled(chosen, weights)
        return replace(pooled, energy=float(pooled.energy))

    def pooled(self, folds: Iterable[int] | None = None, weights: str = "tokens") -> Pooled:
        """:meth:`pool` without a look at the values: nothing waits for the device, E is a tensor,
        and every task must have samples."""
        inside = torch.zeros(1, self.folds, dtype=torch.float64)
        inside[0, list(range(self.folds) if folds is None else folds)] = 1.0
        return self._pooled(inside.to(self.C.device), weights, self.full_energy)[0]

    def split(
        self, fold: int, weights: str = "tokens", full_energy: bool = True
    ) -> tuple[Pooled, Pooled]:
        """Weighted sums over all folds but one, and over that one, without a look at the values.

        Args:
            fold: the one held out; every task must have samples in it and in the others.
            weights: of the tasks, as in :meth:`pool`.
            full_energy: whether M is wanted, which only rotated rows need.
        """
        held_out = torch.zeros_like(self.count[0])
        held_out[fold] = 1.0
        inside = torch.stack([1 - held_out, held_out])
        fitted, scored = self._pooled(inside, weights, full_energy and self.full_energy)
        return fitted, scored

    def _pooled(self, inside: Tensor, weights: str, with_products: bool) -> list[Pooled]:
        """Weighted sums over S sets of folds, taken together: each is one pass over the sums.

        Args:
            inside: (S, F) float64, one where a fold belongs to a set.
            with_products: whether M is pooled too.
        """
        count, energy = inside @ self.count.mT, inside @ self.energies.mT  # (S, T)
        omega = task_weights(count, energy, weights)
        share = (omega[:, :, None] * inside[:, None, :]).flatten(1)  # (S, T·F)

        def weighted(sums: Tensor) -> Tensor:
            """(S, …) of sums (T, F, …)."""
            return (share @ sums.reshape(share.shape[1], -1)).reshape(-1, *sums.shape[2:])

        C, A, E = weighted(self.C), weighted(self.A), (omega * energy).sum(1) / 2
        M = weighted(self.M) if with_products else [None] * len(inside)
        return [Pooled(*of_set, self.shared, self.rtol) for of_set in zip(C, A, M, E)]

    def save(self, path: str | os.PathLike) -> None:
        """Write safetensors to ``path`` through a temporary name."""
        temporary = f"{path}.partial"
        meta = {"layer": self.layer, "tasks": json.dumps(self.tasks)}
        save_file(
            {k: getattr(self, k).contiguous() for k in ("C", "A", "M", "count")},
            temporary,
            metadata=meta,
        )
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> Moments:
        """Read what :meth:`save` wrote."""
        with safe_open(path, framework="pt", device=str(device)) as f:
            meta = f.metadata()
            return cls(
                meta["layer"],
                tuple(json.loads(meta["tasks"])),
                *(f.get_tensor(k) for k in ("C", "A", "M", "count")),
            )
