"""The benchmark of the engine: what it writes, and that it counts convolutions as the engine runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch

import qatgraph as qg
from qatgraph.ir.graph import Graph
from qatgraph.job import factory
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.report.machine import has_vnni, isa

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "benchmarks" / "bench_engine.py"
OURS = ("ort-cpu", "ort-cpu-vnni") if has_vnni() else ("ort-cpu",)


def small_network() -> Graph:
    """Untrained."""
    torch.manual_seed(0)
    net = factory(ROOT / "examples" / "jobs" / "digits_cnn.toml", "digits_cnn.py:DigitsCNN", "model")().eval()
    return qg.canonicalize(qg.capture(net, torch.rand(2, 8, 8)))


def lowered(graph: Graph, path: Path, *overrides: Override) -> Path:
    qat = qg.prepare(graph, qg.plan(graph, recipe=Recipe(override=overrides)))
    qg.calibrate(qat, [torch.rand(2, 8, 8)], progress=False)
    qg.lower(qat.eval(), path)
    return path


def test_a_convolution_that_stays_in_float_is_counted_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    convolutions: Callable[[Path], tuple[int, int]] = run_path(str(BENCH))["convolutions"]
    graph = small_network()
    assert convolutions(lowered(graph, tmp_path / "all.onnx")) == (6, 6)
    pinned = Override(select="mix*", place="float", why="the planted fault")
    assert convolutions(lowered(graph, tmp_path / "pinned.onnx", pinned)) == (5, 6)


def unsound(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose ratio is not that of their milliseconds, or whose kernels are not those of their file."""
    base = {r["batch"]: r["ms"] for r in rows if r["file"] == "float"}
    kernels = {"float": "0 of 6", **dict.fromkeys(OURS, "6 of 6"), "quantize_static, u8": "6 of 6"}
    return [
        r
        for r in rows
        if r["float / it"] != pytest.approx(base[r["batch"]] / r["ms"])
        or r["convolutions in int8"] != kernels.get(r["file"], r["convolutions in int8"])
    ]


@pytest.mark.slow
def test_the_quick_benchmark_writes_each_file_at_each_batch_with_its_kernels(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(BENCH), "--quick"], cwd=tmp_path, env=env, check=True, capture_output=True)
    folder = tmp_path / "build" / "bench"
    record = json.loads((folder / "bench_engine.json").read_text(encoding="utf-8"))
    rows = record["rows"]
    assert record["isa"] == isa()
    files = ("float", *OURS, "quantize_static", "quantize_static, u8")
    assert [(r["job"], r["batch"], r["file"]) for r in rows] == list(product(["digits_cnn"], (1, 8), files))
    assert unsound(rows) == []
    text = (folder / "bench_engine.md").read_text(encoding="utf-8")
    assert text.count("| digits_cnn | ") == len(rows)
    assert isa() in text
    assert unsound([rows[0], {**rows[1], "float / it": rows[1]["float / it"] * 2}])
    assert unsound([rows[0], {**rows[1], "convolutions in int8": "5 of 6"}])
