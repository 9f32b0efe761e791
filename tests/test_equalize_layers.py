"""Cross-layer equalization: exact in every kind of layer, refused where it would not be, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.ir.masks import masked
from qatgraph.ir.meta import record
from qatgraph.passes import equalize_layers
from qatgraph.passes.equalize_layers import EqualizeLayers
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.planning.target import Row, Target
from qatgraph.rewriting.channels import LAYERS, Channels, replace_weight
from qatgraph.specs import QuantSpec
from tests.models import floats
from tests.rewritten import after, lines, rewritten

X, SEQUENCE, IMAGE = floats(4, 8), floats(2, 4, 9), floats(2, 4, 6, 6)


# ---------------------------------------------------------------- equalize-layers


class Net(nn.Module):
    """Modules in a row, with seeded parameters. The channels of every layer are scaled by up to 64, up or down.

    ``kept``: and the next layer takes it back, so that the model computes what it did.
    """

    def __init__(self, *modules: nn.Module, kept: bool = False) -> None:
        super().__init__()
        self.row = nn.Sequential(*modules)
        weights = [p for p in self.row.parameters() if p.ndim > 1]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.row.parameters():
                parameter.uniform_(-1, 1, generator=generator)
            for i, weight in enumerate(weights[:-1] if kept else weights):
                factor = torch.exp2(12 * torch.rand(len(weight), generator=generator) - 6)
                weight.mul_(across(factor, weight, 0))
                bias = dict(self.row.named_parameters()).get(self._bias_of(weight))
                if bias is not None and len(bias) == len(factor):  # not where a transposed weight has its inputs
                    bias.mul_(factor)
                if kept:
                    then = weights[i + 1]
                    then.div_(across(factor, then, 0 if then.shape[1] == 1 else 1))  # 0: depthwise

    def _bias_of(self, weight: Tensor) -> str:
        return next(n for n, p in self.row.named_parameters() if p is weight).replace("weight", "bias")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.row(x)
        return y


def across(factor: Tensor, weight: Tensor, axis: int) -> Tensor:
    return factor.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])


def capture(*modules: nn.Module, x: Tensor = X) -> Graph:
    return after(qg.capture(Net(*modules).eval(), x), "functionalize-in-place", "restore-dropout")


class Mean(nn.Module):
    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=self.keep)


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 2, x.shape[-1])


CHAINS: dict[str, tuple[tuple[nn.Module, ...], Tensor]] = {
    "linears": ((nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 7), nn.Linear(7, 3)), X),
    "without bias": ((nn.Linear(8, 6, bias=False), nn.Dropout(0.1), nn.Linear(6, 7)), X),
    "conv1d": ((nn.Conv1d(4, 6, 3), nn.PReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 3, 2)), SEQUENCE),
    "depthwise": ((nn.Conv2d(4, 6, 1), nn.PReLU(6), nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 3, 1)), IMAGE),
    "grouped": ((nn.Conv2d(4, 6, 3, groups=2), nn.LeakyReLU(), nn.Conv2d(6, 4, 1, groups=2)), IMAGE),
    "transposed": ((nn.ConvTranspose2d(4, 6, 2, groups=2), nn.AvgPool2d(2), nn.ConvTranspose2d(6, 4, 2)), IMAGE),
    "transposed groups": ((nn.Conv2d(4, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 9, 2, groups=3)), IMAGE),
    "flatten": ((nn.Conv2d(4, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5)), IMAGE),
    "pooled": ((nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)), IMAGE),
    "mean": ((nn.Conv2d(4, 6, 3), Mean(keep=False), nn.Linear(6, 5)), IMAGE),
    "kept mean": ((nn.Conv2d(4, 6, 3), Mean(keep=True), nn.Conv2d(6, 5, 1)), IMAGE),
    "rows": ((nn.Linear(8, 6), Rows(), nn.ReLU(), nn.Linear(6, 5)), X),
    "one image": ((nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1)), IMAGE[0]),
    "deep": (tuple(nn.Linear(8, 8) for _ in range(24)), X),
}  # fmt: skip


@cache
def ran(name: str) -> tuple[Graph, Graph, dict[str, str]]:
    modules, x = CHAINS[name]
    before = capture(*modules, x=x)
    return (before, *rewritten("equalize-layers", before))


def ranges(graph: Graph) -> list[tuple[Tensor, Tensor]]:
    """Between neighbouring layers: the range of each channel in the first and in the second."""
    layers = [n for n in graph.nodes if record(n).kind in LAYERS]
    found = []
    for first, second in pairwise(layers):
        weights = [graph.parameter(n.args[1]) for n in (first, second)]  # type: ignore[arg-type]
        assert weights[0] is not None
        assert weights[1] is not None
        out = Channels.of(first).output_range(weights[0])
        block = weights[1].shape[1] // len(out) if record(second).kind == "linear" else 1
        found.append((out, Channels.of(second, block).input_range(weights[1])))
    return found


@pytest.mark.parametrize("name", CHAINS)
def test_the_model_computes_the_same_bit_for_bit(name: str) -> None:
    before, graph, refused = ran(name)
    assert refused == {}
    x = floats(*CHAINS[name][1].shape, seed=5)
    assert torch.equal(graph(x), before(x))


@pytest.mark.parametrize("name", CHAINS)
def test_the_ranges_of_every_channel_come_within_a_factor_of_two(name: str) -> None:
    before, graph, _ = ran(name)
    assert any(float((a / b).log2().abs().max()) > 1.0 for a, b in ranges(before))
    for (first, second), bias in zip(ranges(graph), biases(graph), strict=False):
        off = (first / second).log2()
        limit = torch.maximum(first, bias).max() / 2
        assert bool(((off.abs() <= 1.0) | ((off < 0) & (bias > limit))).all())


def biases(graph: Graph) -> list[Tensor]:
    """The size of each bias of each layer, zero where there is none."""
    found = []
    for node in (n for n in graph.nodes if record(n).kind in LAYERS):
        bias = graph.parameter(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None  # type: ignore[arg-type]
        found.append(torch.zeros(1) if bias is None else bias.detach().abs())
    return found


class Weak(nn.Module):
    """One channel with a tiny weight, and a bias of ordinary size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)
        with torch.no_grad():
            self.first.weight[3] *= 1e-4
            self.first.bias[3] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.act(self.first(x)))
        return y


