"""Real architectures at tiny size, end to end: see ``tests/zoo``. Twelve run in the quick tests, all in the slow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qatgraph.ir.stages import Stage
from qatgraph.planning.target import Target, load_target
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, same, within
from qatgraph.rewriting.pattern import Any, Match, Op
from tests.blocks import WIDTH
from tests.conftest import compare_golden
from tests.lowered import lower, read, write
from tests.models import BATCH
from tests.zoo import GROUPS, ZOO
from tests.zoo.entry import Counts, Entry, regions_of
from tests.zoo.road import Result, compare_engine, train_one_step, walk
from tests.zoo.shapes import vector
from tests.zoo.table import Shares, page, shares

PAGE = Path(__file__).parent.parent / "docs" / "zoo.md"
QUICK = (
    "bert", "gpt2-step", "llama", "t5", "whisper-encoder", "vit", "resnet", "convnext", "wav2vec2", "vae-tiny",
    "one-head", "in-place",
)  # fmt: skip


@cache
def walked(name: str) -> Result:
    return walk(name, ZOO[name])


def whole_zoo() -> list[Result]:
    return [walked(name) for name in ZOO]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in ZOO])
def test_the_whole_road(name: str) -> None:
    assert walked(name).faults == []


def test_the_quick_ones_are_twelve_of_the_zoo() -> None:
    assert len(set(QUICK) & set(ZOO)) == 12


@pytest.mark.slow
def test_what_the_zoo_promises() -> None:
    found = shares(whole_zoo(), ZOO)
    assert found.captured >= 0.95
    assert (found.clean, found.int8) == (1.0, 1.0)
    assert found.regions >= 0.98


@pytest.mark.slow
def test_the_page_is_current(request: pytest.FixtureRequest) -> None:
    compare_golden(PAGE, page(whole_zoo(), GROUPS), write=bool(request.config.getoption("--golden-write")))


# ---------------------------------------------------------------- each check sees a planted fault


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return y


class Silent(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.0


class Branching(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


PLAIN = Entry(Plain, vector, {"x": BATCH}, counts=Counts(activations=1, linears=2))


@dataclass(frozen=True)
class Spoil(RewritePass):
    """Take GELU for ReLU, whatever it declares."""

    name = "spoil"
    stage = Stage.CAPTURED
    numerics = same
    pattern = Op("gelu", Any("x"), name="out")

    def rewrite(self, match: Match, edit: Edit) -> None:
        edit.replace(match["out"], edit.call("relu", match["x"], at=match["out"]))


@dataclass(frozen=True)
class SpoilInSecret(Spoil):
    """The same, under a declaration that hides it."""

    name = "spoil-in-secret"
    numerics = within(10.0)


def false_target(**changes: object) -> Target:
    """ONNX Runtime, with something false in the row of a linear at rank 2."""
    table = load_target("ort-cpu")
    rows = [{**r.model_dump(), **(changes if r.id == "linear.gemm-int32-bias" else {})} for r in table.row]
    return Target.model_validate({**table.model_dump(), "row": rows})


FAULTS: dict[str, tuple[Callable[[], Result], str]] = {
    "a wrong count": (lambda: walk("plain", replace(PLAIN, counts=Counts(linears=2))), "regions: found"),
    "a gap that is none": (lambda: walk("plain", replace(PLAIN, gaps=Counts(linears=1))), "regions: found"),
    "a false kernel": (
        lambda: walk("plain", PLAIN, target=false_target(kernel="QLinearMatMul")),
        "predicts int8 QLinearMatMul",
    ),
    "a false grid": (
        lambda: walk("plain", PLAIN, target=false_target(weight=["s8 symmetric per-tensor"])),
        "overflows 16 bits without VNNI",
    ),
    "a pass that breaks its word": (lambda: walk("plain", PLAIN, passes=[Spoil()]), "canonicalize: QG207"),
    "a pass that hides it": (lambda: walk("plain", PLAIN, passes=[SpoilInSecret()]), "numerics: outputs differ"),
    "a model that gives nothing": (
        lambda: walk("silent", replace(PLAIN, make=Silent)),
        "numerics: every output is zero",
    ),
    "a model that branches": (lambda: walk("branching", replace(PLAIN, make=Branching)), "capture: QG101"),
    "a refusal that does not come": (lambda: walk("plain", replace(PLAIN, refused="QG101")), "capture: it succeeds"),
}


def test_a_model_without_a_fault_has_none() -> None:
    result = walk("plain", PLAIN)
    assert (result.faults, result.planned, result.realized) == ([], 2, 2)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    run, wanted = FAULTS[name]
    assert [f for f in run().faults if wanted in f] != []


@pytest.mark.parametrize(("factor", "wanted"), [(3.0, "differ from the fake-quantized"), (np.nan, "is not finite")])
def test_an_engine_that_computes_something_else_is_found(factor: float, wanted: str) -> None:
    lowered = lower(PLAIN)
    assert compare_engine(lowered.qat, lowered.file, vector(3))[1] == []
    proto = lowered.proto
    name = next(i.name for i in proto.graph.initializer if i.name.startswith("down:dequantize") and "scale" in i.name)
    write(proto, name, read(proto, name) * np.float32(factor))
    faults = compare_engine(lowered.qat, lowered.changed(proto).file, vector(3))[1]
    assert [f for f in faults if wanted in f] != []


def test_a_step_that_diverges_is_found() -> None:
    qat = lower(PLAIN).qat
    assert train_one_step(qat, vector(3)) == []
    with torch.no_grad():
        next(qat.parameters()).fill_(torch.inf)
    assert train_one_step(qat, vector(3)) == ["train: a parameter is not finite"]


def test_a_step_that_moves_nothing_is_found() -> None:
    assert train_one_step(lower(replace(PLAIN, make=Silent)).qat, vector(3)) == ["train: no parameter has moved"]


def test_a_clamp_with_other_bounds_is_no_activation() -> None:
    class Clamps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(0, 6) + x.clamp(min=1e-12) + x.clamp(0, 1)

    graph = Entry(Clamps, vector).capture()
    assert regions_of(graph) == Counts(activations=1)


# ---------------------------------------------------------------- the page and its sums


def results() -> list[Result]:
    clean = Result("one-head", found=Counts(4, 0, 0, 2), planned=2, realized=2, nodes=14, leftover={"where": 1})
    return [clean, Result("vilt", refused="QG101")]


def test_the_shares_count_what_is_known() -> None:
    one, two = results()
    zoo = {"one-head": replace(ZOO["one-head"]), "vilt": ZOO["vilt"]}
    assert shares([one, two], zoo) == Shares(0.5, 1.0, 1.0, 1.0)
    worse = replace(one, found=Counts(3, 0, 5, 2), realized=1, faults=["x"])
    assert shares([worse, two], zoo) == Shares(0.5, 0.0, 5 / 6, 0.5), "a surplus makes up for nothing"


def test_the_page_shows_each_result_and_changes_with_it() -> None:
    groups = {"ours": {name: ZOO[name] for name in ("one-head", "vilt")}}
    text = page(results(), groups)
    assert "| one-head | 14 | yes | where 1 | 6/6 | 2/2 |" in text
    assert "| vilt | | no: QG101 | | | |" in text
    worse = [replace(results()[0], realized=1), results()[1]]
    assert page(worse, groups) != text
