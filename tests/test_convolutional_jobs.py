"""The jobs digits_cnn and efficientnet_lite0: their data, their float models, and that capture keeps both exactly."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qatgraph as qg
from qatgraph.fidelity import top1
from qatgraph.ir.graph import Graph
from qatgraph.job import JobData, factory, load_job, make

JOBS = Path(__file__).parent.parent / "examples" / "jobs"
DIGITS, LITE = JOBS / "digits_cnn.toml", JOBS / "efficientnet_lite0.toml"
Crops = Sequence[Any]
PALACE, DAISY = 698, 985  # of the 1000 classes of ImageNet


def lite(name: str) -> Any:
    return factory(LITE, f"efficientnet_lite0.py:{name}", "data")


def built(path: Path, **options: Any) -> nn.Module:
    job = load_job(path)
    model: nn.Module = make(path, job.model, "model", 0, {**job.model_options, **options})
    return model


def data(path: Path) -> JobData:
    job = load_job(path)
    found: JobData = make(path, job.data, "data", 0, job.data_options)
    return found


# ---------------------------------------------------------------- data


def no_image_is_on_both_sides(train: Sequence[torch.Tensor], evaluate: Sequence[torch.Tensor]) -> None:
    known, unseen = (
        {hashlib.sha256(x.numpy().tobytes()).digest() for batch in side for x in batch} for side in (train, evaluate)
    )
    assert not known & unseen


def test_no_digit_trains_and_is_evaluated() -> None:
    found = data(DIGITS)
    train, evaluate = ([b for b in side if isinstance(b, torch.Tensor)] for side in (found.train, found.evaluate))
    assert (sum(map(len, train)), sum(map(len, evaluate))) == (1198, 599)
    assert found.labels is not None
    assert [len(y) for y in found.labels] == [len(x) for x in evaluate]
    no_image_is_on_both_sides(train, evaluate)
    with pytest.raises(AssertionError):
        no_image_is_on_both_sides([*train, evaluate[3][7:8]], evaluate)


def overlapping(known: Crops, unseen: Crops) -> list[Any]:
    """Crops that share a pixel with one of the other side."""

    def share(a: Any, b: Any) -> bool:
        same = (a.package, a.name) == (b.package, b.name)
        return same and max(a.left, b.left) < min(a.right, b.right) and max(a.top, b.top) < min(a.bottom, b.bottom)

    return [b for b in unseen if any(share(a, b) for a in known)]


def test_no_crop_that_is_evaluated_overlaps_one_that_calibrates_or_trains() -> None:
    known, unseen = lite("split")()
    assert (len(known), len(unseen)) == (240, 240)
    assert len({*known, *unseen}) == 480
    assert overlapping(known, unseen) == []
    corner = dataclasses.replace(known[17], left=known[17].right - 1, right=known[17].right + 50)
    beside = dataclasses.replace(known[0], left=10_000, right=10_100)
    assert overlapping(known, [*unseen, beside, corner]) == [corner]


def test_the_two_sides_are_of_different_photographs() -> None:
    sides = [
        {lite("photograph")(*p).tobytes() for p in {(c.name, c.package) for c in side}} for side in lite("split")()
    ]
    assert [len(s) for s in sides] == [5, 5]
    assert not sides[0] & sides[1]


def test_a_crop_lies_within_its_photograph() -> None:
    every = [crop for side in lite("split")() for crop in side]
    sizes = {p: lite("photograph")(*p).size for p in {(c.name, c.package) for c in every}}
    for crop in every:
        width, height = sizes[crop.name, crop.package]
        assert 0 <= crop.left < crop.right <= width
        assert 0 <= crop.top < crop.bottom <= height
        assert crop.right - crop.left == crop.bottom - crop.top >= 0.4 * min(width, height) - 1


def test_a_batch_is_eight_images_of_the_size_and_range_that_the_network_takes() -> None:
    known, _ = lite("split")()
    (batch,) = lite("batches")(known[:8])
    assert (batch.dtype, tuple(batch.shape)) == (torch.float32, (8, 3, 224, 224))
    assert float(batch.min()) >= -127 / 128
    assert 0.5 < float(batch.max()) <= 1.0
    assert torch.equal(lite("batches")(known[:8])[0], batch)


# ---------------------------------------------------------------- float models


def probability(net: nn.Module, name: str, label: int, shift: float = 0.0) -> float:
    """Of a class, for the middle 87.5 % of a photograph, as the network's authors evaluate."""
    image = lite("photograph")(name, "sklearn.datasets.images")
    side = int(0.875 * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    crop = lite("Crop")("sklearn.datasets.images", name, left, top, left + side, top + side)
    with torch.no_grad():
        return float(net(lite("pixels")(image, crop)[None] + shift).softmax(1)[0, label])


def test_the_pretrained_network_knows_the_palace_and_the_daisy() -> None:
    net = built(LITE)
    assert probability(net, "china.jpg", PALACE) == pytest.approx(0.36, abs=0.005)
    assert probability(net, "flower.jpg", DAISY) == pytest.approx(0.33, abs=0.005)
    assert probability(net, "flower.jpg", DAISY, shift=1.0) < 0.3  # another normalization is another image


@pytest.fixture(scope="module")
def digits() -> nn.Module:
    return built(DIGITS, epochs=10)  # a quarter of the job's


def test_the_small_network_reads_digits(digits: nn.Module) -> None:
    found = data(DIGITS)
    assert found.labels is not None
    with torch.no_grad():
        assert top1([digits(x) for x in found.evaluate], found.labels)["top1"] >= 0.95
        untrained = built(DIGITS, epochs=0)
        assert top1([untrained(x) for x in found.evaluate], found.labels)["top1"] < 0.5


def canonical(path: Path, net: nn.Module, example: torch.Tensor) -> Graph:
    return qg.canonicalize(qg.capture(net, example, load_job(path).shapes(), output_names=load_job(path).outputs))


def folded_exactly(net: nn.Module, graph: Graph, x: torch.Tensor, **activations: int) -> None:
    with torch.no_grad():
        want = net(x)
        assert float((graph.run(x) - want).abs().max()) <= 1e-5 * float(want.abs().max())
    names = Counter(str(n.target).split(".")[1] for n in graph.nodes if n.op == "call_function")
    assert not any("batch_norm" in name for name in names)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in graph.module.modules())
    assert names["conv2d"] == sum(isinstance(m, nn.Conv2d) for m in net.modules()) > 5
    assert {name: names[name] for name in ("relu", "clamp") if names[name]} == activations


def test_every_batch_norm_of_the_small_network_is_folded(digits: nn.Module) -> None:
    x = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = canonical(DIGITS, digits, x)
    folded_exactly(digits, graph, x, relu=6)
    with torch.no_grad():
        next(p for n, p in graph.module.named_parameters() if p.ndim == 4).add_(1e-2)
    with pytest.raises(AssertionError):
        folded_exactly(digits, graph, x, relu=6)


@pytest.mark.slow
def test_every_batch_norm_of_the_pretrained_network_is_folded() -> None:
    net, (x,) = built(LITE), lite("batches")(lite("split")()[1][:2])
    graph = canonical(LITE, net, x)
    folded_exactly(net, graph, x, clamp=33)
    with pytest.raises(AssertionError):
        folded_exactly(net, qg.capture(net, x, load_job(LITE).shapes()), x, clamp=33)
