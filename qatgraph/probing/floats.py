"""Operations that an engine may do on real numbers only, as numpy has them in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import erf
from typing import Any

import numpy as np

from qatgraph import reference
from qatgraph.planning.target import Row
from qatgraph.probing import draws
from qatgraph.probing.cases import Case, Operand
from qatgraph.probing.draws import Draw
from qatgraph.probing.operation import Operation, integers
from qatgraph.reference import Array

Values = Mapping[str, Array]
RANKS = (2, 3, 4)
EPSILON = 1e-5


def _activation(draw: Draw, row: Row, shape: tuple[int, ...]) -> Operand:
    return draws.activation(draw, draws.one_of(draw, row.x or (draws.U8,)), shape)


def _shape(draw: Draw, row: Row) -> tuple[int, ...]:
    return (*draws.leading(draw, draws.rank_of(draw, row, RANKS)), draws.size(draw))


def draw_unary(draw: Draw, row: Row) -> dict[str, Any]:
    return {"form": row.form, "inputs": {"x": _activation(draw, row, _shape(draw, row))}}


def draw_limited(draw: Draw, row: Row) -> dict[str, Any]:
    """Also the integers from below zero on, one after the other: what a limit lets through, at every fraction."""
    found = draw_unary(draw, row)
    x: Operand = found["inputs"]["x"]
    if not draws.flag(draw):
        return found
    ramp = np.arange(-1, x.q.size - 1).reshape(x.q.shape) + x.grid.zero_point
    return found | {"inputs": {"x": replace(x, q=reference.clamp(ramp, x.q.dtype))}}


def _draw_norm(draw: Draw, row: Row) -> dict[str, Any]:
    found = draw_unary(draw, row)
    width = found["inputs"]["x"].q.shape[-1:]
    return found | {"parameters": {"scale": draws.floats(draw, width), "shift": draws.floats(draw, width)}}


def _draw_attention(draw: Draw, row: Row) -> dict[str, Any]:
    """Query, key and value ``[batch, length, heads * width]``."""
    batch, heads, length, keys = (draws.count(draw, 1, 4) for _ in range(4))
    width = heads * draws.size(draw, 17)
    shapes = {"query": (batch, length, width)} | dict.fromkeys(("key", "value"), (batch, keys, width))
    inputs = {role: _activation(draw, row, shape) for role, shape in shapes.items()}
    return {"form": row.form, "inputs": inputs, "attributes": {"heads": heads}}


def _unary(function: Callable[[Array], Array]) -> Operation:
    return Operation(draw_unary, lambda case, values: function(values["x"]))


def _limit(function: Callable[[Array], Array]) -> Operation:
    """What cuts numbers off: no float library is in doubt about the others, so that halves round as the row says."""

    def exact(case: Case) -> Array:
        x, out = case.inputs["x"], case.out
        assert out is not None
        return reference.lookup(x.q, x.grid.plain, out.plain, function)

    def apply(case: Case, values: Values) -> Array:
        return function(values["x"])

    return Operation(draw_limited, apply, {"through-float": integers(exact)}, passes=True)


def gelu(x: Array) -> Array:
    found: Array = x * 0.5 * (1 + np.vectorize(erf, otypes=[float])(x / np.sqrt(2)))
    return found


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        found: Array = 1 / (1 + np.exp(-x))
    return found


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(-1, keepdims=True))
    found: Array = powers / powers.sum(-1, keepdims=True)
    return found


def _layer_norm(case: Case, values: Values) -> Array:
    normal = (values["x"] - values["x"].mean(-1, keepdims=True)) / _deviation(values["x"])
    found: Array = normal * case.parameters["scale"] + case.parameters["shift"]
    return found


def _deviation(x: Array) -> Array:
    found: Array = np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    return found


def _layer_norm_slack(case: Case, values: Values) -> Array:
    """Of equal numbers the mean may be rounded, and what is left is divided by the root of epsilon."""
    x = values["x"]
    found: Array = 2 * 2.0**-23 * np.abs(x).max(-1, keepdims=True) / _deviation(x) * np.abs(case.parameters["scale"])
    return found


def _rms_norm(case: Case, values: Values) -> Array:
    x = values["x"]
    found: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * case.parameters["scale"]
    return found


def _attention(case: Case, values: Values) -> Array:
    query, key, value = (_heads(v, case.attributes["heads"]) for v in values.values())
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    found: Array = (softmax(scores) @ value).swapaxes(1, 2)
    return found.reshape(values["query"].shape)


def _heads(packed: Array, heads: int) -> Array:
    """``[batch, length, heads * width]`` -> ``[batch, heads, length, width]``."""
    return packed.reshape(*packed.shape[:2], heads, -1).swapaxes(1, 2)


FLOATS = {
    "layer_norm": Operation(_draw_norm, _layer_norm, slack=_layer_norm_slack),
    "rms_norm": Operation(_draw_norm, _rms_norm),
    "attention": Operation(_draw_attention, _attention, free_axes=1),
    "safe_softmax": _unary(softmax),
    "gelu": _unary(gelu),
    "silu": _unary(lambda x: x * sigmoid(x)),
    "relu": _limit(lambda x: np.maximum(x, 0)),
    "clamp": _limit(lambda x: np.clip(x, 0, 6)),
}
