"""Capture: ``nn.Module`` -> ``Graph``, on ``torch.export``. The user's model is never touched."""

from __future__ import annotations

import inspect
import linecache
import sysconfig
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from qatgraph.errors import CaptureError
from qatgraph.ir.graph import INFO, Batch, DimInfo, Graph, GraphInfo, bind, export_shapes
from qatgraph.ir.meta import NodeRecord, record, write
from qatgraph.ir.names import Namer
from qatgraph.ir.stages import Stage, verify_structure
from qatgraph.ops import kind_of_target

Axes = Mapping[int, Any]  # axis -> dimension name or torch.export.Dim
DynamicShapes = Mapping[str, Axes]  # input name -> axes


def capture(
    model: torch.nn.Module,
    inputs: Batch,
    dynamic_shapes: DynamicShapes | None = None,
    *,
    output_names: tuple[str, ...] | None = None,
    share_with: Graph | None = None,
) -> Graph:
    """Trace a model into a graph of ATen operations, in evaluation mode.

    Args:
        model: any module that ``torch.export`` accepts. Values, buffers, hooks, ``training``,
            ``requires_grad`` and ``.grad`` stay as they are; the graph owns a copy.
        inputs: one example batch (a tensor, a tuple, or a dict of keyword arguments).
        dynamic_shapes: which axes move, by input name: ``{"input_ids": {0: "batch", 1: Dim("length", max=512)}}``.
        output_names: names of the output leaves in the lowered file; by default the keys of the model's output.
        share_with: an earlier graph of the same model, whose copy of the parameters is used again.

    Raises:
        CaptureError: QG101 data-dependent control flow, QG102 other failures of the export, QG103 NaN in weights,
            QG104 a dynamic dimension does not hold, QG105 wrong names.
    """
    _check_weights(model)
    args, kwargs = _positional_first(model, *bind(inputs))
    names = _leaf_names(args, kwargs, model)
    dims = _dimensions(dynamic_shapes or {}, names, (args, kwargs))
    args, kwargs = _avoid_ones((args, kwargs), dims)
    program = _export(model, args, kwargs, dims)
    copies = share_with.copies if share_with is not None else {}
    module = _own(program, model, copies)
    found = _output_names(program, output_names, names)
    module.meta[INFO] = GraphInfo(
        stage=Stage.CAPTURED,
        root=type(model).__name__,
        inputs=names,
        outputs=found,
        args=args,
        kwargs=kwargs,
        dims=dims,
        notes=tuple(_lost_dropout(model, module)),
    )
    module.eval()
    verify_structure(module, Stage.CAPTURED, "capture")
    return Graph(module, copies)


def _check_weights(model: torch.nn.Module) -> None:
    bad = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    bad += [n for n, b in model.named_buffers() if bool(torch.isnan(b).any())]  # a mask may hold -inf
    if bad:
        raise CaptureError(
            "QG103",
            "a weight contains NaN or infinity",
            where=f"'{bad[0]}' of {type(model).__name__}",
            why="no scale can be computed for it",
            todo="load the checkpoint again, or find the training step that produced it",
        )


