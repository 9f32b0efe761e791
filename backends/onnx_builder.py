"""An ONNX file that grows node by node."""

from __future__ import annotations

from typing import Any

import numpy as np

from qatgraph.probing.cases import Grid
from qatgraph.reference import Array

CORE = "case"  # the owner of the nodes that are the operation itself
IR_VERSION = 10


class File:
    """An ONNX file that grows; values are known by name. ``feed`` are the arrays for its inputs."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []
        self.feed: dict[str, Array] = {}

    def add(self, op: str, *inputs: str, at: str = CORE, results: int = 1, **attributes: Any) -> str:
        """One node, of which the name of the first output is returned; the others are called ``…1``, ``…2``."""
        from onnx import helper

        name = f"{at}/{op}"
        twins = sum(n.name.partition("#")[0] == name for n in self.nodes)
        name += f"#{twins}" if twins else ""
        outputs = [f"{name}/out{i or ''}" for i in range(results)]
        self.nodes.append(helper.make_node(op, inputs, outputs, name, **attributes))
        return f"{name}/out"

    def constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def input(self, name: str, value: Array, dynamic: tuple[int, ...] = ()) -> str:
        from onnx import helper

        shape = [f"{name}{i}" if i in dynamic else n for i, n in enumerate(value.shape)]
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        self.feed[name] = value
        return name

    def shape(self, value: str) -> tuple[int, ...]:
        """The shape of a float value on the feed."""
        import onnx
        from onnx import TensorProto, helper

        kinds = ((n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in self.feed.items())
        inputs = [helper.make_tensor_value_info(*k) for k in kinds]
        out = helper.make_tensor_value_info(value, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "part", inputs, [out], self.constants)
        model = onnx.shape_inference.infer_shapes(helper.make_model(graph), data_prop=True)
        return tuple(int(d.dim_value) for d in model.graph.output[0].type.tensor_type.shape.dim)

    def quantize(self, value: str, grid: Grid, at: str) -> str:
        return self.add("QuantizeLinear", value, *self._grid(grid, f"{at}/quantize"), at=at)

    def dequantize(self, value: str, grid: Grid, at: str) -> str:
        axis = {} if grid.axis is None else {"axis": grid.axis}
        return self.add("DequantizeLinear", value, *self._grid(grid, f"{at}/dequantize"), at=at, **axis)

    def _grid(self, grid: Grid, at: str) -> tuple[str, str]:
        """Constants of its own for each quantize and dequantize, as the lowering gives them."""
        return self.constant(f"{at}/scale", grid.scale), self.constant(f"{at}/zero_point", grid.zero)

    def bytes(self, outputs: list[tuple[str, int]], opset: int, *, typed: bool) -> bytes:
        """``outputs`` are names and ONNX types."""
        import onnx
        from onnx import helper

        last = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs]
        graph = helper.make_graph(self.nodes, "case", self.inputs, last, self.constants)
        domains = {n.domain for n in self.nodes} - {""}
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in sorted(domains))]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        model = onnx.shape_inference.infer_shapes(model) if typed else model
        return bytes(model.SerializeToString())
