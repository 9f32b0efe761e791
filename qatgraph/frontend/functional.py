"""Writes that no pass could take apart: torch functionalizes the program, at a price that is noted."""

from __future__ import annotations

from torch.export import ExportedProgram

from qatgraph.frontend.refusals import foreign_write
from qatgraph.ir.aliases import BUFFER_WRITE, operator_name, writes, writes_apart


def functional_program(program: ExportedProgram) -> tuple[ExportedProgram, tuple[str, ...]]:
    """The program with writes into views and buffers as operations of their own, and notes on what that loses.

    A write into a value of its own (``relu_`` behind a linear) stays for ``functionalize-in-place``.

    Raises:
        CaptureError: QG107 an operation of a user's library writes into its arguments.
    """
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    for node in nodes:
        if writes(node) and not str(node.target).startswith("aten."):
            raise foreign_write(node)
    entangled = [n for n in nodes if writes(n) and operator_name(n) != BUFFER_WRITE and not writes_apart(n)]
    if not entangled:
        return program, ()
    lost = sorted({float(n.args[1]) for n in nodes if operator_name(n) == "dropout" and n.args[1]})
    notes = tuple(
        f"dropout p={rate} is not in the graph, because the model writes into views ({operator_name(entangled[0])}), "
        "which torch takes apart in eval only"
        for rate in lost
    )
    return program.run_decompositions({}), notes
