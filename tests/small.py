"""Small models with random experts in any precision, and the methods that look at weights only."""

import copy

import torch
from torch import nn

import qpmerge_lite.datafree as q
from qpmerge_lite.merge import wide

F8 = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, *F8]


def greedy(base, experts):
    return q.greedy_soup(base, experts, score=len)


WITHOUT_BASE = [q.soup, greedy, q.slerp]
ON_THE_BASE = [
    q.task_arithmetic,
    q.dare,
    q.breadcrumbs,
    q.ties,
    q.della,
    q.model_stock,
    q.tsv_merge,
    q.iso_c,
    q.dc_merge,
    q.wudi,
]
METHODS = [*WITHOUT_BASE, *ON_THE_BASE]
ORDERING = [q.breadcrumbs, q.ties, q.della, q.wudi, q.dc_merge]


def tuned(base, scale=0.1, tasks="ab"):
    """Experts near a base, floating entries only; parameters that are tied stay so."""
    experts = {}
    for task in tasks:
        model = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters():
                value = wide(parameter)
                parameter.copy_(value + scale * torch.randn_like(value))
        experts[task] = model.state_dict()
    return experts


def linear(dtype=torch.float32):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return layer


def buffered(name, value):
    """A linear layer with a buffer of its own."""
    layer = linear()
    layer.register_buffer(name, value)
    return layer


def changed(state, name, value):
    """A copy of a state dict with one other entry."""
    return {**state, name: value}


class Tied(nn.Module):
    """An embedding whose matrix is the head's too."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.head.weight = self.table.weight
