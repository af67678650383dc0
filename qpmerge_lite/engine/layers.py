"""Which module is which kind of layer, by class name, so that no library has to be imported to know
its layers."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import MergeError
from .norms import Norm
from .views import Convolution, Dense, Table, Transposed, View

SCOPES = ("all", "dense", "weights")

KINDS: dict[str, type[View]] = {
    "Linear": Dense,
    "Conv1D": Transposed,
    "Conv1d": Convolution,
    "Conv2d": Convolution,
    "Embedding": Table,
}
OTHER_NORMS = ("BatchNorm", "GroupNorm", "InstanceNorm")  # over other axes than the last


def view(name: str, module: nn.Module, scope: str = "all") -> View | None:
    """The view of a module, or None if it has none.

    Args:
        scope: ``all`` covers dense layers with their bias folded in, convolutions, norms and
            embeddings; ``dense`` dense layers with their bias and norms; ``weights`` the weights of
            dense layers only.
    Raises: MergeError for another scope.
    """
    if scope not in SCOPES:
        raise MergeError(f"scope: expected one of {SCOPES}, found {scope!r}")
    kind = _kind(module)
    if kind is None or _obstacle(module, kind) or not covers(kind, scope):
        return None
    bias = scope != "weights" and getattr(module, "bias", None) is not None
    if kind is Norm:
        named_rms = any("rms" in parent.__name__.lower() for parent in type(module).__mro__)
        return Norm(name, module, bias, subtracts_mean=not named_rms)
    return kind(name, module, bias)


def why_no_view(module: nn.Module) -> str:
    """Why :func:`view` has nothing for a module, or not for all of its parameters."""
    kind = _kind(module)
    if kind is None:
        return f"a parameter of {type(module).__name__}, which is no kind of layer that is solved"
    return (
        _obstacle(module, kind)
        or f"a parameter of {type(module).__name__} that is neither its weight nor its bias"
    )


def _kind(module: nn.Module) -> type[View] | None:
    """By the name of the class or its nearest parent known; libraries have norms of their own."""
    names = [parent.__name__ for parent in type(module).__mro__]
    for name in names:
        if name in KINDS:
            return KINDS[name]
    is_norm = any("Norm" in name for name in names) and not any(
        other in name for name in names for other in OTHER_NORMS
    )
    return Norm if is_norm else None


def covers(kind: type[View], scope: str) -> bool:
    """Whether a scope of ``SCOPES`` has layers of a kind."""
    if scope == "all":
        return True
    dense = issubclass(kind, Dense) and kind is not Convolution
    return dense or (scope == "dense" and kind is Norm)


def _obstacle(module: nn.Module, kind: type[View]) -> str | None:
    """What keeps a module of a known kind from being a layer; None where nothing does."""
    own = module._parameters.get("weight")
    if is_parametrized(module):
        return "its weight is computed from other parameters"
    if own is None or not own.is_floating_point():
        return f"{type(module).__name__} has no floating weight of its own"
    if getattr(module, "bias", None) is not None and module._parameters.get("bias") is None:
        return "its bias is no parameter of its own"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        if module.groups > 1:
            return "convolutions in groups, or by channel, are not solved"
        if module.padding_mode != "zeros" or module.padding == "same":
            return (
                f"convolutions that pad with {module.padding_mode!r} to {module.padding!r} are not "
                "solved"
            )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "embeddings that are rescaled when they are looked up (max_norm) are not solved"
    if kind is Norm and own.dim() != 1:
        return "norms over several axes are not solved"
    return None
