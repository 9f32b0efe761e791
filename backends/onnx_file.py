"""An ONNX file that any tool wrote, by the names of its values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qatgraph.errors import LowerError
from qatgraph.planning.facts import Size
from qatgraph.reference import Array

LIMIT = 2**31 - 1  # bytes of one protobuf message
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
# The engine moves a Q/DQ pair in front of and behind these (qdq_propagation.cc).
MOVES = frozenset({"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice"})


def load(path: Path) -> Any:
    """The model of a file, with its external data and without local functions.

    Raises:
        LowerError: QG506 no such file, QG509 not an ONNX model, QG510 its external data cannot be read, QG511 it holds
            more than 2 GiB, QG512 no Q/DQ node is in it.
    """
    import onnx
    import onnx.inliner

    if not path.is_file():
        raise LowerError("QG506", f"there is no file '{path}'", where="audit", todo="check the path")
    try:
        model = onnx.load(path, load_external_data=False)
        found = bool(model.graph.node) and bool(model.opset_import)
        why = "it has no nodes"
    except Exception as error:  # protobuf's own error; protobuf is onnx's dependency, not ours
        found, why = False, str(error).splitlines()[0]
    if not found:
        raise LowerError(
            "QG509", f"'{path.name}' is not an ONNX model", where="audit", why=why,
            todo="give the .onnx file that the exporter wrote",
        )  # fmt: skip
    _load_data(model, path)
    model = onnx.inliner.inline_local_functions(model) if model.functions else model
    _demand_conversions(model, path.name)
    return model


def _load_data(model: Any, path: Path) -> None:
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    outside = {ExternalDataInfo(i).location for i in model.graph.initializer if uses_external_data(i)}
    files = [path, *(path.parent / name for name in sorted(outside))]
    missing = [f.name for f in files if not f.is_file()]
    size = 0 if missing else sum(f.stat().st_size for f in files)
    if size > LIMIT:
        raise LowerError(
            "QG511", f"'{path.name}' holds {size / 2**30:.1f} GiB", where="audit",
            why="a model in one piece ends at 2 GiB, and the engine writes its graph in one piece",
            todo="audit one block of the model: its findings are those of all",
        )  # fmt: skip
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # of the file system, or of onnx about a length that does not fit
        raise LowerError(
            "QG510", f"the external data of '{path.name}' cannot be read", where=", ".join(missing) or "audit",
            why=str(error).splitlines()[0], todo="put the data beside the model, under the name that it was saved with",
        ) from error  # fmt: skip


def _demand_conversions(model: Any, name: str) -> None:
    kinds = {n.op_type for n in model.graph.node}
    if kinds & set(CONVERSIONS):
        return
    integer = sorted(k for k in kinds if k.startswith("QLinear") or k.endswith("Integer") or k == "MatMulNBits")
    raise LowerError(
        "QG512", f"nothing in '{name}' is quantized by Q/DQ nodes", where="audit",
        why=f"it holds integer operators ({', '.join(integer)}): its kernels are written, nobody chooses them"
        if integer else "it has neither QuantizeLinear nor DequantizeLinear",
        todo="export the model in the QDQ format (onnxruntime.quantization: quant_format=QuantFormat.QDQ)"
        if integer else "give the quantized file, not the float one",
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """``proto`` by names. A node without a name, or with one that is not its own, is known by its first result."""

    proto: Any

    @cached_property
    def nodes(self) -> list[Any]:
        return list(self.proto.graph.node)

    @cached_property
    def producers(self) -> dict[str, Any]:
        return {o: n for n in self.nodes for o in n.output if o}

    @cached_property
    def readers(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for node in self.nodes:
            for value in node.input:
                found.setdefault(value, []).append(node)
        return found

    @cached_property
    def inputs(self) -> set[str]:
        return {i.name for i in self.proto.graph.input} - {i.name for i in self.proto.graph.initializer}

    @cached_property
    def outputs(self) -> set[str]:
        return {o.name for o in self.proto.graph.output}

    @cached_property
    def needed(self) -> set[str]:
        """The values that an output depends on."""
        found = set(self.outputs)
        for node in reversed(self.nodes):  # a file lists what is read before what reads it
            if found.intersection(node.output):
                found.update(node.input)
        return found

    @cached_property
    def labels(self) -> dict[str, str]:
        """What a reader of the file calls the node, by its first result."""
        names = Counter(n.name for n in self.nodes)
        return {
            n.output[0]: n.name if n.name and names[n.name] == 1 else f"{n.op_type} -> {n.output[0]}"
            for n in self.nodes
            if n.output
        }

    def label(self, node: Any) -> str:
        return self.labels[node.output[0]]

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        written = {i.name: i for i in self.proto.graph.initializer}
        for node in self.nodes:
            value = (
                next((a.t for a in node.attribute if a.name == "value"), None) if node.op_type == "Constant" else None
            )
            if value is not None:
                written[node.output[0]] = value
        return written

    @cached_property
    def _arrays(self) -> dict[str, Array]:
        return {}

    def stem(self, value: str) -> str:
        """The value behind identities."""
        node = self.producers.get(value)
        return self.stem(node.input[0]) if node is not None and node.op_type == "Identity" else value

    def constant(self, value: str) -> Array | None:
        """The numbers of an initializer or a Constant node, also behind a Transpose."""
        from onnx import numpy_helper

        value = self.stem(value)
        if value not in self._arrays:
            node = self.producers.get(value)
            source = self.constant(node.input[0]) if node is not None and node.op_type == "Transpose" else None
            if value in self._tensors:
                self._arrays[value] = numpy_helper.to_array(self._tensors[value])
            elif source is not None:
                self._arrays[value] = source.transpose(attribute(node, "perm"))
        return self._arrays.get(value)

    def element_type(self, value: str) -> int:
        """As in ``onnx.TensorProto``; 0 if nobody knows."""
        tensor = self._tensors.get(self.stem(value))
        if tensor is not None:
            return int(tensor.data_type)
        kind = self._types.get(value)
        return int(kind.elem_type) if kind is not None else 0

    @cached_property
    def _types(self) -> dict[str, Any]:
        """The inferred types; the conversions of the contrib domain are the standard's with more data types."""
        import onnx

        copy = onnx.ModelProto()
        copy.CopyFrom(self.proto)
        for node in copy.graph.node:
            if node.op_type in CONVERSIONS:
                node.domain = ""
        try:
            graph = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
        except Exception:  # of onnx's C++; a file that it cannot type still has its declared types
            graph = copy.graph
        return {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input, *graph.output)}

    def shape(self, value: str) -> tuple[Size, ...]:
        """Its sizes, dynamic ones by name; empty if nobody knows its rank."""
        tensor = self._tensors.get(value)
        if tensor is not None:
            return tuple(tensor.dims)
        kind = self._types.get(value)
        if kind is None or not kind.HasField("shape"):
            return ()
        return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim)

    def opset(self) -> int:
        return next((int(o.version) for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 0)


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """An attribute's value, integers and floats as such."""
    from onnx import helper

    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)
