"""Stable text of a graph: one line a node, no addresses. Golden tests and diffs rest on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qatgraph.ir.graph import Graph, size_text
from qatgraph.ir.meta import has_record, record, value_of


def graph_text(graph: Graph) -> str:
    info = graph.info
    lines = [f"graph {info.root} [{info.stage.value}] ({', '.join(info.inputs)}) -> ({', '.join(info.outputs)})"]
    symbols = graph.size_names()
    for node in graph.module.graph.nodes:
        if has_record(node):
            lines.append(f"  {_label(node)} = {_call(node)} : {_type(node, symbols)}{_region(node)}")
        elif node.op == "output":
            lines.append(f"  return {_arg(node.args[0])}")
    return "\n".join(lines) + "\n"


def _label(node: fx.Node) -> str:
    if has_record(node):
        return record(node).name
    return f"'{node.target}'" if node.op == "get_attr" else node.name


def _call(node: fx.Node) -> str:
    args = [_arg(a) for a in node.args] + [f"{k}={_arg(v)}" for k, v in node.kwargs.items()]
    kind = record(node).kind
    return f"{kind}({', '.join(args)})"


def _arg(value: Any) -> str:
    if isinstance(value, fx.Node):
        return _label(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_arg(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_arg(v)}" for k, v in value.items()) + "}"
    return str(value)


def _type(node: fx.Node, symbols: dict[str, str]) -> str:
    return _value_type(value_of(node), symbols)


def _value_type(value: Any, symbols: dict[str, str]) -> str:
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_value_type(v, symbols) for v in value)})"
    if not isinstance(value, torch.Tensor):
        return "scalar"
    sizes = ", ".join(size_text(s, symbols) for s in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"


def _region(node: fx.Node) -> str:
    region = record(node).region
    return f"  @{region}" if region else ""
