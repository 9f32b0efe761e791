# /// script
# dependencies = ["nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.32.0"]
# ///
"""NNCF on the ONNX file: ``nncf.quantize`` with its defaults, as its ONNX examples do."""

from __future__ import annotations

import nncf
import onnx
from material import asked, batches

folder, out = asked()
calibration = nncf.Dataset(batches(folder / "calibrate.npz"))
onnx.save(nncf.quantize(onnx.load(folder / "float.onnx"), calibration), out)
