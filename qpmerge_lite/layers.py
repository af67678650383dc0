r"""Views of modules as layers that are linear in their parameters: ``y = W x`` with W of shape (g, m, n).

A view translates between a module's parameters and W, and from its input to samples ``(N, g, n)``. Dense layers have g = 1,
convolutions too, on unfolded patches; a norm is one 1×n layer per channel, reading its own normalised input and a constant; an
embedding is one m×1 layer per token, reading how often the token occurs. ``KINDS`` says which module is which, by class name, so
that no library needs to be imported to know its layers.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .errors import MergeError

SCOPES = ("all", "dense", "weights")


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

    def sequence(self, x: Tensor, size: int) -> Tensor:
        """The module's input as rows (B, S, ·) or (B, ·) of a batch of ``size``, one row per sample."""
        return x

    def outputs(self, y: Tensor, size: int) -> Tensor:
        """The module's output in the same rows."""
        return y

    def reproduces(self, state, x: Tensor, y: Tensor, size: int) -> bool:
        """Whether ``W x`` is what the module put out for its input x, up to its precision; on a few samples."""
        some, whole = lambda z: z.flatten(0, -2)[:64], replace(self, bias=getattr(self.module, "bias", None) is not None)
        found = self.apply(whole.matrix(state), whole.inputs(some(self.sequence(x, size)))).flatten(1)
        wanted = some(self.outputs(y, size)).double()
        return not wanted.isfinite().all() or bool((found - wanted).norm() <= 0.03 * wanted.norm() + 1e-6)  # the former is reported later

    @staticmethod
    def apply(W: Tensor, X: Tensor) -> Tensor:
        """``W x`` (N, g, m) of samples X (N, g, n)."""
        return torch.einsum("gmn,Ngn->Ngm", W, X) if len(W) > 1 else (X[:, 0] @ W[0].mT).unsqueeze(1)

    def _with_one(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[..., :1])], -1) if self.bias else x


class Dense(View):
    """``nn.Linear``: W = [weight | bias], shape (1, out, in + 1)."""

    def _flat(self, weight: Tensor) -> Tensor:
        return weight

    def matrix(self, state) -> Tensor:
        """W (g, m, n), float64, from a state dict."""
        weight, *bias = (state[p].double() for p in self.parameters)
        return torch.cat([self._flat(weight), *(b[:, None] for b in bias)], 1).unsqueeze(0)

    def parts(self, W: Tensor, state=None) -> dict[str, Tensor]:
        """State-dict entries of W; what it leaves open is taken from ``state``."""
        weight, *bias = W[0].split([W.shape[-1] - 1, 1], 1) if self.bias else (W[0],)
        return dict(zip(self.parameters, (self._shaped(weight), *(b[:, 0] for b in bias))))

    def _shaped(self, weight: Tensor) -> Tensor:
        return weight

    def inputs(self, x: Tensor) -> Tensor:
        """Samples (N, g, n), float64, from rows (N, in)."""
        return self._with_one(x.double()).unsqueeze(1)


class Transposed(Dense):
    """Dense layer whose weight is stored as (in, out): GPT-2's ``Conv1D``."""

    def _flat(self, weight):
        return weight.mT

    _shaped = _flat


class Convolution(Dense):
    """``nn.Conv2d`` with one group and zero padding: a dense layer of unfolded patches."""

    @property
    def reads(self):
        m = self.module
        return type(self), self.bias, m.kernel_size, m.stride, m.padding, m.dilation

    def sequence(self, x, size):
        m = self.module
        return F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride).mT

    def outputs(self, y, size):
        return y.flatten(2).mT

    def _flat(self, weight):
        return weight.flatten(1)

    def _shaped(self, weight):
        return weight.reshape(self.module.weight.shape)


