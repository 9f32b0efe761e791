"""Integers in and out: the kernels of floats in and out, no conversion at the borders, and what verify finds there."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional

import qatgraph as qg
from qatgraph.backends import onnx_borders, ort_cpu
from qatgraph.errors import PlanError
from qatgraph.ir.graph import Graph
from qatgraph.kernels import owner
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.proof import prove
from qatgraph.quantizers.fake_quantize import FixedFakeQuantize
from qatgraph.report.report import Report
from tests.lowered import Lowered, initializer, lower, node, read, write
from tests.models import BATCH, Case, floats, pixels
from tests.zoo.road import NATIVE

INTEGERS = Recipe(integer_outputs=("*",))
SHAPE = (4, 3, 12, 12)


class Classifier(nn.Module):
    """Convolutions, a residual, a max pool, a gate, a global pool and a linear: [batch, 3, 12, 12] -> [batch, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same, self.gate = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = functional.relu(self.stem(image))
        x = functional.max_pool2d(functional.relu(x + self.same(x)), 2)
        x = x * torch.sigmoid(self.gate(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Raw(Classifier):
    """The same for pixels as they are."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward((image.float() - 127) / 128)


class Views(Raw):
    """Pixels with channels behind, which a layer norm reads as well; two outputs of integers and one of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(12), nn.Linear(5, 4)

    def forward(self, image: Tensor) -> Any:
        x = (image.permute(0, 3, 1, 2).float() - 127) / 128
        logits = Classifier.forward(self, x)
        return {"logits": logits, "more": self.out(logits), "norm": self.norm(x).mean((1, 2))}


CASES = {
    "floats": (Case(Classifier, lambda s: (pixels(*SHAPE, seed=s).float() - 127) / 128, {"image": BATCH}), Recipe()),
    "pixels": (Case(Raw, lambda s: pixels(*SHAPE, seed=s), {"image": BATCH}), Recipe()),
    "integers": (Case(Raw, lambda s: pixels(*SHAPE, seed=s), {"image": BATCH}), INTEGERS),
    "views": (
        Case(Views, lambda s: pixels(4, 12, 12, 3, seed=s), {"image": BATCH}),
        Recipe(integer_outputs=("logits", "more")),
    ),
}


@cache
def made(name: str) -> Lowered:
    return lower(*CASES[name])


def verified(found: Lowered, name: str) -> Report:
    return prove(NATIVE, found.qat, found.file, [CASES[name][0].inputs(7)], found.model)


def kernels(found: Lowered) -> list[tuple[str, str]]:
    """The int8 kernels by node, without the name of the class."""
    nodes = [n for n in ort_cpu.audit(found.file) if n.int8 and not n.moves]
    root = Graph.of(found.qat).info.root
    return sorted((owner(n.name).removeprefix(root), n.kernel) for n in nodes)


# ---------------------------------------------------------------- the whole road


@pytest.mark.parametrize("name", CASES)
def test_every_check_passes(name: str) -> None:
    report = verified(made(name), name)
    assert report.failures == []
    assert report.fidelity["engine_to_fake_quantized"]["cosine_min"] > 0.999
    assert (report.parity["max_steps"], report.parity["out_max_steps"]) == (0, 0)
    assert ("integers" in report.files) == (name != "floats")


def test_the_kernels_are_those_between_floats() -> None:
    assert kernels(made("integers")) == kernels(made("pixels")) == kernels(made("floats"))
    assert len(kernels(made("floats"))) == 8


def conversions(file: bytes) -> list[str]:
    return [
        n.op_type for n in ort_cpu.optimized_graph(file).node if n.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]


def test_no_conversion_is_left_but_in_front_of_what_runs_in_float() -> None:
    counts = {name: conversions(made(name).file) for name in CASES}
    assert counts == {"floats": ["QuantizeLinear"], "pixels": [], "integers": [], "views": ["DequantizeLinear"]}


def types(file: bytes) -> dict[str, str]:
    inputs, outputs = ort_cpu.interface(file)
    return {**inputs, **outputs}


def test_the_file_takes_and_gives_integers_where_asked() -> None:
    assert types(made("floats").file) == {"image": "float32", "output": "float32"}
    assert types(made("integers").file) == {"image": "uint8", "output": "uint8"}
    assert types(made("views").file) == {"image": "uint8", "logits": "uint8", "more": "uint8", "norm": "float32"}


def test_whoever_reads_the_integers_finds_their_grid_in_the_file() -> None:
    found, batch = made("integers"), CASES["integers"][0].inputs(9)
    (q,) = found.run(batch)
    props = {p.key: p.value for p in found.proto.metadata_props}
    stated = json.loads(props["qatgraph.output.output"])
    real = (q.astype(np.int32) - stated["zero_point"]) * np.float32(stated["scale"])
    (want,) = found.fake_quantized(batch)
    assert q.dtype == np.uint8
    assert np.abs(real - want).max() <= 1.5 * stated["scale"]
    (same,) = made("pixels").run(batch)  # in float, by another kernel of the same integers
    low, high = ((end - stated["zero_point"]) * stated["scale"] for end in (0, 255))
    assert np.abs(real - same.clip(low, high)).max() <= 0.501 * stated["scale"]


def test_the_grid_of_pixels_is_the_models_whatever_calibration_sees() -> None:
    (module,) = {m for m in made("integers").qat.modules() if isinstance(m, FixedFakeQuantize)}
    assert (float(module.scale), float(module.zero_point)) == (1 / 128, 127)
    x = (torch.arange(256.0) - 127) / 128
    assert torch.equal(module(x), x)
    assert not torch.equal(module(x + 0.003), x + 0.003)
    graph = CASES["integers"][0].capture()
    qat = qg.prepare(graph, qg.plan(graph)).eval()
    dark = torch.zeros(SHAPE, dtype=torch.uint8)
    assert not [f for f in qg.calibrate(qat, [dark], progress=False) if "stem" in f and ".x'" in f]
    assert [float(m.scale) for m in qat.modules() if isinstance(m, FixedFakeQuantize)] == [1 / 128]


def test_it_trains_and_its_state_loads() -> None:
    graph = CASES["integers"][0].capture()
    plan = qg.plan(graph, recipe=INTEGERS)
    first, second = (qg.prepare(graph, plan) for _ in range(2))
    batch = CASES["integers"][0].inputs(1)
    qg.calibrate(first, [batch], progress=False)
    first(batch).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in first.parameters())
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.eval()(batch), first.eval()(batch))


# ---------------------------------------------------------------- planted faults


def scaled(proto: Any) -> None:
    name = node(proto, "stem:dequantize/DequantizeLinear").input[1]
    write(proto, name, read(proto, name) * np.float32(1.01))


def moved(proto: Any) -> None:
    name = node(proto, "stem:dequantize/DequantizeLinear").input[2]
    write(proto, name, read(proto, name) + np.uint8(1))


def stated_otherwise(proto: Any) -> None:
    (prop,) = (p for p in proto.metadata_props if p.key == "qatgraph.output.output")
    prop.value = json.dumps({**json.loads(prop.value), "zero_point": 3})


def not_stated(proto: Any) -> None:
    (prop,) = (p for p in proto.metadata_props if p.key == "qatgraph.output.output")
    proto.metadata_props.remove(prop)


def quantized_elsewhere(proto: Any) -> None:
    name = node(proto, "head:quantize/QuantizeLinear").input[1]
    write(proto, name, read(proto, name) * np.float32(1.5))


def dequantized(proto: Any) -> None:
    """The file gives floats, as one that a dequantize was left in."""
    quantize, (out,) = node(proto, "head:quantize/QuantizeLinear"), proto.graph.output
    quantize.output[0] = "q"
    new = helper.make_node("DequantizeLinear", ["q", *quantize.input[1:]], [out.name], "head:left/DequantizeLinear")
    proto.graph.node.append(new)
    out.type.tensor_type.elem_type = TensorProto.FLOAT


def converted_out(proto: Any) -> None:
    """Integers are read back and written again on a grid of their own in front of the output."""
    quantize, (out,) = node(proto, "head:quantize/QuantizeLinear"), proto.graph.output
    quantize.output[0] = "q"
    write_new(proto, "head/other", read(proto, quantize.input[1]) * np.float32(2))
    real = helper.make_node("DequantizeLinear", ["q", *quantize.input[1:]], ["real"], "left/DequantizeLinear")
    again = helper.make_node(
        "QuantizeLinear", ["real", "head/other", quantize.input[2]], [out.name], "left/QuantizeLinear"
    )
    proto.graph.node.extend([real, again])


def converted_in(proto: Any) -> None:
    """The same behind the input."""
    dequantize = node(proto, "stem:dequantize/DequantizeLinear")
    write_new(proto, "stem/other", read(proto, dequantize.input[1]) * np.float32(2))
    real = helper.make_node("DequantizeLinear", list(dequantize.input), ["real"], "left/DequantizeLinear")
    again = helper.make_node(
        "QuantizeLinear", ["real", "stem/other", dequantize.input[2]], ["q"], "left/QuantizeLinear"
    )
    dequantize.input[0] = "q"
    nodes = [real, again, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def write_new(proto: Any, name: str, array: Any) -> None:
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))


FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "the scale of the pixels": (scaled, "region 'stem:conv2d'"),
    "the zero point of the pixels": (moved, "region 'stem:conv2d'"),
    "another grid is stated": (stated_otherwise, "the file states scale"),
    "no grid is stated": (not_stated, "the file states no grid for the output 'output'"),
    "the grid of the output": (quantized_elsewhere, "region 'head:linear'"),
    "floats come out": (dequantized, "the file's 'output' is float32, the model's is uint8"),
    "a conversion in front of the output": (converted_out, "integers are converted at a border: left/QuantizeLinear"),
    "a conversion behind the input": (converted_in, "integers are converted at a border: left/QuantizeLinear"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    plant, words = FAULTS[name]
    proto = made("integers").proto
    plant(proto)
    assert [f for f in verified(made("integers").changed(proto), "integers").failures if words in f]


# ---------------------------------------------------------------- what cannot be, and what is asked badly


def refusal(model: nn.Module, example: Tensor, recipe: Recipe) -> PlanError:
    with pytest.raises(PlanError) as caught:
        qg.plan(qg.capture(model.eval(), example), recipe=recipe)
    assert caught.value.todo
    return caught.value


def test_an_output_that_no_kernel_writes_as_integers_is_refused_with_the_rows() -> None:
    error = refusal(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), floats(4, 8), INTEGERS)
    assert (error.code, error.where) == ("QG312", "recipe int8 (integer_outputs)")
    assert "'1:layer_norm': its variance squares the outliers" in error.why
    error = refusal(nn.Linear(8, 8), floats(2, 4, 8), INTEGERS)
    assert "linear.matmul-8-bit: the row is for a node without a bias" in error.why
    assert "linear.gemm-8-bit: the row is for rank 2, the input is [2, 4, 8]" in error.why
    error = refusal(nn.Sequential(nn.Linear(8, 8), nn.Flatten()), floats(2, 4, 8), INTEGERS)
    assert "linear.matmul-8-bit" in error.why  # it is the linear that writes none


