"""The job digits with training, over three seeds: every linear in int8, and as good as float."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from qatgraph.backends.ort_cpu import audit
from qatgraph.job import load_job, make
from qatgraph.kernels import owner
from qatgraph.runner import run_job

pytestmark = pytest.mark.slow

JOB = Path(__file__).parent.parent / "examples" / "jobs" / "digits.toml"
SEEDS = ("0", "1", "2")
Json = dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Json, Path]:
    report, folder = run_job(JOB, tmp_path_factory.mktemp("build") / "digits")
    return report.as_json(), folder


@pytest.fixture(scope="module")
def linears() -> set[str]:
    """What must become int8, from the user's own (here untrained) model."""
    model = make(JOB, load_job(JOB).model, "model", 0, {"epochs": 0})
    return {f"{n}:linear" for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def all_linears_are_int8(report: Json, int8: set[str], linears: set[str]) -> None:
    assert report["ok"] is True
    assert report["kernels"]["planned"] == report["kernels"]["realized"] == len(linears) == 26
    assert report["kernels"]["mismatches"] == []
    assert int8 == linears


def top1_is_within_half_a_point(report: Json) -> None:
    fidelity = report["fidelity"]
    each = fidelity["by_seed"]
    assert set(each) == set(SEEDS)
    for stage in ("float", "engine"):
        mean = sum(each[seed][stage]["top1"] for seed in SEEDS) / 3
        assert fidelity[stage]["top1"] == pytest.approx(mean)
        assert mean > 0.9
    lost = fidelity["float"]["top1"] - fidelity["engine"]["top1"]
    assert lost <= 0.005, f"the engine loses {100 * lost:.2f} points of top-1"


def test_every_linear_is_planned_and_realized_in_int8(run: tuple[Json, Path], linears: set[str]) -> None:
    report, folder = run
    int8 = {owner(n.name) for n in audit((folder / "digits.onnx").read_bytes()) if n.int8 and not n.moves}
    all_linears_are_int8(report, int8, linears)
    with pytest.raises(AssertionError):
        all_linears_are_int8(report, int8 - {"head:linear"}, linears)
    with pytest.raises(AssertionError):
        all_linears_are_int8({**report, "kernels": {**report["kernels"], "realized": 25}}, int8, linears)


def test_the_engine_is_as_good_as_float(run: tuple[Json, Path]) -> None:
    top1_is_within_half_a_point(run[0])


def worse(report: Json, points: float) -> Json:
    """A report whose engine is so much worse than float, in every seed and in the mean."""
    found = copy.deepcopy(report)
    for one in (found["fidelity"], *found["fidelity"]["by_seed"].values()):
        one["engine"]["top1"] = one["float"]["top1"] - points / 100
    return found


def test_the_same_check_fails_on_worse_numbers(run: tuple[Json, Path]) -> None:
    top1_is_within_half_a_point(worse(run[0], 0.4))
    with pytest.raises(AssertionError, match=r"loses 0\.60 points"):
        top1_is_within_half_a_point(worse(run[0], 0.6))
    unlike = copy.deepcopy(run[0])
    unlike["fidelity"]["engine"]["top1"] += 0.01  # a mean that is not the mean of its seeds
    with pytest.raises(AssertionError):
        top1_is_within_half_a_point(unlike)


def test_training_helps_and_is_recorded(run: tuple[Json, Path]) -> None:
    loss = run[0]["fidelity"]["loss"]
    assert 0 < loss["last_20_mean"] < loss["first"]
