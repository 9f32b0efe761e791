"""What enters and leaves a file: types, grids of integer outputs, conversions that are left there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qatgraph.reference import Grid

OUTPUT = "qatgraph.output."  # and the name of an output of integers: the key in the file's metadata
# What the engine puts between the border and the first or last kernel, and what only moves integers there.
MOVES = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Identity", "MaxPool"})
WORDS = {"float": "float32", "double": "float64"}


def metadata(grids: Mapping[str, Grid]) -> dict[str, str]:
    """``qatgraph.output.NAME``: ``{"scale": 0.05, "zero_point": 128}``, for whoever reads the integers."""
    return {
        OUTPUT + name: json.dumps({"scale": float(g.scale), "zero_point": int(g.zero_point)})
        for name, g in grids.items()
    }


def output_grids(proto: Any) -> dict[str, Grid]:
    """The grids that the metadata of a file states."""
    found = {}
    for name, text in ((p.key.removeprefix(OUTPUT), p.value) for p in proto.metadata_props if p.key.startswith(OUTPUT)):
        stated = json.loads(text)
        found[name] = Grid(np.array(stated["scale"], np.float32), np.array(stated["zero_point"], np.uint8))
    return found


def interface(graph: Any) -> tuple[dict[str, str], dict[str, str]]:
    """The types of a file's inputs and outputs by name."""
    return _types(graph.input), _types(graph.output)


def _types(values: Any) -> dict[str, str]:
    from onnx import TensorProto

    names = {v.name: TensorProto.DataType.Name(v.type.tensor_type.elem_type).lower() for v in values}
    return {name: WORDS.get(word, word) for name, word in names.items()}


def conversions(graph: Any) -> list[str]:
    """The conversions that the engine runs between an integer input and integers, or in front of an integer output.

    ``graph`` is the one that the engine runs. A dequantize in front of an operation in float is none of them.
    """
    inputs, outputs = ([n for n, t in side.items() if t in ("uint8", "int8")] for side in interface(graph))
    producers = {o: n for n in graph.node for o in n.output}
    found = [f"{node.name} behind the input '{name}'" for name in inputs for node in _behind(graph, name)]
    for name in outputs:
        node = producers.get(name)
        while node is not None and node.op_type in MOVES:
            node = producers.get(node.input[0])
        if node is not None and node.op_type == "QuantizeLinear":
            found.append(f"{node.name} in front of the output '{name}'")
    return found


def _behind(graph: Any, name: str, kind: str = "DequantizeLinear") -> Iterator[Any]:
    """The quantizes that read, past a dequantize, what is only moved from an input."""
    for node in (n for n in graph.node if name in n.input):
        if node.op_type in MOVES:
            yield from _behind(graph, node.output[0], kind)
        elif node.op_type == kind == "DequantizeLinear":
            yield from _behind(graph, node.output[0], "QuantizeLinear")
        elif node.op_type == kind:
            yield node
