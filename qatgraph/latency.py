"""How fast an artifact is against its float model, measured so that the ratio means something."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from qatgraph import api
from qatgraph.ir.graph import Batch, Graph, export_shapes
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.planning.target import builtin_for
from qatgraph.proof import feed_of
from qatgraph.report.machine import isa

FLOAT = Recipe(name="float", override=(Override(select="*", place="float", why="what the artifact is compared with"),))


def measure(model: torch.nn.Module, graph: Graph, artifact: Path, batch: Batch, backend_name: str) -> dict[str, Any]:
    """Median milliseconds of the artifact and two float files on a backend's engine, interleaved, one thread."""
    target = builtin_for(backend_name)
    plan = api.plan(graph, target, FLOAT)
    backend = api.load_backend(plan)
    feed = feed_of(graph, batch)
    with tempfile.TemporaryDirectory() as folder:
        stock, own = Path(folder) / "stock.onnx", Path(folder) / "own.onnx"
        export_float(model, graph, stock)
        lower_float(graph, own, target)
        files = {"engine_ms": artifact, "float_ms": stock, "float_same_options_ms": own}
        sessions = {name: backend.session(str(file), threads=1) for name, file in files.items()}
        times = backend.median_latencies(sessions, feed)
    return {
        "isa": isa(),
        **times,
        "ratio": times["float_ms"] / times["engine_ms"],
        "ratio_same_options": times["float_same_options_ms"] / times["engine_ms"],
        "batch": {name: list(array.shape) for name, array in feed.items()},
        "how": f"medians of 15 interleaved runs in one process, one thread, {backend.SESSION}; float_ms: "
        "torch.onnx.export(dynamo=True, opset_version=20) with its defaults; float_same_options_ms: the float model "
        f"lowered for {plan.target}, as the artifact is",
    }


def lower_float(graph: Graph, path: Path, target: str = "ort-cpu") -> None:
    """The float model, lowered as an artifact is: every operation pinned in float."""
    api.lower(api.prepare(graph, api.plan(graph, target, FLOAT)).eval(), path)


def export_float(model: torch.nn.Module, graph: Graph, path: Path) -> None:
    """The user's float model by torch's exporter with default options, opset 20."""
    from qatgraph.backends.qdq_onnx import quiet

    info = graph.info
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                info.args,
                kwargs=info.kwargs,
                dynamo=True,
                opset_version=20,
                dynamic_shapes=export_shapes(model, info.args, info.kwargs, info.dims),
                input_names=list(info.inputs),
                verbose=False,
            )
        assert program is not None
        program.save(str(path))
    finally:
        for module, mode in modes.items():
            module.training = mode
