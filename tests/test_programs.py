"""Ways into capture beside a module: exported programs, saved ones, fx graphs; blocks and writes taken apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional
from torch.utils import _pytree as pytree

import qatgraph as qg
from qatgraph.backends import ort_cpu
from qatgraph.conversion import convert
from qatgraph.errors import CaptureError
from qatgraph.ir.graph import Graph, bind
from qatgraph.ir.meta import record
from qatgraph.ir.properties import held
from tests.models import ZOO, captured, floats, padded
from tests.rewritten import Function, X, distance, kinds, lines, of


def exported(name: str, dynamic: Any = None) -> ExportedProgram:
    args, kwargs = bind(ZOO[name].inputs(0))
    return torch.export.export(ZOO[name].model(), args, kwargs, dynamic_shapes=dynamic)


def saved(name: str, folder: Path) -> ExportedProgram:
    torch.export.save(exported(name), folder / f"{name}.pt2")
    return torch.export.load(folder / f"{name}.pt2")


def operations(graph: Graph) -> list[str]:
    return [record(n).name for n in graph.nodes if record(n).kind != "sym_size"]


# ---------------------------------------------------------------- exported programs


@pytest.mark.parametrize("name", ZOO)
def test_a_program_is_the_model_that_was_exported(name: str, tmp_path: Path) -> None:
    """With its names and parameters, also after a round trip through a file."""
    module = qg.capture(ZOO[name].model(), ZOO[name].inputs(0))
    for program in (exported(name), saved(name, tmp_path)):
        graph = qg.capture(program)
        assert operations(graph) == operations(module)
        assert str(qg.canonicalize(graph)).splitlines()[1:] == str(qg.canonicalize(module)).splitlines()[1:]
        assert graph.info.inputs == module.info.inputs
        assert graph.weights_hash() == module.weights_hash()
        assert torch.equal(graph.run(ZOO[name].inputs(1)), module.run(ZOO[name].inputs(1)))


def test_a_program_is_not_touched() -> None:
    program = exported("mlp")
    before, weights = str(program.graph), {k: v.clone() for k, v in program.state_dict.items()}
    graph = qg.capture(program)
    with torch.no_grad():
        for parameter in graph.module.parameters():
            parameter.zero_()
    assert str(program.graph) == before
    assert all(torch.equal(program.state_dict[k], v) for k, v in weights.items())


def test_moving_sizes_stay_with_their_bounds(tmp_path: Path) -> None:
    axes = {0: Dim("batch"), 1: Dim("length", max=64)}
    program = exported("encoder", {"input_ids": axes, "attention_mask": axes})
    torch.export.save(program, tmp_path / "encoder.pt2")
    for one in (program, torch.export.load(tmp_path / "encoder.pt2")):
        graph = qg.capture(one)
        assert {(d.leaf, d.axis, d.name) for d in graph.info.dims} == {
            (0, 0, "input_ids_axis0"), (0, 1, "input_ids_axis1"), (1, 0, "input_ids_axis0"), (1, 1, "input_ids_axis1"),
        }  # fmt: skip
        assert [d.high for d in graph.info.dims if d.axis == 1] == [64, 64]
        assert torch.equal(graph.run(padded(3, 9)), captured("encoder").run(padded(3, 9)))
        with pytest.raises(CaptureError, match="'input_ids_axis1' is 65, at most 64 was captured"):
            graph.check_batch(padded(2, 65), "batch 7")


def test_ties_of_a_program_stay_ties(tmp_path: Path) -> None:
    graph = qg.capture(saved("tied", tmp_path))
    assert len([p for p in graph.module.parameters() if p.ndim == 2]) == 1


WAYS: dict[str, Callable[[Path], Graph]] = {
    "a program": lambda folder: qg.capture(exported("mlp")),
    "a saved program": lambda folder: qg.capture(saved("mlp", folder)),
    "an fx graph": lambda folder: qg.capture(fx.symbolic_trace(ZOO["mlp"].model()), ZOO["mlp"].inputs(0)),
    "a decomposed program": lambda folder: qg.capture(exported("mlp").run_decompositions()),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_whole_road(way: str, tmp_path: Path) -> None:
    graph = WAYS[way](tmp_path)
    plan = qg.plan(graph)
    assert [p.node for p in plan.predictions if p.int8] == ["up:linear", "down:linear"]
    qat = qg.prepare(graph, plan).eval()
    qg.calibrate(qat, [ZOO["mlp"].inputs(s) for s in (1, 2)], progress=False)
    file = ort_cpu.lower(convert(Graph.of(qat)), plan)
    kernels = [(n.name.partition("/")[0], n.kernel) for n in ort_cpu.audit(file) if n.int8]
    assert [k for k in kernels if k[1] == "QGemm"] == [("up:linear", "QGemm"), ("down:linear", "QGemm")]
    x = ZOO["mlp"].inputs(3)
    (have,) = ort_cpu.run(ort_cpu.session(file), {"x": x.numpy()})
    want = ZOO["mlp"].model()(x).detach()
    assert float((torch.from_numpy(have) - want).abs().max() / want.abs().max()) < 0.05


# ---------------------------------------------------------------- fx graphs


def test_an_fx_graph_is_the_module_that_was_traced() -> None:
    traced = fx.symbolic_trace(ZOO["mlp"].model())
    graph = qg.capture(traced, ZOO["mlp"].inputs(0), ZOO["mlp"].dynamic)
    assert operations(graph) == operations(captured("mlp"))
    assert torch.equal(graph.run(ZOO["mlp"].inputs(1)), captured("mlp").run(ZOO["mlp"].inputs(1)))


def test_a_graph_of_bare_operations_is_named_after_its_root() -> None:
    traced = fx.symbolic_trace(Function(lambda x: torch.relu(x) + x), concrete_args={"y": None})
    graph = qg.capture(traced, X)
    assert kinds(graph) == ["relu", "add"]
    assert len(set(operations(graph))) == 2


# ---------------------------------------------------------------- refusals


def without_inputs() -> ExportedProgram:
    program = exported("mlp")
    program.example_inputs = None
    return program


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * 2 + y


def exported_with_one_tensor_twice() -> ExportedProgram:
    return torch.export.export(Sum(), (X, X))


def test_a_program_with_two_equal_tensors_is_taken() -> None:
    graph = qg.capture(torch.export.export(Sum(), (X, X.clone())))
    assert torch.equal(graph(X, X + 1), X * 2 + X + 1)


REFUSED: dict[str, tuple[Callable[[], Graph], str]] = {
    "a program with one tensor twice": (
        lambda: qg.capture(exported_with_one_tensor_twice()),
        "the program was exported with one tensor at several inputs",
    ),
    "a module without inputs": (lambda: qg.capture(ZOO["mlp"].model()), "an example batch is missing"),
    "a program with inputs": (
        lambda: qg.capture(exported("mlp"), ZOO["mlp"].inputs(0)), "an exported program brings its own inputs"
    ),
    "a program with axes": (
        lambda: qg.capture(exported("mlp"), dynamic_shapes={"x": {0: "n"}}), "an exported program brings its own inputs"
    ),
    "a program that lost its inputs": (lambda: qg.capture(without_inputs()), "the program has no example inputs"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_qg106(name: str) -> None:
    call, sentence = REFUSED[name]
    with pytest.raises(CaptureError) as caught:
        call()
    assert (caught.value.code, caught.value.what) == ("QG106", sentence)
    assert caught.value.todo


def test_qg103_a_program_with_nan() -> None:
    program = exported("mlp")
    with torch.no_grad():
        program.state_dict["up.weight"][0, 0] = float("nan")
    with pytest.raises(CaptureError, match="QG103") as caught:
        qg.capture(program)
    assert caught.value.where == "'up.weight' of Mlp"


# ---------------------------------------------------------------- blocks


class Frozen(nn.Module):
    """Blocks without gradients, in automatic precision, and one in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.a(x)
            with torch.autocast("cpu", enabled=False):
                y = y.relu()
        z: Tensor = self.b(y)
        return z


