"""The lowered file: its form, its names, its constants, its bytes; and that it computes what the model computes."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

import qatgraph as qg
from qatgraph.backends import ort_cpu
from qatgraph.backends.lint import lint
from qatgraph.backends.qdq_onnx import SCALED, write_atomically
from qatgraph.errors import LowerError
from qatgraph.ir.graph import Graph
from qatgraph.kernels import owner
from tests.lowered import LOWERED, Lowered, case_of, initializer, lower, lowered, node, read, write
from tests.models import padded

ROOT = Path(__file__).parents[1]
STEP = 1 / 128  # a rounding that falls on the other side moves a result by a step of its grid

# what must hold for every file: each check yields what is wrong with it


def invalid(found: Lowered) -> Iterator[str]:
    try:
        onnx.checker.check_model(found.proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        yield str(error)
    if [(o.domain, o.version) for o in found.proto.opset_import] != [("", 23)]:
        yield "other opsets"


def foreign_names(found: Lowered) -> Iterator[str]:
    """Nodes without a name of their own that starts with a path in the user's model or the name of its class."""
    paths = {p for p, _ in found.model.named_modules() if p} | {type(found.model).__name__}
    count = Counter(n.name for n in found.proto.graph.node)
    yield from (n for n, times in count.items() if times > 1 or owner(n).partition(":")[0] not in paths)


def foreign_kernels(found: Lowered) -> Iterator[str]:
    """int8 kernels under other names than the planned nodes', and planned ones without a kernel."""
    have = Counter(owner(k.name) for k in ort_cpu.audit(found.file) if k.int8 and not k.moves)
    want = Counter(p.node for p in found.plan.predictions if p.int8 and p.kernel and p.requant != "moved")
    yield from {n for n in have | want if have[n] != want[n]}


def foreign_border(found: Lowered) -> Iterator[str]:
    """Inputs, outputs and dynamic dimensions that are not named as the user named them."""
    info, graph = Graph.of(found.qat).info, found.proto.graph
    dims = {(info.inputs[d.leaf], d.axis): d.name for d in info.dims}
    if [v.name for v in graph.input] != list(info.inputs) or [v.name for v in graph.output] != list(info.outputs):
        yield "names of inputs or outputs"
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param != dims.get((value.name, axis), ""):
                yield f"'{dim.dim_param}' on axis {axis} of {value.name}"
    for value in graph.output:
        names = {d.dim_param for d in value.type.tensor_type.shape.dim} - {""}
        yield from (f"'{n}' of {value.name}" for n in names - set(dims.values()))


def shared_constants(found: Lowered) -> Iterator[str]:
    """Constants of a quantize or dequantize that another node reads, too."""
    constants = {i.name for i in found.proto.graph.initializer}
    readers = Counter(v for n in found.proto.graph.node for v in n.input if v in constants)
    for one in (n for n in found.proto.graph.node if n.op_type in SCALED):
        if len(one.input) != 3 or not constants.issuperset(one.input[1:]):
            yield one.name
        yield from (v for v in one.input if readers[v] > 1)


def float_weights(found: Lowered) -> Iterator[str]:
    """Planned weights and tables that are not int8, and float copies that no float node of the plan reads."""
    int8 = set(found.plan.int8_nodes())
    weights = [(f.name in int8, p.path) for f in found.plan.nodes for p in f.parameters if p.role == "weight"]
    constants = {i.name: i.data_type for i in found.proto.graph.initializer}
    for path in (path for quantized, path in weights if quantized):
        if {t for n, t in constants.items() if n.startswith(f"{path}/int8")} != {TensorProto.INT8}:
            yield f"{path} is not int8"
        if path in constants and (False, path) not in weights:
            yield f"{path} is there in float, too"


