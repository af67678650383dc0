"""Blocks of plain PyTorch that several tests share."""

import torch
from torch import nn

WIDTH = 6


def block():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())


class Blocks(nn.Module):
    """Blocks one after another; subclasses say how blocks are called and what is returned."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks or (block(), block()))

    def call(self, block, x):
        return block(x)

    def put(self, x):
        return x

    def forward(self, inputs, mask=None, step=None):
        for block in self.blocks:
            inputs = self.call(block, inputs)
        return self.put(inputs)


def rows(count=8, *more):
    return torch.randn(count, *more, WIDTH, dtype=torch.float64)
