"""merge-query-key-value."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qatgraph.ir.meta import record, value_of
from qatgraph.ir.stages import Stage
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import RewritePass, within
from qatgraph.rewriting.pattern import Any, Const, Group, Match, Op, Opt, Refusal


def _projection(name: str) -> Op:
    return Op("linear", Any("x"), Const(f"{name}.weight"), Opt(Const(f"{name}.bias")), name=name)


@dataclass(frozen=True)
class MergeQueryKeyValue(RewritePass):
    """Compute the query, key and value projections of one input as one linear.

    What: three linears that read one value become one over the stacked weights, and three slices of its result.
    Why: one wide GEMM runs faster than three narrow ones on many engines (not on ONNX Runtime's CPU: measure).
    Before and after: ``q(x), k(x), v(x)`` become ``y = qkv(x); y[:n], y[n:2n], y[2n:]``.
    Refuses: projections of which some have a bias and some have none; linears that are not named query, key and value.
    Numerics: within 1e-12 in float64.
    """

    name = "merge-query-key-value"
    stage = Stage.CAPTURED
    requires = ("functional",)
    numerics = within(1e-12)
    pattern = Group(_projection("query"), _projection("key"), _projection("value"))

    def check(self, match: Match) -> Refusal | None:
        names = [record(match[n]).module.rpartition(".")[2].lower()[:1] for n in ("query", "key", "value")]
        if names != ["q", "k", "v"]:
            return match.refuse(f"'{record(match['query']).module}' is not followed by a key and a value")
        biases = sum(f"{n}.bias" in match for n in ("query", "key", "value"))
        return match.refuse("some have a bias and some have none") if biases not in (0, 3) else None

    def rewrite(self, match: Match, edit: Edit) -> None:
        parts = [match[n] for n in ("query", "key", "value")]
        first = min(parts)
        merged = []
        for role in ("weight", "bias") if "query.bias" in match else ("weight",):
            tensors = [edit.graph.parameter(match[f"{n}.{role}"]) for n in ("query", "key", "value")]
            path = f"{match[f'query.{role}'].target}/merged"
            merged.append(edit.parameter(path, torch.cat([t for t in tensors if t is not None]), at=first))
        whole = edit.call("linear", match["x"], *merged, at=first)
        start = 0
        for part in parts:
            size = int(value_of(part).shape[-1])
            piece = edit.call("slice", whole, -1, start, start + size, at=part)
            if part is match["query"]:  # whose name the whole takes
                part.replace_all_uses_with(piece)
                edit.replace(part, whole)
            else:
                edit.replace(part, piece)
            start += size
