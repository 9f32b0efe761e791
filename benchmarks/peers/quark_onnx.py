# /// script
# dependencies = ["torch==2.13.0", "amd-quark==0.13", "onnx==1.22.0", "onnxruntime==1.32.0"]
# ///
"""AMD Quark on the ONNX file: its configuration ``A8W8``, the 8-bit one for CPUs and GPUs."""

from __future__ import annotations

from material import Reader, asked
from quark.onnx import ModelQuantizer, QConfig

folder, out = asked()
ModelQuantizer(QConfig.get_default_config("A8W8")).quantize_model(folder / "float.onnx", out, Reader(folder))
