"""What a graph must look like at each stage. A pass names the stage that it takes and leaves."""

from __future__ import annotations

from enum import StrEnum

from torch import fx
from torch._ops import OpOverload

from qatgraph.errors import PassError
from qatgraph.ir.meta import has_record, record


class Stage(StrEnum):
    CAPTURED = "captured"
    CANONICAL = "canonical"
    PREPARED = "prepared"
    QDQ = "qdq"


FLOAT = frozenset({Stage.CAPTURED, Stage.CANONICAL})  # without quantizers: what takes one takes the other, too


def verify_structure(gm: fx.GraphModule, stage: Stage, author: str) -> None:
    """Refuse a graph that is not what its stage says: broken links, lost names, foreign operators."""
    names: set[str] = set()
    known: set[fx.Node] = set()
    for node in gm.graph.nodes:
        _check_order(node, known, author, stage)
        known.add(node)
        if node.op == "call_function":
            overload = str(node.target)
            sizes = getattr(node.target, "__module__", "") in ("_operator", "math", "torch")  # arithmetic of sizes
            if not isinstance(node.target, OpOverload) and not sizes:
                why = f"'{overload}' is not an ATen operator, nor one of a torch.library"
                raise _broken(author, stage, node, why)
            if overload.startswith("qatgraph.quantize") and stage is not Stage.QDQ:
                raise _broken(author, stage, node, "quantize operators belong to the stage qdq")
        elif node.op in ("get_attr", "call_module"):
            if not _resolves(gm, str(node.target)):
                raise _broken(author, stage, node, f"'{node.target}' does not exist in the module")
            if node.op == "call_module" and stage is Stage.QDQ:
                raise _broken(author, stage, node, "a module call does not belong to this stage")
        if node.op in ("call_function", "call_module"):
            if not has_record(node):
                raise _broken(author, stage, node, "the node has no name; create nodes through Edit")
            name = node.meta["custom"]["qatgraph"].name
            if name in names:
                raise _broken(author, stage, node, f"the name '{name}' is used twice")
            names.add(name)
    _lint(gm, stage, author)


def _check_order(node: fx.Node, known: set[fx.Node], author: str, stage: Stage) -> None:
    """Refuse a node that reads what comes after it, naming both."""
    late = next((source for source in node.all_input_nodes if source not in known), None)
    if late is None:
        return
    cycle = node in _sources(late)
    what = "depends on it: that is a cycle" if cycle else "comes after it, or is not in the graph"
    raise _broken(author, stage, node, f"'{_called(node)}' reads '{_called(late)}', which {what}")


def _sources(node: fx.Node) -> set[fx.Node]:
    """Everything that a node is computed from; the graph may have cycles."""
    found, left = {node}, [node]
    while left:
        fresh = [n for n in left.pop().all_input_nodes if n not in found]
        found.update(fresh)
        left += fresh
    return found


def _called(node: fx.Node) -> str:
    return record(node).name if has_record(node) else node.name


def _lint(gm: fx.GraphModule, stage: Stage, author: str) -> None:
    """fx's own check (owners, names), as one of our errors."""
    try:
        gm.graph.lint()
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise PassError(
            "QG203",
            f"the graph is not a valid '{stage.value}' graph after '{author}'",
            where="the links of its nodes",
            why=why,
            todo=f"mend '{author}', or report it if it ships with qatgraph",
        ) from error


def _resolves(gm: fx.GraphModule, path: str) -> bool:
    owner: object = gm
    for part in path.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def _broken(author: str, stage: Stage, node: fx.Node, why: str) -> PassError:
    return PassError(
        "QG203",
        f"the graph is not a valid '{stage.value}' graph after '{author}'",
        where=f"node {node.name}",
        why=why,
        todo=f"mend '{author}', or report it if it ships with qatgraph",
    )
