"""Observers: streaming, in bounded memory, with all state in buffers."""

from __future__ import annotations

import copy
import math
from typing import Self

import torch

from qatgraph.quantizers.grids import range_grid
from qatgraph.specs import QuantSpec, Scheme


class Observer(torch.nn.Module):
    """Sees batches of an activation, then gives the range for its grid. Per tensor."""

    def observe(self, x: torch.Tensor) -> None:
        raise NotImplementedError

    def range(self, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """``(low, high)``, two scalars."""
        raise NotImplementedError

    def fresh(self) -> Self:
        """One of this kind that has seen nothing, on the same device and in the same precision."""
        other = copy.deepcopy(self)
        other.load_state_dict(type(self)().state_dict())
        return other


class MinMax(Observer):
    """The smallest and largest value seen."""

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(float("inf")))
        self.register_buffer("high", torch.tensor(float("-inf")))

    def observe(self, x: torch.Tensor) -> None:
        self.low.copy_(torch.minimum(self.low, x.min()))
        self.high.copy_(torch.maximum(self.high, x.max()))

    def range(self, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        return self.low, self.high


class MovingAverage(MinMax):
    """The exponential average of each batch's range: ``new = 0.9 old + 0.1 batch`` (Jacob et al., arXiv:1712.05877)."""

    def observe(self, x: torch.Tensor) -> None:
        first = self.low > self.high  # nothing seen yet
        for bound, value in ((self.low, x.min()), (self.high, x.max())):
            bound.copy_(torch.where(first, value, 0.9 * bound + 0.1 * value))


class MSE(MinMax):
    """The range whose grid has the least squared error on a histogram.

    Counts lie in ``2 * BINS`` equal bins over ``[-reach, reach)``, where the reach is a power of two; a value outside
    doubles the reach and merges neighbouring bins, which is exact. Zeros are not counted: they lie on every grid.
    The search goes over the two ends in turn: first coarse, then around the best.
    """

    BINS = 2048
    CHUNK = 2**22  # values binned at a time
    counts: torch.Tensor
    reach: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2 * self.BINS, dtype=torch.float64))
        self.register_buffer("reach", torch.tensor(0.0, dtype=torch.float64))  # up to 2**128

    def observe(self, x: torch.Tensor) -> None:
        super().observe(x)
        top = float(x.abs().max())
        if top == 0.0 or not math.isfinite(top):
            return
        self._widen(2.0 ** math.frexp(top)[1])
        width = float(self.reach) / self.BINS
        for part in torch.split(x.flatten(), self.CHUNK):
            bins = (part[part != 0].double() / width).floor_().long() + self.BINS
            self.counts.add_(torch.bincount(bins, minlength=2 * self.BINS))

    def _widen(self, needed: float) -> None:
        reach = float(self.reach) or needed
        while reach < needed:
            halves = torch.zeros_like(self.counts)
            halves[self.BINS // 2 : self.BINS // 2 + self.BINS] = self.counts.reshape(-1, 2).sum(1)
            self.counts.copy_(halves)
            reach *= 2
        self.reach.fill_(reach)

    def range(self, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        if float(self.reach) == 0.0 or not bool(torch.isfinite(self.low) & torch.isfinite(self.high)):
            return self.low, self.high
        width = float(self.reach) / self.BINS
        centers = (torch.arange(2 * self.BINS, dtype=torch.float64) - self.BINS + 0.5) * width
        used = self.counts.cpu() > 0
        centers, counts = centers[used], self.counts.cpu()[used]
        low, high, step = 1.0, 1.0, 0.05  # shares of the range that was seen
        fixed = spec.scheme is Scheme.SYMMETRIC or float(self.low) >= 0
        for _ in range(3):
            offsets = torch.arange(-10, 11, dtype=torch.float64) * step
            for _ in range(2):  # one end after the other, and once more
                if not fixed:
                    lows = torch.unique((low + offsets).clamp(0.05, 1.0))
                    low = float(lows[self._errors(lows, torch.full_like(lows, high), centers, counts, spec).argmin()])
                highs = torch.unique((high + offsets).clamp(0.05, 1.0))
                high = float(highs[self._errors(torch.full_like(highs, low), highs, centers, counts, spec).argmin()])
            step /= 5
        return self._ends(torch.tensor(low), torch.tensor(high), spec)

    def _ends(self, low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        if spec.scheme is Scheme.SYMMETRIC:
            top = torch.maximum(-self.low, self.high).to(low)
            return (-top * high).float(), (top * high).float()
        return (self.low.to(low) * low).float(), (self.high.to(high) * high).float()

    def _errors(
        self, low: torch.Tensor, high: torch.Tensor, x: torch.Tensor, counts: torch.Tensor, spec: QuantSpec
    ) -> torch.Tensor:
        """The squared error of each range."""
        scale, zero = (t.double()[:, None] for t in range_grid(*self._ends(low, high, spec), spec))
        q = (x / scale).round_().add_(zero).clamp_(spec.qmin, spec.qmax)
        return q.sub_(zero).mul_(scale).sub_(x).square_() @ counts


OBSERVERS: dict[str, type[Observer]] = {"minmax": MinMax, "moving-average": MovingAverage, "mse": MSE}
