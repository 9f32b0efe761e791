"""Taps: what an engine read and wrote at the borders of each int8 region of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qatgraph.kernels import owner
from qatgraph.parity import RegionTap, has_region, write_integers
from qatgraph.planning.plan import Plan
from qatgraph.reference import Array

# the node that carries an int8 region: a linear's product stands before its Add
CORES = (
    "MatMulInteger", "MatMulNBits", "MatMul", "Gemm", "Gather", "Conv", "MaxPool", "AveragePool", "GlobalAveragePool",
    "Concat", "Sigmoid", "LeakyRelu", "Softmax", "Mul", "Add",
)  # fmt: skip


@dataclass(frozen=True)
class TapNames:
    """The values of a file at one region, see ``RegionTap``; a border that nobody may ask for has no name."""

    borders: tuple[str, ...]
    integers: tuple[str, ...]
    out: str


class _File:
    """A file by the names of its nodes and values."""

    def __init__(self, proto: Any) -> None:
        self.nodes = {n.name: n for n in proto.graph.node}
        self.constants = {i.name for i in proto.graph.initializer}
        self.producers = {o: n for n in proto.graph.node for o in n.output}
        self.readers: dict[str, list[Any]] = {}
        for node in proto.graph.node:
            for value in node.input:
                self.readers.setdefault(value, []).append(node)

    def core(self, name: str) -> Any:
        return next((self.nodes[n] for n in (f"{name}/{op}" for op in CORES) if n in self.nodes), None)

    def constant(self, value: str) -> bool:
        """Whether a value depends on no input of the file."""
        source = self.producers.get(value)
        return value in self.constants or (source is not None and all(map(self.constant, source.input)))

    def quantized(self, value: str) -> tuple[str, str] | None:
        """(float border, integers) of which a dequantize gave this value, if it is no constant.

        There is no border where the model takes integers.
        """
        dequantize = self.producers.get(value)
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or self.constant(dequantize.input[0]):
            return None
        integers = str(dequantize.input[0])
        source = self.producers.get(integers)
        return (str(source.input[0]) if source is not None and source.op_type == "QuantizeLinear" else "", integers)

    def integers_behind(self, value: str) -> str:
        """What the quantize writes that alone reads the value, also behind what a kernel takes in; empty if none."""
        readers = self.readers.get(value, [])
        if len(readers) != 1:
            return ""
        if readers[0].op_type == "QuantizeLinear":
            return str(readers[0].output[0])
        return self.integers_behind(readers[0].output[0]) if readers[0].op_type in ("Relu", "Clip") else ""


def tap(proto: Any, plan: Plan) -> dict[str, TapNames]:
    """Make the borders of every int8 region outputs of the file, and name them by node.

    Taps stand only at float borders and at outputs of quantize: exposing anything else would change the kernels.
    The caller audits the tapped file again. A region that the file does not hold, or that has no reference, gets no
    tap.
    """
    import onnx

    file, kinds, hidden = _File(proto), {f.name: f.kind for f in plan.nodes}, write_integers(plan)
    floats = {p.node for p in plan.predictions if p.requant == "float-result"}
    wanted = [p.node for p in plan.predictions if has_region(p, kinds[p.node])]
    regions = ((node, _region(file, node, node in floats)) for node in wanted)
    names = {node: region for node, region in regions if region is not None}
    inside = {o for n in proto.graph.node if owner(n.name) in hidden for o in n.output}
    names = {
        node: TapNames(tuple("" if b in inside else b for b in r.borders), r.integers, r.out)
        for node, r in names.items()
    }
    known = {v.name for v in [*proto.graph.input, *proto.graph.output]}
    for value in dict.fromkeys(v for r in names.values() for v in (*r.borders, *r.integers, r.out) if v):
        if value not in known:
            proto.graph.output.append(onnx.ValueInfoProto(name=value))
    return names


def _region(file: _File, name: str, writes_floats: bool) -> TapNames | None:
    """The planned node's region, if it is in the file with Q and DQ around it."""
    core = file.core(name)
    if core is None:
        return None
    if core.op_type == "Gather":
        rows = next((n for n in file.readers.get(core.output[0], []) if n.op_type == "DequantizeLinear"), None)
        return TapNames((core.input[1],), (core.output[0],), rows.output[0]) if rows is not None else None
    if core.op_type == "MatMulNBits":
        return TapNames((core.input[0],), (core.input[0],), core.output[0])
    if core.op_type == "MatMulInteger":
        source = file.producers[core.input[0]].input[0]
        result = file.nodes.get(f"{name}/Add", file.nodes[f"{name}/Mul#2"]).output[0]
        return TapNames((source,), (source,), result)
    read = [r for r in map(file.quantized, core.input) if r is not None]
    result = file.nodes.get(f"{name}/Add", core).output[0]
    out = result if writes_floats else file.integers_behind(result)
    if not read or not out:
        return None
    return TapNames(tuple(border for border, _ in read), tuple(integers for _, integers in read), out)


def read_taps(
    runs: Iterable[dict[str, Array]], names: dict[str, TapNames]
) -> Iterator[tuple[list[RegionTap], dict[str, Array]]]:
    """Run by run, given what the engine read and wrote by name, the same by region."""
    for seen in runs:
        taps = [
            RegionTap(node, tuple(seen.get(b) for b in r.borders), tuple(seen[q] for q in r.integers), seen[r.out])
            for node, r in names.items()
        ]
        yield taps, seen
