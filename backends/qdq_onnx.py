"""Graph[QDQ] -> ONNX, on torch's own exporter; then names, forms and constants as the plan wants them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qatgraph.backends.onnx_forms import FORMS, initializer, part_from_quantize
from qatgraph.backends.translations import trace_inlined, translations
from qatgraph.errors import LowerError
from qatgraph.ir.graph import Graph, GraphInfo, export_shapes
from qatgraph.ir.meta import NodeRecord
from qatgraph.ir.names import Namer
from qatgraph.planning.plan import Plan

SCALED = ("QuantizeLinear", "DequantizeLinear")


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
    floats = {p.node for p in plan.placements if p.placement != "int8"}
    floats |= {p.node for p in plan.predictions if p.requant == "float-result"}
    part_from_quantize(model, owners, [name for name in owners if name in floats])
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
        with quiet(), torch.no_grad():  # with gradients attention may take another kernel, of another memory layout
            program = torch.export.export(graph.module, info.args, info.kwargs, dynamic_shapes=shapes)
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                custom_translation_table=translations(opset),
                input_names=list(info.inputs),
                dynamic_shapes=shapes,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise _refused(error, info) from error
    assert onnx_program is not None
    trace_inlined(onnx_program)
    return onnx_program.model


def _refused(error: BaseException, info: GraphInfo) -> LowerError:
    """What the exporter wraps: the operator that it could not translate, and the innermost reason."""
    operator = None
    while True:
        operator = operator or re.search(r"target=torch\.ops\.([\w.]+)", str(error))
        if error.__cause__ is None:
            break
        error = error.__cause__
    known = operator is None or operator[1].startswith(("aten.", "prims.", "qatgraph."))
    own = "give it an ONNX form: qatgraph.register_operation(operation, onnx=...)"
    return LowerError(
        "QG503",
        f"torch's ONNX exporter refuses {info.root}",
        where=operator[1] if operator else info.root,
        why=": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]]),
        todo="write this operation in another way in the model" if known else own,
    )


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
                node.replace_input_with(index, initializer(model, f"{node.name}/{role}", array))


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
