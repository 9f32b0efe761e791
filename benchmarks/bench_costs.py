"""What do kernels and borders cost? Prints the ``[cost]`` section of a table, measured on ONNX Runtime, one thread.

Each rate is a slope: a small and a large model of one node run in turn, and the difference of their best times is
divided by the difference of their work, so that what a call costs by itself is not in it. That one is ``node``: the
slope over chains of nodes on one element.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from common import publish
from onnx import TensorProto, helper, numpy_helper

from qatgraph.backends import ort_cpu

F, U = TensorProto.FLOAT, TensorProto.UINT8
ROUNDS = 60
Feed = dict[str, np.ndarray[Any, Any]]
Made = tuple[bytes, Feed, int]  # the file, what it reads, and its work: products or elements
RNG = np.random.default_rng(0)


def model(nodes: list[Any], x: np.ndarray[Any, Any], out: int, constants: dict[str, Any], work: int) -> Made:
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    inputs = [helper.make_tensor_value_info("x", kind, x.shape)]
    outputs = [helper.make_tensor_value_info("y", out, None)]
    values = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "cost", inputs, outputs, values)
    sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=sets, ir_version=10)
    return made.SerializeToString(), {"x": x}, work


def node(op: str, *inputs: str, **attributes: Any) -> Any:
    domain = "com.microsoft" if op in ("MatMulIntegerToFloat", "QLinearAdd") else ""
    return helper.make_node(op, list(inputs), ["y"], domain=domain, **attributes)


def reals(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def bytes_(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.integers(0, 255, shape, dtype=np.uint8)


def weights(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.integers(-64, 65, shape).astype(np.int8)


GRID = {"s": np.float32(0.02), "z": np.uint8(128)}


def quantize(n: int) -> Made:
    return model([node("QuantizeLinear", "x", "s", "z")], reals(n, 1024), U, GRID, n * 1024)


def dequantize(n: int) -> Made:
    return model([node("DequantizeLinear", "x", "s", "z")], bytes_(n, 1024), F, GRID, n * 1024)


def elementwise_float(n: int) -> Made:
    other = {"o": reals(n, 1024)}
    return model([node("Add", "x", "o")], reals(n, 1024), F, other, n * 1024)


def elementwise_int8(n: int) -> Made:
    one = ("s", "z")
    other = GRID | {"o": bytes_(n, 1024)}
    return model([node("QLinearAdd", "x", *one, "o", *one, *one)], bytes_(n, 1024), U, other, n * 1024)


def linear_float(n: int) -> Made:
    return model([node("MatMul", "x", "w")], reals(n, 384), F, {"w": reals(384, 384)}, n * 384 * 384)


def linear_int8(n: int) -> Made:
    grids = GRID | {"w": weights(384, 384), "ws": np.full(384, 0.01, np.float32)}
    product = node("MatMulIntegerToFloat", "x", "w", "s", "ws", "z")
    return model([product], bytes_(n, 384), F, grids, n * 384 * 384)


def conv(channels: int, group: int, kernel: int) -> tuple[Callable[[int], Made], Callable[[int], Made]]:
    """A float and an int8 convolution over ``[n, channels, 28, 28]``."""
    shape, ends = (channels, channels // group, kernel, kernel), [kernel // 2] * 4
    products = channels * 28 * 28 * (channels // group) * kernel * kernel

    def real(n: int) -> Made:
        made = node("Conv", "x", "w", pads=ends, group=group)
        return model([made], reals(n, channels, 28, 28), F, {"w": reals(*shape)}, n * products)

    def integers(n: int) -> Made:
        constants = GRID | {
            "w": weights(*shape),
            "ws": np.full(channels, 0.01, np.float32),
            "wz": np.int8([0] * channels),
        }
        made = node("QLinearConv", "x", "s", "z", "w", "ws", "wz", "s", "z", pads=ends, group=group)
        return model([made], bytes_(n, channels, 28, 28), U, constants, n * products)

    return real, integers


def scores(n: int) -> tuple[Any, int]:
    """What makes ``x xT`` for 12 heads of width 64 over n tokens, and its products."""
    return helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]), 12 * n * n * 64


def matmul_float(n: int) -> Made:
    transpose, products = scores(n)
    return model([transpose, node("MatMul", "x", "t")], reals(1, 12, n, 64), F, {}, products)


def matmul_int8(n: int) -> Made:
    transpose, products = scores(n)
    product = node("QLinearMatMul", "x", "s", "z", "t", "s", "z", "s", "z")
    return model([transpose, product], bytes_(1, 12, n, 64), U, GRID, products)


def chain(n: int) -> Made:
    """n nodes on one element."""
    names = ["x", *(f"v{i}" for i in range(n - 1)), "y"]
    nodes = [helper.make_node("Sin", [a], [b]) for a, b in pairwise(names)]
    return model(nodes, reals(1), F, {}, n)


def picoseconds(make: Callable[[int], Made], small: int, large: int) -> float:
    """The slope of the best time over the work."""
    made = [make(small), make(large)]
    sessions = [(ort_cpu.session(file, threads=1), feed) for file, feed, _ in made]
    best = [float("inf")] * 2
    for _ in range(ROUNDS):
        for i, (session, feed) in enumerate(sessions):
            start = time.perf_counter()
            session.run(None, feed)
            best[i] = min(best[i], time.perf_counter() - start)
    return (best[1] - best[0]) / (made[1][2] - made[0][2]) * 1e12


def main() -> None:
    dense, depthwise = conv(64, 1, 3), conv(128, 128, 3)
    rates = {
        "node": picoseconds(chain, 10, 400),
        "quantize": picoseconds(quantize, 16, 512),
        "dequantize": picoseconds(dequantize, 16, 512),
        "float.element": picoseconds(elementwise_float, 16, 512),
        "float.linear": picoseconds(linear_float, 64, 1024),
        "float.conv": picoseconds(dense[0], 1, 8),
        "float.depthwise": picoseconds(depthwise[0], 1, 8),
        "float.matmul": picoseconds(matmul_float, 64, 256),
        "int8.element": picoseconds(elementwise_int8, 16, 512),
        "int8.linear": picoseconds(linear_int8, 64, 1024),
        "int8.conv": picoseconds(dense[1], 1, 8),
        "int8.depthwise": picoseconds(depthwise[1], 1, 8),
        "int8.matmul": picoseconds(matmul_int8, 64, 256),
    }
    publish("costs", rates)


if __name__ == "__main__":
    main()
