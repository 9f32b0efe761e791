"""Runs passes over a copy of a graph and holds each one to its word."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
            versions = _versions(graph)
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
            _drop_unread(graph)
            graph.module.recompile()
            verify_structure(graph.module, graph.stage, one.name)
            _same_parameters(one, versions)
            after = str(graph)
            modified = after != text
            if modified:
                check_numerics(one, reference, graph)
            before = (after, one.name)
            self.reports.append(PassReport(one.name, modified, time.perf_counter() - start, tuple(refused)))
        graph.set_info(stage=self.leaves)
        verify_structure(graph.module, self.leaves, "the pipeline")
        return graph.clone()  # takes over only what the graph reads: a folded weight's source goes


def _drop_unread(graph: Graph) -> None:
    for node in graph.module.graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.module.graph.erase_node(node)


def _versions(graph: Graph) -> dict[str, tuple[torch.Tensor, int]]:
    """Parameters and buffers with torch's count of the writes to each."""
    return {name: (tensor, tensor._version) for name, tensor in graph.module.state_dict(keep_vars=True).items()}


def _same_parameters(one: GraphPass, before: dict[str, tuple[torch.Tensor, int]]) -> None:
    """All graphs of a model share its parameters: a pass makes new ones and never writes into them."""
    written = [name for name, (tensor, version) in before.items() if tensor._version != version]
    if written:
        raise PassError(
            "QG207",
            f"'{one.name}' writes into the parameter '{written[0]}'",
            where=written[0],
            why="other graphs of the model share it, so their results change too",
            todo="make a new parameter with edit.parameter(...)",
        )


def check_numerics(one: GraphPass, before: Graph, after: Graph) -> None:
    """Run both graphs on the example inputs and compare by what the pass declared."""
    exact = one.numerics.kind == "same"
    want = _outputs(before, double=not exact)
    try:
        have = _outputs(after, double=not exact)
    except Exception as error:
        raise PassError(
            "QG206",
            f"the graph does not run after '{one.name}'",
            where="on the example inputs",
            why=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            todo=f"mend '{one.name}'",
        ) from error
    for name, a, b in zip(before.info.outputs, want, have, strict=True):
        if not isinstance(a, torch.Tensor):
            continue
        difference = _difference(a, b)
        if difference == 0.0 or (not exact and difference <= one.numerics.eps):
            continue
        raise PassError(
            "QG207",
            f"'{one.name}' declares its numerics as {one.numerics}, but the output '{name}' differs",
            where=f"output '{name}' on the example inputs",
            why=f"largest difference {difference:.3g} of the largest value",
            todo="mend the rewrite, or declare within(eps) if the difference is intended",
        )


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest finite value; NaN equals NaN, as infinity equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    unequal = ~((a == b) | (a.isnan() & b.isnan()))
    if not bool(unequal.any()):
        return 0.0
    top = torch.where(a.isfinite(), a.abs(), 0).max().clamp(min=1e-30)
    error = float((a - b).abs()[unequal].max() / top)
    return error if error == error else float("inf")


def _outputs(graph: Graph, *, double: bool) -> list[Any]:
    module = graph.module
    args, kwargs = graph.info.args, graph.info.kwargs
    if double:
        module = copy.deepcopy(module).double()
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs)
        )
    with torch.no_grad():
        return pytree.tree_leaves(module(*args, **kwargs))