class Norm(View):
    """Gain and bias of a layer or RMS norm over the last axis: channel c is the layer ``[gain_c, bias_c]`` of ``[x̂_c, 1]``."""

    @property
    def _eps(self):
        return getattr(self.module, "eps", None) or getattr(self.module, "variance_epsilon", None)

    @property
    def reads(self):
        return type(self.module), self.bias, self._eps

    def matrix(self, state) -> Tensor:
        """W (d, 1, n), n = 2 with a bias, float64."""
        return torch.stack([state[p].double() for p in self.parameters], -1).unsqueeze(1)

    def parts(self, W: Tensor, state=None) -> dict[str, Tensor]:
        """State-dict entries of W."""
        return dict(zip(self.parameters, W[:, 0].unbind(-1)))

    def inputs(self, x: Tensor) -> Tensor:
        """Samples (N, d, n): the input normalised as the module does it, before gain and bias."""
        norm = F.layer_norm if isinstance(self.module, nn.LayerNorm) else F.rms_norm
        return self._with_one(norm(x.double(), x.shape[-1:], eps=self._eps).unsqueeze(-1))


@dataclass(frozen=True)
class Table(View):
    """``nn.Embedding``: token v is the layer ``y = E_v`` of a constant input, W (g, m, 1) for the g tokens of ``ids``.

    Every token shares the output axis, so row and rotated-row bases run over the m features of all of them together. Which tokens
    occur is known once calibration inputs are: ``ids`` (g,) int64, all of the table until then.
    """

    ids: Tensor | None = None

    @property
    def reads(self):
        return self.name  # tables are solved one by one: each has tokens of its own

    def _rows(self, weight: Tensor) -> Tensor:
        return weight if self.ids is None else weight[self.ids.to(weight.device)]

    def matrix(self, state) -> Tensor:
        """W (g, m, 1), float64."""
        return self._rows(state[self.parameters[0]]).double().unsqueeze(-1)

    def parts(self, W: Tensor, state=None) -> dict[str, Tensor]:
        """State-dict entry of W; tokens that do not occur are taken from ``state``."""
        if self.ids is None:
            return {self.parameters[0]: W[..., 0]}
        whole = state[self.parameters[0]].to(W)
        return {self.parameters[0]: whole.index_copy(0, self.ids.to(W.device), W[..., 0])}

    def inputs(self, x: Tensor) -> Tensor:
        """Samples (N, g, 1): one where the token of a row (N, 1) is; for small tables, :meth:`Moments.count_copies` needs none."""
        ids = torch.arange(self.module.num_embeddings, device=x.device) if self.ids is None else self.ids
        return (x == ids).double().unsqueeze(-1)

    def sequence(self, x, size):
        x = x.reshape(1, -1) if x.dim() == 1 else x
        return x.expand(size, -1).unsqueeze(-1)  # positions are given once for the whole batch

    def outputs(self, y, size):
        y = y.unsqueeze(0) if y.dim() == 2 else y
        return y.expand(size, -1, -1)

    def reproduces(self, state, x, y, size):
        return x.dim() <= 2 and torch.allclose(y.float(), F.embedding(x, state[self.parameters[0]]).float())


KINDS: dict[str, type[View]] = {
    "Linear": Dense, "Conv1D": Transposed, "Conv2d": Convolution, "Embedding": Table, "LayerNorm": Norm, "RMSNorm": Norm, "T5LayerNorm": Norm,
}  # fmt: skip


def _kind(module: nn.Module) -> type[View] | None:
    """By the name of the class or the nearest parent known; libraries have an RMS norm for every architecture."""
    names = [c.__name__ for c in type(module).__mro__]
    return next((KINDS[k] for n in names if (k := "RMSNorm" if n.endswith("RMSNorm") else n) in KINDS), None)


def view(name: str, module: nn.Module, scope: str = "all") -> View | None:
    """The view of a module, or None if it has none.

    Args:
        scope: ``all`` covers dense layers with their bias folded in, convolutions, norms and embeddings; ``dense`` dense layers with
            their bias and norms; ``weights`` the weights of dense layers only.
    Raises: MergeError for another scope.
    """
    if scope not in SCOPES:
        raise MergeError(f"scope: expected one of {SCOPES}, found {scope!r}")
    kind = _kind(module)
    covered = {"all": View, "dense": (Dense, Norm), "weights": Dense}[scope]
    if kind is None or not issubclass(kind, covered) or (scope != "all" and kind is Convolution) or not _plain(module):
        return None
    return kind(name, module, scope != "weights" and getattr(module, "bias", None) is not None)


def _plain(module: nn.Module) -> bool:
    """Whether a module has a weight and none of the options that its view does not know."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, nn.Embedding):
        return module.max_norm is None
    norm = not isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or len(module.normalized_shape) == 1
    return norm and getattr(module, "weight", None) is not None
