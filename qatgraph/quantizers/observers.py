"""Observers: streaming, in bounded memory, with all state in buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Self

import torch

from qatgraph.quantizers.entropy import least_divergence
from qatgraph.quantizers.grids import range_grid
from qatgraph.quantizers.histograms import BINS, Histogram
from qatgraph.specs import QuantSpec, Scheme, parse_observer


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


class HistogramObserver(MinMax):
    """Base: the range is searched on a histogram of all that was seen, within the smallest and largest value."""

    def __init__(self) -> None:
        super().__init__()
        self.histogram = Histogram()

    def observe(self, x: torch.Tensor) -> None:
        super().observe(x)
        self.histogram.add(x)

    def range(self, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        if self.histogram.width == 0.0 or not bool(torch.isfinite(self.low) & torch.isfinite(self.high)):
            return self.low, self.high
        return self.search(spec)

    def search(self, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def within(self, low: float, high: float, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """The edges of bins, no further out than the values; both ends equally far for a symmetric grid."""
        smallest, largest = float(self.low), float(self.high)
        if spec.scheme is Scheme.SYMMETRIC:
            top = self.low.new_tensor(min(max(-low, high), max(-smallest, largest)))
            return -top, top
        return self.low.new_tensor(max(low, smallest)), self.low.new_tensor(min(high, largest))


class MSE(HistogramObserver):
    """The range whose grid has the least squared error on the histogram.

    The search goes over the two ends in turn: first coarse, then around the best.
    """

    def search(self, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        centers, counts = self.histogram.centers(), self.histogram.counts.cpu()
        used = counts > 0
        centers, counts = centers[used], counts[used]
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


class Percentile(HistogramObserver):
    """The range of the most central ``percent`` of the values, zeros included, to a bin of the histogram.

    An affine grid loses at most half of the rest at each end, a symmetric one all of it in magnitude; of fewer values
    than it takes to lose one (20,000 or 10,000 for the default) none is lost. As
    ``onnxruntime.quantization.calibrate``, but counted exactly: there a sum of rounded shares is compared.
    """

    def __init__(self, percent: float = 99.99) -> None:
        super().__init__()
        self.share = 1 - Fraction(str(percent)) / 100  # outside the range

    def search(self, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        counts, width = self.histogram.counts.cpu(), self.histogram.width
        below, above = counts[:BINS].flip(0), counts[BINS:]  # from zero outward
        total = int(counts.sum() + self.histogram.zeros.cpu())
        if spec.scheme is Scheme.SYMMETRIC:
            top = _bins(below + above, int(total * self.share)) * width
            return self.within(-top, top, spec)
        lose = int(total * self.share / 2)
        return self.within(-_bins(below, lose) * width, _bins(above, lose) * width, spec)


def _bins(counts: torch.Tensor, lose: int) -> int:
    """How many bins, from the first on, remain when at most so many values are lost at the end."""
    return int((counts.flip(0).cumsum(0) > lose).sum())


class Entropy(HistogramObserver):
    """The range that loses the least information (``qatgraph.quantizers.entropy``: method and sources)."""

    def search(self, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        return self.within(*least_divergence(self.histogram.counts.cpu(), self.histogram.width, spec), spec)


OBSERVERS: dict[str, Callable[..., Observer]] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "mse": MSE,
    "percentile": Percentile,
    "entropy": Entropy,
}


def make_observer(text: str) -> Observer:
    """A new observer, as a plan names it: ``mse``, ``percentile(99.9)``."""
    name, numbers = parse_observer(text)
    return OBSERVERS[name](*numbers)
