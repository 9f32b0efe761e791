"""``audit --fix``: what is repaired means the same and runs on integers; a wrong repair is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qatgraph.backends import emulation, lint_fix, lint_proof, ort_cpu
from qatgraph.backends.lint import lint
from qatgraph.backends.lint_rule import Finding
from qatgraph.errors import LowerError, VerifyError
from tests.defects import DEFECTS, gemm, linear, moved, two
from tests.foreign import Sketch
from tests.lowered import initializer, write
from tests.qdq import grid

REPAIRED = {
    "scale of rank 1": "QLinearAdd",
    "MatMul, bias vector": "MatMulIntegerToFloat",
    "MatMul, bias row at rank 2": "MatMulIntegerToFloat",
    "MatMul at static rank 3, bias vector": "MatMulIntegerToFloat",
    "Gemm, float bias": "MatMulIntegerToFloat",
    "ReLU of a float product": "MatMulIntegerToFloat",
    "ReLU of a float Gemm": "QGemm",
    "Clip of a float product": "MatMulIntegerToFloat",
    "MaxPool without zero points": "MaxPool",
    "signed activation of two readers": "QLinearMatMul",
    "signed constant operand": "QLinearAdd",
    "table dequantized before Gather": "Gather",
    "weight stored in float": "MatMulIntegerToFloat",
    "weight stored in float, narrowed": "MatMulIntegerToFloat",
    "ReLU in front of symmetric s8": "QLinearConv",
    "Clip in front of symmetric s8": "QLinearConv",
    "Clip inside the grid": "QLinearConv",
    "ReLU between a product and s8": "QLinearMatMul",
    "pair behind an equal pair": "QLinearMatMul",
    "Conv behind two equal quantizes": "QLinearConv",
    "shared zero point": "QLinearMatMul",
}
STEP = 0.01  # a step of 8 bits or so: a kernel that writes integers may round a tie to the other side


def repaired(name: str) -> tuple[Any, Any]:
    model = DEFECTS[name][1]().proto()
    return model, lint_fix.repair(model, lint(model).findings)


@pytest.mark.parametrize(("name", "kernel"), REPAIRED.items())
def test_a_repair_is_equal_and_runs_on_integers(name: str, kernel: str) -> None:
    before, after = repaired(name)
    onnx.checker.check_model(after, full_check=True)
    assert lint(before).findings != ()
    clean = lint(after)
    assert clean.findings == ()
    assert kernel in {k.kernel for k in clean.kernels if k.int8}
    proof = lint_proof.prove(before, after)
    assert proof.regions == 0.0, "the nodes as written give the same bits"
    assert proof.outputs <= (STEP if kernel.startswith("QLinear") else lint_proof.TOLERANCE)


def test_a_residual_sum_leaves_layer_normalization_alone() -> None:
    before, after = repaired("residual addition as Add")
    assert {k.kernel for k in lint(before).kernels} >= {"SkipLayerNormalization"}
    assert {k.kernel for k in lint(after).kernels} >= {"LayerNormalization", "Sum"}
    assert lint_proof.prove(before, after).regions == 0.0


@pytest.mark.parametrize("product", [False, True])
def test_a_file_that_the_engine_refuses_is_mended_and_compared_as_it_is_written(product: bool) -> None:
    before = moved(product=product).proto()
    after = lint_fix.repair(before, lint(before).findings)
    assert lint(after).findings == ()
    proof = lint_proof.prove(before, after)
    assert proof.refused
    assert proof.regions == 0.0


def test_every_repair_is_tried_and_no_other_rule_promises_one() -> None:
    from qatgraph.backends.lint import RULES

    assert {r.id for r in RULES if r.fixable} == set(lint_fix.FIXES)
    assert {DEFECTS[name][0] for name in REPAIRED} | {"skip-layer-norm", "signed-move"} == set(lint_fix.FIXES)


@pytest.mark.parametrize("name", [n for n in DEFECTS if n not in {*REPAIRED, "residual addition as Add"}])
def test_what_has_no_exact_repair_is_left_as_it_is(name: str) -> None:
    before, after = repaired(name)
    assert after.SerializeToString() == before.SerializeToString()


def test_the_saving_of_stored_integers() -> None:
    before, after = repaired("weight stored in float")
    sizes = [sum(numpy_helper.to_array(i).nbytes for i in m.graph.initializer) for m in (before, after)]
    assert sizes[1] < sizes[0] / 2


def test_fix_writes_the_file_and_says_what_it_did(tmp_path: Path) -> None:
    model = two("Add", out=grid([0.02], [128])).proto()
    done = lint_fix.fix(model, lint(model), tmp_path / "out.onnx")
    assert done.mended == 1
    assert done.changed(lint(model)) == [("op", "Add", "QLinearAdd")]
    assert lint(onnx.load(tmp_path / "out.onnx")).findings == ()
    assert done.proof.before_ms > 0 < done.proof.after_ms
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def scale(editor: lint_fix.Editor, labels: set[str]) -> None:
    """A wrong repair: a scale is off by one percent."""
    name = editor.file.nodes[0].input[1]
    write(editor.proto, name, numpy_helper.to_array(initializer(editor.proto, name)) * np.float32(1.01))


def zero(editor: lint_fix.Editor, labels: set[str]) -> None:
    """A wrong repair: the zero point of one dequantize is off by one."""
    node = next(n for n in editor.file.nodes if n.op_type == "DequantizeLinear")
    array = numpy_helper.to_array(initializer(editor.proto, node.input[2]))
    node.input[2] = editor.store("wrong", array + array.dtype.type(1))


def kind(editor: lint_fix.Editor, labels: set[str]) -> None:
    """A wrong repair: a zero point of another type, which the engine refuses."""
    node = next(n for n in editor.file.nodes if n.op_type == "DequantizeLinear")
    node.input[2] = editor.store("wrong", np.zeros(8, np.int16))


def weight(editor: lint_fix.Editor, labels: set[str]) -> None:
    """A wrong repair: one integer of a weight."""
    name = next(i.name for i in editor.proto.graph.initializer if numpy_helper.to_array(i).ndim == 2)
    integers = numpy_helper.to_array(initializer(editor.proto, name)).copy()
    integers[0, 0] += 1
    write(editor.proto, name, integers)


def bias(editor: lint_fix.Editor, labels: set[str]) -> None:
    """A wrong repair: the addition is lost."""
    lint_fix.sums(editor, labels)
    total = next(n for n in editor.proto.graph.node if n.op_type == "Sum")
    del total.input[1]


@pytest.mark.parametrize("wrong", [scale, zero, kind, weight, bias])
@pytest.mark.parametrize("build", [lambda: linear(bias="vector"), lambda: gemm("float")], ids=["MatMul", "Gemm"])
def test_a_wrong_repair_is_refused_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, build: Callable[[], Sketch], wrong: Any
) -> None:
    monkeypatch.setitem(lint_fix.FIXES, "bias-form", wrong)
    model = build().proto()
    with pytest.raises(LowerError) as refused:
        lint_fix.fix(model, lint(model), tmp_path / "out.onnx")
    assert refused.value.code == "QG514"
    assert list(tmp_path.iterdir()) == []


def deep(shift: float = 0.0) -> Any:
    """Two products with a rounding between them."""
    s = Sketch()
    y = s.op("Add", s.op("MatMul", s.qdq(s.input("x", 64, 64)), s.weight(64, 64)), s.constant(np.float32(shift)))
    s.out(s.op("MatMul", s.qdq(y, grid(0.001, 128)), s.weight(64, 64)))
    return s.proto()


def test_a_rounding_that_flips_is_no_difference_and_a_small_bias_is_one() -> None:
    """Between two quantizes the same floats go in, so that rounding does not cascade."""
    assert lint_proof.prove(deep(), deep(1e-7)).regions < lint_proof.TOLERANCE
    with pytest.raises(LowerError, match="QG514"):
        lint_proof.prove(deep(), deep(1e-3))


def test_distance() -> None:
    a = np.array([1.0, -4.0, np.inf])
    assert lint_proof.distance([a], [a]) == 0
    assert lint_proof.distance([a], [a + np.array([0.4, 0, 0])]) == pytest.approx(0.1)
    assert lint_proof.distance([a], [np.zeros(3)]) == float("inf")


@pytest.mark.parametrize(("size", "filled"), [(3, [3]), ("batch", [2, 8])])
def test_dynamic_sizes_are_filled(size: int | str, filled: list[int]) -> None:
    s = Sketch()
    s.input("x", *([size] if isinstance(size, int) else [size, "length"]))
    s.out(s.op("Relu", "x"))
    assert list(lint_proof.random_inputs(s.proto(), 8)["x"].shape) == filled


def test_a_file_that_runs_on_nothing_is_refused() -> None:
    s = Sketch()
    y = s.qdq(s.op("Reshape", s.input("x", "n", "m"), s.constant(np.array([7, 11]))))
    s.out(s.op("MatMul", y, s.weight(11, 4)))
    with pytest.raises(LowerError, match="QG513"):
        lint_proof.prove(s.proto(), s.proto())


@pytest.fixture
def haswell() -> str:
    """A CPU on which products saturate; only such a one refuses the file."""
    if not emulation.available():
        pytest.skip("NOT RUN: qemu-x86_64 is not installed")
    return "Haswell"


def test_the_repair_of_shared_zero_points_lets_the_option_for_exact_products_work(haswell: str) -> None:
    before, after = repaired("shared zero point")
    feed = lint_proof.random_inputs(before, 8)
    option = {"session__x64quantprecision": "1"}
    with pytest.raises(VerifyError, match="Attempt to replace the existing tensor"):
        emulation.run_on(haswell, bytes(before.SerializeToString()), feed, **option)
    (seen,) = emulation.run_on(haswell, bytes(after.SerializeToString()), feed, **option)
    assert np.array_equal(seen, ort_cpu.run(ort_cpu.session(after.SerializeToString()), feed)[0])


def findings_of(rule: str, node: str) -> Finding:
    return Finding(rule, "slow", node, "", "", "", True)


def test_only_the_node_of_a_finding_is_changed() -> None:
    """Of two float biases one is repaired."""
    s = Sketch()
    x = s.qdq(s.input("x", 4, 16))
    for name in ("first", "second"):
        s.out(s.op("Add", s.op("MatMul", x, s.weight(16, 8), name=name), s.floats(8), name=f"{name}_bias"))
    after = lint_fix.repair(s.proto(), [findings_of("bias-form", "first")])
    assert {n.name: n.op_type for n in after.graph.node if "bias" in n.name} == {
        "first_bias": "Sum",
        "second_bias": "Add",
    }
    assert {(f.rule, f.node) for f in lint(after).findings} == {("bias-form", "second")}
