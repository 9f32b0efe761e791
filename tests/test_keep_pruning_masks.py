"""Masks of pruned weights: who keeps them, how a layer reads its weight behind one, and that zeros stay zeros."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import load_from_string, numpy_helper
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import qatgraph as qg
from qatgraph.backends import ort_cpu
from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.ir.masks import Weight, masked, weight_of
from qatgraph.ir.meta import record
from qatgraph.passes.keep_pruning_masks import KeepPruningMasks
from qatgraph.planning.facts import facts_of
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.reference import Array
from tests.blocks import two_of_four
from tests.lowered import lower
from tests.models import MODELS, WIDTH, Case, floats, tokens
from tests.rewritten import distance, kinds, lines, rewritten

X = floats(4, WIDTH)


class Layers(nn.Module):
    """Modules in a row; of the named ones, every other element is written to zero."""

    def __init__(self, *modules: nn.Module, zeros: str = "") -> None:
        super().__init__()
        self.row = nn.Sequential(*modules)
        with torch.no_grad():
            for name in filter(None, zeros.split(",")):
                self.row.get_parameter(name).flatten()[::2] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.row(x)
        return y


def capture(*modules: nn.Module, x: Tensor = X, zeros: str = "") -> Graph:
    return qg.capture(Layers(*modules, zeros=zeros).eval(), x)


# ---------------------------------------------------------------- the rewrite and what it refuses

LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(WIDTH, 8), X),
    "conv1d": (nn.Conv1d(4, 6, 3), floats(2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2), floats(2, 4, 5, 5)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3), floats(2, 4, 5, 5)),
    "embedding": (nn.Embedding(50, 8), tokens(2, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_pruned_weight_is_read_through_its_mask(kind: str) -> None:
    layer, x = LAYERS[kind]
    before = capture(layer, x=x, zeros="0.weight")
    graph, refused = rewritten("keep-pruning-masks", before)
    assert (kinds(graph), refused) == (["mul", kind], {})
    weight = masked(graph.nodes[0])
    assert weight is not None
    assert weight.stored is before.parameter(before.nodes[0].all_input_nodes[kind != "embedding"])
    assert torch.equal(weight.tensor, weight.stored)
    assert torch.equal(graph(x), before(x))


def _tied() -> Graph:
    model = Layers(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), zeros="0.weight")
    model.row[1].weight = model.row[0].weight
    return qg.capture(model.eval(), X)


def test_a_tied_weight_has_one_mask() -> None:
    graph, _ = rewritten("keep-pruning-masks", _tied())
    assert kinds(graph) == ["mul", "linear", "linear"]
    facts = {f.name: f.parameter("weight") for f in facts_of(graph)}
    assert facts["row.0:linear"] == facts["row.1:linear"] is not None


def zeroed(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    return linear


class Fixed(nn.Module):
    """A linear whose weight is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(WIDTH))
        self.weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


