"""One operation between Q/DQ pairs in a file of its own, run by ONNX Runtime in the int8 kernel that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from qatgraph.backends import ort_cpu
from qatgraph.reference import Array, Grid, dequantize, quantize


def grid(scale: Any, zero_point: Any, dtype: Any = np.uint8) -> Grid:
    return Grid(np.asarray(scale, np.float32), np.asarray(zero_point, dtype))


@dataclass(frozen=True)
class Between:
    """``operation(DQ inputs, DQ constants) -> Q``; a constant's scales lie on its entry of ``axes``.

    The borders are float, since with s8 at a border the engine computes in float.
    """

    operation: str
    kernel: str
    inputs: Sequence[tuple[Array, Grid]]
    out: Grid | None
    constants: Sequence[tuple[Array, Grid]] = ()
    axes: Sequence[int] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> bytes:
        tensors: dict[str, Array] = {}
        nodes = []

        def convert(kind: str, source: str, g: Grid, result: str, **axis: int) -> None:
            """A Q or DQ with constants of its own."""
            own = {f"{result}_scale": g.scale, f"{result}_zero": g.zero_point}
            tensors.update(own)
            nodes.append(helper.make_node(f"{kind}Linear", [source, *own], [result], **axis))

        for i, (_, g) in enumerate(self.inputs):
            convert("Quantize", f"in{i}", g, f"q{i}")
            convert("Dequantize", f"q{i}", g, f"x{i}")
        for i, ((q, g), axis) in enumerate(zip(self.constants, self.axes, strict=False)):
            tensors[f"c{i}"] = q
            convert("Dequantize", f"c{i}", g, f"w{i}", **({"axis": axis} if g.scale.ndim else {}))
        operands = [f"x{i}" for i in range(len(self.inputs))] + [f"w{i}" for i in range(len(self.constants))]
        result = "y" if self.out is None else "f"
        nodes.append(helper.make_node(self.operation, operands, [result], "op", **self.attributes))
        if self.out is not None:
            convert("Quantize", "f", self.out, "qy")
            convert("Dequantize", "qy", self.out, "y")
        sources = [
            helper.make_tensor_value_info(f"in{i}", TensorProto.FLOAT, q.shape) for i, (q, _) in enumerate(self.inputs)
        ]
        constants = [numpy_helper.from_array(np.array(v, order="C"), n) for n, v in tensors.items()]
        graph = helper.make_graph(nodes, "between", sources, [helper.make_empty_tensor_value_info("y")], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return bytes(model.SerializeToString())

    def feed(self) -> dict[str, Array]:
        return {f"in{i}": np.asarray(dequantize(q, g.scale, g.zero_point)) for i, (q, g) in enumerate(self.inputs)}

    def integers(self, y: Array) -> Array:
        return y if self.out is None else quantize(y, self.out.scale, self.out.zero_point)

    def run(self) -> Array:
        """What the engine makes of the integers: integers of ``out``, or its float result."""
        model = self.model()
        kernels = [node.op_type for node in ort_cpu.optimized_graph(model).node]
        assert self.kernel in kernels, f"{kernels}, not {self.kernel}"
        assert self.operation == self.kernel or self.operation not in kernels
        (y,) = ort_cpu.session(model, threads=1).run(None, self.feed())
        return self.integers(y)


def side_by_side(cases: Mapping[str, Between]) -> tuple[bytes, dict[str, Array]]:
    """One file of all cases, so that one emulated run is enough, and its feed; results in the order of the cases."""
    parts = []
    for name, case in cases.items():
        graph = onnx.load_from_string(case.model()).graph
        parts.append(compose.add_prefix_graph(graph, f"{name}/"))
    whole = [[item for part in parts for item in getattr(part, kind)] for kind in ("node", "input", "output")]
    tensors = [item for part in parts for item in part.initializer]
    graph = helper.make_graph(whole[0], "side_by_side", whole[1], whole[2], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feed = {f"{name}/{k}": v for name, case in cases.items() for k, v in case.feed().items()}
    return bytes(model.SerializeToString()), feed


def steps(a: Array, b: Array) -> int:
    """The largest distance between integers."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    return int(np.abs(a.astype(np.int32) - b.astype(np.int32)).max(initial=0))
