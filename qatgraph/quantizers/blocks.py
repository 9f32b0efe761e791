"""Weights in blocks: so many neighbours along K share a scale."""

from __future__ import annotations

import torch
from torch.nn import functional

from qatgraph.quantizers.fake_quantize import FakeQuantize, straight_through
from qatgraph.quantizers.grids import quantize
from qatgraph.specs import QuantSpec


def block_scale(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The scales ``[N, ceil(K / block)]`` of a symmetric weight ``[N, K]``; a block of zeros has scale 1."""
    scale = in_blocks(weight.detach(), _size(spec)).abs().amax(-1) / spec.qmax
    return torch.where(scale > 0, scale, torch.ones_like(scale)).clamp(min=torch.finfo(torch.float32).tiny)


def in_blocks(weight: torch.Tensor, size: int) -> torch.Tensor:
    """``[N, K]`` -> ``[N, ceil(K / size), size]``, with zeros behind the last."""
    return functional.pad(weight, (0, -weight.shape[1] % size)).reshape(len(weight), -1, size)


def out_of_blocks(blocks: torch.Tensor, k: int) -> torch.Tensor:
    """``[N, blocks, size]`` -> ``[N, k]``."""
    return blocks.flatten(1)[:, :k]


def _size(spec: QuantSpec) -> int:
    assert spec.block is not None
    return spec.block


class BlockFakeQuantize(FakeQuantize):
    """A weight ``[N, K]`` on the grids of its blocks, which follow it: they are computed in each forward, and at
    conversion by the same function."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.on:
            return weight
        scale = block_scale(weight, self.spec).flatten()
        blocks = in_blocks(weight, _size(self.spec))
        zero = torch.zeros((), device=weight.device).expand_as(scale)
        rows = straight_through(blocks.flatten(0, 1), scale, zero, self.spec.qmin, self.spec.qmax, 0)
        return out_of_blocks(rows.reshape(blocks.shape), weight.shape[1])

    def integers(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(int8 weight [N, K], scale [N, ceil(K / block)])``; of 4 bits, too, a byte holds one."""
        with torch.no_grad():
            scale, blocks = block_scale(weight, self.spec), in_blocks(weight, _size(self.spec))
            flat = scale.flatten()
            q = quantize(blocks.flatten(0, 1), flat, torch.zeros_like(flat), self.spec.qmin, self.spec.qmax, 0)
        return out_of_blocks(q.reshape(blocks.shape), weight.shape[1]).to(torch.int8).contiguous(), scale
