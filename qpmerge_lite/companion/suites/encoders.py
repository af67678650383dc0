"""Encoders small enough to be trained on the spot and shipped inside the package."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, unfold


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer each for queries, keys, values and output."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each sequence, to the tokens whose ``mask`` (B, 1, 1, T) is true: (B, T, d)
        to (B, T, d)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self.output(scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: attention and a two-layer perceptron, each with a residual
    path."""

    def __init__(self, width: int, heads: int, ratio: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform a sequence: (B, T, d) to (B, T, d)."""
        x = x + self.attention(self.norm1(x), mask)
        return x + self.down(gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Compact vision transformer for square images (Dosovitskiy et al., 2021).

    Args:
        width: d, features per token; a multiple of ``heads``.
        depth: number of blocks in ``blocks``.
        heads: attention heads per block.
        ratio: hidden width of the perceptron over ``width``.
        side: image side in pixels; a multiple of ``patch``, times two for every layer of the stem.
        patch: patch side in pixels, or in what the stem leaves of them.
        channels: 1 for grey images, 3 for colour.
        stem: features after each 3 x 3 convolution of stride two that comes before the patches, as
            a dense layer over unfolded neighbourhoods (Xiao et al., 2021: early convolutions help
            where images are few).
        token: whether a class token's state is the feature; else it is the mean over patches.
    """

    def __init__(
        self,
        *,
        width=96,
        depth=4,
        heads=4,
        ratio=2,
        side=28,
        patch=7,
        channels=1,
        stem=(),
        token=True,
    ):
        super().__init__()
        self.patch, sizes = patch, (channels, *stem)
        self.stem = nn.ModuleList(
            nn.Linear(9 * inputs, outputs) for inputs, outputs in zip(sizes, stem)
        )
        self.embed = nn.Linear(sizes[-1] * patch * patch, width)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width)) if token else None
        patches = (side // patch // 2 ** len(stem)) ** 2
        self.position = nn.Parameter(0.02 * torch.randn(1, patches + token, width))
        self.blocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Feature of the class token, or mean of the patches': (B, channels, side, side) floats to
        (B, d)."""
        for layer in self.stem:
            near = unfold(pixels, 3, stride=2, padding=1).transpose(1, 2)
            pixels = gelu(layer(near)).transpose(1, 2).unflatten(2, (pixels.shape[2] // 2, -1))
        x = self.embed(unfold(pixels, self.patch, stride=self.patch).transpose(1, 2))
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(pixels), -1, -1), x], 1)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1) if self.cls is None else self.norm(x)[:, 0]


class TextTransformer(nn.Module):
    """Compact encoder of character sequences, pre-norm, with the mean over a sequence as its
    feature.

    Args:
        characters: size of the vocabulary.
        length: longest sequence.
        width: d, features per character; a multiple of ``heads``.
        depth: number of blocks in ``blocks``.
        heads: attention heads per block.
        ratio: hidden width of the perceptron over ``width``.
    """

    def __init__(self, *, characters: int, length: int, width=64, depth=4, heads=4, ratio=2):
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.blocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Normed state of every token: (B, T) int64 and its mask, 1 for text and 0 for padding, to
        (B, T, d)."""
        x = self.embed(input_ids) + self.position[:, : input_ids.shape[1]]
        mask = attention_mask[:, None, None].bool()
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    @staticmethod
    def pool(states: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean over a sequence, padding left out: (B, T, d) to (B, d)."""
        mask = attention_mask.unsqueeze(-1).to(states)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Feature of every sequence: (B, T) int64 and its mask, 1 for text and 0 for padding, to
        (B, d)."""
        return self.pool(self.states(input_ids, attention_mask), attention_mask)
