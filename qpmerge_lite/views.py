r"""Modules as layers that are linear in their parameters: ``y = W x`` with W of shape (g, m, n).

A view translates between a module's parameters and W, and between its input and samples. Tensor
layouts, fixed here: an input is given as *rows* (…, d), features last; the layer's *samples* are Z,
made of N rows, and its sums over them are

    dense        g = 1, Z (N, n)    C (1, n, n) = ZᵀZ        B (1, m, n) = rᵀZ      r (N, m)
    norm         m = 1, Z (N, g)    C (g, n, n), n ≤ 2       B (g, 1, n)            r (N, g)
    embedding    n = 1, counts only: one m×1 layer for each of the g tokens that occur

A dense layer folds its bias in as a last input that is one; convolutions are dense layers of unfolded
patches; a norm is one 1×n layer per channel, reading its own normalised input and a constant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .sums import accumulate, add_gram


@dataclass(frozen=True)
class View:
    """One layer of a model, ``y = W x``; subclasses say how its module's parameters make W.

    Attributes:
        name: path of the module in the model.
        module: the module itself; its parameters are never read, those of a state dict are.
        bias: whether the bias is folded into W, as its last input column.
    """

    name: str
    module: nn.Module
    bias: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names in the state dict that :meth:`matrix` reads and :meth:`parts` writes."""
        weight = f"{self.name}.weight".lstrip(".")
        return (weight, f"{weight.removesuffix('weight')}bias") if self.bias else (weight,)

    @property
    def reads(self):
        """Views of one tensor with equal ``reads`` have equal samples, and share their sums."""
        return type(self), self.bias

    def matrix(self, state) -> Tensor:
        """W (g, m, n), float64, from a state dict."""
        raise NotImplementedError

    def parts(self, W: Tensor, state) -> dict[str, Tensor]:
        """State-dict entries of W (g, m, n); what W leaves open is taken from ``state``."""
        raise NotImplementedError

    def rows(self, x: Tensor) -> Tensor:
        """The module's input as rows (…, d), features last."""
        return x

    def output_rows(self, y: Tensor) -> Tensor:
        """The module's output on the same axes, (…, m or g)."""
        return y

    def samples(self, rows: Tensor) -> Tensor:
        """Z of N rows (N, d), in their precision but at least float32."""
        raise NotImplementedError

    def inputs(self, rows: Tensor) -> Tensor:
        """Every copy's samples (N, g, n), float64, of N rows (N, d): for proofs and tests."""
        raise NotImplementedError

    def respond(self, W: Tensor, Z: Tensor) -> Tensor:
        """Output r of W (g, m, n) for differences Z of samples, from which the bias has gone."""
        raise NotImplementedError

    def add_products(self, Z: Tensor, C: Tensor, fresh: bool) -> None:
        """Add ``Σ zzᵀ`` of the samples Z, in their precision, to the lower triangle of C (g, n, n)."""
        raise NotImplementedError

    def add_cross_products(self, Z: Tensor, r: Tensor, B: Tensor, fresh: bool) -> None:
        """Add ``Σ r zᵀ`` of the samples Z and outputs r to B (g, m, n); ``fresh`` writes over it."""
        raise NotImplementedError

    def output(self, state, x: Tensor) -> Tensor:
        """What the module puts out for its input x under a state dict, in the precision of x."""
        prefix = f"{self.name}." if self.name else ""
        names = [f"{prefix}{k}" for k, _ in self.module.named_parameters(recurse=False)]
        entries = {k.removeprefix(prefix): state[k] for k in names}
        return functional_call(self.module, entries, (x,))

    def reproduces(self, state, x: Tensor, y: Tensor) -> bool:
        """Whether ``W x`` is what the module put out for its input x, up to the precision of x."""
        whole = replace(self, bias=getattr(self.module, "bias", None) is not None)
        rows, wanted = self.rows(x), self.output_rows(y)
        if rows.shape[:-1] != wanted.shape[:-1]:
            return False
        rows, wanted = rows.flatten(0, -2)[:64], wanted.flatten(0, -2)[:64].double()
        W, inputs = whole.matrix(state), whole.inputs(rows)
        if inputs.shape[1:] != (W.shape[0], W.shape[2]):
            return False  # such as a norm over another axis
        found = torch.einsum("gmn,Ngn->Ngm", W, inputs).flatten(1)
        if found.shape != wanted.shape:
            return False
        close = (found - wanted).norm() <= 0.03 * wanted.norm() + 1e-6
        return bool(close) or not bool(wanted.isfinite().all())  # the latter is reported later


