"""Pruning masks: ``mul(weight, mask)`` of a parameter and a buffer stands for the weight of a layer.

``torch.nn.utils.prune``, a parametrization and ``keep-pruning-masks`` write it so. Whoever looks up the tensor of a
weight or bias asks here; training keeps both, and conversion multiplies once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qatgraph.ir.aliases import writes
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import has_record, record, value_of

ROLES = ("weight", "bias")  # of the arguments that may stand behind a mask


@dataclass(frozen=True)
class Weight:
    """A weight that a layer reads: its parameter, and its mask if it has one; ``argument`` is what the layer reads."""

    argument: fx.Node
    parameter: fx.Node
    mask: fx.Node | None = None

    @property
    def path(self) -> str:
        """Where a constant that is computed from it goes: one of its own for each mask."""
        return str(self.parameter.target) + (f"/{self.argument.name}" if self.mask is not None else "")

    @property
    def stored(self) -> torch.Tensor:
        """The parameter, as the mask has not touched it."""
        found = _tensor(self.parameter)
        assert found is not None
        return found

    @property
    def tensor(self) -> torch.Tensor:
        """The values that the layer reads, without a gradient."""
        mask = _tensor(self.mask) if self.mask is not None else None
        return self.stored.detach() if mask is None else self.stored.detach() * mask


def weight_of(argument: object) -> Weight | None:
    """The weight behind an argument of a layer; ``None`` if it is computed in another way."""
    if not isinstance(argument, fx.Node):
        return None
    if _tensor(argument) is not None:
        return Weight(argument, argument)
    return masked(argument)


def masked(node: fx.Node) -> Weight | None:
    """The weight that a product of a parameter and a buffer is, which does not make it larger."""
    if not has_record(node) or record(node).kind != "mul" or node.kwargs:
        return None
    for parameter, mask in (node.args, node.args[::-1]):
        values, factor = (_tensor(n) if isinstance(n, fx.Node) else None for n in (parameter, mask))
        if not isinstance(values, torch.nn.Parameter) or factor is None or isinstance(factor, torch.nn.Parameter):
            continue
        if any(writes(user) for user in mask.users):  # type: ignore[union-attr]
            continue  # a state of the model, not a constant
        if value_of(node).shape == values.shape:
            return Weight(node, parameter, mask)  # type: ignore[arg-type]
    return None


def _tensor(node: fx.Node) -> torch.Tensor | None:
    module = node.graph.owning_module
    return Graph(module).parameter(node) if module is not None else None
