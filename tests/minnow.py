"""A model of a user's own, in plain torch: its layers, a builder that declares them, its registration, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import hook_count, snapshot, unchanged
from torch import nn
from torch.nn import functional as F  # noqa: N812

import architectures
import controllability as ct
from controllability.components import Activation, gated, residual


class Attention(nn.Module):
    def __init__(self, d, heads=2):
        super().__init__()
        self.heads = heads
        self.mix, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.gate, self.up = nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False)
        self.down = nn.Linear(h, d, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    """Called as openai-gpt's layers are."""

    def __init__(self, d=16, h=24):
        super().__init__()
        self.attention_norm, self.ff_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.attention, self.ff = Attention(d), FeedForward(d, h)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.ff(self.ff_norm(x))


class Minnow(nn.Module):
    def __init__(self, layer=Block, d=16, vocabulary=60):
        super().__init__()
        self.positions, self.tokens = nn.Embedding(64, d), nn.Embedding(vocabulary, d)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, input_ids, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.tokens(input_ids) + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


def made(cls=Minnow, layer=Block, dtype=torch.float64):
    torch.manual_seed(0)
    model = cls(layer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def declared(view, act="silu", gate="ff.gate", up="ff.up", norm="ff_norm", down=None):
    inner = gated(view.linear(gate, "h", "d"), view.linear(up, "h", "d"), Activation(act))
    return residual(view.rms_norm(norm) >> inner >> (down(view) if down else view.linear("ff.down", "d", "h")))


TARGET = {"input_ids": torch.arange(5, 17)[None]}
SOURCE = {"input_ids": TARGET["input_ids"][:, -4:], "position_ids": torch.arange(8, 12)[None]}


def registering():
    """Registers a builder for ``Block`` (again), and forgets it after the test."""

    def register(build=declared, **options):
        architectures.unregister("minnow")
        architectures.register("minnow", **({"layer_class": Block} | options))(build)

    register()
    yield register
    architectures.unregister("minnow")


def refused(kind, message, model=None, target=TARGET):
    """Patching raises ``kind`` with this text and leaves no trace on the model."""
    model = model if model is not None else made()
    before = snapshot(model)
    with pytest.raises(kind, match=message) as raised:
        ct.patch_model(model, target, SOURCE)
    assert hook_count(model) == 0
    if not any(v.is_meta for v in before.values()):
        assert unchanged(model, before)
    return str(raised.value)
