"""Weights behind masks that are there already: who is recognised, planned and lowered, and who is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import qatgraph as qg
from qatgraph.ir.graph import Graph
from qatgraph.ir.masks import weight_of
from qatgraph.ir.meta import record
from tests.lowered import lower, product_weights
from tests.models import WIDTH, Case, floats
from tests.rewritten import distance, lines, rewritten

X = floats(4, WIDTH)


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
    return nn.Sequential(layer)


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
    (integers,) = product_weights(found.file).values()
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
    one, other = product_weights(found.file).values()
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
    layer = model.get_submodule("0")
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
    before = qg.capture(nn.Sequential(layer, norm).eval(), X)
    graph, refused = rewritten("fold-batch-norm", before)
    assert lines(graph) == [
        "0:mul = mul('0.fc.weight/folded', '0.mask')",
        "0:linear = linear(input_1, 0:mul, '0.fc.bias/folded')",
    ]
    assert refused == {}
    assert distance(graph, before, X) < 1e-6
