"""Grids that are found at run time: of each tensor its own, as ONNX DynamicQuantizeLinear finds it."""

from __future__ import annotations

import torch

from qatgraph.quantizers.fake_quantize import FakeQuantize, straight_through

STEPS = 255


def dynamic_grid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (both float32, scalar) of a tensor of any shape, for u8; a tensor of zeros has scale 1.

    ``scale = (max - min) / 255`` with zero between the ends, all in float32, as the operator is defined: the same bits
    as ``reference.dynamic_quantize``.
    """
    low, high = torch.aminmax(x.detach())
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = torch.where(low == high, torch.ones_like(low), (high - low) / STEPS)
    return scale, torch.round(-low / scale).clamp(0, STEPS)


def round_dynamically(x: torch.Tensor) -> torch.Tensor:
    """The nearest points of the tensor's own grid, with the straight-through gradient."""
    scale, zero = dynamic_grid(x)
    return straight_through(x, scale, zero, 0, STEPS, None)


class DynamicFakeQuantize(FakeQuantize):
    """An activation on the grid of each tensor itself: there is nothing to observe, and no state.

    The grid spans the whole batch, as it does in the engine: a sample is rounded by what it is batched with.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return round_dynamically(x) if self.on else x
