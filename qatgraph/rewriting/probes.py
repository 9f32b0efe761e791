"""Runs graphs on probe inputs, in the types of the model or in float64, and keeps every named value."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from qatgraph.ir.aliases import writes
from qatgraph.ir.graph import DimInfo, Graph, example_size
from qatgraph.ir.meta import has_record, record, value_of

Leaves = list[Any]


@dataclass(frozen=True)
class Values:
    """Every named value, in order of execution, and the leaves of the output."""

    named: dict[str, torch.Tensor]
    output: list[Any]


class StaleError(Exception):
    """(where, why): a value has another shape or type than the graph notes."""


class Runner:
    """Runs one graph: with the numbers of the model, or ``wide``, in float64.

    In float64, a cast to a type narrower than float32 still rounds, and its result is widened again.
    """

    def __init__(self, graph: Graph, *, wide: bool = False) -> None:
        self.wide = wide
        self.module = graph.module
        self.copies = _Copies(wide) if wide or _has_state(graph) else None

    def __call__(self, leaves: Leaves, *, noted: bool = False) -> Values:
        """Run; ``noted`` holds each value against the shape and type that the graph notes (raises StaleError)."""
        recorder = (_Wide if self.wide else _Noted if noted else _Recorder)(self.module, self.copies)
        given = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = recorder.run(*given)
        return Values(recorder.named, pytree.tree_leaves(output))


class _Copies:
    """A runner's own copies of what the graph holds, in float64 if ``wide``; two paths to one tensor have one copy."""

    def __init__(self, wide: bool) -> None:
        self.wide = wide
        self.tensors: dict[int, torch.Tensor] = {}
        self.modules: dict[int, torch.nn.Module] = {}
        self.memo: dict[int, Any] = {}

    def tensor(self, source: torch.Tensor) -> torch.Tensor:
        if id(source) not in self.tensors:
            dtype = torch.float64 if self.wide and source.is_floating_point() else source.dtype
            self.tensors[id(source)] = source.detach().to(dtype, copy=True)
        return self.tensors[id(source)]

    def module(self, source: torch.nn.Module) -> torch.nn.Module:
        if id(source) not in self.modules:
            own = copy.deepcopy(source, self.memo)
            self.modules[id(source)] = own.double() if self.wide else own
        return self.modules[id(source)]


def _has_state(graph: Graph) -> bool:
    """Whether a run gives a buffer a new value, which no later run may see."""
    return any(writes(n) and isinstance(n.args[0], fx.Node) and n.args[0].op == "get_attr" for n in graph.nodes)


def example(graph: Graph) -> Leaves:
    return pytree.tree_leaves((graph.info.args, graph.info.kwargs))


def probes(graph: Graph, runner: Runner) -> Iterator[tuple[Leaves, Values]]:
    """The example inputs and a second batch, each with what ``runner`` (of the same graph) makes of it.

    The second holds the same elements, which keeps their domain, in another (seeded) order, and one row more or less
    where sizes move: what a pass baked from the example, a result or a size, is wrong there.
    """
    leaves = example(graph)
    yield leaves, runner(leaves)
    try:
        second = _shuffled(_resized(leaves, graph.info.dims))
        values = runner(second)
    except Exception:  # sizes that depend on one another in a way that only the model knows
        second = _shuffled(leaves)
        values = runner(second)
    yield second, values


def _shuffled(leaves: Leaves) -> Leaves:
    generator = torch.Generator().manual_seed(0)

    def one(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.flatten()[torch.randperm(leaf.numel(), generator=generator)].reshape(leaf.shape)

    return [one(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _resized(leaves: Leaves, dims: tuple[DimInfo, ...]) -> Leaves:
    found, sizes = list(leaves), dict[str, int]()
    for dim in dims:
        leaf = found[dim.leaf]
        have = int(leaf.shape[dim.axis])
        other = have + 1 if dim.high is None or have < dim.high else max(have - 1, dim.low, 1)
        size = sizes.setdefault(dim.name, other)
        found[dim.leaf] = leaf.index_select(dim.axis, torch.arange(size) % have)
    return found


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, copies: _Copies | None) -> None:
        super().__init__(module)
        self.copies = copies
        self.named: dict[str, torch.Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().get_attr(target, args, kwargs)
        return self.copies.tensor(found) if self.copies and isinstance(found, torch.Tensor) else found

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = self.fetch_attr(target)
        return (self.copies.module(found) if self.copies else found)(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)  # and no notes for tracebacks, as fx makes
        value = self.finished(n, getattr(self, n.op)(n.target, args, kwargs))
        if has_record(n) and isinstance(value, torch.Tensor):
            self.named[record(n).name] = value
        return value

    def finished(self, n: fx.Node, value: Any) -> Any:
        return value


class _Noted(_Recorder):
    def finished(self, n: fx.Node, value: Any) -> Any:
        noted = value_of(n)
        if not (has_record(n) and isinstance(value, torch.Tensor) and isinstance(noted, torch.Tensor)):
            return value
        sizes = [example_size(s) for s in noted.shape]
        if sizes != list(value.shape) or noted.dtype != value.dtype:
            why = f"it is {type_text(value)}, the graph notes {noted.dtype}{sizes}"
            raise StaleError(f"'{record(n).name}'", why)
        return value


class _Wide(_Recorder):
    def run(self, *args: Any, **options: Any) -> Any:
        return super().run(*map(_widened, args), **options)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tuple(map(_wide_dtype, args)), {k: _wide_dtype(a) for k, a in kwargs.items()}
        try:
            return super().call_function(target, args, kwargs)
        except Exception:
            if str(target).startswith("aten."):
                raise
            args, kwargs = pytree.tree_map(_narrowed, (args, kwargs))  # a user's kernel may know float32 only
            return super().call_function(target, args, kwargs)

    def finished(self, n: fx.Node, value: Any) -> Any:
        return _widened(value) if isinstance(value, torch.Tensor) else pytree.tree_map(_widened, value)


def _narrowed(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value


def _wide_dtype(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def type_text(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def difference(a: Any, b: Any) -> float:
    """The largest difference over the largest finite value; NaN equals NaN, as infinity equals itself."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return 0.0 if type(a) is type(b) and a == b else float("inf")
    a, b = a.detach(), b.detach()
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    unequal = ~((a == b) | (a.isnan() & b.isnan()))
    if not bool(unequal.any()):
        return 0.0
    if not a.is_floating_point():
        return float("inf")
    top = torch.where(a.isfinite(), a.abs(), 0).max().clamp(min=1e-30)
    error = float((a - b).abs()[unequal].max() / top)
    return error if error == error else float("inf")
