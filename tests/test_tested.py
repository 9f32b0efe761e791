"""verify on a version of the engine that the table was not tested with: it warns, and probes the rows of the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

import qatgraph as qg
from qatgraph.api import decide
from qatgraph.backends import ort_cpu
from qatgraph.planning.recipe import Recipe
from qatgraph.planning.target import Target, load_target
from qatgraph.report.report import Report
from tests.false_rows import with_row
from tests.models import ZOO

ORT = load_target("ort-cpu")
ROW = "linear.gemm-int32-bias"


def verify(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str, table: Target = ORT) -> Report:
    """The report of the small MLP, lowered by ``table``, which bears the name of ort-cpu, on an engine so called."""
    monkeypatch.setattr("qatgraph.tested.load_target", lambda name: table)
    monkeypatch.setattr(ort_cpu, "version", lambda: version)
    monkeypatch.setenv("PATH", "")  # no emulator
    case = ZOO["mlp"]
    graph = qg.canonicalize(case.capture())
    qat = qg.prepare(graph, decide(graph, table, Recipe())).eval()
    qg.calibrate(qat, [case.inputs(1)], progress=False)
    return qg.verify(qat, qg.lower(qat, folder / "mlp.onnx"), [case.inputs(2)])


def test_a_tested_version_is_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = verify(tmp_path, monkeypatch, "1.32.0")
    assert report.ok
    assert not [n for n in report.notes if "version" in n]


@pytest.mark.parametrize("version", ["1.33.0", "2.0"])
def test_another_one_is_told_and_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    report = verify(tmp_path, monkeypatch, version)
    assert report.ok, report.failures
    assert [n for n in report.notes if f"version {version} of the engine is not one of 1.24.1 to 1.32.0" in n]


def test_a_row_that_is_false_there_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row also takes rank 3, of which the model has none: only the probe sees it."""
    row = next(r for r in ORT.row if r.id == ROW)
    table = with_row(ORT, row.model_copy(update={"rank": (2, 3)}))
    assert verify(tmp_path, monkeypatch, "1.32.0", table).ok
    report = verify(tmp_path, monkeypatch, "1.33.0", table)
    assert [f for f in report.failures if f"row '{ROW}' is false on this version" in f]


def test_a_row_that_does_not_speak_of_the_version_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = verify(tmp_path, monkeypatch, "1.26.0")
    assert report.failures == ["row 'layer_norm.float' holds for onnxruntime >= 1.27.0, this is 1.26.0"]
