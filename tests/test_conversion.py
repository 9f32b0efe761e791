"""Conversion: the integers that are deployed are those that were trained, and the prepared model stays as it was."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import qatgraph as qg
from qatgraph.conversion import WIDEST, convert
from qatgraph.errors import LowerError
from qatgraph.ir.graph import Batch, Graph, arguments, bind
from qatgraph.ir.meta import record
from qatgraph.ir.names import attribute_path
from qatgraph.operators import DEQUANTIZE, QUANTIZE
from qatgraph.planning.plan import Quantizer
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.quantizers.fake_quantize import ActivationFakeQuantize, FakeQuantize
from qatgraph.quantizers.grids import STORAGE
from tests.models import WIDTH, ZOO, Case, floats

ORT, TOY = "ort-cpu", "toy-npu"  # the toy has s8 activations, and quantized results
TARGETS = {ORT: ORT, TOY: str(Path(__file__).parents[1] / "examples" / "targets" / "toy_npu.toml")}
TABLES = {"encoder": "token:embedding", "tied": "embedding:embedding"}  # small tables stay in float unless asked for


class Twice(nn.Module):
    """One linear called twice: two inputs, so two grids for one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.fc(x) * 5)
        return y


class Branches(nn.Module):
    """A dropout between a linear and its two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.dropout = nn.Linear(WIDTH, WIDTH, bias=False), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.fc(x))
        return y.relu() * y.tanh()


CASES = {
    **ZOO,
    **{n: Case(m, lambda seed: floats(4, WIDTH, seed=seed)) for n, m in (("twice", Twice), ("branches", Branches))},
}
ALL = [*((n, ORT) for n in CASES), *((n, TOY) for n in ("mlp", "encoder", "branches"))]
WITH_BIAS = [("mlp", ORT), ("gpt2", ORT), ("twice", ORT), ("encoder", TOY)]


@cache
def shared(name: str, target: str = ORT, *lines: Override) -> nn.Module:
    """A calibrated model; read it, do not change it."""
    graph = CASES[name].capture()
    table = [Override(select=TABLES[name], place="int8")] if name in TABLES and target == ORT else []
    qat = qg.prepare(graph, qg.plan(graph, TARGETS[target], Recipe(override=(*table, *lines))))
    qg.calibrate(qat, [CASES[name].inputs(seed) for seed in range(3)], progress=False)
    return qat.eval()


def trained(name: str, target: str = ORT, *lines: Override) -> nn.Module:
    """One of your own."""
    return copy.deepcopy(shared(name, target, *lines))


@cache
def converted(name: str, target: str = ORT) -> Graph:
    return convert(Graph.of(shared(name, target)))


def run(model: nn.Module, batch: Batch) -> Tensor:
    args, kwargs = bind(batch)
    with torch.no_grad():
        out = model(*args, **kwargs)
    assert isinstance(out, Tensor)
    return out


def constant(graph: Graph, node: object) -> Tensor:
    assert isinstance(node, fx.Node)
    tensor = graph.parameter(node)
    assert tensor is not None, f"{node} is not a constant"
    return tensor.detach()


@dataclass(frozen=True)
class Read:
    """A port of the plan, and the dequantize that stands there; ``integers`` are those of a weight."""

    quantizer: Quantizer
    node: str
    dtype: torch.dtype
    scale: Tensor
    zero: Tensor
    integers: Tensor | None


def input_of(node: fx.Node, index: int = 0) -> fx.Node:
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


def reads(graph: Graph) -> list[Read]:
    found, plan = [], graph.info.plan
    taken = {f.name for f in plan.nodes if f.kind == "dequantize"}  # the model takes these integers: no node is left
    for quantizer, port in ((q, p) for q in plan.quantizers for p in q.ports if p.node not in taken):
        node = graph.node(port.node)
        table = record(node).kind == "embedding"
        at = next(iter(node.users)) if table or port.role == "out" else dict(arguments(node))[port.role]
        at = next(iter(at.users)) if at.target is QUANTIZE else at
        assert at.target is DEQUANTIZE, port
        source = input_of(input_of(at)) if table else input_of(at)
        integers = constant(graph, source) if source.op == "get_attr" else None
        scale, zero = constant(graph, at.args[1]), constant(graph, at.args[2])
        found.append(Read(quantizer, port.node, input_of(at).meta["val"].dtype, scale, zero, integers))
    return found


def weights(graph: Graph) -> list[tuple[Read, Tensor, Tensor]]:
    """(read, integers, scale that broadcasts) of every weight."""
    found = [r for r in reads(graph) if not r.quantizer.derived_from]
    return [(r, i, r.scale.reshape([-1, *[1] * (i.ndim - 1)] if r.scale.ndim else [])) for r in found
            if (i := r.integers) is not None]  # fmt: skip


def module_of(qat: nn.Module, quantizer: Quantizer) -> nn.Module:
    graph = Graph.prepared(qat)
    owner = record(graph.node(next(p.node for p in quantizer.ports if str(p) == quantizer.name))).module
    return qat.get_submodule(attribute_path(owner, quantizer.name.removeprefix(owner).removeprefix(":")))


# ---------------------------------------------------------------- integers and scales


@pytest.mark.parametrize(("name", "target"), ALL)
def test_every_quantizer_became_integers_of_its_type_and_a_constant_scale(name: str, target: str) -> None:
    graph = converted(name, target)
    assert reads(graph)
    for read in reads(graph):
        spec = read.quantizer.spec
        assert read.dtype is read.zero.dtype is STORAGE[spec.dtype]
        assert read.scale.dtype is torch.float32
        assert bool((read.scale > 0).all())
        if read.integers is not None:
            assert read.integers.dtype is read.dtype
            assert int(read.integers.min()) >= spec.qmin
            assert not read.zero.any()
            assert spec.axis is None or read.scale.shape == read.integers.shape[:1]
    assert not [m for m in graph.module.modules() if isinstance(m, FakeQuantize)]


@pytest.mark.parametrize(("name", "target"), ALL)
def test_the_scale_deployed_is_the_scale_trained_bit_for_bit(name: str, target: str) -> None:
    qat, graph = shared(name, target), converted(name, target)
    for read in reads(graph):
        module = None if read.quantizer.derived_from else module_of(qat, read.quantizer)
        if isinstance(module, ActivationFakeQuantize):
            assert torch.equal(read.scale, module.scale)
            assert torch.equal(read.zero.float(), module.zero_point)
    assert weights(graph)
    for read, integers, scale in weights(graph):
        on_grid = module_of(qat, read.quantizer)(qat.get_parameter(read.quantizer.values[0]))
        assert torch.equal(integers * scale, on_grid)
        assert not torch.equal(integers * torch.nextafter(scale, torch.tensor(1.0)), on_grid)  # one bit is seen


@pytest.mark.parametrize(("name", "target"), WITH_BIAS)
def test_an_int32_bias_counts_in_steps_of_its_own_accumulator(name: str, target: str) -> None:
    qat, found = shared(name, target), reads(converted(name, target))
    biases = [r for r in found if r.quantizer.derived_from]
    assert biases
    for read in biases:
        x, weight = (next(r for r in found if r.quantizer.name == n) for n in read.quantizer.derived_from)
        assert torch.equal(read.scale, x.scale * weight.scale)
        owner = read.quantizer.name.rpartition(":")[0]
        steps = qat.get_parameter(f"{owner}.bias").detach().numpy() / read.scale.double().numpy()
        assert read.integers is not None
        assert np.array_equal(read.integers.numpy(), np.rint(steps))
        assert not np.array_equal(read.integers.numpy(), np.trunc(steps))  # another rounding is seen
        assert float((read.integers.double() - torch.from_numpy(steps)).abs().max()) <= 0.5


def on_bias_grid(name: str, target: str) -> nn.Module:
    """The trained model with its biases moved to the points of the grid that conversion puts them on."""
    qat = trained(name, target)
    for read in reads(converted(name, target)):
        if read.quantizer.derived_from and read.integers is not None:
            node = Graph.prepared(qat).node(read.quantizer.ports[0].node)
            bias = Graph.prepared(qat).parameter(dict(arguments(node))["bias"])
            assert bias is not None
            bias.data.copy_(read.integers.float() * read.scale)
    return qat


@pytest.mark.parametrize(("name", "target"), [case for case in ALL if case[0] != "twice"])
def test_it_computes_what_the_fake_quantized_model_computes_bit_for_bit(name: str, target: str) -> None:
    """Bit for bit, since the grids are equal and the arithmetic between them is the same operator on the same floats.
    Only an int32 bias is rounded at conversion and not in training; here it lies on its grid in both."""
    qat, graph = on_bias_grid(name, target), converted(name, target)
    for seed in range(5):
        assert torch.equal(run(qat, CASES[name].inputs(seed)), run(graph.module, CASES[name].inputs(seed)))


@pytest.mark.parametrize("name", ["mlp", "gpt2", "erf-gelu"])
def test_without_moving_the_biases_the_difference_is_seen_and_small(name: str) -> None:
    """Half a step of the accumulator, or one step of a later activation where that flips its rounding."""
    batch = CASES[name].inputs(0)
    have, want = run(converted(name).module, batch), run(shared(name), batch)
    assert not torch.equal(have, want)
    assert float((have - want).abs().max()) < 1e-3 * float(want.abs().max())


@pytest.mark.parametrize(("name", "target"), [("mlp", ORT), ("branches", TOY)])
def test_values_outside_the_calibrated_range_saturate_as_in_training(name: str, target: str) -> None:
    qat, graph, batch = on_bias_grid(name, target), converted(name, target), floats(4, WIDTH, seed=7) * 100
    assert torch.equal(run(qat, batch), run(graph.module, batch))
    first = graph.node(next(record(n).name for n in graph.nodes if n.target is QUANTIZE))
    integers = first.target(batch, *(constant(graph, n) for n in first.args[1:]))  # type: ignore[operator]
    assert {int(integers.min()), int(integers.max())} == ({-128, 127} if target == TOY else {0, 255})


# ---------------------------------------------------------------- the structure


def several_readers(graph: Graph) -> list[str]:
    """The dequantizes that more than one node reads: engines would run these readers in float."""
    return [record(n).name for n in graph.nodes if n.target is DEQUANTIZE and len(n.users) != 1]


def module_calls(graph: Graph) -> list[str]:
    return [str(n.target) for n in graph.module.graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize(("name", "target"), ALL)
def test_every_reader_has_a_dequantize_of_its_own(name: str, target: str) -> None:
    assert several_readers(converted(name, target)) == []


def test_a_dequantize_with_two_readers_is_seen() -> None:
    graph = convert(Graph.of(shared("encoder")))
    query, key = (graph.node(f"layer.0.attention.{n}:linear") for n in ("query", "key"))
    assert isinstance(query.args[0], fx.Node)
    key.update_arg(0, query.args[0])
    graph.module.graph.eliminate_dead_code()
    assert several_readers(graph) == [record(query.args[0]).name]


@pytest.mark.parametrize("name", ["mlp", "encoder", "branches"])
def test_dropout_and_quantizers_are_gone(name: str) -> None:
    before, after = Graph.of(shared(name)), convert(Graph.of(trained(name).train()))
    assert any(isinstance(before.module.get_submodule(path), nn.Dropout) for path in module_calls(before))
    assert module_calls(after) == []
    assert not [m for m in after.module.modules() if isinstance(m, nn.Dropout)]
    assert not after.module.training


@pytest.mark.parametrize(
    ("name", "table", "qat_table"), [("encoder", "token", "token.weight"), ("tied", "embedding", "head.weight")]
)
def test_a_table_is_looked_up_as_integers(name: str, table: str, qat_table: str) -> None:
    graph = converted(name)
    lookup = graph.node(f"{table}:embedding")
    assert constant(graph, lookup.args[0]).dtype is lookup.meta["val"].dtype is torch.int8
    assert [n.target for n in lookup.users] == [DEQUANTIZE]
    assert qat_table in shared(name).state_dict()
    assert qat_table not in graph.module.state_dict()


def test_a_tied_table_has_one_grid_for_the_lookup_and_the_head() -> None:
    (table, table_integers, table_scale), (head, head_integers, head_scale) = weights(converted("tied"))
    assert (table.node, head.node) == ("embedding:embedding", "head:linear")
    assert torch.equal(table_integers, head_integers)
    assert torch.equal(table_scale, head_scale)
    untied = [i for _, i, _ in weights(converted("encoder"))[1:3]]
    assert not torch.equal(*untied)


# ---------------------------------------------------------------- refusals


def refusal(qat: nn.Module) -> tuple[str, str]:
    with pytest.raises(LowerError) as caught:
        convert(Graph.of(qat))
    assert caught.value.why
    assert caught.value.todo
    return caught.value.code, caught.value.where


@pytest.mark.parametrize("off", [["up:linear.x", "down:linear.x", "down:linear.weight"], ["down:linear.weight"]])
def test_a_model_that_is_not_wholly_calibrated_is_refused(off: list[str]) -> None:
    qat = trained("mlp")
    for quantizer in Graph.of(qat).info.plan.quantizers:
        if quantizer.name in off:
            vars(module_of(qat, quantizer))["on"] = False
    assert refusal(qat) == ("QG501", off[0])


@pytest.mark.parametrize("value", [1e9, -1e9, float("nan"), float("inf")])
def test_a_bias_that_does_not_fit_into_int32_is_refused(value: float) -> None:
    qat, in_float = trained("erf-gelu"), trained("erf-gelu", ORT, Override(select="fc:linear", bias="row"))
    for model in (qat, in_float):
        model.get_parameter("fc.bias").data[3] = value
    assert refusal(qat) == ("QG502", "fc:linear.bias")
    convert(Graph.of(in_float))  # what the refusal says to do


def test_the_largest_sum_has_to_fit_together_with_the_bias() -> None:
    """The engine adds both in int32, and a sum that is too large would wrap without a word."""
    qat = trained("erf-gelu")
    x, weight, _ = reads(convert(Graph.of(qat)))
    assert weight.integers is not None
    room, bias = 2**31 - 1 - WIDEST * int(weight.integers[3].int().abs().sum()), qat.get_parameter("fc.bias")
    bias.data[3] = (room - 1000) * float(x.scale * weight.scale[3])
    convert(Graph.of(qat))
    bias.data[3] = (room + 1000) * float(x.scale * weight.scale[3])
    assert refusal(qat) == ("QG502", "fc:linear.bias")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(("name", "path"), [("mlp", "down.weight"), ("encoder", "token.weight")])
def test_a_weight_that_is_not_finite_is_refused(name: str, path: str, value: float) -> None:
    qat = trained(name)
    qat.get_parameter(path).data[0, 0] = value
    assert refusal(qat) == ("QG507", path)


# ---------------------------------------------------------------- the prepared model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["mlp", "encoder", "tied"])
def test_converting_leaves_the_prepared_model_as_it_was(name: str, training: bool) -> None:
    qat = trained(name).train(training)
    before, text = copy.deepcopy(qat.state_dict()), str(Graph.of(qat))
    convert(Graph.of(qat))
    after = qat.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert str(Graph.of(qat)) == text
    assert all(m.training is training for m in qat.modules())
    assert torch.equal(run(qat.eval(), CASES[name].inputs(1)), run(shared(name), CASES[name].inputs(1)))


def step(qat: nn.Module, batch: Batch) -> None:
    args, kwargs = bind(batch)
    optimizer = torch.optim.SGD(qat.train().parameters(), lr=0.1)
    torch.manual_seed(0)  # dropout
    qat(*args, **kwargs).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["mlp", "encoder", "tied"])
def test_it_trains_on_after_converting_and_what_was_converted_stays(name: str) -> None:
    qat, twin, start = trained(name), trained(name), shared(name)
    buffers = dict(convert(Graph.of(qat)).module.named_buffers())
    constants = {n: b.clone() for n, b in buffers.items() if "/" in n}
    for model in (qat, twin):
        step(model, CASES[name].inputs(0))
    parameters = list(zip(qat.parameters(), twin.parameters(), start.parameters(), strict=True))
    assert all(torch.equal(have, want) for have, want, _ in parameters)
    assert any(not torch.equal(have, before) for have, _, before in parameters)
    qg.calibrate(qat, [CASES[name].inputs(9)], progress=False)
    assert all(torch.equal(buffers[n], value) for n, value in constants.items())
    again = dict(convert(Graph.of(qat)).module.named_buffers())
    assert {n.rpartition("/")[2] for n in constants if not torch.equal(again[n], constants[n])} >= {"int8", "scale"}
