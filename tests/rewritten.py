"""What the tests of passes share: small graphs, one pass run over them, and their text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qatgraph as qg
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from qatgraph.rewriting.manager import PassManager
from qatgraph.rewriting.passes import GraphPass
from qatgraph.rewriting.registry import make_pass
from tests.models import evidence, floats

X, Y = floats(2, 4), floats(2, 4, seed=1)


class Function(nn.Module):
    """A model that is one function; ``Function`` is the module that its operations are named after."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(x) if y is None else self.function(x, y)


class Weighted(nn.Module):
    """A function of the input and of one parameter for each of the given tensors, ``w0``, ``w1`` …"""

    def __init__(self, function: Callable[..., Any], *weights: Tensor) -> None:
        super().__init__()
        self.function, self.count = function, len(weights)
        for i, weight in enumerate(weights):
            self.register_parameter(f"w{i}", nn.Parameter(weight))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *(getattr(self, f"w{i}") for i in range(self.count)))


def of(function: Callable[..., Any], *inputs: Tensor) -> Graph:
    return qg.capture(Function(function), inputs or (X,))


def weighted(function: Callable[..., Any], x: Tensor, *weights: Tensor) -> Graph:
    return qg.capture(Weighted(function, *weights), x)


def after(graph: Graph, *names: str) -> Graph:
    """The graph after several passes."""
    return PassManager([p for p in map(make_pass, names) if isinstance(p, GraphPass)], leaves=graph.stage).run(graph)


def rewritten(name: str, graph: Graph) -> tuple[Graph, dict[str, str]]:
    """The graph after one pass, and what it refused: node -> reason."""
    one = make_pass(name)
    assert isinstance(one, GraphPass)
    manager = PassManager([one], leaves=graph.stage, evidence=evidence(graph))
    return manager.run(graph), {r.node: r.reason for r in manager.reports[0].refused}


def lines(graph: Graph) -> list[str]:
    """The operations without their types: ``fc:linear = linear(x, 'fc.weight')``."""
    return [line.strip().partition(" : ")[0] for line in str(graph).splitlines()[1:-1]]


def kinds(graph: Graph) -> list[str]:
    return [record(n).kind for n in graph.nodes]


def regions(graph: Graph) -> dict[str, list[str]]:
    """The kinds in each region."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if record(node).region:
            found.setdefault(record(node).region, []).append(record(node).kind)
    return found


def distance(one: Graph, other: Graph, *inputs: Tensor) -> float:
    """The largest difference between two graphs, over the largest value."""
    with torch.no_grad():
        pairs = zip(*(pytree.tree_leaves(g(*inputs)) for g in (one, other)), strict=True)
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
