"""Element-wise integer operations, against the kernels of ONNX Runtime: every pair of integers, 0 steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatgraph import reference
from qatgraph.reference import Array, Grid
from tests.qdq import Between, grid, steps

few = settings(max_examples=12, deadline=None, derandomize=True)  # each builds a file and a session

Operand = tuple[Array, Grid]


def every(dtype: Any) -> Array:
    span = np.iinfo(dtype)
    return np.arange(span.min, span.max + 1).astype(dtype)


@st.composite
def grids(draw: st.DrawFn, dtype: Any, count: int) -> list[Grid]:
    span = np.iinfo(dtype)
    return [grid(draw(st.floats(0.004, 0.3)), draw(st.integers(span.min, span.max)), dtype) for _ in range(count)]


@st.composite
def binary(draw: st.DrawFn) -> tuple[Operand, Operand, Grid]:
    """Every pair of integers: one A for many B, one B for many A, or one for one."""
    dtype = draw(st.sampled_from([np.uint8, np.int8]))
    rows, columns = every(dtype)[:, None], np.tile(every(dtype), (256, 1))
    a, b = draw(st.sampled_from([(rows, columns), (columns, rows), (columns.T.copy(), columns)]))
    a_grid, b_grid, out_grid = draw(grids(dtype, 3))
    return (a, a_grid), (b, b_grid), out_grid


def ran(operation: str, operands: list[Operand], out_grid: Grid, **attributes: Any) -> Array:
    return Between(operation, f"QLinear{operation}", operands, out_grid, attributes=attributes).run()


@few
@given(binary())
def test_a_sum_equals_the_engine(case: tuple[Operand, Operand, Grid]) -> None:
    a, b, out_grid = case
    assert steps(reference.add(*a, *b, out_grid), ran("Add", [a, b], out_grid)) == 0


@few
@given(binary())
def test_a_product_equals_the_engine(case: tuple[Operand, Operand, Grid]) -> None:
    a, b, out_grid = case
    assert steps(reference.mul(*a, *b, out_grid), ran("Mul", [a, b], out_grid)) == 0


SHAPES = [
    ((2, 3, 4, 5), (3, 1, 1)),
    ((1, 3, 1, 1), (2, 3, 4, 5)),
    ((1, 3, 1, 5), (2, 3, 4, 1)),
    ((1,), (3, 1)),
    ((), (7,)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("operation", ["Add", "Mul"])
def test_shapes_broadcast_as_in_the_engine(operation: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    random = np.random.default_rng(0)
    a, b = (
        (random.integers(0, 256, shape).astype(np.uint8), grid(0.031, zero))
        for shape, zero in zip(shapes, (9, 201), strict=True)
    )
    out_grid, function = grid(0.047, 77), {"Add": reference.add, "Mul": reference.mul}[operation]
    assert steps(function(*a, *b, out_grid), ran(operation, [a, b], out_grid)) == 0


def rounded_first(a: Operand, b: Operand, out_grid: Grid, function: Callable[[Array, Array], Array]) -> Array:
    """The real-valued operation, rounded before the zero point is added: what Q/DQ around it mean."""
    real = function(*(reference.dequantize(q, g.scale, g.zero_point) for q, g in (a, b)))
    return reference.quantize(real, out_grid.scale, out_grid.zero_point)


@pytest.mark.parametrize("operation", ["Add", "Mul"])
def test_a_zero_point_that_is_added_after_rounding_is_seen(operation: str) -> None:
    """Halves round to the even neighbour, and which one is even depends on an odd zero point."""
    column = every(np.uint8)
    a, b, out_grid = (column[:, None], grid(0.25, 3)), (np.tile(column, (256, 1)), grid(0.25, 100)), grid(0.5, 127)
    exact, function = {"Add": (reference.add, np.add), "Mul": (reference.mul, np.multiply)}[operation]
    want = ran(operation, [a, b], out_grid)
    assert steps(exact(*a, *b, out_grid), want) == 0
    assert steps(rounded_first(a, b, out_grid, function), want) == 1


@st.composite
def unary(draw: st.DrawFn, least: float, most: float) -> tuple[Array, Grid, Grid]:
    """Every integer, and a result with a scale between two bounds."""
    dtype = draw(st.sampled_from([np.uint8, np.int8]))
    x_grid, other = draw(grids(dtype, 2))
    return every(dtype), x_grid, Grid(np.asarray(draw(st.floats(least, most)), np.float32), other.zero_point)


@few
@given(unary(1 / 600, 1 / 200))
def test_a_sigmoid_equals_the_engine(case: tuple[Array, Grid, Grid]) -> None:
    x, x_grid, out_grid = case
    assert steps(reference.sigmoid(x, x_grid, out_grid), ran("Sigmoid", [(x, x_grid)], out_grid)) == 0


@few
@given(unary(0.01, 0.3), st.floats(0, 0.5))
def test_a_leaky_relu_equals_the_engine(case: tuple[Array, Grid, Grid], alpha: float) -> None:
    x, x_grid, out_grid = case
    want = ran("LeakyRelu", [(x, x_grid)], out_grid, alpha=alpha)
    assert steps(reference.leaky_relu(x, x_grid, out_grid, alpha=alpha), want) == 0


@few
@given(unary(0.01, 0.3), unary(0.01, 0.3))
def test_a_concatenation_equals_the_engine(one: tuple[Array, Grid, Grid], other: tuple[Array, Grid, Grid]) -> None:
    x, x_grid, out_grid = one
    parts = [(x.reshape(16, 16), x_grid), (x.reshape(16, 16).T.copy(), out_grid), (x[:16, None], x_grid)]
    want = ran("Concat", parts, out_grid, axis=1)
    assert steps(reference.concat(parts, out_grid, axis=1), want) == 0
    assert want.shape == (16, 33)


@few
@given(unary(0.01, 0.3), st.sampled_from([1 / 256, 1 / 255, 0.01]), st.integers(1, 300), st.sampled_from([-1, 1]))
def test_a_softmax_equals_the_engine(case: tuple[Array, Grid, Grid], scale: float, count: int, axis: int) -> None:
    values, x_grid, out_grid = case
    out_grid = Grid(np.asarray(scale, np.float32), out_grid.zero_point)
    x = np.random.default_rng(count).choice(values, (3, count, 4))
    want = ran("Softmax", [(x, x_grid)], out_grid, axis=axis)
    assert steps(reference.softmax(x, x_grid, out_grid, axis=axis), want) == 0


@pytest.mark.parametrize(("operation", "scale"), [("Sigmoid", 1 / 512), ("LeakyRelu", 0.05), ("Softmax", 1 / 256)])
def test_a_grid_that_is_another_one_is_seen(operation: str, scale: float) -> None:
    x, x_grid, out_grid = every(np.uint8)[None], grid(0.05, 120), grid(scale, 3)
    function: dict[str, Callable[[Grid], Array]] = {
        "Sigmoid": lambda g: reference.sigmoid(x, g, out_grid),
        "LeakyRelu": lambda g: reference.leaky_relu(x, g, out_grid, alpha=0.1),
        "Softmax": lambda g: reference.softmax(x, g, out_grid, axis=-1),
    }
    attributes: dict[str, dict[str, Any]] = {"LeakyRelu": {"alpha": 0.1}, "Softmax": {"axis": -1}}
    how = attributes.get(operation, {})
    want = ran(operation, [(x, x_grid)], out_grid, **how)
    assert steps(function[operation](x_grid), want) == 0
    assert steps(function[operation](grid(0.06, 120)), want) > 0


def test_a_softmax_keeps_no_scale_whose_reciprocal_is_not_whole() -> None:
    """As in the engine: 1 / 0.526 = 1.9 steps for one become 1, where Q/DQ mean 2."""
    x, x_grid, out_grid = np.array([[0, 255]], np.uint8), grid(0.1, 0), grid(1 / 1.9, 0)
    want = ran("Softmax", [(x, x_grid)], out_grid, axis=-1)
    assert reference.softmax(x, x_grid, out_grid, axis=-1).tolist() == want.tolist() == [[0, 1]]
    assert reference.quantize(np.ones(1), out_grid.scale, out_grid.zero_point).tolist() == [2]
