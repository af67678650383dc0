r"""Second moments of a layer as a pass adds them up: from what is read, and how far the expert is from it."""

from __future__ import annotations

import torch
from torch import Tensor

from .moments import Moments

RTOL = {torch.float64: 1e-10, torch.float32: 1e-6}  # rounding noise in C, relative to its largest eigenvalue, by precision of products


def gram(Z: Tensor, width: int = 256) -> Tensor:
    """``ZᵀZ`` (n, n) of Z (N, n), in its precision: the lower triangle in blocks of columns, mirrored."""
    n = Z.shape[1]
    if n <= 1.5 * width:
        return Z.mT @ Z
    C = Z.new_empty(n, n)
    for start in range(0, n, width):
        block = Z[:, start : start + width].mT @ Z[:, : start + width]
        C[start : start + width, : start + width] = block
        C[:start, start : start + width] = block[:, :start].mT
    return C


class Sums:
    r"""What a pass adds up, batch by batch, for layers that read one tensor (MATHEMATICS, the same sums, cheaper).

    With the merged input ``x`` and the expert's own input ``x°``, the residual output for a target blend β is ``Δ_t x + β r``,
    ``r = W_t (x° - x)``. So the moments of every β follow from

        C_t = Σ x xᵀ      B_t = Σ r xᵀ      R_t = Σ r∘r (or Σ r rᵀ)      N_t

    Nothing large is subtracted from anything large: experts that equal the base have exactly no residual, in any precision.
    Products are taken in the precision of the activations, at least float32 (relative error of C 1e-6), or in float64 (1e-14);
    sums are float64. B and R are kept only where expert streams run (``drift``).
    """

    def __init__(self, tasks, shape: tuple[int, int, int], *, folds: int, device, drift: bool, full_energy: bool,
                 memory: Tensor | None = None):
        self.tasks, self.full_energy, self.rtol = tuple(tasks), full_energy, 0.0
        sizes = self.sizes(shape, drift, full_energy)
        needed = len(self.tasks) * folds * sum(torch.Size(size).numel() for size in sizes)
        if memory is None or memory.numel() < needed:
            memory = torch.empty(needed, dtype=torch.float64, device=device)
        memory[:needed].zero_()  # memory that was used before is much faster than new one
        parts, start = [], 0
        for size in sizes:
            whole = (len(self.tasks), folds, *size)
            stop = start + torch.Size(whole).numel()
            parts.append(memory[start:stop].view(whole))
            start = stop
        self.C, self.B, self.R = parts if drift else (*parts, None, None)
        self.counts = [[0] * folds for _ in self.tasks]

    @staticmethod
    def sizes(shape: tuple[int, int, int], drift: bool, full_energy: bool) -> list[tuple[int, ...]]:
        """Shapes of C, and of B and R where there is drift, for one task and fold of a layer (g, m, n)."""
        g, m, n = shape
        energy = (g, m, m) if full_energy else (g, m)
        return [(g, n, n), (g, m, n), energy] if drift else [(g, n, n)]

    def add(self, view, task: str, Z: Tensor, r: Tensor | None, counts: list[int]) -> None:
        """Add the samples Z of one task, those of a fold side by side, ``counts`` of every fold; see ``layers`` for layouts."""
        t, start = self.tasks.index(task), 0
        self.rtol = max(self.rtol, RTOL[Z.dtype])
        for fold, count in enumerate(counts):
            if count == 0:
                continue
            part = slice(start, start + count)
            start += count
            C, B = view.products(Z[part], None if r is None else r[part])
            self.C[t, fold] += C
            self.counts[t][fold] += count
            if r is not None:
                self.B[t, fold] += B
                self.R[t, fold] += self._energy(r[part])

    def _energy(self, r: Tensor) -> Tensor:
        """Of outputs r: (N, m) of a dense layer, (N, g) of a norm."""
        if not self.full_energy:
            return r.square().sum(0).reshape(self.R.shape[2:])
        return (r.mT @ r if self.R.shape[2] == 1 else r.square().sum(0)).reshape(self.R.shape[2:])

    def moments(self, layer: str, updates: Tensor, own_weight: float, rows: slice = slice(None)) -> Moments:
        """Moments of one of the layers, whose outputs are ``rows`` of all, for its updates (T, g, m, n) and a target blend β."""
        D = updates.to(self.C).unsqueeze(1)
        A = D @ self.C
        M = A @ D.mT if self.full_energy else (A * D).sum(-1)
        if own_weight and self.B is not None:
            B = self.B[..., rows, :]
            if self.full_energy:
                cross = D @ B.mT
                M = M + own_weight * (cross + cross.mT) + own_weight**2 * self.R[..., rows, rows]
            else:
                M = M + 2 * own_weight * (D * B).sum(-1) + own_weight**2 * self.R[..., rows]
            A = A + own_weight * B
        count = torch.tensor(self.counts, dtype=torch.float64).to(self.C.device)
        return Moments(layer, self.tasks, self.C, A, M, count, self.rtol)