def other_forms(found: Lowered) -> Iterator[str]:
    """Operations that are not written as their rows say."""
    forms = {"residual_add": ("Sum", "Add"), "relu": ("Max", "Relu"), "embedding": ("Gather", "DequantizeLinear")}
    names = {n.name for n in found.proto.graph.node}
    inside = {p.node for p in found.plan.predictions if p.int8 and not p.kernel}
    adds = {p.node for p in found.plan.predictions if p.int8 and p.kernel == "QLinearAdd"}
    for fact in (f for f in found.plan.nodes if f.name not in inside | adds):
        wanted, banned = forms.get(fact.kind, ("", ""))
        if wanted and (f"{fact.name}/{wanted}" not in names or f"{fact.name}/{banned}" in names):
            yield fact.name
        if fact.kind == "attention" and not packed(found.proto, fact.name):
            yield fact.name


def packed(proto: Any, name: str) -> bool:
    (attention,) = (n for n in proto.graph.node if owner(n.name) == name and n.op_type == "Attention")
    heads = any(a.name == "q_num_heads" for a in attention.attribute)
    assert heads != any(n.op_type == "Transpose" for n in proto.graph.node)
    return heads


def silent_floats(found: Lowered) -> Iterator[str]:
    """Nodes between quantize and dequantize that the engine nevertheless runs in float."""
    yield from (f.node for f in lint(found.proto).findings if f.severity == "slow")


def loose_bytes(found: Lowered) -> Iterator[str]:
    """What does not belong into the file: paths of this machine, traces, remarks; and what has to be there."""
    places = [
        str(ROOT),
        sys.prefix,
        str(Path.home()),
        str(Path(torch.__file__).parent),
        ".py",
        "Traceback",
        "site-packages",
    ]
    yield from (p for p in places if p.encode() in found.file)
    proto = found.proto
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer]
    parts = [proto.graph, *proto.graph.node, *values]
    yield from (f"remarks at '{p.name}'" for p in parts if p.doc_string or p.metadata_props)
    props = {p.key: p.value for p in proto.metadata_props}
    if props != {"qatgraph.plan": found.plan.hash(), "qatgraph.target": "ort-cpu"} or proto.doc_string:
        yield "metadata"
    if (proto.producer_name, proto.producer_version) != ("qatgraph", qg.__version__):
        yield "producer"


Check = Callable[[Lowered], Iterator[str]]
CHECKS: tuple[Check, ...] = (
    invalid, foreign_names, foreign_kernels, silent_floats, foreign_border, shared_constants, float_weights,
    other_forms, loose_bytes
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", LOWERED)
def test_every_file_passes_the_check(name: str, check: Check) -> None:
    assert list(check(lowered(name))) == []


def rename(old: str, new: str) -> Callable[[Any], Any]:
    return lambda p: setattr(node(p, old), "name", new)


def share(role: int) -> Callable[[Any], Any]:
    """Let two dequantizes of one kind read one constant."""

    def plant(proto: Any) -> None:
        one, two = (node(proto, f"layer.0.attention.{n}:dequantize#2/DequantizeLinear") for n in ("query", "key"))
        two.input[role] = one.input[role]

    return plant


def to_float(proto: Any) -> None:
    name = "token.weight/int8"
    write(proto, name, read(proto, name).astype(np.float32))


def float_reader(proto: Any) -> None:
    """A float operation reads what was quantized for the linear."""
    proto.graph.node.append(onnx.helper.make_node("Neg", [node(proto, QUERY).input[0]], ["negated"], "Encoder:neg/Neg"))
    proto.graph.output.append(onnx.ValueInfoProto(name="negated"))


QUERY = "layer.0.attention.query:linear/MatMul"
PLANTED: list[tuple[Check, Callable[[Any], Any]]] = [
    (invalid, lambda p: setattr(node(p, QUERY), "op_type", "Nonsense")),
    (invalid, lambda p: setattr(p.opset_import[0], "version", 22)),
    (foreign_names, rename(QUERY, "node_MatMul_7")),
    (foreign_names, rename(QUERY, "layer.0.attention.key:linear/MatMul")),
    (foreign_kernels, rename(QUERY, "layer.0.attention:linear/MatMul")),
    (foreign_border, lambda p: setattr(p.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "s43")),
    (foreign_border, lambda p: setattr(p.graph.output[0].type.tensor_type.shape.dim[1], "dim_param", "s43")),
    (foreign_border, lambda p: setattr(p.graph.output[0], "name", "div_1")),
    (shared_constants, share(1)),
    (shared_constants, share(2)),
    (float_weights, to_float),
    (float_weights, lambda p: p.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1), "token.weight"))),
    (other_forms, rename("layer.0:residual_add/Sum", "layer.0:residual_add/Add")),
    (other_forms, rename("token:embedding/Gather", "token:embedding/DequantizeLinear")),
    (silent_floats, float_reader),
    (loose_bytes, lambda p: setattr(node(p, QUERY), "doc_string", "query")),
    (loose_bytes, lambda p: p.graph.node[0].metadata_props.add(key="stack_trace", value=f"File {__file__}, line 1")),
    (loose_bytes, lambda p: setattr(p.metadata_props[0], "value", "0")),
    (loose_bytes, lambda p: setattr(p, "producer_name", "pytorch")),
]


