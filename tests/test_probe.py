"""Probing: every row of ort-cpu holds on the engine, and a false one never does, wherever it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

import qatgraph as qg
from qatgraph.backends import emulation, ort_cpu
from qatgraph.planning.target import Row, Target, load_target
from qatgraph.probing.cases import Case, Engine
from qatgraph.probing.report import RowResult
from qatgraph.probing.search import probe_row
from qatgraph.report.machine import has_vnni
from tests.false_rows import LIES, planted, sample, with_row

ORT = load_target("ort-cpu")
EMULATED = ("avx2", "sse")
ABSENT = "NOT RUN: qemu-x86_64 is not installed"
Plant = tuple[str, Target, Row]


@pytest.fixture(scope="module")
def native() -> Iterator[Engine]:
    with ort_cpu.engine(ORT, "native", "") as engine:
        yield engine


@pytest.fixture(scope="module", params=EMULATED)
def emulated(request: pytest.FixtureRequest) -> Iterator[tuple[str, Engine]]:
    """AVX2 without VNNI, where 16-bit sums saturate, and SSE, without fused multiply-adds."""
    if not emulation.available():
        pytest.skip(ABSENT)
    with ort_cpu.engine(ORT, request.param, "") as engine:
        yield request.param, engine


def row(name: str, target: Target = ORT) -> Row:
    return next(r for r in target.row if r.id == name)


def told(result: RowResult) -> str:
    return result.text() if result.verdict == "false" else ""


@pytest.mark.parametrize("one", ORT.row, ids=lambda r: r.id)
def test_a_row_holds(one: Row, native: Engine) -> None:
    result = probe_row(ORT, one, native, 12)
    assert told(result) == ""
    assert result.cases == 12


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["native", *EMULATED])
def test_all_rows_hold_on_every_instruction_set(isa: str) -> None:
    if isa != "native" and not emulation.available():
        pytest.skip(ABSENT)
    found = qg.probe("ort-cpu", isa=isa, examples=100, progress=False)
    assert [r.text() for r in found.false] == []
    assert len(found.rows) == len(ORT.row)


@pytest.mark.parametrize("plant", sample(ORT, "native", 20, seed=4), ids=lambda p: p[0])
def test_a_row_that_was_made_false_is_caught(plant: Plant, native: Engine) -> None:
    _, target, false = plant
    assert told(probe_row(target, false, native, 40))


@pytest.mark.slow
@pytest.mark.parametrize("plant", [*planted(ORT, "native")], ids=lambda p: p[0])
def test_every_row_that_can_be_made_false_is_caught(plant: Plant, native: Engine) -> None:
    _, target, false = plant
    assert told(probe_row(target, false, native, 200))


@pytest.mark.slow
def test_a_row_that_only_another_cpu_makes_false_is_caught_there_alone(
    emulated: tuple[str, Engine], native: Engine
) -> None:
    isa, engine = emulated
    plants = [*planted(ORT, isa)]
    assert plants
    for name, target, false in plants:
        assert "wrong" in told(probe_row(target, false, engine, 300)), name
        assert not has_vnni() or told(probe_row(target, false, native, 20)) == "", name


def test_every_lie_is_told_of_a_row() -> None:
    told_of = {name.partition(": ")[2] for isa in ("native", *EMULATED) for name, _, _ in planted(ORT, isa)}
    assert told_of == set(LIES)


def test_the_counterexample_is_the_smallest_and_readable(native: Engine) -> None:
    one = row("linear.matmul-no-bias")
    false = one.model_copy(update={"not_read_by": ()})
    text = probe_row(with_row(ORT, false), false, native, 100).text()
    assert "'linear.matmul-no-bias' is false: " in text
    assert "x         u8[1, 1] scale 2, zero point 0: " in text
    assert "weight    s8[1, 1] " in text
    assert "read by   clamp, then " in text


def test_the_same_cases_are_drawn_every_time(native: Engine) -> None:
    seen: list[str] = []

    def listen(case: Case) -> qg.Realized:
        seen.append(case.text())
        return native.realize(case)

    for _ in range(2):
        probe_row(ORT, row("conv.qlinear"), replace(native, realize=listen), 20)
    assert seen[:20] == seen[20:]
    assert len(set(seen)) > 10


def test_an_engine_that_is_now_right_now_wrong_is_seen(native: Engine) -> None:
    calls = iter(range(10_000))

    def moody(case: Case) -> qg.Realized:
        found = native.realize(case)
        return found if next(calls) != 5 else replace(found, kernel="another")

    one = row("mul.qlinear")
    assert "now right, now wrong" in told(probe_row(ORT, one, replace(native, realize=moody), 20))


def test_a_shifted_result_is_seen_at_once(native: Engine) -> None:
    """The control of the comparison itself: a deviation of one is allowed where the row says so, two nowhere."""

    def shifted(by: int) -> Engine:
        def realize(case: Case) -> qg.Realized:
            found = native.realize(replace(case, readers=()))
            low = np.clip(found.output.astype(np.int32) + by, 0, 255)
            return replace(found, output=low)

        return replace(native, realize=realize, neighbours=False)

    exact, loose = (row("mul.qlinear").model_copy(update={"deviation": steps}) for steps in (0, 1))
    assert told(probe_row(ORT, exact, shifted(0), 20)) == ""
    assert "wrong" in told(probe_row(ORT, exact, shifted(1), 20))
    assert told(probe_row(ORT, loose, shifted(1), 20)) == ""
    assert "wrong" in told(probe_row(ORT, loose, shifted(2), 20))
