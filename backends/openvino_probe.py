"""OpenVINO as an engine for probing: natively, or on an instruction set that is emulated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qatgraph.backends import emulation, openvino_cpu
from qatgraph.backends.onnx_cases import Style
from qatgraph.backends.onnx_probe import engine_of, on_isa
from qatgraph.backends.openvino_graph import EngineNode, describe, kernel_nodes
from qatgraph.errors import TargetError
from qatgraph.kernels import KernelNode
from qatgraph.planning.target import Target
from qatgraph.probing.cases import Engine
from qatgraph.reference import Array


@contextmanager
def engine(target: Target, isa: str, version: str) -> Iterator[Engine]:
    """OpenVINO on an x86 instruction set, see ``onnx_probe.on_isa``.

    Raises:
        TargetError: QG409 the version is not the installed one.
    """
    installed = openvino_cpu.version()
    if version not in ("", installed):
        raise TargetError(
            "QG409", f"there is no openvino {version} here", where="version", why=f"installed is {installed}",
            todo="install the other version in an environment of its own, and probe there",
        )  # fmt: skip
    with on_isa(isa, Native(), openvino_cpu.worker, emulation.X86_CPUS) as (machine, where):
        # integers at the inputs of a file are floats to it: no table sees their scale and zero point
        name = ("openvino", installed)
        yield engine_of(machine, name, where, read, Style.of(target, "product"), integer_inputs=False)


def read(written: Any, engine: bytes) -> list[KernelNode]:
    return kernel_nodes(written, [EngineNode(*node) for node in json.loads(engine)])


class Native:
    """This process."""

    def run(self, model: bytes, feed: dict[str, Array]) -> tuple[bytes, list[Array]]:
        session = openvino_cpu.session(model)
        outputs = openvino_cpu.run(session, feed)
        return json.dumps(describe(session.compiled)).encode(), outputs
