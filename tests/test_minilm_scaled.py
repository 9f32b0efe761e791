"""The job minilm without training, with the outliers of its activations scaled away: what that is worth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from qatgraph.runner import run_job, verify_folder

pytestmark = pytest.mark.slow

JOB = Path(__file__).parent.parent / "examples" / "jobs" / "minilm.toml"
COSINE = 0.9975  # mean over 256 paragraphs, in ONNX Runtime, against the float model; without scaling 0.9935
Json = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("build") / "minilm"
    return run_job(JOB, target, train=False, passes=["scale-outliers"])[1]


def keeps_its_promise(report: Json) -> None:
    assert report["ok"] is True
    assert report["kernels"]["planned"] == report["kernels"]["realized"] == 36
    assert report["kernels"]["mismatches"] == report["overflow"]["unsafe"] == []
    assert report["parity"]["max_steps"] <= 1
    assert COSINE <= report["fidelity"]["engine"]["cosine_mean"] <= 1.0


def test_the_engine_comes_closer_to_float(folder: Path) -> None:
    keeps_its_promise(verify_folder(JOB, folder).as_json())


@pytest.mark.parametrize(("at", "value"), [("fidelity.engine.cosine_mean", 0.9974), ("kernels.realized", 35)])
def test_a_planted_fault_breaks_the_promise(folder: Path, at: str, value: float) -> None:
    worse = copy.deepcopy(verify_folder(JOB, folder).as_json())
    section, part, *rest = at.split(".")
    holder = worse[section] if not rest else worse[section][part]
    holder[rest[0] if rest else part] = value
    with pytest.raises(AssertionError):
        keeps_its_promise(worse)
