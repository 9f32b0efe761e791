"""The law of the linter: a product of dequantized operands that runs in float has a finding that says why."""

from __future__ import annotations

import pytest

from qatgraph.backends import lint_conditions
from qatgraph.backends.lint import lint
from tests.defects import CLEAN, DEFECTS, conv, fork, linear
from tests.foreign import S8, U8, Sketch


@pytest.mark.parametrize("name", [*DEFECTS, *CLEAN])
def test_no_product_falls_to_float_in_silence(name: str) -> None:
    build = DEFECTS[name][1] if name in DEFECTS else CLEAN[name]
    assert lint(build().proto()).unexplained == ()


@pytest.mark.parametrize(
    ("rule", "build"),
    [
        ("signed-fork", fork),
        ("no-output-quantize", lambda: conv(out=None)),
        ("bias-form", lambda: linear(bias="vector")),
    ],
)
def test_a_rule_that_is_missing_breaks_the_law(monkeypatch: pytest.MonkeyPatch, rule: str, build: object) -> None:
    rest = tuple(r for r in lint_conditions.RULES if r.id != rule)
    monkeypatch.setattr(lint_conditions, "RULES", rest)
    assert callable(build)
    assert lint(build().proto()).unexplained == ("op",)


def three_convolutions() -> Sketch:
    """One on integers, one that falls to float for lack of a quantize, and one of twice the work without any Q/DQ."""
    s = Sketch()
    x = s.qdq(s.input("x", 1, 8, 6, 6))
    y = s.qdq(s.op("Conv", x, s.weight(8, 8, 3, 3), name="int8", pads=[1] * 4))
    y = s.op("Conv", y, s.weight(8, 8, 3, 3), name="float", pads=[1] * 4)
    s.out(s.op("Conv", s.op("Softsign", y), s.floats(16, 8, 3, 3), name="bare", pads=[1] * 4))
    return s


def test_what_becomes_of_the_products_and_what_they_cost() -> None:
    found = lint(three_convolutions().proto())
    assert [(p.node, p.runs, p.work) for p in found.products] == [
        ("int8", "int8", 0.25),
        ("float", "float", 0.25),
        ("bare", "bare", 0.5),
    ]
    assert found.work("no-output-quantize") == 0.25
    assert found.as_json()["products"][0] == {"node": "int8", "runs": "int8", "work": 0.25}


def test_the_rule_that_costs_most_comes_first() -> None:
    """In the order of the rules a bias stands before a missing quantize."""

    def both(size: int) -> list[str]:
        s = Sketch()
        x = s.qdq(s.input("x", 1, 8, size, size))
        s.out(s.op("Conv", x, s.weight(8, 8, 3, 3)))
        rows = s.qdq(s.input("rows", 4, 64), U8)
        s.out(s.op("Add", s.op("MatMul", rows, s.weight(64, 64)), s.floats(64)))
        return [f.rule for f in lint(s.proto()).findings]

    assert both(4) == ["bias-form", "no-output-quantize"]
    assert both(20) == ["no-output-quantize", "bias-form"]


def test_signed_forks_are_left_alone_where_the_engine_would_quantize_a_weight() -> None:
    s = Sketch()
    x = s.qdq(s.input("x", 1, 8, 6, 6), S8)
    for _ in range(2):
        s.out(s.qdq(s.op("Conv", x, s.floats(8, 8, 3, 3)), S8))
    findings = [f for f in lint(s.proto()).findings if f.rule == "signed-fork"]
    assert findings
    assert not any(f.fix for f in findings)
