"""Products of samples, added to totals in float64 memory."""

from __future__ import annotations

from torch import Tensor


def add_gram(C: Tensor, Z: Tensor, fresh: bool, width: int = 256) -> None:
    """Add ``ZᵀZ`` of Z (N, n), taken in its precision, to the lower triangle of C (n, n), in blocks
    of columns.

    Blocks on the diagonal are whole; ``fresh`` writes over what is there.
    """
    for start in range(0, Z.shape[1], width):
        stop = min(start + width, Z.shape[1])
        accumulate(C[start:stop, :stop], Z[:, start:stop].mT @ Z[:, :stop], fresh)


def lower_blocks(C: Tensor, width: int = 256) -> list[Tensor]:
    """C (…, n, n) on and below the diagonal as :func:`add_gram` fills it, as views (…, w, w')."""
    starts = range(0, C.shape[-1], width)
    return [C[..., start : start + width, : start + width] for start in starts]


def mirror(C: Tensor, width: int = 256) -> None:
    """Fill C (…, n, n), in place, from below the diagonal: what :func:`add_gram` leaves open, and
    its blocks on the diagonal, which on some processors are symmetric only to rounding."""
    for start in range(0, C.shape[-1], width):
        stop = start + width
        C[..., :start, start:stop] = C[..., start:stop, :start].mT
        block = C[..., start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).mT)


def output_products(A: Tensor, D: Tensor, full_energy: bool) -> Tensor:
    """``A Dᵀ`` (…, m, m) of A and D (…, m, n), or only its diagonal (…, m)."""
    return A @ D.mT if full_energy else (A * D).sum(-1)


def propagated(C: Tensor, D: Tensor, full_energy: bool) -> tuple[Tensor, Tensor]:
    """``A = Δ C`` (…, m, n) and ``M = A Δᵀ`` (…, m, m), or its diagonal (…, m): what updates D
    (…, m, n) answer to inputs with second moments C (…, n, n)."""
    A = D @ C
    return A, output_products(A, D, full_energy)


def accumulate(total: Tensor, part: Tensor, fresh: bool) -> None:
    """Add a part (…) to a total (…) of its shape, in place and in the precision of the total;
    ``fresh`` writes over what is there."""
    if fresh:
        total.copy_(part)
    else:
        total.add_(part)