def _positional_first(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn leading keyword arguments into positional ones, so that the captured module takes both spellings."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return args, kwargs
    rest = dict(kwargs)
    bound = list(args)
    for parameter in parameters[len(args) :]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.name not in rest:
            break
        bound.append(rest.pop(parameter.name))
    return tuple(bound), rest


def _leaf_names(args: tuple[Any, ...], kwargs: dict[str, Any], model: torch.nn.Module) -> tuple[str, ...]:
    """One name a leaf: the user's argument name, then the keys inside it (``batch.mask``)."""
    try:
        parameters = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        parameters = []
    tops = [parameters[i] if i < len(parameters) else f"arg{i}" for i in range(len(args))]
    names: list[str] = []
    for top, value in [*zip(tops, args, strict=True), *kwargs.items()]:
        for path, _ in pytree.tree_leaves_with_path(value):
            names.append("_".join([top, *(_key(k) for k in path)]))
    return tuple(names)


def _key(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _dimensions(wanted: DynamicShapes, names: tuple[str, ...], batch: Any) -> tuple[DimInfo, ...]:
    leaves = pytree.tree_leaves(batch)
    shared: dict[str, DimInfo] = {}
    infos: list[DimInfo] = []
    for name, axes in wanted.items():
        if name not in names:
            what = f"dynamic_shapes names an input '{name}' that the model was not given"
            raise _bad_shapes(what, f"the inputs are {', '.join(names)}", "use one of these names")
        leaf = names.index(name)
        if not isinstance(leaves[leaf], torch.Tensor):
            raise _bad_shapes(f"'{name}' has no axes", f"it is a {type(leaves[leaf]).__name__}", "name tensors only")
        if not isinstance(axes, Mapping):
            raise _bad_shapes(f"the axes of '{name}' are not a dict", f"they are {axes!r}", "write {0: 'batch'}")
        for axis, dim in axes.items():
            if not 0 <= axis < leaves[leaf].ndim:
                what = f"axis {axis} of '{name}' does not exist"
                raise _bad_shapes(what, f"'{name}' has rank {leaves[leaf].ndim}", "count axes from 0")
            own = _dimension(leaf, axis, dim, name)
            first = shared.setdefault(own.name, own)
            infos.append(replace(first, leaf=leaf, axis=axis))
    return tuple(infos)


def _dimension(leaf: int, axis: int, dim: Any, name: str) -> DimInfo:
    if isinstance(dim, str):
        if not dim.isidentifier():
            raise _bad_shapes(f"'{dim}' cannot name axis {axis} of '{name}'", "it is not an identifier", "use letters")
        return DimInfo(leaf, axis, dim, 0, None)
    if not isinstance(dim, Dim):
        what = f"axis {axis} of '{name}' is given as {dim!r}"
        raise _bad_shapes(what, "a moving axis has a name", "give a name or a torch.export.Dim; leave fixed axes out")
    low, high = getattr(dim, "min", 0), getattr(dim, "max", None)
    bounded = isinstance(high, int) and high < 2**31
    return DimInfo(leaf, axis, dim.__name__, int(low or 0), high if bounded else None)


def _bad_shapes(what: str, why: str, todo: str) -> CaptureError:
    return CaptureError("QG105", what, where="dynamic_shapes", why=why, todo=todo)


def _avoid_ones(batch: Any, dims: tuple[DimInfo, ...]) -> Any:
    """An example size of 1 would be fixed as a constant by ``torch.export``: repeat the sample."""
    leaves, spec = pytree.tree_flatten(batch)
    for dim in dims:
        if leaves[dim.leaf].shape[dim.axis] == 1:
            leaves[dim.leaf] = torch.cat([leaves[dim.leaf]] * 2, dim=dim.axis)
        size = leaves[dim.leaf].shape[dim.axis]
        if size < dim.low or (dim.high is not None and size > dim.high):
            raise CaptureError(
                "QG104",
                "a dynamic dimension does not hold for the example inputs",
                where=f"'{dim.name}', axis {dim.axis}",
                why=f"the example has size {size}, the bounds are {dim.low} to {dim.high}",
                todo="give an example within the bounds (not of size 1), or widen them",
            )
    return pytree.tree_unflatten(leaves, spec)


def _export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: tuple[DimInfo, ...]
) -> ExportedProgram:
    training = {name: m.training for name, m in model.named_modules()}
    try:
        model.eval()
        return torch.export.export(model, args, kwargs, dynamic_shapes=export_shapes(model, args, kwargs, dims))
    except Exception as error:
        raise _explain(error, model) from error
    finally:
        for name, module in model.named_modules():
            module.training = training[name]


def _explain(error: Exception, model: torch.nn.Module) -> CaptureError:
    text = str(error)
    line = _user_line(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if "data-dependent" in text.lower() or "DataDependent" in type(error).__name__:
        return CaptureError(
            "QG101",
            "the model branches on the values of a tensor",
            where=line,
            why=f"one graph cannot hold both branches ({first})",
            todo="replace the branch by torch.where, or hoist it out of forward()",
        )
    if "suggested fixes" in text.lower() or "constraints violated" in text.lower():
        fixes = text.lower().find("suggested fixes")
        hint = " ".join(text[fixes:].split())[:300] if fixes >= 0 else "make the dimension static"
        return CaptureError(
            "QG104",
            "a dynamic dimension does not hold for this model",
            where=line,
            why=" ".join(first.split()),
            todo=hint,
        )
    return CaptureError(
        "QG102",
        f"torch.export cannot capture {type(model).__name__}",
        where=line,
        why=f"{type(error).__name__}: {first}",
        todo="run torch.export.export(model, inputs) alone, and rewrite the line that it names",
    )


def _user_line(error: BaseException) -> str:
    """The innermost line of the traceback that is neither ours, nor torch's, nor of the standard library."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    standard, installed = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        library = frame.filename.startswith(standard) and not frame.filename.startswith(installed)
        if not library and not frame.filename.startswith(ours) and Path(frame.filename).exists():
            code = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f"{Path(frame.filename).name}:{frame.lineno}: {code}"
    return "the call of capture"


def _own(
    program: ExportedProgram, model: torch.nn.Module, copies: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> fx.GraphModule:
    """A plain GraphModule over *our* copy of parameters and buffers; ties stay ties."""
    traced = program.module(check_guards=False)
    originals: dict[str, torch.Tensor] = {**program.state_dict, **program.constants}
    users: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    users.update(model.named_buffers(remove_duplicate=False))
    attributes: dict[str, Any] = {}
    namer = Namer()
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            traced.graph.erase_node(node)
        elif node.op == "get_attr" and not node.users:
            traced.graph.erase_node(node)  # a second name of a tied parameter
        elif node.op == "get_attr":
            path = str(node.target)
            source = users.get(path, originals.get(path, _attribute(traced, path)))
            if isinstance(source, torch.Tensor):
                attributes[path] = _copy_once(source, copies)
            else:
                attributes[path] = source
        elif node.op == "call_function":
            if isinstance(node.target, HigherOrderOperator):
                raise _nested(node, type(model).__name__)
            write(node, _record(node, namer, type(model).__name__))
    return fx.GraphModule(attributes, traced.graph, class_name=type(model).__name__)


def _nested(node: fx.Node, root: str) -> CaptureError:
    lines = (_source(user) for user in [node, *node.users])
    return CaptureError(
        "QG102",
        f"torch.export cannot capture {root} as one graph",
        where=next((line for line in lines if line), root),
        why=f"it puts a block into a graph of its own ({node.target})",
        todo="remove the torch.no_grad() or control-flow block from forward()",
    )


def _attribute(owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner


def _copy_once(source: torch.Tensor, copies: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
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
    return NodeRecord(name=namer(f"{module or root}:{kind}"), kind=kind, module=module, source=_source(node))


def _source(node: fx.Node) -> str:
    """``file.py:line`` of the user's code: the last frame, without the folders of this machine."""
    library = str(Path(torch.__file__).parent)
    lines = (node.meta.get("stack_trace") or "").splitlines()
    frames = [line.strip() for line in lines if "File" in line and library not in line]
    if not frames:
        return ""
    parts = frames[-1].split('"')
    number = parts[2].split("line ")[-1].split(",")[0] if len(parts) > 2 else ""
    return f"{Path(parts[1]).name}:{number}"


def _output_names(program: ExportedProgram, wanted: tuple[str, ...] | None, inputs: tuple[str, ...]) -> tuple[str, ...]:
    spec = program.call_spec.out_spec
    count = spec.num_leaves
    if wanted is None:
        tree = pytree.tree_unflatten(list(range(count)), spec)
        paths = ["_".join(_key(k) for k in path) for path, _ in pytree.tree_leaves_with_path(tree)]
        return tuple(_output_name(path, inputs) for path in paths)
    taken = [n for i, n in enumerate(wanted) if n in inputs or n in wanted[:i]]
    if taken or len(wanted) != count:
        raise CaptureError(
            "QG105",
            f"the output name '{taken[0]}' is taken" if taken else f"{len(wanted)} output names for {count} outputs",
            where=f"output_names={wanted}",
            why=f"inputs are {', '.join(inputs)}",
            todo="give each output one name of its own",
        )
    return tuple(wanted)


def _output_name(path: str, inputs: tuple[str, ...]) -> str:
    """The keys that lead to an output; ``output`` in front where they are no name, or that of an input."""
    if path and not path[0].isdigit() and path not in inputs:
        return path
    return f"output_{path}" if path else "output"


def _lost_dropout(model: torch.nn.Module, module: fx.GraphModule) -> list[str]:
    """Dropout inside scaled_dot_product_attention vanishes in an eval capture: say so."""
    lost: dict[float, list[str]] = {}
    for node in module.graph.nodes:
        if str(node.target) != "aten.scaled_dot_product_attention.default":
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
