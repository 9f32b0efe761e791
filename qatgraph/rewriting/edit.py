"""The only way to change a graph: every node made here has a name, a value and a history."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import NodeRecord, has_record, record, stamp, update, value_of, write
from qatgraph.ops import BY_NAME, kind_of_target
from qatgraph.rewriting.evidence import Evidence
from qatgraph.rewriting.pattern import NearMiss, Refusal


@dataclass
class Allowance:
    """How many rewrites a run may still do, and the (pass, node) of those that it did: bisection counts on it.

    ``stopped``: a pass wanted more, so it has not done what it ensures.
    """

    limit: int | None = None
    spent: list[tuple[str, str]] = field(default_factory=list)
    stopped: bool = False

    def left(self) -> bool:
        """Whether one more rewrite may be done; asked before anything of the pass runs."""
        if self.limit is None or len(self.spent) < self.limit:
            return True
        self.stopped = True
        return False

    def spend(self, author: str, node: str) -> None:
        self.spent.append((author, node))


class Edit:
    """Changes by one pass; ``at`` is the node in front of which new nodes are put.

    What the pass has to say about nodes that it left alone is collected in ``refused`` and ``missed``. ``evidence`` is
    there for a pass that says ``needs_data``.
    """

    def __init__(
        self, graph: Graph, author: str, allowance: Allowance | None = None, evidence: Evidence | None = None
    ) -> None:
        self.graph, self.author = graph, author
        self.allowance = allowance or Allowance()
        self.evidence = evidence or Evidence((), _unplanned)
        self.refused: list[Refusal] = []
        self.missed: list[NearMiss] = []
        self.changes = 0  # replaced, removed, grouped or renamed
        self._namer = graph.namer()
        self._scope: set[fx.Node] | None = None  # what may change; None is everything

    @contextmanager
    def within(self, nodes: Iterable[fx.Node]) -> Iterator[None]:
        """Only these nodes, and those made meanwhile, may be changed."""
        self._scope = set(nodes)
        try:
            yield
        finally:
            self._scope = None

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Say why a node was left as it is."""
        self.refused.append(Refusal(record(node).name, reason))

    def _change(self, node: fx.Node) -> None:
        self.changes += 1
        if self._scope is not None and node not in self._scope:
            name = record(node).name if has_record(node) else str(node.target)
            raise PassError(
                "QG208",
                f"'{self.author}' changes '{name}', which its pattern did not match",
                where=name,
                why=f"the match holds {', '.join(sorted(record(n).name for n in self._scope))}",
                todo="put the operation into the pattern, so that its users are counted",
            )

    def call(self, kind: str, *args: Any, at: fx.Node, **kwargs: Any) -> fx.Node:
        """A new operation of a known kind, in the module of ``at``."""
        target = BY_NAME[kind].targets[0]
        namespace, name, overload = target.split(".")
        operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        return self._create("call_function", operator, args, kwargs, kind, at)

    def operator(self, operator: Any, *args: Any, at: fx.Node, near: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """A new call of an overload, in the module of ``near``; the table of kinds, or its own name, gives its kind."""
        return self._create("call_function", operator, args, kwargs, kind_of_target(str(operator)), at, near)

    def custom(self, operator: Any, *args: Any, at: fx.Node, near: fx.Node, kind: str) -> fx.Node:
        """A new operation that is not in the table of kinds (quantize, dequantize), in the module of ``near``."""
        return self._create("call_function", operator, args, {}, kind, at, near)

    def module(
        self, path: str, module: torch.nn.Module, *args: Any, at: fx.Node, near: fx.Node, kind: str = "fake_quantize"
    ) -> fx.Node:
        """A call of a module that is stored at ``path`` (used again if one is there), in the module of ``near``."""
        if not _has(self.graph.module, path):
            self.graph.module.add_submodule(path, module)
        return self._create("call_module", path, args, {}, kind, at, near)

    def constant(self, path: str, tensor: torch.Tensor, at: fx.Node) -> fx.Node:
        """A new buffer at ``path`` and the node that reads it."""
        holder, _, leaf = path.rpartition(".")
        if holder and not _has(self.graph.module, holder):
            self.graph.module.add_submodule(holder, torch.nn.Module())
        self.graph.module.get_submodule(holder).register_buffer(leaf, tensor)
        with self.graph.module.graph.inserting_before(at):
            node = self.graph.module.graph.get_attr(path)
        node.meta["val"] = tensor
        return node

    def parameter(self, path: str, tensor: torch.Tensor, at: fx.Node) -> fx.Node:
        """A new parameter at ``path`` (a folded one is named ``…weight/folded``) and the node that reads it.

        It holds a copy of the values, and is frozen if what it was computed from is. Where a parameter of other values
        has the path, the new one is ``…weight/folded#2``; one of equal values is read again, so what was tied stays so.
        """
        holder, _, leaf = path.rpartition(".")
        values = tensor.detach().clone(memory_format=torch.contiguous_format)
        parameter = torch.nn.Parameter(values, requires_grad=tensor.requires_grad)
        known = dict(self.graph.module.get_submodule(holder).named_parameters(recurse=False, remove_duplicate=False))
        paths = (leaf if i == 1 else f"{leaf}#{i}" for i in itertools.count(1))
        leaf = next(p for p in paths if p not in known or _equal(known[p], parameter))
        parameter = known.get(leaf, parameter)
        path = f"{holder}.{leaf}" if holder else leaf
        self.graph.module.get_submodule(holder).register_parameter(leaf, parameter)
        with self.graph.module.graph.inserting_before(at):
            node = self.graph.module.graph.get_attr(path)
        node.meta["val"] = parameter
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Give the users of ``old`` to ``new``; ``old`` goes, and its name stays if the kind did."""
        was = record(old)
        self._change(old)
        name = was.name if was.kind == record(new).kind else record(new).name
        update(new, name=name, history=(*was.history, self.author), source=was.source)
        old.replace_all_uses_with(new)
        self.graph.module.graph.erase_node(old)

    def reread(self, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let a node read ``new`` where it read ``old``; everything else of it stays."""
        self._change(node)
        node.replace_input_with(old, new)
        stamp(node, self.author)

    def bypass(self, node: fx.Node, source: fx.Node) -> None:
        """Remove a node whose result equals ``source``."""
        self._change(node)
        node.replace_all_uses_with(source)
        self.graph.module.graph.erase_node(node)

    def erase(self, node: fx.Node) -> None:
        self._change(node)
        self.graph.module.graph.erase_node(node)

    def group(self, region: str, *nodes: fx.Node) -> None:
        """Mark nodes as one region; the arithmetic stays as it is."""
        for node in nodes:
            self._change(node)
            update(node, region=f"{record(nodes[0]).name}+{region}")
            stamp(node, self.author)

    def rename_kind(self, node: fx.Node, kind: str) -> None:
        """Refine the kind of a node (``add`` -> ``residual_add``); its name follows."""
        self._change(node)
        old = record(node)
        name = self._namer(f"{old.module or self.graph.info.root}:{kind}")
        write(node, replace(old, kind=kind, name=name))
        stamp(node, self.author)

    def _create(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: str,
        at: fx.Node,
        near: fx.Node | None = None,
    ) -> fx.Node:
        with self.graph.module.graph.inserting_before(at):
            node = self.graph.module.graph.create_node(op, target, args, kwargs)
        owner = record(near or at)
        name = self._namer(f"{owner.module or self.graph.info.root}:{kind}")
        write(node, NodeRecord(name, kind, owner.module, owner.source, history=(self.author,)))
        node.meta["val"] = self._value(node, at)
        if self._scope is not None:
            self._scope.add(node)
        return node

    def _value(self, node: fx.Node, at: fx.Node) -> Any:
        if node.op == "call_module":  # our modules (fake quantizer, dropout) keep shape and dtype
            return value_of(node.args[0])  # type: ignore[arg-type]
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
        modes = (getattr(value, "fake_mode", None) for value in (value_of(at), *args))
        fake = next((mode for mode in modes if mode is not None), None)
        if fake is None:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        with fake, _sizes_kept(fake.shape_env):
            fakes = [fake.from_tensor(a, static_shapes=True) if type(a) is torch.Tensor else a for a in args]
            return node.target(*fakes, **kwargs)  # type: ignore[operator]


@contextmanager
def _sizes_kept(env: Any) -> Iterator[None]:
    """What an operation asks of a size must not fix that size: all graphs of the model share its symbols."""
    kept = [(facts, dict(facts)) for facts in (env.replacements, env.var_to_range)] if env is not None else []
    try:
        yield
    finally:
        for facts, before in kept:
            if facts != before:
                facts.clear()
                facts.update(before)
                env._update_version_counter()  # what torch remembered of them is void


def _equal(one: torch.nn.Parameter, other: torch.nn.Parameter) -> bool:
    same = one.requires_grad == other.requires_grad and one.dtype == other.dtype
    return same and torch.equal(one, other)


def _has(module: torch.nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _unplanned(graph: Graph) -> Any:
    raise NotImplementedError("a pass that wants a plan says needs_data = True")
