"""A histogram of everything that was seen, in bounded memory, that does not depend on the order of the batches."""

from __future__ import annotations

import math

import torch

BINS = 2048  # on each side of zero
CHUNK = 2**22  # values binned at a time


class Histogram(torch.nn.Module):
    """Counts in ``2 * BINS`` equal bins ``[k * width, (k + 1) * width)`` over ``[-reach, reach)``.

    The reach is a power of two; a value outside doubles it and merges neighbouring bins, which is exact. Zeros are
    counted apart: they lie on every grid. A batch with NaN or infinity is not counted.
    """

    counts: torch.Tensor
    zeros: torch.Tensor
    reach: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2 * BINS, dtype=torch.float64))
        self.register_buffer("zeros", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("reach", torch.tensor(0.0, dtype=torch.float64))  # up to 2**128

    @property
    def width(self) -> float:
        """Of a bin; 0 while nothing but zeros was seen."""
        return float(self.reach) / BINS

    def centers(self) -> torch.Tensor:
        return (torch.arange(2 * BINS, dtype=torch.float64) - BINS + 0.5) * self.width

    def add(self, x: torch.Tensor) -> None:
        top = float(x.abs().max())
        if not math.isfinite(top):
            return
        if top > 0.0:
            self._widen(2.0 ** math.frexp(top)[1])
        for part in torch.split(x.flatten(), CHUNK):
            values = part[part != 0]
            bins = (values.double() / self.width).floor_().long() + BINS
            self.counts.add_(torch.bincount(bins, minlength=2 * BINS))
            self.zeros.add_(part.numel() - values.numel())

    def _widen(self, needed: float) -> None:
        reach = float(self.reach) or needed
        while reach < needed:
            halves = torch.zeros_like(self.counts)
            halves[BINS // 2 : BINS // 2 + BINS] = self.counts.reshape(-1, 2).sum(1)
            self.counts.copy_(halves)
            reach *= 2
        self.reach.fill_(reach)
