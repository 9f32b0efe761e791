"""Laws of the linter over random QDQ files: the table is never contradicted, and every repair is proved."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qatgraph.backends import lint_fix, lint_proof
from qatgraph.backends.lint import Lint, lint
from qatgraph.reference import Grid
from tests.foreign import Sketch
from tests.qdq import grid

MATRIX = ("MatMul", "Gemm", "Add", "Mul", "Sigmoid", "Relu", "Clip", "Softmax", "LeakyRelu", "Tanh", "bias")
IMAGE = ("Conv", "Add", "Mul", "Sigmoid", "Relu", "Clip", "MaxPool", "AveragePool", "Concat", "Transpose", "constant")
SCALES = (0.02, 0.031, 0.007)


@st.composite
def grids(draw: st.DrawFn, signed: bool | None = None) -> Grid:
    scale = draw(st.sampled_from(SCALES))
    if draw(st.booleans()) if signed is None else signed:
        return grid(scale, draw(st.sampled_from([0, -128, 4])), np.int8)
    return grid(scale, draw(st.sampled_from([0, 128, 99])))


@st.composite
def files(draw: st.DrawFn) -> Any:
    """A chain of operations, each maybe behind a pair; some read a value of before as well."""
    s = Sketch()
    image = draw(st.booleans())
    shape: tuple[int | str, ...] = (1, 8, 6, 6) if image else draw(st.sampled_from([(4, 16), (2, 4, 16), ("b", 4, 16)]))
    same = [s.input("x", *shape)]  # values of this shape
    for _ in range(draw(st.integers(1, 5))):
        values = [draw(st.sampled_from(same[-3:])) for _ in range(2)]
        operands = [s.qdq(v, draw(grids())) if draw(st.integers(0, 2)) else v for v in values]
        same.append(operation(draw, s, draw(st.sampled_from(IMAGE if image else MATRIX)), operands, len(shape)))
    last = same[-1]
    s.out(s.qdq(last, draw(grids())) if draw(st.booleans()) else last)
    return s.proto()


def operation(draw: st.DrawFn, s: Sketch, kind: str, operands: list[str], rank: int) -> str:
    """One operation that keeps the shape; the second operand is for those that take two."""
    x, y = operands
    if kind in ("MatMul", "Gemm", "bias"):
        weight = s.weight(16, 16, scale=[0.01] * 16, axis=1)
        if kind == "Gemm" and rank == 2:
            return s.op("Gemm", x, weight, *draw(st.sampled_from([[], [s.floats(16)], [s.bias(0.0002, 16)]])))
        product = s.op("MatMul", x, weight)
        return (
            s.op("Add", product, s.floats(*draw(st.sampled_from([[16], [1] * (rank - 1) + [16]]))))
            if kind == "bias"
            else product
        )
    if kind == "Conv":
        vector = draw(st.sampled_from([[], [s.floats(8)]]))
        return s.op("Conv", x, s.weight(8, 8, 3, 3), *vector, pads=[1, 1, 1, 1])
    if kind == "Clip":
        return s.op("Clip", x, s.constant(np.float32(0)), s.constant(np.float32(draw(st.sampled_from([1, 100])))))
    if kind == "Concat":
        return s.op("Conv", s.op("Concat", x, y, axis=1), s.weight(8, 16, 1, 1))
    if kind in ("MaxPool", "AveragePool"):
        return s.op(kind, x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    if kind == "constant":
        return s.op("Add", x, s.weight(6))
    if kind == "Transpose":
        return s.op("Transpose", x, perm=[0, 1, 3, 2])
    return s.op(kind, x, y) if kind in ("Add", "Mul") else s.op(kind, x)


def disagreements(found: Lint) -> list[str]:
    return [f"{f.node}: {f.what}" for f in found.findings if f.rule == "engine-disagrees"]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(files())
def test_the_engine_never_contradicts_what_is_said_of_a_random_file(model: Any) -> None:
    assert disagreements(lint(model)) == []


@settings(max_examples=40, derandomize=True, deadline=None)
@given(files())
def test_every_repair_of_a_random_file_is_equal_and_leaves_nothing_to_repair(model: Any) -> None:
    found = lint(model)
    if not any(f.fix for f in found.findings):
        return
    after = lint_fix.repair(model, found.findings)
    assert lint_proof.prove(model, after).regions <= lint_proof.TOLERANCE
