"""The plan: every decision as data with a reason. A value that reads, prints and compares without torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from qatgraph.errors import PlanError
from qatgraph.planning.constraints import Author, Port
from qatgraph.planning.facts import NodeFact
from qatgraph.specs import QuantSpec

VERSION = 2


@dataclass(frozen=True)
class Quantizer:
    """One grid: ``ports`` share it, ``values`` are the tensors that it stands on (a node, an input or a parameter).

    ``observer`` says how an activation's range is found; weights compute theirs, and a fixed grid has none to find.
    ``derived_from`` names the quantizers whose scales multiply to this one's.
    """

    name: str
    spec: QuantSpec
    values: tuple[str, ...]
    ports: tuple[Port, ...]
    observer: str = ""
    derived_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class Alternative:
    """``us``: what it is estimated to take on the example batch, with the quantizes in front of it that are not there
    anyway; ``None`` where the target has no costs, or the alternative is a grid."""

    choice: str
    author: Author
    why_lost: str
    kernel: str = ""
    us: float | None = None


@dataclass(frozen=True)
class Decision:
    """``subject`` is a node or a quantizer; ``rule`` the target row or recipe line."""

    subject: str
    choice: str
    author: Author
    rule: str
    why: str
    lost: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Placement:
    """``us``: the estimated microseconds of the node on the example batch, and ``float_us`` of its float kernel, if the
    target has costs."""

    node: str
    placement: str  # int8, engine-float, host
    form: str = ""
    bias: str = ""
    partition: int = 0
    us: float | None = None
    float_us: float | None = None


@dataclass(frozen=True)
class Partition:
    """A maximal convex group of one placement: no path leaves it and comes back.

    ``quantizes`` and ``dequantizes`` are the values at its border that are turned to integers for it, or back. One that
    several partitions read is the first one's. ``boundary_bytes`` are what they read and write on the example batch,
    ``boundary_us`` their estimated microseconds, if the target has costs.
    """

    index: int
    placement: str
    nodes: tuple[str, ...]
    quantizes: tuple[str, ...] = ()
    dequantizes: tuple[str, ...] = ()
    boundary_bytes: int = 0
    boundary_us: float | None = None


@dataclass(frozen=True)
class Prediction:
    """The kernel that the engine will choose; alternatives are joined by ``|``.

    An empty one means any float kernel, or, of an int8 node, that it is a part of another node's kernel.
    ``accumulator``, ``k_order``, ``requant``, ``deviation`` and ``finest`` are those of the row, see ``target.Row``.
    """

    node: str
    kernel: str
    row: str
    int8: bool
    accumulator: str = ""
    k_order: str = ""
    requant: str = ""
    deviation: int = 0
    finest: float = 0.0
    pinned: bool = False
    blocked_by: str = ""
    remedy: str = ""

    @property
    def in_pairs(self) -> bool:
        """Whether its products are first added in pairs to 16 bits, on x86 without VNNI."""
        return self.accumulator == "pair16-without-vnni"


@dataclass(frozen=True)
class Plan:
    """``requires``, ``backend`` and ``opset`` come from the target's table, so that a plan lowers without it.

    ``integer_outputs`` are the names of the outputs that leave the model as integers.
    """

    target: str
    requires: str
    backend: str
    opset: int
    recipe: str
    nodes: tuple[NodeFact, ...]
    quantizers: tuple[Quantizer, ...]
    placements: tuple[Placement, ...]
    partitions: tuple[Partition, ...]
    predictions: tuple[Prediction, ...]
    decisions: tuple[Decision, ...]
    hashes: dict[str, str] = field(default_factory=dict)
    integer_outputs: tuple[str, ...] = ()
    version: int = VERSION

    def placement(self, node: str) -> Placement:
        return next(p for p in self.placements if p.node == node)

    def quantizer_at(self, port: Port) -> Quantizer | None:
        return next((q for q in self.quantizers if port in q.ports), None)

    def prediction(self, node: str) -> Prediction | None:
        return next((p for p in self.predictions if p.node == node), None)

    def int8_nodes(self) -> list[str]:
        return [p.node for p in self.placements if p.placement == "int8"]

    def to_json(self) -> str:
        """Canonical: sorted keys, one fixed layout, a final newline."""
        data = _adapter().dump_python(self, mode="json")
        return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Read a plan.

        Raises:
            PlanError: QG304 it is not a plan of this version.
        """
        try:
            data = json.loads(text)
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}, this is version {VERSION}")
            return _adapter().validate_python(data)
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(
                "QG304",
                "this is not a plan that can be read",
                where=where,
                why=f"{type(error).__name__}: {error}",
                todo="write it again with `qatgraph plan JOB.toml`",
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                "QG304", f"cannot read '{path}'", where="plan", why=str(error), todo="check the path"
            ) from error

    def __str__(self) -> str:
        from qatgraph.planning.explain import plan_text

        return plan_text(self)

    def counts(self) -> dict[str, int]:
        return dict(Counter(p.placement for p in self.placements))


@cache
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)
