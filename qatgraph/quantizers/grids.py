"""Scales and zero points: pure functions, the one place where a range or a weight becomes a grid."""

from __future__ import annotations

import torch

from qatgraph.specs import DType, QuantSpec, ScaleRule, Scheme

STORAGE = {DType.U8: torch.uint8, DType.S8: torch.int8, DType.S32: torch.int32}
# A pair of one sign may sum to 128: 255 * 128 = 32640 fits the signed 16-bit sum of VPMADDUBSW, 255 * 129 does not.
PAIR_LIMIT = 128
REDUCED_LIMIT = 63
BIAS_STEPS = 2**30
# The proof (docs/decisions/pair-safe-scales.md) needs |a| + |b| < 128 after a float32 division: four ulp of head room.
_HEAD_ROOM = 1.0 + 2.0**-20


def range_grid(low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (both float32, any shape) for values in ``[low, high]``; zero lies on the grid.

    An empty range (a dead tensor) gets scale 1.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if spec.scheme is Scheme.SYMMETRIC:
        scale = torch.maximum(-low, high) / spec.qmax
    else:
        span = high.double() - low.double()  # float32 would overflow where both ends are huge
        scale = (span / (spec.qmax - spec.qmin)).to(low.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).clamp(min=torch.finfo(torch.float32).tiny)
    if spec.scale is ScaleRule.POWER_OF_TWO:
        scale = power_of_two(scale)
    if spec.scheme is Scheme.SYMMETRIC:
        return scale, torch.zeros_like(scale)
    return scale, (spec.qmin + torch.round(-low / scale)).clamp(spec.qmin, spec.qmax)


def weight_scale(weight: torch.Tensor, spec: QuantSpec, floor: torch.Tensor | None = None) -> torch.Tensor:
    """The scale of a symmetric weight ``[out, in]`` (or a table): scalar, or one per channel of ``spec.axis``.

    ``floor``: no scale is smaller, see ``bias_floor``.
    Pair-safe scales bound every pair (2i, 2i+1) along K: the last axis of a matrix, and of a filter
    ``[out, in, *kernel]`` the input channels of each position. Where these are odd in number, pairs run on into the
    next position; by position they start anew at each.
    """
    weight = weight.detach()
    rows = weight.movedim(spec.axis, 0) if spec.axis else weight.movedim(1, -1)
    flat = rows.flatten(1)
    dims = [flat.ndim - 1] if spec.axis is not None else list(range(flat.ndim))
    top = flat.abs().amax(dim=dims)
    scale = top / (REDUCED_LIMIT if spec.scale is ScaleRule.REDUCED_RANGE else spec.qmax)
    if spec.scale is ScaleRule.PAIR_SAFE:
        scale = torch.maximum(scale, pair_share(flat).amax(dim=dims) * _HEAD_ROOM)
    if spec.scale is ScaleRule.PAIR_SAFE_BY_POSITION:
        scale = torch.maximum(scale, pair_share(rows).flatten(1).amax(dim=dims) * _HEAD_ROOM)
    if floor is not None:
        scale = torch.maximum(scale, floor)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).clamp(min=torch.finfo(torch.float32).tiny)
    return power_of_two(scale) if spec.scale is ScaleRule.POWER_OF_TWO else scale


def bias_floor(bias: torch.Tensor, x_scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The smallest weight scale with which a bias ``[out]`` counts at most 2**30 steps of ``s_x * s_w``.

    So it fits into int32 with as much room again for the products and for a bias that grows in training, and the step
    is not denormal. Of a channel whose bias needs it, weights of 2**-23 of the bias count as nothing. The cure of
    onnxruntime#22020.
    """
    tiny = torch.finfo(torch.float32).tiny
    floor = ((bias.detach().abs() / BIAS_STEPS).clamp(min=tiny) / x_scale).clamp(min=tiny)
    return floor.amax() if spec.axis is None else floor


def pair_share(weight: torch.Tensor) -> torch.Tensor:
    """``(|w[2k]| + |w[2k+1]|) / 128`` where both have one sign, else 0; an odd last column pairs with nothing."""
    even = weight.shape[-1] // 2 * 2
    a, b = weight[..., 0:even:2], weight[..., 1:even:2]
    if even == 0:
        return torch.zeros(*weight.shape[:-1], 1, dtype=weight.dtype, device=weight.device)
    share = a.abs() / PAIR_LIMIT + b.abs() / PAIR_LIMIT  # divided first: the sum of two huge weights is infinite
    return torch.where(a.sign() * b.sign() > 0, share, torch.zeros_like(a))


def power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The next power of two that is not smaller; exact, through the exponent."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), torch.where(mantissa == 0.5, exponent - 1, exponent))


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec_min: int, spec_max: int, axis: int | None
) -> torch.Tensor:
    """``clamp(round_half_even(x / scale) + zero_point)`` in float32 with a true division, as ONNX QuantizeLinear."""
    shape = channel_shape(x, axis)
    q = torch.round(x / scale.reshape(shape)).add_(zero_point.reshape(shape))
    return q.clamp_(spec_min, spec_max)


def channel_shape(x: torch.Tensor, axis: int | None) -> list[int]:
    return [] if axis is None else [-1 if i == axis else 1 for i in range(x.ndim)]
