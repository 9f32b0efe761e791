"""Calibration: find the activation ranges on batches, streaming."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import fx

from qatgraph.errors import TrainError
from qatgraph.ir.graph import Batch, Graph
from qatgraph.ir.masks import weight_of
from qatgraph.ir.meta import record
from qatgraph.ir.names import quantizer_name
from qatgraph.planning.constraints import Port
from qatgraph.planning.plan import Plan
from qatgraph.progress import track
from qatgraph.quantizers.fake_quantize import ActivationFakeQuantize, FakeQuantize, WeightFakeQuantize
from qatgraph.quantizers.findings import findings
from qatgraph.quantizers.grids import bias_floor
from qatgraph.regions import behind_padding


def calibrate(qat: torch.nn.Module, batches: Iterable[Batch], *, progress: bool = True) -> list[str]:
    """Run batches through a prepared model, then fix every grid and switch the quantizers on.

    Every call starts anew: it observes the float model (with its present weights), and what an earlier calibration saw
    is forgotten. Memory does not grow with the number of batches. Runs in evaluation mode and restores the mode; after
    an error the model is as it was.

    Args:
        qat: what ``qatgraph.prepare`` returned.
        batches: any iterable of batches (a tensor, a tuple of positional or a dict of keyword arguments each).
        progress: show a progress bar on the terminal.

    Returns:
        What is odd about the grids, in sentences: see ``quantizers.findings``.

    Raises:
        TrainError: QG701 no batch, where a grid needs one: those that are found at run time, and those of weights, do
            not. QG702 NaN or infinity in an activation.
        CaptureError: QG110 a batch does not fit the captured model.
    """
    graph = Graph.prepared(qat)
    quantizers = {n: m for n, m in qat.named_modules() if isinstance(m, FakeQuantize)}
    activations = {n: m for n, m in quantizers.items() if isinstance(m, ActivationFakeQuantize)}
    with _observing(qat, quantizers.values()), torch.no_grad():
        count = 0
        for batch in track(batches, "calibrate", show=progress):
            graph.check_batch(batch, f"calibration batch {count}")
            graph.run(batch)
            count += 1
        if count == 0 and activations:
            raise TrainError(
                "QG701", "there is no batch to calibrate on", where="calibrate", why="the iterable is empty or used up",
                todo="give at least one batch; a generator can be used only once",
            )  # fmt: skip
        for path, module in activations.items():
            _check_range(path, module)
    for module in activations.values():
        module.settle()
    _coarsen(graph, {quantizer_name(path): module for path, module in activations.items()})
    for other in quantizers.values():
        other.switch_on()
    make_room_for_biases(graph)
    return findings(graph)


def _coarsen(graph: Graph, modules: dict[str, ActivationFakeQuantize]) -> None:
    """No result has finer steps than its kernel can write, from those that it reads."""
    plan: Plan = graph.info.plan
    for prediction in (p for p in plan.predictions if p.finest):
        x, out = (plan.quantizer_at(Port(prediction.node, role)) for role in ("x", "out"))
        assert x is not None
        assert out is not None
        modules[out.name].settle(prediction.finest * float(modules[x.name].scale))


def make_room_for_biases(graph: Graph) -> None:
    """No weight scale is so small that the bias of its channel, in units of ``s_x * s_w``, would overflow int32."""
    modules = dict(graph.module.named_modules(remove_duplicate=False))
    for module in modules.values():
        if isinstance(module, WeightFakeQuantize):
            module.floor.zero_()
    integer = {p.node for p in graph.info.plan.placements if p.bias == "int32"}
    for node in (n for n in graph.nodes if record(n).name in integer):
        x, weight = (modules[str(_past_dropout(a, modules).target)] for a in node.args[:2])
        bias = weight_of(node.args[2])
        assert isinstance(x, ActivationFakeQuantize)
        assert isinstance(weight, WeightFakeQuantize)
        assert bias is not None
        weight.floor.copy_(torch.maximum(weight.floor, bias_floor(bias.tensor, x.scale, weight.spec)))


def _past_dropout(argument: object, modules: dict[str, torch.nn.Module]) -> fx.Node:
    assert isinstance(argument, fx.Node)
    dropout = isinstance(modules.get(str(argument.target)), torch.nn.Dropout)
    return _past_dropout(argument.args[0], modules) if dropout else behind_padding(argument)


@contextmanager
def _observing(qat: torch.nn.Module, quantizers: Iterable[FakeQuantize]) -> Iterator[None]:
    """Evaluation mode, every quantizer off, every observer new. After an error all is as it was."""
    on = {m: m.on for m in quantizers}
    observers = {m: m.observer for m in on if isinstance(m, ActivationFakeQuantize)}
    for module, observer in observers.items():
        module.observer, module.observing = observer.fresh(), True
    modes = {m: m.training for m in qat.modules()}
    try:
        qat.eval()
        for other in on:
            other.on = False
        yield
    except BaseException:
        for module, observer in observers.items():
            module.observer = observer
        for other, flag in on.items():
            other.on = flag
        raise
    finally:
        for module in observers:
            module.observing = False
        for each, mode in modes.items():
            each.training = mode


def _check_range(path: str, module: ActivationFakeQuantize) -> None:
    low, high = module.observer.range(module.spec)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise TrainError(
            "QG702",
            "an activation contains NaN or infinity",
            where=quantizer_name(path),
            why="no scale can be computed for it (a mask of -inf, an overflow, or bad data)",
            todo="pin the node in float with a recipe line, or clean the data",
        )
