"""The two operators of the stage qdq: ONNX QuantizeLinear and DequantizeLinear, in torch."""

from __future__ import annotations

import torch

from qatgraph.quantizers.grids import channel_shape, quantize


@torch.library.custom_op("qatgraph::quantize", mutates_args=())
def quantize_linear(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """float32 -> the integer type of ``zero_point``, per tensor."""
    span = torch.iinfo(zero_point.dtype)
    return quantize(x, scale, zero_point.float(), span.min, span.max, None).to(zero_point.dtype)


@quantize_linear.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("qatgraph::dequantize", mutates_args=())
def dequantize_linear(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    """Integers -> ``(q - zero_point) * scale`` in float32; ``axis`` counts when the scale is a vector."""
    shape = channel_shape(q, axis if scale.ndim else None)
    return (q.to(torch.int32) - zero_point.to(torch.int32).reshape(shape)).float() * scale.reshape(shape)


@dequantize_linear.register_fake
def _(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(q, dtype=torch.float32)


QUANTIZE = torch.ops.qatgraph.quantize.default
DEQUANTIZE = torch.ops.qatgraph.dequantize.default
