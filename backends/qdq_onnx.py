"""Graph[QDQ] -> ONNX, on torch's own exporter; then names, forms and constants as the plan wants them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qatgraph.errors import LowerError
from qatgraph.ir.graph import Graph, GraphInfo, export_shapes
from qatgraph.ir.meta import NodeRecord
from qatgraph.ir.names import Namer
from qatgraph.operators import DEQUANTIZE, QUANTIZE
from qatgraph.planning.plan import Plan

SCALED = ("QuantizeLinear", "DequantizeLinear")
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity")


def to_onnx(graph: Graph, plan: Plan, opset: int, metadata: dict[str, str]) -> bytes:
    """Serialize a graph of the stage qdq. The same graph and plan give the same bytes.

    Raises:
        LowerError: QG503 the exporter or the checker refuses the graph.
    """
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    model = _export(graph, opset)
    optimizer.fold_constants(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    owners = _name_nodes(model, graph.info)
    _own_outputs(model, graph.info)
    for placement in plan.placements:
        write = FORMS.get(placement.form)
        if write is not None and placement.node in owners:  # a node of constants has been folded
            write(model, owners[placement.node], placement.bias)
    _part_from_quantize(model)
    common.RemoveUnusedNodesPass()(model)
    _name_values(model, graph.info)
    _own_constants(model)
    _strip(model)
    from qatgraph.version import __version__

    model.producer_name, model.producer_version = "qatgraph", __version__
    model.metadata_props.update(metadata)
    proto = ir.to_proto(model)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise LowerError(
            "QG503", "the lowered model is not valid ONNX", where=graph.info.root, why=str(error)
        ) from error
    return bytes(proto.SerializeToString(deterministic=True))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        LowerError: QG504 the folder does not take it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise LowerError(
            "QG504",
            f"cannot write '{path.name}'",
            where=str(path.parent),
            why=error.strerror or str(error),
            todo="choose a folder that you may write to",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _export(graph: Graph, opset: int) -> Any:
    info = graph.info
    shapes = export_shapes(graph.module, info.args, info.kwargs, info.dims)
    try:
        with quiet():
            program = torch.export.export(graph.module, info.args, info.kwargs, dynamic_shapes=shapes)
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                custom_translation_table=_translations(opset),
                input_names=list(info.inputs),
                dynamic_shapes=shapes,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise _refused(error, info) from error
    assert onnx_program is not None
    return onnx_program.model


def _refused(error: BaseException, info: GraphInfo) -> LowerError:
    """What the exporter wraps: the operator that it could not translate, and the innermost reason."""
    operator = None
    while True:
        operator = operator or re.search(r"target=torch\.ops\.([\w.]+)", str(error))
        if error.__cause__ is None:
            break
        error = error.__cause__
    return LowerError(
        "QG503",
        f"torch's ONNX exporter refuses {info.root}",
        where=operator[1] if operator else info.root,
        why=": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]]),
        todo="write this operation in another way in the model",
    )


def _translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    import importlib

    op: Any = getattr(importlib.import_module("onnxscript"), f"opset{opset}")

    def quantize(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.QuantizeLinear(x, scale, zero_point)

    def dequantize(q: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        return op.DequantizeLinear(q, scale, zero_point, axis=axis)

    return {QUANTIZE: quantize, DEQUANTIZE: dequantize}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter warns about torchvision and its own deprecations; neither is the user's business."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_nodes(model: Any, info: GraphInfo) -> dict[str, list[Any]]:
    """Give every ONNX node the name of our node, ``/``, its operation type; returns the ONNX nodes of each of ours."""
    namer = Namer()
    owners: dict[str, list[Any]] = {}
    for node in model.graph:
        source = node.meta.get("node")
        found = source.meta.get("custom", {}).get("qatgraph") if source is not None else None
        ours = found.name if isinstance(found, NodeRecord) else f"{info.root}:size"  # torch makes size nodes anew
        node.name = namer(f"{ours}/{node.op_type}")
        owners.setdefault(ours, []).append(node)
    return owners


def _name_values(model: Any, info: GraphInfo) -> None:
    """Give every value the name of its node or the user's: torch's, after operators, may be the user's for another."""
    for constant in list(model.graph.initializers.values()):
        if constant.name in info.inputs + info.outputs:  # a parameter may be named as an argument is
            constant.name = f"{constant.name}/constant"
    for node in model.graph:
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}/out{i or ''}"
    for value, name in zip(model.graph.outputs, info.outputs, strict=True):
        value.name = name


