"""Grids as values: their text, their meet, and what is not a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatgraph.specs import DType, Granularity, QuantSpec, ScaleRule, Scheme

Meet = Callable[[QuantSpec, QuantSpec], QuantSpec | None]

_where = st.one_of(
    st.just((Granularity.PER_TENSOR, None)), st.tuples(st.just(Granularity.PER_CHANNEL), st.integers(0, 7))
)
grids = st.builds(
    lambda dtype, scheme, where, scale: QuantSpec(dtype, scheme, where[0], where[1], scale),
    st.sampled_from(DType),
    st.sampled_from(Scheme),
    _where,
    st.sampled_from(ScaleRule),
)
FULL = QuantSpec(DType.S8, Scheme.SYMMETRIC, Granularity.PER_CHANNEL, 0, ScaleRule.PAIR_SAFE)


def survives(spec: QuantSpec, write: Callable[[QuantSpec], str]) -> bool:
    return QuantSpec.parse(write(spec)) == spec


@settings(deadline=None)
@given(grids)
def test_text_round_trip(spec: QuantSpec) -> None:
    assert survives(spec, str)
    assert QuantSpec.parse(f"  {str(spec).replace(' ', '   ')} ") == spec


def test_a_writer_that_forgets_the_scale_rule_does_not_survive() -> None:
    assert not survives(FULL, lambda s: str(replace(s, scale=ScaleRule.FREE)))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (FULL, "s8 symmetric per-channel(0) pair-safe"),
        (QuantSpec(DType.U8, Scheme.AFFINE), "u8 affine per-tensor"),
        (QuantSpec(DType.S8, scale=ScaleRule.POWER_OF_TWO), "s8 symmetric per-tensor power-of-two"),
        (
            QuantSpec(DType.S32, granularity=Granularity.PER_CHANNEL, axis=1, scale=ScaleRule.DERIVED),
            "s32 symmetric per-channel(1) derived",
        ),
    ],
)
def test_text(spec: QuantSpec, text: str) -> None:
    assert str(spec) == text


def broken_laws(meet: Meet, a: QuantSpec, b: QuantSpec, c: QuantSpec) -> list[str]:
    """The laws of a meet, and that only equal grids have one, but for a free scale that yields to a bound one."""
    ab = meet(a, b)
    same_grid = replace(a, scale=b.scale) == b
    yields = ScaleRule.FREE in (a.scale, b.scale) and ScaleRule.DYNAMIC not in (a.scale, b.scale)
    scales_agree = a.scale is b.scale or yields
    laws = {
        "idempotent": meet(a, a) == a,
        "commutative": ab == meet(b, a),
        "satisfies both": ab is None or (meet(ab, a) == ab and meet(ab, b) == ab),
        "a conflict is None": (ab is not None) == (same_grid and scales_agree),
        "associative": _chain(meet, a, b, c) == _chain(meet, c, b, a),
    }
    return [law for law, holds in laws.items() if not holds]


def _chain(meet: Meet, *specs: QuantSpec) -> QuantSpec | None:
    found: QuantSpec | None = specs[0]
    for spec in specs[1:]:
        found = None if found is None else meet(found, spec)
    return found


related = grids.flatmap(
    lambda s: st.tuples(*(st.one_of(st.builds(replace, st.just(s), scale=st.sampled_from(ScaleRule)), grids),) * 3)
)


@settings(deadline=None)
@given(related)
def test_meet(specs: tuple[QuantSpec, QuantSpec, QuantSpec]) -> None:
    assert broken_laws(QuantSpec.meet, *specs) == []


def test_a_free_scale_yields_to_a_bound_one() -> None:
    free = replace(FULL, scale=ScaleRule.FREE)
    assert FULL.meet(free) == free.meet(FULL) == FULL
    assert FULL.meet(replace(FULL, scale=ScaleRule.POWER_OF_TWO)) is None


def test_careless_meets_break_the_laws() -> None:
    def blind(a: QuantSpec, b: QuantSpec) -> QuantSpec | None:
        return a.meet(replace(b, axis=a.axis))

    def one_sided(a: QuantSpec, b: QuantSpec) -> QuantSpec | None:
        return a if a.meet(b) is not None else None

    free = replace(FULL, scale=ScaleRule.FREE)
    assert "a conflict is None" in broken_laws(blind, FULL, replace(FULL, axis=1), FULL)
    assert "commutative" in broken_laws(one_sided, free, FULL, FULL)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "u8",
        "u8 affine",
        "u9 affine per-tensor",
        "u8 afine per-tensor",
        "u8 affine per-row",
        "u8 affine per-tensor often",
        "u8 affine per-tensor free free",
        "s8 symmetric per-channel(x)",
        "s8 symmetric per-channel(0))",
        "s8 symmetric per-channel(0",
        "s8 symmetric per-channel()",
        "s8 symmetric per-channel",
        "s8 symmetric per-tensor(1)",
        "s8 symmetric per-channel(-1)",
    ],
)
def test_what_is_not_a_grid(text: str) -> None:
    """Also a grid per channel without its channel: it would silently become one scale for all."""
    with pytest.raises(ValueError, match=r"."):
        QuantSpec.parse(text)


def test_ranges() -> None:
    assert [(d.qmin, d.qmax) for d in DType] == [(0, 255), (-127, 127), (-7, 7), (-(2**31) + 1, 2**31 - 1)]
    assert (FULL.qmin, FULL.qmax) == (-127, 127)
