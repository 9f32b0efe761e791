"""Passes that read layers back: the spellings that they know, what they refuse and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qatgraph as qg
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from tests.models import floats
from tests.rewritten import X, Y, after, distance, lines, of, rewritten, weighted

CUBE = floats(2, 3, 4)
VECTOR, MATRIX = floats(4, seed=2), floats(4, 4, seed=3)


def refusals(name: str, graph: Graph) -> list[str]:
    """The reasons, after which the graph is as it was."""
    left, refused = rewritten(name, graph)
    assert lines(left) == lines(graph)
    return list(refused.values())


# ---------------------------------------------------------------- fold-matmul


MATMULS: dict[str, tuple[Graph, list[str]]] = {
    "transposed": (weighted(lambda x, w: x @ w.t(), X, MATRIX), ["linear(x, 'w0')"]),
    "permuted": (weighted(lambda x, w: x @ w.permute(1, 0), CUBE, MATRIX), ["linear(x, 'w0')"]),
    "straight": (weighted(lambda x, w: x @ w, CUBE, floats(4, 5)), ["linear(x, 'w0/folded')"]),
    "mm": (weighted(torch.mm, X, MATRIX), ["linear(x, 'w0/folded')"]),
    "with a bias": (weighted(lambda x, w, b: b + x @ w.t(), X, MATRIX, VECTOR), ["linear(x, 'w0', 'w1')"]),
    "a bias behind a linear": (weighted(lambda x, w, b: functional.linear(x, w) + b, X, MATRIX, VECTOR),
                               ["linear(x, 'w0', 'w1')"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MATMULS)
def test_a_product_with_a_weight_is_a_linear(name: str) -> None:
    before, want = MATMULS[name]
    graph, refused = rewritten("fold-matmul", before)
    assert [line.partition(" = ")[2] for line in lines(graph)] == want
    assert refused == {}
    x = floats(*before.info.args[0].shape, seed=5)
    assert distance(graph, before, x) < 1e-6


MATMULS_NOT: dict[str, tuple[Graph, list[str]]] = {
    "two activations": (of(lambda x, y: x @ y.t(), X, Y), []),
    "a permutation that is none": (weighted(lambda x, w: x @ w.permute(0, 1), X, MATRIX), []),
    "a vector": (weighted(lambda x, w: x @ w, X, VECTOR), ["'w0' is no matrix"]),
    "a buffer": (of(lambda x: x @ torch.ones(4, 4)), []),
    "a weight with other readers": (weighted(lambda x, w: x @ w + w.sum(), X, MATRIX), ["'w0' has 2 users"]),
    "a wide constant": (weighted(lambda x, w, b: functional.linear(x, w) + b, X, MATRIX, floats(2, 4)),
                        ["the constant is [2, 4], the linear has 4 outputs"]),
    "a second bias": (weighted(lambda x, w, b: functional.linear(x, w, b) + b, X, MATRIX, VECTOR),
                      ["the linear has a bias"]),
    "a scaled sum": (weighted(lambda x, w, b: torch.add(functional.linear(x, w), b, alpha=2), X, MATRIX, VECTOR), []),
}  # fmt: skip


@pytest.mark.parametrize("name", MATMULS_NOT)
def test_what_is_no_linear_stays(name: str) -> None:
    before, reasons = MATMULS_NOT[name]
    assert refusals("fold-matmul", before) == reasons


def test_a_constant_matrix_is_no_weight() -> None:
    graph = after(of(lambda x: x @ torch.ones(4, 4)), "fold-constants")
    assert refusals("fold-matmul", graph) == ["'%3Aones%2Ffolded' is no parameter"]


# ---------------------------------------------------------------- fold-batch-norm


class Normed(nn.Module):
    """A layer, and a batch norm with statistics of its own."""

    def __init__(self, layer: nn.Module, norm: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.layer, self.norm, self.twice = layer, norm, twice
        for tensor in [*norm.parameters(), *norm.buffers()]:
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        z: Tensor = self.norm(y)
        return z + y if self.twice else z


IMAGE, SIGNAL = floats(2, 4, 6, 6), floats(2, 4, 6)
NORMED: dict[str, tuple[Normed, Tensor]] = {
    "conv1d": (Normed(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), SIGNAL),
    "conv2d": (Normed(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)), IMAGE),
    "conv2d without a bias": (Normed(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), IMAGE),
    "conv2d with padding same": (Normed(nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)), IMAGE),
    "grouped": (Normed(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), IMAGE),
    "depthwise": (Normed(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)), IMAGE),
    "conv_transpose1d": (Normed(nn.ConvTranspose1d(4, 6, 2), nn.BatchNorm1d(6)), SIGNAL),
    "conv_transpose2d grouped": (Normed(nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), nn.BatchNorm2d(6)), IMAGE),
    "conv3d": (Normed(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), floats(1, 2, 3, 3, 3)),
    "linear": (Normed(nn.Linear(4, 6), nn.BatchNorm1d(6)), X),
    "a norm without affine": (Normed(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), IMAGE),
}


@pytest.mark.parametrize("name", NORMED)
def test_a_batch_norm_goes_into_its_layer(name: str) -> None:
    model, x = NORMED[name]
    before = qg.capture(model, x)
    graph, refused = rewritten("fold-batch-norm", before)
    (node,) = graph.nodes
    assert record(node).name == record(before.nodes[0]).name, "the layer keeps its name"
    assert sorted(graph.module.state_dict()) == ["layer.bias/folded", "layer.weight/folded"]
    assert all(p.requires_grad for p in graph.module.parameters())
    assert refused == {}
    assert distance(graph, before, floats(*x.shape, seed=7)) < 1e-5


def test_a_frozen_layer_stays_frozen() -> None:
    model = Normed(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    model.layer.requires_grad_(False)
    graph, _ = rewritten("fold-batch-norm", qg.capture(model, IMAGE))
    assert not any(p.requires_grad for p in graph.module.parameters())


def test_a_layer_that_something_else_reads_keeps_its_norm() -> None:
    model = Normed(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), twice=True)
    assert refusals("fold-batch-norm", qg.capture(model, IMAGE)) == []


def test_batch_statistics_are_not_folded() -> None:
    model = Normed(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))
    assert refusals("fold-batch-norm", qg.capture(model, IMAGE)) == []


# ---------------------------------------------------------------- fold-layer-norm


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def variance(x: Tensor) -> Tensor:
    return centred(x).pow(2).mean(-1, keepdim=True)


Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]
LAYER_NORMS: dict[str, Spelling] = {
    "sqrt": lambda x, w, b: centred(x) / torch.sqrt(variance(x) + 1e-5) * w + b,
    "rsqrt": lambda x, w, b: b + w * (centred(x) * torch.rsqrt(variance(x) + 1e-5)),
    "a power": lambda x, w, b: centred(x) / (variance(x) + 1e-5) ** 0.5 * w + b,
    "a product": lambda x, w, b: centred(x) / ((centred(x) * centred(x)).mean(-1, keepdim=True) + 1e-5).sqrt() * w + b,
    "var": lambda x, w, b: centred(x) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w + b,
    "var_mean": lambda x, w, b: _by_var_mean(x) * w + b,
    "axes from the front": lambda x, w, b: (x - x.mean(2, True)) * (x.var(2, False, True) + 1e-5) ** -0.5 * w + b,
    "affine apart": lambda x, w, b: functional.layer_norm(x, (4,)) * w + b,
}
READ = ("functionalize-in-place", "remove-no-ops", "merge-equal-operations", "normalize-reductions", "fold-powers")


def _by_var_mean(x: Tensor) -> Tensor:
    spread, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(spread + 1e-5)


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_a_layer_norm_is_one_node(name: str) -> None:
    before = weighted(LAYER_NORMS[name], CUBE, VECTOR, VECTOR + 1)
    graph, refused = rewritten("fold-layer-norm", after(before, *READ))
    assert [line.partition(" = ")[2] for line in lines(graph)] == ["layer_norm(x, [4], 'w0', 'w1', 1e-05)"]
    assert refused == {}
    assert distance(graph, before, floats(2, 3, 4, seed=8)) < 1e-5


def test_a_layer_norm_without_parameters() -> None:
    graph = after(of(lambda x: centred(x) / (variance(x) + 1e-6).sqrt(), CUBE), *READ, "fold-layer-norm")
    assert [line.partition(" = ")[2] for line in lines(graph)] == ["layer_norm(x, [4], None, None, 1e-06)"]
    assert torch.allclose(graph(CUBE), functional.layer_norm(CUBE, (4,), eps=1e-6), atol=1e-6)


LAYER_NORMS_NOT: dict[str, Spelling] = {
    "another axis": lambda x, w, b: (x - x.mean(1, True)) / ((x - x.mean(1, True)).pow(2).mean(1, True) + 1e-5).sqrt(),
    "the unbiased variance": lambda x, w, b: centred(x) / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
    "the variance of another value": lambda x, w, b: centred(x) / (variance(x * 2) + 1e-5).sqrt(),
    "no centre": lambda x, w, b: x / (variance(x) + 1e-5).sqrt(),
    "eps outside": lambda x, w, b: centred(x) / (variance(x).sqrt() + 1e-5),
}


@pytest.mark.parametrize("name", LAYER_NORMS_NOT)
def test_what_is_no_layer_norm_stays(name: str) -> None:
    before = after(weighted(LAYER_NORMS_NOT[name], CUBE, VECTOR, VECTOR), *READ)
    assert refusals("fold-layer-norm", before) == []


def test_a_weight_of_another_shape_is_refused() -> None:
    before = weighted(lambda x, w: functional.layer_norm(x, (4,)) * w, CUBE, floats(3, 1))
    assert refusals("fold-layer-norm", before) == ["the weight is [3, 1], the norm runs over [4]"]


# ---------------------------------------------------------------- fold-rms-norm


def scale(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


RMS_NORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "the weight first": (lambda x, w: w * (x * scale(x)), "rms_norm(x, [4], 'w0', 1e-06)"),
    "the weight last": (lambda x, w: x * scale(x) * w, "rms_norm(x, [4], 'w0', 1e-06)"),
    "a product": (lambda x, w: x * torch.rsqrt((x * x).mean(-1, True) + 1e-6) * w, "rms_norm(x, [4], 'w0', 1e-06)"),
    "square": (lambda x, w: w * (x / torch.sqrt(x.square().mean(2, True) + 1e-6)), "rms_norm(x, [4], 'w0', 1e-06)"),
    "a power": (lambda x, w: x * (x.pow(2).mean(-1, True) + 1e-6) ** -0.5 * w, "rms_norm(x, [4], 'w0', 1e-06)"),
    "casts": (lambda x, w: w * (x.float() * scale(x.float())).to(x.dtype), "rms_norm(x, [4], 'w0', 1e-06)"),
    "the weight counts from one": (lambda x, w: x * scale(x) * (1.0 + w), "rms_norm(x, [4], 'w0/folded', 1e-06)"),
    "no weight": (lambda x, w: x * scale(x), "rms_norm(x, [4], None, 1e-06)"),
}  # fmt: skip


@pytest.mark.parametrize("name", RMS_NORMS)
def test_an_rms_norm_is_one_node(name: str) -> None:
    function, want = RMS_NORMS[name]
    before = weighted(function, CUBE, VECTOR)
    graph, refused = rewritten("fold-rms-norm", after(before, *READ))
    assert [line.partition(" = ")[2] for line in lines(graph)] == [want]
    assert refused == {}
    assert distance(graph, before, floats(2, 3, 4, seed=8)) < 1e-5


def test_a_folded_weight_is_a_new_parameter() -> None:
    graph, _ = rewritten("fold-rms-norm", weighted(lambda x, w: x * scale(x) * (1.0 + w), CUBE, VECTOR))
    assert torch.equal(graph.module.get_parameter("w0/folded"), VECTOR + 1)
    assert sorted(graph.module.state_dict()) == ["w0/folded"]


RMS_NORMS_NOT: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    "another axis": (lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, True) + 1e-6), []),
    "another value": (lambda x, w: x * scale(x * 2), []),
    "cubes": (lambda x, w: x * torch.rsqrt(x.pow(3).mean(-1, True) + 1e-6), []),
    "a weight that counts from two": (lambda x, w: functional.rms_norm(x, (4,)) * (2.0 + w), []),
    "a wide weight": (lambda x, w: functional.rms_norm(x, (4,)) * w[None], []),
}


@pytest.mark.parametrize("name", RMS_NORMS_NOT)
def test_what_is_no_rms_norm_stays(name: str) -> None:
    function, reasons = RMS_NORMS_NOT[name]
    assert refusals("fold-rms-norm", after(weighted(function, CUBE, VECTOR), *READ)) == reasons


def test_an_rms_norm_refuses_a_weight_of_another_shape() -> None:
    before = weighted(lambda x, w: functional.rms_norm(x, (4,)) * w, CUBE, floats(3, 1))
    assert refusals("fold-rms-norm", before) == ["the weight is [3, 1], the norm runs over [4]"]
