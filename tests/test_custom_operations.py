"""Operations of a user's own ``torch.library``: in patterns, plans, target rows, training, and in ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxscript import opset23, script
from torch import Tensor, nn

import qatgraph as qg
from qatgraph import operators, ops
from qatgraph.backends import ort_cpu
from qatgraph.backends.artifact import parse
from qatgraph.errors import LowerError, PassError, VerifyError
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from qatgraph.planning.plan import Plan
from qatgraph.planning.target import load_target
from qatgraph.report.report import Report
from qatgraph.rewriting.matcher import match
from qatgraph.rewriting.pattern import Pattern
from qatgraph.specs import QuantSpec
from tests.models import floats

EXAMPLE = Path(__file__).parent.parent / "examples" / "custom_operation.py"
TABLE = EXAMPLE.with_suffix(".toml")


@pytest.fixture(scope="module", autouse=True)
def registry() -> Iterator[None]:
    """What these tests register is forgotten behind them."""
    tables: list[dict[Any, Any]] = [ops.BY_NAME, operators.TRANSLATIONS]
    before = [dict(t) for t in tables]
    yield
    for table, was in zip(tables, before, strict=True):
        table.clear()
        table.update(was)


@pytest.fixture(scope="module")
def example(registry: None) -> Any:
    spec = importlib.util.spec_from_file_location("custom_operation_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- the example


def lines_of(*texts: str) -> int:
    return sum(bool(line.strip()) for text in texts for line in text.splitlines())


def test_the_example_is_short() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (EXAMPLE, TABLE)]
    assert lines_of(*texts) <= 60
    assert lines_of(*texts, "\n".join(["one more"] * 60)) > 60


Run = tuple[Plan, Report]


@pytest.fixture(scope="module", params=["ort-cpu", str(TABLE)], ids=["ort-cpu", "a table of one's own"])
def run(request: pytest.FixtureRequest, example: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    found: Run = example.main(request.param, tmp_path_factory.mktemp("run") / "model.onnx")
    return found


def test_the_example_is_lowered_and_proved(run: Run) -> None:
    plan, report = run
    assert report.failures == []
    assert plan.int8_nodes() == ["0:linear", "2:linear"]
    assert report.fidelity["engine"]["cosine_min"] > 0.999


def test_the_plan_says_why_the_operation_is_float(run: Run) -> None:
    plan, _ = run
    decision = next(d for d in plan.decisions if d.subject == "1:mylib.swish")
    prediction = plan.prediction("1:mylib.swish")
    if plan.target == "ort-cpu":
        assert decision.why == "no row of the target fits '1:mylib.swish', a mylib.swish: it stays in float"
        assert prediction is None
    else:
        assert (str(decision.author), decision.choice) == ("row swish.float", "engine-float as QuickGelu")
        assert prediction is not None
        assert prediction.kernel == "QuickGelu"


def test_a_row_that_names_the_wrong_kernel_is_found(example: Any, tmp_path: Path) -> None:
    table = tmp_path / "wrong.toml"
    table.write_text(TABLE.read_text(encoding="utf-8").replace('"QuickGelu"', '"Sigmoid"'), encoding="utf-8")
    _, report = example.main(str(table), tmp_path / "model.onnx")
    assert report.failures[0].startswith("'1:mylib.swish': row 'swish.float' predicts float Sigmoid, the engine runs")
    with pytest.raises(VerifyError, match="QG601"):
        report.check()


# ---------------------------------------------------------------- patterns and passes


class Net(nn.Module):
    """A function between two linears: [2, 3, 8] -> [2, 3, 8]."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.out, self.function = nn.Linear(8, 8), nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.function(self.fc(x)))
        return y


def captured(function: Callable[[Tensor], Tensor]) -> Graph:
    torch.manual_seed(0)
    return qg.capture(Net(function).eval(), floats(2, 3, 8))


def found(pattern: Pattern, graph: Graph) -> list[str]:
    return [record(n).name for n in graph.nodes if match(pattern, n) is not None]


