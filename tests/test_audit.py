"""The command ``audit``: what it prints, its exit codes, what it refuses, and the page of its rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner, Result

from qatgraph.backends import onnx_file
from qatgraph.backends.lint import RULES
from qatgraph.backends.lint_rule import PARTS, SEVERITIES, Rule
from qatgraph.cli import app
from qatgraph.errors import LowerError
from tests.defects import DEFECTS, STEP, gemm, linear
from tests.foreign import Sketch

PAGE = Path(__file__).parent.parent / "docs" / "lint.md"
HEAD = """# Lint

What `qatgraph audit FILE.onnx` finds in QDQ files of any tool, and what `--fix OUT.onnx` repairs. Written from the
rules by `make golden`. **wrong**: the numbers, or the file is refused; **slow**: int8 was meant, float runs, or the
file is larger than it need be; **risk**: wrong or refused on other CPUs. Exit code 1 if something is wrong.

A repaired file is written only if it is proved: between any two quantizes both files give the same numbers, to 1e-5 of
the largest, when they run as they are written. At default options a kernel on integers may round a tie to the other
side, so that outputs can differ by a step of a grid; what was measured is printed.
"""


def audit(*args: Any) -> Result:
    return CliRunner().invoke(app, ["audit", *map(str, args)], env={"COLUMNS": "120"})


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Sketch], Path]:
    def write(sketch: Sketch) -> Path:
        onnx.save(sketch.proto(), tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return write


@pytest.mark.parametrize(
    ("build", "code", "words"),
    [
        (
            linear,
            0,
            ["model.onnx: 0 wrong, 0 slow, 0 risk", "of 1 products (Conv, MatMul, Gemm) 1 run in int8, 0 in float"],
        ),
        (
            lambda: linear(bias="vector"),
            0,
            ["1 slow", "slow bias-form  1  100% of the multiplications  --fix", "op: its bias is a float"],
        ),
        (lambda: linear(axis=0), 1, ["1 wrong", "wrong k-axis-scales  1", "why: ", "do: put the scales on the output"]),
    ],
)
def test_what_it_says_and_the_exit_code(
    written: Callable[[Sketch], Path], build: Callable[[], Sketch], code: int, words: list[str]
) -> None:
    done = audit(written(build()))
    assert done.exit_code == code
    assert [w for w in words if w not in done.stdout] == []


def test_as_json(written: Callable[[Sketch], Path]) -> None:
    found = json.loads(audit(written(linear(bias="vector")), "--json").stdout)
    assert found["counts"] == {"wrong": 0, "slow": 1, "risk": 0}
    assert found["findings"][0]["rule"] == "bias-form"
    assert found["findings"][0]["fix"] is True
    assert found["kernels"] == [{"name": "op", "kernel": "Gemm", "int8": False, "moves": False, "reads": ""}]
    assert found["fix"] is None


def test_many_findings_of_a_rule_are_cut_in_the_text_and_whole_as_json(written: Callable[[Sketch], Path]) -> None:
    s = Sketch()
    y = s.input("x", 4, 16)
    for _ in range(20):
        y = s.op("MatMul", s.qdq(y), s.weight(16, 16, bound=127))
    s.out(y)
    path = written(s)
    assert "and 17 more, see --json" in audit(path).stdout
    assert len(json.loads(audit(path, "--json").stdout)["findings"]) == 20


def test_fix_writes_and_tells(written: Callable[[Sketch], Path], tmp_path: Path) -> None:
    out = tmp_path / "fixed.onnx"
    done = audit(written(gemm("float")), "--fix", out)
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    assert "1 findings repaired, 0 are left" in text
    assert re.search(r"[0-9.]+ ms before, [0-9.]+ ms after \(.+, one thread, interleaved medians\)", text)
    assert "op Gemm MatMulIntegerToFloat" in text
    assert json.loads(audit(out, "--json").stdout)["findings"] == []


def test_fix_as_json_holds_the_proof(written: Callable[[Sketch], Path], tmp_path: Path) -> None:
    found = json.loads(audit(written(linear(bias="vector")), "--json", "--fix", tmp_path / "o.onnx").stdout)["fix"]
    assert found["mended"] == 1
    assert found["proof"]["regions"] == 0
    assert found["after"]["findings"] == []


def test_fix_where_nothing_can_be_repaired_writes_nothing(written: Callable[[Sketch], Path], tmp_path: Path) -> None:
    done = audit(written(linear(bound=127)), "--fix", tmp_path / "o.onnx")
    assert "nothing here can be repaired exactly: no file was written" in done.stdout
    assert not (tmp_path / "o.onnx").exists()


def test_the_file_itself_is_never_changed(written: Callable[[Sketch], Path], tmp_path: Path) -> None:
    path = written(gemm("float"))
    before = path.read_bytes()
    audit(path, "--fix", tmp_path / "o.onnx")
    assert path.read_bytes() == before


def float_file(path: Path) -> None:
    s = Sketch()
    s.out(s.op("Relu", s.input("x", 2)))
    onnx.save(s.proto(), path)


def operator_file(path: Path) -> None:
    s = Sketch()
    s.out(s.op("MatMulInteger", s.input("x", 2, 2, dtype=TensorProto.UINT8), s.constant(np.ones((2, 2), np.int8))))
    onnx.save(s.proto(), path)


def without_data(path: Path) -> None:
    onnx.save(linear().proto(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (path.parent / "weights.bin").unlink()


def short_data(path: Path) -> None:
    onnx.save(linear().proto(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (path.parent / "weights.bin").write_bytes(b"12")


def huge(path: Path) -> None:
    """A sparse file: it takes no room on the disk."""
    onnx.save(linear().proto(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with (path.parent / "weights.bin").open("r+b") as file:
        file.truncate(2**31)


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda p: None, "QG506", "there is no file"),
        (lambda p: p.write_bytes(b""), "QG509", "it has no nodes"),
        (lambda p: p.write_bytes(b"%PDF-1.7 nothing of this kind"), "QG509", "is not an ONNX model"),
        (lambda p: p.write_text('{"version": 1}'), "QG509", "is not an ONNX model"),
        (without_data, "QG510", "weights.bin"),
        (short_data, "QG510", "external data"),
        (huge, "QG511", "holds 2.0 GiB"),
        (float_file, "QG512", "neither QuantizeLinear nor DequantizeLinear"),
        (operator_file, "QG512", "MatMulInteger"),
    ],
)
def test_bad_input_is_refused_with_a_code(tmp_path: Path, make: Callable[[Path], Any], code: str, words: str) -> None:
    make(tmp_path / "bad.onnx")
    with pytest.raises(LowerError) as refused:
        onnx_file.load(tmp_path / "bad.onnx")
    assert refused.value.code == code
    assert words in refused.value.text()
    assert audit(tmp_path / "bad.onnx").exit_code == 1


def test_external_data_that_is_there_is_read(tmp_path: Path) -> None:
    model = gemm("int32", step=STEP * 2).proto()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert "bias-scale" in audit(tmp_path / "m.onnx").stdout


def test_local_functions_are_read_as_their_nodes(tmp_path: Path) -> None:
    """As torch's exporter writes them where it does not optimize."""
    model = linear(bias="vector").proto()
    body = [n for n in model.graph.node if n.name in ("op", "bias")]
    opset = [helper.make_opsetid("", 21)]
    function = helper.make_function("mine", "Linear", ["x", "w", "b"], ["y"], [*body], opset)
    function.node[0].input[:], function.node[1].input[:] = ["x", "w"], [body[0].output[0], "b"]
    function.node[1].output[0] = "y"
    call = helper.make_node("Linear", [*body[0].input, body[1].input[1]], list(body[1].output), "call", domain="mine")
    for node in body:
        model.graph.node.remove(node)
    model.graph.node.append(call)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(model, tmp_path / "functions.onnx")
    assert "bias-form" in audit(tmp_path / "functions.onnx").stdout


