"""fold-batch-norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qatgraph.ir.graph import Graph
from qatgraph.ir.masks import weight_of
from qatgraph.ir.meta import record
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.channels import LAYERS, Channels
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Alt, Any, Const, Match, Op, Opt, Refusal

_LAYER = Op(
    "|".join(LAYERS), Any("x"), Alt(Op("mul", Const("weight"), Const("mask"), name="masked", users=1), Const("weight")),
    Opt(Const("bias")), name="layer", users=1,
)  # fmt: skip


@dataclass(frozen=True)
class FoldBatchNorm(RewritePass):
    """Fold the batch norm behind a convolution or a linear into its weight and bias.

    What: ``w * gamma / sqrt(var + eps)`` and the matching bias become new parameters (Jacob et al., arXiv:1712.05877).
    Why: the engine runs one kernel, and the weight that is quantized is the one that is deployed.
    Before and after: conv2d, batch_norm become one conv2d over ``weight/folded`` and ``bias/folded``.
    Refuses: a layer that something else reads; a batch norm in training mode. A weight behind a pruning mask stays
        behind it.
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

    def check(self, match: Match) -> Refusal | None:
        if weight_of(match["layer"].args[1]) is None:
            return match.refuse(f"'{record(match['masked']).name}' is no weight behind a mask")
        return None

    def rewrite(self, match: Match, edit: Edit) -> None:
        layer, norm = match["layer"], match["norm"]
        source = weight_of(layer.args[1])
        assert source is not None
        path, trains = str(source.parameter.target), source.stored.requires_grad
        stem = path.removesuffix("weight") if path.endswith("weight") else f"{path}/"
        paths = (f"{path}/folded", f"{stem}bias/folded")
        weight, bias = (
            edit.parameter(p, value.float().requires_grad_(trains), at=layer)
            for p, value in zip(paths, _weight_and_bias(source.stored, match, edit.graph), strict=True)
        )
        if source.mask is not None:
            product = match["masked"]
            weight = edit.operator(product.target, weight, source.mask, at=layer, near=product)
            edit.replace(product, weight)
        args = (layer.args[0], weight, bias, *layer.args[3:])
        new = edit.operator(layer.target, *args, at=norm, near=layer, **layer.kwargs)
        edit.replace(layer, new)  # the layer keeps its name
        edit.bypass(norm, new)


def _weight_and_bias(weight: torch.Tensor, match: Match, graph: Graph) -> tuple[torch.Tensor, torch.Tensor]:
    def tensor(name: str) -> torch.Tensor | None:
        found = graph.parameter(match[name]) if name in match else None
        return None if found is None else found.detach().double()

    mean, variance = tensor("mean"), tensor("variance")
    assert mean is not None
    assert variance is not None
    gamma, beta, bias = tensor("gamma"), tensor("beta"), tensor("bias")
    factor = torch.rsqrt(variance + attribute(match["norm"], "eps")) * (1.0 if gamma is None else gamma)
    shift = (0.0 if beta is None else beta) + ((0.0 if bias is None else bias) - mean) * factor
    return Channels.of(match["layer"]).scaled(weight.detach().double(), output=factor), shift
