"""Each built-in pass: what it matches, what it refuses, before and after. What holds for all is in ``test_laws``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qatgraph as qg
from qatgraph.errors import PlanError
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from qatgraph.ir.stages import Stage
from qatgraph.passes import BUILTIN, PLANNING
from qatgraph.passes.insert_quantizers import InsertQuantizers
from qatgraph.planning.build import PlanningContext
from qatgraph.planning.constraints import PIN, Constraint
from qatgraph.planning.facts import facts_of
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.planning.target import load_target
from qatgraph.rewriting.manager import PassManager
from qatgraph.rewriting.passes import PlanningPass
from qatgraph.rewriting.registry import make_pass
from tests.models import WIDTH, ZOO, canonical, captured, floats, tokens
from tests.rewritten import X, Y, kinds, lines, of, rewritten

TOY_NPU = "examples/targets/toy_npu.toml"


def test_every_builtin_pass_has_a_section_here() -> None:
    sources = [f.read_text(encoding="utf-8") for f in sorted(Path(__file__).parent.glob("test_*.py"))]
    sections = {line.strip("# -") for s in sources for line in s.splitlines() if line.startswith("# ---")}
    assert {*BUILTIN, "insert-quantizers"} - sections == set()


# ---------------------------------------------------------------- fold-addmm


def test_addmm_becomes_a_linear_over_a_folded_weight() -> None:
    before = captured("gpt2")
    after, refused = rewritten("fold-addmm", before)
    assert "c_fc:linear = linear(c_fc:reshape, 'c_fc.weight/folded', 'c_fc.bias')" in lines(after)
    assert "addmm" not in kinds(after)
    assert refused == {}
    folded = after.module.get_parameter("c_fc.weight/folded")
    assert torch.equal(folded, before.module.get_parameter("c_fc.weight").t())
    assert folded.is_contiguous()


def test_the_weight_that_was_folded_is_gone() -> None:
    after, _ = rewritten("fold-addmm", captured("gpt2"))
    assert sorted(after.module.state_dict()) == sorted(
        f"{layer}.{name}" for layer in ("c_fc", "c_proj") for name in ("bias", "weight/folded")
    )


def test_a_frozen_weight_stays_frozen_when_folded() -> None:
    model = ZOO["gpt2"].model()
    model.get_parameter("c_fc.weight").requires_grad_(False)
    after, _ = rewritten("fold-addmm", qg.capture(model, floats(2, 5, WIDTH)))
    assert [n for n, p in after.module.named_parameters() if not p.requires_grad] == ["c_fc.weight/folded"]


class Addmm(nn.Module):
    def __init__(self, alpha: float = 1, beta: float = 1) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.weight, self.vector, self.matrix = (nn.Parameter(floats(*s)) for s in ((4, 4), (4,), (2, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.vector, x, self.weight, alpha=self.alpha, beta=self.beta)


class MatrixBias(Addmm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.matrix, x, self.weight)


class SharedWeight(Addmm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.vector, x, self.weight) @ self.weight


class ComputedWeight(Addmm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.vector, x, torch.relu(self.weight))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Addmm(alpha=2), "addmm scales its operands (alpha or beta is not 1)"),
        (Addmm(beta=0.5), "addmm scales its operands (alpha or beta is not 1)"),
        (MatrixBias(), "the bias is not a vector"),
        (SharedWeight(), "'weight' has 2 users"),
    ],
)
def test_fold_addmm_refuses(model: nn.Module, reason: str) -> None:
    before = qg.capture(model, X)
    after, refused = rewritten("fold-addmm", before)
    assert lines(after) == lines(before)
    assert refused == {f"{type(model).__name__}:addmm": reason}


def test_a_weight_that_is_computed_is_no_match() -> None:
    after, refused = rewritten("fold-addmm", qg.capture(ComputedWeight(), X))
    assert kinds(after) == ["relu", "addmm"]
    assert refused == {}


# ---------------------------------------------------------------- fold-gelu


GELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "as BERT writes it": lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)),
    "the other way round": lambda x: (torch.erf(x / 1.4142135) + 1) * (0.5 * x),
}


@pytest.mark.parametrize("name", GELUS)
def test_a_gelu_in_erf_becomes_one_node(name: str) -> None:
    after, _ = rewritten("fold-gelu", of(GELUS[name]))
    assert lines(after) == ["Function:gelu = gelu(x)"]
    assert torch.allclose(after(X), functional.gelu(X), atol=1e-6)


NO_GELUS: dict[str, Callable[..., Tensor]] = {
    "two arguments": lambda x, y: x * 0.5 * (1.0 + torch.erf(y / 2**0.5)),
    "another constant": lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.5)),
    "no half": lambda x: x * 0.4 * (1.0 + torch.erf(x / 2**0.5)),
    "a sum that is scaled": lambda x: x * 0.5 * torch.add(torch.erf(x / 2**0.5), 1.0, alpha=2),
}


@pytest.mark.parametrize("name", NO_GELUS)
def test_what_is_no_gelu_stays(name: str) -> None:
    before = of(NO_GELUS[name], *((X, Y) if name == "two arguments" else (X,)))
    after, _ = rewritten("fold-gelu", before)
    assert lines(after) == lines(before)


# ---------------------------------------------------------------- fuse-linear-activation


class Activated(nn.Module):
    def __init__(self, activation: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.fc, self.act, self.twice = nn.Linear(4, 4), activation, twice

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        z: Tensor = self.act(y)
        return z + y if self.twice else z


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.Tanh()], ids=str)
def test_a_linear_and_its_activation_become_one_region(activation: nn.Module) -> None:
    before = qg.capture(Activated(activation), X)
    after, refused = rewritten("fuse-linear-activation", before)
    assert lines(after) == lines(before)
    kind = kinds(after)[1]
    assert {record(n).region for n in after.nodes} == {f"fc:linear+{kind}"}
    assert refused == {}


def test_an_activation_of_another_kind_is_left_alone() -> None:
    after, refused = rewritten("fuse-linear-activation", qg.capture(Activated(nn.Sigmoid()), X))
    assert {record(n).region for n in after.nodes} == {""}
    assert refused == {}


def test_a_linear_with_two_readers_is_refused() -> None:
    after, refused = rewritten("fuse-linear-activation", qg.capture(Activated(nn.GELU(), twice=True), X))
    assert {record(n).region for n in after.nodes} == {""}
    assert refused == {"act:gelu": "'fc:linear' has 2 users"}


# ---------------------------------------------------------------- mark-residual-add


def test_the_sum_of_two_activations_is_a_residual_add() -> None:
    before = of(lambda x: torch.relu(x) + torch.tanh(x))
    after, refused = rewritten("mark-residual-add", before)
    assert lines(before)[-1] == "Function:add = add(Function:relu, Function:tanh)"
    assert lines(after)[-1] == "Function:residual_add = residual_add(Function:relu, Function:tanh)"
    assert refused == {}


def test_an_input_of_the_model_may_be_one_side_of_a_residual() -> None:
    """``norm(x + fc(x))``: written as Add, ONNX Runtime would fuse it to SkipLayerNormalization."""
    after, refused = rewritten("mark-residual-add", of(lambda x: torch.relu(x) + x))
    assert lines(after)[-1] == "Function:residual_add = residual_add(Function:relu, x)"
    assert refused == {}


NO_RESIDUALS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "scaled": (lambda x: torch.add(torch.relu(x), torch.tanh(x), alpha=2), "it scales an operand (alpha)"),
    "integers": (lambda x: torch.argmax(x, 1) + torch.argmin(x, 1), "'argmax' is not a float tensor"),
}


@pytest.mark.parametrize("name", NO_RESIDUALS)
def test_mark_residual_add_refuses(name: str) -> None:
    function, reason = NO_RESIDUALS[name]
    after, refused = rewritten("mark-residual-add", of(function))
    assert "residual_add" not in kinds(after)
    assert refused == {"Function:add": reason}


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + self.shift


def test_a_number_or_a_parameter_is_no_residual() -> None:
    assert "residual_add" not in kinds(rewritten("mark-residual-add", of(lambda x: torch.relu(x) + 1.0))[0])
    after, refused = rewritten("mark-residual-add", qg.capture(Shift(), X))
    assert "residual_add" not in kinds(after)
    assert refused == {"Shift:add": "'shift' is a constant"}


# ---------------------------------------------------------------- pin-layer-norm
# ---------------------------------------------------------------- pin-rms-norm
# ---------------------------------------------------------------- pin-group-norm
# ---------------------------------------------------------------- pin-softmax
# ---------------------------------------------------------------- pin-attention


def stated(name: str, graph: Graph, target: str = "ort-cpu") -> list[Constraint]:
    one = make_pass(name)
    assert isinstance(one, PlanningPass)
    return list(one.state(graph, PlanningContext(load_target(target), Recipe(), facts_of(graph))))


@pytest.fixture(scope="module")
def softmax() -> Graph:
    return qg.canonicalize(of(lambda x: torch.softmax(torch.relu(x), -1)))


PINS = [
    ("pin-layer-norm", "mlp", ["norm:layer_norm"], "[batch, 32]"),
    ("pin-layer-norm", "encoder", ["layer.0.norm:layer_norm", "layer.0.mlp.norm:layer_norm"], "[batch, length, 32]"),
    ("pin-attention", "encoder", ["layer.0.attention:attention"], "[batch, 2, length, 16]"),
    ("pin-rms-norm", "llama", ["norm:rms_norm", "mlp_norm:rms_norm"], "[batch, 5, 32]"),
    ("pin-softmax", "written", ["attention:softmax"], "[batch, 2, length, length]"),
    ("pin-softmax", "decomposed", ["layer.0.attention:safe_softmax"], "[2, 2, 6, 6]"),
]


@pytest.mark.parametrize(("name", "model", "nodes", "shape"), PINS)
def test_a_pin_for_each(name: str, model: str, nodes: list[str], shape: str) -> None:
    pins = stated(name, canonical(model))
    assert [p.ports[0].node for p in pins] == nodes
    for pin in pins:
        assert (pin.kind, pin.strength, str(pin.author)) == ("float", PIN, f"pass {name}")
        assert shape in pin.why, "the reason is about this value"
        assert "{" not in pin.why


def test_a_pin_for_each_softmax(softmax: Graph) -> None:
    (pin,) = stated("pin-softmax", softmax)
    assert (pin.kind, str(pin.ports[0]), pin.strength) == ("float", "Function:softmax.out", PIN)
    assert "[2, 4]" in pin.why


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)], ids=["group", "instance"])
def test_a_pin_for_each_norm_over_channels(norm: nn.Module) -> None:
    graph = qg.canonicalize(qg.capture(nn.Sequential(nn.Conv1d(4, 4, 1), norm.eval()), floats(2, 4, 6)))
    (pin,) = stated("pin-group-norm", graph)
    assert str(pin.ports[0]) == f"1:{kinds(graph)[-1]}.out"
    assert "[2, 4, 6]" in pin.why


@pytest.mark.parametrize("name", [n for n in PLANNING if n.startswith("pin-")])
def test_nothing_to_pin(name: str) -> None:
    assert stated(name, canonical("gpt2")) == []


def test_a_pinned_node_is_float_in_the_plan_by_the_pass() -> None:
    plan = qg.plan(captured("encoder"))
    assert {p.node for p in plan.predictions if p.pinned} == {
        "token:embedding",
        "position:embedding",
        "layer.0.norm:layer_norm",
        "layer.0.mlp.norm:layer_norm",
        "layer.0.attention:attention",
    }
    for prediction in plan.predictions:
        if prediction.pinned:
            assert plan.placement(prediction.node).placement == "engine-float"
            decision = next(d for d in plan.decisions if d.subject == prediction.node)
            assert decision.author.kind == "pass"
            assert decision.author.id.startswith("pin-")


# ---------------------------------------------------------------- pin-small-embeddings


def embeddings(rows: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(rows, 64), nn.Linear(64, 4))


SMALL, LARGE = 2**14 - 1, 2**14  # rows of 256 bytes: 4 MiB is the border


@pytest.mark.parametrize(("rows", "pinned"), [(SMALL, True), (LARGE, False)])
def test_a_table_below_the_border_is_pinned(rows: int, pinned: bool) -> None:
    graph = qg.capture(embeddings(rows), tokens(2, 5))
    pins = stated("pin-small-embeddings", qg.canonicalize(graph))
    assert [str(p.ports[0]) for p in pins] == (["0:embedding.out"] if pinned else [])
    assert qg.plan(graph).placement("0:embedding").placement == ("engine-float" if pinned else "int8")


def test_the_border_is_an_option() -> None:
    graph = canonical("encoder")
    assert len(stated("pin-small-embeddings", graph)) == 2
    assert [str(p.ports[0]) for p in stated("pin-small-embeddings{min_bytes=8000}", graph)] == ["token:embedding.out"]


def test_a_recipe_line_that_names_the_node_lifts_the_pin_and_a_glob_does_not() -> None:
    def placement(selector: str) -> str:
        recipe = Recipe(override=(Override(select=selector, place="int8"),))
        return qg.plan(captured("encoder"), recipe=recipe).placement("token:embedding").placement

    assert placement("token:embedding") == "int8"
    assert placement("token:*") == "engine-float"


def test_a_pin_is_not_lifted_to_what_the_target_cannot_do() -> None:
    recipe = Recipe(override=(Override(select="norm:layer_norm", place="int8"),))
    with pytest.raises(PlanError, match="QG305: 'norm:layer_norm' cannot be int8 on ort-cpu"):
        qg.plan(captured("mlp"), recipe=recipe)


# ---------------------------------------------------------------- share-through-shape-ops


class Through(nn.Module):
    """Two linears with a reshape and a transpose between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).reshape(2, 2, 2).transpose(0, 1))
        return y


