"""Row -> case: what the row says is held, all that it leaves open varies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qatgraph.errors import TargetError
from qatgraph.planning.target import Row, Target
from qatgraph.probing import draws
from qatgraph.probing.cases import Case, Engine, Grid
from qatgraph.probing.convolutions import CONVOLUTIONS
from qatgraph.probing.draws import Draw
from qatgraph.probing.elementwise import ELEMENTWISE
from qatgraph.probing.floats import FLOATS
from qatgraph.probing.operation import Operation, real
from qatgraph.probing.products import PRODUCTS
from qatgraph.probing.readers import HIGHEST, READERS, draw_readers
from qatgraph.specs import DType

BORDER = "dequantize"  # of integers that the model takes: what reads them is an operation of another row
OPERATIONS: dict[str, Operation] = {**PRODUCTS, **CONVOLUTIONS, **ELEMENTWISE, **FLOATS}


def operation_of(kind: str) -> Operation:
    """How to draw one kind.

    Raises:
        TargetError: QG406 nobody knows.
    """
    if kind not in OPERATIONS:
        raise TargetError(
            "QG406",
            f"there is no small model of '{kind}'",
            where="probe",
            why=f"known are {', '.join(sorted(OPERATIONS))}",
            todo="name the rows to probe with --row, or enter the operation in qatgraph/probing/draw.py",
        )
    return OPERATIONS[kind]


def draw_case(draw: Draw, target: Target, row: Row, engine: Engine) -> Case:
    """One case of a row.

    Raises:
        TargetError: QG406 its operation is unknown.
    """
    kind, activation = draws.one_of(draw, row.op.split("|")), ""
    taken = kind == BORDER
    if taken:
        row = draws.one_of(draw, [r for r in target.row if r.x and _meet(r, row)])
        kind = draws.one_of(draw, row.op.split("|"))
    if row.needs in ("inside", "before"):
        activation = kind if row.needs == "inside" else ""
        row = draws.one_of(draw, hosts(target, kind))
        kind = draws.one_of(draw, row.op.split("|"))
    elif row.fuses_after:
        activation = draws.one_of(draw, ("", *row.fuses_after))
    operation = operation_of(kind)
    quantized = row.placement == "int8" or (claims_no_kernel(target, row) and draws.flag(draw))
    case = Case(row, kind, **operation.draw(draw, row), quantized=quantized, activation=activation)
    case = replace(case, out=_out(draw, target, case, operation))
    case = _in_context(draw, case, operation, engine) if engine.neighbours else case
    return replace(case, border="integers") if taken else case


def _meet(reader: Row, taken: Row) -> bool:
    """Whether a row reads the integers that the model takes, of whatever grid."""
    return all(spec.meet(grid) is not None for spec in reader.x for grid in taken.out)


def hosts(target: Target, kind: str) -> list[Row]:
    """The rows whose kernel takes in an activation, or what pads."""
    return [r for r in target.row if kind in (*r.fuses_after, *r.fuses_before)]


def claims_no_kernel(target: Target, row: Row) -> bool:
    """Whether a float row says that Q/DQ give no int8 kernel either: it speaks of grids, or no other row is int8."""
    return bool(row.x or row.weight or row.bias) or not _has_int8_row(target, row.op)


def _has_int8_row(target: Target, op: str) -> bool:
    return any(set(op.split("|")) & set(r.op.split("|")) for r in target.row if r.placement == "int8")


def _out(draw: Draw, target: Target, case: Case, operation: Operation) -> Grid | None:
    """The grid of the result; also of a float operation that no grid can make int8."""
    row = case.row
    if row.moves:
        return next(iter(case.inputs.values())).grid
    closed = case.quantized and row.placement != "int8" and not _has_int8_row(target, case.op)
    specs = row.out or ((draws.U8,) if closed else ())
    if not specs:
        return None
    spec, values = draws.one_of(draw, specs), real(case, operation)
    if case.activation:
        return draws.grid_above(draw, spec, values, HIGHEST[case.activation])
    if operation.passes and draws.flag(draw):
        grid = draws.grid_of_halves(draw, spec, next(iter(case.inputs.values())).grid)
    else:
        grid = draws.grid_over(draw, spec, values)
    finest = [row.finest * float(o.grid.scale) for o in case.inputs.values()]
    return replace(grid, scale=np.maximum(grid.scale, np.float32(max(finest, default=0.0))))


def _in_context(draw: Draw, case: Case, operation: Operation, engine: Engine) -> Case:
    first = next(iter(case.inputs.values()), None)
    lead = first.q if first is not None else next(iter(case.parameters.values()))
    case = replace(
        case,
        dynamic=draws.axes(draw, case.row, operation.free_axes if operation.free_axes >= 0 else lead.ndim - 1),
        typed=draws.flag(draw),
        shared=first is not None and draws.flag(draw),
        border=_border(draw, case, engine),
        readers=draw_readers(draw, case),
    )
    if "quantize" not in case.readers:
        return case
    values = real(case, operation)
    for reader in case.readers[:-1]:
        values = READERS[reader](values)
    return replace(case, read_grid=draws.grid_over(draw, draws.U8, values))


def _border(draw: Draw, case: Case, engine: Engine) -> Any:
    """With s8 at a border of the file x86 has no int8 kernel, of which no row speaks, since no file is written so."""
    if case.row.on_request:
        return "floats"  # its kernel reads them
    written = case.row.needs in ("inputs-int8", "between-int8")
    signed = any(o.grid.dtype is not DType.U8 for o in case.inputs.values())
    return draws.one_of(
        draw,
        [*([] if written else ["floats"]), *([] if signed or not engine.integer_inputs else ["integers"]), "kernel"],
    )
