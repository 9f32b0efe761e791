"""From an exported program to a graph of our own: our copy of the parameters, our names, blocks put back in line."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram

from qatgraph.frontend.inlining import inline_blocks
from qatgraph.frontend.refusals import nested, source
from qatgraph.ir.meta import NodeRecord, record, write
from qatgraph.ir.names import Namer
from qatgraph.ops import kind_of_target

Copies = dict[int, tuple[torch.Tensor, torch.Tensor]]


def own(program: ExportedProgram, tensors: dict[str, torch.Tensor], root: str, copies: Copies) -> fx.GraphModule:
    """A plain GraphModule over *our* copy of parameters and buffers; ties stay ties."""
    traced = program.module(check_guards=False)
    inline_blocks(traced)
    known = {**program.state_dict, **program.constants, **tensors}
    attributes: dict[str, Any] = {}
    namer = Namer()
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            traced.graph.erase_node(node)
        elif node.op == "get_attr" and not node.users:
            traced.graph.erase_node(node)  # a second name of a tied parameter
        elif node.op == "get_attr":
            path = str(node.target)
            source = known.get(path, _attribute(traced, path))
            if isinstance(source, torch.Tensor):
                attributes[path] = _copy_once(source, copies)
            else:
                attributes[path] = source
        elif node.op == "call_function":
            if isinstance(node.target, HigherOrderOperator):
                raise nested(node, root)
            write(node, _record(node, namer, root))
    return fx.GraphModule(attributes, traced.graph, class_name=root)


def _attribute(owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner


def _copy_once(source: torch.Tensor, copies: Copies) -> torch.Tensor:
    """Copy a tensor the first time it is met; later meetings (ties, other captures) get the same copy."""
    known = copies.get(id(source))
    if known is not None and known[0] is source:
        return known[1]
    twin = source.detach().clone()
    if isinstance(source, torch.nn.Parameter):
        twin = torch.nn.Parameter(twin, requires_grad=source.requires_grad)
    copies[id(source)] = (source, twin)
    return twin


def _record(node: fx.Node, namer: Namer, root: str) -> NodeRecord:
    kind = kind_of_target(str(node.target))
    module = ""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if not str(path).startswith("_empty_nn_module_stack"):  # torch's own name for size nodes
            module = str(path)
    return NodeRecord(name=namer(f"{module or root}:{kind}"), kind=kind, module=module, source=source(node))


def lost_dropout(model: torch.nn.Module, module: fx.GraphModule) -> list[str]:
    """Dropout whose rate is an argument, as inside attention, vanishes in an eval capture: say so."""
    lost: dict[float, list[str]] = {}
    for node in module.graph.nodes:
        vanished = str(node.target) == "aten.dropout.default" and node.args[1] == 0
        if not vanished and str(node.target) != "aten.scaled_dot_product_attention.default":
            continue
        path = record(node).module
        owner = model.get_submodule(path)
        rates = [m.p for m in owner.children() if isinstance(m, torch.nn.Dropout)]
        rates += [v for k, v in vars(owner).items() if "drop" in k and isinstance(v, float)]
        if max(rates, default=0.0) > 0:
            lost.setdefault(max(rates), []).append(path)
    return [
        f"dropout p={rate} inside attention is not in the graph, because it was captured in eval: "
        + ", ".join(paths[:3])
        + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        for rate, paths in lost.items()
    ]
