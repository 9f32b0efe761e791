"""The page on other tools' files: what a run measured is on it, failures, too; and the heads of the scripts."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from tests.defects import conv, relu
from tests.foreign import S8

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("bench_peers")


def test_every_script_names_its_packages_with_their_versions(bench: Any) -> None:
    peers = bench.every_peer()
    assert len(peers) >= 5
    assert [p.name for p in peers if not p.packages or not p.about] == []
    assert [package for p in peers for package in p.packages if "==" not in package] == []
    assert {model for p in peers for model in p.models} == set(bench.MODELS)


def test_scripts_import_nothing_of_ours() -> None:
    assert [p.name for p in sorted((BENCHMARKS / "peers").glob("*.py")) if "qatgraph" in p.read_text()] == []


def record(bench: Any, folder: Path) -> dict[str, Any]:
    """A file with one defect that is repaired, measured as if."""
    onnx.save(conv(relu, out=S8).proto(), folder / "peer.onnx")
    measured = {"float": {"ms": 8.0, "cosine": 1.0}, "file": {"ms": 4.0, "cosine": 0.5}}
    peer = {"model": "m", "name": "peer", "packages": ["peer==1"], "about": "A tool."}
    return {**peer, "error": "", **bench.explain(folder / "peer.onnx"), "measured": measured}


def test_the_page_has_what_was_found_repaired_and_measured(bench: Any, tmp_path: Path) -> None:
    failed = {
        "model": "m",
        "name": "other",
        "packages": ["other==2"],
        "about": "Another.",
        "error": "it has no exporter",
    }
    found = record(bench, tmp_path)
    result = {"isa": "AVX2", "versions": {"onnxruntime": "9"}, "options": {}, "records": [found, failed]}
    text = sys.modules["peers_page"].page(result)
    assert (tmp_path / "peer.fixed.onnx").is_file()
    assert "| peer | 0, 1, 0 | 1, 0, 0 | 8.0 | 4.0 | - | 2.00 | - | 0.5000 | - |" in text
    assert "**slow `activation-not-redundant`, 1, 100% of the multiplications; `--fix` repairs it.**" in text
    assert "Measured on AVX2 with onnxruntime 9" in text
    assert "In float without an explanation: none." in text
    silent = {**result, "records": [{**found, "unexplained": ("op",)}]}
    assert "In float without an explanation: op of peer." in sys.modules["peers_page"].page(silent)
    assert "It writes no file here: `it has no exporter`" in text


def test_a_script_that_fails_leaves_its_last_line(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no"):
        bench._call([sys.executable, "-c", "raise ValueError('no')"], tmp_path)
