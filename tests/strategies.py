"""Random layers with random experts, seen through their samples: the moments-free truth the package
is held against."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from qpmerge_lite.bases import build
from qpmerge_lite.moments import Moments
from qpmerge_lite.programme import programme

FREE = (
    "layer",
    "rows",
    "rotated_rows",
    "columns",
    "rotated_columns",
    "singular",
    "elements",
    "explicit",
)  # need no labels
FAMILIES = (*FREE, "groups")


def normal(seed: int, *shape) -> Tensor:
    """Standard normal float64 tensor of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Layer:
    """Residual updates (K, g, m, n) and the samples of K tasks: X[t] (N, g, n), R[t] (N, g, m),
    fold[t] (N,)."""

    updates: Tensor
    X: tuple[Tensor, ...]
    R: tuple[Tensor, ...]
    fold: tuple[Tensor, ...]
    folds: int = 1

    @property
    def tasks(self):
        return tuple(f"task{t}" for t in range(len(self.X)))

    def to(self, device):
        move = lambda zs: tuple(z.to(device) for z in zs)
        return replace(
            self,
            updates=self.updates.to(device),
            X=move(self.X),
            R=move(self.R),
            fold=move(self.fold),
        )

    def moments(self, name="layer") -> Moments:
        g, m, n = self.updates.shape[1:]
        moments = Moments.zeros(
            self.tasks, n, m, g=g, folds=self.folds, layer=name, device=self.updates.device
        )
        for samples in zip(self.tasks, self.X, self.R, self.fold):
            moments.update(*samples)
        return moments

    def groups(self) -> Tensor:
        """Two output rows to a head."""
        return torch.arange(self.updates.shape[1] * self.updates.shape[2]) // 2

    def basis(self, family, pooled=None, updates=None):
        pooled = self.moments().pool() if pooled is None else pooled
        return build(
            family,
            self.updates if updates is None else updates,
            pooled,
            groups=self.groups() if family == "groups" else None,
        )

    def programme(self, family, pooled=None):
        pooled = self.moments().pool() if pooled is None else pooled
        return programme(pooled, self.basis(family, pooled))

    def omega(self, weights="tokens") -> list[float]:
        sizes = (
            [len(x) for x in self.X]
            if weights == "tokens"
            else [float((r**2).sum()) for r in self.R]
        )
        return [1 / s if s else 0.0 for s in sizes]

    def loss(self, update, weights="tokens") -> float:
        """``½ Σ_t ω_t ‖R_t - D X_t‖²``, sample by sample."""
        return sum(
            w / 2 * float(((r - outputs(update, x)) ** 2).sum())
            for w, x, r in zip(self.omega(weights), self.X, self.R)
        )

    def stacked(self, elements, weights="tokens") -> tuple[Tensor, Tensor]:
        """Dense least squares ``½‖Zd - y‖²`` equal to L(d): Z (ΣNgm, p), y (ΣNgm,)."""
        root = [w**0.5 for w in self.omega(weights)]
        Z = torch.cat(
            [
                torch.stack([w * outputs(B, x).flatten() for B in elements], -1)
                for w, x in zip(root, self.X)
            ]
        )
        return Z, torch.cat([w * r.flatten() for w, r in zip(root, self.R)])


def outputs(update, x) -> Tensor:
    """``D x`` of every sample: (N, g, m) for D (g, m, n), x (N, g, n)."""
    return torch.einsum("gmi,ngi->ngm", update, x)


def make_layer(
    seed, K=2, g=1, m=3, n=4, N=12, folds=1, experts="random", targets="noisy", noise=0.5
) -> Layer:
    """A layer of given shape.

    Args:
        experts: ``random``, ``duplicate`` (the last equals the first), ``zero`` (the last equals
            the base), ``low_rank``.
        targets: residual outputs are the expert's own on these inputs (``propagated``), those with
            noise (``noisy``: an expert's own stream differs), or unrelated to it (``free``).
    """
    updates = normal(seed, K, g, m, n)
    if experts == "low_rank":
        updates = updates[..., :1] @ updates[..., :1, :]
    if experts in ("duplicate", "zero"):
        updates[-1] = updates[0] if experts == "duplicate" else 0
    mix = [
        torch.linspace(0.1, 1, n).double()[:, None] * torch.linalg.qr(normal(seed + 50 + t, n, n)).Q
        for t in range(K)
    ]  # condition 10
    X = [normal(seed + 1 + t, N + t, g, n) @ mix[t] for t in range(K)]
    amount = {"propagated": 0.0, "noisy": noise, "free": 1.0}[targets]
    R = [
        (targets != "free") * outputs(updates[t], x) + amount * normal(seed + 100 + t, len(x), g, m)
        for t, x in enumerate(X)
    ]
    fold = [torch.arange(len(x)) % folds for x in X]
    return Layer(updates, tuple(X), tuple(R), tuple(fold), folds)


@st.composite
def layers(
    draw,
    folds=1,
    experts=("random", "random", "duplicate", "zero", "low_rank"),
    targets=("propagated", "noisy", "free"),
    enough=False,
):
    """Dense layers and norm-like ones (many copies, one output), K = 1 to 4, with fewer samples
    than inputs unless ``enough``."""
    norm_like = draw(st.booleans())
    g, m, n = (
        (draw(st.integers(2, 4)), 1, 2)
        if norm_like
        else (1, draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    )
    low = max(folds, 3 * n if enough else 1)
    return make_layer(
        draw(st.integers(0, 10_000)),
        draw(st.integers(1, 4)),
        g,
        m,
        n,
        draw(st.integers(low, low + 10)),
        folds,
        draw(st.sampled_from(experts)),
        draw(st.sampled_from(targets)),
    )
