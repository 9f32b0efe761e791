"""Grids, and the ways between real numbers, accumulators and integers: the arithmetic of QuantizeLinear and kin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """``value = (q - zero_point) * scale``, one or per channel. The type of ``zero_point`` is that of the integers."""

    scale: Array
    zero_point: Array


def quantize(x: Array, scale: Array, zero_point: Array, *, axis: int = 1) -> Array:
    """ONNX QuantizeLinear: ``clamp(round_half_even(x / scale) + zero_point)`` in float32, true division.

    Scales and zero points of more than one element lie along ``axis``.
    """
    scale, zero = (_along(v, x.ndim, axis) for v in (np.asarray(scale, np.float32), zero_point))
    return clamp(np.rint(x.astype(np.float32) / scale) + zero.astype(np.float32), zero_point.dtype)


def multiply_quantize(x: Array, scale: Array, zero_point: Array) -> Array:
    """A quantize to u8 as OpenVINO does it, with one scale: ``round_half_even(x * m + b)``, x cut to the grid's ends.

    ``m = 255 / (high - low)`` and ``b = -low * m`` of the real ends of the grid, each step rounded to float32: the zero
    point is in before the rounding, and is not whole. Equals the engine: 0 steps. Source: openvino
    ``fake_quantize.cpp``.
    """
    assert zero_point.dtype == np.uint8
    low, high = ((np.float32(end) - np.float32(zero_point)) * np.float32(scale) for end in (0, 255))
    factor = np.float32(255) / (high - low)
    scaled = np.clip(x.astype(np.float32), low, high) * factor
    return clamp(np.rint(scaled + -low * factor), zero_point.dtype)


@dataclass(frozen=True)
class EngineQuantize:
    """How an engine makes integers of floats: ``alone``, the arithmetic of a quantize by itself.

    An engine that joins a quantize to a float operation in front rounds the two at other places. ``joined``: the kinds
    of these; ``near``: in steps of the grid, how near to the middle of two integers a value has to be for both to be
    right behind them.
    """

    alone: Callable[..., Array]
    joined: frozenset[str] = frozenset()
    near: float = 0.0

    def __call__(self, x: Array, scale: Array, zero_point: Array) -> Array:
        return self.alone(x, scale, zero_point)

    def least_and_largest(self, x: Array, scale: Array, zero_point: Array, *, behind: str) -> tuple[Array, Array]:
        """What it may make of each value behind an operation of a kind; a quantize is monotone."""
        if behind not in self.joined:
            return (self.alone(x, scale, zero_point),) * 2
        ends = (x + np.float32(sign * self.near) * scale for sign in (-1, 1))
        least, largest = (self.alone(end, scale, zero_point) for end in ends)
        return least, largest


def dequantize(q: Array, scale: Array, zero_point: Array, *, axis: int = 1) -> Array:
    """ONNX DequantizeLinear: ``(q - zero_point) * scale`` in float32."""
    scale, zero = (_along(np.asarray(v), q.ndim, axis) for v in (scale, zero_point))
    return ((q.astype(np.int32) - zero.astype(np.int32)).astype(np.float32) * scale).astype(np.float32)


def dynamic_quantize(x: Array) -> tuple[Array, Grid]:
    """ONNX DynamicQuantizeLinear: the u8 integers of ``x``, and the grid between its least and its largest value."""
    low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    scale = np.float32(1) if low == high else (high - low) / np.float32(255)
    grid = Grid(np.asarray(scale), np.asarray(clamp(np.rint(-low / scale), np.dtype(np.uint8))))
    return quantize(x, grid.scale, grid.zero_point), grid


def requantize(acc: Array, multiplier: Array, zero_point: Array) -> Array:
    """``clamp(round_half_even(acc * multiplier) + zero_point)``; acc int32, multiplier and the product float32.

    Source: onnxruntime MLAS ``MlasRequantizeOutput``. It rounds before the zero point is added.
    """
    return clamp(np.rint(acc.astype(np.float32) * multiplier) + np.float32(zero_point), zero_point.dtype)


def output_multiplier(x_scale: Array, w_scale: Array, y_scale: Array) -> Array:
    """``s_x * s_w / s_y`` in float32, in this order: what the integer products are requantized with."""
    x, w, y = (np.asarray(v, np.float32) for v in (x_scale, w_scale, y_scale))
    multiplier: Array = np.asarray(x * w / y)
    return multiplier


def unsigned_shift(dtype: np.dtype[Any]) -> int:
    """What the engine adds to s8 integers and zero points on x86, where its kernels run on u8."""
    return 128 if dtype == np.int8 else 0


def clamp(whole: Array, dtype: np.dtype[Any]) -> Array:
    """Whole numbers, in a type that they fit into, cut to the range of an integer type."""
    span = np.iinfo(dtype)
    cut: Array = np.clip(whole, span.min, span.max).astype(dtype)
    return cut


def _along(values: Array, ndim: int, axis: int) -> Array:
    """Shaped so that it broadcasts against an array of ``ndim`` dimensions along ``axis``."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * ndim
    shape[axis] = values.size
    return values.reshape(shape)
