"""Blocks that ``torch.export`` puts into graphs of their own (``no_grad``, ``autocast``), put back in line."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator

BLOCKS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})


def inline_blocks(module: fx.GraphModule) -> list[fx.Node]:
    """Replace every such block by its operations, also nested ones; returns the first operation of each."""
    firsts: list[fx.Node] = []
    while (block := next((n for n in module.graph.nodes if _is_block(n)), None)) is not None:
        firsts += _inline(module, block)[:1]
    return firsts


def _is_block(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) and str(node.target) in BLOCKS


def _inline(module: fx.GraphModule, block: fx.Node) -> list[fx.Node]:
    at = next(i for i, arg in enumerate(block.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
    holder: Any = block.args[at]
    body: Any = module.get_submodule(str(holder.target))
    twins: dict[fx.Node, Any] = {}
    given = iter(block.args[at + 1 :])
    copied: list[fx.Node] = []
    with module.graph.inserting_before(block):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                twins[node] = next(given)
            elif node.op != "output":
                twins[node] = module.graph.node_copy(node, twins.__getitem__)
                if node.op == "get_attr":
                    twins[node].target = f"{holder.target}.{node.target}"
                else:
                    copied.append(twins[node])
    results: Any = fx.map_arg(body.graph.output_node().args[0], twins.__getitem__)
    for user in list(block.users):  # each takes one result of the block
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(block)
    if not holder.users:
        module.graph.erase_node(holder)
    return copied
