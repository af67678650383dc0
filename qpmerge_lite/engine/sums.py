r"""Second moments of a layer as a pass adds them up: from what is read, and how far the expert is
from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..moments import Moments
from .processes import Processes
from .products import accumulate, lower_blocks, mirror, output_products
from .rows import Samples
from .views import View

# rounding noise in C, relative to its largest eigenvalue, by precision of products
RTOL = {torch.float64: 1e-10, torch.float32: 1e-6}


class Buffers:
    """Memory by name, reused from layer to layer: fresh memory can cost more time than the products
    it is for.

    Args:
        reused: whether it is; else every tensor has memory of its own, and stays as it is.
    """

    def __init__(self, device: torch.device | str, reused: bool = True):
        self._device, self._reused = device, reused
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A float64 tensor of this shape with anything in it, in place of the last one of this
        name."""
        if not self._reused:
            return torch.empty(shape, dtype=torch.float64, device=self._device)
        needed, buffer = torch.Size(shape).numel(), self._buffers.get(name)
        if buffer is None or not needed <= buffer.numel() <= 16 * needed:
            self._buffers.pop(name, None)
            buffer = None  # let go before more is asked for
            self._buffers[name] = buffer = torch.empty(
                needed, dtype=torch.float64, device=self._device
            )
        return buffer[:needed].view(shape)


class Drift(NamedTuple):
    """Sums over the expert's outputs ``r`` on how far its own inputs are from the merged ones.

    Attributes:
        B: ``Σ r xᵀ`` (T, F, g, m, n).
        R: ``Σ r rᵀ`` (T, F, g, m, m), or its diagonal (T, F, g, m).
    """

    B: Tensor
    R: Tensor


