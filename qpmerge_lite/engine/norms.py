r"""Norms over the last axis as layers: gain and bias are one 1×n layer per channel of the
normalised input."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts import State
from .products import accumulate
from .views import View, at_least_single


@dataclass(frozen=True)
class Norm(View):
    """Gain and bias of a layer norm or RMS norm: channel c is the layer ``[gain_c, bias_c]`` of
    ``[x̂_c, 1]``.

    Attributes:
        subtracts_mean: whether x̂ has its mean subtracted, as a layer norm's; an RMS norm's has
            not.
        offset: what the weight lacks to be the gain: one where it stores how far the gain is from
            one.
    """

    puts_out: ClassVar[str] = "a norm over the last axis"
    subtracts_mean: bool = True
    offset: float = 0.0

    @property
    def reads(self) -> Hashable:
        """Norms are solved one by one, each with an output axis of length one."""
        return self.name, self.bias, self.subtracts_mean, self._epsilon

    @property
    def _epsilon(self) -> float | None:
        """What the module adds to a variance, under whichever name; None where it does not say."""
        for name, value in vars(self.module).items():
            if name.endswith(("eps", "epsilon")) and isinstance(value, float):
                return value
        return None

    def readings(self) -> list[View]:
        """With and without the mean, with gains that count from zero and from one: names of classes
        do not tell."""
        readings: list[View] = []
        for subtracts_mean in (self.subtracts_mean, not self.subtracts_mean):
            for offset in (self.offset, 1 - self.offset):
                readings.append(replace(self, subtracts_mean=subtracts_mean, offset=offset))
        return readings

    def matrix(self, state: State) -> Tensor:
        """W (d, 1, n), n = 2 with a bias, float64."""
        gain = state[self.parameters[0]].double() + self.offset
        columns = [gain, *(state[name].double() for name in self.parameters[1:])]
        return torch.stack(columns, -1).unsqueeze(1)

    def parts(self, W: Tensor, state: State | None = None) -> dict[str, Tensor]:
        """State-dict entries of W (d, 1, n)."""
        gain, *bias = W[:, 0].unbind(-1)
        return dict(zip(self.parameters, (gain - self.offset, *bias)))

    def samples(self, rows: Tensor) -> Tensor:
        """Z (N, d) of rows (N, d): normalised as the module does it, before gain and bias."""
        rows = at_least_single(rows)
        norm = F.layer_norm if self.subtracts_mean else F.rms_norm
        epsilon = torch.finfo(rows.dtype).eps if self._epsilon is None else self._epsilon
        return norm(rows, rows.shape[-1:], eps=epsilon)

    def inputs(self, rows: Tensor) -> Tensor:
        """Samples (N, d, n), float64, of rows (N, d)."""
        Z = self.samples(rows.double()).unsqueeze(-1)
        return torch.cat([Z, torch.ones_like(Z)], -1) if self.bias else Z

    def respond(self, W: Tensor, Z: Tensor) -> Tensor:
        """``gain ∘ Z`` (N, d) for differences Z (N, d) of samples, from which the bias has gone."""
        return Z * W[:, 0, 0]

    def add_products(self, Z: Tensor, C: Tensor, fresh: bool) -> None:
        """Add, per channel, ``Σ zzᵀ`` of z = [x̂, 1], or of x̂ without a bias, to C (d, n, n)."""
        squares = Z.square().sum(0)
        if not self.bias:
            accumulate(C[:, 0, 0], squares, fresh)
            return
        total, count = Z.sum(0), torch.full_like(squares, len(Z))
        accumulate(C, torch.stack([squares, total, total, count], -1).unflatten(-1, (2, 2)), fresh)

    def add_cross_products(self, Z: Tensor, r: Tensor, B: Tensor, fresh: bool) -> None:
        """Add, per channel, ``Σ r zᵀ`` of z = [x̂, 1], or of x̂ without a bias, to B (d, 1, n)."""
        accumulate(B[:, 0, 0], (r * Z).sum(0), fresh)
        if self.bias:
            accumulate(B[:, 0, 1], r.sum(0), fresh)
