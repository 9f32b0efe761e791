"""Passes that group, and those that run on request."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qatgraph as qg
from qatgraph.ir.graph import Graph
from tests.models import canonical, captured, floats
from tests.rewritten import X, Y, after, distance, kinds, lines, of, regions, rewritten

# ---------------------------------------------------------------- fuse-attention


HEADS = floats(2, 2, 3, 4)
ALLOWED = torch.ones(3, 3).tril().bool()
READ = ("remove-no-ops", "restore-dropout", "merge-equal-operations", "fold-constants", "normalize-reductions")


def scores(x: Tensor) -> Tensor:
    return x @ x.transpose(-1, -2)


ATTENTIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "bare": (lambda x: scores(x).softmax(-1) @ x, ["matmul", "softmax", "matmul"]),
    "divided": (lambda x: (scores(x) / 2.0).softmax(3) @ x, ["matmul", "div", "softmax", "matmul"]),
    "multiplied": (lambda x: (scores(x) * 0.5).softmax(-1) @ x, ["matmul", "mul", "softmax", "matmul"]),
    "an added mask": (
        lambda x: (scores(x) * 0.5 + torch.zeros(3, 3)).softmax(-1) @ x, ["matmul", "mul", "add", "softmax", "matmul"],
    ),
    "two masks": (
        lambda x: (x.mean() + (scores(x) + torch.zeros(3, 3))).softmax(-1) @ x,
        ["matmul", "add", "add", "softmax", "matmul"],
    ),
    "masked_fill": (
        lambda x: scores(x).masked_fill(~ALLOWED, -math.inf).softmax(-1) @ x,
        ["matmul", "masked_fill", "softmax", "matmul"],
    ),
    "where": (
        lambda x: torch.where(ALLOWED, scores(x), -1e9).softmax(-1) @ x, ["matmul", "where", "softmax", "matmul"],
    ),
    "where, the other way": (
        lambda x: torch.where(~ALLOWED, -1e9, scores(x)).softmax(-1) @ x, ["matmul", "where", "softmax", "matmul"],
    ),
    "dropout": (
        lambda x: functional.dropout(scores(x).softmax(-1), 0.1, False) @ x, ["matmul", "softmax", "dropout", "matmul"],
    ),
    "capped": (
        lambda x: (torch.tanh(scores(x) / 50.0) * 50.0).softmax(-1) @ x,
        ["matmul", "div", "tanh", "mul", "softmax", "matmul"],
    ),
    "baddbmm": (
        lambda x: torch.baddbmm(torch.zeros(2, 3, 3), x[0], x[0].transpose(1, 2), alpha=0.5).softmax(-1) @ x[0],
        ["baddbmm", "softmax", "matmul"],
    ),
    "einsum": (
        lambda x: torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", x, x).softmax(-1), x),
        ["einsum", "softmax", "einsum"],
    ),
    "reshapes between": (
        lambda x: torch.bmm(
            (scores(x.view(4, 3, 4)).view(2, 2, 3, 3) + torch.zeros(3)).softmax(-1).view(4, 3, 3), x.view(4, 3, 4)
        ),
        ["matmul", "reshape", "add", "softmax", "reshape", "matmul"],
    ),
    "another precision": (
        lambda x: scores(x).softmax(-1, dtype=torch.float64).float() @ x, ["matmul", "softmax", "cast", "matmul"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_one_region(name: str) -> None:
    function, want = ATTENTIONS[name]
    before = after(of(function, HEADS), *READ)
    graph, refused = rewritten("fuse-attention", before)
    ((region, found),) = regions(graph).items()
    assert region.endswith("+attention")
    assert found == want
    assert refused == {}
    assert lines(graph) == lines(before), "the arithmetic stays"


ATTENTIONS_NOT: dict[str, Callable[[Tensor], Tensor]] = {
    "no softmax": lambda x: scores(x) @ x,
    "a softmax along another axis": lambda x: scores(x).softmax(-2) @ x,
    "no second product": lambda x: scores(x).softmax(-1),
    "a softmax of no product": lambda x: (x @ x.transpose(-1, -2)).relu().softmax(-1) @ x,
}


@pytest.mark.parametrize("name", ATTENTIONS_NOT)
def test_what_is_no_attention_has_no_region(name: str) -> None:
    graph, _ = rewritten("fuse-attention", after(of(ATTENTIONS_NOT[name], HEADS), *READ))
    assert regions(graph) == {}


# ---------------------------------------------------------------- fuse-rotary


COS, SIN = floats(3, 4, seed=1), floats(3, 4, seed=2)


def halves(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 2:], x[..., :2]), -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def chunks(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def parts(x: Tensor) -> Tensor:
    first, second = x[..., :2], x[..., 2:]
    return torch.cat((first * COS[:, :2] - second * SIN[:, :2], second * COS[:, :2] + first * SIN[:, :2]), -1)


ROTARIES: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda x: x * COS + halves(x) * SIN,
    "the sine first": lambda x: SIN * halves(x) + COS * x,
    "pairs": lambda x: x * COS + pairs(x) * SIN,
    "chunks": lambda x: x * COS + chunks(x) * SIN,
    "part by part": parts,
}


@pytest.mark.parametrize("name", ROTARIES)
def test_a_rotary_embedding_is_one_region(name: str) -> None:
    before = after(of(ROTARIES[name], HEADS), *READ, "fold-split")
    graph, refused = rewritten("fuse-rotary", before)
    ((region, found),) = regions(graph).items()
    assert region.endswith("+rotary")
    assert found == kinds(before), "nothing stands outside"
    assert refused == {}
    assert "residual_add" not in kinds(after(graph, "mark-residual-add"))


ROTARIES_NOT: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "a quarter": (lambda x: x * COS + torch.cat((-x[..., 1:], x[..., :1]), -1) * SIN,
                  ["it turns (0, 1, 1) against (1, 4, 1)"]),
    "the wrong half": (lambda x: x * COS + torch.cat((-x[..., :2], x[..., 2:]), -1) * SIN,
                       ["it turns (2, 4, 1) against (0, 2, 1)"]),
    "another axis": (lambda x: x * COS + torch.cat((-x[:, 1:], x[:, :1]), 1) * SIN, ["it turns None against None"]),
    "no sign": (lambda x: x * COS + torch.cat((x[..., 2:], x[..., :2]), -1) * SIN, []),
}  # fmt: skip


@pytest.mark.parametrize("name", ROTARIES_NOT)
def test_what_is_no_rotary_embedding_has_no_region(name: str) -> None:
    function, reasons = ROTARIES_NOT[name]
    graph, refused = rewritten("fuse-rotary", after(of(function, HEADS), *READ))
    assert regions(graph) == {}
    assert list(refused.values()) == reasons


# ---------------------------------------------------------------- fuse-quick-gelu


@pytest.mark.parametrize("function", [lambda x: x * torch.sigmoid(1.702 * x), lambda x: torch.sigmoid(x * 1.702) * x])
def test_a_quick_gelu_is_one_region(function: Callable[[Tensor], Tensor]) -> None:
    graph, refused = rewritten("fuse-quick-gelu", of(function))
    assert regions(graph) == {"Function:mul+quick_gelu": ["mul", "sigmoid", "mul"]}
    assert refused == {}


@pytest.mark.parametrize(
    "function", [lambda x: x * torch.sigmoid(2.0 * x), lambda x: x * torch.sigmoid(1.702 * (x + 1))]
)
def test_another_swish_is_none(function: Callable[[Tensor], Tensor]) -> None:
    assert regions(rewritten("fuse-quick-gelu", of(function))[0]) == {}


# ---------------------------------------------------------------- fuse-conv-activation


class Activated(nn.Module):
    def __init__(self, conv: nn.Module, act: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.conv, self.act, self.twice = conv, act, twice

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        z: Tensor = self.act(y)
        return z + y if self.twice else z


CONVS: dict[str, tuple[nn.Module, nn.Module, str]] = {
    "conv1d and relu": (nn.Conv1d(4, 2, 3), nn.ReLU(), "conv:conv1d+relu"),
    "conv2d and relu6": (nn.Conv2d(2, 4, 1), nn.ReLU6(), "conv:conv2d+clamp"),
    "conv2d and silu": (nn.Conv2d(2, 4, 1), nn.SiLU(), "conv:conv2d+silu"),
    "conv2d and hardswish": (nn.Conv2d(2, 4, 1), nn.Hardswish(), "conv:conv2d+hardswish"),
    "conv_transpose2d and leaky_relu": (
        nn.ConvTranspose2d(2, 4, 1),
        nn.LeakyReLU(),
        "conv:conv_transpose2d+leaky_relu",
    ),
}


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_and_its_activation_are_one_region(name: str) -> None:
    conv, act, region = CONVS[name]
    x = floats(2, 4, 6) if isinstance(conv, nn.Conv1d) else HEADS
    graph, refused = rewritten("fuse-conv-activation", after(qg.capture(Activated(conv, act), x), "fold-clamp"))
    assert regions(graph) == {region: region.partition(":")[2].split("+")}
    assert refused == {}


def test_a_convolution_with_two_readers_is_refused() -> None:
    graph, refused = rewritten(
        "fuse-conv-activation", qg.capture(Activated(nn.Conv2d(2, 4, 1), nn.ReLU(), twice=True), HEADS)
    )
    assert regions(graph) == {}
    assert refused == {"act:relu": "'conv:conv2d' has 2 users"}


def test_an_activation_behind_a_linear_is_no_business_of_it() -> None:
    graph, refused = rewritten("fuse-conv-activation", qg.capture(Activated(nn.Linear(4, 4), nn.ReLU()), X))
    assert (regions(graph), refused) == ({}, {})


# ---------------------------------------------------------------- fuse-add-activation


def summed(act: Callable[[Tensor], Tensor], *, twice: bool = False) -> Graph:
    def function(x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return act(total) + total if twice else act(total)

    return after(of(function, X, Y), "fold-clamp", "mark-residual-add")


@pytest.mark.parametrize(("act", "kind"), [(torch.relu, "relu"), (functional.relu6, "clamp")])
def test_a_sum_and_its_activation_are_one_region(act: Callable[[Tensor], Tensor], kind: str) -> None:
    graph, refused = rewritten("fuse-add-activation", summed(act))
    assert list(regions(graph).values()) == [["residual_add", kind]]
    assert refused == {}


def test_a_sum_with_two_readers_is_refused() -> None:
    graph, refused = rewritten("fuse-add-activation", summed(torch.relu, twice=True))
    assert regions(graph) == {}
    assert list(refused.values()) == ["'Function:residual_add' has 2 users"]


# ---------------------------------------------------------------- fold-attention-scale


class Projected(nn.Module):
    """Attention over projections; ``twice`` lets something else read the query."""

    def __init__(self, scale: float | None = None, bias: bool = True, twice: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4, bias=b) for b in (bias, True, True))
        self.scale, self.twice = scale, twice

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (p(x).view(2, 2, 1, 4).transpose(1, 2) for p in (self.query, self.key, self.value))
        y = functional.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return y + query if self.twice else y


WIDE = floats(2, 2, 4)


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("bias", [True, False])
def test_the_scale_goes_into_the_query(scale: float | None, bias: bool) -> None:
    before = qg.capture(Projected(scale, bias), WIDE)
    graph, refused = rewritten("fold-attention-scale", before)
    assert any(line.endswith("scale=1.0)") for line in lines(graph))
    factor = 0.5 if scale is None else scale
    for name in ("weight", "bias") if bias else ("weight",):
        folded, source = (g.module.get_parameter(f"query.{name}{end}") for g, end in ((graph, "/folded"), (before, "")))
        assert torch.equal(folded, source * factor)
    assert refused == {}
    assert distance(graph, before, floats(2, 2, 4, seed=3)) < 1e-5


SCALES_NOT: dict[str, tuple[Projected, list[str]]] = {
    "one": (Projected(1.0), []),
    "a query that is read": (Projected(twice=True), ["'Projected:transpose' has 2 users"]),
}


@pytest.mark.parametrize("name", SCALES_NOT)
def test_fold_attention_scale_refuses(name: str) -> None:
    model, reasons = SCALES_NOT[name]
    before = qg.capture(model, WIDE)
    graph, refused = rewritten("fold-attention-scale", before)
    assert lines(graph) == lines(before)
    assert list(refused.values()) == reasons


# ---------------------------------------------------------------- merge-query-key-value


def test_three_projections_are_one_linear() -> None:
    before = captured("encoder")
    graph, refused = rewritten("merge-query-key-value", before)
    assert kinds(graph).count("linear") == kinds(before).count("linear") - 2
    merged = graph.module.get_parameter("layer.0.attention.query.weight/merged")
    weights = (before.module.get_parameter(f"layer.0.attention.{n}.weight") for n in ("query", "key", "value"))
    assert torch.equal(merged, torch.cat(tuple(weights)))
    assert [line.partition(" = ")[2] for line in lines(graph) if "attention.key:slice" in line.partition(" = ")[0]] == [
        "slice(layer.0.attention.query:linear, -1, 32, 64)"
    ]
    assert refused == {}


class Three(nn.Module):
    def __init__(self, names: str, biases: tuple[bool, bool, bool]) -> None:
        super().__init__()
        for name, bias in zip(names, biases, strict=True):
            self.add_module(f"{name}_proj", nn.Linear(4, 4, bias=bias))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Three("qkv", (True, True, False)), "some have a bias and some have none"),
        (Three("abc", (True, True, True)), "'a_proj' is not followed by a key and a value"),
    ],
)
def test_merge_query_key_value_refuses(model: nn.Module, reason: str) -> None:
    before = qg.capture(model, X)
    graph, refused = rewritten("merge-query-key-value", before)
    assert lines(graph) == lines(before)
    assert reason in refused.values()


def test_what_is_on_request_is_not_in_the_canonical_graph() -> None:
    assert kinds(canonical("encoder")).count("linear") == kinds(captured("encoder")).count("linear")
    assert not any("scale=1.0" in line for line in lines(canonical("encoder")))


def test_a_region_is_not_taken_from_another_pass() -> None:
    graph = after(of(lambda x: x * torch.sigmoid(1.702 * x)), "fuse-quick-gelu")
    assert rewritten("fuse-quick-gelu", graph)[1] == {"Function:mul#2": "it has a region"}


@pytest.mark.parametrize(("rounding", "fused"), [(None, True), ("floor", False)])
def test_a_division_that_rounds_is_no_scale(rounding: str | None, fused: bool) -> None:
    def attend(x: Tensor, y: Tensor) -> Tensor:
        return torch.div(x @ y.transpose(-1, -2), 2.0, rounding_mode=rounding).softmax(-1) @ y

    graph, _ = rewritten("fuse-attention", of(attend, floats(2, 4), floats(2, 4, seed=1)))
    assert bool(regions(graph)) == fused
