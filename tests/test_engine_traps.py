"""What probing found the engine to do with files like ours, and how they are written or read since."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.backends import ort_cpu
from qatgraph.errors import LowerError
from qatgraph.kernels import compare_kernels
from qatgraph.planning.recipe import Override, Recipe


class Channels(nn.Module):
    """Looks tokens up and puts the channels in front, as a text CNN does."""

    def __init__(self, moved: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.token, self.moved = nn.Embedding(16, 8), moved

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.moved(self.token(ids)))


class Score(nn.Module):
    """One output, of which the bias is still zero, and a linear that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.down = nn.Linear(8, 1), nn.Linear(1, 8)
        nn.init.zeros_(self.score.bias)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.score(x))
        return found


def lowered(model: nn.Module, batch: Any, tmp: Any, recipe: Recipe) -> tuple[qg.Plan, bytes]:
    torch.manual_seed(0)
    graph = qg.capture(model, batch)
    plan = qg.plan(graph, recipe=recipe)
    qat = qg.prepare(graph, plan)
    qg.calibrate(qat, [batch], progress=False)
    return plan, qg.lower(qat, tmp / "model.onnx").read_bytes()


LINEARS = Recipe(override=(Override(select="*:linear", place="int8"),))  # one result alone does not pay
TABLE = Recipe(override=(Override(select="token:embedding", place="int8"),))


def spoiled(file: bytes, op: str) -> bytes:
    """The file without its nodes of one type: their readers read what they read."""
    proto = onnx.load_from_string(file)
    for node in [n for n in proto.graph.node if n.op_type == op]:
        for reader in proto.graph.node:
            for i, value in enumerate(reader.input):
                if value == node.output[0]:
                    reader.input[i] = node.input[0]
        proto.graph.node.remove(node)
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize("moved", [lambda t: t.transpose(1, 2), lambda t: t.unsqueeze(1), lambda t: t.flatten(1)])
def test_rows_of_an_int8_table_may_be_moved(moved: Callable[[Tensor], Tensor], tmp_path: Any) -> None:
    plan, file = lowered(Channels(moved), (torch.arange(6).reshape(2, 3),), tmp_path, TABLE)
    assert compare_kernels(plan, ort_cpu.audit(file)) == []
    assert any(p.int8 for p in plan.predictions)
    with pytest.raises(LowerError, match="output_dtype"):  # without the copy, the engine refuses its own graph
        ort_cpu.audit(spoiled(file, "Sum"))


def test_a_single_bias_of_zero_does_not_cost_the_kernel(tmp_path: Any) -> None:
    plan, file = lowered(Score(), (torch.randn(2, 3, 8),), tmp_path, LINEARS)
    assert compare_kernels(plan, ort_cpu.audit(file)) == []
    proto = onnx.load_from_string(file)
    (biased,) = (n for n in proto.graph.node if n.op_type == "Sum" and len(n.input) == 2)
    biased.op_type = "Add"
    assert compare_kernels(plan, ort_cpu.audit(proto.SerializeToString()))


def floats(nodes: list[Any], shape: list[int], **constants: Any) -> bytes:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None))]
    held = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return bytes(model.SerializeToString())


NODE = helper.make_node
CONV = {"shape": [1, 1, 2, 2], "w": np.ones((1, 1, 1, 1)), "low": 0, "high": 6}


@pytest.mark.parametrize(
    ("kernel", "file"),
    [
        ("Gemm", floats([NODE("Gemm", ["x", "w"], ["m"], "a/Gemm"), NODE("Transpose", ["m"], ["y"], "b/Transpose")],
                        [2, 2], w=np.ones((2, 2)))),
        ("Conv", floats([NODE("Conv", ["x", "w"], ["a/Conv/out"], "a/Conv"),
                         NODE("Clip", ["a/Conv/out", "low", "high"], ["b/Clip/out"], "b/Clip"),
                         NODE("Max", ["b/Clip/out", "low"], ["y"], "c/Max")], **CONV)),  # type: ignore[arg-type]
        ("Conv", floats([NODE("Conv", ["x", "w"], ["a/Conv/out"], "a/Conv"),
                         NODE("Clip", ["a/Conv/out", "low", "high"], ["b/Clip/out"], "b/Clip"),
                         NODE("Transpose", ["b/Clip/out"], ["t"], "c/Transpose"),
                         NODE("Max", ["t", "low"], ["y"], "c/Max")], **CONV)),  # type: ignore[arg-type]
    ],
    ids=["transposed product", "limited convolution", "limited and moved convolution"],
)  # fmt: skip
def test_a_float_kernel_that_takes_in_what_follows_bears_the_name_of_its_own_node(kernel: str, file: bytes) -> None:
    names = {k.name.partition("/")[0] for k in ort_cpu.audit(file) if k.kernel == kernel}
    assert names == {"a"}
