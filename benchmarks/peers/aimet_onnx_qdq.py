# /// script
# dependencies = ["aimet-onnx==2.42.0"]
# ///
"""AIMET on the ONNX file: ``QuantizationSimModel`` with its defaults, exported as Q/DQ with ``to_onnx_qdq``."""

from __future__ import annotations

import onnx
from aimet_onnx import QuantizationSimModel
from material import asked, batches

folder, out = asked()
sim = QuantizationSimModel(onnx.load(folder / "float.onnx"))
sim.compute_encodings(batches(folder / "calibrate.npz"))
onnx.save(sim.to_onnx_qdq(), out)
