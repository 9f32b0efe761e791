"""16-bit pair sums of x86 without VNNI: slow arithmetic, where they can saturate, and an emulated Haswell."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatgraph import reference
from qatgraph.backends import emulation
from qatgraph.reference import Array, Grid
from tests.qdq import Between, grid, side_by_side

some = settings(max_examples=60, deadline=None, derandomize=True)
ABSENT = "NOT RUN: qemu-x86_64 is not installed"


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """The arguments of ``accumulate_conv`` in one or two spatial axes; odd channel counts as often as even ones."""
    axes, groups, inner, outer = (draw(st.integers(1, n)) for n in (2, 3, 4, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.uint8, np.int8]))
    span = np.iinfo(dtype)
    size = tuple(k + draw(st.integers(0, 2)) for k in kernel)
    return {
        "x": random.integers(span.min, span.max + 1, (2, groups * inner, *size)).astype(dtype),
        "zero_point": int(random.integers(span.min, span.max + 1)),
        "weight": random.integers(-127, 128, (groups * outer, inner, *kernel)).astype(np.int8),
        "stride": [draw(st.integers(1, 2)) for _ in kernel],
        "padding": [(draw(st.integers(0, k - 1)), draw(st.integers(0, k - 1))) for k in kernel],
        "dilation": [1] * axes,
        "groups": groups,
    }


def slow_pairs(layer: dict[str, Any]) -> tuple[Array, Array]:
    """The saturated sums, and the share of saturated pairs per output channel: one output, one pair at a time."""
    x, weight, zero, groups = (layer[k] for k in ("x", "weight", "zero_point", "groups"))
    shift = 128 if x.dtype == np.int8 else 0
    raw = np.pad(x.astype(int) + shift, [(0, 0), (0, 0), *layer["padding"]], constant_values=zero + shift)
    outputs, inner, *kernel = weight.shape
    alone = inner == 1 and outputs == groups
    size = [(n - k) // s + 1 for n, k, s in zip(raw.shape[2:], kernel, layer["stride"], strict=True)]
    y, wide = np.zeros((len(x), outputs, *size), np.int32), np.zeros(outputs)
    pairs = 0
    for n, o, *at in product(*map(range, y.shape)):
        terms = []
        for *k, c in product(*map(range, kernel), range(inner)):  # channel fastest
            where = [a * s + i for a, s, i in zip(at, layer["stride"], k, strict=True)]
            terms.append(int(raw[(n, o // (outputs // groups) * inner + c, *where)]) * int(weight[(o, c, *k)]))
        together = 1 if alone else 2
        sums = [sum(terms[i : i + together]) for i in range(0, len(terms), together)]
        y[(n, o, *at)] = sum(min(max(s, -32768), 32767) for s in sums) - (zero + shift) * int(weight[o].sum())
        wide[o] += sum(not -32768 <= s <= 32767 for s in sums)
        pairs = len(sums)
    return y, wide / (y.size / outputs * pairs)


@some
@given(convolutions())
def test_a_convolution_of_saturating_pairs_is_exact(layer: dict[str, Any]) -> None:
    sums, share = slow_pairs(layer)
    assert np.array_equal(reference.accumulate_conv_pair16(**layer), sums)
    assert np.allclose(reference.saturated_share(**layer), share, rtol=1e-12, atol=0)


@some
@given(convolutions())
def test_a_channel_whose_worst_pair_is_at_most_128_never_saturates(layer: dict[str, Any]) -> None:
    rows = reference.k_rows(layer["weight"], groups=layer["groups"])
    safe = reference.worst_pairs(rows) <= 128
    assert not reference.saturated_share(**layer)[safe].any()
    exact, have = reference.accumulate_conv(**layer), reference.accumulate_conv_pair16(**layer)
    assert np.array_equal(have[:, safe], exact[:, safe])


@pytest.mark.parametrize(("second", "share"), [(28, 0), (29, 0.5)])
def test_the_bound_is_sharp_and_the_share_counts_pairs(second: int, share: float) -> None:
    """Two pairs: one of 100 and a second weight, one that cannot saturate."""
    weight = np.array([[100, second, 1, 1]], np.int8)
    x = np.full((3, 4), 255, np.uint8)
    assert reference.saturated_share(x, 7, weight).tolist() == [share]
    assert (reference.worst_pair(reference.k_rows(weight)) <= 128) == (share == 0)


def test_the_order_of_k_is_that_of_the_window_with_the_channel_fastest() -> None:
    weight = np.arange(2 * 3 * 2 * 2, dtype=np.int8).reshape(2, 3, 2, 2)
    assert reference.k_rows(weight)[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert reference.k_rows(weight.reshape(2, 12)).tolist() == weight.reshape(2, 12).tolist()


def test_by_position_pairs_start_anew() -> None:
    weight = np.arange(1, 7, dtype=np.int8).reshape(1, 3, 2)
    assert reference.k_rows(weight).tolist() == [[1, 3, 5, 2, 4, 6]]
    assert reference.position_rows(weight).tolist() == [[1, 3, 5, 0, 2, 4, 6, 0]]
    even = np.arange(1, 9, dtype=np.int8).reshape(1, 4, 2)
    assert reference.position_rows(even).tolist() == reference.k_rows(even).tolist()


def test_a_pure_depthwise_convolution_pairs_nothing_and_one_with_a_multiplier_does() -> None:
    weight = np.full((4, 1, 3, 3), 127, np.int8)
    assert reference.worst_pair(reference.k_rows(weight, groups=4)) == 127
    assert reference.worst_pair(reference.k_rows(weight, groups=2)) == 254


# on an emulated CPU with AVX2 and without VNNI

LAYERS: dict[str, tuple[int, int, Sequence[int], int]] = {  # channels in, channels out, kernel, groups
    "plain": (8, 16, (3, 3), 1),
    "odd channels": (3, 16, (3, 3), 1),
    "odd window": (5, 7, (3, 1), 1),
    "pointwise": (16, 24, (1, 1), 1),
    "odd pointwise": (15, 9, (1, 1), 1),
    "grouped": (12, 8, (3, 3), 4),
    "odd grouped": (9, 6, (3, 3), 3),
    "depthwise": (16, 16, (3, 3), 16),
    "multiplier": (8, 16, (3, 3), 8),
    "one channel": (1, 1, (3, 3), 1),
    "1-d": (6, 8, (5,), 1),
    "odd 1-d": (5, 8, (3,), 1),
    "depthwise 1-d": (8, 8, (3,), 8),
    "3-d": (3, 8, (2, 3, 2), 1),
}
EXACT = {"depthwise", "one channel", "depthwise 1-d"}
GEMMS = [(kernel, rows, k) for kernel in ("QGemm", "QLinearMatMul") for rows, k in ((1, 64), (9, 64), (9, 63), (9, 5))]


def integers(shape: Sequence[int], dtype: Any, seed: int) -> Array:
    span = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(span.min, span.max + 1, shape).astype(dtype)


def operands(rows: Sequence[int], weight: Sequence[int], dtype: Any) -> tuple[Array, Grid, Array, Grid, Array, Grid]:
    """Integers that fill their types, and an output grid that holds most sums."""
    x, w = integers(rows, dtype, 1), np.maximum(integers(weight, np.int8, 2), np.int8(-127))
    x_grid, w_scale = grid(0.02, 117 if dtype == np.uint8 else -11, dtype), np.full(len(w), 0.003, np.float32)
    out_grid = grid(0.004 * np.sqrt(w[0].size), 120 if dtype == np.uint8 else 3, dtype)
    bias = np.random.default_rng(3).integers(-1000, 1000, len(w)).astype(np.int32)
    return x, x_grid, w, Grid(w_scale, np.zeros(len(w), np.int8)), bias, out_grid


def bias_grid(x_grid: Grid, w_grid: Grid) -> Grid:
    return Grid(np.asarray(x_grid.scale * w_grid.scale), w_grid.zero_point.astype(np.int32))


def convolved(name: str, dtype: Any) -> tuple[Between, Array, Array]:
    """The layer in a file, and what the two models of its sums say."""
    inputs, outputs, kernel, groups = LAYERS[name]
    x, x_grid, w, w_grid, bias, out_grid = operands(
        (2, inputs, *[7] * len(kernel)), (outputs, inputs // groups, *kernel), dtype
    )
    axes = len(kernel)
    how = {"strides": [1] * axes, "pads": [1] * axes + [0] * axes, "group": groups}
    between = Between(
        "Conv", "QLinearConv", [(x, x_grid)], out_grid, [(w, w_grid), (bias, bias_grid(x_grid, w_grid))], (0, 0), how
    )
    geometry: dict[str, Any] = {
        "stride": [1] * axes,
        "padding": [(1, 0)] * axes,
        "dilation": [1] * axes,
        "groups": groups,
    }
    arguments = x, x_grid, w, w_grid.scale, bias, out_grid
    pair16 = reference.conv(*arguments, **geometry, accumulator=reference.accumulate_conv_pair16)
    return between, pair16, reference.conv(*arguments, **geometry)


def multiplied(kernel: str, rows: int, k: int, dtype: Any) -> tuple[Between, Array, Array]:
    x, x_grid, w, w_grid, bias, out_grid = operands((rows, k), (8, k), dtype)
    if kernel == "QGemm":
        constants = [(w, w_grid), (bias, bias_grid(x_grid, w_grid))]
        between = Between("Gemm", kernel, [(x, x_grid)], out_grid, constants, (0, 0), {"transB": 1})
    else:
        between = Between("MatMul", kernel, [(x, x_grid)], out_grid, [(w.T, w_grid)], (1,))
    arguments = x, x_grid, w, w_grid.scale, bias if kernel == "QGemm" else None, out_grid
    pair16 = reference.gemm(*arguments, accumulator=reference.accumulate_pair16)
    return between, pair16, reference.gemm(*arguments)


@cache
def everything() -> dict[str, tuple[Between, Array, Array]]:
    found = {f"{n} {d.__name__}": convolved(n, d) for n in LAYERS for d in (np.uint8, np.int8)}
    return found | {
        f"{k} {r}x{n} {d.__name__}": multiplied(k, r, n, d) for k, r, n in GEMMS for d in (np.uint8, np.int8)
    }


@cache
def emulated() -> dict[str, Array]:
    cases = {name: between for name, (between, *_) in everything().items()}
    found = emulation.run_on("Haswell", *side_by_side(cases))
    return {name: between.integers(y) for (name, between), y in zip(cases.items(), found, strict=True)}


def test_every_layer_runs_in_the_kernel_that_it_stands_for() -> None:
    """And gives the exact sums on the CPU of these tests, or the saturated ones if that has no VNNI either."""
    for between, pair16, exact in everything().values():
        have = between.run()
        assert np.array_equal(have, exact) or np.array_equal(have, pair16)


@pytest.fixture
def haswell() -> dict[str, Array]:
    if not emulation.available():
        pytest.skip(ABSENT)
    return emulated()


@pytest.mark.slow
def test_the_model_of_saturation_gives_the_wrong_numbers_of_that_cpu(haswell: dict[str, Array]) -> None:
    assert [name for name, (_, pair16, _) in everything().items() if not np.array_equal(haswell[name], pair16)] == []


@pytest.mark.slow
def test_the_exact_sums_are_not_those_of_that_cpu(haswell: dict[str, Array]) -> None:
    """Only a pure depthwise convolution, also that of one channel, multiplies each weight alone."""
    same = {name for name, (_, _, exact) in everything().items() if np.array_equal(haswell[name], exact)}
    assert same == {f"{name} {d}" for name in EXACT for d in ("uint8", "int8")}


@pytest.mark.slow
def test_pairs_along_another_order_of_k_are_not_those_of_that_cpu(haswell: dict[str, Array]) -> None:
    """The kernel position fastest, as the weight lies in the file."""
    between, pair16, _ = everything()["plain uint8"]
    ((x, x_grid),), ((w, w_grid), (bias, _)) = between.inputs, between.constants
    zero = int(x_grid.zero_point)
    padded = np.pad(x, [(0, 0), (0, 0), (1, 0), (1, 0)], constant_values=zero)
    seen = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))  # [N, C, H, W, 3, 3]
    rows = np.moveaxis(seen, 1, 3).reshape(-1, w[0].size)
    assert between.out is not None
    y = reference.gemm(
        rows, x_grid, w.reshape(len(w), -1), w_grid.scale, bias, between.out, accumulator=reference.accumulate_pair16
    )
    other = np.moveaxis(y.reshape(2, 6, 6, len(w)), -1, 1)
    assert np.array_equal(haswell["plain uint8"], pair16)
    assert (haswell["plain uint8"] != other).mean() > 0.1
