"""Bias correction: the mean of each output channel is that of the float model; what it may not touch stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qatgraph as qg
from qatgraph import bias_correction
from qatgraph.errors import TrainError
from qatgraph.ir.graph import Graph
from qatgraph.proof import prove
from qatgraph.quantizers.fake_quantize import FakeQuantize
from tests.models import ZOO
from tests.zoo.road import NATIVE

SHIFT_LIMIT = 1e-5  # of a layer's largest mean: float32 sums


class Uneven(nn.Module):
    """A depthwise convolution on few, skewed weights, and a linear: rounding shifts their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.mix = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.depth.weight.mul_(torch.logspace(0, -2, 9).reshape(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.mix(torch.relu(self.depth(x)))).mean((2, 3)))
        return y


def images(seed: int) -> Tensor:
    return torch.rand(8, 6, 8, 8, generator=torch.Generator().manual_seed(seed)) + 0.5


BATCHES = [images(0), images(1)]


def calibrated(model: nn.Module, batches: list[Tensor] = BATCHES) -> nn.Module:
    graph = qg.capture(model, batches[0], {"x": {0: "batch"}})
    qat = qg.prepare(graph, qg.plan(graph)).eval()
    qg.calibrate(qat, batches, progress=False)
    return qat


def means(qat: nn.Module, *, quantized: bool = True) -> dict[str, Tensor]:
    """Of each output channel of each layer over all batches."""
    found: dict[str, list[Tensor]] = {}
    graph = Graph.prepared(qat)
    quantizers = [m for m in qat.modules() if isinstance(m, FakeQuantize)]
    for module in quantizers:
        module.on = quantized
    for batch in BATCHES:
        recorder = torch.fx.Interpreter(graph.module, garbage_collect_values=False)
        with torch.no_grad():
            recorder.run(batch, enable_io_processing=False)
        for name in ("depth:conv2d", "mix:conv2d", "head:linear"):
            value = recorder.env[graph.node(name)]
            found.setdefault(name, []).append(value.transpose(1, -1).reshape(-1, value.shape[1]).double().mean(0))
    for module in quantizers:
        module.on = True
    return {name: torch.stack(each).mean(0) for name, each in found.items()}


def shift(qat: nn.Module, wanted: dict[str, Tensor]) -> float:
    """The largest distance of a mean from the float model's, over the largest mean."""
    have = means(qat)
    return max(float((have[n] - wanted[n]).abs().max() / wanted[n].abs().max()) for n in wanted)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Uneven().eval()


def test_every_mean_is_that_of_the_float_model() -> None:
    qat = calibrated(model())
    wanted = means(qat, quantized=False)
    assert shift(qat, wanted) > 100 * SHIFT_LIMIT
    qg.correct_biases(qat, BATCHES, progress=False)
    assert shift(qat, wanted) < SHIFT_LIMIT


def test_a_layer_is_corrected_on_what_the_corrected_layers_before_it_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the shift goes into the bias, but not into what the layers behind read."""
    qat = calibrated(model())
    wanted = means(qat, quantized=False)
    monkeypatch.setattr(bias_correction, "_put_into", lambda run, node, shift: None)
    qg.correct_biases(qat, BATCHES, progress=False)
    assert shift(qat, wanted) > SHIFT_LIMIT


def test_the_output_comes_nearer_to_the_float_model() -> None:
    net = model()
    qat, unseen = calibrated(net), images(7)
    with torch.no_grad():
        wanted, before = net(unseen), (qat(unseen) - net(unseen)).abs().mean()
        qg.correct_biases(qat, BATCHES, progress=False)
        assert (qat(unseen) - wanted).abs().mean() < 0.5 * before


def test_the_model_of_the_user_and_all_but_biases_stay() -> None:
    net = model()
    qat = calibrated(net)
    before = {n: p.clone() for n, p in qat.named_parameters()}
    own = {n: p.clone() for n, p in net.named_parameters()}
    qat.train()
    qg.correct_biases(qat, BATCHES, progress=False)
    assert qat.training
    changed = {n for n, p in qat.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"depth.bias", "mix.bias", "head.bias"}
    assert all(torch.equal(p, own[n]) for n, p in net.named_parameters())


def test_layers_in_float_and_without_a_bias_stay() -> None:
    torch.manual_seed(0)
    net = Uneven().eval()
    net.mix = nn.Conv2d(6, 8, 1, bias=False)
    graph = qg.capture(net, BATCHES[0], {"x": {0: "batch"}})
    recipe = qg.Recipe(override=(qg.Override(select="head:linear", place="float"),))
    qat = qg.prepare(graph, qg.plan(graph, recipe=recipe)).eval()
    qg.calibrate(qat, BATCHES, progress=False)
    before = {n: p.clone() for n, p in qat.named_parameters()}
    qg.correct_biases(qat, BATCHES, progress=False)
    assert {n for n, p in qat.named_parameters() if not torch.equal(p, before[n])} == {"depth.bias"}


def test_what_was_corrected_lowers_and_is_proved(tmp_path: Path) -> None:
    case = ZOO["images"]
    graph = case.capture()
    qat = qg.prepare(graph, qg.plan(graph)).eval()
    batches = [case.inputs(seed) for seed in (1, 2)]
    qg.calibrate(qat, batches, progress=False)
    qg.correct_biases(qat, batches, progress=False)
    file = qg.lower(qat, tmp_path / "images.onnx")
    report = prove(NATIVE, qat, file.read_bytes(), batches, None)
    assert report.ok


Refused = Callable[[], None]


def uncalibrated() -> None:
    graph = qg.capture(model(), BATCHES[0])
    qg.correct_biases(qg.prepare(graph, qg.plan(graph)), BATCHES, progress=False)


def diverged() -> None:
    qat = calibrated(model())
    with torch.no_grad():
        qat.get_parameter("mix.bias").fill_(torch.inf)
    qg.correct_biases(qat, BATCHES, progress=False)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda: qg.correct_biases(calibrated(model()), [], progress=False), "QG701"),
        (uncalibrated, "QG707"),
        (diverged, "QG702"),
    ],
)
def test_it_is_refused_in_words(call: Refused, code: str) -> None:
    with pytest.raises(TrainError) as caught:
        call()
    assert caught.value.code == code