class Dense(View):
    """``nn.Linear``: W = [weight | bias], shape (1, out, in + 1)."""

    def matrix(self, state) -> Tensor:
        """W (1, m, n), float64, from a state dict."""
        weight = self._flat(state[self.parameters[0]].double())
        columns = [state[name].double()[:, None] for name in self.parameters[1:]]
        return torch.cat([weight, *columns], 1).unsqueeze(0)

    def parts(self, W: Tensor, state=None) -> dict[str, Tensor]:
        """State-dict entries of W (1, m, n)."""
        if not self.bias:
            return {self.parameters[0]: self._shaped(W[0])}
        weight, bias = self.parameters
        return {weight: self._shaped(W[0, :, :-1]), bias: W[0, :, -1]}

    def samples(self, rows: Tensor) -> Tensor:
        """Z (N, in) of rows (N, in), without the one of a bias."""
        return _at_least_single(rows)

    def inputs(self, rows: Tensor) -> Tensor:
        """Samples (N, 1, n), float64, of rows (N, in), with a one where a bias is folded in."""
        Z = rows.double()
        Z = torch.cat([Z, torch.ones_like(Z[:, :1])], 1) if self.bias else Z
        return Z.unsqueeze(1)

    def respond(self, W: Tensor, Z: Tensor) -> Tensor:
        """``Z Wᵀ`` (N, m) of differences Z (N, in)."""
        return Z @ W[0, :, : Z.shape[1]].mT

    def add_products(self, Z: Tensor, C: Tensor, fresh: bool) -> None:
        """Add ``ZᵀZ``, and the sums of Z and of ones where a bias is folded in, to C (1, n, n)."""
        add_gram(C[0], Z, fresh)
        if self.bias:
            accumulate(C[0, -1], torch.cat([Z.sum(0), Z.new_tensor([len(Z)])]), fresh)
            C[0, :-1, -1] = C[0, -1, :-1]

    def add_cross_products(self, Z: Tensor, r: Tensor, B: Tensor, fresh: bool) -> None:
        """Add ``rᵀZ``, and the sum of r where a bias is folded in, to B (1, m, n)."""
        accumulate(B[0, :, : Z.shape[1]], r.mT @ Z, fresh)
        if self.bias:
            accumulate(B[0, :, -1], r.sum(0), fresh)

    def _flat(self, weight: Tensor) -> Tensor:
        return weight

    def _shaped(self, weight: Tensor) -> Tensor:
        return weight


class Transposed(Dense):
    """Dense layer whose weight is stored as (in, out): GPT-2's ``Conv1D``."""

    def _flat(self, weight: Tensor) -> Tensor:
        return weight.mT

    def _shaped(self, weight: Tensor) -> Tensor:
        return weight.mT


