"""What a lowered file holds, whatever engine runs it."""

from __future__ import annotations

from typing import Any

import numpy as np

from qatgraph import borders
from qatgraph.backends import onnx_borders, onnx_products
from qatgraph.ir.graph import Graph
from qatgraph.planning.plan import Plan
from qatgraph.reference import Array, Grid

REQUIRES = "qatgraph.requires"  # in the metadata of a file


def metadata(graph: Graph, plan: Plan) -> dict[str, str]:
    """What a file bears: the hash of its plan, the target, what it requires of a CPU, the grids of integer outputs."""
    found = {"qatgraph.plan": plan.hash(), "qatgraph.target": plan.target}
    found |= {REQUIRES: plan.requires} if plan.requires else {}
    return found | onnx_borders.metadata(borders.output_grids(graph))


def parse(model: bytes | str) -> Any:
    import onnx

    return onnx.load(model) if isinstance(model, str) else onnx.load_from_string(model)


def product_constants(model: bytes) -> dict[str, dict[str, tuple[Array, ...]]]:
    """Of every product in the file with a constant integer weight, by the name of its node and by role: (scale, zero
    point) of x, if that is fixed, (integers, scale) of weight and bias.

    A weight is ``[N, K]``, or ``[O, C / groups, *kernel]`` of a convolution.
    """
    from onnx import numpy_helper

    graph = parse(model).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    producers = {o: n for n in graph.node for o in n.output}
    readers = {v: n for n in graph.node for v in n.input}
    read = {n.name: onnx_products.constants_of(n, constants, readers) for n in graph.node}
    found = {name: operands for name, operands in read.items() if operands}
    for node in (n for n in graph.node if n.op_type in ("MatMul", "Gemm", "Conv")):
        operands: dict[str, tuple[Array, ...]] = {}
        for role, value in zip(("x", "weight", "bias"), node.input, strict=False):
            source = producers.get(value)
            if source is None or source.op_type != "DequantizeLinear":
                continue
            parts = [constants.get(name, np.empty(0)) for name in source.input]
            if role == "x":
                operands[role] = tuple(parts[1:])
            elif source.input[0] in constants:
                operands[role] = tuple(parts[:2])
        if "weight" in operands:
            as_is = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
            weight, scale = operands["weight"]
            found[node.name] = {**operands, "weight": (weight if as_is else weight.T, scale)}
    return found


def bias_misfits(model: bytes) -> list[str]:
    """The products whose int32 bias does not count in ``s_x * s_w``: the engine adds it to the accumulator unseen."""
    return [
        name
        for name, roles in product_constants(model).items()
        if "bias" in roles and not np.array_equal(roles["bias"][1], roles["x"][0] * roles["weight"][1])
    ]


def stamps(model: bytes) -> tuple[str, str]:
    """The hash of the plan that the file was lowered from, and what it says that it requires of the CPU; empty if it
    bears none, or is no ONNX file."""
    try:
        props = {p.key: p.value for p in parse(model).metadata_props}
    except Exception:  # protobuf's own error; protobuf is onnx's dependency, not ours
        return "", ""
    return str(props.get("qatgraph.plan", "")), str(props.get(REQUIRES, ""))


def interface(model: bytes) -> tuple[dict[str, str], dict[str, str]]:
    """The types of the file's inputs and outputs by name."""
    return onnx_borders.interface(parse(model).graph)


def output_grids(model: bytes) -> dict[str, Grid]:
    """The grids of integer outputs, as the file's metadata states them."""
    return onnx_borders.output_grids(parse(model))
