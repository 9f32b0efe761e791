"""What stands beside a linear decides the engine's kernel: the file keeps what the plan promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qatgraph.backends import ort_cpu
from qatgraph.kernels import owner
from qatgraph.planning.recipe import Override, Recipe
from tests.lowered import lower
from tests.models import BATCH, ZOO, Case, floats
from tests.test_proof import verify


@pytest.fixture(autouse=True)
def no_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cpu, "can_emulate", lambda: False)


class Pooler(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(x))


FUSED = {
    "BiasGelu": (ZOO["encoder"], "layer.0.mlp.up:linear", "layer.0.mlp.gelu:gelu"),
    "FusedGemm": (Case(Pooler, ZOO["mlp"].inputs, ZOO["mlp"].dynamic), "dense:linear", "dense:linear"),
}


@pytest.mark.parametrize("kernel", FUSED)
def test_a_float_kernel_that_the_engine_names_anew_is_known_by_its_result(kernel: str, tmp_path: Path) -> None:
    case, pinned, name = FUSED[kernel]
    found = lower(case, Recipe(override=(Override(select=pinned, place="float"),)))
    verify(found, tmp_path, [case.inputs(3)]).check()
    assert kernel in {k.kernel for k in ort_cpu.audit(found.file) if owner(k.name) == name}


class Chain(torch.nn.Module):
    """Two linears with something between them."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor], bias: bool) -> None:
        super().__init__()
        self.first, self.last = (torch.nn.Linear(32, 32, bias=bias) for _ in range(2))
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.between(self.first(x)))
        return y


BETWEEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nothing": lambda y: y,
    "dropout": lambda y: torch.nn.functional.dropout(y, 0.1, training=False),
    "a view": lambda y: y.view(-1, 2, 4, 4).transpose(1, 2).reshape(-1, 1, 32),
    "a relu": torch.relu,
    "a gelu by tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("between", BETWEEN)
def test_two_linears_are_proved_whatever_stands_between(between: str, rank: int, bias: bool, tmp_path: Path) -> None:
    def inputs(seed: int) -> torch.Tensor:
        return floats(*(4, 3, 32) if rank == 3 else (4, 32), seed=seed)

    found = lower(Case(lambda: Chain(BETWEEN[between], bias), inputs, {"x": BATCH}))
    report = verify(found, tmp_path, [inputs(3)])
    report.check()
    assert report.kernels["planned"] == report.kernels["realized"]
    assert report.parity["regions"] == 2
    products = {k.kernel for k in ort_cpu.audit(found.file) if k.int8 and not k.moves}
    assert products <= {"QGemm", "MatMulIntegerToFloat", "QLinearMatMul"}


class PostNorm(torch.nn.Module):
    """``norm(x + fc(x))``: one side of the residual is the input of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = torch.nn.Linear(32, 32), torch.nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(x + self.fc(x))
        return y


def test_a_residual_of_the_input_keeps_the_layer_norm_apart(tmp_path: Path) -> None:
    found = lower(Case(PostNorm, lambda seed: floats(4, 3, 32, seed=seed), {"x": BATCH}))
    verify(found, tmp_path, [floats(4, 3, 32, seed=3)]).check()
    assert {"Sum", "LayerNormalization"} <= {k.kernel for k in ort_cpu.audit(found.file)}
