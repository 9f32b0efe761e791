"""A model of two linears, and data; each option plants one fault."""

from __future__ import annotations

import time

import torch
from torch import nn

import qatgraph as qg


class Tiny(nn.Module):
    def __init__(self, width: int, branch: bool) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 8)
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(torch.relu(self.first(x)))
        if self.branch and h.sum() > 0:  # the line that the error must show
            h = -h
        y: torch.Tensor = self.second(h)
        return y


def model(seed: int, width: int = 16, branch: bool = False, nan: bool = False) -> nn.Module:
    net = Tiny(width, branch).eval()
    if nan:
        with torch.no_grad():
            net.first.weight[0, 0] = float("nan")
    return net


def data(seed: int, fault: str = "") -> qg.JobData:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(4, 8, generator=generator) for _ in range(4)]
    train = list(batches)
    calibrate, evaluate = batches[:2], batches[2:]
    if fault == "nan":
        calibrate = [batches[0], torch.full((4, 8), float("nan"))]
    if fault == "dtype":
        calibrate = [batches[0], batches[1].double()]
    if fault == "rank":
        calibrate = [batches[0], batches[1].unsqueeze(0)]
    if fault == "empty":
        calibrate = []
    if fault == "nothing to evaluate":
        evaluate = []
    if fault == "nan in training":
        train = [torch.full((4, 8), float("nan"))]
    if fault == "nothing to train on":
        train = []
    if fault == "interrupt":
        raise KeyboardInterrupt
    if fault == "slow":
        time.sleep(60)
    return qg.JobData(calibrate=calibrate, evaluate=evaluate, train=train, latency=batches[0], facts={"seed": seed})
