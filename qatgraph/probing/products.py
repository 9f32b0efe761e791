"""Products with a constant weight: the linear, and the look-up in a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qatgraph import reference
from qatgraph.planning.target import Row
from qatgraph.probing import draws
from qatgraph.probing.cases import Case, Grid, Operand
from qatgraph.probing.draws import Draw
from qatgraph.probing.operation import Expected, Operation, integers
from qatgraph.reference import Array
from qatgraph.specs import DType

FLOAT_STEP = 1e-6  # of the largest term of a float sum


def _draw_linear(draw: Draw, row: Row) -> dict[str, Any]:
    rank = draws.rank_of(draw, row, (2, 3, 4, 5))
    spec = draws.one_of(draw, row.weight or (draws.S8,))
    x_spec = draws.one_of(draw, row.x or (draws.U8,))
    shape = (*draws.leading(draw, rank), draws.size(draw))
    x, weight = (
        _along_k(draw, shape)
        if spec.axis == 1
        else (draws.activation(draw, x_spec, shape), draws.weight(draw, spec, (draws.size(draw), shape[-1])))
    )
    outputs = len(weight.q)
    form = "none" if spec.axis == 1 else draws.one_of(draw, row.bias or ("none", "vector"))
    bias = None if form == "none" else draws.floats(draw, (outputs,))
    if form == "int32":
        bias = draws.sum_bias(draw, outputs)
    elif row.placement != "int8" and bias is not None and not bias.any():
        bias = np.ones_like(bias)  # a row about a bias is not about one that an engine drops
    written = row.form or draws.one_of(draw, ("gemm", "matmul") if rank == 2 and form != "row" else ("matmul",))
    return {"form": written, "inputs": {"x": x}, "weight": weight, "bias": bias, "bias_form": form}


def _along_k(draw: Draw, shape: tuple[int, ...]) -> tuple[Operand, Operand]:
    """Scales along K that cannot be taken for those of the outputs without a wrong result: they grow, all
    products of integers are 1, no bias is added, and the sums are too small for a clamp to hide."""
    k = shape[-1] + 1
    grids = Grid(DType.U8, np.asarray(2**-10, np.float32)), Grid(DType.S8, np.arange(1, k + 1, dtype=np.float32), 0, 1)
    arrays = np.ones((*shape[:-1], k), np.uint8), np.ones((draws.one_of(draw, (k, draws.size(draw))), k), np.int8)
    return Operand(arrays[0], grids[0]), Operand(arrays[1], grids[1])


def _linear(case: Case, values: Mapping[str, Array]) -> Array:
    assert case.weight is not None
    y: Array = values["x"] @ case.weight.real.astype(np.float64).T
    return y if case.bias is None else y + real_bias(case)


def real_bias(case: Case) -> Array:
    """The numbers that a bias stands for; float32, of an int32 one in units of the sum."""
    assert case.weight is not None
    assert case.bias is not None
    unit = case.inputs["x"].grid.scale * case.weight.grid.scale if case.bias_form == "int32" else np.float32(1)
    found: Array = (case.bias.astype(np.float32) * unit).astype(np.float32)
    return found


def _exact_linear(case: Case) -> Expected:
    x, weight = case.inputs["x"], case.weight
    assert weight is not None
    if weight.grid.block is not None:
        parts = (x.real, weight.q, weight.grid.scale, weight.grid.block, case.bias)
        return Expected.around(reference.linear_in_blocks(*parts), reference.sum_slack(*parts))
    scales = np.broadcast_to(weight.grid.scale, len(weight.q))
    if case.row.dynamic_x:
        y = reference.linear_dynamic(x.real, weight.q, scales, case.bias)
    else:
        y = reference.linear(x.q, x.grid.scale, x.grid.zero_point, weight.q, scales, case.bias)
    terms = np.abs(y) if case.bias is None else np.abs(y) + np.abs(real_bias(case))
    return Expected.around(y, FLOAT_STEP * terms)


def _integer_linear(case: Case) -> Array:
    x, weight, out = case.inputs["x"], case.weight, case.out
    assert weight is not None
    assert out is not None
    return reference.gemm(x.q, x.grid.plain, weight.q, weight.grid.scale, case.bias, out.plain)


def _draw_embedding(draw: Draw, row: Row) -> dict[str, Any]:
    rank = draws.rank_of(draw, row, (1, 2, 3))
    entries, width = 1 + draws.size(draw), draws.size(draw, 33)  # one row alone is no look-up
    spec = draws.one_of(draw, row.weight or (draws.TABLE,))
    indices = draws.integers(draw, [draws.count(draw, 1, 4) for _ in range(rank)], 0, entries - 1)
    table = draws.weight(draw, spec, (entries, width))
    return {"form": row.form, "inputs": {}, "weight": table, "parameters": {"indices": indices.astype(np.int64)}}


def _embedding(case: Case, values: Mapping[str, Array]) -> Array:
    assert case.weight is not None
    found: Array = case.weight.real.astype(np.float64)[case.parameters["indices"]]
    return found


def _exact_embedding(case: Case) -> Expected:
    table = case.weight
    assert table is not None
    rows = table.q[case.parameters["indices"]]
    found = reference.dequantize(rows, table.grid.scale, table.grid.zero)
    return Expected.around(found, FLOAT_STEP * np.abs(found))  # a quantize behind may take the scale in


PRODUCTS = {
    "linear": Operation(
        _draw_linear, _linear, {"float-result": _exact_linear, "scaled-sum": integers(_integer_linear)}
    ),
    "embedding": Operation(_draw_embedding, _embedding, {"float-result": _exact_embedding}),
}
