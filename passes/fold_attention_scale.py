"""fold-attention-scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qatgraph.ir.meta import record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Any, Const, Match, Moved, Op, Opt, Refusal


@dataclass(frozen=True)
class FoldAttentionScale(RewritePass):
    """Fold the scale of the attention scores into the query projection.

    What: weight and bias of the query are multiplied by the scale, and the attention keeps a scale of 1.
    Why: TensorRT fuses attention only when the scale is applied before the first product.
    Before and after: ``attention(q(x), k, v, scale=s)`` becomes ``attention((s q)(x), k, v, scale=1)``.
    Refuses: a query that something else reads. An attention whose scale is 1 already does not match.
    Numerics: within 1e-6 (new parameters are rounded to float32).
    """

    name = "fold-attention-scale"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-6)
    pattern = Op(
        "attention", Moved(Op("linear", Any("x"), Const("weight"), Opt(Const("bias")), name="query", users=1)),
        Any("key"), Any("value"), name="attention", where={"scale": lambda scale: scale != 1.0},
    )  # fmt: skip

    def check(self, match: Match) -> Refusal | None:
        shared = next((n for n in match.nodes if n is not match.root and len(n.users) > 1), None)
        return match.refuse(f"'{record(shared).name}' has {len(shared.users)} users") if shared is not None else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        scale, query, attention = self._scale(match), match["query"], match["attention"]
        folded = []
        for name in ("weight", "bias"):
            if name in match:
                tensor = edit.graph.parameter(match[name])
                assert tensor is not None
                path = f"{match[name].target}/folded"
                folded.append(
                    edit.parameter(path, (tensor * scale).detach().requires_grad_(tensor.requires_grad), at=query)
                )
        edit.replace(query, edit.call("linear", match["x"], *folded, at=query))
        kwargs = {**attention.kwargs, "scale": 1.0}
        edit.replace(attention, edit.operator(attention.target, *attention.args, at=attention, **kwargs))

    def _scale(self, match: Match) -> float:
        given = match["attention"].kwargs.get("scale")
        return (
            float(given) if given is not None else 1.0 / math.sqrt(int(value_of(match["attention"].args[0]).shape[-1]))
        )
