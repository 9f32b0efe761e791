"""Linears that read floats: their kernel finds a grid for them at run time, or only the weight is integers."""

from __future__ import annotations

import numpy as np

from qatgraph.reference.grids import Array, dynamic_quantize
from qatgraph.reference.products import Accumulator, accumulate, linear

ROUNDOFF = 2.0**-24  # of one operation in float32


def linear_dynamic(
    x: Array, weight: Array, w_scale: Array, bias: Array | None, *, accumulator: Accumulator = accumulate
) -> Array:
    """DynamicQuantizeMatMul, ``x [..., K]`` float32, ``weight [N, K]``: the grid is that of the whole tensor.

    Equals the engine: 0 of all bits but those of the sum with the bias. Not on Arm with SME, which finds a grid for
    each row.
    """
    q, grid = dynamic_quantize(x)
    return linear(q, grid.scale, int(grid.zero_point), weight, w_scale, bias, accumulator=accumulator)


def dequantize_blocks(weight: Array, scale: Array, block: int) -> Array:
    """``q * scale`` in float32: ``weight [N, K]``, ``scale [N, ceil(K / block)]``."""
    wide = np.repeat(scale.astype(np.float32), block, axis=1)[:, : weight.shape[1]]
    found: Array = weight.astype(np.float32) * wide
    return found


def linear_in_blocks(x: Array, weight: Array, scale: Array, block: int, bias: Array | None) -> Array:
    """MatMulNBits with activations in float (``accuracy_level`` 1): float64 sums of the float32 factors, rounded once.

    The engine adds in float32, in an order of its own: it may be off by ``sum_slack``.
    """
    total = x.astype(np.float64) @ dequantize_blocks(weight, scale, block).T.astype(np.float64)
    found: Array = (total if bias is None else total + bias).astype(np.float32)
    return found


def sum_slack(x: Array, weight: Array, scale: Array, block: int, bias: Array | None) -> Array:
    """How far a float32 sum of ``linear_in_blocks`` may be from it, in any order: ``(K + 4) u (|x| @ |w| + |b|)``.

    Each product meets at most K - 1 additions, that of the bias, the roundings of ``x * (q * s)`` and the one of the
    reference: K + 4 in all, with one to spare for terms of second order. Source: Higham, Accuracy and Stability of
    Numerical Algorithms, 2nd edition, section 3.1; u is 2**-24.
    """
    terms = np.abs(x).astype(np.float64) @ np.abs(dequantize_blocks(weight, scale, block)).T.astype(np.float64)
    terms = terms if bias is None else terms + np.abs(bias)
    slack: Array = (weight.shape[1] + 4) * ROUNDOFF * terms
    return slack
