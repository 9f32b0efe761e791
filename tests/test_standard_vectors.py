"""The ONNX standard's own test vectors for quantized operators, which ship in the onnx package."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qatgraph import reference
from qatgraph.reference import Array, Grid

Inputs = Sequence[Array]


def quantize_linear(inputs: Inputs, how: dict[str, Any]) -> list[Array]:
    return [reference.quantize(*inputs, axis=how.get("axis", 1))]


def dequantize_linear(inputs: Inputs, how: dict[str, Any]) -> list[Array]:
    return [reference.dequantize(*inputs, axis=how.get("axis", 1))]


def dynamic_quantize_linear(inputs: Inputs, _: dict[str, Any]) -> list[Array]:
    q, grid = reference.dynamic_quantize(*inputs)
    return [q, grid.scale, grid.zero_point]


def matmul_integer(inputs: Inputs, _: dict[str, Any]) -> list[Array]:
    return [reference.matmul_integer(*inputs)]


def qlinear_matmul(inputs: Inputs, _: dict[str, Any]) -> list[Array]:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = inputs
    return [reference.matmul(a, Grid(a_scale, a_zero), b, Grid(b_scale, b_zero), Grid(y_scale, y_zero))]


def geometry(x: Array, how: dict[str, Any]) -> dict[str, Any]:
    axes = x.ndim - 2
    pads = how.get("pads", [0] * 2 * axes)
    each = [1] * axes
    return {
        "stride": how.get("strides", each),
        "padding": list(zip(pads[:axes], pads[axes:], strict=True)),
        "dilation": how.get("dilations", each),
        "groups": how.get("group", 1),
    }


def centred(weight: Array, zero: Array) -> Array:
    column: Array = weight.astype(np.int16) - zero.astype(np.int16).reshape(-1, *[1] * (weight.ndim - 1))
    return column


def conv_integer(inputs: Inputs, how: dict[str, Any]) -> list[Array]:
    x, weight, x_zero, w_zero = [*inputs, np.zeros(1, np.uint8)][:4]
    return [reference.accumulate_conv(x, int(x_zero), centred(weight, w_zero), **geometry(x, how))]


def qlinear_conv(inputs: Inputs, how: dict[str, Any]) -> list[Array]:
    x, x_scale, x_zero, weight, w_scale, w_zero, y_scale, y_zero = inputs
    grids = Grid(x_scale, x_zero), Grid(y_scale, y_zero)
    return [reference.conv(x, grids[0], centred(weight, w_zero), w_scale, None, grids[1], **geometry(x, how))]


OPERATORS: dict[str, Callable[[Inputs, dict[str, Any]], list[Array]]] = {
    "QuantizeLinear": quantize_linear,
    "DequantizeLinear": dequantize_linear,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "MatMulInteger": matmul_integer,
    "QLinearMatMul": qlinear_matmul,
    "ConvInteger": conv_integer,
    "QLinearConv": qlinear_conv,
}


@cache
def cases() -> dict[str, tuple[str, dict[str, Any], Inputs, list[Array]]]:
    """Every case of one such operator on 8-, 16- or 32-bit integers, per tensor or per axis, by its name."""
    from onnx.backend.test.case import node as standard

    for operator in OPERATORS:
        importlib.import_module(f"{standard.__name__}.{operator.lower()}")  # that adds its cases
    chosen = {}
    for case in (c for c in standard._NodeTestCases if len(c.model.graph.node) == 1):
        (node,) = case.model.graph.node
        how = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        for inputs, outputs in case.data_sets:
            whole = all(hasattr(v, "dtype") for v in [*inputs, *outputs])  # numbers of other types are TensorProto
            if node.op_type in OPERATORS and whole and "block_size" not in how:
                chosen[case.name] = (node.op_type, how, inputs, outputs)
    return chosen


def same(name: str) -> bool:
    operator, how, inputs, outputs = cases()[name]
    have = OPERATORS[operator](inputs, how)
    return all(h.dtype == o.dtype and np.array_equal(h, np.asarray(o)) for h, o in zip(have, outputs, strict=True))


def test_there_are_cases_of_every_operator() -> None:
    kinds = Counter(operator for operator, *_ in cases().values())
    assert set(kinds) == set(OPERATORS)
    assert kinds.total() >= 23
    assert {"test_quantizelinear_axis", "test_dequantizelinear_axis", "test_qlinearconv"} <= set(cases())


def test_the_reference_reproduces_every_case() -> None:
    assert [name for name in cases() if not same(name)] == []


FAULTS = {
    "another rounding": ("rint", np.floor, {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearMatMul", "QLinearConv"}),
    "padding with another number": ("pad", lambda x, width: np.pad(x, width, mode="edge"), {"ConvInteger"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_in_the_operators_that_it_concerns(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong, concerned = FAULTS[fault]

    class Faulty:
        def __getattr__(self, attribute: str) -> Any:
            return wrong if attribute == name else getattr(np, attribute)

    for module in ("grids", "products"):
        monkeypatch.setattr(f"qatgraph.reference.{module}.np", Faulty())
    assert {cases()[case][0] for case in cases() if not same(case)} == concerned
