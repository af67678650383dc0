r"""What base and experts have to be, checked before anything is computed with their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .aliases import as_loaded, tied
from .errors import MergeError, MissingLayer, NonFinite, ShapeMismatch, is_finite

State = Mapping[str, Tensor]

# how adapter libraries name the factors whose products, not themselves, are changes of weights
ADAPTERS = (
    "lora_",
    "hada_w",
    "lokr_",
    "ia3_l",
    "oft_",
    "boft_",
    "vera_lambda",
    "vblora_",
    "randlora_",
    "gralora_",
    "delora_",
    "fourierft_",
    "waveft_",
    "c3a_",
    "bone_",
    "miss_",
    "hra_",
    "shira_",
    "road_theta",
    "trainable_tokens_",
)


def check_experts(
    base: nn.Module,
    experts: Mapping[str, State],
    *,
    cast: bool = False,
    check_base: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """The experts' entries on the device of the base's, detached, in the base's order.

    Nothing is copied where device and dtype already fit.

    Args:
        base: the common initialisation.
        experts: task -> state dict, which may be any mapping from names to tensors. A name that
            is missing is filled in from an entry that the base ties it to.
        cast: also bring floating entries to the base's dtype, so that the base can run them.
        check_base: also refuse a base with weights that are not finite, unless every expert has
            the same ones, as buffers of ``-inf`` are.
    Raises: MergeError, MissingLayer, ShapeMismatch or NonFinite naming task and entry.
    """
    if not isinstance(base, nn.Module):
        raise MergeError(f"base: expected a model (nn.Module), found {_type(base)}")
    if not isinstance(experts, Mapping):
        raise MergeError(
            "experts: expected a mapping of task names to state dicts, such as "
            f"{{'task': model.state_dict()}}, found {_type(experts)}"
        )
    if not experts:
        raise MergeError("experts: expected at least one state dict, found none")
    if next(base.parameters(), None) is None:
        raise MergeError(f"base: expected a model with parameters, found {_type(base)} without any")
    reference = base.state_dict()
    for name, value in reference.items():
        _refuse_tensor("the base", name, value)
    ties = tied(base)
    checked = {}
    for task, state in experts.items():
        checked[task] = _check_state(f"expert {task!r}", state, reference, ties, cast)
        _check_shared_memory(f"expert {task!r}", checked[task], base)
    for name, value in reference.items():
        states = [state[name] for state in checked.values()]
        if not is_number(value):
            agreed(name, states)
        elif check_base and not is_finite(value) and not all(equal(value, s) for s in states):
            cure = "the base is damaged; load it again from a sound checkpoint"
            raise NonFinite(f"the base, parameter {name!r}", wide(value), cure)
    return checked


def _type(value) -> str:
    return type(value).__name__


def _check_state(where, state, reference, ties, cast) -> dict[str, Tensor]:
    """One expert's entries, checked against the base's."""
    _refuse_what_is_no_state(where, state)
    names = set(state)  # once: asking a lazily read checkpoint for a name may read its tensor
    _check_names(where, names, reference, ties)
    checked: dict[str, Tensor] = {}
    for name, like in reference.items():
        source = next(n for n in (name, *ties[name]) if n in names)
        checked[name] = _check_entry(where, name, state[source], like, cast)
    for name, names in ties.items():
        first = names[0]
        if not equal(checked[name], checked[first]):
            raise MergeError(
                f"{where}: entries {first!r} and {name!r} differ, expected equal ones because the "
                "base ties them (they are one tensor); untie them in the base, or tie the expert's"
            )
    return checked


def _check_shared_memory(where: str, state: State, base: nn.Module) -> None:
    """MergeError where entries that the base sees in one memory, such as a matrix and its
    transpose, hold different values."""
    for name, value in as_loaded(base, state).items():
        if not equal(value, state[name]):
            raise MergeError(
                f"{where}: entry {name!r} is not what other entries say, expected them to agree "
                "because in the base it shares their memory, as the transpose of a matrix does; "
                "give the base a copy of its own, or tie the expert's"
            )


def _refuse_what_is_no_state(where: str, state) -> None:
    if isinstance(state, Mapping):
        return
    cure = "pass a mapping from names to tensors, such as model.state_dict()"
    if isinstance(state, nn.Module):
        cure = "pass its state_dict(): model.state_dict()"
    elif hasattr(state, "state_dict"):
        cure = "pass its attribute state_dict"
    elif isinstance(state, (str, PathLike)):
        cure = "load the checkpoint first, e.g. with safetensors.torch.load_file(path)"
    raise MergeError(f"{where}: expected a state dict, found {_type(state)}; {cure}")


def _check_names(where: str, names: set, reference: State, ties) -> None:
    for name in sorted(map(str, {*names, *reference})):
        if any(part.startswith(ADAPTERS) for part in name.split(".")):
            raise MergeError(
                f"{where}: entry {name!r} is a factor of an adapter (LoRA or the like), and "
                "products of averaged factors are not averages of products; fold the adapters into "
                "the weights of base and experts first, e.g. with peft's merge_and_unload()"
            )
    missing = [name for name in reference if names.isdisjoint(ties[name])]
    for name in sorted(missing):
        raise MissingLayer(_other_architecture(where, "lacks", name))
    for name in sorted(map(str, names - reference.keys())):
        raise MissingLayer(_other_architecture(where, "has an unknown", name))


def _other_architecture(where: str, found: str, name: str) -> str:
    return (
        f"{where} {found} parameter {name!r}; base and experts must be checkpoints of one "
        "architecture"
    )


def _refuse_tensor(where: str, name: str, value) -> None:
    """MergeError for entries that cannot be computed with."""
    if not isinstance(value, Tensor):
        raise MergeError(f"{where}: entry {name!r}: expected a tensor, found {_type(value)}")
    if is_lazy(value):
        raise MergeError(
            f"{where}: parameter {name!r} is not initialised; run the model once on a batch first"
        )
    if value.device.type == "meta":
        raise MergeError(
            f"{where}: parameter {name!r} is on the meta device, which holds no values; load the "
            "weights first (without device_map offloading, or with low_cpu_mem_usage=False)"
        )
    other_layout = value.is_nested or value.layout != torch.strided
    if other_layout or str(value.dtype).endswith("_x2"):
        raise MergeError(
            f"{where}: parameter {name!r}: expected a dense tensor with one value per entry, found "
            f"{'nested' if value.is_nested else value.layout} of {value.dtype}; convert it to a "
            "dense floating dtype first"
        )


def _check_entry(where: str, name: str, value, like: Tensor, cast: bool) -> Tensor:
    _refuse_tensor(where, name, value)
    if value.shape != like.shape:
        raise ShapeMismatch(f"{where}, parameter {name!r}", like.shape, value.shape)
    kinds = (value.is_floating_point(), value.is_complex())
    if kinds != (like.is_floating_point(), like.is_complex()):
        raise MergeError(
            f"{where}, parameter {name!r}: expected a dtype like the base's {like.dtype}, found "
            f"{value.dtype}; load base and experts in the same way"
        )
    value = value.detach().to(like.device)
    if not is_finite(value) and not equal(value, like):
        cure = "the checkpoint is damaged"
        raise NonFinite(f"{where}, parameter {name!r}", wide(value), cure)
    if not cast or value.dtype == like.dtype or not is_number(value):
        return value
    if not is_finite(value):  # checked: the base has the same values
        return value.to(like)
    return stored(f"{where}, parameter {name!r}", value, like)


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors (…) have one shape and the same values, in whatever dtypes."""
    if a is b:
        return True
    if a.dtype != b.dtype or (a.is_floating_point() and a.element_size() == 1):
        a, b = wide(a), wide(b)
    return torch.equal(a, b)


