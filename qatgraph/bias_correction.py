"""Bias correction: take the shift that quantization gives each output channel out of the layer's bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qatgraph.calibration import make_room_for_biases
from qatgraph.errors import TrainError
from qatgraph.ir.graph import Batch, Graph, arguments
from qatgraph.ir.meta import has_record, record
from qatgraph.progress import track
from qatgraph.quantizers.fake_quantize import FakeQuantize
from qatgraph.rewriting.channels import LAYERS


def correct_biases(qat: torch.nn.Module, batches: Sequence[Batch], *, progress: bool = True) -> None:
    """Make the mean of each output channel of every quantized layer what it is in float, layer after layer.

    Rounding the weights of a filter shifts its output by a constant, which the bias can take back (Nagel et al.,
    arXiv:1906.04721, section 4.2, on data). A layer is corrected on what the corrected layers before it give. Where
    many weights share few inputs, as in depthwise convolutions, this is most of the loss.

    The model runs twice on all batches at once, in evaluation mode: memory grows with them. Give some 100 samples.

    Args:
        qat: a calibrated model; its biases are changed in place. Layers without a bias, in float, or whose bias another
            layer reads too, stay as they are.
        batches: calibration batches.
        progress: show a progress bar on the terminal.

    Raises:
        TrainError: QG701 no batch, QG707 the model is not calibrated, QG702 NaN or infinity in a layer's output.
        CaptureError: QG110 a batch does not fit the captured model.
    """
    graph = Graph.prepared(qat)
    quantizers = [m for m in qat.modules() if isinstance(m, FakeQuantize)]
    if not batches:
        raise TrainError("QG701", "there is no batch to correct biases on", where="correct_biases", why="it is empty",
                         todo="give the calibration batches")  # fmt: skip
    if not all(m.on for m in quantizers):
        raise TrainError("QG707", "the model is not calibrated", where="correct_biases", why="its grids are unknown",
                         todo="call qatgraph.calibrate(qat, batches) before")  # fmt: skip
    for i, batch in enumerate(batches):
        graph.check_batch(batch, f"calibration batch {i}")
    layers = _layers(graph)
    with torch.no_grad(), _evaluating(qat):
        wanted = dict[fx.Node, torch.Tensor]()
        with _off(quantizers):
            for node, runs in _in_step(graph, batches, track(graph.module.graph.nodes, "float means", show=progress)):
                if node in layers:
                    wanted[node] = _mean(node, runs)
        for node, runs in _in_step(graph, batches, track(graph.module.graph.nodes, "correct biases", show=progress)):
            if node in layers:
                shift = wanted[node] - _mean(node, runs)
                layers[node].add_(shift)
                for run in runs:
                    _put_into(run, node, shift)
    make_room_for_biases(graph)


def _layers(graph: Graph) -> dict[fx.Node, torch.Tensor]:
    """The bias of every quantized layer that has one of its own."""
    found = {}
    for node in (n for n in graph.nodes if record(n).kind in LAYERS):
        roles = dict(arguments(node))
        weight, bias = roles["weight"], roles.get("bias")
        if bias is None or _kind(weight) != "fake_quantize" or len(bias.users) > 1:
            continue
        parameter = graph.parameter(bias)
        if parameter is not None:
            found[node] = parameter
    return found


def _kind(node: fx.Node) -> str:
    return record(node).kind if has_record(node) else ""


@dataclass
class _Run:
    """One batch on its way through the graph."""

    interpreter: fx.Interpreter
    env: dict[fx.Node, Any] = field(default_factory=dict)


def _in_step(graph: Graph, batches: Sequence[Batch], nodes: Any) -> Iterator[tuple[fx.Node, list[_Run]]]:
    """Node by node, all batches; what the caller puts in place of a result is what the nodes behind it read."""
    runs = []
    for batch in batches:
        interpreter = fx.Interpreter(graph.module)
        interpreter.args_iter = iter(graph.leaves(batch, "calibration batch"))
        interpreter.env = {}
        runs.append(_Run(interpreter, interpreter.env))
    for node in nodes:
        for run in runs:
            run.env[node] = run.interpreter.run_node(node)
        yield node, runs
        for run in runs:
            for done in run.interpreter.user_to_last_uses.get(node, ()):
                del run.env[done]


def _put_into(run: _Run, node: fx.Node, shift: torch.Tensor) -> None:
    """What the layers behind read is the corrected result."""
    run.env[node] = run.env[node] + shift.reshape(_along_channels(node, run.env[node].ndim))


def _mean(node: fx.Node, runs: Sequence[_Run]) -> torch.Tensor:
    """Of each output channel over all batches: ``[channels]``, float64 sums."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for run in runs:
        value = run.env[node]
        axis = _channel_axis(node, value.ndim)
        others = [d for d in range(value.ndim) if d != axis]
        total = total.to(value.device) + value.sum(others, dtype=torch.float64)
        count += value.numel() // value.shape[axis]
    if not bool(torch.isfinite(total).all()):
        raise TrainError(
            "QG702", "an activation contains NaN or infinity", where=record(node).name,
            why="it has no mean", todo="pin the node in float with a recipe line, or clean the data",
        )  # fmt: skip
    return (total / count).float()


def _channel_axis(node: fx.Node, ndim: int) -> int:
    return ndim - 1 if record(node).kind == "linear" else 1


def _along_channels(node: fx.Node, ndim: int) -> list[int]:
    return [-1 if d == _channel_axis(node, ndim) else 1 for d in range(ndim)]


@contextmanager
def _evaluating(qat: torch.nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in qat.modules()}
    try:
        qat.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _off(quantizers: Sequence[FakeQuantize]) -> Iterator[None]:
    """The model in float."""
    try:
        for module in quantizers:
            module.on = False
        yield
    finally:
        for module in quantizers:
            module.on = True