def _own_outputs(model: Any, info: GraphInfo) -> None:
    """An output that is an input, a constant, another output, or read by a node becomes a copy of its own.

    Two outputs cannot bear one name, and ORT's QDQPropagation moves a quantize up past a value that is an output.
    """
    import onnx_ir as ir

    seen, namer = set(model.graph.inputs), Namer()
    for i, value in enumerate(model.graph.outputs):
        if value in seen or value.is_initializer() or value.uses():
            node = ir.Node("", "Identity", [value], num_outputs=1, name=namer(f"{info.root}:output/Identity"))
            node.outputs[0].dtype, node.outputs[0].shape = value.dtype, value.shape
            model.graph.append(node)
            model.graph.outputs[i] = node.outputs[0]
        seen.add(value)


def _as_matmul(model: Any, nodes: list[Any], bias: str) -> None:
    """DQ(w[N,K]) -> Transpose -> MatMul -> Add(b) becomes DQ(w[K,N]) -> MatMul -> Add(b of the wanted shape).

    At rank 2 and without a bias the exporter writes Gemm, which becomes the same.
    """
    matmul = next(n for n in nodes if n.op_type in ("MatMul", "Gemm"))
    dequantize = matmul.inputs[1].producer()
    if dequantize.op_type == "Transpose":
        dequantize = dequantize.inputs[0].producer()
    weight = dequantize.inputs[0]
    turned = np.ascontiguousarray(weight.const_value.numpy().T)
    dequantize.replace_input_with(0, _initializer(model, f"{weight.name}/transposed", turned))
    if dequantize.inputs[1].shape.rank():
        dequantize.attributes["axis"] = _int_attribute("axis", 1)
    dequantize.outputs[0].shape = None
    matmul.replace_input_with(1, dequantize.outputs[0])
    if matmul.op_type == "Gemm":
        matmul.op_type, matmul.name = "MatMul", matmul.name.removesuffix("/Gemm") + "/MatMul"
        matmul.attributes.clear()
    if bias == "row":
        add = _the(nodes, "Add")
        index = next(i for i, value in enumerate(add.inputs) if value.const_value is not None)
        vector = add.inputs[index]
        rank = add.outputs[0].shape.rank()
        row = vector.const_value.numpy().reshape([1] * (rank - 1) + [-1])
        add.replace_input_with(index, _initializer(model, f"{vector.name}/row{rank}", row))


def _as_sum(model: Any, nodes: list[Any], bias: str) -> None:
    add = _the(nodes, "Add")
    add.op_type = "Sum"
    add.name = add.name.removesuffix("/Add") + "/Sum"


def _as_max(model: Any, nodes: list[Any], bias: str) -> None:
    """Relu -> Max(x, 0)."""
    import onnx_ir as ir

    relu = _the(nodes, "Relu")
    name = relu.name.removesuffix("/Relu") + "/Max"
    zero = _initializer(model, f"{name}/zero", np.zeros((), np.float32))
    new = ir.Node("", "Max", [relu.inputs[0], zero], num_outputs=1, name=name)
    new.outputs[0].dtype, new.outputs[0].shape = relu.outputs[0].dtype, relu.outputs[0].shape
    ir.convenience.replace_nodes_and_values(model.graph, relu, [relu], [new], relu.outputs, new.outputs)


def _as_attention(model: Any, nodes: list[Any], bias: str) -> None:
    attention = _the(nodes, "Attention")
    _pack_heads(attention)
    _write_mask_out(model, attention)