def swish_of_linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    result: Tensor = torch.ops.mylib.swish(torch.nn.functional.linear(x, w, b))
    return result


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (qg.Op("mylib.swish"), ["Net:mylib.swish"]),
        (qg.Op("mylib.swish", qg.Op("linear", name="fc")), ["Net:mylib.swish"]),
        (qg.Op("linear", qg.Op("mylib.swish|silu", qg.AnyValue("x"))), ["out:linear"]),
        (qg.Op("mylib.swish", qg.Op("mylib.swish")), []),
        (qg.Code(swish_of_linear, ((2, 8), qg.Weight(4, 8), qg.Weight(4))), ["Net:mylib.swish"]),
    ],
    ids=["alone", "behind a linear", "as an operand", "twice", "as code"],
)
def test_its_kind_is_its_name_in_patterns(example: Any, pattern: Pattern, names: list[str]) -> None:
    assert found(pattern, captured(example.swish)) == names


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (qg.Op("mylib.swoosh"), r"no operation of the kind 'mylib.swoosh'[\s\S]*did you mean 'mylib.swish'"),
        (qg.Op("mylib.swish", qg.AnyValue("x"), qg.AnyValue("y")), "'mylib.swish' has at most 1 operands"),
        (qg.Op("mylib.swish", where={"beta": 1.0}), "'mylib.swish' has no attribute 'beta'"),
    ],
    ids=["of another name", "of too many operands", "of an attribute that it lacks"],
)
def test_a_pattern_that_cannot_match_it_is_refused(example: Any, pattern: Pattern, why: str) -> None:
    with pytest.raises(PassError, match=rf"QG209[\s\S]*{why}"):
        type("Own", (qg.RewritePass,), {"name": "own-pass", "pattern": pattern})


class UseSwish(qg.RewritePass):
    """Write silu as mylib.swish."""

    name = "use-swish"
    numerics = qg.within(1e-12)
    pattern = qg.Op("silu", qg.AnyValue("x"), name="silu")

    def rewrite(self, match: qg.Match, edit: qg.Edit) -> None:
        edit.replace(match["silu"], edit.call("mylib.swish", match["x"], at=match["silu"]))


def test_a_rewrite_may_make_it(example: Any) -> None:
    graph = captured(nn.functional.silu)
    after = qg.canonicalize(graph, [UseSwish()])
    assert [record(n).kind for n in after.nodes] == ["linear", "mylib.swish", "linear"]
    assert torch.allclose(after(floats(2, 3, 8)), graph(floats(2, 3, 8)), atol=1e-6)


def narrow(x: Tensor) -> Tensor:
    """As a kernel that was compiled for one type."""
    if x.dtype != torch.float32:
        raise RuntimeError("expected scalar type Float")
    return x * 2


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("expected nothing")


@pytest.mark.parametrize(("kernel", "runs"), [(narrow, True), (broken, False)])
def test_a_kernel_for_float32_only_does_not_stop_the_checks_in_float64(
    example: Any, kernel: Callable[[Tensor], Tensor], runs: bool
) -> None:
    own = library(f"{kernel.__name__}(Tensor x) -> Tensor", kernel)
    graph = captured(lambda x: own(nn.functional.silu(x)))
    manager = qg.PassManager([UseSwish()], leaves=graph.stage)
    if runs:
        assert [record(n).kind for n in manager.run(graph).nodes][1] == "mylib.swish"
    else:
        with pytest.raises(PassError, match=r"QG206[\s\S]*expected nothing"):
            manager.run(graph)


# ---------------------------------------------------------------- rows, grids, training

U8, S8 = ["u8 affine per-tensor"], ["s8 symmetric per-tensor"]
ROWS: list[dict[str, Any]] = [
    {"id": "linear", "op": "linear", "x": U8, "weight": S8},
    {"id": "swish", "op": "mylib.swish", "x": U8, "out": U8},
    {"id": "scale", "op": "testlib.scale", "x": U8, "weight": S8},
]
FULL = [{**row, "placement": "int8", "kernel": "K", "why": "{kind}"} for row in ROWS]
TARGET = qg.Target.model_validate({"name": "npu", "description": "operations of two libraries", "row": FULL})


def test_a_row_gives_it_grids_and_the_quantizers_train(example: Any) -> None:
    graph = captured(example.swish)
    plan = qg.plan(graph, TARGET)
    assert plan.int8_nodes() == ["fc:linear", "Net:mylib.swish", "out:linear"]
    assert qg.Plan.from_json(plan.to_json()) == plan
    qat = qg.prepare(graph, plan)
    qg.calibrate(qat, [floats(2, 3, 8)], progress=False)
    qat(floats(2, 3, 8)).square().sum().backward()
    gradients = {n: p.grad for n, p in qat.named_parameters()}
    assert sorted(gradients) == ["fc.bias", "fc.weight", "out.bias", "out.weight"]
    assert all(g is not None and bool(g.any()) for g in gradients.values())


