"""Texts that people read, line by line. ``make golden`` writes them anew; review the diff."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import qatgraph as qg
from qatgraph.ir.graph import Graph
from qatgraph.passes import CANONICALIZE
from qatgraph.rewriting.manager import PassManager
from qatgraph.rewriting.pipeline import Pipeline
from tests.conftest import GOLDEN, Golden, compare_golden
from tests.models import MODELS as ALL
from tests.models import canonical, captured
from tests.rewritten import after

ADDRESS = re.compile(r"0x[0-9a-f]{6,}| object>|<function|\[[^\]]*\bs\d+\b|/(?:home|tmp|usr|root)/")
MODELS = ("mlp", "encoder")
READ = ("cnn", "written", "llama", "clip", "pruned", "decomposed")  # what the passes make of them

ON_REQUEST = {
    "fold-attention-scale": "encoder", "merge-query-key-value": "encoder", "equalize-layers": "cnn",
    "keep-pruning-masks": "pruned",
}  # fmt: skip


def plan_text(name: str) -> str:
    """Without its hash: that one depends on the weights, which are not equal on all machines."""
    plan = qg.plan(captured(name))
    return str(plan).replace(plan.hash()[:12], "hash")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", [captured, canonical])
def test_graph(name: str, stage: Callable[[str], Graph], golden: Golden) -> None:
    golden(f"{name}.{stage(name).stage.value}", str(stage(name)))


@pytest.mark.parametrize("name", READ)
def test_what_the_passes_read(name: str, golden: Golden) -> None:
    golden(f"{name}.canonical", str(canonical(name)))


@pytest.mark.parametrize("name", ON_REQUEST)
def test_what_a_pass_on_request_makes(name: str, golden: Golden) -> None:
    golden(name, str(after(canonical(ON_REQUEST[name]), name)))


@cache
def reports() -> dict[str, str]:
    """What each pass of canonicalization changes in the first model that it changes, as a diff."""
    found: dict[str, str] = {}
    for name in ALL:
        manager = PassManager(Pipeline.parse("canonicalize").steps)
        manager.run(captured(name))
        for report in manager.reports:
            if report.modified:
                found.setdefault(report.name, f"{name}\n{report.diff()}")
    return found


@pytest.mark.parametrize("name", CANONICALIZE)
def test_what_each_pass_changes(name: str, golden: Golden) -> None:
    golden(f"passes/{name}", reports()[name])


def test_plan(golden: Golden) -> None:
    golden("encoder.plan", plan_text("encoder"))


@pytest.mark.parametrize("path", sorted(GOLDEN.rglob("*.txt")), ids=lambda p: str(p.stem))
def test_no_addresses_paths_or_symbols(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ADDRESS.findall(text) == []
    assert text.endswith("\n")


@pytest.mark.parametrize("name", ALL)
def test_a_second_capture_prints_the_same(name: str) -> None:
    assert str(ALL[name].capture()) == str(captured(name))


PRINT = """
import qatgraph as qg
from tests.models import canonical, captured
for name in ("mlp", "encoder"):
    print(captured(name), canonical(name), qg.plan(captured(name)))
"""


def test_another_process_prints_the_same() -> None:
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", PRINT], cwd=root, env=env, capture_output=True, text=True, check=True)
    want = "".join(f"{captured(n)} {canonical(n)} {qg.plan(captured(n))}\n" for n in MODELS)
    assert done.stdout == want


@pytest.mark.parametrize("planted", ["<Node at 0x7f83696cea40>", "float32[s77, 4]", "/home/me/model.py:3"])
def test_the_address_check_sees(planted: str) -> None:
    assert ADDRESS.findall(planted) != []


def test_a_golden_text_that_differs_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with pytest.raises(AssertionError, match=r"there is no text\.txt"):
        compare_golden(path, "a\n", write=False)
    compare_golden(path, "a\n", write=True)
    compare_golden(path, "a\n", write=False)
    with pytest.raises(AssertionError, match=r"text\.txt differs"):
        compare_golden(path, "b\n", write=False)
