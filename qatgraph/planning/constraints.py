"""What passes, recipes and target rows say, before the solver decides."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.specs import QuantSpec

# Precedence, strongest first.
RECIPE_NAMED, PIN, RECIPE_GLOB = 3, 2, 1


@dataclass(frozen=True)
class Port:
    """One end of an edge: ``role`` is x, y, weight, bias or out."""

    node: str
    role: str

    def __str__(self) -> str:
        return f"{self.node}.{self.role}"


@dataclass(frozen=True)
class Author:
    """Who said it: ``kind`` is recipe, pass, row or default; ``id`` its name; ``where`` file and line or selector."""

    kind: str
    id: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.id}" + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True)
class Constraint:
    """One wish.

    ``float``: the node of the port stays in float. ``int8``: it may not stay in float. ``want``: the port takes
    one of ``specs`` (or, for a bias, the ``form``). ``integers``: the node is an output of the model, and shall leave
    it as integers. ``share``: all ports lie on one grid. ``derive``: the first port's scale is the product of the
    others'.
    """

    kind: str
    ports: tuple[Port, ...]
    author: Author
    why: str
    specs: tuple[QuantSpec, ...] = ()
    form: str = ""
    strength: int = PIN
    line: int = 0  # of the recipe: among equals the later line wins

    def order(self) -> tuple[object, ...]:
        """The same for any order in which constraints were stated; the strongest first."""
        specs = [str(s) for s in self.specs]
        return (-self.strength, -self.line, str(self.author), str(self.ports), self.kind, specs, self.form, self.why)


def pin(node: str, *, by: str, why: str) -> Constraint:
    """Keep one node in float: nothing but a recipe line that names it lifts this."""
    return Constraint("float", (Port(node, "out"),), Author("pass", by), why)
