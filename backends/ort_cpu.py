"""ONNX Runtime, CPU execution provider: lower, write, load, audit."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qatgraph.backends import emulation
from qatgraph.backends.qdq_onnx import to_onnx, write_atomically
from qatgraph.errors import LowerError
from qatgraph.ir.graph import Graph
from qatgraph.kernels import KernelNode, owner
from qatgraph.parity import RegionTap, without_reference, write_integers
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
    config = {key.replace("__", "."): value for key, value in config.items()}
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return _create(model, options, ", ".join(f"{k}={v}" for k, v in config.items()))


def _create(model: bytes | str, options: Any, where: str = "") -> Any:
    import onnxruntime as ort

    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise LowerError(
            "QG505", "ONNX Runtime refuses the file", where=where or "default options", why=str(error).splitlines()[0],
            todo="run `qatgraph audit FILE.onnx`, or report it with the plan",
        ) from error  # fmt: skip


def run(runner: Any, feed: dict[str, Array]) -> list[Array]:
    """All outputs of a session, in the order of the file.

    Raises:
        LowerError: QG508 the engine fails on the batch.
    """
    try:
        found: list[Array] = runner.run(None, feed)
    except Exception as error:
        raise LowerError(
            "QG508", "ONNX Runtime fails when it runs the file", where="session", why=str(error).splitlines()[0],
            todo="pin the node that it names, or report it with the plan",
        ) from error  # fmt: skip
    return found


def audit(model: bytes | str) -> list[KernelNode]:
    """The nodes that ORT runs at its default options, by kernel."""
    graph = optimized_graph(model)
    return kernel_nodes(_parse(model).graph, graph)


def _parse(model: bytes | str) -> Any:
    import onnx

    return onnx.load(model) if isinstance(model, str) else onnx.load_from_string(model)


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


def kernel_nodes(written: Any, graph: Any) -> list[KernelNode]:
    """The nodes of the engine's graph under the names of the written one.

    ORT keeps the name in int8 kernels, puts ``fused`` in front for an activation, and names other fused nodes after
    their type (``BiasGelu``): such a node is known by its result, which is that of the last node in it.
    """
    from onnx import TensorProto

    integers = {i.name for i in graph.initializer if i.data_type in (TensorProto.INT8, TensorProto.UINT8)}
    names, producers = {n.name for n in written.node}, {o: n.name for n in written.node for o in n.output}
    found = []
    for node in graph.node:
        int8 = node.op_type in INT8_KERNELS or (node.op_type == "Gather" and node.input[0] in integers)
        name = node.name.removeprefix("fused ")
        known = name if name in names else producers.get(node.output[0], name)
        found.append(KernelNode(known, node.op_type, int8))
    return found


def gemm_weights(model: bytes) -> dict[str, Array]:
    """The int8 weights ``[N, K]`` of every GEMM in the file, by the name of its node."""
    found: dict[str, Array] = {}
    for node, operands in _gemms(model):
        if "weight" in operands:
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            found[node.name] = operands["weight"][0] if turned else operands["weight"][0].T
    return found


def bias_misfits(model: bytes) -> list[str]:
    """The GEMMs whose int32 bias does not count in ``s_x * s_w``: the engine adds it to the accumulator unseen."""
    return [
        node.name
        for node, operands in _gemms(model)
        if "bias" in operands
        and not ("weight" in operands and np.array_equal(operands["bias"][1], operands["x"][1] * operands["weight"][1]))
    ]


def _gemms(model: bytes) -> Iterator[tuple[Any, dict[str, tuple[Array, Array]]]]:
    """Every MatMul and Gemm, with (integers, scale) of its dequantized operands; those of x are not constants."""
    from onnx import numpy_helper

    graph = _parse(model).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    producers = {o: n for n in graph.node for o in n.output}
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        operands: dict[str, tuple[Array, Array]] = {}
        for role, value in zip(("x", "weight", "bias"), node.input, strict=False):
            source = producers.get(value)
            if source is None or source.op_type != "DequantizeLinear":
                continue
            if role == "x" or source.input[0] in constants:
                operands[role] = constants.get(source.input[0], np.empty(0)), constants[source.input[1]]
        yield node, operands


def tap(model: bytes, plan: Plan) -> tuple[bytes, dict[str, tuple[str, str, str]]]:
    """The file with the borders of every int8 region as outputs, and (border, integers, result) names by node.

    Taps stand only at float borders and at outputs of quantize: exposing anything else would change the kernels.
    The caller audits the tapped file again. A region that the file does not hold, or that has no reference, gets no
    tap; behind a kernel that writes integers the border has no name.
    """
    import onnx

    proto = _parse(model)
    nodes = {n.name: n for n in proto.graph.node}
    untapped, hidden = without_reference(plan), write_integers(plan)
    regions = ((p.node, _region(p.node, nodes)) for p in plan.predictions if p.int8 and p.node not in untapped)
    names = {node: region for node, region in regions if region is not None}
    inside = {o for n in proto.graph.node if owner(n.name) in hidden for o in n.output}
    names = {node: ("" if border in inside else border, q, out) for node, (border, q, out) in names.items()}
    known = {v.name for v in [*proto.graph.input, *proto.graph.output]}
    for value in dict.fromkeys(v for group in names.values() for v in group if v):
        if value not in known:
            proto.graph.output.append(onnx.ValueInfoProto(name=value))
    return proto.SerializeToString(), names


def _region(name: str, nodes: dict[str, Any]) -> tuple[str, str, str] | None:
    """(border, integers, result) of the planned node's region, if it is in the file with Q and DQ around it."""
    core = next((nodes[n] for n in (f"{name}/{op}" for op in CORES) if n in nodes), None)
    if core is None:
        return None
    if core.op_type == "Gather":
        readers = (n for n in nodes.values() if core.output[0] in n.input and n.op_type == "DequantizeLinear")
        rows = next(readers, None)
        return (core.input[1], core.output[0], rows.output[0]) if rows is not None else None
    producers = {o: n for n in nodes.values() for o in n.output}
    dequantize = producers.get(core.input[0])
    quantize = producers.get(dequantize.input[0]) if dequantize is not None else None
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    return quantize.input[0], quantize.output[0], nodes.get(f"{name}/Add", core).output[0]


