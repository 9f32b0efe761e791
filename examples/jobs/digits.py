"""A small vision transformer of the job digits. A third of the data, fixed, is held out."""

from __future__ import annotations

import hashlib

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import qatgraph as qg

WIDTH, HEADS, DEPTH, BATCH = 64, 4, 4, 64


class Block(nn.Module):
    """Pre-norm: attention, then an MLP with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down, self.gelu = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        batch, tokens, _ = y.shape
        query, key, value = (
            p(y).view(batch, tokens, HEADS, -1).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, WIDTH)
        x = x + self.out(mixed)
        return x + self.down(self.gelu(self.up(self.norm2(x))))


class DigitsViT(nn.Module):
    """16 patches of 2x2 pixels, learned positions, mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, WIDTH)
        self.position = nn.Parameter(torch.randn(16, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = pixels.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        x = self.patch(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Train pixels and labels, held-out pixels and labels: every third image, by position in the set, is held out."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 16
    y = torch.tensor(labels)
    held = torch.arange(len(x)) % 3 == 0
    return x[~held], y[~held], x[held], y[held]


def model(seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    return train(DigitsViT(), epochs)


def train(net: nn.Module, epochs: int) -> nn.Module:
    """In float, on the images that are not held out."""
    x, y, _, _ = split()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
        rates.step()
    return net.eval()


def data(seed: int) -> qg.JobData:
    x, _, held_x, held_y = split()
    return qg.JobData(
        calibrate=list(x[:256].split(BATCH)),
        evaluate=list(held_x.split(BATCH)),
        labels=list(held_y.split(BATCH)),
        train=list(x.split(BATCH)),
        latency=held_x[:64],
        facts={"held_out": len(held_x), "pixels_sha256": hashlib.sha256(x.numpy().tobytes()).hexdigest()},
    )
