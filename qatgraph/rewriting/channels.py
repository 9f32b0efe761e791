"""The channels of a layer's weight: where each kind of layer keeps them, and how to measure and scale them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qatgraph.ir.masks import Weight, weight_of
from qatgraph.ir.meta import record
from qatgraph.rewriting.edit import Edit
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


def problem_of(layer: fx.Node, role: str) -> str:
    """Why a weight or bias cannot be given other values; empty if it can."""
    argument, where = attribute(layer, role), f"the {role} of '{record(layer).name}'"
    if argument is None:
        return ""
    weight = weight_of(argument)
    if weight is None:
        return f"{where} is computed"
    if not isinstance(weight.stored, torch.nn.Parameter):
        return f"{where} is no parameter"
    names = (n for n in layer.graph.find_nodes(op="get_attr") if (w := weight_of(n)) and w.stored is weight.stored)
    readers = sum(len(n.users) for n in names)
    return f"{where} is shared" if readers > 1 or len(weight.argument.users) > 1 else ""


def replace_weight(layer: fx.Node, old: Weight, values: torch.Tensor, suffix: str, edit: Edit) -> None:
    """Let a layer read a new parameter, named after the old one; a mask stays before it."""
    values = values.detach().to(old.stored.dtype).requires_grad_(old.stored.requires_grad)
    reader = layer if old.mask is None else old.argument
    path = f"{str(old.parameter.target).removesuffix(f'/{suffix}')}/{suffix}"
    edit.reread(reader, old.parameter, edit.parameter(path, values, at=reader))
