"""The graph that OpenVINO's CPU plugin makes of a file, under the names of the file's nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from qatgraph.kernels import KernelNode

INTEGERS = ("u8", "i8")
PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
PAIRS = ("Add", "Sum", "Mul", "Sub", "Div")
ELEMENTWISE = ("Eltwise", "Subgraph")
CLAMPS = ("Relu", "Clip", "Max", "Min")  # nothing is left of one that is joined to another node
# operations of the file that are none of the user's on numbers: truth values are bytes, too
ASIDE = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "And", "Or", "Xor", "Not", "Equal", "Greater", "GreaterOrEqual", "Less",
     "LessOrEqual", "IsNaN", "Where", "Cast", "Shape", "Expand"}
)  # fmt: skip
MOVERS = frozenset(
    {"Reshape", "Transpose", "StridedSlice", "Split", "Squeeze", "Unsqueeze", "Gather", "GatherElements", "GatherND",
     "Broadcast", "Tile", "DepthToSpace", "SpaceToDepth", "Pooling"}
)  # fmt: skip
# they may read integers in the place of the same floats
EITHER = MOVERS | {"Concatenation", "Convert", "Reduce"}


class EngineNode(NamedTuple):
    """``precision`` is what it works in, ``names`` are those of all that was joined to it, in order, and ``reads`` the
    precisions of what it reads that depends on an input."""

    layer: str
    precision: str
    names: list[str]
    reads: list[str]


def describe(compiled: Any) -> list[Any]:
    """The fields of an ``EngineNode`` for each node of a compiled model that depends on an input, in order.

    Its text also runs inside the emulator, where nothing of ours is.
    """

    def word(facts: Any, key: str) -> str:
        return str(facts[key].astype(str)) if key in facts else ""

    found: list[Any] = []
    fixed = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        sources = node.input_values()
        free = [s for s in sources if s.get_node().get_friendly_name() not in fixed]
        if word(facts, "layerType") in ("Const", "Output") or (sources and not free):
            fixed.add(node.get_friendly_name())
            continue
        given = ((word(s.get_node().get_rt_info(), "outputPrecisions").split(","), s.get_index()) for s in free)
        reads = [each[min(at, len(each) - 1)] for each, at in given]  # one for all outputs, or one for each
        names = [n for n in word(facts, "originalLayersNames").split(",") if n]
        found.append((word(facts, "layerType"), word(facts, "runtimePrecision"), names, reads))
    return found


def kernel_nodes(written: Any, engine: list[EngineNode]) -> list[KernelNode]:
    """The nodes of the engine's graph under the names of the written one."""
    nodes = {n.name: n for n in written.node}
    results = {o: n for n in written.node for o in n.output}
    outputs = {o.name: results[o.name] for o in written.output if o.name in results}
    found: list[KernelNode] = []
    for one in engine:
        # a/Conv/WithoutBiases comes from a/Conv; what gives an output of the file bears the name of that
        known = (nodes.get("/".join(name.split("/")[:2])) or outputs.get(name) for name in one.names)
        if one.layer in MOVERS:  # a quantize behind that changes nothing goes, and leaves its name
            known = (results.get(n.input[0]) if n and n.op_type == "QuantizeLinear" else n for n in known)
        joined = {n.name: n for n in known if n is not None and n.op_type not in ASIDE}
        found += _joined(one, list(joined.values()))
    return found


def _joined(one: EngineNode, nodes: list[Any]) -> Iterator[KernelNode]:
    """Of what is one node for the engine: the product in it, or else the first, is what works in its precision.

    What goes element by element is computed in float, whatever is read. Of several operands it counts as int8 where the
    engine node reads integers, and as either where it reads floats, too: the kernel in front may write one operand of
    two as the floats that its integers stand for.
    """
    core = next((n for n in nodes if n.op_type in PRODUCTS), next(iter(nodes), None))
    for node in nodes:
        int8 = node is core and one.precision in INTEGERS and one.layer not in ELEMENTWISE
        either = node is core and one.layer in EITHER
        if node.op_type in PAIRS:
            integers = [r in INTEGERS for r in one.reads]
            int8, either = any(integers), any(integers) and not all(integers)
        if node is core or node.op_type not in CLAMPS:
            yield KernelNode(node.name, one.layer, int8, either)
