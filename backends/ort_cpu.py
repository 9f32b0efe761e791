"""ONNX Runtime, CPU execution provider: lower, write, load, audit."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from qatgraph.backends import emulation, ort_taps
from qatgraph.backends.qdq_onnx import to_onnx, write_atomically
from qatgraph.errors import LowerError
from qatgraph.ir.graph import Graph
from qatgraph.kernels import KernelNode
from qatgraph.parity import RegionTap
from qatgraph.planning.plan import Plan
from qatgraph.planning.target import Target
from qatgraph.probing.cases import Engine
from qatgraph.reference import Array
from qatgraph.report.machine import check_cpu

REQUIRES = "qatgraph.requires"  # in the metadata of a file
write = write_atomically
run_on = emulation.run_on
can_emulate = emulation.available
# Nodes that only move or convert data: nobody expects an int8 kernel for them.
PLUMBING = frozenset({"QuantizeLinear", "DequantizeLinear", "Reshape", "Transpose", "Shape", "Cast", "Identity"})
# Nodes that move or pick elements of any type: on integers if what they read is.
MOVERS = frozenset(
    {"Gather", "MaxPool", "NhwcMaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Identity",
     "Split", "Tile", "Expand", "GatherElements", "DepthToSpace", "Resize", "ReduceMax", "ReduceMin"}
)  # fmt: skip
INT8_KERNELS = frozenset(
    {"QGemm", "MatMulIntegerToFloat", "QLinearMatMul", "QLinearConv", "QLinearAdd", "QLinearMul", "QLinearSoftmax",
     "QLinearSigmoid", "QLinearLeakyRelu", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearConcat",
     "QLinearWhere", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulNBits", "QAttention",
     "QEmbedLayerNormalization"}
)  # fmt: skip


def version() -> str:
    """Of the engine that is installed."""
    import onnxruntime

    return str(onnxruntime.__version__)


def lower(graph: Graph, plan: Plan) -> bytes:
    """Graph[QDQ] -> the bytes of an ONNX file."""
    metadata = {"qatgraph.plan": plan.hash(), "qatgraph.target": plan.target}
    if plan.requires:
        metadata[REQUIRES] = plan.requires
    return to_onnx(graph, plan, plan.opset, metadata)


def session(model: bytes | str, *, threads: int = 0, optimize: bool = True, **config: str) -> Any:
    """A session with ORT's default options; ``config`` are session config entries with ``__`` for ``.``.

    Without ``optimize`` the nodes run as they are written.

    Raises:
        LowerError: QG505 the engine refuses the file.
        VerifyError: QG610 the file bears that it would be quietly wrong on this CPU.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    config = {key.replace("__", "."): value for key, value in config.items()}
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    runner = create(model, options, ", ".join(f"{k}={v}" for k, v in config.items()))
    if config.get("session.x64quantprecision") != "1":
        check_cpu(runner.get_modelmeta().custom_metadata_map.get(REQUIRES, ""), f"metadata '{REQUIRES}'")
    return runner


def create(model: bytes | str, options: Any, where: str = "") -> Any:
    """A session; raises QG505 if ORT refuses the file."""
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
        create(model, options)
        return onnx.load(options.optimized_model_filepath).graph


def kernel_nodes(written: Any, graph: Any) -> list[KernelNode]:
    """The nodes of the engine's graph under the names of the written one.

    ORT keeps the name in int8 kernels, puts ``fused`` in front for an activation and the name of a fusion behind
    (``/GemmTransposeFusion/``), and names other fused nodes after their type (``BiasGelu``): such a node is known by
    its result, which is that of the last node in it. A convolution over blocks of channels bears the name of its
    result and ``_nchwc``.
    """
    from onnx import TensorProto

    bytes_ = (TensorProto.INT8, TensorProto.UINT8)
    tables = {i.name for i in graph.initializer if i.data_type in bytes_}
    integers = {i.name for i in graph.input if i.type.tensor_type.elem_type in bytes_}
    names, producers = {n.name for n in written.node}, {o: n for n in written.node for o in n.output}
    found = []
    for node in graph.node:
        moves = node.op_type in MOVERS and node.input[0] in integers
        int8 = moves or node.op_type in INT8_KERNELS or (node.op_type == "Gather" and node.input[0] in tables)
        if moves or _writes_integers(node):
            integers.update(node.output)
        found.append(KernelNode(_written_name(node, names, producers), node.op_type, int8, moves))
    return found