@pytest.fixture(scope="module")
def through() -> Graph:
    return qg.capture(Through(), X)


def test_one_wish_for_each_operation_that_moves_elements(through: Graph) -> None:
    wishes = stated("share-through-shape-ops", qg.canonicalize(through))
    assert [tuple(map(str, w.ports)) for w in wishes] == [
        ("a:linear.out", "Through:reshape.out"),
        ("Through:reshape.out", "Through:transpose.out"),
    ]
    assert wishes[0].kind == "share"
    assert wishes[0].why == "'Through:reshape' only moves the elements of 'a:linear'"


def test_where_elements_only_move_one_grid_stands(through: Graph) -> None:
    plan = qg.plan(through, TOY_NPU)
    (shared,) = [q for q in plan.quantizers if len(q.values) > 1]
    assert shared.values == ("a:linear", "Through:transpose")
    assert set(map(str, shared.ports)) == {"a:linear.out", "b:linear.x"}
    decision = next(d for d in plan.decisions if d.subject == shared.name)
    assert "pass share-through-shape-ops" in decision.why


def test_a_product_does_not_share() -> None:
    assert stated("share-through-shape-ops", qg.canonicalize(of(lambda x: torch.relu(x) * 2.0))) == []


# ---------------------------------------------------------------- derive-bias