def run_taps(
    tapped: bytes, names: dict[str, tuple[str, str, str]], feeds: Iterable[dict[str, Array]]
) -> Iterator[tuple[list[RegionTap], dict[str, Array]]]:
    """Batch by batch, what the engine read and wrote at each region, and all of its outputs by name."""
    runner = session(tapped)
    outputs = [o.name for o in runner.get_outputs()]
    for feed in feeds:
        seen = {**feed, **dict(zip(outputs, run(runner, feed), strict=True))}
        yield [RegionTap(node, seen.get(border), seen[q], seen[out]) for node, (border, q, out) in names.items()], seen


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
    """The hash of the plan that the file was lowered from; empty if it bears none, or is no ONNX file."""

    try:
        props = {p.key: p.value for p in _parse(model).metadata_props}
    except Exception:  # protobuf's own error; protobuf is onnx's dependency, not ours
        return ""
    return str(props.get("qatgraph.plan", ""))


def interface(model: bytes) -> tuple[list[str], list[str]]:
    """The names of the file's inputs and outputs."""

    graph = _parse(model).graph
    return [v.name for v in graph.input], [v.name for v in graph.output]


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
    nodes = kernel_nodes(_parse(model).graph, graph)
    int8 = [k for k in nodes if k.int8]
    lookups = {o for k, n in zip(nodes, graph.node, strict=True) if k.int8 and k.kernel == "Gather" for o in n.output}
    dequantized = {  # the rows of an int8 table become float by a dequantize of their own
        o for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in lookups for o in n.output
    }
    silent = [
        k
        for k, n in zip(nodes, graph.node, strict=True)
        if not k.int8 and n.op_type not in PLUMBING and any(i in dequantized for i in n.input)
    ]
    return FileAudit(int8, silent, sum(n.op_type not in PLUMBING for n in graph.node) - len(int8) - len(silent))
