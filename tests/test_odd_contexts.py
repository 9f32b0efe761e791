"""Contexts that the zoo brought up: computed constants, computed biases, readers behind a dropout, few heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import qatgraph as qg
from qatgraph.backends import ort_cpu
from qatgraph.errors import PlanError
from qatgraph.kernels import compare_kernels
from qatgraph.planning.plan import Plan
from qatgraph.planning.recipe import Override, Recipe
from tests.lowered import Lowered, lower
from tests.models import Case, floats

STEP = 0.02  # of the largest value: a rounding that flips


class Positions(nn.Module):
    """A table of positions that a linear, a norm and an attention compute from parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 6, 16))
        self.project, self.norm, self.head = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        places = self.norm(self.project(self.table))
        mixed = F.scaled_dot_product_attention(places[:, None], places[:, None], places[:, None])[:, 0]
        y: Tensor = self.head(x + mixed)
        return y


class Moved(Positions):
    """The same over the input: nothing is constant."""

    def forward(self, x: Tensor) -> Tensor:
        places = self.norm(self.project(self.table + x))
        mixed = F.scaled_dot_product_attention(places[:, None], places[:, None], places[:, None])[:, 0]
        y: Tensor = self.head(x + mixed)
        return y


class ComputedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.more = nn.Linear(16, 16), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias * self.more)


class DroppedThenClamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.dropout = nn.Linear(16, 16), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.dropout(self.fc(x[:, 0]))) * 0.5


class FewHeads(nn.Module):
    """One head of key and value for four of the query; and no axis of heads at all."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query = self.query(x).view(2, 6, 4, 4).transpose(1, 2)
        key = self.key(x)
        mask = torch.ones(2, 6, 6, dtype=torch.bool).tril()
        bare = F.scaled_dot_product_attention(key, key, key, attn_mask=mask)
        return F.scaled_dot_product_attention(query, key[:, None], key[:, None], is_causal=True), bare


class Mobile(nn.Module):
    """Activations that the exporter writes as functions."""

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(F.softplus(F.hardswish(x)))


class Answer(dict[str, Any]):
    """A container that torch takes apart without knowing its keys."""


pytree.register_pytree_node(
    Answer, lambda d: (list(d.values()), list(d)), lambda values, keys: Answer(zip(keys, values, strict=True)),
    serialized_type_name="tests.Answer",
)  # fmt: skip


class Answers(nn.Module):
    def forward(self, x: Tensor) -> Answer:
        return Answer(logits=x * 2, pooled=x.sum())


def inputs(seed: int) -> Tensor:
    return floats(2, 6, 16, seed=seed)


def lowered(kind: Callable[[], nn.Module]) -> Lowered:
    return lower(Case(kind, inputs))


def mismatches(found: Lowered) -> list[str]:
    return [str(m) for m in compare_kernels(found.plan, ort_cpu.audit(found.file))]


def ruled(plan: Plan, rule: str) -> set[str]:
    return {d.subject for d in plan.decisions if d.rule == rule}


def test_what_depends_on_no_input_stays_in_float_and_has_no_kernel() -> None:
    found = lowered(Positions)
    constants = {"project:linear", "norm:layer_norm", "Positions:attention"}
    assert constants <= {f.name for f in found.plan.nodes if f.absent == "constant"}
    assert ruled(found.plan, "constant") & {"project:linear", "head:linear"} == {"project:linear"}
    assert constants & {p.node for p in found.plan.predictions} == set()
    assert {p.node for q in found.plan.quantizers for p in q.ports} == {"head:linear"}
    assert mismatches(found) == []
    assert found.distance(inputs(5)) < STEP


def test_the_same_over_an_input_is_planned() -> None:
    found = lowered(Moved)
    assert ruled(found.plan, "constant") == set()
    assert set(found.plan.int8_nodes()) == {"project:linear", "head:linear"}


class Running(nn.Module):
    """Keeps a running mean in a buffer, which no output reads."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 16)
        self.register_buffer("mean", torch.zeros(16))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.mean.copy_(self.mean * 0.9 + x.mean((0, 1)) * 0.1)
        y: Tensor = self.head(x)
        return y


def test_what_only_sets_a_state_has_no_kernel() -> None:
    found = lowered(Running)
    assert {f.name for f in found.plan.nodes if not f.absent} == {"head:linear"}
    assert "Running:residual_add" in ruled(found.plan, "state")
    assert mismatches(found) == []
    assert set(found.plan.int8_nodes()) == {"head:linear"}


def test_a_kernel_that_is_promised_for_a_state_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatgraph.planning.facts._needed", set)
    assert any("'Running:residual_add'" in m for m in mismatches(lower(Case(Running, lambda seed: inputs(seed + 1)))))


def test_a_constant_cannot_be_asked_to_be_int8() -> None:
    recipe = Recipe(override=(Override(select="project:linear", place="int8"),))
    with pytest.raises(PlanError, match="'project:linear' depends on no input of the model"):
        qg.plan(Case(Positions, inputs).capture(), recipe=recipe)


def test_a_bias_that_is_computed_keeps_its_linear_in_float_and_says_so() -> None:
    found = lowered(ComputedBias)
    (name,) = [f.name for f in found.plan.nodes if f.kind == "linear"]
    assert found.plan.int8_nodes() == []
    assert found.plan.quantizers == ()
    lost = [a.why_lost for d in found.plan.decisions if d.subject == name for a in d.lost]
    assert "the bias is computed, and no row writes that" in lost
    assert mismatches(found) == []


def test_a_clamp_behind_a_dropout_counts_as_a_reader() -> None:
    found = lowered(DroppedThenClamped)
    assert found.plan.int8_nodes() == []
    assert mismatches(found) == []


def test_attention_with_few_heads_or_none_is_one_node() -> None:
    found = lowered(FewHeads)
    assert [n.op_type for n in found.proto.graph.node].count("Attention") == 2
    assert mismatches(found) == []
    assert found.distance(inputs(5)) < STEP


def test_what_the_exporter_puts_in_line_keeps_its_name() -> None:
    found = lowered(Mobile)
    names = {n.name.partition("/")[0] for n in found.proto.graph.node}
    assert names == {"Mobile:hardswish", "Mobile:softplus", "Mobile:mish"}


def test_outputs_are_named_by_the_keys_of_a_foreign_container() -> None:
    graph = Case(Answers, inputs).capture()
    assert graph.info.outputs == ("logits", "pooled")
    assert isinstance(graph.run(inputs(1)), Answer)
