"""Tiny models with the shapes of real ones, and their captures. ``ZOO`` holds them by name, ``RAW`` those that only the
passes can read, and ``MODELS`` all.

``ZOO["encoder"].capture()`` is a graph of your own; ``captured("encoder")`` and ``canonical("encoder")`` are made once
and shared by all tests: read them, run passes over them, but never train them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

import qatgraph as qg
from qatgraph.api import decide
from qatgraph.ir.graph import Batch, Graph, bind
from qatgraph.rewriting.evidence import Evidence
from tests.blocks import Clip, Cnn, Images, Llama, Pixels, Pruned, Written

WIDTH, HEADS, VOCABULARY, MAX_LENGTH = 32, 2, 50, 64
BATCH, LENGTH = {0: "batch"}, {0: "batch", 1: Dim("length", max=MAX_LENGTH)}


class Mlp(nn.Module):
    """Pre-norm MLP with GELU, dropout and a residual add: [batch, 32] -> [batch, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gelu, self.dropout = nn.LayerNorm(WIDTH), nn.GELU(), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.down(self.gelu(self.up(self.norm(x)))))
        return x * 0.5 + y


class SelfAttention(nn.Module):
    """Multi-head attention with a padding mask, on ``scaled_dot_product_attention``."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            p(x).view(batch, length, HEADS, -1).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        rate = self.dropout.p if self.training else 0.0
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return y


class Layer(nn.Module):
    """A post-norm transformer layer, as in BERT."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention, self.mlp = SelfAttention(dropout), Mlp()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.norm(x + self.attention(x, mask)))
        return y


class Encoder(nn.Module):
    """Token and position embeddings and attention layers: [batch, length] -> [batch, length, 32]."""

    def __init__(self, depth: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(MAX_LENGTH, WIDTH)
        self.layer = nn.ModuleList(Layer(dropout) for _ in range(depth))
        self.register_buffer("position_ids", torch.arange(MAX_LENGTH)[None], persistent=False)
        self.position_ids: Tensor

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x: Tensor = self.token(input_ids) + self.position(self.position_ids[:, : input_ids.shape[1]])
        mask = attention_mask[:, None, None, :].bool()
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Tied(nn.Module):
    """A language model whose head is its embedding table: [batch, length] -> [batch, length, 50]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.embedding(input_ids)))
        return y


class Conv1D(nn.Module):
    """The linear layer of GPT-2: the weight is [in, out], and the arithmetic is ``addmm`` between two views."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) * 0.2), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.bias.shape[0])


class Gpt2Mlp(nn.Module):
    """Two ``Conv1D`` with a ReLU between: [batch, length, 32] -> [batch, length, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.act = Conv1D(WIDTH, 2 * WIDTH), Conv1D(2 * WIDTH, WIDTH), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(self.act(self.c_fc(x)))
        return y


class ErfGelu(nn.Module):
    """A linear and a GELU that is written out with ``erf``: [batch, 32] -> [batch, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y * 0.5 * (1.0 + torch.erf(y / 2**0.5))


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int, seed: int = 0) -> Batch:
    """Token ids and a mask whose second row, if any, ends in padding."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, -2:] = 0
    return {"input_ids": tokens(batch, length, seed), "attention_mask": mask}


@dataclass(frozen=True)
class Case:
    """A model, its example inputs (by seed) and its moving axes. ``model()`` has the same weights each time.

    ``decomposed``: it is captured from a program that torch has taken apart to core ATen.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Batch]
    dynamic: dict[str, Any] = field(default_factory=dict)
    decomposed: bool = False

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval()

    def capture(self) -> Graph:
        if self.decomposed:
            program = torch.export.export(self.model(), *bind(self.inputs(0)))
            return qg.capture(program.run_decompositions())
        return qg.capture(self.model(), self.inputs(0), self.dynamic)


ZOO: dict[str, Case] = {
    "mlp": Case(Mlp, lambda seed: floats(4, WIDTH, seed=seed), {"x": BATCH}),
    "encoder": Case(Encoder, lambda seed: padded(2, 6, seed), {"input_ids": LENGTH, "attention_mask": LENGTH}),
    "tied": Case(Tied, lambda seed: tokens(2, 5, seed), {"input_ids": BATCH}),
    "gpt2": Case(Gpt2Mlp, lambda seed: floats(2, 5, WIDTH, seed=seed), {"x": BATCH}),
    "images": Case(Images, lambda seed: floats(2, 3, 9, 9, seed=seed), {"x": BATCH}),
    "erf-gelu": Case(ErfGelu, lambda seed: floats(4, WIDTH, seed=seed)),
    "pixels": Case(Pixels, lambda seed: pixels(64, 3, 8, 8, seed=seed), {"image": BATCH}),
}

# What only the passes can read: layers in arithmetic, writes in place, a decomposed program.
RAW: dict[str, Case] = {
    "cnn": Case(Cnn, lambda seed: floats(2, 3, 6, 6, seed=seed), {"x": BATCH}),
    "written": Case(Written, lambda seed: floats(2, 5, WIDTH, seed=seed), {"x": LENGTH}),
    "llama": Case(Llama, lambda seed: tokens(2, 5, seed), {"input_ids": BATCH}),
    "clip": Case(Clip, lambda seed: floats(4, WIDTH, seed=seed), {"x": BATCH}),
    "pruned": Case(Pruned, lambda seed: tokens(2, 5, seed), {"input_ids": BATCH}),
    "decomposed": Case(Encoder, lambda seed: padded(2, 6, seed), decomposed=True),
}

MODELS = {**ZOO, **RAW}


@cache
def captured(name: str) -> Graph:
    return MODELS[name].capture()


@cache
def canonical(name: str) -> Graph:
    return qg.canonicalize(captured(name))


def evidence(graph: Graph) -> Evidence:
    """The example inputs as calibration data, and the plan for ONNX Runtime."""
    batch = graph.info.kwargs or graph.info.args
    return Evidence([batch], lambda g: decide(g, "ort-cpu", "int8"))
