"""What must hold, as assertions with a name."""

import torch


def assert_relative(actual, expected, rtol=1e-10, scale=0.0):
    """``|actual - expected| ≤ rtol · max(|expected|, scale)``, the maximum over all entries; equal
    shapes, any device."""
    actual, expected = (torch.as_tensor(z, dtype=torch.float64).cpu() for z in (actual, expected))
    assert actual.shape == expected.shape, (
        f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    )
    if actual.numel() == 0:
        return
    error, size = float((actual - expected).abs().max()), max(float(expected.abs().max()), scale)
    assert error <= rtol * size, (
        f"error {error:.3g} against {size:.3g}: relative {error / (size or 1):.3g}, allowed "
        f"{rtol:g}"
    )


def assert_same_moments(actual, expected, rtol=1e-12):
    """Equal sums and counts, layer and tasks."""
    assert (actual.layer, actual.tasks) == (expected.layer, expected.tasks)
    for name in ("C", "A", "M", "count"):
        assert_relative(getattr(actual, name), getattr(expected, name), rtol)


def assert_psd(S, rtol=1e-12):
    """Symmetric, and no eigenvalue below ``-rtol`` times the largest."""
    assert_relative(S, S.mT, rtol)
    values = torch.linalg.eigvalsh(S)
    assert values.numel() == 0 or values.min() >= -rtol * values.abs().max()


def assert_in_range(H, f, rtol=1e-7):
    """``f ∈ Range(H)`` for stacked blocks (b, q, q) and (b, s, q): f has no part in the numerical
    kernel of H."""
    values, vectors = torch.linalg.eigh(H)
    outside = (f @ vectors) * (values <= 1e-12 * values.amax())[:, None, :]
    assert outside.norm() <= rtol * f.norm()


def assert_kkt(
    prog, d, *, ridge=0.0, gamma=None, prior=None, nonnegative=False, sum_to_one=False, tol=1e-8
):
    r"""Optimality of ``min L(d) + ½ λ (d - d0)ᵀ Γ (d - d0)`` subject to ``d ≥ 0`` and/or
    ``Σ_k d_k = 1`` in every block.

    With the gradient ``v = Hd + f + λΓ(d - d0)`` and multipliers μ (of the sum) and z ≥ 0 (of the
    signs): stationarity ``v = z + μ1``; feasibility of d; complementarity ``z_k d_k = 0``. Without
    sign constraints z = 0; without the sum μ = 0; with both, complementarity and Σd = 1 give
    ``μ = Σ_k d_k v_k``.
    """
    v = prog.gradient(d)
    if ridge:
        v = v + ridge * gamma.unsqueeze(1) * (d - prior)
    mu = torch.zeros_like(v[..., :1])
    if sum_to_one:
        assert_relative(d.sum(-1), torch.ones_like(d[..., 0]), tol)
        mu = (d * v).sum(-1, keepdim=True) if nonnegative else v.mean(-1, keepdim=True)
    size = 1 + float(d.abs().max()) if d.numel() else 1.0
    scale = float(prog.f.abs().max()) + float(prog.H.abs().max()) * size if d.numel() else 1.0
    z = v - mu
    if nonnegative:
        assert d.min() >= -tol * size
        assert z.min() >= -tol * scale
        assert (z * d).abs().max() <= tol * scale * size
    else:
        assert_relative(z, torch.zeros_like(z), tol, scale)