def library(schema: str, function: Callable[..., Tensor]) -> Any:
    """An operation of ``testlib``, whose results have the shape of its first argument."""
    name = schema.partition("(")[0]
    own = torch.library.custom_op(f"testlib::{name}", function, mutates_args=(), schema=schema.removeprefix(name))
    own.register_fake(lambda x, *rest: torch.empty_like(x))
    return own


@pytest.fixture(scope="module")
def scale(registry: None) -> Any:
    return library("scale(Tensor x, Tensor weight) -> Tensor", lambda x, weight: x * weight)


@pytest.fixture(scope="module")
def total(registry: None) -> Any:
    return library("total(Tensor x, Tensor y) -> Tensor", lambda x, y: x + y)


@pytest.fixture(scope="module")
def moved(registry: None) -> Any:
    return library("moved(Tensor x) -> Tensor", lambda x: x.flip(0))


@pytest.fixture(scope="module")
def curve(registry: None) -> Any:
    return library("curve(Tensor x, float alpha=1.0) -> Tensor", lambda x, alpha=1.0: x * torch.sigmoid(alpha * x))


class Scaled(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(8)), function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x, self.weight)
        return y


def test_roles_say_which_argument_is_the_weight(scale: Any) -> None:
    graph = qg.capture(Scaled(scale), floats(2, 8))
    assert qg.plan(graph, TARGET).int8_nodes() == []
    qg.register_operation(scale, roles=("x", "weight"))
    assert {q.name: q.spec for q in qg.plan(graph, TARGET).quantizers} == {
        "Scaled:testlib.scale.x": QuantSpec.parse("u8 affine per-tensor"),
        "Scaled:testlib.scale.weight": QuantSpec.parse("s8 symmetric per-tensor"),
    }


def test_what_commutes_matches_either_way_round(total: Any) -> None:
    pattern = qg.Op("testlib.total", qg.Const("w"), qg.AnyValue("x"))
    graph = qg.capture(Scaled(total), floats(2, 8))
    assert found(pattern, graph) == []
    qg.register_operation(total, roles=("x", "y"), commutes=True)
    assert found(pattern, graph) == ["Scaled:testlib.total"]


def test_what_keeps_the_grid_is_looked_through(moved: Any) -> None:
    graph = captured(lambda x: moved(torch.relu(x)))
    pattern = qg.Op("linear", qg.Moved(qg.Op("relu")))
    assert found(pattern, graph) == []
    qg.register_operation(moved, keeps_grid=True)
    assert found(pattern, graph) == ["out:linear"]


# ---------------------------------------------------------------- ONNX


def lowered(graph: Graph, path: Path) -> Path:
    qat = qg.prepare(graph, qg.plan(graph))
    qg.calibrate(qat, [floats(2, 3, 8)], progress=False)
    return qg.lower(qat, path)


