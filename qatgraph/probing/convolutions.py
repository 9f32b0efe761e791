"""Convolutions and pools over ``[batch, channels, *sizes]``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from qatgraph import reference
from qatgraph.planning.target import Row
from qatgraph.probing import draws
from qatgraph.probing.cases import Case
from qatgraph.probing.draws import Draw
from qatgraph.probing.operation import Operation, integers
from qatgraph.probing.products import real_bias
from qatgraph.reference import Array
from qatgraph.reference.pooling import pool_windows
from qatgraph.reference.products import conv_shape, window

Values = Mapping[str, Array]


def pads(case: Case) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis; what a kernel takes in that pads comes on top, behind."""
    own = case.attributes["padding"]
    return [(p, p + more) for p, more in zip(own, case.attributes.get("behind", [0] * len(own)), strict=True)]


def _few(draw: Draw, count: int, low: int, high: int) -> list[int]:
    return [draws.count(draw, low, high) for _ in range(count)]


def _conv_sizes(draw: Draw, row: Row, axes: int) -> dict[str, Any]:
    """Sizes that fit each other: at least one whole window in what is padded."""
    kernel, stride, dilation = (_few(draw, axes, 1, most) for most in (3, 2, 2))
    if row.depthwise:
        kernel[-1] = max(kernel[-1], row.least_terms)
    padding = [draws.count(draw, 0, d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True)]
    window = zip(kernel, dilation, padding, _few(draw, axes, 0, 4 if axes < 3 else 1), strict=True)
    sizes = [max(d * (k - 1) + 1 - 2 * p, 1) + more for k, d, p, more in window]
    if row.depthwise:
        groups = outputs = draws.count(draw, 2, 17)
        width = 1
    else:
        groups = draws.one_of(draw, (1, 2, 3))
        width = draws.one_of(draw, [n for n in (1, 2, 3, 4, 8, 17) if n * math.prod(kernel) >= row.least_terms])
        least = 2 if width == 1 < groups and row.depthwise is False else 1  # else each channel had a filter of its own
        outputs = groups * draws.one_of(draw, [n for n in (1, 2, 3, 8) if n >= least])
    return {"kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding, "groups": groups,
            "width": width, "outputs": outputs, "sizes": sizes}  # fmt: skip


def _draw_conv(axes: int) -> Any:
    def draw_one(draw: Draw, row: Row) -> dict[str, Any]:
        found = _conv_sizes(draw, row, axes)
        groups, width, outputs = found.pop("groups"), found.pop("width"), found.pop("outputs")
        shape = (draws.count(draw, 1, 2), groups * width, *found.pop("sizes"))
        if "pad" in row.fuses_before:
            found["behind"] = [draws.count(draw, 0, 2) if k > 1 else 0 for k in found["kernel"]]
        x = draws.activation(draw, draws.one_of(draw, row.x or (draws.U8,)), shape)
        spec = draws.one_of(draw, row.weight or (draws.S8,))
        weight = draws.weight(draw, spec, (outputs, width, *found.pop("kernel")), row.k_order or "channels-last")
        form = draws.one_of(draw, row.bias or ("none", "vector"))
        bias = None if form == "none" else (draws.sum_bias if form == "int32" else draws.floats)(draw, outputs)
        return {"form": row.form, "inputs": {"x": x}, "weight": weight, "bias": bias, "bias_form": form,
                "attributes": found | {"groups": groups}}  # fmt: skip

    return draw_one


def _conv(case: Case, values: Values) -> Array:
    """One product per position of the kernel."""
    assert case.weight is not None
    weight, size = case.weight.real.astype(np.float64), case.attributes
    geometry = {"stride": size["stride"], "dilation": size["dilation"]}
    x = np.pad(values["x"], [(0, 0), (0, 0), *pads(case)])
    out = conv_shape(x.shape[2:], weight.shape[2:], padding=[(0, 0)] * (x.ndim - 2), **geometry)
    groups = size["groups"]
    filters = weight.reshape(groups, -1, *weight.shape[1:])
    total = np.zeros((len(x), groups, filters.shape[1], int(np.prod(out))))
    for at in product(*map(range, weight.shape[2:])):
        seen = x[window(at, out, size["stride"], size["dilation"])]
        at_filters: Array = filters[_at(at)]
        total += at_filters @ seen.reshape(len(x), groups, weight.shape[1], -1)
    return _with_bias(case, total.reshape(len(x), len(weight), *out))


def _at(position: tuple[int, ...]) -> tuple[Any, ...]:
    """The index of one position of a kernel, over all channels."""
    return (..., *position)


def _with_bias(case: Case, y: Array) -> Array:
    return y if case.bias is None else y + real_bias(case).reshape(-1, *[1] * (y.ndim - 2))


def _integer_conv(case: Case) -> Array:
    x, weight, out, size = case.inputs["x"], case.weight, case.out, case.attributes
    assert weight is not None
    assert out is not None
    return reference.conv(
        x.q, x.grid.plain, weight.q, weight.grid.scale, case.bias, out.plain, stride=size["stride"],
        padding=pads(case), dilation=size["dilation"], groups=size["groups"],
    )  # fmt: skip