def test_the_bias_of_a_linear_lies_on_the_grid_of_its_accumulator() -> None:
    constraints = stated("derive-bias", canonical("mlp"))
    assert [tuple(map(str, c.ports)) for c in constraints] == [
        (f"{n}.bias", f"{n}.x", f"{n}.weight") for n in ("up:linear", "down:linear")
    ]
    plan = qg.plan(captured("mlp"))
    derived = {q.name: q.derived_from for q in plan.quantizers if q.derived_from}
    assert derived == {f"{n}.bias": (f"{n}.x", f"{n}.weight") for n in ("up:linear", "down:linear")}
    assert {str(q.spec) for q in plan.quantizers if q.derived_from} == {"s32 symmetric per-channel(0) derived"}


def test_a_linear_without_a_bias_derives_none() -> None:
    assert stated("derive-bias", canonical("tied")) == []


def test_a_row_that_wants_a_float_bias_ignores_it() -> None:
    assert len(stated("derive-bias", canonical("encoder"))) == 6
    assert [q for q in qg.plan(captured("encoder")).quantizers if q.derived_from] == []


# ---------------------------------------------------------------- insert-quantizers


def prepared(name: str, target: str = "ort-cpu") -> Graph:
    return Graph.of(qg.prepare(captured(name), qg.plan(captured(name), target)))


