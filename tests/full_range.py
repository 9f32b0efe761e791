"""A small network of convolutions and linears, prepared for the targets with and without full-range weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.backends import ort_cpu
from qatgraph.conversion import convert
from qatgraph.ir.graph import Graph
from qatgraph.planning.plan import Plan
from tests.models import floats


class Small(nn.Module):
    """An odd and a grouped convolution, a depthwise one, two linears: [batch, 3, 9, 9] -> [batch, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up, self.down = nn.Linear(200, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.depthwise(torch.relu(self.grouped(x))))
        y: Tensor = self.down(torch.relu(self.up(x.flatten(1))))
        return y


@dataclass(frozen=True)
class Made:
    model: nn.Module
    qat: nn.Module
    plan: Plan
    file: bytes
    batch: Tensor


@cache
def made(target: str) -> Made:
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():  # trained weights lean to one side; these do from the start
        for parameter in (p for p in model.parameters() if p.ndim > 1):
            parameter.add_(parameter.abs().max())
    batch = floats(2, 3, 9, 9, seed=1).abs()
    graph = qg.capture(model, batch, {"x": {0: "batch"}})
    plan = qg.plan(graph, target)
    qat = qg.prepare(graph, plan).eval()
    qg.calibrate(qat, [batch], progress=False)
    return Made(model, qat, plan, ort_cpu.lower(convert(Graph.of(qat)), plan), batch)