def largest_bias() -> float:
    torch.manual_seed(0)
    graph, _ = rewritten("equalize-layers", qg.capture(Weak().eval(), X))
    return max(float(b.max()) for b in biases(graph))


def test_a_weak_channel_does_not_blow_up_its_bias() -> None:
    assert largest_bias() <= 1.0


def test_a_pass_that_forgets_the_bias_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equalize_layers._Layer, "room", lambda layer, ranges: torch.full_like(ranges, 64).long())
    assert largest_bias() > 10.0


@pytest.mark.parametrize("name", CHAINS)
def test_a_second_run_finds_nothing_to_do(name: str) -> None:
    _, graph, _ = ran(name)
    again, _ = rewritten("equalize-layers", graph)
    assert str(again) == str(graph)


def test_the_new_parameters_stand_beside_the_users() -> None:
    _, graph, _ = ran("linears")
    assert lines(graph)[0] == "row.0:linear = linear(x, 'row.0.weight/equalized', 'row.0.bias/equalized')"
    assert lines(graph)[-1] == "row.3:linear = linear(row.2:linear, 'row.3.weight/equalized', 'row.3.bias')"
    assert record(graph.nodes[0]).history == ("equalize-layers",) * 2  # weight and bias


def test_a_dead_channel_keeps_its_scale() -> None:
    first, second = nn.Linear(8, 4), nn.Linear(4, 3)
    net = Net(first, nn.ReLU(), second)
    with torch.no_grad():
        first.weight[0] *= 64.0
        first.weight[1] = 0.0
        second.weight[:, 2] = 0.0
    graph, _ = rewritten("equalize-layers", qg.capture(net.eval(), X))
    new = {n: p for n, p in graph.module.named_parameters() if n.endswith("weight/equalized")}
    assert torch.equal(new["row.0.weight/equalized"][1:3], first.weight[1:3])
    assert torch.equal(new["row.2.weight/equalized"][:, 1:3], second.weight[:, 1:3])
    assert not torch.equal(new["row.0.weight/equalized"][0], first.weight[0])


