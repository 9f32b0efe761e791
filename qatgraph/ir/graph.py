"""``Graph``: a thin owner of one ``fx.GraphModule`` of ATen operations."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from qatgraph.errors import CaptureError, PassError, nearest
from qatgraph.ir.meta import has_record, record, value_of
from qatgraph.ir.names import Namer
from qatgraph.ir.stages import Stage
from qatgraph.ops import roles_of

Batch = Any  # a tensor, a tuple of positional or a dict of keyword arguments
INFO = "qatgraph"


@dataclass(frozen=True)
class DimInfo:
    """One dynamic dimension: which input leaf, which axis, the user's name and its bounds."""

    leaf: int
    axis: int
    name: str
    low: int
    high: int | None


@dataclass(frozen=True)
class GraphInfo:
    """What travels with the module (in ``GraphModule.meta``, which survives ``deepcopy``)."""

    stage: Stage
    root: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dims: tuple[DimInfo, ...] = ()
    notes: tuple[str, ...] = ()
    plan: Any = None


@dataclass
class Graph:
    """A captured model. Calling it runs it with the model's signature.

    Several graphs of one model share one copy of its parameters; ``clone`` copies structure only.
    """

    module: fx.GraphModule
    # id of the user's tensor -> (the user's tensor, our copy of it); kept so that a second capture can share
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, module: torch.nn.Module) -> Graph:
        """The graph behind a module of ours (also after ``deepcopy``)."""
        if not isinstance(module, fx.GraphModule) or INFO not in module.meta:
            raise _foreign(type(module).__name__, "this module was not made by qatgraph")
        return cls(module)

    @classmethod
    def prepared(cls, module: torch.nn.Module) -> Graph:
        """The graph behind a prepared module, which carries its plan."""
        graph = cls.of(module)
        if graph.info.plan is None:
            raise _foreign(graph.info.root, "this module has not been prepared: it has no plan")
        return graph

    @property
    def info(self) -> GraphInfo:
        return self.module.meta[INFO]  # type: ignore[no-any-return]

    def set_info(self, **changes: Any) -> None:
        self.module.meta[INFO] = replace(self.info, **changes)

    @property
    def stage(self) -> Stage:
        return self.info.stage

    @property
    def nodes(self) -> list[fx.Node]:
        """The named nodes (operations), in order of execution."""
        return [n for n in self.module.graph.nodes if has_record(n)]

    def node(self, name: str) -> fx.Node:
        """The operation of a name.

        Raises:
            PassError: QG217 the graph has none of this name.
        """
        named = {record(n).name: n for n in self.nodes}
        if name not in named:
            near = nearest(name, named)
            raise PassError(
                "QG217",
                f"the graph has no node '{name}'",
                where=f"graph {self.info.root}, {len(named)} nodes",
                why="no operation bears this name",
                todo=f"did you mean {near}?" if near else "print the graph to see its names",
            )
        return named[name]

    def namer(self) -> Namer:
        return Namer(record(n).name for n in self.nodes)

    def clone(self) -> Graph:
        """A new graph over the same parameters, buffers and submodules."""
        structure = fx.Graph()
        structure.output(structure.graph_copy(self.module.graph, val_map={}))
        structure.set_codegen(self.module.graph._codegen)
        for old, new in zip(self.module.graph.nodes, structure.nodes, strict=True):
            new.meta = dict(old.meta)
        twin = fx.GraphModule(self.module, structure, class_name=self.info.root)
        twin.meta[INFO] = self.info
        for name, module in twin.named_modules():  # holders are new; leaf modules are shared and keep their own mode
            module.training = self.module.get_submodule(name).training
        return Graph(twin, self.copies)

    def parameter(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor behind a ``get_attr`` node."""
        if node.op != "get_attr":
            return None
        owner: Any = self.module
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        return owner if isinstance(owner, torch.Tensor) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def run(self, batch: Batch) -> Any:
        args, kwargs = bind(batch)
        return self.module(*args, **kwargs)

    def leaves(self, batch: Batch, where: str) -> list[Any]:
        """The leaves of a batch in the order of ``info.inputs``, however it spells its arguments.

        Raises:
            CaptureError: QG110 other arguments than the captured ones.
        """
        args, kwargs = bind(batch)
        count, expected = (len(pytree.tree_leaves(b)) for b in ((args, kwargs), (self.info.args, self.info.kwargs)))
        if count != expected:
            raise _bad_batch(where, f"{count} inputs, the model was captured with {expected}")
        names = list(inspect.signature(self.module.forward).parameters)[: len(self.info.args)]
        given = {**dict(zip([*names, *self.info.kwargs], args, strict=False)), **kwargs}
        if set(given) != {*names, *self.info.kwargs}:
            have, need = ", ".join(sorted(given)), ", ".join([*names, *self.info.kwargs])
            raise _bad_batch(where, f"its arguments are {have}, the model was captured with {need}")
        ordered = tuple(given[n] for n in names), {n: given[n] for n in self.info.kwargs}
        leaves, spec = pytree.tree_flatten(ordered)
        if spec != pytree.tree_structure((self.info.args, self.info.kwargs)):
            raise _bad_batch(where, "its containers are nested in another way than the captured ones")
        return leaves

    def check_batch(self, batch: Batch, where: str) -> None:
        """Refuse a batch whose leaves differ in number, dtype, rank or fixed sizes from the captured ones."""
        expected = pytree.tree_leaves((self.info.args, self.info.kwargs))
        moving = {(d.leaf, d.axis): d for d in self.info.dims}
        sizes: dict[str, int] = {}
        for i, (leaf, want) in enumerate(zip(self.leaves(batch, where), expected, strict=True)):
            if not isinstance(want, torch.Tensor):
                continue
            at = f"{where}, input '{self.info.inputs[i]}'"
            if not isinstance(leaf, torch.Tensor):
                raise _bad_batch(at, f"a {type(leaf).__name__} where a tensor is expected")
            if leaf.dtype != want.dtype:
                raise _bad_batch(at, f"dtype {leaf.dtype}, captured with {want.dtype}")
            if leaf.ndim != want.ndim:
                raise _bad_batch(at, f"rank {leaf.ndim}, captured with rank {want.ndim}")
            for axis, (have, need) in enumerate(zip(leaf.shape, want.shape, strict=True)):
                problem = _misfit(moving.get((i, axis)), axis, have, need, sizes)
                if problem:
                    raise _bad_batch(at, problem)
            if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                raise _bad_batch(at, "it contains NaN or infinity")

    def size_names(self) -> dict[str, str]:
        """The user's name of each symbol of a dynamic size (``s77`` -> ``batch``)."""
        placeholders = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        return {str(value_of(placeholders[d.leaf]).shape[d.axis]): d.name for d in self.info.dims}

    def structural_hash(self) -> str:
        """SHA-256 of operations, links, constants, shapes, the paths of parameters, and what modules are set to.

        Names of operations and modules do not enter, nor do values of parameters.
        """
        modules = dict(self.module.named_modules(remove_duplicate=False))
        index = {n: i for i, n in enumerate(self.module.graph.nodes)}
        digest = hashlib.sha256()
        for node in self.module.graph.nodes:
            args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{index[n]}")
            shape = tuple(value_of(node).shape) if isinstance(value_of(node), torch.Tensor) else ()
            target = node.target if node.op in ("call_function", "get_attr") else node.op
            if node.op == "call_module":
                target = _set_to(modules[str(node.target)])
            digest.update(repr((node.op, str(target), str(args), [symbol_free(s) for s in shape])).encode())
        return digest.hexdigest()

    def weights_hash(self) -> str:
        """SHA-256 of every parameter and buffer, by name."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        from qatgraph.ir.printer import graph_text

        return graph_text(self)


def bind(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch is what the model takes: a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(batch, dict):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    return (batch,), {}


def export_shapes(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: tuple[DimInfo, ...]
) -> dict[str, Any] | None:
    """The ``dynamic_shapes`` argument of ``torch.export.export``, by argument name."""
    if not dims:
        return None
    leaves: list[Any] = [None] * len(pytree.tree_leaves((args, kwargs)))
    symbols = {d.name: torch.export.Dim(d.name, min=d.low or None, max=d.high) for d in dims}
    for dim in dims:
        leaves[dim.leaf] = {**(leaves[dim.leaf] or {}), dim.axis: symbols[dim.name]}
    for_args, for_kwargs = pytree.tree_unflatten(leaves, pytree.tree_structure((args, kwargs)))
    names = list(inspect.signature(module.forward).parameters)[: len(args)]
    return {**dict(zip(names, for_args, strict=True)), **for_kwargs}


def _misfit(dim: DimInfo | None, axis: int, have: int, need: int, sizes: dict[str, int]) -> str:
    """Why the size of one axis does not fit; ``sizes`` collects those of the named dimensions."""
    if dim is None:
        return "" if have == need else f"size {have} on axis {axis}, which is fixed at {need}"
    if dim.high is not None and have > dim.high:
        return f"'{dim.name}' is {have}, at most {dim.high} was captured"
    if have < max(dim.low, 1):
        return f"'{dim.name}' is {have}, at least {max(dim.low, 1)} was captured"
    if sizes.setdefault(dim.name, have) != have:
        return f"'{dim.name}' is {have}, but {sizes[dim.name]} in another input"
    return ""


def size_text(size: Any, names: Mapping[str, str]) -> str:
    """A size with the user's names: ``5*s77`` -> ``5*batch``."""
    if isinstance(size, int):
        return str(size)
    return re.sub(r"\bs\d+\b", lambda symbol: names.get(symbol[0], symbol[0]), str(size))


def example_size(size: object) -> int:
    """The size on the example batch: symbols carry a hint."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    hint = getattr(node, "hint", None)
    return int(hint) if hint is not None else 1


def _set_to(module: torch.nn.Module) -> str:
    """Class and configuration: ``Dropout(p=0.1, inplace=False)``."""
    return f"{type(module).__name__}({module.extra_repr()})"


def symbol_free(size: Any) -> int | str:
    return size if isinstance(size, int) else "?"


def arguments(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """(role, argument) of each positional argument, roles from the table of kinds; of a list of nodes x0, x1, …"""
    roles = roles_of(record(node).kind)
    for i, arg in enumerate(node.args):
        role = roles[i] if i < len(roles) else f"arg{i}"
        if isinstance(arg, (list, tuple)) and any(isinstance(a, fx.Node) for a in arg):
            yield from ((f"{role}{j}", a) for j, a in enumerate(arg))
        else:
            yield role, arg


def set_argument(node: fx.Node, role: str, value: fx.Node) -> None:
    """Give the node another argument at this role."""
    new = {r: value if r == role else a for r, a in arguments(node)}
    rest = iter(new.values())
    lists = [
        len(a) if isinstance(a, (list, tuple)) and any(isinstance(b, fx.Node) for b in a) else 0 for a in node.args
    ]
    node.args = tuple([next(rest) for _ in range(n)] if n else next(rest) for n in lists)


def _foreign(where: str, what: str) -> CaptureError:
    todo = "pass the module that qatgraph.prepare returned, or a copy of it"
    return CaptureError("QG108", what, where=where, todo=todo)


def _bad_batch(where: str, why: str) -> CaptureError:
    return CaptureError(
        "QG110",
        "the batch does not fit the captured model",
        where=where,
        why=why,
        todo="give batches like the example inputs, or capture again with this kind of input",
    )
