"""A user's operation with an int8 row: its kernel is predicted, and what torch makes of it is the proof."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qatgraph as qg
from qatgraph import operators, ops
from qatgraph.backends import ort_cpu
from qatgraph.ir.graph import Graph
from qatgraph.parity import without_reference
from qatgraph.planning.plan import Plan
from qatgraph.planning.target import load_target
from qatgraph.report.report import Report
from tests.models import floats
from tests.rewritten import Function

U8 = ["u8 affine per-tensor"]
GATE = {"id": "gate", "op": "ownlib.gate", "placement": "int8", "why": "{kind} over {shape}", "x": U8, "out": U8}


@pytest.fixture(autouse=True)
def no_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_overflow.py runs it."""
    monkeypatch.setattr(ort_cpu, "can_emulate", lambda: False)


@pytest.fixture(scope="module")
def gate() -> Iterator[Any]:
    """``ownlib.gate``, a leaky ReLU; it is forgotten behind these tests."""
    tables: list[dict[Any, Any]] = [ops.BY_NAME, operators.TRANSLATIONS]
    before = [dict(t) for t in tables]
    own = torch.library.custom_op(
        "ownlib::gate", lambda x: nn.functional.leaky_relu(x, 0.25), mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    own.register_fake(lambda x: torch.empty_like(x))
    yield own
    for table, was in zip(tables, before, strict=True):
        table.clear()
        table.update(was)


def target(kernel: str) -> qg.Target:
    """ONNX Runtime's table with one row more."""
    table = load_target("ort-cpu").model_dump(mode="json")
    return qg.Target.model_validate({**table, "row": [*table["row"], {**GATE, "kernel": kernel}]})


def graph_of(gate: Any, last: bool) -> Graph:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), Function(gate), *([] if last else [nn.Linear(32, 16)])]
    return qg.capture(nn.Sequential(*layers), floats(2, 5, 16))


ASKED = qg.Override(select="1:ownlib.gate", place="int8")  # at the end it does not pay


def proved(gate: Any, file: Path, *, slope: float = 0.25, kernel: str = "QLinearLeakyRelu", last: bool = False) -> Any:
    """Plan and report of a linear, the gate and another linear, where the file has a gate of the given slope."""
    qg.register_operation(gate, onnx=qg.OnnxOp("LeakyRelu", alpha=slope))
    graph = graph_of(gate, last)
    plan = qg.plan(graph, target(kernel), recipe=qg.Recipe(override=(ASKED,)))
    qat = qg.prepare(graph, plan)
    qg.calibrate(qat, [floats(2, 5, 16)], progress=False)
    return plan, qg.verify(qat, qg.lower(qat, file), [floats(2, 5, 16, seed=1)])


@pytest.mark.parametrize("last", [False, True], ids=["between two linears", "at the end"])
def test_it_runs_in_int8_and_the_report_says_what_its_proof_is(gate: Any, tmp_path: Path, last: bool) -> None:
    plan, report = proved(gate, tmp_path / "model.onnx", last=last)
    report.check()
    assert plan.int8_nodes() == ["0:linear", "1:ownlib.gate", *([] if last else ["2:linear"])]
    assert report.parity["without_reference"] == ["1:ownlib.gate"]
    assert report.parity["regions"] == len(plan.int8_nodes()) - 1
    assert (report.kernels["planned"], report.kernels["int8_tables"]) == (len(plan.int8_nodes()), 0)
    assert "| without_reference | 1:ownlib.gate |" in report.to_markdown()
    assert "what has no integer reference is compared" in report.parity["how"]


def failures(found: tuple[Plan, Report]) -> list[str]:
    return found[1].failures


def test_a_file_that_computes_something_else_is_found(gate: Any, tmp_path: Path) -> None:
    between = failures(proved(gate, tmp_path / "model.onnx", slope=0.5))
    assert len(between) == 1
    assert between[0].startswith("integers in front of '2:linear': values differ by 0.")
    end = failures(proved(gate, tmp_path / "model.onnx", slope=0.5, last=True))
    assert len(end) == 1
    assert end[0].startswith("output 'output': values differ by 0.")


def test_a_row_that_names_another_kernel_is_found(gate: Any, tmp_path: Path) -> None:
    found = failures(proved(gate, tmp_path / "model.onnx", kernel="QLinearSigmoid"))
    assert found[0] == "'1:ownlib.gate': row 'gate' predicts int8 QLinearSigmoid, the engine runs int8 QLinearLeakyRelu"


def test_what_the_reference_knows_is_not_among_them(gate: Any) -> None:
    graph = graph_of(gate, last=False)
    assert without_reference(qg.plan(graph)) == []
    assert without_reference(qg.plan(graph, target("K"))) == ["1:ownlib.gate"]
