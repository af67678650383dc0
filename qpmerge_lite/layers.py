"""Which module is which kind of layer, by class name, so that no library has to be imported to know its layers."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .errors import MergeError
from .norms import Norm
from .views import Convolution, Dense, Table, Transposed, View

SCOPES = ("all", "dense", "weights")

KINDS: dict[str, type[View]] = {
    "Linear": Dense,
    "Conv1D": Transposed,
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
    if kind is None or not _plain(module) or not _covered(kind, scope):
        return None
    found = kind(name, module, scope != "weights" and getattr(module, "bias", None) is not None)
    named_rms = any("rms" in parent.__name__.lower() for parent in type(module).__mro__)
    return replace(found, subtracts_mean=False) if kind is Norm and named_rms else found


def _kind(module: nn.Module) -> type[View] | None:
    """By the name of the class or its nearest parent known; libraries have norms of their own."""
    names = [parent.__name__ for parent in type(module).__mro__]
    for name in names:
        if name in KINDS:
            return KINDS[name]
    is_norm = any("Norm" in name for name in names) and not any(other in name for name in names for other in OTHER_NORMS)
    return Norm if is_norm else None


def _covered(kind: type[View], scope: str) -> bool:
    if scope == "all":
        return True
    dense = issubclass(kind, Dense) and kind is not Convolution
    return dense or (scope == "dense" and kind is Norm)


def _plain(module: nn.Module) -> bool:
    """Whether a module has a weight of its own and no option that its view does not know."""
    own = module._parameters.get("weight")
    if own is None or not own.is_floating_point() or is_parametrized(module):
        return False
    if getattr(module, "bias", None) is not None and module._parameters.get("bias") is None:
        return False
    if isinstance(module, nn.Conv2d):
        padding_known = module.padding_mode == "zeros" and module.padding != "same"
        return module.groups == 1 and padding_known
    if isinstance(module, nn.Embedding):
        return module.max_norm is None
    return own.dim() == 1 or _kind(module) is not Norm
