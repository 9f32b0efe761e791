"""OpenVINO, CPU plugin: lower, write, load, audit."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from typing import Any

from qatgraph.backends import artifact, emulation, onnx_taps, timing
from qatgraph.backends.openvino_graph import EngineNode, describe, kernel_nodes
from qatgraph.backends.qdq_onnx import to_onnx, write_atomically
from qatgraph.errors import LowerError, TargetError
from qatgraph.ir.graph import Graph
from qatgraph.kernels import KernelNode
from qatgraph.parity import RegionTap
from qatgraph.planning.plan import Plan
from qatgraph.planning.target import Target
from qatgraph.probing.cases import Engine
from qatgraph.reference import Array, EngineQuantize, multiply_quantize

if find_spec("openvino") is None:
    raise TargetError(
        "QG412", "OpenVINO is not installed", where="backend = 'openvino_cpu'",
        why="it lowers for, loads and audits with this engine",
        todo="install it: pip install 'qatgraph[openvino]', or choose the target ort-cpu",
    )  # fmt: skip

NAME = "OpenVINO"
SHOWS_CONVERSIONS = False  # they become parts of other nodes
SAME_EVERYWHERE = False  # its integer kernels are; floats are added in another order on each instruction set
AUDITED = "the model that OpenVINO compiled (get_runtime_model), floats in float32"
SESSION = "OpenVINO defaults, but INFERENCE_PRECISION_HINT = f32"
PRECISE: dict[str, str] = {}  # no option is more exact
write = write_atomically
stamps = artifact.stamps
interface = artifact.interface
output_grids = artifact.output_grids
product_constants = artifact.product_constants
bias_misfits = artifact.bias_misfits
median_latencies = timing.median_latencies
can_emulate = emulation.available
JOINED = frozenset({"layer_norm", "attention"})  # their last product takes the factor of the quantize in
quantize = EngineQuantize(multiply_quantize, JOINED, near=2**-13)  # 8 units in the last place of 128 to 255
# On CPUs with AMX or AVX512-BF16 floats would be cut to bfloat16 by default, on which no two CPUs agree.
CONFIG = {"INFERENCE_PRECISION_HINT": "f32"}
WORKER = f"""
from typing import Any
import openvino as ov
{inspect.getsource(describe)}
def answer(model, feed, graph):
    compiled = ov.Core().compile_model(ov.Core().read_model(io.BytesIO(model)), "CPU", {CONFIG})
    outputs = io.BytesIO()
    found = compiled(dict(np.load(io.BytesIO(feed))))
    np.savez(outputs, *(found[o] for o in compiled.outputs))
    return b"", json.dumps(describe(compiled)).encode() if graph else b"", outputs.getvalue()
"""


class Session:
    """A compiled model that runs as a session of ONNX Runtime does."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled

    def run(self, names: None, feed: dict[str, Array]) -> list[Array]:
        """All outputs, in the order of the file."""
        found = self.compiled(feed)
        return [found[o] for o in self.compiled.outputs]


def version() -> str:
    """Of the engine that is installed."""
    import openvino

    return str(openvino.__version__).partition("-")[0]


def lower(graph: Graph, plan: Plan) -> bytes:
    """Graph[QDQ] -> the bytes of an ONNX file, which OpenVINO reads."""
    return to_onnx(graph, plan, plan.opset, artifact.metadata(graph, plan))


def session(model: bytes | str, *, threads: int = 0) -> Session:
    """The compiled model.

    Raises:
        LowerError: QG505 the engine refuses the file.
    """
    config = CONFIG | ({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})
    try:
        read = _core().read_model(model if isinstance(model, str) else io.BytesIO(model))
        return Session(_core().compile_model(read, "CPU", config))
    except Exception as error:
        raise LowerError(
            "QG505", "OpenVINO refuses the file", where="CPU plugin", why=_sentence(error),
            todo="pin the node that it names, or report it with the plan",
        ) from error  # fmt: skip


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _sentence(error: Exception) -> str:
    """OpenVINO begins with the places in its source that an error went through."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith(("Exception from", "Check '"))]
    return lines[-1] if lines else type(error).__name__


def run(runner: Session, feed: dict[str, Array]) -> list[Array]:
    """All outputs of a session, in the order of the file.

    Raises:
        LowerError: QG508 the engine fails on the batch.
    """
    try:
        return runner.run(None, feed)
    except Exception as error:
        raise LowerError(
            "QG508", "OpenVINO fails when it runs the file", where="session", why=_sentence(error),
            todo="pin the node that it names, or report it with the plan",
        ) from error  # fmt: skip


def audit(model: bytes | str) -> list[KernelNode]:
    """The nodes that OpenVINO runs, by kernel."""
    engine = [EngineNode(*node) for node in describe(session(model).compiled)]
    return kernel_nodes(artifact.parse(model).graph, engine)


def worker(cpu: str) -> emulation.Worker:
    """OpenVINO on an emulated CPU; its graph is the JSON text of ``describe``."""
    return emulation.Worker(cpu, program=WORKER, engine="openvino")


def run_on(cpu: str, model: bytes, feed: dict[str, Array]) -> list[Array]:
    """The outputs of a file on an emulated CPU; see ``emulation.run_once``."""
    return emulation.run_once(worker(cpu), model, feed)


def tap(model: bytes, plan: Plan) -> tuple[bytes, dict[str, onnx_taps.TapNames]]:
    """The file with the borders of every int8 region as outputs, and their names by node; see ``onnx_taps``."""
    proto = artifact.parse(model)
    names = onnx_taps.tap(proto, plan)
    return proto.SerializeToString(), names


def run_taps(
    tapped: bytes, names: dict[str, onnx_taps.TapNames], feeds: Iterable[dict[str, Array]]
) -> Iterator[tuple[list[RegionTap], dict[str, Array]]]:
    """Batch by batch, what the engine read and wrote at each region, and all of its outputs by name."""
    runner, outputs = session(tapped), interface(tapped)[1]
    runs = ({**feed, **dict(zip(outputs, run(runner, feed), strict=True))} for feed in feeds)
    yield from onnx_taps.read_taps(runs, names)


def engine(target: Target, isa: str, version: str) -> AbstractContextManager[Engine]:
    """OpenVINO on an instruction set, for probing; see ``openvino_probe.engine``."""
    from qatgraph.backends import openvino_probe

    return openvino_probe.engine(target, isa, version)
