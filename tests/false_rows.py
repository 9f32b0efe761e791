"""False rows: each a change of a true one that no engine of the table honours."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qatgraph.planning.target import Row, Target
from qatgraph.specs import QuantSpec

S8 = QuantSpec.parse("s8 symmetric per-tensor")
GEMM = ("linear.gemm-int32-bias", "linear.gemm-8-bit", "linear.gemm-vector-bias")
ROWS = ("linear.matmul-row-bias", "linear.matmul-vector-bias")
Fields = dict[str, Any] | None  # what becomes another; None where the change does not apply


@dataclass(frozen=True)
class Lie:
    """``change`` makes a row false; ``isa`` is where the engine shows it."""

    change: Callable[[Row], Fields]
    isa: str = "native"


def another_kernel(row: Row) -> Fields:
    return {"kernel": "QLinearWhere"} if row.kernel else None


def in_float(row: Row) -> Fields:
    moves = row.moves  # between grids that differ it does run in float
    return {"placement": "engine-float"} if row.placement == "int8" and row.kernel and not moves else None


def in_int8(row: Row) -> Fields:
    return {"placement": "int8"} if row.placement == "engine-float" else None


def another_bias(row: Row) -> Fields:
    if row.op != "linear" or not row.bias or row.out:
        return None
    other = {"int32": "vector", "row": "vector", "vector": "none", "none": "vector"}[row.bias[0]]
    return {"bias": (other,)} if other not in row.bias else None  # fewer forms are no lie


def read_by_anything(row: Row) -> Fields:
    return {"not_read_by": ()} if row.not_read_by else None


def more_ranks(row: Row) -> Fields:
    more = {**dict.fromkeys(GEMM, 3), **dict.fromkeys(ROWS, 2)}.get(row.id)
    return {"rank": (*row.rank, more)} if more else None


def any_shape(row: Row) -> Fields:
    return {"dynamic": None} if row.dynamic is not None else None


def the_other_shape(row: Row) -> Fields:
    return {"dynamic": not row.dynamic} if row.dynamic is not None else None


def scales_along_k(row: Row) -> Fields:
    spec = QuantSpec.parse("s8 symmetric per-channel(1)")
    return {"weight": (spec,)} if row.op == "linear" and row.weight and row.placement == "int8" else None


def signed_behind_relu(row: Row) -> Fields:
    return {"x": (S8,), "out": (S8,)} if row.fuses_after else None


def only_moved(row: Row) -> Fields:
    moves = "pool" in row.op or row.op == "cat"  # an average of one element; parts on one grid
    return {"requant": "moved"} if row.requant == "through-float" and not moves else None


def not_rounded(row: Row) -> Fields:
    return {"requant": "float-result"} if row.requant in ("scaled-sum", "through-float") else None


def rounded(row: Row) -> Fields:
    return {"requant": "scaled-sum"} if row.requant == "float-result" else None


def full_range(row: Row) -> Fields:
    if row.accumulator != "pair16-without-vnni":
        return None
    return {"weight": (QuantSpec.parse("s8 symmetric per-channel(0)"),)}


def another_k_order(row: Row) -> Fields:
    return {"k_order": "rows"} if row.k_order == "channels-last" else None


def any_groups(row: Row) -> Fields:
    return {"depthwise": None} if row.depthwise else None


def counts_beyond(row: Row) -> Fields:
    return {"beyond": None} if row.beyond is not None else None


def any_step(row: Row) -> Fields:
    return {"finest": 0.0} if row.finest else None


def exact(row: Row) -> Fields:
    return {"deviation": 0} if row.kernel == "QLinearAdd" else None


LIES = {
    change.__name__: Lie(change, isa)
    for isa, changes in {
        "native": (another_kernel, in_float, in_int8, another_bias, read_by_anything, more_ranks, any_shape,
                   the_other_shape, scales_along_k, signed_behind_relu, only_moved, not_rounded, rounded,
                   counts_beyond, any_step),
        "avx2": (full_range, another_k_order, any_groups),
        "sse": (exact,),
    }.items()
    for change in changes
}  # fmt: skip


def planted(target: Target, isa: str) -> Iterator[tuple[str, Target, Row]]:
    """(name, table, row) of every lie that one instruction set shows."""
    for name, lie in LIES.items():
        for row in target.row if lie.isa == isa else ():
            fields = lie.change(row)
            if fields is not None:
                false = row.model_copy(update=fields)
                yield f"{row.id}: {name}", with_row(target, false), false


def with_row(target: Target, row: Row) -> Target:
    return target.model_copy(update={"row": tuple(row if r.id == row.id else r for r in target.row)})


def sample(target: Target, isa: str, count: int, seed: int) -> list[tuple[str, Target, Row]]:
    return random.Random(seed).sample(list(planted(target, isa)), count)
