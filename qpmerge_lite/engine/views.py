r"""Modules as layers that are linear in their parameters: ``y = W x`` with W of shape (g, m, n).

A view translates between a module's parameters and W, and between its input and samples. Tensor
layouts, fixed here: an input is given as *rows* (…, d), features last; the layer's *samples* are Z,
made of N rows, and its sums over them are

    dense        g = 1, Z (N, n)    C (1, n, n) = ZᵀZ        B (1, m, n) = rᵀZ      r (N, m)
    norm         m = 1, Z (N, g)    C (g, n, n), n ≤ 2       B (g, 1, n)            r (N, g)
    embedding    n = 1, counts only: one m×1 layer for each of the g tokens that occur

A dense layer folds its bias in as a last input that is one; convolutions are dense layers of
unfolded patches; a norm (``norms``) is one 1×n layer per channel, reading its own normalised input
and a constant.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import MergeError
from ..experts import State
from .products import accumulate, add_gram


@dataclass(frozen=True)
class View:
    """One layer of a model, ``y = W x`` with W (g, m, n); subclasses say how its module's
    parameters make W.

    What the engine asks of a view: W from a state dict and back (:meth:`matrix`, :meth:`parts`);
    from the module's input to samples (:meth:`rows`, :meth:`samples`); sums over samples
    (:meth:`add_products`, :meth:`add_cross_products`); outputs (:meth:`respond`, :meth:`output`,
    :meth:`output_rows`); and whether the module does what the view says (:meth:`readings`,
    :meth:`misfit`). The head of this file fixes the layouts.

    Attributes:
        name: path of the module in the model.
        module: the module itself; its parameters are never read, those of a state dict are.
        bias: whether the bias is folded into W, as its last input column.
        puts_out: what a module of this kind puts out, for messages.
    """

    puts_out: ClassVar[str] = "a linear map of its input"

    name: str
    module: nn.Module
    bias: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names in the state dict that :meth:`matrix` reads and :meth:`parts` writes."""
        weight = f"{self.name}.weight".lstrip(".")
        return (weight, f"{weight.removesuffix('weight')}bias") if self.bias else (weight,)

    @property
    def reads(self) -> Hashable:
        """Views of one tensor with equal ``reads`` have equal samples, and share their sums."""
        return type(self), self.bias

    def matrix(self, state: State) -> Tensor:
        """W (g, m, n), float64, from a state dict."""
        raise NotImplementedError

    def parts(self, W: Tensor, state: State | None = None) -> dict[str, Tensor]:
        """State-dict entries of W (g, m, n); what W leaves open, as a table of some tokens does, is
        taken from ``state``."""
        raise NotImplementedError

    def rows(self, x: Tensor) -> Tensor:
        """The module's input x, of whatever shape it reads, as rows (…, d), features last."""
        return x

    def output_rows(self, y: Tensor) -> Tensor:
        """The module's output y on the axes of :meth:`rows`, (…, m), or (…, g) of a norm."""
        return y

    def samples(self, rows: Tensor) -> Tensor:
        """Samples Z, (N, n) without a bias's one or (N, g) of a norm, of N rows (N, d), in their
        precision but at least float32."""
        raise NotImplementedError

    def inputs(self, rows: Tensor) -> Tensor:
        """Every copy's samples (N, g, n), float64, of N rows (N, d): for proofs and tests."""
        raise NotImplementedError

    def respond(self, W: Tensor, Z: Tensor) -> Tensor:
        """Output r, (N, m) or (N, g) of a norm, of W (g, m, n) for differences Z of samples, from
        which the bias has gone."""
        raise NotImplementedError

    def add_products(self, Z: Tensor, C: Tensor, fresh: bool) -> None:
        """Add ``Σ zzᵀ`` of the samples Z, in their precision, to the lower triangle of C (g, n,
        n); ``fresh`` writes over it."""
        raise NotImplementedError

    def add_cross_products(self, Z: Tensor, r: Tensor, B: Tensor, fresh: bool) -> None:
        """Add ``Σ r zᵀ`` of the samples Z and outputs r to B (g, m, n); ``fresh`` writes over
        it."""
        raise NotImplementedError

    def output(self, state: State, x: Tensor) -> Tensor:
        """What the module puts out for its input x under a state dict, in the precision of x and
        in the shapes of the model."""
        prefix = f"{self.name}." if self.name else ""
        names = [f"{prefix}{k}" for k, _ in self.module.named_parameters(recurse=False)]
        entries = {k.removeprefix(prefix): state[k] for k in names}
        return functional_call(self.module, entries, (x,))

    def readings(self) -> list[View]:
        """Ways in which the module may be linear, the likeliest first; :meth:`misfit` tells them
        apart."""
        return [self]

    def misfit(self, state: State, x: Tensor, y: Tensor) -> float:
        """``‖W x - y‖ / ‖y‖`` of what the module put out for its input x, both in the shapes of
        the model; infinite where these do not fit."""
        whole = replace(self, bias=getattr(self.module, "bias", None) is not None)
        rows, wanted = self.rows(x), self.output_rows(y)
        if rows.shape[:-1] != wanted.shape[:-1]:
            return math.inf
        rows, wanted = rows.flatten(0, -2)[:64], wanted.flatten(0, -2)[:64].double()
        if not wanted.isfinite().all():
            return 0.0  # it is reported where it is read
        W, inputs = whole.matrix(state), whole.inputs(rows)
        if inputs.shape[1:] != (W.shape[0], W.shape[2]):
            return math.inf  # such as a norm over another axis
        outputs = torch.einsum("gmn,Ngn->Ngm", W, inputs).flatten(1)
        if outputs.shape != wanted.shape:
            return math.inf
        error = float((outputs - wanted).norm() / wanted.norm().clamp(min=1e-4))
        return math.inf if math.isnan(error) else error


