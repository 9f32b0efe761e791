"""Recipes: what the user wants, as data."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from qatgraph.errors import PlanError
from qatgraph.ir.names import is_glob, matches, select
from qatgraph.planning.budget import Budget
from qatgraph.planning.constraints import RECIPE_GLOB, RECIPE_NAMED, Author, Constraint, Port
from qatgraph.planning.facts import NodeFact
from qatgraph.planning.target import BiasForm, Spec, no_quantizer
from qatgraph.planning.user_files import UserModel, parse_toml, read_text
from qatgraph.specs import QuantSpec, parse_observer


def _observer(text: str) -> str:
    parse_observer(text)
    return text


def _weight(spec: QuantSpec) -> QuantSpec:
    why = no_quantizer("", "weight", spec)
    if why:
        raise ValueError(f"no quantizer makes weight = '{spec}': {why}")
    return spec


Observer = Annotated[str, AfterValidator(_observer)]


class Override(UserModel):
    """One line of a recipe: what shall hold for the nodes that ``select`` means (a name or a glob)."""

    select: str
    place: Literal["float", "int8"] | None = None
    x: Spec | None = None
    weight: Annotated[Spec, AfterValidator(_weight)] | None = None
    bias: BiasForm | None = None
    observer: Observer | None = None
    why: str = ""


class Recipe(UserModel):
    """``observer`` chooses activation ranges; ``override`` lists the exceptions. Later lines win among equals.

    ``integer_outputs``: names (or globs) of outputs that leave the model as integers. Their grids span all that
    calibration saw, whatever the observer: the largest logits would be equal where it cuts them off.
    ``budget`` decides nothing: a plan that misses it is refused.
    """

    name: str = "int8"
    observer: Observer = "mse"
    integer_outputs: tuple[str, ...] = ()
    override: tuple[Override, ...] = ()
    budget: Budget = Budget()

    def hash(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"budget"}).encode()).hexdigest()

    def constraints(self, facts: tuple[NodeFact, ...]) -> list[Constraint]:
        """The recipe's lines as constraints; a selector that matches nothing is an error."""
        names = [f.name for f in facts]
        found: list[Constraint] = []
        for i, line in enumerate(self.override):
            author = Author("recipe", self.name, f"override {i + 1}, '{line.select}'")
            strength = RECIPE_GLOB if is_glob(line.select) else RECIPE_NAMED
            why = line.why or f"the recipe '{self.name}' says so in override {i + 1}"
            for name in select(line.select, names, where=str(author)):
                if line.place is not None:
                    port = (Port(name, "out"),)
                    found.append(Constraint(line.place, port, author, why, strength=strength, line=i))
                for role, spec in (("x", line.x), ("weight", line.weight)):
                    if spec is not None:
                        port = (Port(name, role),)
                        found.append(Constraint("want", port, author, why, specs=(spec,), strength=strength, line=i))
                if line.bias is not None:
                    port = (Port(name, "bias"),)
                    found.append(Constraint("want", port, author, why, form=line.bias, strength=strength, line=i))
        return found + self._borders(facts)

    def _borders(self, facts: tuple[NodeFact, ...]) -> list[Constraint]:
        """The outputs that shall be integers.

        Raises:
            PlanError: QG301 no float output bears the name, QG312 the same value is also an output in float.
        """
        author, names = Author("recipe", self.name, "integer_outputs"), [o for f in facts for o in f.outputs]
        asked = {o for line in self.integer_outputs for o in select(line, names, where=str(author))}
        found = []
        for fact in (f for f in facts if asked.intersection(f.outputs)):
            other = next((o for o in fact.outputs if o not in asked), None)
            if other is not None:
                raise PlanError(
                    "QG312", f"one value cannot be the output '{min(asked & {*fact.outputs})}' as integers and "
                    f"'{other}' in float", where=str(author), why=f"both are '{fact.name}', which one kernel writes",
                    todo=f"add '{other}' to integer_outputs",
                )  # fmt: skip
            why = f"the recipe '{self.name}' wants the output '{fact.outputs[0]}' as integers"
            found.append(Constraint("integers", (Port(fact.name, "out"),), author, why))
        return found

    def observer_of(self, node: str) -> Observer:
        """The observer of a node's input."""
        lines = [o for o in self.override if o.observer is not None and matches(o.select, node)]
        named = [o for o in lines if not is_glob(o.select)]
        return (named or lines)[-1].observer or self.observer if lines else self.observer


LINEARS = "*:linear*"
BUILTIN = {
    r.name: r
    for r in (
        Recipe(),
        Recipe(
            name="int8-dynamic", override=(Override(select=LINEARS, x=QuantSpec.parse("u8 affine per-tensor dynamic")),)
        ),
        Recipe(
            name="int8-weights", override=(Override(select="*", weight=QuantSpec.parse("s8 symmetric per-block(32)")),)
        ),
        Recipe(
            name="int4-weights", override=(Override(select="*", weight=QuantSpec.parse("s4 symmetric per-block(32)")),)
        ),
    )
}


def load_recipe(source: str | Recipe) -> Recipe:
    """The name of a recipe in ``BUILTIN``, a TOML file, or a Recipe itself.

    Raises:
        PlanError: QG302 unknown name or unreadable file, QG303 the file is not a valid recipe.
    """
    if isinstance(source, Recipe):
        return source
    if source in BUILTIN:
        return BUILTIN[source]
    path = Path(source)
    if path.suffix != ".toml":
        raise PlanError(
            "QG302",
            f"there is no recipe '{source}'",
            where="recipe",
            why=f"built in are {', '.join(BUILTIN)}",
            todo="use one of them or the path of a TOML file",
        )
    text = read_text(path, what="recipe", error=PlanError, code="QG302")
    return parse_toml(
        Recipe, text, where=path.name, error=PlanError, code="QG303", todo="see the recipe keys in the README"
    )
