"""The part of an encoder before one layer, run once for all models that differ behind it."""

from contextlib import contextmanager

from torch import Tensor, nn
from torch.func import functional_call

from ...engine.survey import block_paths


def blocks_before(model: nn.Module, layer: str) -> list[nn.Module]:
    """Blocks of one list that run before the one that holds a layer, in order; none for a layer
    outside of blocks."""
    paths = block_paths(model)
    holding = next((path for path in paths if layer.startswith(f"{path}.")), None)
    if holding is None:
        return []
    siblings = [path for path in paths if path.rpartition(".")[0] == holding.rpartition(".")[0]]
    return [model.get_submodule(path) for path in siblings[: siblings.index(holding)]]


def last_output(
    model: nn.Module, blocks: list[nn.Module], state: dict[str, Tensor], batch: dict
) -> Tensor | None:
    """What the last of some blocks puts out (B, …) for a batch under a state dict; None without
    blocks."""
    if not blocks:
        return None
    outputs = []
    hook = blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    functional_call(model, state, (), batch)
    hook.remove()
    return outputs[0]


@contextmanager
def standing_in(blocks: list[nn.Module], output: Tensor | None):
    """Context in which blocks put out a given tensor (B, …) instead of computing one."""

    def given(*args, **kwargs):
        return output

    for block in blocks:
        block.forward = given
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
