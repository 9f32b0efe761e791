"""Calibration: find the activation ranges on batches, streaming."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qatgraph.errors import TrainError
from qatgraph.ir.graph import Batch, Graph
from qatgraph.progress import track
from qatgraph.quantizers.fake_quantize import ActivationFakeQuantize, FakeQuantize


def calibrate(qat: torch.nn.Module, batches: Iterable[Batch], *, progress: bool = True) -> None:
    """Run batches through a prepared model, then fix every grid and switch the quantizers on.

    Memory does not grow with the number of batches. Runs in evaluation mode and restores the mode.

    Args:
        qat: what ``qatgraph.prepare`` returned.
        batches: any iterable of batches (a tensor, a tuple of positional or a dict of keyword arguments each).
        progress: show a progress bar on the terminal.

    Raises:
        TrainError: QG701 no batch, QG702 NaN or infinity in an activation.
        CaptureError: QG110 a batch does not fit the captured model.
    """
    graph = Graph.of(qat)
    activations = {n: m for n, m in qat.named_modules() if isinstance(m, ActivationFakeQuantize)}
    training, count = qat.training, 0
    qat.eval()
    try:
        for module in activations.values():
            module.observing = True
        with torch.no_grad():
            for batch in track(batches, "calibrate", show=progress):
                graph.check_batch(batch, f"calibration batch {count}")
                graph.run(batch)
                count += 1
    finally:
        for module in activations.values():
            module.observing = False
        qat.train(training)
    if count == 0:
        raise TrainError(
            "QG701", "there is no batch to calibrate on", where="calibrate", why="the iterable is empty or used up",
            todo="give at least one batch; a generator can be used only once",
        )  # fmt: skip
    for name, module in activations.items():
        low, high = module.observer.range(module.spec)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise TrainError(
                "QG702",
                "an activation contains NaN or infinity",
                where=name,
                why="no scale can be computed for it (a mask of -inf, an overflow, or bad data)",
                todo="pin the node in float with a recipe line, or clean the data",
            )
    for module in activations.values():
        module.settle()
    for other in qat.modules():
        if isinstance(other, FakeQuantize):
            other.switch_on()
