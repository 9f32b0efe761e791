"""Convolutions of the reference, against a slow loop over integers and against QLinearConv of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatgraph import reference
from qatgraph.reference import Array, Grid
from tests.qdq import Between, grid, steps

some = settings(max_examples=60, deadline=None, derandomize=True)
few = settings(max_examples=40, deadline=None, derandomize=True)  # each builds a file and a session


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """The arguments of ``reference.conv``: 1, 2 or 3 spatial axes, of any geometry that sees something."""
    axes = draw(st.integers(1, 3))

    def small(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    kernel, dilation = small(1, 3), small(1, 2)
    spread = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    padding = tuple((draw(st.integers(0, s - 1)), draw(st.integers(0, s - 1))) for s in spread)
    size = tuple(s + draw(st.integers(0, 4)) for s in spread)
    groups, inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    signed = draw(st.booleans())
    dtype = np.int8 if signed else np.uint8
    span = np.iinfo(dtype)
    outputs = groups * outer
    scales = random.uniform(1e-3, 2e-2, outputs if draw(st.booleans()) else ()).astype(np.float32)
    return {
        "x": random.integers(span.min, span.max + 1, (draw(st.integers(1, 2)), groups * inner, *size)).astype(dtype),
        "x_grid": grid(random.uniform(1e-3, 1e-1), random.integers(span.min, span.max + 1), dtype),
        "weight": random.integers(-63, 64, (outputs, inner, *kernel)).astype(np.int8),
        "w_scale": scales,
        "bias": random.integers(-5000, 5000, outputs).astype(np.int32) if draw(st.booleans()) else None,
        "out_grid": grid(random.uniform(1e-2, 1e-1), random.integers(span.min, span.max + 1), dtype),
        "stride": small(1, 3),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }


def slow_conv(
    x: Array,
    x_grid: Grid,
    weight: Array,
    w_scale: Array,
    bias: Array | None,
    out_grid: Grid,
    *,
    rounded: Callable[[float], int] = round,  # half to even, as Python does
    **how: Any,
) -> Array:
    stride, padding, dilation, groups = (how[k] for k in ("stride", "padding", "dilation", "groups"))
    outputs, inner, kernel = len(weight), weight.shape[1], weight.shape[2:]
    axes = list(zip(x.shape[2:], kernel, stride, padding, dilation, strict=True))
    size = [(n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
    y = np.zeros((len(x), outputs, *size), out_grid.zero_point.dtype)
    span = np.iinfo(y.dtype)
    for n, o, *at in product(*map(range, y.shape)):
        total = 0 if bias is None else int(bias[o])
        for c, *k in product(range(inner), *map(range, kernel)):
            where = [a * s - p[0] + i * d for a, i, (_, _, s, p, d) in zip(at, k, axes, strict=True)]
            if all(0 <= w < e for w, e in zip(where, x.shape[2:], strict=True)):
                channel = o // (outputs // groups) * inner + c
                total += (int(x[(n, channel, *where)]) - int(x_grid.zero_point)) * int(weight[(o, c, *k)])
        step = x_grid.scale * (w_scale if w_scale.ndim == 0 else w_scale[o]) / out_grid.scale
        q = rounded(float(np.float32(total) * np.float32(step))) + int(out_grid.zero_point)
        y[(n, o, *at)] = min(max(q, span.min), span.max)
    return y


@some
@given(convolutions())
def test_a_convolution_is_the_sum_over_its_window(layer: dict[str, Any]) -> None:
    assert np.array_equal(reference.conv(**layer), slow_conv(**layer))


def engine(layer: dict[str, Any]) -> Array:
    """QLinearConv on the same integers."""
    x_grid, w_scale = layer["x_grid"], layer["w_scale"]
    weight = Grid(w_scale, np.zeros(w_scale.shape, np.int8))
    constants = [(layer["weight"], weight)]
    if layer["bias"] is not None:
        scale = np.asarray(x_grid.scale * w_scale)
        constants.append((layer["bias"], Grid(scale, np.zeros(scale.shape, np.int32))))
    pads = [p[0] for p in layer["padding"]] + [p[1] for p in layer["padding"]]
    how = {"strides": layer["stride"], "pads": pads, "dilations": layer["dilation"], "group": layer["groups"]}
    inputs = [(layer["x"], x_grid)]
    return Between("Conv", "QLinearConv", inputs, layer["out_grid"], constants, (0, 0), how).run()


@few
@given(convolutions())
def test_a_convolution_equals_the_engine(layer: dict[str, Any]) -> None:
    assert steps(reference.conv(**layer), engine(layer)) == 0


def steady() -> dict[str, Any]:
    random = np.random.default_rng(1)
    return {
        "x": random.integers(0, 256, (2, 6, 7, 7), np.uint8),
        "x_grid": grid(0.25, 117),
        "weight": random.integers(-63, 64, (4, 3, 3, 2), np.int8),
        "w_scale": np.array([0.5, 0.25, 0.75, 0.5], np.float32),
        "bias": random.integers(-99, 99, 4).astype(np.int32),
        "out_grid": grid(32, 100),
        "stride": (2, 1),
        "padding": ((1, 0), (0, 1)),
        "dilation": (1, 2),
        "groups": 2,
    }


FAULTS: dict[str, Callable[[Any], Any]] = {
    "x_grid": lambda g: Grid(g.scale, g.zero_point + np.uint8(1)),
    "w_scale": lambda scale: scale[::-1],
    "bias": lambda bias: bias + np.int32(64),
    "out_grid": lambda g: Grid(g.scale, g.zero_point + np.uint8(1)),
    "padding": lambda pads: tuple(p[::-1] for p in pads),
    "weight": lambda weight: weight[:, ::-1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_any_other_convolution_than_the_engines_is_seen(fault: str) -> None:
    layer = steady()
    want = engine(layer)
    assert steps(reference.conv(**layer), want) == 0
    assert steps(reference.conv(**{**layer, fault: FAULTS[fault](layer[fault])}), want) > 0


def test_a_rounding_of_halves_away_from_zero_is_seen() -> None:
    layer = steady()  # its multipliers are powers of two and thrice such: there are halves
    assert np.array_equal(slow_conv(**layer), engine(layer))
    away = slow_conv(**layer, rounded=lambda v: int(np.copysign(np.floor(abs(v) + 0.5), v)))
    assert steps(away, engine(layer)) == 1
