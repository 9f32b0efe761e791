"""The range that loses the least information: the calibration of TensorRT, on the grid that will be used.

S. Migacz, "8-bit Inference with TensorRT", GTC 2017 (s7310): of all thresholds take the one with the least
``KL(P || Q)``. P is the histogram inside the threshold, with what lies outside added to its outermost bins. Q is the
same histogram without the outside, coarsened to the levels of the grid: each level spreads its count evenly over those
of its bins that are not empty in P. No threshold has less than a bin for a level, so one far outlier is cut to no less
than about a tenth.

Other than ``onnxruntime.quantization.calibrate``, where a search over 128 bins with 128 levels has one candidate:

- the levels are those of the grid itself (256 for u8, signed range or not; wider for a power-of-two scale), not equal
  groups of bins of which the last takes what is left over;
- a threshold that reaches beyond the values on one side is cut there before the levels are placed, not after;
- what lies outside is added to the outermost bin that is not empty. In an empty one Q is zero and the divergence
  infinite, so that one far outlier would hold the whole range; there, a constant is added to empty bins instead;
- Q is not scaled up to the mass of P (the generalized divergence ``sum(P log(P / Q) - P + Q)``, the same to first
  order in what lies outside): else a threshold that leaves one bin, and piles all else onto it, would lose nothing;
- exact zeros do not take part, as in NVIDIA's pytorch-quantization (``calib/histogram.py``): they lie on every grid,
  and behind a ReLU they would outweigh all else.
"""

from __future__ import annotations

import torch

from qatgraph.quantizers.grids import range_grid
from qatgraph.specs import QuantSpec


def least_divergence(counts: torch.Tensor, width: float, spec: QuantSpec) -> tuple[float, float]:
    """``(low, high)``, multiples of ``width``.

    Args:
        counts: float64 ``[2 * bins]``, of the intervals ``[k * width, (k + 1) * width)`` from ``k = -bins`` on; not
            all zero.
        width: of one bin.
        spec: of the grid.
    """
    low, high = _candidates(counts, width)
    scale, zero = range_grid(low, high, spec)
    wide = scale > width * (1 + 1e-6)  # each level holds a bin
    low, high, scale, zero = low[wide], high[wide], scale[wide], zero[wide]
    edges = torch.arange(spec.qmin, spec.qmax + 2) - zero[:, None] - 0.5
    first = torch.ceil(edges * scale[:, None] / width - 0.5).long() + len(counts) // 2
    divergence = _divergence(counts, first.clamp_(0, len(counts)))
    best = (divergence <= divergence.min() + 1e-12).nonzero()[-1]  # of equals the widest
    return float(low[best]), float(high[best])


def _candidates(counts: torch.Tensor, width: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Every threshold up to the outermost value, on each side no further than its values reach."""
    used = counts.nonzero().flatten() - len(counts) // 2
    lowest, highest = min(int(used[0]), 0), max(int(used[-1]) + 1, 0)
    steps = torch.arange(1, max(-lowest, highest) + 1, dtype=torch.float64)
    return (-steps).clamp(min=lowest) * width, steps.clamp(max=highest) * width


def _divergence(counts: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """``KL(P || Q)`` of each candidate; level ``l`` holds the bins ``first[:, l]`` up to ``first[:, l + 1]``."""
    start, stop = first[:, 0], first[:, -1]
    inside, filled, plogp = (_sums(t) for t in (counts, (counts > 0).double(), _xlogx(counts)))
    mass, bins, own = inside[first].diff(), filled[first].diff(), plogp[stop] - plogp[start]
    below, above = inside[start], inside[-1] - inside[stop]
    used = counts.nonzero().flatten()
    lowest = used[filled[start].long().clamp(max=len(used) - 1)]  # the outermost bins that are not empty
    highest = used[filled[stop].long().sub(1).clamp(min=0)]
    taken = mass.clone()  # by the levels of P
    for edge, outside, before in ((lowest, below, 0.0), (highest, above, below * (lowest == highest))):
        level = torch.searchsorted(first, edge[:, None], right=True).sub(1).clamp(0, mass.shape[1] - 1)
        taken.scatter_add_(1, level, outside[:, None])
        own += _xlogx(counts[edge] + before + outside) - _xlogx(counts[edge] + before)
    cross = torch.special.xlogy(taken, mass / bins.clamp(min=1)).sum(1)
    divergence: torch.Tensor = (own - cross - below - above) / inside[-1]
    return divergence


def _xlogx(values: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.special.xlogy(values, values)
    return product


def _sums(values: torch.Tensor) -> torch.Tensor:
    """Before each bin, and of all."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
