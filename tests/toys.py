"""Small models with random experts, in float64 so that oracles can be exact."""

import copy

import torch
from torch import nn

from qpmerge_lite.companion.suites.encoders import VisionTransformer
from qpmerge_lite.engine.layers import view
from qpmerge_lite.engine.norms import Norm
from qpmerge_lite.engine.views import Table

TASKS = ("a", "b", "c")


class TokenModel(nn.Module):
    """Token embedding, causal-free blocks and a mean over unmasked tokens; attention sees unmasked
    tokens only."""

    def __init__(self, width=8, depth=2, vocabulary=11):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(MaskedBlock(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        for block in self.blocks:
            (x,) = block(x, mask=attention_mask)
        weight = attention_mask[..., None].to(x)
        return (self.norm(x) * weight).sum(1) / weight.sum(1)


class MaskedBlock(nn.Module):
    """Mixes every token with the mean of the unmasked ones; returns a tuple as many published
    blocks do."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.mix, self.own = (
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.Linear(width, width, bias=False),
        )

    def forward(self, x, mask):
        h, weight = self.norm(x), mask[..., None].to(x)
        mean = (self.own(h) * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return (x + torch.tanh(self.mix(h) + mean),)


def perturbed(state, generator, scale=0.1):
    """A state dict near another."""
    return {
        k: v + scale * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        for k, v in state.items()
    }


def experts_of(model, seed=1, tasks=TASKS):
    """Random experts of a base model."""
    generator = torch.Generator().manual_seed(seed)
    return {t: perturbed(model.state_dict(), generator) for t in tasks}


def vision(seed=0):
    """(base, experts, calibration) of a two-block vision transformer, float64."""
    torch.manual_seed(seed)
    base = VisionTransformer(width=8, depth=2, heads=2, ratio=2, side=8, patch=4).double()
    calibration = {
        t: [{"pixels": torch.randn(n, 1, 8, 8, dtype=torch.float64)} for n in (9, 4)] for t in TASKS
    }
    return base, experts_of(base), calibration


def tokens(seed=0):
    """(base, experts, calibration) of a padded token model, float64."""
    torch.manual_seed(seed)
    base = TokenModel().double()
    calibration = {}
    for t in TASKS:
        lengths = torch.randint(2, 7, (16, 1))
        batch = {
            "input_ids": torch.randint(0, 11, (16, 6)),
            "attention_mask": (torch.arange(6) < lengths).long(),
        }
        calibration[t] = [
            {k: v[:10] for k, v in batch.items()},
            {k: v[10:] for k, v in batch.items()},
        ]
    return base, experts_of(base), calibration


def loaded(base, state):
    """A copy of a model with other weights."""
    model = copy.deepcopy(base)
    model.load_state_dict(state)
    return model


def outputs(v, x, y):
    """Samples (N, g, m) of what a viewed module puts out for rows x, (N, d)."""
    return (
        v.inputs(x) * y.double()[:, None]
        if isinstance(v, Table)
        else y.double().unsqueeze(-1 if isinstance(v, Norm) else 1)
    )


@torch.no_grad()
def trace(model, batches):
    """Every viewed layer's inputs and outputs over batches, padding dropped: {layer: (samples in,
    samples out)}."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if v := view(name, module):
            hooks.append(
                module.register_forward_hook(
                    lambda _, a, y, v=v: seen.setdefault(v.name, []).append(
                        (v, v.rows(a[0]), v.output_rows(y))
                    )
                )
            )
    masks = []
    for batch in batches:
        model(**batch)
        masks.append(batch.get("attention_mask"))
    for hook in hooks:
        hook.remove()

    def rows(z, mask):
        return z.flatten(0, -2) if mask is None else z[mask.bool()]

    return {
        name: (
            torch.cat([v.inputs(rows(x, k)) for (v, x, _), k in zip(calls, masks)]),
            torch.cat([outputs(v, rows(x, k), rows(y, k)) for (v, x, y), k in zip(calls, masks)]),
        )
        for name, calls in seen.items()
    }