class Dense(View):
    """``nn.Linear``: W = [weight | bias], shape (1, out, in + 1)."""

    puts_out: ClassVar[str] = "its weight times its input"

    def matrix(self, state: State) -> Tensor:
        """W (1, m, n), float64, from a state dict."""
        weight = self._flat(state[self.parameters[0]].double())
        columns = [state[name].double()[:, None] for name in self.parameters[1:]]
        return torch.cat([weight, *columns], 1).unsqueeze(0)

    def parts(self, W: Tensor, state: State | None = None) -> dict[str, Tensor]:
        """State-dict entries of W (1, m, n)."""
        if not self.bias:
            return {self.parameters[0]: self._shaped(W[0])}
        weight, bias = self.parameters
        return {weight: self._shaped(W[0, :, :-1]), bias: W[0, :, -1]}

    def samples(self, rows: Tensor) -> Tensor:
        """Z (N, in) of rows (N, in), without the one of a bias."""
        return at_least_single(rows)

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
            accumulate(C[0, -1], torch.cat([Z.sum(0), Z.new_full((1,), len(Z))]), fresh)
            C[0, :-1, -1] = C[0, -1, :-1]

    def add_cross_products(self, Z: Tensor, r: Tensor, B: Tensor, fresh: bool) -> None:
        """Add ``rᵀZ``, and the sum of r where a bias is folded in, to B (1, m, n)."""
        accumulate(B[0, :, : Z.shape[1]], r.mT @ Z, fresh)
        if self.bias:
            accumulate(B[0, :, -1], r.sum(0), fresh)

    def _flat(self, weight: Tensor) -> Tensor:
        """The module's weight as (m, in)."""
        return weight

    def _shaped(self, weight: Tensor) -> Tensor:
        """A weight (m, in) in the shape of the module's."""
        return weight


class Transposed(Dense):
    """Dense layer whose weight is stored as (in, out): GPT-2's ``Conv1D``."""

    def _flat(self, weight: Tensor) -> Tensor:
        return weight.mT

    def _shaped(self, weight: Tensor) -> Tensor:
        return weight.mT


