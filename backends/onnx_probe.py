"""Engines that run ONNX files, for probing: natively, or on an instruction set that is emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from qatgraph.backends import emulation
from qatgraph.backends.artifact import parse
from qatgraph.backends.onnx_builder import CORE
from qatgraph.backends.onnx_cases import Style, write_case
from qatgraph.errors import TargetError
from qatgraph.kernels import KernelNode, owner
from qatgraph.probing.cases import GONE, Case, Engine, Realized
from qatgraph.reference import Array
from qatgraph.report.machine import isa as native_isa

NATIVE = "native"
Read = Callable[[Any, bytes], list[KernelNode]]  # the written graph and the engine's -> the engine's nodes by kernel


class Machine(Protocol):
    """Runs a file at default options: the graph that the engine makes of it, and its outputs."""

    def run(self, model: bytes, feed: dict[str, Array]) -> tuple[bytes, list[Array]]: ...


@contextmanager
def on_isa(
    isa: str,
    native: Machine | None,
    worker: Callable[[str], emulation.Worker],
    cpus: Mapping[str, str] = emulation.CPUS,
) -> Iterator[tuple[Machine, str]]:
    """The machine of an instruction set, ``native`` or one of ``cpus``, and where it is in words. Where this process
    cannot be it, ``worker`` gives another one, of a CPU (empty: the machine's own).

    Raises:
        TargetError: QG409 the instruction set is unknown.
        VerifyError: QG608 there is no emulator.
    """
    if isa not in (NATIVE, *cpus):
        what, todo = f"there is no instruction set '{isa}'", "name one of them"
        raise TargetError("QG409", what, where="isa", why=f"known are {', '.join((NATIVE, *cpus))}", todo=todo)
    cpu = cpus.get(isa, "")
    where = f"{isa}, an emulated {cpu}" if cpu else native_isa()
    if native is not None and not cpu:
        yield native, where
        return
    with worker(cpu) as other:
        yield other, where


def engine_of(
    machine: Machine, name: tuple[str, str], where: str, read: Read, style: Style, *, integer_inputs: bool
) -> Engine:
    """``name`` is that of the engine, and its version."""
    title = f"{' '.join(name)} on {where}"
    return Engine(title, lambda case: realize(case, machine, style, read), True, integer_inputs, name[1])


def realize(case: Case, machine: Machine, style: Style, read: Read) -> Realized:
    """Write the case, run it, and read its kernel from the engine's own graph.

    Raises:
        LowerError: QG505, QG508 the engine refuses the file, or fails when it runs it.
    """
    model, feed = write_case(case, style)
    graph, outputs = machine.run(model, feed)
    kernel = _of_case([n for n in read(parse(model).graph, graph) if owner(n.name) == CORE], case)
    # a float row says nothing of what only moves elements: the engine may do it behind a quantize, too
    int8 = kernel.int8 and (case.row.placement == "int8" or not kernel.moves)
    return Realized(kernel.kernel, int8, outputs[0])


def _of_case(nodes: list[KernelNode], case: Case) -> KernelNode:
    """The node that tells most: one that works on integers, else the one that the row names, else any."""
    wanted = case.row.kernel.split("|")
    best = sorted(nodes, key=lambda n: (not n.int8, n.kernel not in wanted))
    return best[0] if best else KernelNode(CORE, GONE, False)