def agreed(name: str, values: Sequence[Tensor]) -> Tensor:
    """The value (…) of an entry that is no number to average: the one that all experts have.

    Of integer counters without axes, such as ``num_batches_tracked``, the largest.

    Raises: MergeError naming the entry where experts differ.
    """
    first = values[0]
    if all(equal(first, other) for other in values[1:]):
        return first
    if first.dim() == 0 and first.dtype != torch.bool:
        return torch.stack([value.to(first.dtype) for value in values]).max()
    raise MergeError(
        f"parameter {name!r}: expected the same {first.dtype} values in every expert, as they "
        "cannot be averaged, found different ones; if they are codes of quantised weights, "
        "dequantise base and experts first"
    )


def wide(tensor: Tensor) -> Tensor:
    """A tensor (…) in float64, or in complex128 if it is complex."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def is_number(tensor: Tensor) -> bool:
    """Whether entries of a tensor (…) can be averaged: real floating or complex ones."""
    return tensor.is_floating_point() or tensor.is_complex()


def stored(where: str, value: Tensor, like: Tensor) -> Tensor:
    """A computed value (…) in the dtype and on the device of ``like``.

    Args:
        where: what the value is, for messages, e.g. ``parameter 'blocks.0.weight'``.
        value: of any shape, in a dtype at least as wide as that of ``like``.
    Raises: NonFinite if the value is not finite, or too large for the dtype of ``like``.
    """
    result = value.to(like)
    if is_finite(result) and not _saturated(value, like.dtype):
        return result
    if not is_finite(value):
        raise NonFinite(where, value, "look for damaged weights, or choose other options")
    largest = torch.finfo(like.dtype).max
    beyond = torch.where(value.abs() > largest, torch.inf, wide(value).abs())
    cure = (
        f"they overflow {like.dtype}, whose largest number is {largest:g}: load the base in a "
        "wider dtype such as torch.float32, or lower the scale"
    )
    raise NonFinite(f"{where} in {like.dtype}", beyond, cure)


def _saturated(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a value beyond the range of an 8-bit dtype was silently cut to its end."""
    if value.numel() == 0 or not dtype.is_floating_point or dtype.itemsize > 1:
        return False
    limits = torch.finfo(dtype)
    rounds_down_to_largest = limits.max * (1 + limits.eps / 4)
    return bool(value.abs().max() > rounds_down_to_largest)
