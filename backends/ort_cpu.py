"""ONNX Runtime, CPU execution provider: lower, write, load, audit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from qatgraph import reference
from qatgraph.backends import artifact, emulation, onnx_borders, onnx_taps, timing
from qatgraph.backends.artifact import REQUIRES, metadata, parse
from qatgraph.backends.qdq_onnx import to_onnx, write_atomically
from qatgraph.errors import LowerError
from qatgraph.ir.graph import Graph
from qatgraph.kernels import DEQUANTIZE, QUANTIZE, KernelNode
from qatgraph.parity import RegionTap
from qatgraph.planning.plan import Plan
from qatgraph.planning.target import Target
from qatgraph.probing.cases import Engine
from qatgraph.reference import Array
from qatgraph.report.machine import check_cpu

# beside what is defined here, a backend has these
write = write_atomically
stamps = artifact.stamps
interface = artifact.interface
output_grids = artifact.output_grids
product_constants = artifact.product_constants
bias_misfits = artifact.bias_misfits
median_latencies = timing.median_latencies
run_on = emulation.run_on
can_emulate = emulation.available
quantize = reference.EngineQuantize(reference.quantize)
NAME = "ONNX Runtime"
SHOWS_CONVERSIONS = True  # what is quantized and dequantized stands in the graph that it runs
SAME_EVERYWHERE = True  # bit for bit on AVX2 and later
AUDITED = "the optimized graph that ORT writes at default options"
SESSION = "ONNX Runtime defaults"
PRECISE = {"session__x64quantprecision": "1"}  # session options under which no sum passes through 16 bits
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
    return to_onnx(graph, plan, plan.opset, metadata(graph, plan))


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
    return kernel_nodes(parse(model).graph, graph)


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
    found, turned = [], dict[str, str]()
    for node in graph.node:
        if node.op_type == "Transpose":
            turned[node.output[0]] = turned.get(node.input[0], node.input[0])
        moves = node.op_type in MOVERS and node.input[0] in integers
        int8 = moves or node.op_type in INT8_KERNELS or (node.op_type == "Gather" and node.input[0] in tables)
        if moves or _writes_integers(node):
            integers.update(node.output)
        reads = turned.get(node.input[0], node.input[0]) if node.input else ""
        # around a transpose the engine inserts some of its own, which are named after their type and perhaps a number
        inserted = node.op_type in (QUANTIZE, DEQUANTIZE) and node.name.partition("_token_")[0] == node.op_type
        name = node.op_type if inserted else _written_name(node, names, producers)
        found.append(KernelNode(name, node.op_type, int8, moves, reads))
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


def tap(model: bytes, plan: Plan) -> tuple[bytes, dict[str, onnx_taps.TapNames]]:
    """The file with the borders of every int8 region as outputs, and their names by node; see ``onnx_taps``."""
    proto = parse(model)
    names = onnx_taps.tap(proto, plan)
    return proto.SerializeToString(), names


def run_taps(
    tapped: bytes, names: dict[str, onnx_taps.TapNames], feeds: Iterable[dict[str, Array]]
) -> Iterator[tuple[list[RegionTap], dict[str, Array]]]:
    """Batch by batch, what the engine read and wrote at each region, and all of its outputs by name."""
    runner = session(tapped)
    outputs = [o.name for o in runner.get_outputs()]
    runs = ({**feed, **dict(zip(outputs, run(runner, feed), strict=True))} for feed in feeds)
    yield from onnx_taps.read_taps(runs, names)


def engine(target: Target, isa: str, version: str) -> AbstractContextManager[Engine]:
    """ONNX Runtime on an instruction set and in a version, for probing; see ``ort_probe.engine``."""
    from qatgraph.backends import ort_probe

    return ort_probe.engine(target, isa, version)


def border_conversions(model: bytes) -> list[str]:
    """What the engine converts from integers to integers at the borders of the file."""
    types = {t for side in interface(model) for t in side.values()}
    return onnx_borders.conversions(optimized_graph(model)) if types & {"uint8", "int8"} else []
