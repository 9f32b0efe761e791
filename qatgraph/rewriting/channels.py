"""The channels of a layer's weight: where each kind of layer keeps them, and how to measure and scale them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qatgraph.ir.meta import record
from qatgraph.rewriting.matcher import attribute

LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d")


@dataclass(frozen=True)
class Channels:
    """A weight read as ``[groups, outputs, inputs, rest]``.

    A transposed convolution stores ``[inputs, outputs / groups, …]``, other layers ``[outputs, inputs / groups, …]``.
    ``block``: so many neighbouring columns of a linear read one channel, because its input was flattened.
    """

    groups: int = 1
    transposed: bool = False
    block: int = 1

    @classmethod
    def of(cls, layer: fx.Node, block: int = 1) -> Channels:
        return cls(attribute(layer, "groups") or 1, record(layer).kind.startswith("conv_transpose"), block)

    def split(self, weight: torch.Tensor) -> torch.Tensor:
        rows, columns = weight.shape[0] // self.groups, weight.shape[1] // self.block
        parts = weight.reshape(self.groups, rows, columns, -1)
        return parts.transpose(1, 2) if self.transposed else parts

    def output_range(self, weight: torch.Tensor) -> torch.Tensor:
        """The largest absolute value of each output channel."""
        return self.split(weight).abs().amax((2, 3)).flatten()

    def input_range(self, weight: torch.Tensor) -> torch.Tensor:
        """The largest absolute value of each input channel."""
        return self.split(weight).abs().amax((1, 3)).flatten()

    def scaled(
        self, weight: torch.Tensor, *, output: torch.Tensor | None = None, input: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Each output or input channel times its factor."""
        parts = self.split(weight)
        if output is not None:
            parts = parts * output.reshape(self.groups, -1, 1, 1)
        if input is not None:
            parts = parts * input.reshape(self.groups, 1, -1, 1)
        return (parts.transpose(1, 2) if self.transposed else parts).reshape(weight.shape)