# the page


def section(rule: Rule) -> str:
    parts = [f"- **{part}**: {rule.part(part)}" for part in PARTS]
    return "\n".join([f"### `{rule.id}`", "", rule.summary, "", *parts, ""])


def page() -> str:
    groups = [(s, [r for r in RULES if r.severity == s]) for s in SEVERITIES]
    return "\n".join([HEAD, *(line for s, rules in groups for line in (f"## {s}\n", *map(section, rules)))])


def test_the_page_is_current(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--golden-write"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), "a docstring has changed: run `make golden`"


def test_every_rule_says_what_why_and_what_to_do() -> None:
    for rule in RULES:
        assert [part for part in PARTS if not rule.part(part)] == []
        assert rule.summary.endswith(".")
    assert len({r.id for r in RULES}) == len(RULES)


def test_a_docstring_without_a_part_shows() -> None:
    def short() -> None:
        """Something is wrong.

        Why: because.
        """

    rule = Rule(short, "wrong")
    assert (rule.summary, rule.part("Why"), rule.part("Remedy")) == ("Something is wrong.", "because.", "")
    assert section(rule) != section(RULES[0])


def test_every_planted_defect_is_of_a_rule_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {rule for rule, _ in DEFECTS.values() if f"### `{rule}`\n" not in text} == set()
