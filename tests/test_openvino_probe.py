"""The rows of the target openvino-cpu on its engine, and false ones, which the probe shows to be so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from qatgraph.backends import openvino_cpu
from qatgraph.planning.target import Row, Target, load_target
from qatgraph.probing.cases import Engine
from qatgraph.probing.search import probe_row
from qatgraph.report.machine import has_vnni

TABLE = load_target("openvino-cpu")
QUICK = 6  # cases a row


@pytest.fixture(scope="module")
def native() -> Iterator[Engine]:
    if not has_vnni():
        pytest.skip("NOT RUN: the table is for CPUs with VNNI; without it OpenVINO is wrong for convolutions in groups")
    with openvino_cpu.engine(TABLE, "native", "") as engine:
        yield engine


def row(name: str) -> Row:
    return next(r for r in TABLE.row if r.id == name)


@pytest.mark.parametrize("one", TABLE.row, ids=lambda r: r.id)
def test_every_row_holds(native: Engine, one: Row) -> None:
    assert probe_row(TABLE, one, native, QUICK).why == ""


@pytest.mark.slow
@pytest.mark.parametrize("one", TABLE.row, ids=lambda r: r.id)
def test_every_row_holds_in_more_cases(native: Engine, one: Row) -> None:
    assert probe_row(TABLE, one, native, 30).why == ""


LIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "another kernel": ("conv.integers", {"kernel": "MatMul"}, "not MatMul"),
    "a part of another": ("max_pool.integers", {"kernel": "Concatenation"}, "not Concatenation"),
    "in float": ("linear.gemm", {"placement": "engine-float"}, "in int8"),
    "in int8": ("clamp.float", {"placement": "int8"}, "not in int8"),
    "another sum": ("conv.integers", {"requant": "moved"}, "wrong"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_false_row_is_shown(native: Engine, lie: str) -> None:
    name, change, why = LIES[lie]
    false = row(name).model_copy(update=change)
    table = Target.model_construct(**{**dict(TABLE), "row": tuple(false if r.id == name else r for r in TABLE.row)})
    found = probe_row(table, false, native, 100)
    assert found.verdict == "false"
    assert why in found.why
