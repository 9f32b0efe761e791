"""Pools over the spatial axes of ``[N, C, *in]``, in the arithmetic of ONNX Runtime's integer kernels.

``ceil``: the last window may reach beyond the padded input, if it starts within the input or the padding in front.
The results equal those of the engine: 0 steps on x86 and 64-bit Arm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from qatgraph.reference.grids import Array, Grid, clamp, dequantize, requantize, unsigned_shift
from qatgraph.reference.products import Pads, window


def max_pool(
    x: Array,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    ceil: bool = False,
) -> Array:
    """MaxPool on the integers themselves; padding never wins."""
    lowest = np.iinfo(x.dtype).min
    pooled: Array = np.maximum.reduce([*_seen(x, (lowest, lowest), kernel, stride, padding, dilation, ceil)])
    return pooled


def average_pool(
    x: Array,
    x_grid: Grid,
    out_grid: Grid,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Pads,
    count_include_pad: bool,
    ceil: bool = False,
) -> Array:
    """QLinearAveragePool: float32 sums of dequantized values in the order of the window, and true divisions.

    ``round_half_even(sum / count / s_y + z_y)``: the zero point is in before the rounding. What lies beyond the
    padding never counts, as in torch; ONNX Runtime's kernel counts it where padding counts. A window over the whole
    input is a global pool. Source: onnxruntime ``qlinear_pool.cc``.
    """
    if tuple(kernel) == x.shape[2:] and not np.any(padding):
        return global_average_pool(x, x_grid, out_grid)
    each = (1,) * len(kernel)
    real = dequantize(x, x_grid.scale, x_grid.zero_point)
    total = sum(_seen(real, (0, 0), kernel, stride, padding, each, ceil))
    inside = np.ones((1, 1, *x.shape[2:]), np.float32)
    count = sum(_seen(inside, (float(count_include_pad), 0), kernel, stride, padding, each, ceil))
    shift = np.float32(unsigned_shift(out_grid.zero_point.dtype))
    raw = total / count / np.float32(out_grid.scale) + (np.float32(out_grid.zero_point) + shift)
    return clamp(np.rint(raw) - shift, out_grid.zero_point.dtype)


def global_average_pool(x: Array, x_grid: Grid, out_grid: Grid) -> Array:
    """QLinearGlobalAveragePool: an exact sum, requantized with float32 ``s_x / (s_y * count)``.

    Source: onnxruntime MLAS ``qlgavgpool.cpp``.
    """
    spatial = tuple(range(2, x.ndim))
    count = int(np.prod(x.shape[2:]))
    total = x.sum(spatial, dtype=np.int32, keepdims=True) - np.int32(int(x_grid.zero_point) * count)
    multiplier = np.asarray(x_grid.scale, np.float32) / (np.float32(out_grid.scale) * np.float32(count))
    return requantize(total, multiplier, out_grid.zero_point)


def _seen(
    x: Array,
    fill: tuple[float, float],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    ceil: bool,
) -> Iterator[Array]:
    """What each position of the window meets, ``[N, C, *out]``, in its order; ``fill``: in the padding, and beyond."""
    out, beyond = pool_windows(x.shape[2:], kernel, stride=stride, padding=padding, dilation=dilation, ceil=ceil)
    padded = np.pad(x, [(0, 0), (0, 0), *padding], constant_values=fill[0])
    padded = np.pad(padded, [(0, 0), (0, 0), *((0, more) for more in beyond)], constant_values=fill[1])
    for position in product(*map(range, kernel)):
        yield padded[window(position, out, stride, dilation)]


def pool_windows(
    size: Sequence[int],
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    ceil: bool,
) -> tuple[list[int], list[int]]:
    """Of each spatial axis: how many windows there are, and how far the last reaches beyond the padded input.

    Source: ONNX MaxPool-22.
    """
    counts, beyond = [], []
    for n, k, s, (before, after), d in zip(size, kernel, stride, padding, dilation, strict=True):
        reach, whole = (k - 1) * d + 1, before + n + after
        count = (-(-(whole - reach) // s) if ceil else (whole - reach) // s) + 1
        if ceil and (count - 1) * s >= before + n:
            count -= 1
        counts.append(count)
        beyond.append(max(0, (count - 1) * s + reach - whole))
    return counts, beyond