class Convolution(Dense):
    """``nn.Conv2d`` with one group and zero padding: a dense layer of unfolded patches."""

    @property
    def reads(self):
        """Convolutions share samples where they cut out the same patches."""
        m = self.module
        return type(self), self.bias, m.kernel_size, m.stride, m.padding, m.dilation

    def rows(self, x: Tensor) -> Tensor:
        """Patches (B, P, channels · height · width) of pictures (B, channels, H, W)."""
        m = self.module
        padding = (0, 0) if m.padding == "valid" else m.padding
        return F.unfold(x, m.kernel_size, m.dilation, padding, m.stride).mT

    def output_rows(self, y: Tensor) -> Tensor:
        """Outputs (B, P, m) of the same patches."""
        return y.flatten(2).mT

    def _flat(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _shaped(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.module.weight.shape)


@dataclass(frozen=True)
class Norm(View):
    """Gain and bias of a layer norm or RMS norm over the last axis.

    Channel c is the layer ``[gain_c, bias_c]`` of ``[x̂_c, 1]``. The gain is the weight plus
    ``offset``, which is one for norms that store how far their gain is from one.
    """

    offset: float = 0.0

    @property
    def reads(self):
        """Norms are solved one by one, each with an output axis of length one."""
        return self.name, self.bias, self._subtracts_mean, self._epsilon

    @property
    def _subtracts_mean(self) -> bool:
        return any(c.__name__ == "LayerNorm" for c in type(self.module).__mro__)

    @property
    def _epsilon(self):
        named = (getattr(self.module, k, None) for k in ("eps", "variance_epsilon", "epsilon"))
        return next((value for value in named if value is not None), None)

    def matrix(self, state) -> Tensor:
        """W (d, 1, n), n = 2 with a bias, float64."""
        gain = state[self.parameters[0]].double() + self.offset
        columns = [gain, *(state[name].double() for name in self.parameters[1:])]
        return torch.stack(columns, -1).unsqueeze(1)

    def parts(self, W: Tensor, state=None) -> dict[str, Tensor]:
        """State-dict entries of W (d, 1, n)."""
        gain, *bias = W[:, 0].unbind(-1)
        return dict(zip(self.parameters, (gain - self.offset, *bias)))

    def samples(self, rows: Tensor) -> Tensor:
        """Z (N, d) of rows (N, d): normalised as the module does it, before gain and bias."""
        rows = _at_least_single(rows)
        norm = F.layer_norm if self._subtracts_mean else F.rms_norm
        return norm(rows, rows.shape[-1:], eps=self._epsilon)

    def inputs(self, rows: Tensor) -> Tensor:
        """Samples (N, d, n), float64, of rows (N, d)."""
        Z = self.samples(rows.double()).unsqueeze(-1)
        return torch.cat([Z, torch.ones_like(Z)], -1) if self.bias else Z

    def respond(self, W: Tensor, Z: Tensor) -> Tensor:
        """``gain ∘ Z`` (N, d); for differences of samples, from which the bias has gone."""
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


@dataclass(frozen=True)
class Table(View):
    """``nn.Embedding``: token v is the layer ``y = E_v`` of a constant, W (g, m, 1) for g tokens.

    Every token shares the output axis, so row and rotated-row bases run over the m features of all
    of them together. Which tokens occur is known once calibration inputs are: ``ids`` (g,) int64,
    all of the table until then.
    """

    ids: Tensor | None = None

    @property
    def reads(self):
        """Tables are solved one by one: each has tokens of its own."""
        return self.name

    def matrix(self, state) -> Tensor:
        """W (g, m, 1), float64."""
        weight = state[self.parameters[0]]
        chosen = weight if self.ids is None else weight[self.ids.to(weight.device)]
        return chosen.double().unsqueeze(-1)

    def parts(self, W: Tensor, state=None) -> dict[str, Tensor]:
        """State-dict entry of W (g, m, 1); tokens that do not occur are taken from ``state``."""
        if self.ids is None:
            return {self.parameters[0]: W[..., 0]}
        whole = state[self.parameters[0]].to(W)
        return {self.parameters[0]: whole.index_copy(0, self.ids.to(W.device), W[..., 0])}

    def rows(self, x: Tensor) -> Tensor:
        """Token ids (…) as rows (…, 1)."""
        return x.unsqueeze(-1)

    def inputs(self, rows: Tensor) -> Tensor:
        """Samples (N, g, 1), float64: one where the token of a row (N, 1) is."""
        every = torch.arange(self.module.num_embeddings, device=rows.device)
        return (rows == (every if self.ids is None else self.ids)).double().unsqueeze(-1)

    def reproduces(self, state, x, y) -> bool:
        """Whether looking x up gives what the module put out."""
        weight = state[self.parameters[0]]
        if x.is_floating_point() or x.dtype == torch.bool or y.shape != (*x.shape, weight.shape[1]):
            return False
        inside = bool(((x >= 0) & (x < len(weight))).all())
        return inside and torch.equal(F.embedding(x, weight), y)


def _at_least_single(rows: Tensor) -> Tensor:
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