REFUSED: dict[str, tuple[Callable[[], Graph], str, str]] = {
    "dense": (lambda: capture(nn.Linear(WIDTH, 8)), "", "0% of 'row.0.weight' is zero, less than 30%"),
    "half": (lambda: capture(nn.Linear(WIDTH, 8), zeros="0.weight"), "{least=0.6}",
             "50% of 'row.0.weight' is zero, less than 60%"),
    "all zeros": (lambda: capture(zeroed(nn.Linear(WIDTH, 8))), "",
                  "'row.0.weight' is all zeros, so it is not pruned: it has yet to learn"),
    "no parameter": (lambda: capture(Fixed()), "", "'row.0.weight' is no parameter, so nothing trains it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_pruned_is_left_alone(name: str) -> None:
    make, options, reason = REFUSED[name]
    before = make()
    graph, refused = rewritten(f"keep-pruning-masks{options}", before)
    assert list(refused.values()) == [reason]
    assert lines(graph) == lines(before)


@pytest.mark.parametrize("least", [0.0, -1.0, 1.5])
def test_a_share_that_is_none_is_refused(least: float) -> None:
    with pytest.raises(PassError, match=r"QG202: .keep-pruning-masks. does not take"):
        KeepPruningMasks(least)


# ---------------------------------------------------------------- masks that are there already


class Spelled(nn.Module):
    """A linear whose weight is multiplied in the model."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], mask: Tensor) -> None:
        super().__init__()
        self.fc, self.product = nn.Linear(WIDTH, WIDTH), product
        self.register_buffer("mask", mask)
        self.mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.product(self.fc.weight, self.mask), self.fc.bias)


def by_torch(*roles: str) -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    for role in roles:
        prune.random_unstructured(layer, role, 0.5)  # type: ignore[no-untyped-call]
    return Layers(layer)


SQUARE = (floats(WIDTH, WIDTH) > 0).float()
SPELLINGS: dict[str, Callable[[], nn.Module]] = {
    "torch.nn.utils.prune": lambda: by_torch("weight"),
    "a pruned bias": lambda: by_torch("weight", "bias"),
    "in front": lambda: Spelled(lambda w, m: m * w, SQUARE),
    "booleans": lambda: Spelled(lambda w, m: w * m, SQUARE.bool()),
    "input channels": lambda: Spelled(lambda w, m: w * m, SQUARE[:1]),
}


@pytest.mark.filterwarnings("ignore:The tensor attribute")  # of the weight that torch.nn.utils.prune makes anew
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_weight_behind_a_mask_is_planned_and_lowered_in_int8(name: str) -> None:
    found = lower(Case(SPELLINGS[name], lambda seed: floats(4, WIDTH, seed=seed)))
    assert [p.node.rpartition(":")[2] for p in found.plan.predictions if p.int8] == ["linear"]
    assert found.distance(floats(4, WIDTH, seed=3)) < 1e-4  # the rounding of the int32 bias
    (integers,) = ort_cpu.gemm_weights(found.file).values()
    node = next(n for n in Graph.of(found.qat).nodes if record(n).kind == "linear")
    weight = weight_of(node.args[1].args[0])  # type: ignore[union-attr]
    assert weight is not None
    zeros = weight.tensor.numpy() == 0.0
    assert 0.3 < zeros.mean() < 0.7
    assert not integers[zeros].any()


class TwoMasks(nn.Module):
    """One parameter that two linears read, each behind a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(floats(WIDTH, WIDTH, seed=1))
        self.register_buffer("first", SQUARE)
        self.register_buffer("second", 1.0 - SQUARE)
        self.first: Tensor
        self.second: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight * self.first)
        return nn.functional.linear(y, self.weight * self.second)


def test_one_parameter_behind_two_masks_is_two_weights() -> None:
    found = lower(Case(TwoMasks, lambda seed: floats(4, WIDTH, seed=seed)))
    facts = [f.parameter("weight") for f in found.plan.nodes if f.kind == "linear"]
    assert [(w.path, w.storage) for w in facts if w] == [("weight", "weight * first"), ("weight", "weight * second")]
    one, other = ort_cpu.gemm_weights(found.file).values()
    assert not one[SQUARE.numpy() == 0].any()
    assert not other[SQUARE.numpy() == 1].any()
    assert found.distance(floats(4, WIDTH, seed=3)) < 1e-2  # a value between the two may fall on another integer


NO_MASKS: dict[str, Callable[[], nn.Module]] = {
    "two parameters": lambda: Spelled(lambda w, m: w * w, SQUARE),
    "a sum": lambda: Spelled(lambda w, m: w + m, SQUARE),
    "a mask that the model changes": lambda: Spelled(lambda w, m: (w * m, m.mul_(0.5))[0], SQUARE.clone()),
    "a mask that widens": lambda: Spelled(lambda w, m: (w[:1] * m)[:, :], SQUARE),
}


@pytest.mark.parametrize("name", NO_MASKS)
def test_a_weight_that_is_computed_in_another_way_is_no_constant(name: str) -> None:
    plan = qg.plan(qg.capture(NO_MASKS[name]().eval(), X))
    blocked = [a.why_lost for d in plan.decisions for a in d.lost]
    assert not any(p.int8 for p in plan.predictions)
    assert "the weight is not a constant" in blocked


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_capture_leaves_a_pruned_model_as_it_is() -> None:
    model = by_torch("weight").eval()
    layer = model.get_submodule("row.0")
    before = (layer.weight, dict(layer._forward_pre_hooks), {n: t.clone() for n, t in model.state_dict().items()})
    qg.capture(model, X)
    assert layer.weight is before[0]
    assert dict(layer._forward_pre_hooks) == before[1]
    assert all(torch.equal(t, before[2][n]) for n, t in model.state_dict().items())


def test_a_batch_norm_is_folded_behind_the_mask() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(WIDTH)
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 1.5)
    layer = Spelled(lambda w, m: m * w, SQUARE)
    before = capture(layer, norm)
    graph, refused = rewritten("fold-batch-norm", before)
    assert lines(graph) == [
        "row.0:mul = mul('row.0.fc.weight/folded', 'row.0.mask')",
        "row.0:linear = linear(x, row.0:mul, 'row.0.fc.bias/folded')",
    ]
    assert refused == {}
    assert distance(graph, before, X) < 1e-6


# ---------------------------------------------------------------- the whole road

