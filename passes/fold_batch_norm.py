"""fold-batch-norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Any, Const, Match, Op, Opt

_LAYER = Op(
    "conv1d|conv2d|conv3d|conv_transpose1d|conv_transpose2d|linear",
    Any("x"), Const("weight"), Opt(Const("bias")), name="layer", users=1,
)  # fmt: skip


@dataclass(frozen=True)
class FoldBatchNorm(RewritePass):
    """Fold the batch norm behind a convolution or a linear into its weight and bias.

    What: ``w * gamma / sqrt(var + eps)`` and the matching bias become new parameters (Jacob et al., arXiv:1712.05877).
    Why: the engine runs one kernel, and the weight that is quantized is the one that is deployed.
    Before and after: conv2d, batch_norm become one conv2d over ``weight/folded`` and ``bias/folded``.
    Refuses: a layer that something else reads; a batch norm in training mode.
    Numerics: within 1e-5 (new parameters are rounded to float32).
    """

    name = "fold-batch-norm"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-5)
    pattern = Op(
        "batch_norm", _LAYER, Opt(Const("gamma")), Opt(Const("beta")), Const("mean"), Const("variance"),
        name="norm", where={"training": False},
    )  # fmt: skip

    def rewrite(self, match: Match, edit: Edit) -> None:
        layer, norm = match["layer"], match["norm"]
        path = str(match["weight"].target)
        trains = edit.graph.parameter(match["weight"]).requires_grad  # type: ignore[union-attr]
        paths = (f"{path}/folded", f"{path.removesuffix('weight')}bias/folded")
        folded = [
            edit.parameter(p, value.float().requires_grad_(trains), at=norm)
            for p, value in zip(paths, _weight_and_bias(match, edit.graph), strict=True)
        ]
        args = (layer.args[0], *folded, *layer.args[3:])
        new = edit.operator(layer.target, *args, at=norm, near=layer, **layer.kwargs)
        edit.replace(layer, new)  # the layer keeps its name
        edit.bypass(norm, new)


def _weight_and_bias(match: Match, graph: Graph) -> tuple[torch.Tensor, torch.Tensor]:
    def tensor(name: str) -> torch.Tensor | None:
        found = graph.parameter(match[name]) if name in match else None
        return None if found is None else found.detach().double()

    weight, mean, variance = tensor("weight"), tensor("mean"), tensor("variance")
    assert weight is not None
    assert mean is not None
    assert variance is not None
    gamma, beta, bias = tensor("gamma"), tensor("beta"), tensor("bias")
    factor = torch.rsqrt(variance + attribute(match["norm"], "eps")) * (1.0 if gamma is None else gamma)
    shift = (0.0 if beta is None else beta) + ((0.0 if bias is None else bias) - mean) * factor
    return _scaled(match["layer"], weight, factor), shift


def _scaled(layer: fx.Node, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Each output channel times its factor; a transposed convolution has them on axis 1, by group."""
    if not record(layer).kind.startswith("conv_transpose"):
        return weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    groups = int(attribute(layer, "groups"))
    split = weight.reshape(groups, -1, *weight.shape[1:])
    return (split * factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)