def _writes_integers(node: Any) -> bool:
    """A QGemm does with a scale of its result, which is its eighth input."""
    return (
        node.op_type.startswith("QLinear")
        or node.op_type == "QuantizeLinear"
        or (node.op_type == "QGemm" and len(node.input) > 7 and node.input[7] != "")
    )


def _written_name(node: Any, names: set[str], producers: dict[str, Any]) -> str:
    name = str(node.name.removeprefix("fused "))
    blocks = producers.get(name.removesuffix("_nchwc").removesuffix("_pre_q"))
    stem = name.removesuffix("/").rpartition("/")[0]
    if blocks is None and (name in names or stem in names):
        return name if name in names else stem
    last = blocks or producers.get(node.output[0])
    return name if last is None else str(_head(last, node.op_type, producers).name)


def _head(last: Any, kernel: str, producers: dict[str, Any]) -> Any:
    """The node of the kernel's own type, in front of what it took in; the last one if none is of it."""
    node = last
    while node is not None and node.op_type != kernel:
        node = producers.get(node.input[0]) if node.input else None
    return last if node is None else node


def product_constants(model: bytes) -> dict[str, dict[str, tuple[Array, ...]]]:
    """Of every product in the file with a constant int8 weight, by the name of its node and by role: (scale, zero
    point) of x, (integers, scale) of weight and bias.

    A weight is ``[N, K]``, or ``[O, C / groups, *kernel]`` of a convolution.
    """
    from onnx import numpy_helper

    graph = _parse(model).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    producers = {o: n for n in graph.node for o in n.output}
    found: dict[str, dict[str, tuple[Array, ...]]] = {}
    for node in (n for n in graph.node if n.op_type in ("MatMul", "Gemm", "Conv")):
        operands: dict[str, tuple[Array, ...]] = {}
        for role, value in zip(("x", "weight", "bias"), node.input, strict=False):
            source = producers.get(value)
            if source is None or source.op_type != "DequantizeLinear":
                continue
            parts = [constants.get(name, np.empty(0)) for name in source.input]
            if role == "x":
                operands[role] = tuple(parts[1:])
            elif source.input[0] in constants:
                operands[role] = tuple(parts[:2])
        if "weight" in operands:
            as_is = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
            weight, scale = operands["weight"]
            found[node.name] = {**operands, "weight": (weight if as_is else weight.T, scale)}
    return found


def bias_misfits(model: bytes) -> list[str]:
    """The products whose int32 bias does not count in ``s_x * s_w``: the engine adds it to the accumulator unseen."""
    return [
        name
        for name, roles in product_constants(model).items()
        if "bias" in roles and not np.array_equal(roles["bias"][1], roles["x"][0] * roles["weight"][1])
    ]


def tap(model: bytes, plan: Plan) -> tuple[bytes, dict[str, ort_taps.TapNames]]:
    """The file with the borders of every int8 region as outputs, and their names by node; see ``ort_taps``."""
    proto = _parse(model)
    names = ort_taps.tap(proto, plan)
    return proto.SerializeToString(), names


def run_taps(
    tapped: bytes, names: dict[str, ort_taps.TapNames], feeds: Iterable[dict[str, Array]]
) -> Iterator[tuple[list[RegionTap], dict[str, Array]]]:
    """Batch by batch, what the engine read and wrote at each region, and all of its outputs by name."""
    runner = session(tapped)
    outputs = [o.name for o in runner.get_outputs()]
    runs = ({**feed, **dict(zip(outputs, run(runner, feed), strict=True))} for feed in feeds)
    yield from ort_taps.read_taps(runs, names)


def engine(target: Target, isa: str, version: str) -> AbstractContextManager[Engine]:
    """ONNX Runtime on an instruction set and in a version, for probing; see ``ort_probe.engine``."""
    from qatgraph.backends import ort_probe

    return ort_probe.engine(target, isa, version)


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


def stamps(model: bytes) -> tuple[str, str]:
    """The hash of the plan that the file was lowered from, and what it says that it requires of the CPU; empty if it
    bears none, or is no ONNX file."""
    try:
        props = {p.key: p.value for p in _parse(model).metadata_props}
    except Exception:  # protobuf's own error; protobuf is onnx's dependency, not ours
        return "", ""
    return str(props.get("qatgraph.plan", "")), str(props.get(REQUIRES, ""))


def interface(model: bytes) -> tuple[list[str], list[str]]:
    """The names of the file's inputs and outputs."""

    graph = _parse(model).graph
    return [v.name for v in graph.input], [v.name for v in graph.output]
