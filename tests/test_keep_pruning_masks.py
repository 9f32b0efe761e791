"""keep-pruning-masks: what it masks and what it refuses, and that zeros stay zeros on the whole road."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import load_from_string, numpy_helper
from torch import Tensor, fx, nn

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.ir.masks import Weight, masked
from qatgraph.ir.meta import record
from qatgraph.passes.keep_pruning_masks import KeepPruningMasks
from qatgraph.planning.facts import facts_of
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.reference import Array
from tests.blocks import two_of_four
from tests.lowered import product_weights
from tests.models import MODELS, WIDTH, floats, tokens
from tests.rewritten import kinds, lines, rewritten

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


# ---------------------------------------------------------------- keep-pruning-masks

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


class Hidden(nn.Module):
    """A weight full of zeros is read as it is, and through a mask of the model's own that hides more of it."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.layer, self.first, self.mask = (
            nn.Linear(WIDTH, WIDTH, bias=False),
            first,
            nn.Buffer(torch.ones(WIDTH, WIDTH)),
        )
        with torch.no_grad():
            self.layer.weight.flatten()[::2] = 0.0
            self.mask[:, :5] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        plain = self.layer(x) if self.first else 0.0
        return nn.functional.linear(x, self.layer.weight * self.mask) + (plain if self.first else self.layer(x))


@pytest.mark.parametrize("first", [True, False])
def test_a_mask_of_the_models_own_is_no_stand_in(first: bool) -> None:
    before = qg.capture(Hidden(first).eval(), X)
    graph, _ = rewritten("keep-pruning-masks", before)
    assert kinds(graph).count("mul") == 2
    assert torch.equal(graph(X), before(X))


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
            parameter.add_(floats(*parameter.shape, seed=i), alpha=0.01)
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
    found = {**floats, **tables, **product_weights(file)}
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
