"""Operations of activations alone that engines do on integers: sums, products, tables, and what only moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from qatgraph import reference
from qatgraph.planning.target import Row
from qatgraph.probing import draws
from qatgraph.probing.cases import Case, Operand
from qatgraph.probing.draws import Draw
from qatgraph.probing.floats import RANKS, draw_limited, draw_unary, sigmoid, softmax
from qatgraph.probing.operation import Expected, Operation, integers
from qatgraph.probing.products import FLOAT_STEP
from qatgraph.reference import Array

Values = Mapping[str, Array]


def _operand(draw: Draw, row: Row, shape: tuple[int, ...]) -> Operand:
    return draws.activation(draw, draws.one_of(draw, row.x or (draws.U8,)), shape)


def _draw_pair(draw: Draw, row: Row) -> dict[str, Any]:
    """Two operands; the second may be broadcast."""
    rank = draws.rank_of(draw, row, (1, *RANKS))
    shape = (*(draws.leading(draw, rank) if rank > 1 else ()), draws.size(draw))
    other = tuple(draws.one_of(draw, (n, 1)) for n in shape) if draws.flag(draw) else shape
    return {"form": row.form, "inputs": {"x": _operand(draw, row, shape), "y": _operand(draw, row, other)}}


def _draw_products(draw: Draw, row: Row) -> dict[str, Any]:
    """``[..., M, K] @ [..., K, N]``."""
    rank = draws.rank_of(draw, row, RANKS)
    batch = tuple(draws.count(draw, 1, 3) for _ in range(rank - 2))
    m, k, n = (draws.size(draw, 33) for _ in range(3))
    return {"form": row.form, "inputs": {"x": _operand(draw, row, (*batch, m, k)),
                                         "y": _operand(draw, row, (*batch, k, n))}}  # fmt: skip


def _draw_parts(draw: Draw, row: Row) -> dict[str, Any]:
    """Parts on one grid, if they are only moved."""
    shape = [draws.size(draw, 9) for _ in range(draws.rank_of(draw, row, RANKS))]
    axis = draws.count(draw, 0, len(shape) - 1)
    parts: dict[str, Operand] = {}
    for i in range(draws.count(draw, 2, 3)):
        shape[axis] = draws.size(draw, 9)
        part = _operand(draw, row, tuple(shape))
        parts[f"x{i}"] = replace(part, grid=parts["x0"].grid) if row.moves and i else part
    return {"form": row.form, "inputs": parts, "attributes": {"axis": axis}}


def _draw_leaky(draw: Draw, row: Row) -> dict[str, Any]:
    return draw_limited(draw, row) | {"attributes": {"alpha": draws.one_of(draw, (0.01, 0.25, 1.0))}}


def _pair(name: str, function: Callable[[Array, Array], Array]) -> Operation:
    def exact(case: Case) -> Array:
        (x, y), out = case.inputs.values(), case.out
        assert out is not None
        found: Array = getattr(reference, name)(x.q, x.grid.plain, y.q, y.grid.plain, out.plain)
        return found

    def apply(case: Case, values: Values) -> Array:
        return function(values["x"], values["y"])

    if name == "matmul":
        ways = {"scaled-sum": integers(exact), "float-result": _float_product}
        return Operation(_draw_products, apply, ways)
    return Operation(_draw_pair, apply, {"through-float": integers(exact)})


def _float_product(case: Case) -> Expected:
    x, y = case.inputs.values()
    found = reference.matmul_float(x.q, x.grid.plain, y.q, y.grid.plain)
    return Expected.around(found, FLOAT_STEP * np.abs(found))


def _one(name: str, function: Callable[[Array], Array], **options: Any) -> Operation:
    def exact(case: Case) -> Array:
        x, out = case.inputs["x"], case.out
        assert out is not None
        found: Array = getattr(reference, name)(x.q, x.grid.plain, out.plain, **options)
        return found

    return Operation(draw_unary, lambda case, values: function(values["x"]), {"through-float": integers(exact)})


def _leaky(case: Case, values: Values) -> Array:
    return np.where(values["x"] >= 0, values["x"], case.attributes["alpha"] * values["x"])


def _integer_leaky(case: Case) -> Array:
    x, out = case.inputs["x"], case.out
    assert out is not None
    return reference.leaky_relu(x.q, x.grid.plain, out.plain, alpha=case.attributes["alpha"])


def _cat(case: Case, values: Values) -> Array:
    return np.concatenate(list(values.values()), case.attributes["axis"])


def _integer_cat(case: Case) -> Array:
    assert case.out is not None
    parts = [(o.q, o.grid.plain) for o in case.inputs.values()]
    return reference.concat(parts, case.out.plain, axis=case.attributes["axis"])


def _moving(function: Callable[[Array], Array], lone: int = 0) -> Operation:
    """What gives its elements another place; ``lone``: so many axes of size 1 behind the first."""

    def draw(draw: Draw, row: Row) -> dict[str, Any]:
        first, *rest = (draws.size(draw, 9) for _ in range(draws.rank_of(draw, row, RANKS)))
        return {"form": row.form, "inputs": {"x": _operand(draw, row, (first, *[1] * lone, *rest))}}

    return Operation(draw, lambda case, values: function(values["x"]), free_axes=0 if lone else 1)


ELEMENTWISE = {
    **dict.fromkeys(("add", "residual_add"), _pair("add", np.add)),
    "mul": _pair("mul", np.multiply),
    "matmul": _pair("matmul", np.matmul),
    "sigmoid": _one("sigmoid", sigmoid),
    "softmax": _one("softmax", softmax, axis=-1),
    "leaky_relu": Operation(_draw_leaky, _leaky, {"through-float": integers(_integer_leaky)}, passes=True),
    "cat": Operation(_draw_parts, _cat, {"through-float": integers(_integer_cat)}, free_axes=0, passes=True),
    # each as the writer of the engine has it: qatgraph/backends/onnx_cases.py
    "reshape": _moving(lambda x: x.reshape(-1)),
    "flatten": _moving(lambda x: x.reshape(len(x), -1)),
    "squeeze": _moving(lambda x: x.squeeze(1), lone=1),
    "unsqueeze": _moving(lambda x: x[:, None]),
    "transpose": _moving(np.transpose),
    "slice": _moving(lambda x: x[..., : (x.shape[-1] + 1) // 2]),
}
