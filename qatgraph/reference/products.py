"""Sums of products with 32-bit accumulators: MatMul, Gemm and Conv on integers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np

from qatgraph.reference.grids import Array, Grid, output_multiplier, requantize

Pads = Sequence[tuple[int, int]]


class ConvAccumulator(Protocol):
    """How a convolution adds its products up: ``accumulate_conv`` or ``accumulate_conv_pair16``."""

    def __call__(
        self,
        x: Array,
        zero_point: int,
        weight: Array,
        *,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int,
    ) -> Array: ...


class Accumulator(Protocol):
    """How a linear adds its products up: ``accumulate`` or ``accumulate_pair16``."""

    def __call__(self, x: Array, zero_point: int, weight: Array) -> Array: ...


def matmul_integer(a: Array, b: Array, a_zero: Array, b_zero: Array) -> Array:
    """ONNX MatMulInteger: ``(a - a_zero) @ (b - b_zero)``, int32. A zero point of A may be per row, of B per column.

    Float64 holds every partial sum exactly (below 2**53), so BLAS may add in any order. A sum beyond 32 bits wraps.
    """
    rows = np.asarray(a_zero, np.float64)
    centred = a.astype(np.float64) - (rows[..., None] if rows.ndim == 1 and rows.size > 1 else rows)
    return _int32(centred @ (b.astype(np.float64) - np.asarray(b_zero, np.float64)))


def accumulate(x: Array, zero_point: int, weight: Array) -> Array:
    """``(x - zero_point) @ weight.T`` exactly, as int32. ``x`` is ``[..., K]``, ``weight`` ``[N, K]``."""
    return matmul_integer(x, weight.T, np.asarray(zero_point), np.asarray(0))


def accumulate_conv(
    x: Array,
    zero_point: int,
    weight: Array,
    *,
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
) -> Array:
    """ONNX ConvInteger: exact int32 sums ``[N, O, *out]`` of ``x [N, C, *in]`` and ``weight [O, C / groups, *kernel]``.

    Any number of spatial axes; ``padding`` has one (before, after) for each and counts as ``zero_point``.
    A weight with a zero point comes centred, in a wider type. One BLAS product per kernel position.
    """
    centred = np.pad(x.astype(np.float64) - float(zero_point), [(0, 0), (0, 0), *padding])
    kernel, outputs = weight.shape[2:], len(weight)
    out = conv_shape(x.shape[2:], kernel, stride=stride, padding=padding, dilation=dilation)
    matrices = weight.reshape(groups, outputs // groups, weight.shape[1], *kernel).astype(np.float64)
    total = np.zeros((len(x), groups, outputs // groups, int(np.prod(out))))
    for position in product(*map(range, kernel)):
        seen = centred[window(position, out, stride, dilation)]
        here: tuple[Any, ...] = (..., *position)
        total += matrices[here] @ seen.reshape(len(x), groups, weight.shape[1], -1)
    return _int32(total.reshape(len(x), outputs, *out))


def conv_shape(
    size: Sequence[int], kernel: Sequence[int], *, stride: Sequence[int], padding: Pads, dilation: Sequence[int]
) -> tuple[int, ...]:
    """The spatial shape of what a window sees, one number per spatial axis; whole windows only."""
    axes = zip(size, kernel, stride, padding, dilation, strict=True)
    return tuple((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


def window(
    position: Sequence[int], out: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Any, ...]:
    """The index of the elements of a padded input that one kernel position meets; the spatial axes are the last."""
    axes = zip(position, out, stride, dilation, strict=True)
    return (..., *(slice(p * d, p * d + (n - 1) * s + 1, s) for p, n, s, d in axes))


def linear(
    x: Array,
    x_scale: Array,
    zero_point: int,
    weight: Array,
    w_scale: Array,
    bias: Array | None,
    *,
    accumulator: Accumulator = accumulate,
) -> Array:
    """A linear with float output, in the arithmetic of MatMulIntegerToFloat and QGemm: float32 ``acc * (s_x * s_w)``.

    An int32 bias is added to the accumulator, a float bias to the result.
    """
    acc = accumulator(x, zero_point, weight)
    if bias is not None and bias.dtype == np.int32:
        acc = acc + bias
    y = acc.astype(np.float32) * (np.float32(x_scale) * w_scale.astype(np.float32))
    if bias is not None and bias.dtype != np.int32:
        y = y + bias
    result: Array = y.astype(np.float32)
    return result


def matmul(a: Array, a_grid: Grid, b: Array, b_grid: Grid, out_grid: Grid) -> Array:
    """ONNX QLinearMatMul, ``[..., M, K] @ [..., K, N]``; the grid of B may be per column.

    Equals the engine: 0 steps.
    """
    acc = matmul_integer(a, b, a_grid.zero_point, b_grid.zero_point)
    return requantize(acc, output_multiplier(a_grid.scale, b_grid.scale, out_grid.scale), out_grid.zero_point)


def matmul_float(a: Array, a_grid: Grid, b: Array, b_grid: Grid) -> Array:
    """The product of two activations with float output, MatMulIntegerToFloat: float32 ``acc * (s_a * s_b)``."""
    acc = matmul_integer(a, b, a_grid.zero_point, b_grid.zero_point)
    result: Array = acc.astype(np.float32) * (np.float32(a_grid.scale) * np.float32(b_grid.scale))
    return result


def gemm(
    x: Array,
    x_grid: Grid,
    weight: Array,
    w_scale: Array,
    bias: Array | None,
    out_grid: Grid,
    *,
    accumulator: Accumulator = accumulate,
) -> Array:
    """A linear with integer output, ``weight [N, K]``, int32 bias: QGemm and QLinearMatMul.

    Equals the engine: 0 steps.
    """
    acc = accumulator(x, int(x_grid.zero_point), weight)
    if bias is not None:
        acc = acc + bias
    return requantize(acc, output_multiplier(x_grid.scale, w_scale, out_grid.scale), out_grid.zero_point)


def conv_float(
    x: Array,
    x_grid: Grid,
    weight: Array,
    w_scale: Array,
    bias: Array | None,
    *,
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
    accumulator: ConvAccumulator = accumulate_conv,
) -> Array:
    """A convolution with float result, float32 ``acc * (s_x * s_w) + bias``, bias float32 or int32 as in ``linear``."""
    zero, column = int(x_grid.zero_point), (-1, *[1] * (weight.ndim - 2))
    acc = accumulator(x, zero, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    if bias is not None and bias.dtype == np.int32:
        acc = acc + bias.reshape(column)
    unit = np.broadcast_to(np.float32(x_grid.scale) * w_scale.astype(np.float32), len(weight)).reshape(column)
    y = acc.astype(np.float32) * unit
    result: Array = y if bias is None or bias.dtype == np.int32 else y + bias.astype(np.float32).reshape(column)
    return result


def conv(
    x: Array,
    x_grid: Grid,
    weight: Array,
    w_scale: Array,
    bias: Array | None,
    out_grid: Grid,
    *,
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
    accumulator: ConvAccumulator = accumulate_conv,
) -> Array:
    """ONNX QLinearConv: integers of ``out_grid``; ``w_scale`` one or per output channel, int32 bias.

    Equals the engine: 0 steps. Source: onnxruntime ``qlinearconv.cc``.
    """
    zero = int(x_grid.zero_point)
    acc = accumulator(x, zero, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    column = (-1, *[1] * (weight.ndim - 2))
    if bias is not None:
        acc = acc + bias.reshape(column)
    multiplier = output_multiplier(x_grid.scale, w_scale, out_grid.scale).reshape(column)
    return requantize(acc, multiplier, out_grid.zero_point)


def _int32(total: Array) -> Array:
    wrapped: Array = total.astype(np.int64).astype(np.int32)
    return wrapped
