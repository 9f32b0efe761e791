"""What qatgraph knows of one node: a frozen record in ``node.meta["custom"]``.

That key, and no other, survives re-export, decomposition and the road to the ONNX exporter's model
(measured on torch 2.11 and 2.13). The record is replaced, never changed, because copies of a graph
share it. Only this module reads or writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

KEY = "qatgraph"


@dataclass(frozen=True)
class NodeRecord:
    """``name`` is ``module:kind`` (``#2`` and so on for further uses); ``source`` the user's line."""

    name: str
    kind: str
    module: str
    source: str = ""
    region: str = ""
    history: tuple[str, ...] = ()


def record(node: fx.Node) -> NodeRecord:
    found = node.meta.get("custom", {}).get(KEY)
    if not isinstance(found, NodeRecord):
        raise KeyError(f"{node.name} has no record; create nodes through Edit or capture")
    return found


def has_record(node: fx.Node) -> bool:
    return isinstance(node.meta.get("custom", {}).get(KEY), NodeRecord)


def write(node: fx.Node, value: NodeRecord) -> None:
    node.meta["custom"] = {**node.meta.get("custom", {}), KEY: value}


def update(node: fx.Node, **changes: Any) -> None:
    write(node, replace(record(node), **changes))


def stamp(node: fx.Node, author: str) -> None:
    update(node, history=(*record(node).history, author))


def value_of(node: fx.Node) -> Any:
    """The fake tensor, number or symbol that the node stands for."""
    return node.meta.get("val")
