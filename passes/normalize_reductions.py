"""normalize-reductions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.matcher import attribute
from qatgraph.rewriting.passes import GraphPass, within

# operations along axes: which axis they take is what patterns look at
ALONG = frozenset({
    "all", "amax", "amin", "any", "argmax", "argmin", "linalg_vector_norm", "log_softmax", "logsumexp", "max", "mean",
    "min", "prod", "safe_softmax", "softmax", "std", "sum", "var", "var_mean",
})  # fmt: skip
aten: Any = torch.ops.aten


@dataclass(frozen=True)
class NormalizeReductions(GraphPass):
    """Write every reduction in one way, so that patterns need to know only that one.

    What: axes are counted from the end; ``var`` says its correction; ``var_mean`` becomes ``var`` and ``mean``; a
        softmax does not name the type that its input has.
    Why: ``mean(x, [2])`` and ``mean(x, [-1])`` of a value of rank 3 are one thing.
    Before and after: ``softmax(x, 3, dtype=float32)`` becomes ``softmax(x, -1)``.
    Refuses: nothing; a reduction over all axes has none to count.
    Numerics: within 1e-12 in float64 (``var_mean`` computes its mean in another order).
    """

    name = "normalize-reductions"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-12)

    def apply(self, graph: Graph, edit: Edit) -> None:
        for node in graph.nodes:
            if record(node).kind == "var_mean":
                _part(node, edit)
        for node in graph.nodes:
            if record(node).kind in ALONG:
                call = _normal(node)
                if call != (node.target, node.args, dict(node.kwargs)):
                    operator, args, kwargs = call
                    edit.replace(node, edit.operator(operator, *args, at=node, **kwargs))


def _part(node: fx.Node, edit: Edit) -> None:
    """``var_mean`` whose results are taken one by one -> ``var`` and ``mean``."""
    x, dim, keepdim = (attribute(node, name) for name in ("self", "dim", "keepdim"))
    for user in list(node.users):
        if user.args[1] == 0:
            options = {"correction": _correction(node), "keepdim": keepdim}
            new = edit.operator(aten.var.correction, x, dim, at=user, near=node, **options)
        else:
            new = edit.operator(aten.mean.dim, x, dim, keepdim, at=user, near=node)
        edit.replace(user, new)
    edit.erase(node)


def _normal(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The operator and the arguments of the one spelling."""
    x: Any = node.args[0]
    if not isinstance(value_of(x), torch.Tensor):
        return node.target, node.args, dict(node.kwargs)
    rank = value_of(x).ndim
    if record(node).kind == "var" and attribute(node, "dim") is not None:
        options = {"correction": _correction(node), "keepdim": attribute(node, "keepdim")}
        return aten.var.correction, (x, _from_the_end(attribute(node, "dim"), rank)), options
    args = list(node.args)
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    if "dim" in names[: len(args)]:
        args[names.index("dim")] = _from_the_end(args[names.index("dim")], rank)
    kwargs = dict(node.kwargs)
    if record(node).kind != "softmax" or attribute(node, "dtype") not in (None, value_of(x).dtype):
        return node.target, tuple(args), kwargs
    return (node.target if attribute(node, "half_to_float") else aten.softmax.int), tuple(args[:2]), {}


def _from_the_end(dim: Any, rank: int) -> Any:
    if isinstance(dim, (list, tuple)):
        return [_from_the_end(d, rank) for d in dim]
    return dim - rank if isinstance(dim, int) and dim >= 0 and rank else dim


def _correction(node: fx.Node) -> Any:
    unbiased = attribute(node, "unbiased")
    given = attribute(node, "correction") if unbiased is None else int(unbiased)
    return 1 if given is None else given
