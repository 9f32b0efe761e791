"""The linter: each planted defect is found at its node and by its rule alone; what is sound gives nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qatgraph.backends import lint as linter
from qatgraph.backends import lint_conditions
from qatgraph.backends.lint import RULES, lint
from qatgraph.backends.onnx_facts import KINDS, WITH_AXES
from qatgraph.planning.target import Target, load_target
from tests.defects import CLEAN, DEFECTS, ONE, conv, fork, gemm, linear, moved, one
from tests.foreign import Sketch
from tests.lowered import LOWERED, lowered
from tests.qdq import grid


def found(model: Any) -> set[tuple[str, str]]:
    return {(f.rule, f.node) for f in lint(model).findings}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found_at_its_node_by_its_rule_alone(name: str) -> None:
    rule, build = DEFECTS[name]
    assert found(build().proto()) == {(rule, "op")}


@pytest.mark.parametrize("name", CLEAN)
def test_a_sound_file_gives_nothing(name: str) -> None:
    assert found(CLEAN[name]().proto()) == set()


@pytest.mark.parametrize("name", LOWERED)
def test_what_is_lowered_here_gives_nothing(name: str) -> None:
    assert found(lowered(name).proto) == set()


def test_the_reader_knows_the_operations_of_every_int8_row() -> None:
    """A kind that the table renames or adds must not fall out of the linter unseen."""
    axes = {f"{kind}{n}d" for kind in WITH_AXES.values() for n in (1, 2, 3)}
    known = {*KINDS.values(), *axes, "linear", "matmul"}
    rows = [r for r in load_target("ort-cpu").row if r.placement == "int8"]
    unread = {kind for r in rows for kind in r.op.split("|")} - known
    assert unread == {"embedding", "residual_add", "pad", "dequantize"}, (
        "a table, an Add like others, what a Conv does itself, and what the model takes as integers"
    )


def test_every_rule_has_a_planted_defect() -> None:
    planted = {rule for rule, _ in DEFECTS.values()}
    assert {r.id for r in RULES} - planted == {"engine-refuses", "engine-disagrees", "signed-move"}, (
        "these have tests of their own"
    )
    assert len(DEFECTS) >= 30


def test_a_file_that_the_engine_refuses_says_so_and_why() -> None:
    model = one("AveragePool", x=ONE, out=ONE, kernel_shape=[2, 2]).proto()
    assert found(model) == {("engine-refuses", "the file"), ("scale-rank", "op")}
    first = lint(model).findings[0]
    assert first.severity == "wrong"
    assert "must be a scalar" in first.what


@pytest.mark.parametrize("product", [False, True])
def test_a_signed_activation_that_the_engine_moves_makes_it_refuse_the_file(product: bool) -> None:
    model = moved(product=product).proto()
    assert found(model) == {("engine-refuses", "the file"), ("signed-move", "op")}
    model.opset_import[0].version = 20
    assert "signed-move" not in {rule for rule, _ in found(model)}, "older operators name no data type"


def planted(table: Target, row: str, **changes: Any) -> Target:
    rows = tuple(r.model_copy(update=changes) if r.id == row else r for r in table.row)
    return table.model_copy(update={"row": rows})


@pytest.mark.parametrize(
    ("row", "changes", "build", "words"),
    [
        ("conv.qlinear", {"out": ()}, lambda: conv(out=None), "promises QLinearConv"),
        (
            "linear.gemm-int32-bias",
            {"bias": ("row",)},
            lambda: gemm("int32"),
            "the table holds against it: its bias is int32",
        ),
    ],
)
def test_a_false_row_is_a_finding_and_not_a_verdict_on_the_file(
    monkeypatch: pytest.MonkeyPatch, row: str, changes: dict[str, Any], build: Any, words: str
) -> None:
    """The engine is right: a table that says otherwise accuses itself."""
    model, table = build().proto(), load_target("ort-cpu")
    assert ("engine-disagrees", "op") not in found(model)
    monkeypatch.setattr(linter, "load_target", lambda name: planted(table, row, **changes))
    (finding,) = lint(model).findings
    assert (finding.rule, finding.node) == ("engine-disagrees", "op")
    assert words in finding.what


# of weights alone, as in block-layout, the table says nothing that the engine could contradict
NEEDED = [r.id for r in lint_conditions.RULES if r.severity == "slow" and r.id != "block-layout"]
ROWLESS = ("Relu alone between pairs", "Tile between two grids")


@pytest.mark.parametrize("rule", NEEDED)
def test_without_a_condition_the_engine_contradicts_the_table(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """So each is needed, and it is the engine that says so."""
    rest = tuple(r for r in lint_conditions.RULES if r.id != rule)
    monkeypatch.setattr(lint_conditions, "RULES", rest)
    for build in (build for name, (planted, build) in DEFECTS.items() if planted == rule and name not in ROWLESS):
        assert found(build().proto()) == {("engine-disagrees", "op")}


def test_the_sentences_of_the_table_explain_the_form_of_a_bias() -> None:
    (finding,) = lint(linear(bias="vector").proto()).findings
    row = next(r for r in load_target("ort-cpu").row if r.id == "linear.gemm-vector-bias")
    assert finding.why == row.why.format(shape="[4, 16]")
    assert "linear.gemm-int32-bias" in finding.what


@pytest.mark.parametrize(
    ("scale", "rules"), [(0.02, {"float-weight"}), (0.007, {"float-weight", "saturation", "weight-minus-128"})]
)
def test_a_weight_in_float_is_read_as_the_integers_that_the_engine_makes_of_it(scale: float, rules: set[str]) -> None:
    s = Sketch()
    g = grid(scale, 0, np.int8)
    numbers = s.constant(s.rng.uniform(-1, 1, (16, 8)).astype(np.float32))
    s.out(s.op("MatMul", s.qdq(s.input("x", 4, 16)), s.dq(s.q(numbers, g), g)))
    assert {rule for rule, _ in found(s.proto())} == rules


def test_nodes_without_names_are_known_by_their_results() -> None:
    model = fork().proto()
    for node in model.graph.node:
        node.name = ""
    assert found(model) == {("signed-fork", "MatMul -> op_out")}


def test_findings_stand_by_severity_and_count() -> None:
    counted = lint(linear(axis=0, bound=127).proto())
    assert [f.severity for f in counted.findings] == ["wrong", "risk"]
    assert counted.counts == {"wrong": 1, "slow": 0, "risk": 1}
