"""What a piece of code asks of torch, operation by operation."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Operations run inside a ``with``, in order: (name, dtype of the first argument)."""

    def __init__(self):
        super().__init__()
        self.run = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.run.append((func.name(), getattr(args[0], "dtype", None) if args else None))
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        """How often a value was read by the host, for which a device has to be waited for."""
        return sum(name == "aten::_local_scalar_dense" for name, _ in self.run)

    def precisions(self, name: str) -> set[torch.dtype]:
        """Of all runs of an operation; empty if it was not run."""
        return {dtype for ran, dtype in self.run if ran == name}