def test_a_pin_and_integers_out_contradict_each_other() -> None:
    line = Override(select="*linear", place="float", why="it is small")
    error = refusal(nn.Linear(8, 8), floats(4, 8), Recipe(integer_outputs=("*",), override=(line,)))
    assert (error.code, "it is small" in error.why) == ("QG312", True)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        return {"a": y, "b": y, "top": y.argmax(-1)}


def test_one_value_is_not_integers_and_floats_at_once() -> None:
    error = refusal(Twice(), floats(4, 8), Recipe(integer_outputs=("a",)))
    assert (error.code, "'b' in float" in str(error)) == ("QG312", True)


@pytest.mark.parametrize("name", ["logit", "top", "x"])
def test_an_output_that_is_not_there_or_not_float_is_an_error(name: str) -> None:
    assert refusal(Twice(), floats(4, 8), Recipe(integer_outputs=(name,))).code == "QG301"


def test_a_value_that_operations_read_as_floats_too_stays_float_and_says_so() -> None:
    class Read(Twice):
        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            return {"y": y, "z": y.tanh()}

    error = refusal(Read(), floats(4, 8), Recipe(integer_outputs=("y",)))
    assert (error.code, "is not read as int8 alone" in error.why) == ("QG312", True)


def test_fixed_is_no_grid_for_a_weight(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[[override]]\nselect = "fc:linear"\nweight = "s8 symmetric per-tensor fixed"\n', encoding="utf-8")
    with pytest.raises(PlanError, match=r"QG303[\s\S]*fixed is the grid of an integer input"):
        qg.plan(qg.capture(Twice().eval(), floats(4, 8)), recipe=str(path))


def test_two_grids_that_are_fixed_are_not_shared() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            y: Tensor = self.left(a / 255) + self.right(b.float() - 128)
            return y

    class Share(qg.PlanningPass):
        name = "share-inputs"

        def state(self, graph: Graph, context: Any) -> Any:
            from qatgraph.planning.constraints import Author, Constraint, Port

            found = [Port(f.name, "out") for f in context.facts if f.kind == "dequantize"]
            yield Constraint("share", tuple(found), Author("pass", self.name), "both are images")

    graph = qg.capture(Pair().eval(), (pixels(2, 3, 4, 4), pixels(2, 3, 4, 4, seed=1)))
    plan = qg.plan(graph, passes=[Share()])
    fixed = [q for q in plan.quantizers if q.spec.scale == "fixed"]
    assert len(fixed) == 2
    assert any(a.choice == "one grid" for d in plan.decisions for a in d.lost)


def test_the_finder_of_conversions_sees_through_what_moves_integers() -> None:
    proto = made("integers").proto
    assert onnx_borders.conversions(proto.graph) == ["head:quantize/QuantizeLinear in front of the output 'output'"]
    assert initializer(proto, "stem.weight/int8") is not None
