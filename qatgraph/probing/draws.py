"""What hypothesis draws of every case: shapes, integers, grids. The first of each choice is what it shrinks to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from qatgraph.planning.target import Row
from qatgraph.probing.cases import STORAGE, Grid, Operand
from qatgraph.reference import Array
from qatgraph.specs import QuantSpec, ScaleRule, Scheme

Draw = Callable[[st.SearchStrategy[Any]], Any]
# sizes at and around the widths of vector registers and the blocks of kernels
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 67)
U8, S8, TABLE = map(
    QuantSpec.parse, ("u8 affine per-tensor", "s8 symmetric per-channel(0) pair-safe", "s8 symmetric per-tensor")
)
PAIR_LIMIT = 128  # docs/decisions/pair-safe-scales.md
SEEDS = st.integers(0, 2**16)


def one_of(draw: Draw, options: Sequence[Any]) -> Any:
    return draw(st.sampled_from(list(options)))


def count(draw: Draw, low: int, high: int) -> int:
    return int(draw(st.integers(low, high)))


def flag(draw: Draw) -> bool:
    return bool(draw(st.booleans()))


def size(draw: Draw, most: int = SIZES[-1]) -> int:
    return int(one_of(draw, [s for s in SIZES if s <= most]))


def leading(draw: Draw, rank: int) -> tuple[int, ...]:
    """The sizes in front of the last axis: few elements in all, and one long axis at rank 2."""
    return (size(draw, 33),) if rank == 2 else tuple(draw(st.integers(1, 3)) for _ in range(rank - 1))


def rank_of(draw: Draw, row: Row, ranks: Sequence[int]) -> int:
    return int(one_of(draw, row.rank or ranks))


def integers(draw: Draw, shape: Sequence[int], low: int, high: int) -> Array:
    """All the same, or only the two ends, or anything between: what saturates, and what does not."""
    kind = one_of(draw, ["same", "ends", "any"])
    if kind == "same":
        ends = [v for v in (0, high, low, (high + 1) // 2) if low <= v <= high]
        return np.full(shape, draw(st.sampled_from(ends) | st.integers(low, high)))
    random = np.random.default_rng(draw(SEEDS))
    return random.choice([low, high], shape) if kind == "ends" else random.integers(low, high, shape, endpoint=True)


def floats(draw: Draw, shape: Sequence[int]) -> Array:
    if one_of(draw, ["same", "any"]) == "same":
        return np.full(shape, one_of(draw, [0.0, 1.0, -0.37]), np.float32)
    return np.random.default_rng(draw(SEEDS)).normal(0, 2, shape).astype(np.float32)


def scale(draw: Draw, rule: ScaleRule = ScaleRule.FREE) -> Array:
    found = one_of(draw, [1.0, 0.5, 0.015625] if rule is ScaleRule.POWER_OF_TWO else [2.0, 0.5, 0.0123, 0.1])
    return np.asarray(found, np.float32)


def scales(draw: Draw, count: int, rule: ScaleRule) -> Array:
    """One for each channel, equal or far apart."""
    first = np.full(count, scale(draw, rule))
    if one_of(draw, ["same", "any"]) == "same":
        return first
    exponents = np.random.default_rng(draw(SEEDS)).uniform(-5, 5, count)
    factors = np.exp2(np.rint(exponents) if rule is ScaleRule.POWER_OF_TWO else exponents)
    return (first * factors).astype(np.float32)


def zero_point(draw: Draw, spec: QuantSpec) -> int:
    if spec.scheme is Scheme.SYMMETRIC:
        return 0
    middle = (spec.qmin + spec.qmax + 1) // 2
    return int(draw(st.sampled_from([spec.qmin, middle, spec.qmax]) | st.integers(spec.qmin, spec.qmax)))


def activation(draw: Draw, spec: QuantSpec, shape: Sequence[int]) -> Operand:
    grid = Grid(spec.dtype, scale(draw, spec.scale), zero_point(draw, spec))
    return Operand(integers(draw, shape, spec.qmin, spec.qmax).astype(STORAGE[spec.dtype]), grid)


def weight(draw: Draw, spec: QuantSpec, shape: Sequence[int], k_order: str = "rows") -> Operand:
    """Constant integers; those that are pair-safe are drawn in the order in which the engine's pairs lie."""
    channels = k_order in ("channels-last", "by-position")
    q = integers(draw, (shape[0], *shape[2:], shape[1]) if channels else shape, spec.qmin, spec.qmax).astype(np.int32)
    if spec.scale is ScaleRule.PAIR_SAFE:
        tighten(q.reshape(len(q), -1))
    if spec.scale is ScaleRule.PAIR_SAFE_BY_POSITION:
        tighten(q)
    if spec.block is not None:
        blocks = (shape[0], -(-shape[1] // spec.block))
        every = scales(draw, blocks[0] * blocks[1], spec.scale).reshape(blocks)
        return Operand(q.astype(STORAGE[spec.dtype]), Grid(spec.dtype, every, block=spec.block))
    found = scale(draw, spec.scale) if spec.axis is None else scales(draw, shape[spec.axis], spec.scale)
    q = np.ascontiguousarray(np.moveaxis(q, -1, 1)) if channels else q
    return Operand(q.astype(STORAGE[spec.dtype]), Grid(spec.dtype, found, 0, spec.axis))


def tighten(rows: Array) -> None:
    """Make every pair (2k, 2k+1) of one sign in a row sum to at most 128, in place: exactly, where it was more."""
    even = rows.shape[-1] // 2 * 2
    a, b = rows[..., 0:even:2], rows[..., 1:even:2]
    most = PAIR_LIMIT - np.abs(a)
    beyond = (a * b > 0) & (np.abs(b) > most)
    b[beyond] = (np.sign(b) * most)[beyond]


def sum_bias(draw: Draw, count: int) -> Array:
    """An int32 bias, of the sizes that sums have."""
    kind = one_of(draw, ["same", "any"])
    if kind == "same":
        return np.full(count, one_of(draw, [0, 1, -100_000]), np.int32)
    return np.random.default_rng(draw(SEEDS)).integers(-(2**20), 2**20, count).astype(np.int32)


def grid_over(draw: Draw, spec: QuantSpec, values: Array) -> Grid:
    """A grid for results: it covers them, or clips the largest, at any zero point."""
    zero = zero_point(draw, spec)
    top = float(np.abs(values).max(initial=0.0)) or 1.0
    return Grid(spec.dtype, _step(draw, spec, top, max(zero - spec.qmin, spec.qmax - zero)), zero)


def grid_of_halves(draw: Draw, spec: QuantSpec, grid: Grid) -> Grid:
    """A grid two or four times as coarse as another one: half or a quarter of its steps lie in the middle of two."""
    return Grid(spec.dtype, np.asarray(grid.scale * np.float32(one_of(draw, [2, 4]))), zero_point(draw, spec))


def grid_above(draw: Draw, spec: QuantSpec, values: Array, most: float) -> Grid:
    """A grid for results of which 0 is the smallest and ``most`` the largest, as observers give it."""
    zero = 0 if spec.scheme is Scheme.SYMMETRIC else spec.qmin
    top = min(float(values.max(initial=0.0)), most) or 1.0
    found = _step(draw, spec, top, spec.qmax - zero)
    return Grid(spec.dtype, np.minimum(found, np.float32(most / (spec.qmax - zero))), zero)


def _step(draw: Draw, spec: QuantSpec, top: float, steps: int) -> Array:
    found = max(top * one_of(draw, [1.0, 0.4, 1.7]) / steps, 1e-30)
    if spec.scale is ScaleRule.POWER_OF_TWO:
        found = np.exp2(np.ceil(np.log2(found)))
    return np.asarray(found, np.float32)


def axes(draw: Draw, row: Row, count: int) -> tuple[int, ...]:
    """The axes without a size, of the first ``count``: as the row wants, or any."""
    if row.dynamic is False or not count:
        return ()
    least = 1 if row.dynamic else 0
    return tuple(sorted(draw(st.sets(st.integers(0, count - 1), min_size=least, max_size=count))))
