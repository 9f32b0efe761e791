"""ONNX Runtime as an engine for probing: natively, on an instruction set that is emulated, or in another version."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qatgraph.backends import emulation, ort_cpu
from qatgraph.backends.artifact import parse
from qatgraph.backends.onnx_cases import Style
from qatgraph.backends.onnx_probe import engine_of, on_isa
from qatgraph.kernels import KernelNode
from qatgraph.planning.target import Target
from qatgraph.probing.cases import Engine
from qatgraph.reference import Array


@contextmanager
def engine(target: Target, isa: str, version: str) -> Iterator[Engine]:
    """ONNX Runtime on an instruction set and in a version (empty: the installed one), see ``onnx_probe.on_isa``.

    Raises:
        VerifyError: QG611 what is not installed cannot be fetched.
    """
    import onnxruntime

    own = version in ("", onnxruntime.__version__)
    with tempfile.TemporaryDirectory() as folder:
        native = Native(Path(folder)) if own else None
        with on_isa(isa, native, lambda cpu: emulation.Worker(cpu, "" if own else version)) as (machine, where):
            name = ("onnxruntime", version or onnxruntime.__version__)
            yield engine_of(machine, name, where, read, Style.of(target, "table"), integer_inputs=True)


def read(written: Any, optimized: bytes) -> list[KernelNode]:
    return ort_cpu.kernel_nodes(written, parse(optimized).graph)


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