def test_blocks_are_put_in_line() -> None:
    model = Frozen()
    graph = qg.capture(model, X)
    assert operations(graph) == ["a:linear", "Frozen:relu", "b:linear"]
    assert torch.equal(graph(X), model(X))
    assert [f for f in qg.plan(graph).nodes if f.kind == "linear"]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.cond(x.sum() > 0, torch.relu, torch.tanh, (x,))
        return found


def test_qg102_both_branches_cannot_be_put_in_line() -> None:
    with pytest.raises(CaptureError) as caught:
        qg.capture(Branching(), X)
    error = caught.value
    assert error.code == "QG102"
    assert error.where.startswith("test_programs.py:")
    assert "cond" in error.why
    assert error.todo


# ---------------------------------------------------------------- writes into views and buffers


def half(x: Tensor) -> Tensor:
    y = x * 1.5
    y[:, :2].relu_()
    return y


def row(x: Tensor) -> Tensor:
    y = x * 1.5
    y[0] = 1.0
    return y


def behind_a_view(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 1.5
    flat = y.view(-1)
    y.add_(1.0)
    return y, flat


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "into a slice": half, "into a row": row, "under a view": behind_a_view, "into a copy": lambda x: x.clone().relu_()
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_what_the_model_computes(name: str) -> None:
    x = floats(2, 4, seed=5)
    graph = of(WRITES[name])
    for one in (graph, qg.canonicalize(graph)):
        given = x.clone()
        pairs = zip(pytree.tree_leaves(one(given)), pytree.tree_leaves(WRITES[name](x.clone())), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(given, x), "the input is not written"
    assert "functional" in held(qg.canonicalize(graph))


class Statistics(nn.Module):
    """A running mean, and a cache of which a part is written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(4, 4))
        self.mean: Tensor
        self.cache: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.mean(0))
        self.cache[:2] = x
        return x + self.mean + self.cache.sum(0)


def test_buffers_keep_their_new_values() -> None:
    model, graph = Statistics(), qg.capture(Statistics(), X)
    for one in (graph, qg.canonicalize(graph)):
        for tensor in (*model.buffers(), *one.module.buffers()):
            tensor.zero_()
        for seed in range(3):
            x = floats(2, 4, seed=seed)
            assert torch.allclose(one(x), model(x))
        assert torch.allclose(one.module.get_buffer("mean"), model.mean)
        assert torch.allclose(one.module.get_buffer("cache"), model.cache)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(x) * 1.5
        y[:, :2].relu_()
        return y


def test_dropout_that_is_lost_with_a_write_is_noted() -> None:
    (note,) = qg.capture(Dropped(), X).info.notes
    assert "p=0.25" in note
    assert "relu_" in note
    assert of(lambda x: torch.relu_(x * 2)).info.notes == (), "a write that stands alone costs nothing"


class Eager(nn.Module):
    """Attention whose dropout is an argument, as in the eager form of BERT."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        rate = self.dropout.p if self.training else 0.0
        return functional.dropout((x @ x.t()).softmax(-1), rate, self.training) @ x


@pytest.mark.parametrize(("rate", "count"), [(0.3, 1), (0.0, 0)])
def test_dropout_that_is_an_argument_is_noted(rate: float, count: int) -> None:
    notes = qg.capture(Eager(rate), X).info.notes
    assert [("p=0.3" in note) for note in notes] == [True] * count


def test_names_are_of_the_users_modules_after_a_write_was_taken_apart() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            y[:, :2] += 1
            return y

    graph = qg.capture(Sliced(), X)
    assert operations(graph)[0] == "fc:linear"
    assert any(line.startswith("Sliced:slice_scatter") for line in lines(graph))
    assert distance(graph, qg.canonicalize(graph), X) == 0