class Sums:
    r"""What a pass adds up, batch by batch, for layers that read one tensor (MATHEMATICS, the same
    sums, cheaper).

    With the merged input ``x`` and the expert's own input ``x°``, the residual output for a target
    blend β is ``Δ_t x + β r``, ``r = W_t (x° - x)``. So the moments of every β follow from

        C_t = Σ x xᵀ      B_t = Σ r xᵀ      R_t = Σ r∘r (or Σ r rᵀ)      N_t

    Nothing large is subtracted from anything large: experts that equal the base have exactly no
    residual, in any precision. Products are taken in the precision of the activations, at least
    float32 (relative error of C 1e-6), or in float64 (1e-14); sums are float64. B and R are kept
    only where expert streams run.

    Args:
        tasks: T names. folds: their number F.
        shape: (g, m, n) of all the layers together, their outputs stacked.
        buffers: where the sums and the moments lie, until they are taken from there again.
        drift: whether B and R are kept.
        full_energy: whether all of R, and of the moments' M, is kept, not only the diagonal.
    Attributes:
        C: (T, F, g, n, n), above the diagonal only once moments are asked for.
        counts: samples of every task and fold.
        rtol: rounding noise of the products, relative to the largest eigenvalue of C.
    """

    def __init__(
        self,
        tasks: Iterable[str],
        shape: tuple[int, int, int],
        buffers: Buffers,
        *,
        folds: int,
        drift: bool,
        full_energy: bool,
    ):
        g, m, n = shape
        self.tasks, self.full_energy, self.rtol = tuple(tasks), full_energy, 0.0
        self._buffers, self._mirrored = buffers, False
        self._outer = len(self.tasks), folds
        self.C = buffers.take("C", (*self._outer, g, n, n))
        self.drift: Drift | None = None
        if drift:
            B = buffers.take("B", (*self._outer, g, m, n))
            self.drift = Drift(B, buffers.take("R", (*self._outer, g, *self._energies(m))))
        self.counts = [[0] * folds for _ in self.tasks]

    def _energies(self, m: int) -> tuple[int, ...]:
        """Shape of the products of m outputs with each other, or of their squares."""
        return (m, m) if self.full_energy else (m,)

    def add(self, view: View, task: str, samples: Samples) -> None:
        """Add samples of one task, laid out as ``view`` says."""
        t, start = self.tasks.index(task), 0
        Z, r = samples.Z, samples.drift
        self.rtol = max(self.rtol, RTOL[Z.dtype])
        for fold, count in enumerate(samples.counts):
            if count == 0:
                continue
            part = slice(start, start + count)
            start += count
            fresh = self.counts[t][fold] == 0
            self.counts[t][fold] += count
            view.add_products(Z[part], self.C[t, fold], fresh)
            if r is not None and self.drift is not None:
                view.add_cross_products(Z[part], r[part], self.drift.B[t, fold], fresh)
                R = self.drift.R[t, fold]
                accumulate(R, self._energy(r[part], R.shape), fresh)

    def _energy(self, r: Tensor, shape: torch.Size) -> Tensor:
        """Products of outputs r, (N, m) of a dense layer or (N, g) of a norm, in a shape (g, m, m);
        or their squares, (g, m)."""
        products = r.mT @ r if self.full_energy and shape[0] == 1 else r.square().sum(0)
        return products.reshape(shape)

    def add_up(self, processes: Processes) -> None:
        """Add what other processes have added to sums of the same shape; each then has all of
        it."""
        if processes.count == 1:
            return
        counts = torch.tensor(self.counts, dtype=torch.float64).to(self.C.device)
        noise = torch.zeros(processes.count).to(counts)
        noise[processes.number] = self.rtol
        sums = [self.C, *(self.drift or ())]
        for of_all in sums:
            of_all[counts == 0] = 0.0  # where nothing was written yet
        processes.add([counts, noise, *lower_blocks(sums[0]), *sums[1:]])
        self.counts = [[int(count) for count in of_task] for of_task in counts.tolist()]
        self.rtol = float(noise.max())

    def finite(self) -> Tensor:
        """Whether the second moments of every task are finite, boolean (T,); every fold must have
        samples."""
        return self.C.diagonal(dim1=-2, dim2=-1).isfinite().flatten(1).all(1)

    def moments(
        self, layer: str, updates: Tensor, own_weight: float, rows: slice = slice(None)
    ) -> Moments:
        """Moments of one of the layers, whose outputs are ``rows`` of all, for its updates (T, g,
        m, n) and a target blend β.

        They lie in the buffers: unless these are kept, the moments of the layer before are gone.
        """
        if not self._mirrored:
            mirror(self.C)
            self._mirrored = True
        _, g, m, n = updates.shape
        A = self._buffers.take("A", (*self._outer, g, m, n))
        M = torch.empty(*self._outer, g, *self._energies(m), dtype=A.dtype, device=A.device)
        for t, D in enumerate(updates.to(self.C)):
            torch.matmul(D, self.C[t], out=A[t])
            M[t] = output_products(A[t], D, self.full_energy)
            if own_weight and self.drift is not None:
                own = Drift(self.drift.B[t][..., rows, :], self._of_rows(self.drift.R[t], rows))
                self._add_drift(A[t], M[t], D, own, own_weight)
        count = torch.tensor(self.counts, dtype=torch.float64).to(self.C.device)
        return Moments(layer, self.tasks, self.C, A, M, count, self.rtol)

    def _of_rows(self, R: Tensor, rows: slice) -> Tensor:
        """Products R (F, g, m, m), or (F, g, m), of some of the outputs."""
        return R[..., rows, rows] if self.full_energy else R[..., rows]

    def _add_drift(self, A: Tensor, M: Tensor, D: Tensor, own: Drift, beta: float) -> None:
        """Add to A (F, g, m, n) and M (F, g, m, m), or (F, g, m), of updates D (g, m, n) what own
        targets of a weight β add: B (F, g, m, n) and R, like M, of the same outputs."""
        cross = output_products(own.B, D, self.full_energy)
        M += beta * (cross + cross.mT if self.full_energy else 2 * cross) + beta**2 * own.R
        A.add_(own.B, alpha=beta)
