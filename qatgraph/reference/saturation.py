"""x86 with AVX2 and no VNNI: pair sums that saturate at 16 bits. What they make of a product, and where they can.

Source: Intel SDM vol. 2, VPMADDUBSW; onnxruntime MLAS ``QgemmU8S8KernelAvx2`` and ``qlinearconv.cc``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from qatgraph.reference.grids import Array, unsigned_shift
from qatgraph.reference.products import Pads, accumulate_conv, conv_shape, window

LOW, HIGH = -(2**15), 2**15 - 1
ACTIVATION = 255  # the largest, as the instruction sees it: unsigned


def k_rows(weight: Array, *, groups: int = 1) -> Array:
    """``[O, C / groups, *kernel]`` or ``[N, K]`` -> ``[O, K]`` in the order of the engine, which pairs (2i, 2i + 1).

    For a convolution that is ``[*kernel, C / groups]``, channel fastest. A pure depthwise one multiplies each weight
    alone: a zero stands behind each.
    """
    if weight.ndim == 2:
        return weight
    rows: Array = np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    if not _depthwise(weight, groups):
        return rows
    alone: Array = np.stack([rows, np.zeros_like(rows)], -1).reshape(len(rows), -1)
    return alone


def position_rows(weight: Array) -> Array:
    """``k_rows`` in the order of oneDNN, in which pairs start anew at each position: a 0 behind an odd last channel.

    Source: measured on OpenVINO 2026.4.1 with ``ONEDNN_MAX_CPU_ISA=AVX2``.
    """
    if weight.ndim == 2:
        return weight
    return _even(np.moveaxis(weight, 1, -1)).reshape(len(weight), -1)


def worst_pairs(rows: Array) -> Array:
    """Of each row the largest ``|w[2k]| + |w[2k+1]|`` of pairs of one sign; at most 128 cannot overflow, times 255."""
    a, b = (v.astype(np.int32) for v in _halves(rows))
    worst: Array = np.where(a * b > 0, np.abs(a) + np.abs(b), np.maximum(np.abs(a), np.abs(b))).max(-1, initial=0)
    return worst


def worst_pair(rows: Array) -> int:
    """The largest of all ``worst_pairs``."""
    return int(worst_pairs(rows).max(initial=0))


def accumulate_pair16(x: Array, zero_point: int, weight: Array) -> Array:
    """``accumulate`` as that CPU does it: each pair sum saturates to 16 bits before it is added.

    Pairs are (2i, 2i+1) along K; the partner of an odd last one is 0. The kernel multiplies the raw u8 values and
    corrects by ``zero_point * sum(w)``. The s8 activations of a Q/DQ file become u8 first, by adding 128 to them and to
    the zero point. Not so on that CPU: MatMulInteger on s8, ConvInteger, and products of u8 by u8 are exact.
    """
    x, zero_point = _unsigned(x, zero_point)
    rows = x.reshape(-1, x.shape[-1])
    total: Array = _saturated(rows, weight) - zero_point * weight.sum(-1, dtype=np.int64)
    return total.astype(np.int32).reshape(*x.shape[:-1], len(weight))


def accumulate_conv_pair16(
    x: Array,
    zero_point: int,
    weight: Array,
    *,
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
) -> Array:
    """``accumulate_conv`` as that CPU does it; padding enters as the zero point. Pure depthwise is exact there."""
    if _depthwise(weight, groups):
        return accumulate_conv(x, zero_point, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    x, zero_point = _unsigned(x, zero_point)
    out = conv_shape(x.shape[2:], weight.shape[2:], stride=stride, padding=padding, dilation=dilation)
    operands = _operands(x, zero_point, weight, out, stride, padding, dilation, groups)
    total = np.concatenate([_saturated(rows, w) for rows, w in operands], -1)
    total -= zero_point * k_rows(weight).sum(-1, dtype=np.int64)
    return np.moveaxis(total.reshape(len(x), *out, len(weight)), -1, 1).astype(np.int32)


def saturated_share(
    x: Array,
    zero_point: int,
    weight: Array,
    *,
    stride: Sequence[int] = (),
    padding: Pads = (),
    dilation: Sequence[int] = (),
    groups: int = 1,
) -> Array:
    """The share of pair sums that saturate on given integers, per output channel: ``[O]``, in [0, 1].

    A weight of two axes is that of a linear; else ``stride``, ``padding`` and ``dilation`` have one entry per spatial
    axis.
    """
    if weight.ndim > 2 and _depthwise(weight, groups):
        return np.zeros(len(weight))
    x, zero_point = _unsigned(x, zero_point)
    if weight.ndim == 2:
        return _share(x.reshape(-1, x.shape[-1]), weight)
    out = conv_shape(x.shape[2:], weight.shape[2:], stride=stride, padding=padding, dilation=dilation)
    operands = _operands(x, zero_point, weight, out, stride, padding, dilation, groups)
    return np.concatenate([_share(rows, w) for rows, w in operands])


def _operands(
    x: Array,
    zero_point: int,
    weight: Array,
    out: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
) -> Iterator[tuple[Array, Array]]:
    """Of each group what its windows see ``[N * out, K]`` and its weights ``[O / groups, K]``, as the engine has K."""
    padded = np.pad(x, [(0, 0), (0, 0), *padding], constant_values=zero_point)
    positions = product(*map(range, weight.shape[2:]))
    seen = np.stack([padded[window(p, out, stride, dilation)] for p in positions], 1)  # [N, P, C, *out]
    rows = np.moveaxis(seen, (1, 2), (-2, -1)).reshape(-1, seen.shape[1], groups, weight.shape[1])
    for group, part in enumerate(np.split(k_rows(weight), groups)):
        yield rows[:, :, group].reshape(len(rows), -1), part


def _saturated(rows: Array, weight: Array) -> Array:
    """The sums of raw products ``[R, O]``, int64, with every pair sum cut to 16 bits."""
    total = (rows.astype(np.float64) @ weight.astype(np.float64).T).astype(np.int64)
    for channels, sums in _pair_sums(rows, weight):
        total[:, channels] += np.clip(sums, LOW, HIGH) - sums
    return total


def _share(rows: Array, weight: Array) -> Array:
    count = np.zeros(len(weight))
    for channels, sums in _pair_sums(rows, weight):
        count[channels] += ((sums < LOW) | (sums > HIGH)).sum(0)
    pairs = -(-weight.shape[-1] // 2)
    share: Array = count / max(len(rows) * pairs, 1)
    return share


def _pair_sums(rows: Array, weight: Array) -> Iterator[tuple[Array, Array]]:
    """For each pair the output channels in which it can saturate, and its sums there ``[R, channels]``, int32."""
    even, odd = (v.astype(np.int32) for v in _halves(rows))
    for k, (a, b) in enumerate(zip(*(v.astype(np.int32).T for v in _halves(weight)), strict=True)):
        high, low = np.maximum(a, 0) + np.maximum(b, 0), np.minimum(a, 0) + np.minimum(b, 0)
        channels = np.flatnonzero((ACTIVATION * high > HIGH) | (ACTIVATION * low < LOW))
        if channels.size:
            yield channels, even[:, k, None] * a[channels] + odd[:, k, None] * b[channels]


def _halves(rows: Array) -> tuple[Array, Array]:
    """The first and the second of each pair along the last axis; an odd last one is paired with 0."""
    rows = _even(rows)
    return rows[..., 0::2], rows[..., 1::2]


def _even(rows: Array) -> Array:
    """With a 0 behind an odd last one."""
    return np.pad(rows, [*[(0, 0)] * (rows.ndim - 1), (0, 1)]) if rows.shape[-1] % 2 else rows


def _unsigned(x: Array, zero_point: int) -> tuple[Array, int]:
    shift = unsigned_shift(x.dtype)
    return x.astype(np.int16) + shift, zero_point + shift


def _depthwise(weight: Array, groups: int) -> bool:
    return weight.shape[1] == 1 and len(weight) == groups
