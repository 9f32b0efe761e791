"""The integer reference: what an int8 region computes, in exact integers. The oracle of every proof."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def quantize(x: Array, scale: Array, zero_point: Array) -> Array:
    """ONNX QuantizeLinear: ``clamp(round_half_even(x / scale) + zero_point)`` in float32, true division."""
    span = np.iinfo(zero_point.dtype)
    raw = np.rint(x.astype(np.float32) / np.float32(scale)) + np.float32(zero_point)
    clipped: Array = np.clip(raw, span.min, span.max).astype(zero_point.dtype)
    return clipped


def dequantize(q: Array, scale: Array, zero_point: Array) -> Array:
    return ((q.astype(np.int32) - zero_point.astype(np.int32)).astype(np.float32) * scale).astype(np.float32)


def accumulate(x: Array, zero_point: int, weight: Array) -> Array:
    """``(x - zero_point) @ weight.T`` exactly, as int32. ``x`` is ``[..., K]``, ``weight`` ``[N, K]``.

    Float64 holds every partial sum exactly (below 2**53), so BLAS may add in any order. A sum beyond 32 bits wraps.
    """
    centred = x.astype(np.float64) - float(zero_point)
    total = centred @ weight.astype(np.float64).T
    return total.astype(np.int64).astype(np.int32)


def accumulate_pair16(x: Array, zero_point: int, weight: Array) -> Array:
    """The same on x86 with AVX2 and no VNNI: VPMADDUBSW saturates each pair sum to 16 bits before it is added.

    Pairs are (2i, 2i+1) along K. The kernel multiplies the raw u8 values and corrects by ``zero_point * sum(w)``.
    Source: Intel SDM vol. 2, VPMADDUBSW; onnxruntime MLAS ``QgemmU8S8KernelAvx2``.
    """
    shape = (*x.shape[:-1], len(weight))
    x, weight = x.reshape(-1, x.shape[-1]).astype(np.int32), weight.astype(np.int32)
    if x.shape[-1] % 2:
        x, weight = np.pad(x, ((0, 0), (0, 1))), np.pad(weight, ((0, 0), (0, 1)))
    pairs = x[:, None, 0::2] * weight[None, :, 0::2] + x[:, None, 1::2] * weight[None, :, 1::2]
    total = np.clip(pairs, -(2**15), 2**15 - 1).sum(-1, dtype=np.int32)
    corrected: Array = total - zero_point * weight.sum(-1, dtype=np.int32)
    return corrected.reshape(shape)


def linear(x: Array, x_scale: Array, zero_point: int, weight: Array, w_scale: Array, bias: Array | None) -> Array:
    """A linear with float output, in the arithmetic of MatMulIntegerToFloat and QGemm: float32 ``acc * (s_x * s_w)``.

    An int32 bias is added to the accumulator, a float bias to the result.
    """
    acc = accumulate(x, zero_point, weight)
    if bias is not None and bias.dtype == np.int32:
        acc = acc + bias
    y = acc.astype(np.float32) * (np.float32(x_scale) * w_scale.astype(np.float32))
    if bias is not None and bias.dtype != np.int32:
        y = y + bias
    result: Array = y.astype(np.float32)
    return result


def worst_pair(weight: Array) -> int:
    """The largest ``|w[2k]| + |w[2k+1]|`` of pairs of one sign along the last axis; at most 128 cannot overflow."""
    even = weight.shape[-1] // 2 * 2
    a, b = weight[..., 0:even:2].astype(np.int32), weight[..., 1:even:2].astype(np.int32)
    return int(np.where(a * b > 0, np.abs(a) + np.abs(b), np.maximum(np.abs(a), np.abs(b))).max(initial=0))
