"""An operation of one's own on the whole road, from the model to ONNX Runtime: python examples/custom_operation.py"""

from pathlib import Path

import torch
from torch import nn

import qatgraph as qg


@torch.library.custom_op("mylib::swish", mutates_args=())
def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


@swish.register_fake
def shape(x):
    return torch.empty_like(x)


def gradient(ctx, grad):
    (x,) = ctx.saved_tensors
    s = torch.sigmoid(x)
    return grad * s * (1 + x * (1 - s))


swish.register_autograd(gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
qg.register_operation(swish, onnx=qg.OnnxOp("com.microsoft::QuickGelu", alpha=1.0))


class FuseLinearSwish(qg.RewritePass):
    """Group a linear with the swish that follows it."""

    name = "fuse-linear-swish"
    pattern = qg.Op("mylib.swish", qg.Op("linear", name="fc", users=1), name="swish")

    def rewrite(self, match, edit):
        edit.group("linear_swish", match["fc"], match["swish"])


class Swish(nn.Module):
    def forward(self, x):
        return swish(x)


def main(target, file):
    model = nn.Sequential(nn.Linear(16, 32), Swish(), nn.Linear(32, 16))
    batches, passes = [torch.randn(2, 5, 16) for _ in range(4)], [FuseLinearSwish()]
    graph = qg.capture(model, batches[0])
    plan = qg.plan(graph, target, passes=passes)
    qat = qg.prepare(graph, plan, passes=passes)
    qg.calibrate(qat, batches)
    qg.distill(qat, model, batches)
    return plan, qg.verify(qat, qg.lower(qat, file), batches, float_model=model)


if __name__ == "__main__":
    plan, report = main(str(Path(__file__).with_suffix(".toml")), "custom_operation.onnx")
    print(plan, report.to_markdown(), sep="\n")
