"""Factors per input channel that take outliers out of an activation and into the weights that read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from qatgraph.quantizers.fake_quantize import WeightFakeQuantize
from qatgraph.quantizers.grids import quantize, range_grid
from qatgraph.quantizers.observers import make_observer
from qatgraph.specs import QuantSpec

STRENGTHS = tuple(round(0.1 * i, 1) for i in range(10))
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Reader:
    """A linear that reads the activation: its weight ``[out, in]`` and the grid of that weight."""

    weight: torch.Tensor
    spec: QuantSpec


@dataclass(frozen=True)
class Activation:
    """What calibration saw: sampled ``rows`` ``[n, in]``, and the largest ``|x|`` of each channel over all rows.

    ``ties`` numbers the channels; those with one number get one factor.
    """

    rows: torch.Tensor
    top: torch.Tensor
    spec: QuantSpec
    observer: str
    ties: torch.Tensor


@dataclass(frozen=True)
class Smoothing:
    """``x / factors`` and ``weight * factors``; ``error`` is relative to that without factors."""

    factors: torch.Tensor
    error: float


def search(x: Activation, readers: Sequence[Reader]) -> Smoothing:
    """The factors that give the layers' outputs the least squared error after quantization.

    Two families, each with one strength, which is searched for each group of layers that read one value:
    ``max|x|^a / max|w|^(1 - a)`` of each input channel (SmoothQuant, Xiao et al., arXiv:2211.10438), and
    ``max(1, max|x| / t)``, which leaves all but the outliers alone (Outlier Suppression+, Wei et al.,
    arXiv:2304.09145).

    One half of the rows chooses. The other judges: no layer's error may grow there, or nothing is changed.
    """
    chooses, judges = replace(x, rows=x.rows[::2]), replace(x, rows=x.rows[len(x.rows) > 1 :: 2])
    ones = torch.ones_like(x.top)
    best, least = ones, sum(_errors(chooses, readers, ones))
    for factors in _candidates(x, readers) if least > 0 else ():  # else calibration saw nothing
        error = sum(_errors(chooses, readers, factors))
        if error < least:
            best, least = factors, error
    before, after = (_errors(judges, readers, factors) for factors in (ones, best))
    if best is ones or _worse(after, before):
        return Smoothing(ones, 1.0)
    return Smoothing(best, sum(after) / max(sum(before), 1e-30))


def _worse(after: Sequence[float], before: Sequence[float]) -> bool:
    return any(a > b for a, b in zip(after, before, strict=True))


def _candidates(x: Activation, readers: Sequence[Reader]) -> Iterator[torch.Tensor]:
    weight = torch.stack([r.weight.abs().amax(0) for r in readers]).amax(0)
    top, weight = (_tied(t, x.ties).clamp(min=1e-5) for t in (x.top, weight))
    for strength in STRENGTHS:
        factors = top**strength / weight ** (1 - strength)
        yield factors / factors.log().mean().exp()
    for quantile in QUANTILES:
        yield (top / torch.quantile(top, quantile)).clamp(min=1.0)


def _tied(values: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    """The largest value of all channels with the same number."""
    largest = values.new_zeros(int(ties.max()) + 1)
    return largest.scatter_reduce(0, ties, values, "amax")[ties]


def _errors(x: Activation, readers: Sequence[Reader], factors: torch.Tensor) -> list[float]:
    """The squared error of each layer's output, relative to that output."""
    observer = make_observer(x.observer)
    rows = x.rows / factors
    observer.observe(rows)
    scale, zero = range_grid(*observer.range(x.spec), x.spec)
    rows = (quantize(rows, scale, zero, x.spec.qmin, x.spec.qmax, None) - zero) * scale
    errors = []
    for reader in readers:
        quantizer = WeightFakeQuantize(reader.spec)
        quantizer.on = True
        want = x.rows @ reader.weight.T
        have = rows @ quantizer(reader.weight * factors).T
        errors.append(float((have - want).square().sum() / want.square().sum().clamp(min=1e-30)))
    return errors
