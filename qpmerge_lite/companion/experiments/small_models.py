"""Small models of plain PyTorch for the compatibility table: layouts that libraries do not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY, PLACES, WIDTH = 40, 16, 8


class Tokens(nn.Module):
    """Sum of a token's and a place's embedding, (B, S, 8)."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(PLACES, WIDTH)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Embeddings (B, S, 8) of tokens (B, S) at places (B, S) or (1, S)."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).to(input_ids)[None]
        return self.words(input_ids) + self.places(position_ids)


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, batch first; its fast path nests tensors of padded batches."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True)
        self.tokens = Tokens()
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, input_ids, attention_mask, position_ids=None):
        embedded = self.tokens(input_ids, position_ids)
        return self.encoder(embedded, src_key_padding_mask=attention_mask == 0)


class SequenceFirst(nn.Module):
    """``nn.TransformerEncoder`` with its default layout: (S, B, d)."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 12)
        self.tokens = Tokens()
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids, attention_mask, position_ids=None):
        embedded = self.tokens(input_ids, position_ids).transpose(0, 1)
        encoded = self.encoder(embedded, src_key_padding_mask=attention_mask == 0)
        return encoded.transpose(0, 1)


class Pair(nn.Module):
    """``nn.Transformer``: an encoder and a causal decoder."""

    def __init__(self):
        super().__init__()
        self.tokens = Tokens()
        self.answers = Tokens()
        self.transformer = nn.Transformer(WIDTH, 2, 2, 2, 12, batch_first=True)

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
        length = decoder_input_ids.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        return self.transformer(
            self.tokens(input_ids),
            self.answers(decoder_input_ids),
            tgt_mask=later,
            src_key_padding_mask=attention_mask == 0,
            tgt_key_padding_mask=decoder_attention_mask == 0,
            memory_key_padding_mask=attention_mask == 0,
        )


class Routed(nn.Module):
    """Each token goes through the one of four experts that the gate prefers."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        chosen = self.gate(x).argmax(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            here = chosen == number
            if here.any():
                y[here] = expert(x[here])
        return x + y


class Experts(nn.Module):
    """A mixture whose experts are modules of their own and see other tokens in every forward."""

    def __init__(self):
        super().__init__()
        self.tokens = Tokens()
        self.blocks = nn.ModuleList(Routed() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids, attention_mask, position_ids=None):
        x = self.tokens(input_ids, position_ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Convolved(nn.Module):
    """A convolution, batch normalisation and a rectifier."""

    def __init__(self, channels: int, filters: int, stride: int = 1):
        super().__init__()
        self.convolution = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(filters)

    def forward(self, x):
        return self.norm(self.convolution(x)).relu()


class Residual(nn.Module):
    """A residual network of convolutions with batch normalisation; no list of blocks."""

    def __init__(self):
        super().__init__()
        self.stem = Convolved(3, WIDTH, stride=2)
        self.first = nn.Sequential(Convolved(WIDTH, WIDTH), Convolved(WIDTH, WIDTH))
        self.second = nn.Sequential(Convolved(WIDTH, WIDTH), Convolved(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, pixel_values):
        x = self.stem(pixel_values)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Down and up again, with skips across: blocks read what blocks before the last one put out."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleDict({"fine": Convolved(3, WIDTH), "coarse": Convolved(WIDTH, 12, 2)})
        self.bottom = Convolved(12, 12)
        self.up = nn.ConvTranspose2d(12, WIDTH, 2, 2)
        self.joined = Convolved(2 * WIDTH, WIDTH)
        self.out = nn.Conv2d(WIDTH, 2, 1)

    def forward(self, pixel_values):
        fine = self.down["fine"](pixel_values)
        coarse = self.bottom(self.down["coarse"](fine))
        return self.out(self.joined(torch.cat([fine, self.up(coarse)], 1)))


class Mixed(nn.Module):
    """One block of an MLP-Mixer: over patches, then over channels."""

    def __init__(self, patches: int):
        super().__init__()
        self.before = nn.LayerNorm(WIDTH)
        self.across = nn.Sequential(nn.Linear(patches, 12), nn.GELU(), nn.Linear(12, patches))
        self.between = nn.LayerNorm(WIDTH)
        self.within = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x):
        x = x + self.across(self.before(x).mT).mT
        return x + self.within(self.between(x))


class Mixer(nn.Module):
    """An MLP-Mixer: layers that read patches, and layers that read channels as rows."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.Sequential(Mixed(4), Mixed(4))

    def forward(self, pixel_values):
        return self.blocks(self.patches(pixel_values).flatten(2).mT)
