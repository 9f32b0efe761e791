"""Element-wise operations between grids, in the arithmetic of ONNX Runtime's integer kernels on x86.

All integers of one call have one type, but for what goes through a table. The results equal those of the engine on AVX2
and later: 0 steps. Elsewhere sums and products differ by at most 1 step, the rest by 0. SSE, which fuses nothing: 2 of
1,048,576 sums in which one integer meets a row of others. 64-bit Arm, which adds in fixed point: 12 of 2,097,152 sums
at scales drawn at random, but 14 to 23 % at powers of two, where halves abound; products 0 at random scales, 0.04 to
0.2 % at round ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np

from qatgraph.reference.grids import Array, Grid, clamp, dequantize, quantize, unsigned_shift

Pointwise = Callable[[Array], Array]


def add(a: Array, a_grid: Grid, b: Array, b_grid: Grid, out_grid: Grid) -> Array:
    """QLinearAdd, with broadcasting.

    ``round_half_even(a * s_a/s_y + (b * s_b/s_y + fixed))`` with ``fixed = z_y - (s_a/s_y * z_a + s_b/s_y * z_b)``,
    in fused multiply-adds of float32: the zero points are in before the rounding. Source: onnxruntime MLAS
    ``qladd_avx2.cpp``.
    """
    if _one_for_many(a, b):  # the engine swaps them
        return add(b, b_grid, a, a_grid, out_grid)
    shift = np.float32(unsigned_shift(out_grid.zero_point.dtype))
    to_a, to_b = (np.asarray(g.scale, np.float32) / np.float32(out_grid.scale) for g in (a_grid, b_grid))
    zero_a, zero_b, zero_y = (np.asarray(g.zero_point, np.float32) + shift for g in (a_grid, b_grid, out_grid))
    fixed = zero_y - fused(to_a, zero_a, to_b * zero_b)
    partial = fused(b.astype(np.float32) + shift, to_b, fixed)
    total = fused(a.astype(np.float32) + shift, to_a, partial)
    return clamp(np.rint(total) - shift, out_grid.zero_point.dtype)


def mul(a: Array, a_grid: Grid, b: Array, b_grid: Grid, out_grid: Grid) -> Array:
    """QLinearMul, with broadcasting: ``round_half_even((a - z_a)(b - z_b) * (s_a * s_b / s_y) + z_y)`` in float32.

    The zero point is in before the rounding. Source: onnxruntime MLAS ``qlmul.cpp``.
    """
    left, right = (q.astype(np.int32) - np.int32(g.zero_point) for q, g in ((a, a_grid), (b, b_grid)))
    ratio = np.float32(a_grid.scale) * np.float32(b_grid.scale) / np.float32(out_grid.scale)
    shift = np.float32(unsigned_shift(out_grid.zero_point.dtype))
    raw = (left * right).astype(np.float32) * ratio + (np.float32(out_grid.zero_point) + shift)
    return clamp(np.rint(raw) - shift, out_grid.zero_point.dtype)


def sigmoid(x: Array, x_grid: Grid, out_grid: Grid) -> Array:
    """QLinearSigmoid: a table of 256 entries, made in float32 with the engine's rational approximation."""
    return lookup(x, x_grid, out_grid, logistic)


def leaky_relu(x: Array, x_grid: Grid, out_grid: Grid, *, alpha: float) -> Array:
    """QLinearLeakyRelu: a table of 256 entries, made in float32."""
    return lookup(x, x_grid, out_grid, lambda v: np.where(v >= 0, v, np.float32(alpha) * v))


def concat(parts: Sequence[tuple[Array, Grid]], out_grid: Grid, *, axis: int) -> Array:
    """QLinearConcat: what lies on the grid of the result is copied, the rest goes through a table."""
    moved = [q if _same(g, out_grid) else lookup(q, g, out_grid, lambda v: v) for q, g in parts]
    return np.concatenate(moved, axis)


def lookup(x: Array, x_grid: Grid, out_grid: Grid, function: Pointwise) -> Array:
    """``quantize(function(dequantize(x)))`` in float32. Source: onnxruntime ``qlinear_lookup_table.cc``."""
    y = function(dequantize(x, x_grid.scale, x_grid.zero_point)).astype(np.float32)
    return quantize(y, out_grid.scale, out_grid.zero_point)


def softmax(x: Array, x_grid: Grid, out_grid: Grid, *, axis: int) -> Array:
    """QLinearSoftmax: exponentials from a float32 table, below the largest of each row, summed up in order.

    ``round_half_even(e * floor(1 / s_y) / sum(e)) + z_y``, multiplied and divided in float64: a scale of which the
    reciprocal is not whole is not kept.
    Source: onnxruntime ``qlinear_softmax.cc``.
    """
    rows = np.moveaxis(x, axis, -1).astype(np.int32)
    # the table stands as high as float32 allows: five bits of reserve below the largest sum
    room = np.log(np.finfo(np.float32).max / np.float32(rows.shape[-1]))
    shift = max(0.0, float(room) - 5) / float(x_grid.scale)
    table = np.exp((np.arange(256.0) - 255 + shift) * float(x_grid.scale)).astype(np.float32)
    powers = table[255 - rows.max(-1, keepdims=True) + rows]
    total = np.add.accumulate(powers, -1, dtype=np.float32)[..., -1:]
    steps = np.floor(np.float32(1) / np.float32(out_grid.scale))
    raw = np.rint(powers.astype(np.float64) * steps / total) + np.float32(out_grid.zero_point)
    return np.moveaxis(clamp(raw, out_grid.zero_point.dtype), -1, axis)


ALPHA = (4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03, 2.48287947061529e-01)
BETA = (
    6.10247389755681e-13,
    5.76102136993427e-09,
    6.29106785017040e-06,
    1.70198817374094e-03,
    1.16817656904453e-01,
    9.93151921023180e-01,
)


def logistic(x: Array) -> Array:
    """The engine's sigmoid in float32: ``x * p(x^2) / q(x^2) + 1/2``. Source: onnxruntime MLAS ``logistic.cpp``."""
    value = np.clip(x, np.float32(-18), np.float32(18))
    square = value * value
    top, bottom = (_polynomial(square, c) for c in (ALPHA, BETA))
    y: Array = np.clip(top * value / bottom + np.float32(0.5), np.float32(0), np.float32(1))
    return y


def _polynomial(x: Array, coefficients: Sequence[float]) -> Array:
    total: Array = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total = fused(total, x, np.asarray(c, np.float32))
    return total


def fused(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float32 with one rounding. Float64 holds the product exactly."""
    result: Array = (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)
    return result


def _one_for_many(a: Array, b: Array) -> bool:
    """Whether one element of A meets a row of B."""
    sizes = zip_longest(reversed(a.shape), reversed(b.shape), fillvalue=1)
    return next((m == 1 for m, n in sizes if (m, n) != (1, 1)), False)


def _same(a: Grid, b: Grid) -> bool:
    alike = a.scale == b.scale and a.zero_point == b.zero_point
    return bool(alike) and a.zero_point.dtype == b.zero_point.dtype
