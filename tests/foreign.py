"""Small QDQ files as other tools write them, built node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qatgraph.reference import Array, Grid
from tests.qdq import grid

U8, RELU, S8 = grid(0.02, 128), grid(0.02, 0), grid(0.03, 0, np.int8)


class Sketch:
    """A graph that grows by one node a call; each call gives the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.tensors: dict[str, Array] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.rng = np.random.default_rng(0)

    def input(self, name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def constant(self, array: Any, name: str = "") -> str:
        name = name or f"c{len(self.tensors)}"
        self.tensors[name] = np.array(array, order="C")
        return name

    def floats(self, *shape: int) -> str:
        return self.constant(self.rng.normal(size=shape).astype(np.float32))

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{op_type.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    def q(self, value: str, g: Grid = U8, **how: Any) -> str:
        """A quantize with constants of its own; without a zero point where the grid has none."""
        return self.op("QuantizeLinear", value, *self._own(g), **how)

    def dq(self, value: str, g: Grid = U8, **how: Any) -> str:
        return self.op("DequantizeLinear", value, *self._own(g), **how)

    def qdq(self, value: str, g: Grid = U8, **how: Any) -> str:
        return self.dq(self.q(value, g, **how), g, **how)

    def _own(self, g: Grid) -> list[str]:
        return [self.constant(array) for array in (g.scale, g.zero_point) if array is not None]

    def weight(self, *shape: int, scale: Any = 0.01, bound: int = 63, axis: int | None = None) -> str:
        """A dequantized s8 constant; up to a bound of 63 no pair can overflow."""
        integers = self.rng.integers(-bound, bound + 1, shape).astype(np.int8)
        how = {} if axis is None else {"axis": axis}
        return self.dq(self.constant(integers), grid(scale, np.zeros(np.shape(scale)), np.int8), **how)

    def bias(self, step: float, size: int, values: Any = None) -> str:
        """A dequantized int32 vector with a scale for each number."""
        integers = self.rng.integers(-500, 500, size) if values is None else values
        return self.dq(self.constant(np.asarray(integers, np.int32)), grid([step] * size, [0] * size, np.int32), axis=0)

    def out(self, value: str) -> None:
        self.outputs.append(helper.make_empty_tensor_value_info(value))

    def proto(self) -> Any:
        tensors = [numpy_helper.from_array(v, k) for k, v in self.tensors.items()]
        graph = helper.make_graph(self.nodes, "sketch", self.inputs, self.outputs, tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)