class Convolution(Dense):
    """``nn.Conv1d`` or ``nn.Conv2d`` with one group and zero padding: a dense layer of unfolded
    patches."""

    module: nn.Conv1d | nn.Conv2d
    puts_out: ClassVar[str] = "a convolution of its input"

    @property
    def reads(self) -> Hashable:
        """Convolutions share samples where they cut out the same patches."""
        m = self.module
        return type(self), self.bias, m.kernel_size, m.stride, m.padding, m.dilation

    def rows(self, x: Tensor) -> Tensor:
        """Patches (B, P, channels · height · width) of pictures (B, channels, H, W), or (B, P,
        channels · length) of (B, channels, L)."""
        m = self.module
        padding = (0,) * len(m.kernel_size) if isinstance(m.padding, str) else m.padding
        if len(m.kernel_size) == 2:
            return F.unfold(x, m.kernel_size, m.dilation, padding, m.stride).mT
        of_height_one = x.unsqueeze(-2)
        kernel, stride = (1, *m.kernel_size), (1, *m.stride)
        return F.unfold(of_height_one, kernel, (1, *m.dilation), (0, *padding), stride).mT

    def output_rows(self, y: Tensor) -> Tensor:
        """Outputs y (B, m, H, W), or (B, m, L), as (B, P, m) of the P patches."""
        return y.flatten(-len(self.module.kernel_size)).mT

    def _flat(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _shaped(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.module.weight.shape)


@dataclass(frozen=True)
class Table(View):
    """``nn.Embedding``: token v is the layer ``y = E_v`` of a constant, W (g, m, 1) for g tokens.

    Tables that multiply all they look up by one number are the same layer: it is the same best
    table. Every token shares the output axis, so row and rotated-row bases run over the m features
    of all
    of them together. Which tokens occur is known once calibration inputs are: ``ids`` (g,) int64,
    all of the table until then.
    """

    puts_out: ClassVar[str] = "the rows of its weight that its input names"
    module: nn.Embedding
    ids: Tensor | None = None

    @property
    def reads(self) -> Hashable:
        """Tables are solved one by one: each has tokens of its own."""
        return self.name

    def matrix(self, state: State) -> Tensor:
        """W (g, m, 1), float64."""
        weight = state[self.parameters[0]]
        chosen = weight if self.ids is None else weight[self.ids.to(weight.device)]
        return chosen.double().unsqueeze(-1)

    def parts(self, W: Tensor, state: State | None = None) -> dict[str, Tensor]:
        """State-dict entry of W (g, m, 1); tokens that do not occur are taken from ``state``."""
        if self.ids is None:
            return {self.parameters[0]: W[..., 0]}
        if state is None:
            raise MergeError(f"layer {self.name!r}: the other tokens are needed, pass a state dict")
        whole = state[self.parameters[0]].to(W)
        return {self.parameters[0]: whole.index_copy(0, self.ids.to(W.device), W[..., 0])}

    def rows(self, x: Tensor) -> Tensor:
        """Token ids (…) as rows (…, 1)."""
        return x.unsqueeze(-1)

    def inputs(self, rows: Tensor) -> Tensor:
        """Samples (N, g, 1), float64: one where the token of a row (N, 1) is."""
        every = torch.arange(self.module.num_embeddings, device=rows.device)
        return (rows == (every if self.ids is None else self.ids)).double().unsqueeze(-1)

    def misfit(self, state: State, x: Tensor, y: Tensor) -> float:
        """Zero if the module put out the rows of the table at its input x, all multiplied by one
        number; else infinite."""
        weight = state[self.parameters[0]]
        if x.is_floating_point() or x.dtype == torch.bool or y.shape != (*x.shape, weight.shape[1]):
            return math.inf
        if not ((x >= 0) & (x < len(weight))).all():
            return math.inf
        rows, outputs = F.embedding(x, weight).double(), y.double()
        scale = (rows * outputs).sum() / rows.square().sum()
        precision = max(4 * torch.finfo(y.dtype).eps, 1e-12)  # of the module, and of the scale
        near = (outputs - scale * rows).abs() <= precision * (scale * rows).abs()
        scaled = scale != 0 and bool(near.all())
        return 0.0 if scaled or torch.equal(rows, outputs) else math.inf


def at_least_single(rows: Tensor) -> Tensor:
    """Rows (…, d) in float64 if they are, else in float32."""
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
