"""Passes that read softmax and activations back."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.models import floats
from tests.rewritten import X, Y, after, kinds, lines, of, rewritten

CUBE = floats(2, 3, 4)

# ---------------------------------------------------------------- fold-softmax


def exp(x: Tensor) -> Tensor:
    return torch.exp(x - x.amax(-1, keepdim=True))


SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: exp(x) / exp(x).sum(-1, keepdim=True),
    "axes from the front": lambda x: torch.exp(x - x.amax(2, True)) / torch.exp(x - x.amax(2, True)).sum(2, True),
    "max": lambda x: (x - x.max(-1, True)[0]).exp() / (x - x.max(-1, True).values).exp().sum(-1, True),
    "the largest of all": lambda x: (x - x.max()).exp() / (x - x.max()).exp().sum(-1, True),
    "no maximum": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    "a fixed maximum": lambda x: (x - 2.0).exp() / (x - 2.0).exp().sum(-1, keepdim=True),
    "a reciprocal": lambda x: exp(x) * exp(x).sum(-1, keepdim=True).reciprocal(),
    "logsumexp": lambda x: torch.exp(x - x.logsumexp(-1, keepdim=True)),
    "log_softmax": lambda x: x.log_softmax(2).exp(),
}
READ = ("remove-no-ops", "merge-equal-operations", "normalize-reductions")


@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_softmax_is_one_node(name: str) -> None:
    before = of(SOFTMAXES[name], CUBE)
    graph, refused = rewritten("fold-softmax", after(before, *READ))
    assert [line.partition(" = ")[2] for line in lines(graph)] == ["softmax(x, -1)"]
    assert refused == {}
    assert torch.allclose(graph(CUBE), SOFTMAXES[name](CUBE), atol=1e-6)


SHIFTED: dict[str, Callable[[Tensor], Tensor]] = {
    "the maximum along another axis": lambda x: (x - x.amax(1, True)).exp() / (x - x.amax(1, True)).exp().sum(-1, True),
    "the larger of two values": lambda x: (x - x.max(x * 2)).exp() / (x - x.max(x * 2)).exp().sum(-1, True),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_what_differs_along_the_axis_stays_subtracted(name: str) -> None:
    graph, _ = rewritten("fold-softmax", after(of(SHIFTED[name], CUBE), *READ))
    assert lines(graph)[-1] == "Function:softmax = softmax(Function:sub, -1)"
    assert torch.allclose(graph(CUBE), SHIFTED[name](CUBE), atol=1e-6)


def test_a_softmax_along_another_axis() -> None:
    graph = after(of(lambda x: x.exp() / x.exp().sum(1, keepdim=True), CUBE), *READ, "fold-softmax")
    assert [line.partition(" = ")[2] for line in lines(graph)] == ["softmax(x, -2)"]


SOFTMAXES_NOT: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "two axes": (lambda x: x.exp() / x.exp().sum((-1, -2), keepdim=True), ["it sums over several axes"]),
    "the sum of another value": (lambda x: x.exp() / (x * 2).exp().sum(-1, keepdim=True), []),
}


@pytest.mark.parametrize("name", SOFTMAXES_NOT)
def test_what_is_no_softmax_stays(name: str) -> None:
    function, reasons = SOFTMAXES_NOT[name]
    before = after(of(function, CUBE), *READ)
    graph, refused = rewritten("fold-softmax", before)
    assert lines(graph) == lines(before)
    assert list(refused.values()) == reasons


# ---------------------------------------------------------------- fold-safe-softmax


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


SAFE: dict[str, Callable[[Tensor], Tensor]] = {
    "isnan": lambda x: torch.where(torch.isnan(x.softmax(-1)), 0.0, x.softmax(-1)),
    "all": lambda x: torch.where((x == -math.inf).all(-1, keepdim=True), zeros(x.softmax(-1)), x.softmax(-1)),
    "any, as torch decomposes it": lambda x: torch.where(
        torch.logical_not(torch.logical_not(x == -math.inf).any(-1, keepdim=True)), torch.full_like(x, 0), x.softmax(-1)
    ),
    "isneginf": lambda x: torch.where(torch.isneginf(x).all(-1, keepdim=True), zeros(x), x.softmax(-1)),
    "masked_fill": lambda x: x.softmax(-1).masked_fill(x.softmax(-1).isnan(), 0.0),
    "nan_to_num": lambda x: x.softmax(-1).nan_to_num(0.0),
}
EMPTY = torch.tensor([[1.0, -math.inf, 2.0, 0.0], [-math.inf] * 4])


@pytest.mark.parametrize("name", SAFE)
def test_a_softmax_with_zeros_for_empty_rows_is_one_node(name: str) -> None:
    before = of(SAFE[name], EMPTY)
    graph, refused = rewritten("fold-safe-softmax", after(before, "fold-constants", *READ))
    assert [line.partition(" = ")[2] for line in lines(graph)] == ["safe_softmax(x, -1)"]
    assert refused == {}
    assert torch.equal(graph(EMPTY)[1], torch.zeros(4))
    assert torch.allclose(graph(EMPTY), SAFE[name](EMPTY))


def test_its_gradient_holds_no_nan() -> None:
    graph = after(of(SAFE["isnan"], EMPTY), "fold-constants", *READ, "fold-safe-softmax")
    x = EMPTY.clone().requires_grad_()
    graph(x)[0, 0].backward()
    assert x.grad is not None
    assert not bool(x.grad.isnan().any())


SAFE_NOT: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "another axis": (
        lambda x: torch.where((x == -math.inf).all(0, keepdim=True), 0.0, x.softmax(-1)),
        ["it looks along -2, the softmax runs along -1"],
    ),
    "ones": (lambda x: torch.where(torch.isnan(x.softmax(-1)), 1.0, x.softmax(-1)), []),
    "another value": (lambda x: torch.where(torch.isnan((x * 2).softmax(-1)), 0.0, x.softmax(-1)), []),
    "any": (lambda x: torch.where((x == -math.inf).any(-1, keepdim=True), 0.0, x.softmax(-1)), []),
}


@pytest.mark.parametrize("name", SAFE_NOT)
def test_what_is_no_safe_softmax_stays(name: str) -> None:
    function, reasons = SAFE_NOT[name]
    before = after(of(function, EMPTY), "fold-constants", *READ)
    graph, refused = rewritten("fold-safe-softmax", before)
    assert lines(graph) == lines(before)
    assert list(refused.values()) == reasons


# ---------------------------------------------------------------- fold-silu


SILUS: dict[str, Callable[[Tensor], Tensor]] = {
    "x first": lambda x: x * torch.sigmoid(x),
    "x last": lambda x: x.sigmoid() * x,
}


@pytest.mark.parametrize("name", SILUS)
def test_a_silu_is_one_node(name: str) -> None:
    graph, refused = rewritten("fold-silu", of(SILUS[name]))
    assert lines(graph) == ["Function:silu = silu(x)"]
    assert refused == {}
    assert torch.allclose(graph(X), SILUS[name](X))


def test_a_gate_is_no_silu() -> None:
    before = of(lambda x, y: x * torch.sigmoid(y), X, Y)
    graph, _ = rewritten("fold-silu", before)
    assert lines(graph) == lines(before)


def test_a_gelu_in_tanh_says_so() -> None:
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))

    graph, _ = rewritten("fold-gelu", of(gelu))
    assert lines(graph) == ["Function:gelu = gelu(x, approximate=tanh)"]
    assert torch.allclose(graph(X), gelu(X), atol=1e-6)
    other = of(lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.05 * torch.pow(x, 3.0)))))
    assert "tanh" in kinds(rewritten("fold-gelu", other)[0])