def test_a_module_for_each_quantizer_on_every_value() -> None:
    graph = prepared("mlp")
    have = lines(graph)
    assert "up:fake_quantize = fake_quantize(norm:layer_norm)" in have
    assert "up:fake_quantize#2 = fake_quantize('up.weight')" in have
    assert "up:linear = linear(up:fake_quantize, up:fake_quantize#2, 'up.bias')" in have
    calls = [n for n in graph.module.graph.nodes if n.op == "call_module" and record(n).kind == "fake_quantize"]
    assert len({n.target for n in calls}) == len([q for q in qg.plan(captured("mlp")).quantizers if not q.derived_from])


def test_quantizers_live_at_the_users_modules() -> None:
    paths = [str(n.target) for n in prepared("encoder").module.graph.nodes if n.op == "call_module"]
    assert "layer.0.attention.out.%3Alinear%2Ex" in paths
    assert "layer.0.attention.out.%3Alinear%2Eweight" in paths


def test_readers_of_one_value_share_one_quantizer() -> None:
    graph = prepared("encoder")
    inputs = {graph.node(f"layer.0.attention.{n}:linear").args[0] for n in ("query", "key", "value")}
    assert len(inputs) == 1


def test_a_shared_grid_is_one_module_on_both_values(through: Graph) -> None:
    graph = Graph.of(qg.prepare(through, qg.plan(through, TOY_NPU)))
    paths = [str(n.target) for n in graph.module.graph.nodes if n.op == "call_module"]
    assert len(paths) - len(set(paths)) == 1


@pytest.mark.parametrize("target", ["ort-cpu", TOY_NPU])
@pytest.mark.parametrize("name", ZOO)
def test_until_calibration_nothing_changes(name: str, target: str) -> None:
    batch = ZOO[name].inputs(1)
    assert torch.equal(prepared(name, target).run(batch), canonical(name).run(batch))


def test_the_pass_takes_and_leaves_its_stages() -> None:
    plan = qg.plan(captured("mlp"))
    graph = PassManager([InsertQuantizers(plan)], leaves=Stage.PREPARED).run(canonical("mlp"))
    assert graph.stage is Stage.PREPARED
    assert InsertQuantizers.stage is Stage.CANONICAL
    assert canonical("mlp").stage is Stage.CANONICAL
