r"""Second moments of a layer as a pass adds them up: from what is read, and how far the expert is
from it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..moments import Moments

RTOL = {
    torch.float64: 1e-10,
    torch.float32: 1e-6,
}  # rounding noise in C, relative to its largest eigenvalue, by precision of products


def add_gram(C: Tensor, Z: Tensor, fresh: bool, width: int = 256) -> None:
    """Add ``ZᵀZ`` of Z (N, n), taken in its precision, to the lower triangle of C (n, n), in blocks
    of columns.

    Blocks on the diagonal are whole; ``fresh`` writes over what is there.
    """
    for start in range(0, Z.shape[1], width):
        stop = min(start + width, Z.shape[1])
        accumulate(C[start:stop, :stop], Z[:, start:stop].mT @ Z[:, :stop], fresh)


def mirror(C: Tensor, width: int = 256) -> None:
    """Fill what :func:`add_gram` leaves open in C (…, n, n) from below the diagonal."""
    for start in range(width, C.shape[-1], width):
        stop = start + width
        C[..., :start, start:stop] = C[..., start:stop, :start].mT


def accumulate(total: Tensor, part: Tensor, fresh: bool) -> None:
    """Add to a total in its precision; ``fresh`` writes over what is there."""
    if fresh:
        total.copy_(part)
    else:
        total.add_(part)


class Buffers:
    """Memory by name, used again from layer to layer: fresh memory can cost more time than the
    products it is for.

    ``kept``: nothing is used again, every tensor stays as it is.
    """

    def __init__(self, device: torch.device, kept: bool = False):
        self._device, self._kept, self._buffers = device, kept, {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A float64 tensor of this shape with anything in it, in place of the last one of this
        name."""
        if self._kept:
            return torch.empty(shape, dtype=torch.float64, device=self._device)
        needed, buffer = torch.Size(shape).numel(), self._buffers.get(name)
        if buffer is None or not needed <= buffer.numel() <= 16 * needed:
            self._buffers.pop(name, None)
            buffer = None  # let go before more is asked for
            self._buffers[name] = buffer = torch.empty(
                needed, dtype=torch.float64, device=self._device
            )
        return buffer[:needed].view(shape)


class Sums:
    r"""What a pass adds up, batch by batch, for layers that read one tensor (MATHEMATICS, the same
    sums, cheaper).

    With the merged input ``x`` and the expert's own input ``x°``, the residual output for a target
    blend β is ``Δ_t x + β r``, ``r = W_t (x° - x)``. So the moments of every β follow from

        C_t = Σ x xᵀ      B_t = Σ r xᵀ      R_t = Σ r∘r (or Σ r rᵀ)      N_t

    Nothing large is subtracted from anything large: experts that equal the base have exactly no
    residual, in any precision. Products are taken in the precision of the activations, at least
    float32 (relative error of C 1e-6), or in float64 (1e-14); sums are float64. B and R are kept
    only where expert streams run (``drift``).

    Args:
        shape: (g, m, n) of all the layers together, their outputs stacked.
        buffers: where the sums and the moments lie, until they are taken from there again.
    """

    def __init__(
        self,
        tasks,
        shape: tuple[int, int, int],
        buffers: Buffers,
        *,
        folds: int,
        drift: bool,
        full_energy: bool,
    ):
        g, m, n = shape
        self.tasks, self.full_energy, self.rtol, self._buffers, self._mirrored = (
            tuple(tasks),
            full_energy,
            0.0,
            buffers,
            False,
        )
        self._outer = len(self.tasks), folds
        self.C = buffers.take("C", (*self._outer, g, n, n))
        self.B = buffers.take("B", (*self._outer, g, m, n)) if drift else None
        self.R = buffers.take("R", (*self._outer, g, *self._energies(m))) if drift else None
        self.counts = [[0] * folds for _ in self.tasks]

    def _energies(self, m: int) -> tuple[int, ...]:
        """Shape of the products of m outputs with each other, or of their squares."""
        return (m, m) if self.full_energy else (m,)

    def add(self, view, task: str, Z: Tensor, r: Tensor | None, counts: list[int]) -> None:
        """Add the samples Z of one task, those of a fold side by side, ``counts`` of every fold;
        see ``views`` for layouts."""
        t, start = self.tasks.index(task), 0
        self.rtol = max(self.rtol, RTOL[Z.dtype])
        for fold, count in enumerate(counts):
            if count == 0:
                continue
            part = slice(start, start + count)
            start += count
            fresh = self.counts[t][fold] == 0
            self.counts[t][fold] += count
            view.add_products(Z[part], self.C[t, fold], fresh)
            if r is not None:
                view.add_cross_products(Z[part], r[part], self.B[t, fold], fresh)
                accumulate(self.R[t, fold], self._energy(r[part]), fresh)

    def _energy(self, r: Tensor) -> Tensor:
        """Of outputs r: (N, m) of a dense layer, (N, g) of a norm."""
        if not self.full_energy:
            return r.square().sum(0).reshape(self.R.shape[2:])
        return (r.mT @ r if self.R.shape[2] == 1 else r.square().sum(0)).reshape(self.R.shape[2:])

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
            M[t] = A[t] @ D.mT if self.full_energy else (A[t] * D).sum(-1)
            if own_weight and self.B is not None:
                self._add_drift(A[t], M[t], D, t, own_weight, rows)
        count = torch.tensor(self.counts, dtype=torch.float64).to(self.C.device)
        return Moments(layer, self.tasks, self.C, A, M, count, self.rtol)

    def _add_drift(self, A: Tensor, M: Tensor, D: Tensor, t: int, beta: float, rows: slice) -> None:
        """Add what own targets of task t add to A (F, g, m, n) and M of its updates D (g, m, n)."""
        B = self.B[t][..., rows, :]
        if self.full_energy:
            cross = D @ B.mT
            M += beta * (cross + cross.mT) + beta**2 * self.R[t][..., rows, rows]
        else:
            M += 2 * beta * (D * B).sum(-1) + beta**2 * self.R[t][..., rows]
        A.add_(B, alpha=beta)