def test_a_pruned_weight_stays_behind_its_mask() -> None:
    model = Net(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad():
        for name in ("0.weight", "2.weight"):
            model.row.get_parameter(name).flatten()[::2] = 0.0
    before = after(qg.capture(model.eval(), X), "keep-pruning-masks")
    graph, refused = rewritten("equalize-layers", before)
    assert lines(graph)[0] == "row.0:mul = mul('row.0.weight/equalized', 'row.0.weight/mask')"
    assert refused == {}
    assert torch.equal(graph(X), before(X))
    weights = [w for n in graph.nodes if (w := masked(n)) is not None]
    assert [int((w.tensor == 0).sum()) for w in weights] == [32, 32]


# ---------------------------------------------------------------- what is refused


class Wired(nn.Module):
    """A function of two linears and an input."""

    def __init__(self, wire: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.wire = nn.Linear(8, 8), nn.Linear(8, 8), wire

    def forward(self, x: Tensor) -> Any:
        return self.wire(self.a, self.b, x)


def _between(name: str) -> str:
    return f"'Wired:{name}', which reads it, does not keep the scale and place of a channel"


def _tied(a: nn.Linear, b: nn.Linear, x: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, a.weight, a.bias).relu(), a.weight)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "relu6": (lambda a, b, x: b(functional.relu6(a(x))), _between("clamp")),
    "gelu": (lambda a, b, x: b(functional.gelu(a(x))), _between("gelu")),
    "silu": (lambda a, b, x: b(functional.silu(a(x))), _between("silu")),
    "residual": (lambda a, b, x: b(a(x) + x), _between("residual_add")),
    "another reader": (lambda a, b, x: (b(y := a(x)), y), "'a:linear' has 2 readers"),
    "another reader of the relu": (lambda a, b, x: b(y := a(x).relu()) + y, "'Wired:relu' has 2 readers"),
    "moved channels": (lambda a, b, x: b(a(x).reshape(8, 4).t().reshape(4, 8)), _between("reshape")),
    "a pool over the channels": (lambda a, b, x: b(functional.avg_pool1d(a(x), 1)), _between("avg_pool1d")),
    "tied": (_tied, "the weight of 'Wired:linear' is shared"),
    "a shared bias": (lambda a, b, x: functional.linear(a(x), b.weight, a.bias), "the bias of 'a:linear' is shared"),
    "a computed weight": (lambda a, b, x: functional.linear(a(x), x.t() @ x),
                          "the weight of 'Wired:linear' is computed"),
    "another axis": (lambda a, b, x: functional.conv1d(a(x)[None], b.weight[:, :4, None]).sum(), _between("unsqueeze")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_stay_the_same_is_refused(name: str) -> None:
    wire, reason = REFUSED[name]
    torch.manual_seed(0)
    before = qg.canonicalize(qg.capture(Wired(wire).eval(), X))
    graph, refused = rewritten("equalize-layers", before)
    assert next(iter(refused.values())).endswith(reason)
    assert lines(graph) == lines(before)


def test_a_layer_that_sums_over_another_axis_is_refused() -> None:
    graph, refused = rewritten("equalize-layers", capture(nn.Conv1d(4, 6, 2), nn.Linear(8, 5), x=SEQUENCE))
    assert refused == {"row.0:conv1d": "'row.1:linear' sums over another axis than that of its channels"}
    assert not any("equalized" in line for line in lines(graph))


# ---------------------------------------------------------------- planted faults, which the contract sees


def forget_the_bias(patch: pytest.MonkeyPatch) -> None:
    def only_weights(layer: Any, old: Any, values: Tensor, *rest: Any) -> None:
        if values.ndim > 1:
            replace_weight(layer, old, values, *rest)

    patch.setattr(equalize_layers, "replace_weight", only_weights)


def believe_that_a_clamp_is_homogeneous(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(equalize_layers, "HOMOGENEOUS", (*equalize_layers.HOMOGENEOUS, "clamp"))


def mistake_the_axes_of_a_transposed_convolution(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Channels, "of", classmethod(lambda cls, layer, block=1: Channels(block=block)))


PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[nn.Module, ...]]] = {
    "no reciprocal on the bias": (forget_the_bias, (nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))),
    "a clamp": (believe_that_a_clamp_is_homogeneous, (nn.Conv2d(4, 6, 1), nn.ReLU6(), nn.Conv2d(6, 4, 1))),
    "the wrong axis": (mistake_the_axes_of_a_transposed_convolution,
                       (nn.ConvTranspose2d(4, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 1))),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_breaks_the_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, modules = PLANTED[name]
    before = after(capture(*modules, x=IMAGE), "fold-clamp")
    plant(monkeypatch)
    with pytest.raises(PassError, match="QG207: 'equalize-layers' declares its numerics"):
        rewritten("equalize-layers", before)


# ---------------------------------------------------------------- what it is worth

INT8, U8 = QuantSpec.parse("s8 symmetric per-tensor pair-safe"), QuantSpec.parse("u8 affine per-tensor")
PER_TENSOR = Recipe(override=(Override(select="*:linear", weight=INT8),))
CONVOLUTIONS = Target(
    name="per-tensor",
    description="layers with one scale for a whole weight",
    row=tuple(
        Row(id=f"{op}.int8", op=op, placement="int8", kernel="MAC", x=(U8,), weight=(INT8,), why="the only form")
        for op in ("conv2d", "linear")
    ),
)
NETS: dict[str, tuple[tuple[nn.Module, ...], Tensor, str | Target]] = {
    "mlp": ((nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), X, "ort-cpu"),
    "cnn": ((nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.ReLU(),
             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), IMAGE, CONVOLUTIONS),
}  # fmt: skip


def error(name: str, *passes: EqualizeLayers) -> float:
    """The distance of the fake-quantized model from the float model, over its norm: weights per tensor, no training."""
    modules, x, target = NETS[name]
    graph = qg.capture(Net(*modules, kept=True).eval(), x)
    plan = qg.plan(graph, target, PER_TENSOR, passes=passes)
    assert {p.placement for p in plan.placements if p.node.rpartition(":")[2] in ("linear", "conv2d")} == {"int8"}
    qat = qg.prepare(graph, plan, passes=passes)
    qg.calibrate(qat, [floats(*x.shape, seed=s) for s in (1, 2)], progress=False)
    with torch.no_grad():
        return float((qat(x) - graph(x)).norm() / graph(x).norm())


@pytest.mark.parametrize("name", NETS)
def test_per_tensor_weights_lose_much_less(name: str) -> None:
    before, now = error(name), error(name, EqualizeLayers())
    assert before > 0.2
    assert now < before / 20
