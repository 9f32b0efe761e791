"""Pools and convolutions that ONNX Runtime's kernels take, and those that they do not: no batch, ceil_mode, grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qatgraph as qg
from qatgraph.backends import ort_cpu
from qatgraph.conversion import convert
from qatgraph.errors import LowerError
from qatgraph.ir.graph import Graph
from qatgraph.planning.target import Target, load_target
from qatgraph.proof import prove
from qatgraph.quantizers.fake_quantize import ActivationFakeQuantize
from qatgraph.report.report import Report
from tests.false_rows import with_row
from tests.lowered import Lowered
from tests.models import floats
from tests.zoo.road import NATIVE

ORT = load_target("ort-cpu")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MAX = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
AVERAGE = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)


class Between(nn.Module):
    """A function between two convolutions, from four channels to sixteen, over so many axes."""

    def __init__(self, function: Callable[[Tensor], Tensor], axes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (CONVS[axes - 1](channels, 16, 1) for channels in (4, 16))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x)))
        return y


def made(function: Callable[[Tensor], Tensor], shape: Sequence[int], axes: int, target: str | Target = ORT) -> Lowered:
    model = Between(function, axes).eval()
    graph = qg.capture(model, floats(*shape))
    plan = qg.plan(graph, target)
    qat = qg.prepare(graph, plan).eval()
    qg.calibrate(qat, [floats(*shape, seed=s) for s in (1, 2)], progress=False)
    return Lowered(model, qat, plan, ort_cpu.lower(convert(Graph.of(qat)), plan))


def verified(found: Lowered, shape: Sequence[int]) -> Report:
    return prove(NATIVE, found.qat, found.file, [floats(*shape, seed=3)], found.model)


def without(**fields: object) -> Target:
    """The table in which no row asks for one thing."""
    table = ORT
    for row in ORT.row:
        if all(getattr(row, name) for name in fields) or ("beyond" in fields and row.beyond is not None):
            table = with_row(table, row.model_copy(update=fields))
    return table


# ---------------------------------------------------------------- without samples

SINGLE = {
    "conv": (lambda x: x, 2), "max_pool1d": (lambda x: MAX[0](x, 2), 1), "max_pool2d": (lambda x: MAX[1](x, 2), 2),
    "avg_pool1d": (lambda x: AVERAGE[0](x, 2), 1), "avg_pool2d": (lambda x: AVERAGE[1](x, 2), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_what_has_no_axis_of_samples_stays_in_float_and_says_why(name: str) -> None:
    function, axes = SINGLE[name]
    found = made(function, (4, *[6] * axes), axes)
    assert found.plan.int8_nodes() == []
    assert any("the row is for batches" in a.why_lost for d in found.plan.decisions for a in d.lost)
    assert verified(found, (4, *[6] * axes)).failures == []
    batched = made(function, (1, 4, *[6] * axes), axes)
    assert len(batched.plan.int8_nodes()) == len(batched.plan.placements)


def test_a_table_that_does_not_ask_for_samples_is_found_out() -> None:
    with pytest.raises((AssertionError, KeyError)):
        assert verified(made(SINGLE["max_pool2d"][0], (4, 6, 6), 2, without(batched=False)), (4, 6, 6)).failures == []


# ---------------------------------------------------------------- ceil_mode


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_windows_that_reach_beyond_the_input_are_proved(axes: int) -> None:
    def pools(x: Tensor) -> Tensor:
        x = MAX[axes - 1](x, 3, 2, 1, ceil_mode=True)
        x = AVERAGE[axes - 1](x, 3, 1, 1, ceil_mode=True, count_include_pad=False)
        return AVERAGE[axes - 1](x, 3, 2, ceil_mode=True)

    shape = (2, 4, *[14] * axes) if axes < 3 else (2, 4, 6, 6, 6)
    found = made(pools, shape, axes)
    report = verified(found, shape)
    assert (len(found.plan.int8_nodes()), report.failures) == (5, [])
    assert report.fidelity["engine_to_fake_quantized"]["cosine_min"] > 0.9999


def test_an_average_that_counts_what_lies_beyond_stays_in_float() -> None:
    def pool(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 3, 2, 1, ceil_mode=True)

    found = made(pool, (2, 4, 6, 6), 2)
    assert "Between:avg_pool2d" not in found.plan.int8_nodes()
    assert verified(found, (2, 4, 6, 6)).failures == []
    false = made(pool, (2, 4, 6, 6), 2, without(beyond=None))
    assert "Between:avg_pool2d" in false.plan.int8_nodes()
    report = verified(false, (2, 4, 6, 6))
    assert report.failures or report.fidelity["engine_to_fake_quantized"]["cosine_min"] < 0.999


# ---------------------------------------------------------------- grids that a kernel cannot write


def averages(target: Target) -> Lowered:
    """Of values that nearly cancel: their range is less than one step of the input."""

    class Cancelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 16, 1)
            with torch.no_grad():
                self.first.weight.copy_(torch.eye(16)[:, :, None, None])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.first(x).mean((2, 3), keepdim=True))
            return y

    x = torch.ones(2, 16, 8, 8) * torch.tensor([1.0, -1.0]).repeat(4)
    x[..., 0, 0] += 1e-3
    torch.manual_seed(0)
    model = Cancelled().eval()
    graph = qg.capture(model, x)
    plan = qg.plan(graph, target, qg.Recipe(observer="minmax"))
    qat = qg.prepare(graph, plan).eval()
    qg.calibrate(qat, [x], progress=False)
    return Lowered(model, qat, plan, ort_cpu.lower(convert(Graph.of(qat)), plan))


def shares(found: Lowered) -> list[float]:
    scales = [float(m.scale) for m in found.qat.modules() if isinstance(m, ActivationFakeQuantize)]
    return [b / a for a, b in pairwise(scales)]


def test_a_global_average_has_no_finer_grid_than_its_kernel_can_write() -> None:
    found = averages(ORT)
    assert min(shares(found)) == pytest.approx(1 / 128)
    assert found.run(torch.ones(2, 16, 8, 8))
    false = averages(without(finest=0.0))
    assert min(shares(false)) < 1 / 256
    with pytest.raises(LowerError, match="QG508"):
        false.run(torch.ones(2, 16, 8, 8))
