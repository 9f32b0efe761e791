"""What planning passes state about a graph; a pass that fails, or speaks of what is not there, is named."""

from __future__ import annotations

from collections.abc import Iterable

from qatgraph.errors import PassError, QatgraphError, nearest
from qatgraph.ir.graph import Graph
from qatgraph.planning.build import PlanningContext
from qatgraph.planning.constraints import Constraint
from qatgraph.rewriting.passes import Pass, PlanningPass


def stated(passes: Iterable[Pass], graph: Graph, context: PlanningContext) -> list[Constraint]:
    """The constraints of all planning passes among ``passes``.

    Raises:
        PassError: QG206 a pass fails or states something else, QG219 it constrains a node that the graph does not have.
    """
    names = {fact.name for fact in context.facts} | set(graph.info.inputs)
    found: list[Constraint] = []
    for one in passes:
        if isinstance(one, PlanningPass):
            found += _of_pass(one, graph, context, names)
    return found


def _of_pass(one: PlanningPass, graph: Graph, context: PlanningContext, names: set[str]) -> list[Constraint]:
    try:
        found = list(one.state(graph, context))
    except QatgraphError:
        raise
    except Exception as error:
        raise _failed(one, f"{type(error).__name__}: {error}") from error
    for constraint in found:
        if not isinstance(constraint, Constraint):
            raise _failed(one, f"it states {constraint!r}, which is no constraint")
        missing = next((port.node for port in constraint.ports if port.node not in names), None)
        if missing is not None:
            near = nearest(missing, names)
            what = f"'{one.name}' constrains '{missing}', which the graph does not have"
            why = f"did you mean {near}?" if near else "no operation bears this name"
            raise PassError("QG219", what, where=missing, why=why, todo="take names from context.facts")
    return found


def _failed(one: PlanningPass, why: str) -> PassError:
    todo = "let state(graph, context) give constraints, such as qg.pin(...)"
    return PassError("QG206", f"the pass '{one.name}' failed", where=one.name, why=why, todo=todo)
