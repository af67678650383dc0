"""Models that forwards are run on: what cannot be run, the mode they run in, and what they
return."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .errors import MergeError


@contextmanager
def evaluating(model: nn.Module):
    """The model in evaluation mode, layer by layer and without a cache; afterwards as it was.

    Within, ``nn.TransformerEncoder`` takes no fast path, which would go past hooks of its layers
    and pack padded sequences into nested tensors.
    """
    modes = {module: module.training for module in model.modules()}
    configs = _configs_with_cache(model)
    cached = [config.use_cache for config in configs]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        for config in configs:
            config.use_cache = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training
        for config, value in zip(configs, cached):
            config.use_cache = value


def _configs_with_cache(model: nn.Module) -> list:
    """Configurations of the model and its parts that ask for a cache, each once."""
    configs = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            configs[id(config)] = config
    return list(configs.values())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model says that it reads labels as its decoder's tokens."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def main_output(output) -> Tensor:
    """The main tensor of what a model returns.

    The output itself, or the first tensor with an axis of a tuple, list or mapping (as the
    outputs of transformers are): a loss that stands first is no output.

    Raises: MergeError naming the type that has no such tensor.
    """
    values = [output]
    if isinstance(output, Mapping):
        values = list(output.values())
    elif isinstance(output, (tuple, list)):
        values = list(output)
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return value
    raise MergeError(
        f"the model returns {type(output).__name__}: expected a tensor, or a tuple, list or "
        f"mapping "
        "with a tensor that has at least one axis; wrap the model so that it returns its hidden "
        "state"
    )


def refuse_what_cannot_run(model: nn.Module) -> None:
    """Nothing, or a MergeError that names the module that cannot be run layer by layer."""
    if not isinstance(model, nn.Module):
        raise MergeError(f"base: expected a model (nn.Module), found {type(model).__name__}")
    for name, module in model.named_modules():
        fault = _fault(module)
        if fault:
            where = f"module {name!r}" if name else "the model"
            raise MergeError(f"{where} ({type(module).__name__}) {fault}")


def _fault(module: nn.Module) -> str:
    """Why a module cannot be run layer by layer, and the cure; empty if it can."""
    if _is_compiled(module):
        return (
            "is compiled, so that its layers cannot be watched; pass the model as it was before "
            "torch.compile (model._orig_mod, or a fresh one)"
        )
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "is a ScriptModule, so that its layers cannot be watched; pass the nn.Module that it "
            "was made from"
        )
    if _is_quantised(module):
        return (
            "holds quantised weights, which are no floating numbers; load the model in a floating "
            "dtype, or dequantise it first"
        )
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    for key, value in tensors:
        if value.device.type == "meta":
            return (
                f"has its {key!r} on the meta device, which holds no values; load the weights "
                "first (without device_map offloading)"
            )
    return ""


def _is_compiled(module: nn.Module) -> bool:
    optimised = hasattr(module, "_orig_mod") and hasattr(module, "dynamo_ctx")
    return optimised or getattr(module, "_compiled_call_impl", None) is not None


def _is_quantised(module: nn.Module) -> bool:
    """A quantised module of torch, or one named like a layer whose weight is no float."""
    if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
        return True
    if not any(kind in type(module).__name__ for kind in ("Linear", "Conv", "Embedding")):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and not (weight.is_floating_point() or weight.is_complex())
