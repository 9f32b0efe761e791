"""Questions about the shape of a graph."""

from __future__ import annotations

from torch import fx


def dataflow_order(graph: fx.Graph) -> list[fx.Node]:
    """Every node after its inputs, in the same order for any legal order of execution of the same graph.

    Depth first: what the first argument needs stands before what the second needs. Last, by name, stand the nodes that
    the output does not need.
    """
    aside = sorted((n for n in graph.nodes if not n.users and n.op not in ("placeholder", "output")), key=str)
    found: dict[fx.Node, None] = dict.fromkeys(graph.find_nodes(op="placeholder"))
    for root in (graph.output_node(), *aside):
        path = [(root, iter(root.all_input_nodes))]
        while path:
            source = next((s for s in path[-1][1] if s not in found), None)
            if source is None:
                found[path.pop()[0]] = None
            else:
                path.append((source, iter(source.all_input_nodes)))
    return list(found)