def _pack_heads(attention: Any) -> None:
    """Attention over ``[batch, length, heads * width]``: drop the reshapes and transposes around it, if they are there.

    The kernel splits the heads itself; bit-equal, and 11 % of MiniLM's time (docs/decisions/attention-heads.md).
    """
    import onnx_ir as ir

    query, key, value = attention.inputs[:3]
    packed = [_packed(v) for v in (query, key, value)]
    merged = _reader(attention.outputs[0], "Transpose")
    joined = _reader(merged.outputs[0], "Reshape") if merged is not None else None
    if joined is None or joined.outputs[0].is_graph_output() or any(v is None for v in packed):
        return
    whole = [query.shape[0], query.shape[2], query.shape[1] * value.shape[3]]
    if not _same(joined.outputs[0].shape, whole) or list(merged.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return
    for name, split in (("q_num_heads", query), ("kv_num_heads", key)):
        attention.attributes[name] = ir.AttrInt64(name, split.shape[1])
    for i, source in enumerate(packed):
        attention.replace_input_with(i, source)
    attention.outputs[0].shape = joined.outputs[0].shape
    ir.convenience.replace_all_uses_with(joined.outputs[0], attention.outputs[0])


def _packed(value: Any) -> Any:
    """The ``[batch, length, heads * width]`` value behind Reshape -> Transpose(0, 2, 1, 3), or None."""
    transpose = value.producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    reshape = transpose.inputs[0].producer()
    if list(transpose.attributes["perm"].as_ints()) != [0, 2, 1, 3] or reshape is None or reshape.op_type != "Reshape":
        return None
    batch, heads, length, width = value.shape
    if not (isinstance(heads, int) and isinstance(width, int)):
        return None
    source = reshape.inputs[0]
    return source if _same(source.shape, [batch, length, heads * width]) else None


def _same(shape: Any, sizes: list[Any]) -> bool:
    """Whether all sizes are known and equal: a reshape may also cut the length into chunks, or join samples."""
    if shape is None or shape.rank() != len(sizes):
        return False
    return all(str(a) == str(b) != "None" for a, b in zip(shape, sizes, strict=True))


def _write_mask_out(model: Any, attention: Any) -> None:
    """Give a mask that is the same for all queries its rows: ORT's kernel refuses to broadcast it over them."""
    import onnx_ir as ir

    mask = attention.inputs[3] if len(attention.inputs) > 3 else None
    if mask is None or mask.shape[-2] != 1:
        return
    stem, axis = attention.name.removesuffix("/Attention"), attention.inputs[0].shape.rank() - 2
    ends = {"start": ir.AttrInt64("start", axis), "end": ir.AttrInt64("end", axis + 1)}
    length = ir.Node("", "Shape", attention.inputs[:1], ends, num_outputs=1, name=f"{stem}/Shape")
    one = _initializer(model, f"{stem}/Concat/one", np.ones(1, np.int64))
    rows = ir.Node("", "Concat", [length.outputs[0], one], {"axis": ir.AttrInt64("axis", 0)}, name=f"{stem}/Concat")
    full = ir.Node("", "Expand", [mask, rows.outputs[0]], num_outputs=1, name=f"{stem}/Expand")
    model.graph.insert_before(attention, [length, rows, full])
    attention.replace_input_with(3, full.outputs[0])


def _reader(value: Any, op_type: str) -> Any:
    """The one node that reads the value, if it is of this type."""
    readers = list(value.uses())
    return readers[0].node if len(readers) == 1 and readers[0].node.op_type == op_type else None


def _part_from_quantize(model: Any) -> None:
    """Put a ``Sum`` of one operand between an int8 product and a quantize.

    The rows promise a kernel that writes float; with a quantize behind it ORT takes one that writes integers, and
    rounds in another way.
    """
    import onnx_ir as ir

    for node in list(model.graph):
        source = node.inputs[0].producer() if node.op_type in ("MatMul", "Gemm") else None
        if source is None or source.op_type != "DequantizeLinear" or not _meets_quantize(node.outputs[0]):
            continue
        result, name = node.outputs[0], f"{node.name.rpartition('/')[0]}/Sum"
        copy = ir.Node("", "Sum", [result], num_outputs=1, name=name)
        copy.outputs[0].dtype, copy.outputs[0].shape = result.dtype, result.shape
        for reader, index in [use for use in result.uses() if use.node is not copy]:
            reader.replace_input_with(index, copy.outputs[0])
        model.graph.insert_after(node, copy)


def _meets_quantize(value: Any) -> bool:
    """Whether ORT finds a quantize behind the value; it moves one up past operations that only move elements."""
    readers = [use.node for use in value.uses()]
    return any(r.op_type == "QuantizeLinear" or (r.op_type in MOVES and _meets_quantize(r.outputs[0])) for r in readers)


# How the forms of a target's rows are written; a form that is not here is what the exporter writes anyway.
FORMS: dict[str, Callable[[Any, list[Any], str], None]] = {
    "matmul": _as_matmul,
    "sum": _as_sum,
    "max": _as_max,
    "packed-heads": _as_attention,
}


def _the(nodes: list[Any], op_type: str) -> Any:
    return next(n for n in nodes if n.op_type == op_type)


def _initializer(model: Any, name: str, array: np.ndarray[Any, Any]) -> Any:
    import onnx_ir as ir

    known = model.graph.initializers.get(name)
    if known is not None:
        return known
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    model.graph.initializers[name] = value
    return value


def _int_attribute(name: str, value: int) -> Any:
    import onnx_ir as ir

    return ir.AttrInt64(name, value)


def _own_constants(model: Any) -> None:
    """Every quantize and dequantize gets its own scale, zero point and integers.

    ORT refuses a file under ``session.x64quantprecision=1`` when two of them share a constant.
    """
    for node in model.graph:
        if node.op_type in SCALED:
            roles = {1: "scale", 2: "zero_point"}
            if node.inputs[0].const_value is not None and len(node.inputs[0].uses()) > 1:
                roles[0] = "integers"
            for index, role in roles.items():
                array = node.inputs[index].const_value.numpy()
                node.replace_input_with(index, _initializer(model, f"{node.name}/{role}", array))


def _strip(model: Any) -> None:
    """Drop what the exporter notes beside the graph: its stack traces hold paths of this machine."""
    used = {value.name for node in model.graph for value in node.inputs if value is not None}
    for name in [n for n in model.graph.initializers if n not in used]:
        del model.graph.initializers[name]
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
