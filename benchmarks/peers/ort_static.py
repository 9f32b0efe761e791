# /// script
# dependencies = ["onnxruntime==1.32.0", "onnx==1.23.2"]
# ///
"""ONNX Runtime's own quantizer: ``quantize_static`` with its defaults, behind the pre-processing that it asks for."""

from __future__ import annotations

from material import Reader, asked
from onnxruntime.quantization import quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

folder, out = asked()
prepared = out.with_suffix(".prepared.onnx")
quant_pre_process(folder / "float.onnx", prepared, skip_symbolic_shape=True)  # which fails on the length of the encoder
quantize_static(prepared, out, Reader(folder))
