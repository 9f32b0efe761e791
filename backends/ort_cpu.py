"""ONNX Runtime, CPU execution provider: lower, write, load, audit."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qatgraph.backends import emulation
from qatgraph.backends.qdq_onnx import to_onnx, write_atomically
from qatgraph.errors import LowerError
from qatgraph.ir.graph import Graph
from qatgraph.kernels import KernelNode
from qatgraph.parity import RegionTap
from qatgraph.planning.plan import Plan
from qatgraph.reference import Array

write = write_atomically
run_on = emulation.run_on
can_emulate = emulation.available
# Nodes that only move or convert data: nobody expects an int8 kernel for them.
PLUMBING = frozenset({"QuantizeLinear", "DequantizeLinear", "Reshape", "Transpose", "Shape", "Cast", "Identity"})
CORES = ("MatMul", "Gemm", "Gather")  # the node that carries an int8 region
INT8_KERNELS = frozenset(
    {"QGemm", "MatMulIntegerToFloat", "QLinearMatMul", "QLinearConv", "QLinearAdd", "QLinearMul", "QLinearSoftmax",
     "QLinearSigmoid", "QLinearLeakyRelu", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearConcat",
     "QLinearWhere", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulNBits", "QAttention",
     "QEmbedLayerNormalization"}
)  # fmt: skip


def lower(graph: Graph, plan: Plan) -> bytes:
    """Graph[QDQ] -> the bytes of an ONNX file."""
    metadata = {"qatgraph.plan": plan.hash(), "qatgraph.target": plan.target}
    return to_onnx(graph, plan, plan.opset, metadata)


def session(model: bytes | str, *, threads: int = 0, **config: str) -> Any:
    """A session with ORT's default options; ``config`` are session config entries with ``__`` for ``.``."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    for key, value in config.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    return _create(model, options)


def _create(model: bytes | str, options: Any) -> Any:
    import onnxruntime as ort

    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise LowerError(
            "QG505", "ONNX Runtime refuses the file", where="session", why=str(error).splitlines()[0],
            todo="run `qatgraph audit FILE.onnx`, or report it with the plan",
        ) from error  # fmt: skip


def audit(model: bytes | str) -> list[KernelNode]:
    """The nodes that ORT runs at its default options, by kernel."""
    return kernel_nodes(optimized_graph(model))


def optimized_graph(model: bytes | str) -> Any:
    """The graph that ORT really runs: it writes it at load time, we read it."""
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        _create(model, options)
        return onnx.load(options.optimized_model_filepath).graph


def kernel_nodes(graph: Any) -> list[KernelNode]:
    from onnx import TensorProto

    integers = {i.name for i in graph.initializer if i.data_type in (TensorProto.INT8, TensorProto.UINT8)}
    return [
        KernelNode(n.name, n.op_type, n.op_type in INT8_KERNELS or (n.op_type == "Gather" and n.input[0] in integers))
        for n in graph.node
    ]


def gemm_weights(model: bytes) -> dict[str, Array]:
    """The int8 weights ``[N, K]`` of every GEMM in the file, by the name of its node."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(model).graph
    constants = {i.name: i for i in graph.initializer}
    producers = {o: n for n in graph.node for o in n.output}
    found: dict[str, Array] = {}
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        source = producers.get(node.input[1])
        if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in constants:
            continue
        weight = numpy_helper.to_array(constants[source.input[0]])
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        found[node.name] = weight if turned else weight.T
    return found


def tap(model: bytes, plan: Plan) -> tuple[bytes, dict[str, tuple[str, str, str]]]:
    """The file with the borders of every int8 region as outputs, and (border, integers, result) names by node.

    Taps stand only at float borders and at outputs of quantize: exposing anything else would change the kernels.
    The caller audits the tapped file again.
    """
    import onnx

    proto = onnx.load_from_string(model)
    nodes = {n.name: n for n in proto.graph.node}
    producers = {o: n for n in proto.graph.node for o in n.output}
    names: dict[str, tuple[str, str, str]] = {}
    for prediction in plan.predictions:
        if not prediction.int8:
            continue
        core = nodes[next(f"{prediction.node}/{op}" for op in CORES if f"{prediction.node}/{op}" in nodes)]
        if core.op_type == "Gather":
            rows = next(n for n in proto.graph.node if core.output[0] in n.input)
            names[prediction.node] = (core.input[1], core.output[0], rows.output[0])
            continue
        result = nodes.get(f"{prediction.node}/Add", core).output[0]
        quantize = producers[producers[core.input[0]].input[0]]
        names[prediction.node] = (quantize.input[0], quantize.output[0], result)
    known = {v.name for v in [*proto.graph.input, *proto.graph.output]}
    for value in dict.fromkeys(v for group in names.values() for v in group):
        if value not in known:
            proto.graph.output.append(onnx.ValueInfoProto(name=value))
    return proto.SerializeToString(), names


def run_taps(
    tapped: bytes, names: dict[str, tuple[str, str, str]], feeds: Iterable[dict[str, Array]]
) -> Iterator[RegionTap]:
    """What the engine read and wrote at each region, batch by batch."""
    runner = session(tapped)
    outputs = [o.name for o in runner.get_outputs()]
    for feed in feeds:
        seen = {**feed, **dict(zip(outputs, runner.run(outputs, feed), strict=True))}
        for node, (border, integers, result) in names.items():
            yield RegionTap(node, seen[border], seen[integers], seen[result])


def median_latencies(
    sessions: dict[str, Any], feed: dict[str, Array], *, rounds: int = 15, warmup: int = 2
) -> dict[str, float]:
    """Median milliseconds of each session, run in turn (A B C A B C …) so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for i in range(warmup + rounds):
        for name, one in sessions.items():
            start = time.perf_counter()
            one.run(None, feed)
            if i >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def stamped_plan(model: bytes) -> str:
    """The hash of the plan that the file was lowered from; empty if it bears none."""
    import onnx

    props = {p.key: p.value for p in onnx.load_from_string(model).metadata_props}
    return str(props.get("qatgraph.plan", ""))


@dataclass(frozen=True)
class FileAudit:
    """``silent_float``: nodes between Q/DQ that ORT nevertheless runs in float. ``other``: nodes never quantized."""

    int8: list[KernelNode]
    silent_float: list[KernelNode]
    other: int

    def as_json(self) -> dict[str, Any]:
        return {
            "int8": [asdict(n) for n in self.int8],
            "silent_float": [asdict(n) for n in self.silent_float],
            "other": self.other,
        }


def audit_file(model: bytes) -> FileAudit:
    """What ORT runs of any QDQ model. A float node is silent when the *engine's* graph feeds it from a dequantize."""
    graph = optimized_graph(model)
    dequantized = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    nodes = kernel_nodes(graph)
    int8 = [k for k in nodes if k.int8]
    silent = [
        k
        for k, n in zip(nodes, graph.node, strict=True)
        if not k.int8 and n.op_type not in PLUMBING and any(i in dequantized for i in n.input)
    ]
    return FileAudit(int8, silent, sum(n.op_type not in PLUMBING for n in graph.node) - len(int8) - len(silent))
