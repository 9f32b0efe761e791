"""Runs passes over a copy of a graph and holds each one to its word."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.utils import _pytree as pytree

from qatgraph.errors import PassError, QatgraphError
from qatgraph.ir.graph import Graph
from qatgraph.ir.stages import Stage, verify_structure
from qatgraph.rewriting.edit import Edit
from qatgraph.rewriting.passes import GraphPass
from qatgraph.rewriting.pattern import Refusal


@dataclass(frozen=True)
class PassReport:
    """What one pass did; ``modified`` is computed from the text, not claimed."""

    name: str
    modified: bool
    seconds: float
    refused: tuple[Refusal, ...] = ()


@dataclass
class PassManager:
    """``PassManager(passes).run(graph)`` returns a new graph at stage ``leaves``; ``reports`` tell the rest."""

    passes: Sequence[GraphPass]
    leaves: Stage = Stage.CANONICAL
    reports: list[PassReport] = field(default_factory=list)

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        before: tuple[str, str] | None = None
        for one in self.passes:
            start = time.perf_counter()
            text = before[0] if before else str(graph)
            reference = graph.clone()
            try:
                refused = one.apply(graph, Edit(graph, one.name))
            except QatgraphError:
                raise
            except Exception as error:
                ran = ", ".join(r.name for r in self.reports) or "none"
                raise PassError(
                    "QG206",
                    f"the pass '{one.name}' failed",
                    where=one.name,
                    why=f"{type(error).__name__}: {error}",
                    todo=f"mend the pass (passes before it: {ran})",
                ) from error
            graph.module.recompile()
            verify_structure(graph.module, graph.stage, one.name)
            after = str(graph)
            modified = after != text
            if modified:
                check_numerics(one, reference, graph)
            before = (after, one.name)
            self.reports.append(PassReport(one.name, modified, time.perf_counter() - start, tuple(refused)))
        graph.set_info(stage=self.leaves)
        verify_structure(graph.module, self.leaves, "the pipeline")
        return graph


def check_numerics(one: GraphPass, before: Graph, after: Graph) -> None:
    """Run both graphs on the example inputs and compare by what the pass declared."""
    exact = one.numerics.kind == "same"
    want, have = (_outputs(g, double=not exact) for g in (before, after))
    for name, a, b in zip(before.info.outputs, want, have, strict=True):
        if exact and torch.equal(a, b):
            continue
        error = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) if a.shape == b.shape else float("inf")
        if not exact and error <= one.numerics.eps:
            continue
        raise PassError(
            "QG207",
            f"'{one.name}' declares its numerics as {one.numerics}, but the output '{name}' differs",
            where=f"output '{name}' on the example inputs",
            why=f"largest difference {error:.3g} of the largest value",
            todo="mend the rewrite, or declare within(eps) if the difference is intended",
        )


def _outputs(graph: Graph, *, double: bool) -> list[torch.Tensor]:
    module = graph.module
    args, kwargs = graph.info.args, graph.info.kwargs
    if double:
        module = copy.deepcopy(module).double()
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs)
        )
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(t, torch.Tensor)]
