# /// script
# dependencies = ["nvidia-modelopt[onnx]==0.47.0", "torch==2.13.0"]
# ///
"""NVIDIA ModelOpt on the ONNX file: ``quantize`` to int8 on the CPU, the rest of the model in float32.

The calibration data is one array for each input: batches of other lengths are padded with zeros, which the mask hides.
"""

from __future__ import annotations

import numpy as np
from material import asked, batches
from modelopt.onnx.quantization import quantize

folder, out = asked()
feeds = batches(folder / "calibrate.npz")
sizes = {name: np.max([feed[name].shape[1:] for feed in feeds], axis=0) for name in feeds[0]}


def padded(array: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.pad(array, [(0, 0), *((0, size - have) for size, have in zip(sizes, array.shape[1:], strict=True))])


data = {name: np.concatenate([padded(feed[name], sizes[name]) for feed in feeds]) for name in feeds[0]}
quantize(
    str(folder / "float.onnx"),
    quantize_mode="int8",
    calibration_data=data,
    calibration_eps=["cpu"],
    high_precision_dtype="fp32",
    output_path=str(out),
)
