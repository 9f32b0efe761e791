"""What a pass may look at besides the graph: calibration data, and the plan as it would be made now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qatgraph.ir.graph import Batch, Graph

ROWS = 1024  # kept of each value


@dataclass(frozen=True)
class Evidence:
    """``batches`` are calibration data; ``plan`` makes the plan of a graph, for the user's target and recipe."""

    batches: Sequence[Batch]
    plan: Callable[[Graph], Any]
    progress: bool = False


@dataclass(frozen=True)
class Sample:
    """Of one value: evenly spaced ``rows`` ``[n, channels]``, and the largest ``|x|`` of each channel over all rows.

    In float32, whatever the model computes in.
    """

    rows: torch.Tensor
    top: torch.Tensor


def sample(graph: Graph, batches: Sequence[Batch], values: Iterable[fx.Node]) -> dict[fx.Node, Sample]:
    """Run the graph on every batch, in evaluation mode, and keep a bounded part of these values.

    Raises:
        CaptureError: QG110 a batch does not fit the captured model.
    """
    watch = _Watch(graph.module, list(values), -(-ROWS // max(1, len(batches))))
    modes = {module: module.training for module in graph.module.modules()}
    graph.module.eval()
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches):
                where = f"calibration batch {number}"
                graph.check_batch(batch, where)
                watch.run(*graph.leaves(batch, where))
    finally:
        for module, training in modes.items():
            module.training = training
    return {n: Sample(torch.cat(rows).cpu(), watch.top[n].cpu()) for n, rows in watch.rows.items()}


class _Watch(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, values: list[fx.Node], share: int) -> None:
        super().__init__(module)
        self.share = share
        self.rows: dict[fx.Node, list[torch.Tensor]] = {n: [] for n in values}
        self.top: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.rows:
            rows = value.reshape(-1, value.shape[-1])
            step = max(1, -(-len(rows) // self.share))
            self.rows[n].append(rows[::step].to(torch.float32, copy=True))
            top = rows.abs().amax(0).float()
            self.top[n] = torch.maximum(self.top[n], top) if n in self.top else top
        return value