def _draw_transposed(axes: int) -> Any:
    def draw_one(draw: Draw, row: Row) -> dict[str, Any]:
        kernel, stride, sizes = (_few(draw, axes, 1, 3) for _ in range(3))
        channels, outputs = _few(draw, 2, 1, 5)
        x = draws.activation(draw, draws.U8, (1, channels, *sizes))
        weight = draws.weight(draw, draws.TABLE, (channels, outputs, *kernel))
        return {"form": row.form, "inputs": {"x": x}, "weight": weight, "attributes": {"stride": stride}}

    return draw_one


def _transposed(case: Case, values: Values) -> Array:
    """Each input spreads its filter over the result."""
    assert case.weight is not None
    x, weight, stride = values["x"], case.weight.real.astype(np.float64), case.attributes["stride"]
    out = [(n - 1) * s + k for n, s, k in zip(x.shape[2:], stride, weight.shape[2:], strict=True)]
    total = np.zeros((len(x), weight.shape[1], *out))
    for at in product(*map(range, weight.shape[2:])):
        spread: Array = np.tensordot(weight[_at(at)].T, x, ((1,), (1,))).swapaxes(0, 1)
        total[window(at, x.shape[2:], stride, [1] * len(out))] += spread
    return total


def _draw_pool(axes: int, *, average: bool) -> Any:
    def draw_one(draw: Draw, row: Row) -> dict[str, Any]:
        kernel, stride = _few(draw, axes, 1, 3), _few(draw, axes, 1, 2)
        padding = [draws.count(draw, 0, k // 2) for k in kernel]
        shape = (*_few(draw, 2, 1, 5), *(k + n for k, n in zip(kernel, _few(draw, axes, 0, 4), strict=True)))
        x = draws.activation(draw, draws.one_of(draw, row.x or (draws.U8,)), shape)
        own = {"count_include_pad": draws.flag(draw)} if average else {}
        counts = own.get("count_include_pad", False) and any(padding)
        ceil = (row.beyond is None or (average and not counts)) and draws.flag(draw)
        attributes = {"kernel": kernel, "stride": stride, "padding": padding, "ceil": ceil} | own
        return {"form": row.form, "inputs": {"x": x}, "attributes": attributes}

    return draw_one


def _max_pool(case: Case, values: Values) -> Array:
    size, x = case.attributes, values["x"]
    least = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    found: Array = np.maximum.reduce(_windows(x, size, pads(case), (least, least)))
    return found


def _average_pool(case: Case, values: Values) -> Array:
    size, x = case.attributes, values["x"]
    inside = np.ones_like(x)
    counts = _windows(inside, size, pads(case), (float(size["count_include_pad"]), 0.0))
    found: Array = np.sum(_windows(x, size, pads(case), (0.0, 0.0)), 0) / np.sum(counts, 0)
    return found


def _windows(
    x: Array, size: Mapping[str, Any], padding: list[tuple[int, int]], fill: tuple[float, float]
) -> list[Array]:
    """What each position of the window meets; ``fill``: in the padding, and beyond."""
    each = [1] * (x.ndim - 2)
    how = {"stride": size["stride"], "padding": padding, "dilation": each, "ceil": size["ceil"]}
    out, beyond = pool_windows(x.shape[2:], size["kernel"], **how)
    padded = np.pad(x, [(0, 0), (0, 0), *padding], constant_values=fill[0])
    padded = np.pad(padded, [(0, 0), (0, 0), *((0, more) for more in beyond)], constant_values=fill[1])
    return [padded[window(at, out, size["stride"], each)] for at in product(*map(range, size["kernel"]))]


def _integer_average(case: Case) -> Array:
    x, out, size = case.inputs["x"], case.out, case.attributes
    assert out is not None
    return reference.average_pool(
        x.q, x.grid.plain, out.plain, size["kernel"], stride=size["stride"], padding=pads(case),
        count_include_pad=size["count_include_pad"], ceil=size["ceil"],
    )  # fmt: skip


def _draw_global(draw: Draw, row: Row) -> dict[str, Any]:
    shape = _few(draw, 4, 1, 7)
    return {"form": row.form, "inputs": {"x": draws.activation(draw, draws.one_of(draw, row.x or (draws.U8,)), shape)}}


def _global_average(case: Case, values: Values) -> Array:
    found: Array = values["x"].mean((2, 3), keepdims=True)
    return found


def _integer_global(case: Case) -> Array:
    x, out = case.inputs["x"], case.out
    assert out is not None
    return reference.global_average_pool(x.q, x.grid.plain, out.plain)


CONVOLUTIONS = {
    **{
        f"conv{n}d": Operation(_draw_conv(n), _conv, {"scaled-sum": integers(_integer_conv)}, free_axes=1)
        for n in (1, 2, 3)
    },
    **{f"conv_transpose{n}d": Operation(_draw_transposed(n), _transposed, free_axes=1) for n in (1, 2)},
    **{f"max_pool{n}d": Operation(_draw_pool(n, average=False), _max_pool, free_axes=1) for n in (1, 2, 3)},
    **{
        f"avg_pool{n}d": Operation(
            _draw_pool(n, average=True), _average_pool, {"through-float": integers(_integer_average)}, free_axes=1
        )
        for n in (1, 2, 3)
    },
    "global_avg_pool": Operation(
        _draw_global, _global_average, {"through-float": integers(_integer_global)}, free_axes=1
    ),
}
