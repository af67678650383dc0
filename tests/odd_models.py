"""Small models with experts and inputs, and odd models to take their place, by name."""

import copy
import functools

import torch
from torch import nn

TASKS = ("a", "b")


class Tokens(nn.Module):
    """Embedding, one block that sees unmasked tokens only, and their mean."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.out = nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None, flag=False):
        hidden = self.norm(self.table(input_ids))
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        if attention_mask is None:
            return self.out(hidden.mean(1))
        weight = attention_mask[..., None].to(hidden)
        return self.out((hidden * weight).sum(1) / weight.sum(1).clamp(min=1))


class Pictures(nn.Module):
    """Convolution, batch norm and a mean over places."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 3)

    def forward(self, pixel_values):
        return self.out(torch.tanh(self.norm(self.conv(pixel_values))).mean((2, 3)))


def _rows(size):
    return {"input": torch.randn(size, 4)}


def _texts(size):
    lengths = torch.randint(2, 6, (size, 1))
    mask = (torch.arange(5) < lengths).long()
    return {"input_ids": torch.randint(0, 7, (size, 5)), "attention_mask": mask}


def _pictures(size):
    return {"pixel_values": torch.randn(size, 2, 5, 5)}


def _dense():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


TOYS = {"dense": (_dense, _rows), "tokens": (Tokens, _texts), "pictures": (Pictures, _pictures)}


@functools.cache
def _template(toy):
    torch.manual_seed(0)
    make, batch = TOYS[toy]
    base = make()
    experts = {task: _near(base.state_dict()) for task in TASKS}
    return base, experts, {task: [batch(6), batch(4)] for task in TASKS}


def _near(state):
    near = {}
    for name, value in state.items():
        near[name] = value + 0.1 * torch.rand_like(value) if value.is_floating_point() else value
    return near


def toy(name):
    """(base, experts, calibration) of a toy, fresh."""
    return copy.deepcopy(_template(name))


# ---------------------------------------------------------------------------- models as bases


class _Answers(nn.Module):
    """A model around another that returns something else."""

    def __init__(self, model, answer):
        super().__init__()
        self.inner, self.answer = model, answer

    def forward(self, **inputs):
        return self.answer(self.inner(**inputs))


def _damaged(model):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    return model


def _shared(model):
    """The model twice over, with the same weights."""
    return nn.ModuleDict({"one": model, "two": model})


class _Twice(nn.Module):
    """A model that calls one module under two names."""

    def __init__(self, model):
        super().__init__()
        self.one = self.two = model

    def forward(self, **inputs):
        return self.one(**inputs) + self.two(**inputs)


def _noisy(output):
    return output + torch.rand_like(output)


def _fails(output):
    raise KeyError("inside the model")


BASES = {
    "training": lambda model: model.train(),
    "evaluating": lambda model: model.eval(),
    "partly training": lambda model: next(iter(model.children())).eval() and model,
    "frozen": lambda model: model.requires_grad_(False),
    "float16": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "float64": lambda model: model.double(),
    "complex": lambda model: model.to(torch.complex64),
    "meta": lambda model: model.to("meta"),
    "damaged": _damaged,
    "compiled": torch.compile,
    "no parameters": lambda model: nn.Identity(),
    "an empty list": lambda model: nn.ModuleList(),
    "another": lambda model: nn.Linear(4, 4),
    "no forward": _shared,
    "a module twice": _Twice,
    "returns None": lambda model: _Answers(model, lambda output: None),
    "returns a number": lambda model: _Answers(model, lambda output: output.sum()),
    "returns a mapping": lambda model: _Answers(model, lambda output: {"logits": output}),
    "returns words": lambda model: _Answers(model, str),
    "draws": lambda model: _Answers(model, _noisy),
    "fails": lambda model: _Answers(model, _fails),
    "state dict": lambda model: model.state_dict(),
    "class": type,
    "list": lambda model: [model],
    "None": lambda model: None,
}