CASE = MODELS["pruned"]
RECIPES = {
    "int8": Recipe(override=(Override(select="token:embedding", place="int8"),)),
    "float": Recipe(override=tuple(Override(select=f"{n}:linear", place="float") for n in ("up", "down"))),
}


def optimizers(qat: nn.Module) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.AdamW(qat.parameters(), lr=1e-2, weight_decay=0.1),
        torch.optim.SGD(qat.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1),
    ]


@cache
def trained(name: str, keep: bool) -> nn.Module:
    """Planned, calibrated, and trained by two optimizers and by noise, which move every weight."""
    graph, passes = CASE.capture(), [KeepPruningMasks()] if keep else []
    plan = qg.plan(graph, recipe=RECIPES[name], passes=passes)
    qat = qg.prepare(graph, plan, passes=passes)
    qg.calibrate(qat, [CASE.inputs(s) for s in (1, 2)], progress=False)
    for optimizer in optimizers(qat):
        for seed in range(5):
            optimizer.zero_grad()
            (qat(CASE.inputs(seed)) - floats(2, WIDTH, seed=seed)).square().sum().backward()
            optimizer.step()
    with torch.no_grad():
        for i, parameter in enumerate(qat.parameters()):
            parameter += 0.01 * floats(*parameter.shape, seed=i)
    return qat


def read_weights(qat: nn.Module) -> dict[str, Tensor]:
    """What the layers of the fake-quantized model read as their weight, and what a lookup finds in its table."""
    assert isinstance(qat, fx.GraphModule)
    interpreter = fx.Interpreter(qat, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(CASE.inputs(1))
    roles = {"linear": 1, "embedding": 0}
    nodes = [n for n in Graph.of(qat).nodes if record(n).kind in roles]
    return {record(n).name: interpreter.env[n.args[roles[record(n).kind]]].detach() for n in nodes}  # type: ignore[index]


def written_weights(file: bytes) -> dict[str, Array]:
    """The weights that the file holds, integers or floats, as the model stores them."""
    graph = load_from_string(file).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    floats = {n.name: constants[n.input[1]].T for n in graph.node if n.op_type == "MatMul" and n.input[1] in constants}
    tables = {n.name: constants[n.input[0]] for n in graph.node if n.op_type == "Gather"}
    found = {**floats, **tables, **ort_cpu.gemm_weights(file)}
    return {name.rpartition("/")[0]: weight for name, weight in found.items()}


PRUNED = ("token:embedding", "up:linear", "down:linear")


def broken(weights: dict[str, Array]) -> list[str]:
    """The weights in which some four neighbours hold more than two that are not exactly zero."""
    return [n for n in PRUNED if int((weights[n].reshape(-1, 4) != 0).sum(1).max()) > 2]


@pytest.mark.parametrize("name", RECIPES)
def test_a_2_4_pattern_survives_training_in_the_model_and_in_the_file(name: str, tmp_path: Path) -> None:
    qat = trained(name, keep=True)
    assert broken({n: w.numpy() for n, w in read_weights(qat).items()}) == []
    file = qg.lower(qat, tmp_path / "model.onnx")
    weights = written_weights(file.read_bytes())
    assert {weights[n].dtype.name for n in PRUNED} == {"int8" if name == "int8" else "float32"}
    assert broken(weights) == []
    assert all(np.count_nonzero(weights[n]) > 0.4 * weights[n].size for n in PRUNED)
    qg.verify(qat, file, [CASE.inputs(s) for s in (3, 4)]).check()


@pytest.mark.parametrize("name", RECIPES)
def test_without_the_pass_the_zeros_do_not_survive(name: str, tmp_path: Path) -> None:
    """But for those of ``down``, which has a mask of its own, that of its parametrization."""
    qat = trained(name, keep=False)
    assert broken({n: w.numpy() for n, w in read_weights(qat).items()}) == ["token:embedding", "up:linear"]
    weights = written_weights(qg.lower(qat, tmp_path / "model.onnx").read_bytes())
    assert broken(weights) == ["token:embedding", "up:linear"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_conversion_that_forgets_the_masks_is_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Weight, "tensor", property(lambda weight: weight.stored.detach()))
    weights = written_weights(qg.lower(trained(name, keep=True), tmp_path / "model.onnx").read_bytes())
    assert broken(weights) == list(PRUNED)


def test_training_moves_every_weight_that_is_not_masked() -> None:
    """Else the zeros would survive for want of training."""
    before, after = (dict(m.named_parameters()) for m in (CASE.capture().module, trained("int8", keep=True)))
    assert not any(torch.equal(before[n], after[n]) for n in before)
    mask = two_of_four(before["up.weight"]) != 0
    assert not torch.isclose(before["up.weight"], after["up.weight"])[mask].all()
