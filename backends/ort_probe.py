"""ONNX Runtime as an engine for probing: natively, on an instruction set that is emulated, or in another version."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from qatgraph.backends import emulation, ort_cpu
from qatgraph.backends.onnx_builder import CORE
from qatgraph.backends.onnx_cases import write_case
from qatgraph.errors import TargetError
from qatgraph.kernels import KernelNode, owner
from qatgraph.planning.target import Target
from qatgraph.probing.cases import Case, Engine, Realized
from qatgraph.reference import Array
from qatgraph.report.machine import isa as native_isa

NATIVE = "native"


class Machine(Protocol):
    """Runs a file at default options: the graph that the engine makes of it, and its outputs."""

    def run(self, model: bytes, feed: dict[str, Array]) -> tuple[bytes, list[Array]]: ...


@contextmanager
def engine(target: Target, isa: str, version: str) -> Iterator[Engine]:
    """ONNX Runtime on an instruction set (``native``, or one of ``emulation.CPUS``), in a version; empty: the
    installed one.

    Raises:
        TargetError: QG409 the instruction set is unknown.
        VerifyError: QG608 there is no emulator, QG611 what is not installed cannot be fetched.
    """
    import onnxruntime

    if isa not in (NATIVE, *emulation.CPUS):
        known = ", ".join((NATIVE, *emulation.CPUS))
        what, todo = f"there is no instruction set '{isa}'", "name one of them"
        raise TargetError("QG409", what, where="isa", why=f"known are {known}", todo=todo)
    cpu = emulation.CPUS.get(isa, "")
    place = f"{isa}, an emulated {cpu}" if cpu else native_isa()
    version = version or onnxruntime.__version__
    if not cpu and version == onnxruntime.__version__:
        with tempfile.TemporaryDirectory() as folder:
            yield _engine(target, Native(Path(folder)), version, place)
        return
    with emulation.Worker(cpu, version) as worker:
        yield _engine(target, worker, version, place)


def _engine(target: Target, machine: Machine, version: str, place: str) -> Engine:
    relu = next((row.form for row in target.rows("relu") if row.placement != "int8"), "")
    title = f"onnxruntime {version} on {place}"
    return Engine(title, lambda case: realize(case, machine, target.opset, relu), neighbours=True, version=version)


class Native:
    """This process."""

    def __init__(self, folder: Path) -> None:
        self.graph = folder / "optimized.onnx"

    def run(self, model: bytes, feed: dict[str, Array]) -> tuple[bytes, list[Array]]:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # a failure is raised; it need not be printed as well
        options.optimized_model_filepath = str(self.graph)
        session = ort_cpu.create(model, options)
        return self.graph.read_bytes(), ort_cpu.run(session, feed)


def realize(case: Case, machine: Machine, opset: int, relu: str) -> Realized:
    """Write the case, run it, and read its kernel from the engine's own graph.

    Raises:
        LowerError: QG505, QG508 the engine refuses the file, or fails when it runs it.
    """
    import onnx

    model, feed = write_case(case, opset, relu)
    optimized, outputs = machine.run(model, feed)
    written, graph = (onnx.load_from_string(file).graph for file in (model, optimized))
    kernel = _of_case([n for n in ort_cpu.kernel_nodes(written, graph) if owner(n.name) == CORE], case)
    return Realized(kernel.kernel, kernel.int8, outputs[0])


def _of_case(nodes: list[KernelNode], case: Case) -> KernelNode:
    """The node that tells most: one that works on integers, else the one that the row names, else any."""
    wanted = case.row.kernel.split("|")
    best = sorted(nodes, key=lambda n: (not n.int8, n.kernel not in wanted))
    return best[0] if best else KernelNode(CORE, "no node of its own", False)
