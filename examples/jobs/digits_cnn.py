"""A small convolutional network on the images, the split and the training of the job digits."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

import torch
from torch import nn

CHANNELS = 16
digits = run_path(str(Path(__file__).with_name("digits.py")))


def convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution and batch norm; the size of the image stays."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class DigitsCNN(nn.Module):
    """A residual block at 8x8, a max pool, two branches side by side at 4x4, and the mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(1, CHANNELS, 3)
        self.first, self.second = convolution(CHANNELS, CHANNELS, 3), convolution(CHANNELS, CHANNELS, 3)
        self.pool = nn.MaxPool2d(2)
        self.narrow, self.wide = convolution(CHANNELS, CHANNELS, 1), convolution(CHANNELS, CHANNELS, 3)
        self.mix = convolution(2 * CHANNELS, 4 * CHANNELS, 3)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * CHANNELS, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(pixels.unsqueeze(1)))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        x = self.pool(x)
        x = torch.cat([torch.relu(self.narrow(x)), torch.relu(self.wide(x))], dim=1)
        x = torch.relu(self.mix(x))
        return self.head(self.average(x).flatten(1))


def model(seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    return digits["train"](DigitsCNN(), epochs)
