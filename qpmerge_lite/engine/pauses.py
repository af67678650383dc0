"""Where forwards pause: hooks on the layers and blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager

from greenlet import getcurrent
from torch import Tensor

from .effects import first_tensor
from .lockstep import Apart, Forward, LeftOut, Stage


@contextmanager
def pausing(stage: Stage, leaders: Mapping[str, list[str]], blocks: Iterable[str] = (), tables=()):
    """Forwards on the stage pause before the layers of ``leaders``, before and behind ``blocks``,
    and where they park.

    Args:
        leaders: layer -> the layers behind it that read the same tensor, which is checked as they
            are called.
        blocks: modules whose arguments and outputs are handed over.
        tables: layers that may be called several times; they pause at the first call.
    """
    hooks = []

    def on(path: str, hook, **options) -> None:
        module = stage.model.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True, **options))

    for leader, others in leaders.items():
        on(leader, _leading(leader, leader in tables))
        for other in others:
            on(other, _following(other, leader))
    for path in {*blocks, *(path for _, path in stage.parking)}:
        on(path, _entering(path), prepend=True)
    for path in blocks:
        module = stage.model.get_submodule(path)
        hooks.append(module.register_forward_hook(_leaving(path), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read_by(layer: str, args: tuple, kwargs: dict) -> Tensor:
    """What a layer is given to read, of any shape. Raises: LeftOut where that is no tensor."""
    read = first_tensor(args, kwargs)
    if read is None:
        raise LeftOut(layer, "called without a tensor")
    return read


def _at_layer(layer: str, come: Callable[[Forward, Tensor], None]):
    """Hook of a layer: ``come(forward, read)`` when a forward of the pass comes to it."""

    def hook(module, args, kwargs):
        forward = getcurrent()
        if isinstance(forward, Forward):
            come(forward, _read_by(layer, args, kwargs))

    return hook


def _leading(layer: str, may_be_called_again: bool):
    """Hook of a layer that is visited: the forward pauses there."""

    def come(forward: Forward, read: Tensor) -> None:
        if not forward.note(layer, read):
            forward.pause(("layer", layer), read)
        elif not may_be_called_again:
            raise LeftOut(layer, "called more than once in a forward")

    return _at_layer(layer, come)


def _following(layer: str, leader: str):
    """Hook of a layer behind one that reads the same tensor: it is seen to that it does."""

    def come(forward: Forward, read: Tensor) -> None:
        if forward.note(layer, read):
            raise LeftOut(layer, "called more than once in a forward")
        if not forward.reads_same(leader, read):
            raise Apart(layer)

    return _at_layer(layer, come)


def _entering(block: str):
    """Hook of a block before it is called, where its arguments may be replaced."""

    def hook(module, args, kwargs):
        forward = getcurrent()
        if isinstance(forward, Forward):
            return forward.pause(("enter", block), (args, kwargs))

    return hook


def _leaving(block: str):
    """Hook of a block behind it, where its output may be replaced."""

    def hook(module, args, kwargs, output):
        forward = getcurrent()
        if isinstance(forward, Forward):
            return forward.pause(("leave", block), output)

    return hook