@pytest.mark.parametrize(("check", "plant"), PLANTED, ids=lambda v: getattr(v, "__name__", ""))
def test_the_check_finds_what_is_planted(check: Check, plant: Callable[[Any], Any]) -> None:
    proto = lowered("table").proto
    plant(proto)
    assert list(check(lowered("table").changed(proto))) != []


# what the engine makes of it


@pytest.mark.parametrize("name", LOWERED)
def test_the_cure_by_a_session_option_changes_no_bit(name: str) -> None:
    batch = case_of(name).inputs(3)
    plain, precise = lowered(name).run(batch), lowered(name).run(batch, precise=True)
    assert [a.tobytes() for a in plain] == [a.tobytes() for a in precise]


def test_a_file_with_a_shared_zero_point_is_refused_there() -> None:
    proto = lowered("encoder").proto
    share(2)(proto)
    spoiled = lowered("encoder").changed(proto)
    assert spoiled.distance(padded(2, 6)) < STEP
    with pytest.raises(LowerError, match=r"QG505[^$]*session.x64quantprecision=1"):
        spoiled.run(padded(2, 6), precise=True)


def test_a_linear_that_the_recipe_pins_is_a_float_gemm_in_the_engine() -> None:
    kernels = {owner(k.name): k for k in ort_cpu.audit(lowered("pinned").file)}
    assert (kernels["down:linear"].kernel, kernels["down:linear"].int8) == ("Gemm", False)
    assert (kernels["up:linear"].kernel, kernels["up:linear"].int8) == ("QGemm", True)
    assert initializer(lowered("pinned").proto, "down.weight").data_type == TensorProto.FLOAT


def test_a_table_is_looked_up_in_int8() -> None:
    graph = lowered("table").proto.graph
    gather = node(lowered("table").proto, "token:embedding/Gather")
    (reader,) = (n for n in graph.node if gather.output[0] in n.input)
    assert (reader.op_type, gather.input[0]) == ("DequantizeLinear", "token.weight/int8")
    assert len(lowered("table").file) < len(lowered("encoder").file) - 4000  # 50 x 32 floats as bytes


# the same bytes


def test_lowering_twice_gives_the_same_bytes() -> None:
    assert lower(case_of("mlp")).file == lowered("mlp").file
    assert lower(case_of("mlp"), seeds=(7,)).file != lowered("mlp").file


FAULTS: dict[str, tuple[str, type[BaseException], type[BaseException]]] = {
    "the disk is full": ("write_bytes", OSError, LowerError),
    "the rename fails": ("replace", OSError, LowerError),
    "the user stops it": ("replace", KeyboardInterrupt, KeyboardInterrupt),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    where, raised, seen = FAULTS[fault]
    path, write_bytes = tmp_path / "model.onnx", Path.write_bytes
    write_atomically(path, b"old")

    def fails(target: Any, data: Any) -> int:
        write_bytes(target, data[:1]) if where == "write_bytes" else None
        raise raised(28, "No space left on device")

    monkeypatch.setattr(Path if where == "write_bytes" else os, where, fails)
    with pytest.raises(seen):
        write_atomically(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.onnx", b"old")]
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("place", ["missing/model.onnx", "file/model.onnx", "folder"])
def test_a_place_that_takes_no_file_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LowerError, match=r"QG504.*\n.*where.*\n.*why.*\n.*do"):
        qg.lower(lowered("erf-gelu").qat, tmp_path / place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
