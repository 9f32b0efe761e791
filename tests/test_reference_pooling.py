"""Pools on integers, against slow arithmetic and the kernels of ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from qatgraph import reference
from qatgraph.reference import Array, Grid
from tests.qdq import Between, grid, steps

few = settings(max_examples=40, deadline=None, derandomize=True)  # each builds a file and a session


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    axes = draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    padding = [(draw(st.integers(0, k - 1)), draw(st.integers(0, k - 1))) for k in kernel]
    size = [k + draw(st.integers(0, 4)) for k in kernel]
    dtype = draw(st.sampled_from([np.uint8, np.int8]))
    span = np.iinfo(dtype)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    x_grid, out_grid = (
        grid(random.uniform(0.01, 0.02), random.integers(span.min, span.max + 1), dtype) for _ in range(2)
    )
    return {
        "x": random.integers(span.min, span.max + 1, (2, draw(st.integers(1, 9)), *size)).astype(dtype),
        "x_grid": x_grid,
        "out_grid": out_grid,
        "kernel": kernel,
        "stride": [draw(st.integers(1, 3)) for _ in range(axes)],
        "padding": padding,
    }


def engine(operation: str, kernel: str, case: dict[str, Any], out_grid: Grid, **more: Any) -> Array:
    pads = [p[0] for p in case["padding"]] + [p[1] for p in case["padding"]]
    how = {"kernel_shape": case["kernel"], "strides": case["stride"], "pads": pads, **more}
    return Between(operation, kernel, [(case["x"], case["x_grid"])], out_grid, attributes=how).run()


@few
@given(pools(), st.booleans(), st.booleans())
def test_an_average_equals_the_engine(case: dict[str, Any], include: bool, ceil: bool) -> None:
    include = include and not ceil  # of both the engine has another idea, see below
    how = {"count_include_pad": int(include), "ceil_mode": int(ceil)}
    want = engine("AveragePool", "QLinearAveragePool", case, case["out_grid"], **how)
    assert steps(reference.average_pool(**case, count_include_pad=include, ceil=ceil), want) == 0


POOLS = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)


def torch_average(case: dict[str, Any], include: bool, ceil: bool) -> Array:
    x, out, padding = case["x"], case["out_grid"], [before for before, _ in case["padding"]]
    real = torch.from_numpy(reference.dequantize(x, case["x_grid"].scale, case["x_grid"].zero_point))
    pool = POOLS[len(padding) - 1]
    found = pool(real, case["kernel"], case["stride"], padding, ceil_mode=ceil, count_include_pad=include)
    return reference.quantize(found.numpy(), out.scale, out.zero_point)


@few
@given(pools(), st.booleans(), st.booleans())
def test_an_average_counts_as_torch_does(case: dict[str, Any], include: bool, ceil: bool) -> None:
    halves = [min(p[0], k // 2) for p, k in zip(case["padding"], case["kernel"], strict=True)]
    case |= {"padding": [(p, p) for p in halves]}
    have = reference.average_pool(**case, count_include_pad=include, ceil=ceil)
    assert steps(have, torch_average(case, include, ceil)) <= 1


def test_what_lies_beyond_the_padding_counts_in_the_engine_alone() -> None:
    case = steady() | {"kernel": [3, 3], "stride": [2, 2], "padding": [(1, 1), (1, 1)]}
    have = reference.average_pool(**case, count_include_pad=True, ceil=True)
    assert steps(have, torch_average(case, True, True)) <= 1
    wrong = engine("AveragePool", "QLinearAveragePool", case, case["out_grid"], count_include_pad=1, ceil_mode=1)
    assert steps(have, wrong) > 1


@few
@given(pools())
def test_a_global_average_equals_the_engine(case: dict[str, Any]) -> None:
    x, x_grid, out_grid = case["x"], case["x_grid"], case["out_grid"]
    want = Between("GlobalAveragePool", "QLinearGlobalAveragePool", [(x, x_grid)], out_grid).run()
    assert steps(reference.global_average_pool(x, x_grid, out_grid), want) == 0


@few
@given(pools(), st.integers(1, 2), st.booleans())
def test_a_maximum_equals_the_engine(case: dict[str, Any], dilation: int, ceil: bool) -> None:
    each = [dilation if n > 2 * (k - 1) else 1 for n, k in zip(case["x"].shape[2:], case["kernel"], strict=True)]
    want = engine("MaxPool", "MaxPool", case, case["x_grid"], dilations=each, ceil_mode=int(ceil))
    how = {k: case[k] for k in ("x", "kernel", "stride", "padding")}
    assert steps(reference.max_pool(**how, dilation=each, ceil=ceil), want) == 0


def steady() -> dict[str, Any]:
    random = np.random.default_rng(4)
    return {
        "x": random.integers(0, 256, (2, 5, 8, 8), np.uint8),
        "x_grid": grid(0.25, 117),
        "out_grid": grid(0.5, 101),
        "kernel": [2, 2],
        "stride": [2, 1],
        "padding": [(1, 0), (0, 1)],
    }


@pytest.mark.parametrize(
    "fault",
    [{"padding": [(0, 1), (1, 0)]}, {"out_grid": grid(0.5, 102)}, {"x_grid": grid(0.3, 117)}],
    ids=lambda f: next(iter(f)),
)
def test_another_average_than_the_engines_is_seen(fault: dict[str, Any]) -> None:
    case = steady()
    want = engine("AveragePool", "QLinearAveragePool", case, case["out_grid"])
    assert steps(reference.average_pool(**case, count_include_pad=False), want) == 0
    assert steps(reference.average_pool(**{**case, **fault}, count_include_pad=False), want) > 0
    assert steps(reference.average_pool(**case, count_include_pad=True), want) > 0


def test_an_average_that_rounds_before_the_zero_point_is_seen() -> None:
    """The window has two and four elements: there are halves, and the zero point is odd."""
    case = steady()
    want = engine("AveragePool", "QLinearAveragePool", case, case["out_grid"])
    even = reference.average_pool(**{**case, "out_grid": grid(0.5, 100)}, count_include_pad=False)
    assert steps(even + np.uint8(1), want) == 1


def test_padding_never_wins_a_maximum() -> None:
    x = np.full((1, 1, 3), -128, np.int8)
    y = reference.max_pool(x, [3], stride=[1], padding=[(1, 1)], dilation=[1])
    assert y.tolist() == [[[-128, -128, -128]]]