def test_without_an_onnx_form_it_is_float_and_lowering_says_what_to_do(curve: Any, tmp_path: Path) -> None:
    graph = captured(lambda x: curve(x, 1.702))
    assert [record(n).kind for n in graph.nodes] == ["linear", "testlib.curve", "linear"]
    assert qg.plan(graph).int8_nodes() == ["fc:linear", "out:linear"]
    with pytest.raises(LowerError, match=r"QG503[\s\S]*where: testlib.curve.default[\s\S]*register_operation"):
        lowered(graph, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def by_function(x: Any, alpha: float = 1.0) -> Any:
    return opset23.Mul(x, opset23.Sigmoid(opset23.Mul(x, alpha)))


@pytest.mark.parametrize(
    ("form", "domains"),
    [
        (by_function, {"Mul": "", "Sigmoid": ""}),
        (qg.OnnxOp("com.microsoft::QuickGelu"), {"QuickGelu": "com.microsoft"}),
    ],
    ids=["a function", "an operation of the engine"],
)
@pytest.mark.parametrize("alpha", [(), (1.702,)], ids=["default", "given"])
def test_a_registered_form_runs(
    curve: Any, tmp_path: Path, form: Any, domains: dict[str, str], alpha: tuple[float, ...]
) -> None:
    qg.register_operation(curve, onnx=form)
    graph = captured(lambda x: curve(x, *alpha))
    path = lowered(graph, tmp_path / "model.onnx")
    model = parse(str(path))
    assert {n.op_type: n.domain for n in model.graph.node if n.name.startswith("Net:testlib.curve/")} == domains
    assert {o.domain for o in model.opset_import} == {"", *domains.values()}
    (have,) = ort_cpu.run(ort_cpu.session(str(path)), {"x": floats(2, 3, 8).numpy()})
    errors = {a: distance(have, curve, a) for a in (1.0, 1.702)}
    assert min(errors, key=errors.__getitem__) == (alpha or (1.0,))[0]
    assert min(errors.values()) < 0.02 < max(errors.values())


def distance(have: Any, function: Callable[[Tensor, float], Tensor], alpha: float) -> float:
    """Of a result from the float model, of its largest value."""
    want = captured(lambda x: function(x, alpha))(floats(2, 3, 8)).detach().numpy()
    return float(np.abs(have - want).max() / np.abs(want).max())


def test_an_operation_that_the_engine_lacks_is_refused_by_the_engine(curve: Any, tmp_path: Path) -> None:
    qg.register_operation(curve, onnx=qg.OnnxOp("nowhere::Curve"))
    path = lowered(captured(curve), tmp_path / "model.onnx")
    with pytest.raises(LowerError, match=r"QG505[\s\S]*nowhere"):
        ort_cpu.session(str(path))


# ---------------------------------------------------------------- what cannot be registered


def written(name: str) -> Any:
    """An operation that writes into its argument."""
    return torch.library.custom_op(
        f"testlib::{name}", lambda x: None, mutates_args=("x",), schema="(Tensor(a!) x) -> ()"
    )


def squared(x):  # type: ignore[no-untyped-def]  # onnxscript reads the source
    return opset23.Mul(x, x)


REFUSALS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "a Python function": (lambda: floats, {}, "torch.export would look into it"),
    "not an operation at all": (lambda: "mylib.swish", {}, "torch.export would look into it"),
    "an ATen operation": (lambda: torch.ops.aten.silu.default, {}, "it is built in"),
    "several overloads": (lambda: torch.ops.aten.add, {}, "it has several overloads"),
    "one that writes": (lambda: written("written"), {}, "it writes into its arguments"),
    "too many roles": (lambda: torch.ops.testlib.scale, {"roles": ("x", "weight", "bias")}, "it has 2 arguments"),
    "no role": (lambda: torch.ops.testlib.scale, {"roles": ()}, "the roles are none"),
    "one role twice": (lambda: torch.ops.testlib.scale, {"roles": ("x", "x")}, "the roles are x, x"),
    "the role of a result": (lambda: torch.ops.testlib.scale, {"roles": ("x", "out")}, "'out' is no name"),
    "a role with a dot": (lambda: torch.ops.testlib.scale, {"roles": ("x.y",)}, "'x.y' is no name"),
    "one operand that commutes": (lambda: torch.ops.testlib.scale, {"commutes": True}, "it commutes, but"),
    "a form that is no function": (lambda: torch.ops.testlib.scale, {"onnx": "Mul"}, "its ONNX form is str"),
    "a compiled form": (lambda: torch.ops.testlib.scale, {"onnx": script()(squared)}, "its ONNX form is OnnxFunction"),
}


@pytest.mark.parametrize(("operation", "options", "why"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_registered_is_refused(
    scale: Any, operation: Callable[[], Any], options: dict[str, Any], why: str
) -> None:
    before = dict(ops.BY_NAME), dict(operators.TRANSLATIONS)
    with pytest.raises(PassError, match=rf"QG220: '.*' cannot be registered[\s\S]*{why}"):
        qg.register_operation(operation(), **options)
    assert (dict(ops.BY_NAME), dict(operators.TRANSLATIONS)) == before


def test_a_row_for_an_operation_that_nobody_registered_waits(tmp_path: Path) -> None:
    table = tmp_path / "table.toml"
    table.write_text(TABLE.read_text(encoding="utf-8").replace("mylib.swish", "mylib.swoosh"), encoding="utf-8")
    plan = qg.plan(captured(torch.tanh), str(table))
    assert [r.op for r in load_target(str(table)).row] == ["linear", "mylib.swoosh"]
    assert plan.int8_nodes() == ["fc:linear", "out:linear"]
