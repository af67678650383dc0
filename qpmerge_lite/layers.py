r"""Views of modules as layers that are linear in their parameters: ``y = W x`` with W of shape (g, m, n).

A view translates between a module's parameters and W, and from its input to samples ``(N, g, n)``. Dense layers have
g = 1; a norm is one 1×n layer per channel, reading its own normalised input and a constant. Whatever else is linear in its
parameters (Conv1D, Conv2d on unfolded patches, Embedding on counts) is one more class with the same methods.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .errors import MergeError


@dataclass(frozen=True)
class View:
    """One layer of a model: ``name`` its module's path, ``bias`` whether the bias is folded into W as the last input column."""

    name: str
    module: nn.Module
    bias: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names in the state dict that :meth:`matrix` reads and :meth:`parts` writes."""
        return tuple(f"{self.name}.{p}" for p in (("weight", "bias") if self.bias else ("weight",)))

    @property
    def reads(self):
        """Views of one tensor with equal ``reads`` have equal samples and are solved together."""
        return type(self), self.bias

    def output(self, state, x: Tensor) -> Tensor:
        """What the module puts out for its inputs x under the parameters of a state dict, in the precision of x."""
        return functional_call(self.module, {p.removeprefix(f"{self.name}."): state[p] for p in self.parameters}, (x,))

    def _with_one(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[..., :1])], -1) if self.bias else x


class Dense(View):
    """``nn.Linear``: W = [weight | bias], shape (1, out, in + 1)."""

    def matrix(self, state) -> Tensor:
        """W (g, m, n), float64, from a state dict."""
        weight, *bias = (state[p].double() for p in self.parameters)
        return torch.cat([weight, *(b[:, None] for b in bias)], 1).unsqueeze(0)

    def parts(self, W: Tensor) -> dict[str, Tensor]:
        """State-dict entries of W."""
        columns = W[0].split([self.module.in_features, 1], 1) if self.bias else (W[0],)
        return {p: c if i == 0 else c[:, 0] for i, (p, c) in enumerate(zip(self.parameters, columns))}

    def inputs(self, x: Tensor) -> Tensor:
        """Samples (N, g, n), float64, from the module's inputs (N, in)."""
        return self._with_one(x.double()).unsqueeze(1)


class Norm(View):
    """Gain and bias of ``nn.LayerNorm`` or ``nn.RMSNorm`` over the last axis: channel c is the layer ``[gain_c, bias_c]`` of ``[x̂_c, 1]``."""

    @property
    def reads(self):
        return type(self.module), self.bias, self.module.eps

    def matrix(self, state) -> Tensor:
        """W (d, 1, n), n = 2 with a bias, float64."""
        return torch.stack([state[p].double() for p in self.parameters], -1).unsqueeze(1)

    def parts(self, W: Tensor) -> dict[str, Tensor]:
        """State-dict entries of W."""
        return dict(zip(self.parameters, W[:, 0].unbind(-1)))

    def inputs(self, x: Tensor) -> Tensor:
        """Samples (N, d, n): the input normalised as the module does it, before gain and bias."""
        norm = F.rms_norm if isinstance(self.module, nn.RMSNorm) else F.layer_norm
        return self._with_one(norm(x.double(), self.module.normalized_shape, eps=self.module.eps).unsqueeze(-1))


def view(name: str, module: nn.Module, scope: str = "all") -> View | None:
    """The view of a module, or None if it has none.

    Args:
        scope: ``all`` covers dense layers with their bias folded in, and norms; ``weights`` the weights of dense layers only.
    Raises: MergeError for another scope.
    """
    if scope not in ("all", "weights"):
        raise MergeError(f"scope: expected 'all' or 'weights', found {scope!r}")
    bias = scope == "all" and getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        return Dense(name, module, bias)
    norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.elementwise_affine and len(module.normalized_shape) == 1
    return Norm(name, module, bias) if norm and scope == "all" else None
