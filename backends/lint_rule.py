"""What a rule of the linter is, what it finds, and what it may look at."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from qatgraph.backends.onnx_facts import Operation
from qatgraph.backends.onnx_file import OnnxFile
from qatgraph.kernels import KernelNode
from qatgraph.planning.target import Row, Target

Severity = Literal["wrong", "slow", "risk"]
SEVERITIES: tuple[Severity, ...] = ("wrong", "slow", "risk")
PARTS = ("Why", "Remedy", "Fix")
_PART = re.compile(rf"^({'|'.join(PARTS)}): ", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """One defect. ``fix`` says whether ``--fix`` repairs it."""

    rule: str
    severity: Severity
    node: str
    what: str
    why: str
    remedy: str
    fix: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Hit:
    """Where a rule applies. ``why`` stands for that of the rule, if given; ``exact`` says whether its repair is."""

    node: str
    what: str
    why: str = ""
    exact: bool = True


@dataclass(frozen=True, eq=False)
class Match:
    """The int8 row that fits an operation best, and what of the file stands against it: (id of the rule, sentence).

    ``row`` is None if the table has no int8 row for it; ``floats`` is then, and where something stands against it, the
    row that says what the engine does instead. ``certain`` is False where the table says nothing about the kind.
    """

    row: Row | None
    misfits: tuple[tuple[str, str], ...] = ()
    floats: Row | None = None
    blocked: str = ""
    certain: bool = True

    @property
    def int8(self) -> bool:
        return self.row is not None and not self.misfits


@dataclass(frozen=True, eq=False)
class Engine:
    """What ONNX Runtime makes of the file: its nodes by the label of the written one, or why it refuses the file.

    ``fused`` are the nodes that it made of several, as (kind, label of the node whose result they write).
    """

    kernels: dict[str, tuple[KernelNode, ...]]
    fused: tuple[tuple[str, str], ...] = ()
    refuses: str = ""


@dataclass(frozen=True, eq=False)
class Subject:
    """A file under audit."""

    file: OnnxFile
    operations: tuple[Operation, ...]
    matches: dict[str, Match]
    engine: Engine
    target: Target

    def kernels(self, operation: Operation) -> tuple[KernelNode, ...]:
        """What the engine runs of it, and of the addition of its bias."""
        add = self.file.label(operation.add) if operation.add is not None else ""
        return self.engine.kernels.get(operation.label, ()) + self.engine.kernels.get(add, ())

    def runs(self, operation: Operation) -> bool | None:
        """Whether the engine runs it on integers; None if nothing of it is left, or the engine refuses the file.

        Behind a quantized input MatMulNBits multiplies what was dequantized.
        """
        kernels = [k for k in self.kernels(operation) if not (k.moves and k.kernel in ("Reshape", "Transpose"))]
        floats = ("MatMulNBits",) if operation.quantized else ()
        return any(k.int8 and k.kernel not in floats for k in kernels) if kernels else None

    @cached_property
    def writers(self) -> set[str]:
        """The labels of the operations that run on integers."""
        return {o.label for o in self.operations if self.in_integers(o)}

    def in_integers(self, operation: Operation) -> bool:
        """What the engine does, or what the table says of it where the engine cannot be asked."""
        runs = self.runs(operation)
        return self.matches[operation.label].int8 if runs is None else runs


Check = Callable[[Subject], Iterator[Hit]]
Condition = Callable[[Row, Operation], str]


@dataclass(frozen=True)
class Rule:
    """A check of a whole file, or a condition that an operation must meet to take an int8 row.

    The docstring says what is wrong in one sentence, then ``Why:``, ``Remedy:`` and ``Fix:``; it is the text of the
    findings and of ``docs/lint.md``.
    """

    function: Callable[..., Any]
    severity: Severity
    condition: bool = False

    @property
    def id(self) -> str:
        return self.function.__name__.replace("_", "-")

    @property
    def summary(self) -> str:
        return " ".join(_PART.split(inspect.cleandoc(self.function.__doc__ or ""))[0].split())

    def part(self, name: str) -> str:
        """One of ``PARTS``, on one line; empty if the docstring has none of this name."""
        pieces = _PART.split(inspect.cleandoc(self.function.__doc__ or ""))
        found = dict(zip(pieces[1::2], pieces[2::2], strict=True)).get(name, "")
        return " ".join(found.split())

    @property
    def fixable(self) -> bool:
        return not self.part("Fix").startswith("none")

    def finding(self, hit: Hit) -> Finding:
        why, fix = hit.why or self.part("Why"), self.fixable and hit.exact
        return Finding(self.id, self.severity, hit.node, hit.what, why, self.part("Remedy"), fix)
