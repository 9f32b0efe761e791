"""Passes that write one thing in one way: what they read, what they leave, before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.rewriting.matcher import match
from qatgraph.rewriting.pattern import Any as AnyValue
from qatgraph.rewriting.pattern import Op
from tests.models import BATCH, captured, floats
from tests.rewritten import Function, X, after, distance, kinds, lines, of, rewritten

IMAGE = floats(2, 4, 6, 6)
CUBE = floats(2, 3, 4)


def calls(graph: Graph) -> list[str]:
    """The operations without the names of their results."""
    return [line.partition(" = ")[2].replace("Function:", "") for line in lines(graph)]


def equal(one: Any, other: Any) -> bool:
    leaves, others = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(leaves, others, strict=True))


# ---------------------------------------------------------------- recompose-layers


def decomposed(model: nn.Module, x: Tensor) -> Graph:
    return qg.capture(torch.export.export(model.eval(), (x,)).run_decompositions())


LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "conv1d": (nn.Conv1d(4, 2, 3, padding=1, dilation=2), floats(2, 4, 6)),
    "conv2d": (nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False), IMAGE),
    "conv3d": (nn.Conv3d(2, 2, 2), floats(1, 2, 3, 3, 3)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 2, 3, stride=2, output_padding=1), floats(2, 4, 6)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 4, 2, groups=2), IMAGE),
    "batch_norm": (nn.BatchNorm2d(4), IMAGE),
    "layer_norm": (nn.LayerNorm([6, 6]), IMAGE),
    "group_norm": (nn.GroupNorm(2, 4), IMAGE),
    "max_pool2d": (nn.MaxPool2d(2, ceil_mode=True), IMAGE),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_read_back(name: str) -> None:
    before = decomposed(*LAYERS[name])
    graph, refused = rewritten("recompose-layers", before)
    assert name not in kinds(before)
    assert kinds(graph) == [name]
    assert refused == {}
    model, x = LAYERS[name]
    assert kinds(qg.capture(model, x)) == [name], "the layer, captured as it is"
    assert torch.equal(graph(x), before(x))


def test_a_decomposed_program_reads_as_the_model_does() -> None:
    read = captured("decomposed")
    assert "native_layer_norm" in kinds(read)
    assert "layer.0.norm:layer_norm" in [
        line.partition(" = ")[0] for line in lines(rewritten("recompose-layers", read)[0])
    ]


def test_a_norm_whose_statistics_are_read_is_refused() -> None:
    graph = of(lambda x: torch.native_layer_norm(x, [4], None, None, 1e-5)[:2])
    left, refused = rewritten("recompose-layers", graph)
    assert "native_layer_norm" in kinds(left)
    assert refused == {"Function:native_layer_norm": "more than its first result is read"}


# ---------------------------------------------------------------- normalize-reductions


REDUCTIONS: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "mean": (lambda x: x.mean(2, keepdim=True), ["mean(x, [-1], True)"]),
    "several axes": (lambda x: x.sum((0, 2)), ["sum(x, [-3, -1])"]),
    "softmax": (lambda x: x.softmax(1), ["softmax(x, -2)"]),
    "softmax with its own type": (lambda x: functional.softmax(x, -1, dtype=torch.float32), ["softmax(x, -1)"]),
    "softmax of core ATen": (lambda x: torch._softmax(x, 2, False), ["softmax(x, -1)"]),
    "argmax": (lambda x: x.argmax(2), ["argmax(x, -1)"]),
    "var": (lambda x: x.var(2, unbiased=False), ["var(x, [-1], correction=0, keepdim=False)"]),
    "var with a correction": (lambda x: x.var(2, correction=1), ["var(x, [-1], correction=1, keepdim=False)"]),
    "var_mean": (
        lambda x: torch.var_mean(x, 2, unbiased=False, keepdim=True),
        ["var(x, [-1], correction=0, keepdim=True)", "mean(x, [-1], True)"],
    ),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_axes_count_from_the_end(name: str) -> None:
    function, want = REDUCTIONS[name]
    graph, _ = rewritten("normalize-reductions", of(function, CUBE))
    assert calls(graph) == want
    for have, right in zip(pytree.tree_leaves(graph(CUBE)), pytree.tree_leaves(function(CUBE)), strict=True):
        assert torch.allclose(have, right, rtol=1e-6)


AS_THEY_ARE: dict[str, Callable[[Tensor], Any]] = {
    "over everything": lambda x: x.mean(),
    "counted from the end": lambda x: x.mean(-1, keepdim=True),
    "another type": lambda x: functional.softmax(x, -1, dtype=torch.float64),
    "no reduction": lambda x: x.transpose(1, 2),
    "of a scalar": lambda x: x.sum().sum(0),
}


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_what_is_written_so_already_stays(name: str) -> None:
    before = of(AS_THEY_ARE[name], CUBE)
    assert lines(rewritten("normalize-reductions", before)[0]) == lines(before)


@pytest.mark.parametrize("dim", [[2], [-1]])
def test_a_pattern_needs_to_know_one_spelling(dim: list[int]) -> None:
    graph, _ = rewritten("normalize-reductions", of(lambda x: x.mean(dim, keepdim=True), CUBE))
    assert match(Op("mean", AnyValue("x"), where={"dim": [-1]}), graph.nodes[0]) is not None


# ---------------------------------------------------------------- fold-global-pool

POOLED: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "a mean": (lambda x: x.mean((2, 3)), ["global_avg_pool(x, [1, 1])", "flatten(global_avg_pool, 1)"]),
    "a mean that keeps its axes": (lambda x: x.mean((3, 2), keepdim=True), ["global_avg_pool(x, [1, 1])"]),
    "a pool": (lambda x: functional.adaptive_avg_pool2d(x, 1), ["global_avg_pool(x, [1, 1])"]),
    "a mean over one axis": (lambda x: x.mean(3), ["mean(x, [-1])"]),
    "a mean over the channels too": (lambda x: x.mean((1, 2, 3)), ["mean(x, [-3, -2, -1])"]),
}
IMAGES = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", POOLED)
def test_the_average_over_an_image_is_written_in_one_way(name: str) -> None:
    function, wanted = POOLED[name]
    graph, refused = rewritten("fold-global-pool", after(of(function, IMAGES), "normalize-reductions"))
    assert calls(graph) == wanted
    assert refused == {}


@pytest.mark.parametrize(
    ("function", "x", "reason"),
    [
        (lambda x: functional.adaptive_avg_pool2d(x, 2), IMAGES, "its result has several pixels"),
        (lambda x: x.mean((1, 2)), IMAGES[0], "its input is no batch of images of its type"),
        (lambda x: x.mean((2, 3), dtype=torch.float64), IMAGES, "its input is no batch of images of its type"),
    ],
)
def test_fold_global_pool_refuses(function: Callable[[Tensor], Tensor], x: Tensor, reason: str) -> None:
    before = after(of(function, x), "normalize-reductions")
    graph, refused = rewritten("fold-global-pool", before)
    assert lines(graph) == lines(before)
    assert list(refused.values()) == [reason]


# ---------------------------------------------------------------- fold-powers


POWERS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "square": (lambda x: x.square(), ["pow(x, 2)"]),
    "root": (lambda x: x**0.5, ["sqrt(x)"]),
    "reciprocal root": (lambda x: x**-0.5, ["rsqrt(x)"]),
    "one over a root": (lambda x: 1 / torch.sqrt(x), ["rsqrt(x)"]),
    "one over a power": (lambda x: 1.0 / x**0.5, ["rsqrt(x)"]),
    "another power": (lambda x: x**3, ["pow(x, 3)"]),
    "one over a root that is read too": (
        lambda x: x.sqrt().reciprocal() + x.sqrt(), ["sqrt(x)", "rsqrt(x)", "add(rsqrt, sqrt)"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POWERS)
def test_powers_have_one_spelling(name: str) -> None:
    function, want = POWERS[name]
    before, x = of(function, X.abs()), X.abs() + 1
    graph = after(before, "merge-equal-operations", "fold-powers")
    assert calls(graph) == want
    assert distance(graph, before, x) < 1e-6


# ---------------------------------------------------------------- fold-split


SPLITS: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "chunk": (lambda x: x.chunk(2, -1), ["slice(x, -1, 0, 2)", "slice(x, -1, 2, 4)"]),
    "split": (lambda x: torch.split(x, 3, 2)[1] * 2, ["slice(x, -1, 3, 4)", "mul(slice, 2)"]),
    "unequal parts": (lambda x: torch.split(x, [1, 3], 2), ["slice(x, -1, 0, 1)", "slice(x, -1, 1, 4)"]),
    "unbind": (
        lambda x: x.unbind(1)[2] + x.unbind(1)[0],
        ["select(x, -2, 2)", "select(x, -2, 0)", "add(select, select#2)"],
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_parts_of_a_split_are_slices(name: str) -> None:
    function, want = SPLITS[name]
    graph, refused = rewritten("fold-split", after(of(function, CUBE), "remove-no-ops", "merge-equal-operations"))
    assert calls(graph) == want
    assert refused == {}
    assert equal(graph(CUBE), list(pytree.tree_leaves(function(CUBE))))


def test_parts_whose_size_moves_are_refused() -> None:
    def halves(x: Tensor) -> Any:
        return torch.ops.aten.split_with_sizes.default(torch.cat([x, x]), [x.shape[0], x.shape[0]])

    before = qg.capture(Function(halves), X, {"x": BATCH})
    graph, refused = rewritten("fold-split", before)
    assert kinds(graph) == kinds(before)
    assert refused == {"Function:split_with_sizes": "the size of its parts moves"}


# ---------------------------------------------------------------- fold-clamp


CLAMPS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "relu6 as a module": (nn.ReLU6(), ["clamp(x, 0.0, 6.0)"]),
    "relu6": (functional.relu6, ["clamp(x, 0.0, 6.0)"]),
    "hardtanh": (functional.hardtanh, ["clamp(x, -1.0, 1.0)"]),
    "clip": (lambda x: torch.clip(x, -2, 1), ["clamp(x, -2.0, 1.0)"]),
    "from above alone": (lambda x: torch.clamp_max(x, 1), ["clamp(x, None, 1.0)"]),
    "relu": (lambda x: x.clamp_min(0), ["relu(x)"]),
    "minimum": (lambda x: torch.minimum(x, torch.tensor(0.5)), ["clamp(x, None, 0.5)"]),
    "maximum": (lambda x: torch.maximum(x, torch.tensor(0.0)), ["relu(x)"]),
    "two in a row": (lambda x: x.clamp(min=-1).clamp(max=0.5), ["clamp(x, -1.0, 0.5)"]),
    "relu and a limit": (lambda x: torch.relu(x).clamp(max=6), ["clamp(x, 0.0, 6.0)"]),
    "the outer wins": (lambda x: x.clamp(-2, -1).clamp(0, 1), ["clamp(x, 0.0, 0.0)"]),
    "relu of relu": (lambda x: torch.relu(torch.relu(x)), ["relu(x)"]),
}


@pytest.mark.parametrize("name", CLAMPS)
def test_a_limit_is_one_clamp(name: str) -> None:
    function, want = CLAMPS[name]
    before = of(function)
    graph, refused = rewritten("fold-clamp", after(before, "remove-no-ops", "fold-constants"))
    assert calls(graph) == want
    assert refused == {}
    assert torch.equal(graph(X), before(X))


NO_CLAMPS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "integers": (lambda x: x.long().clamp_min(0), "it limits integers"),
    "nothing between": (lambda x: torch.clip(x, 1, -1), "nothing lies between 1 and -1"),
    "a wider type": (
        lambda x: torch.minimum(x, torch.tensor([1.0]).double()),
        "the bound changes the type or the shape",
    ),
}


@pytest.mark.parametrize("name", NO_CLAMPS)
def test_fold_clamp_refuses(name: str) -> None:
    function, reason = NO_CLAMPS[name]
    before = after(of(function), "remove-no-ops", "fold-constants")
    graph, refused = rewritten("fold-clamp", before)
    assert lines(graph) == lines(before)
    assert list(refused.values()) == [reason]


def test_a_limit_that_something_else_reads_stays() -> None:
    before = of(lambda x: (torch.relu(x), torch.relu(x).clamp(max=6)))
    graph = after(before, "merge-equal-operations", "fold-clamp")
    assert calls(graph) == ["relu(x)", "clamp(relu, None, 6.0)"]


def test_both_bounds_are_read_at_one_place() -> None:
    graph, _ = rewritten("fold-clamp", of(functional.relu6))
    pattern = Op("clamp", AnyValue("x"), where={"min": 0.0, "max": 6.0})
    assert match(pattern, graph.nodes[0]) is not None
    assert match(pattern, of(lambda x: x.clamp(0, 5)).nodes[0]) is None


# ---------------------------------------------------------------- fold-padding


class Padded(nn.Module):
    def __init__(self, pad: tuple[int, ...], conv: nn.Module, value: float = 0.0, mode: str = "constant") -> None:
        super().__init__()
        self.pad, self.conv, self.value, self.mode = pad, conv, value, mode

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(functional.pad(x, self.pad, self.mode, self.value))
        return y


CONV = nn.Conv2d(4, 4, 3, padding=(0, 1), stride=2)
PADDED: dict[str, tuple[nn.Module, Tensor, str]] = {
    "one axis": (Padded((2, 2), nn.Conv1d(4, 2, 3)), floats(2, 4, 6), "[2]"),
    "two axes": (Padded((1, 1, 2, 2), CONV), IMAGE, "[2, 2]"),
    "a depthwise convolution": (Padded((1, 1, 1, 1), nn.Conv2d(4, 4, 3, groups=4, bias=False)), IMAGE, "[1, 1]"),
    "the last axis alone": (Padded((1, 1), CONV), IMAGE, "[0, 2]"),
    "three axes": (Padded((1, 1, 0, 0, 2, 2), nn.Conv3d(2, 2, 2)), floats(1, 2, 3, 3, 3), "[2, 0, 1]"),
}


@pytest.mark.parametrize("name", PADDED)
def test_a_convolution_pads_itself(name: str) -> None:
    model, x, padding = PADDED[name]
    before = qg.capture(model, x)
    graph, refused = rewritten("fold-padding", before)
    (line,) = lines(graph)
    assert line.startswith("conv:conv")
    assert padding in line
    assert refused == {}
    assert distance(graph, before, x) < 1e-6


PADDED_NOT: dict[str, tuple[nn.Module, str]] = {
    "uneven": (Padded((0, 1, 0, 1), CONV), "it pads unevenly: [0, 1, 0, 1]"),
    "cut": (Padded((-1, -1), CONV), "it pads unevenly: [-1, -1]"),
    "channels": (Padded((1, 1, 1, 1, 0, 1), nn.Conv2d(5, 2, 3)), "it pads channels or samples"),
    "a word": (Padded((1, 1), nn.Conv2d(4, 2, 3, padding="same")), "its padding is 'same'"),
}


@pytest.mark.parametrize("name", PADDED_NOT)
def test_fold_padding_refuses(name: str) -> None:
    model, reason = PADDED_NOT[name]
    before = qg.capture(model, IMAGE)
    graph, refused = rewritten("fold-padding", before)
    assert lines(graph) == lines(before)
    assert refused == {"conv:conv2d": reason}


@pytest.mark.parametrize(
    "model", [Padded((1, 1), CONV, value=1.0), Padded((1, 1, 1, 1), CONV, mode="circular")], ids=["ones", "circular"]
)
def test_padding_that_is_not_zeros_stays(model: nn.Module) -> None:
    before = qg.capture(model, IMAGE)
    graph, refused = rewritten("fold-padding", before)
    assert lines(graph) == lines(before)
    assert refused == {}


def test_what_must_be_functional_says_so() -> None:
    graph = of(lambda x: torch.relu_(x * 2))
    with pytest.raises(PassError, match="QG213: 'fold-padding' requires that the graph is functional"):
        rewritten("fold-padding", graph)
