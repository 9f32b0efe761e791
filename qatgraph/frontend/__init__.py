"""Capture: a module or an exported program -> ``Graph``, on ``torch.export``. The user's model is never touched."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qatgraph.errors import CaptureError
from qatgraph.frontend.functional import functional_program
from qatgraph.frontend.inputs import (
    DynamicShapes,
    apart,
    avoid_ones,
    dimensions,
    dimensions_of,
    leaf_names,
    output_names_of,
    positional_first,
)
from qatgraph.frontend.ownership import lost_dropout, own
from qatgraph.frontend.refusals import check_weights, explain
from qatgraph.ir.graph import INFO, Batch, DimInfo, Graph, GraphInfo, bind, export_shapes
from qatgraph.ir.stages import Stage, verify_structure


def capture(
    model: torch.nn.Module | ExportedProgram,
    inputs: Batch | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    *,
    output_names: tuple[str, ...] | None = None,
    share_with: Graph | None = None,
) -> Graph:
    """Trace a model into a graph of ATen operations, in evaluation mode.

    Args:
        model: any module that ``torch.export`` accepts (also a ``fx.GraphModule``), or an ``ExportedProgram``
            (``torch.export.load("model.pt2")``), which brings its own inputs and moving sizes. Values, buffers, hooks,
            ``training``, ``requires_grad`` and ``.grad`` stay as they are; the graph owns a copy.
        inputs: one example batch (a tensor, a tuple, or a dict of keyword arguments).
        dynamic_shapes: which axes move, by input name: ``{"input_ids": {0: "batch", 1: Dim("length", max=512)}}``.
        output_names: names of the output leaves in the lowered file; by default the keys of the model's output.
        share_with: an earlier graph of the same model, whose copy of the parameters is used again.

    Raises:
        CaptureError: QG101 data-dependent control flow, QG102 other failures of the export, QG103 NaN in weights,
            QG104 a dynamic dimension does not hold, QG105 wrong names, QG106 inputs are missing or superfluous,
            QG107 an operation of a user's library writes into its arguments.
    """
    if isinstance(model, ExportedProgram):
        found = _from_program(model, inputs, dynamic_shapes)
    else:
        found = _from_module(model, inputs, dynamic_shapes or {})
    copies = share_with.copies if share_with is not None else {}
    module = own(found.program, found.tensors, found.root, copies)
    module.meta[INFO] = GraphInfo(
        stage=Stage.CAPTURED,
        root=found.root,
        inputs=found.names,
        outputs=output_names_of(found.program.call_spec.out_spec, output_names, found.names),
        args=found.args,
        kwargs=found.kwargs,
        dims=found.dims,
        notes=found.notes + tuple(lost_dropout(model, module) if isinstance(model, torch.nn.Module) else ()),
    )
    module.eval()
    verify_structure(module, Stage.CAPTURED, "capture")
    return Graph(module, copies)


@dataclass(frozen=True)
class _Captured:
    """What both ways in give: the program, its example inputs by name, and the user's tensors by path."""

    program: ExportedProgram
    root: str
    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dims: tuple[DimInfo, ...]
    tensors: dict[str, torch.Tensor]
    notes: tuple[str, ...]


def _from_module(model: torch.nn.Module, inputs: Batch | None, dynamic_shapes: DynamicShapes) -> _Captured:
    if inputs is None:
        raise _inputs("an example batch is missing", "a module is traced on it", "give one: capture(model, batch)")
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    root = type(model).__name__
    check_weights(tensors, root)
    args, kwargs = positional_first(model, *bind(inputs))
    names = leaf_names(args, kwargs, model)
    dims = dimensions(dynamic_shapes, names, (args, kwargs))
    args, kwargs = apart(avoid_ones((args, kwargs), dims))
    program, notes = functional_program(_export(model, args, kwargs, dims))
    return _Captured(program, root, names, args, kwargs, dims, tensors, notes)


def _from_program(program: ExportedProgram, inputs: Batch | None, dynamic_shapes: DynamicShapes | None) -> _Captured:
    if inputs is not None or dynamic_shapes:
        todo = "capture(program), or capture the module itself"
        raise _inputs("an exported program brings its own inputs", "they were fixed when it was exported", todo)
    if program.example_inputs is None:
        raise _inputs("the program has no example inputs", "it was saved without", "export it again with them")
    args, kwargs = program.example_inputs
    if _merged(program):
        why = "torch.export reads one input where the same tensor stood for several"
        raise _inputs("the program was exported with one tensor at several inputs", why, "export it with copies")
    tensors: dict[str, torch.Tensor] = {**program.state_dict, **program.constants}
    stacks = (n.meta.get("nn_module_stack") or {} for n in program.graph.nodes)
    classes = [str(kind).rpartition(".")[2] for stack in stacks for path, kind in stack.values() if path == ""]
    root = classes[0] if classes else "Program"
    check_weights(tensors, root)
    names = tuple(program.graph_signature.user_inputs)
    program, notes = functional_program(program)
    return _Captured(program, root, names, args, kwargs, dimensions_of(program, names), tensors, notes)


def _merged(program: ExportedProgram) -> bool:
    """Whether an input that nothing reads was the same tensor as another."""
    leaves = pytree.tree_leaves(program.example_inputs)
    readers = {n.name: len(n.users) for n in program.graph.find_nodes(op="placeholder")}
    shared = Counter(id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
    named = zip(program.graph_signature.user_inputs, leaves, strict=False)
    return any(shared[id(leaf)] > 1 and readers.get(str(name)) == 0 for name, leaf in named)


def _inputs(what: str, why: str, todo: str) -> CaptureError:
    return CaptureError("QG106", what, where="capture", why=why, todo=todo)


def _export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: tuple[DimInfo, ...]
) -> ExportedProgram:
    training = {name: m.training for name, m in model.named_modules()}
    try:
        model.eval()
        return torch.export.export(model, args, kwargs, dynamic_shapes=export_shapes(model, args, kwargs, dims))
    except Exception as error:
        raise explain(error, model) from error
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
