"""The example inputs: their names, which of their axes move, and how they are given to ``torch.export``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from qatgraph.errors import CaptureError
from qatgraph.ir.graph import DimInfo

Axes = Mapping[int, Any]  # axis -> dimension name or torch.export.Dim
DynamicShapes = Mapping[str, Axes]  # input name -> axes


def positional_first(
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


def leaf_names(args: tuple[Any, ...], kwargs: dict[str, Any], model: torch.nn.Module) -> tuple[str, ...]:
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


def dimensions(wanted: DynamicShapes, names: tuple[str, ...], batch: Any) -> tuple[DimInfo, ...]:
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


def dimensions_of(program: ExportedProgram, names: tuple[str, ...]) -> tuple[DimInfo, ...]:
    """The moving axes of an exported program, each named after the first input that has it."""
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    known: dict[str, str] = {}
    found: list[DimInfo] = []
    for leaf, name in enumerate(names):
        value = placeholders[name].meta["val"]
        for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, int):
                continue
            called = known.setdefault(str(size), f"{name}_axis{axis}")
            bounds = program.range_constraints.get(size.node.expr)
            low, high = (float(bounds.lower), float(bounds.upper)) if bounds is not None else (0.0, math.inf)
            found.append(DimInfo(leaf, axis, called, int(low), int(high) if high < 2**31 else None))
    return tuple(found)


def avoid_ones(batch: Any, dims: tuple[DimInfo, ...]) -> Any:
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


def apart(batch: Any) -> Any:
    """One tensor given as two inputs, as in ``attention(x, x, x)``, would be captured as one input: a copy for each."""
    leaves, spec = pytree.tree_flatten(batch)
    seen: set[int] = set()
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and id(leaf) in seen:
            leaves[i] = leaf.clone()
        seen.add(id(leaf))
    return pytree.tree_unflatten(leaves, spec)


def output_names_of(spec: pytree.TreeSpec, wanted: tuple[str, ...] | None, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """One name a leaf of the output: the wanted ones, or the keys that lead to it."""
    count = spec.num_leaves
    if wanted is None:
        tree = pytree.tree_unflatten(list(range(count)), spec)
        if isinstance(tree, Mapping):  # also one that torch can take apart without knowing its keys (diffusers)
            tree = dict(tree)
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
