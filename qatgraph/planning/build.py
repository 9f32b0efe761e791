"""From constraints to the plan: collect, solve once, write once, with a reason for every decision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qatgraph.planning.choices import Choice, port_of
from qatgraph.planning.constraints import Author, Constraint, Port
from qatgraph.planning.facts import NodeFact
from qatgraph.planning.grids import Grid, is_dynamic, port_options, value_at
from qatgraph.planning.islands import settle
from qatgraph.planning.partitions import borders_of, partitions_of, sizes_of
from qatgraph.planning.plan import Alternative, Decision, Placement, Plan, Prediction, Quantizer
from qatgraph.planning.predict import UNASKED, bias_of
from qatgraph.planning.prices import Prices
from qatgraph.planning.recipe import Recipe
from qatgraph.planning.solver import ABSENT_WHY, Solution
from qatgraph.planning.target import Row, Target
from qatgraph.specs import DType, Granularity, QuantSpec, ScaleRule

DEFAULT = Author("default", "float fallback")


@dataclass(frozen=True)
class PlanningContext:
    """What a planning pass may ask."""

    target: Target
    recipe: Recipe
    facts: tuple[NodeFact, ...]


def build_plan(context: PlanningContext, constraints: Iterable[Constraint], hashes: dict[str, str]) -> Plan:
    """Solve and write the plan; ``constraints`` come from the passes, the recipe adds its own."""
    stated = sorted([*context.recipe.constraints(context.facts), *constraints], key=Constraint.order)
    solution = settle(context.facts, context.target, stated)
    quantizers, grid_decisions = _quantizers(solution, context, stated)
    chosen: dict[str, str] = {n: (c.row.placement if c.row else "engine-float") for n, c in solution.choices.items()}
    borders, size = borders_of(solution.choices, solution.readers), sizes_of(context.facts)
    parts = partitions_of(context.facts, solution, chosen, borders, size, context.target.cost)
    number = {n: p.index for p in parts for n in p.nodes}
    choices = solution.choices.values()
    prices = Prices(context.target.cost, borders, size)
    plan = Plan(
        target=context.target.name,
        requires=context.target.requires,
        backend=context.target.backend,
        opset=context.target.opset,
        recipe=context.recipe.name,
        nodes=context.facts,
        quantizers=tuple(quantizers),
        placements=tuple(_placement(c, chosen, number, prices) for c in choices),
        partitions=parts,
        predictions=tuple(_prediction(c) for c in choices if c.rows and not _moves_floats(c)),
        decisions=(*(_decision(c, prices) for c in choices), *grid_decisions),
        hashes=hashes,
        integer_outputs=tuple(o for c in choices if c.border is not None for o in c.fact.outputs),
    )
    context.recipe.budget.check(plan)
    return plan


def _placement(choice: Choice, chosen: dict[str, str], number: dict[str, int], prices: Prices) -> Placement:
    name, row = choice.fact.name, choice.row
    bias = bias_of(row, choice.fact, choice.wants) if row is not None and row.bias else None
    us, float_us = prices.taken(choice), prices.in_float(choice)
    return Placement(name, chosen[name], row.form if row else "", bias or "", number[name], us, float_us)


def _prediction(choice: Choice) -> Prediction:
    row, name = choice.row, choice.fact.name
    pinned = choice.held is not None
    if row is None:
        first, why = choice.rows[0]
        reason = choice.held.why if choice.held else f"'{first.id}' does not fit: {why or choice.out[first.id]}"
        return Prediction(name, "", "", False, pinned=pinned, blocked_by=reason)
    if row.placement == "int8":
        how = row.accumulator, row.k_order, row.requant, row.deviation, row.finest
        return Prediction(name, row.kernel, row.id, True, *how)
    best = next(((r, why or choice.out.get(r.id, "")) for r, why in choice.rows if r.placement == "int8"), None)
    blocked = choice.held.why if choice.held else row.why.format(**choice.fact.words())
    remedy = row.remedy.format(**choice.fact.words()) or (
        f"make '{best[0].id}' fit: {best[1]}" if best and not choice.held else ""
    )
    return Prediction(name, row.kernel, row.id, False, pinned=pinned, blocked_by=blocked, remedy=remedy)


def _moves_floats(choice: Choice) -> bool:
    """Rows for what only moves elements promise nothing where it moves floats."""
    return choice.row is None and all(row.moves for row, _ in choice.rows)


def _decision(choice: Choice, prices: Prices) -> Decision:
    row, fact, held = choice.row, choice.fact, choice.held
    placement = f"{row.placement} as {_kernels(row)}" if row is not None else "engine-float"
    lost = tuple(_lost(choice, prices))
    if held is not None:
        return Decision(fact.name, placement, held.author, held.author.id, held.why, lost)
    if fact.absent:
        author, why = Author("default", fact.absent), ABSENT_WHY[fact.absent].format(fact.name)
        return Decision(fact.name, placement, author, fact.absent, why, lost)
    if row is None:
        why = f"no row of the target fits '{fact.name}', a {fact.kind}: it stays in float"
        return Decision(fact.name, placement, DEFAULT, "no row", why, lost)
    return Decision(fact.name, placement, Author("row", row.id), row.id, row.why.format(**fact.words()), lost)


def _lost(choice: Choice, prices: Prices) -> Iterator[Alternative]:
    """The other rows of the kind, with why they lost; rows for forms that nobody asked for are no alternatives."""
    for row, why in choice.rows:
        if row is choice.row or why.startswith(UNASKED):
            continue
        reason = why or choice.out.get(row.id, "") or f"'{choice.row.id if choice.row else ''}' comes first"
        what, us = f"{row.placement} as {_kernels(row)}", prices.other(choice, row)
        yield Alternative(what, Author("row", row.id), reason, row.kernel, us)
    if choice.held is not None:
        for wish in [*choice.int8s, *choice.asked]:
            asked = wish.form or " or ".join(map(str, wish.specs)) or "int8"
            yield Alternative(asked, wish.author, f"{choice.held.author} holds the node in float")


def _kernels(row: Row) -> str:
    return row.kernel.replace("|", " or ") or "a part of another kernel"


def _quantizers(
    solution: Solution, context: PlanningContext, stated: Sequence[Constraint]
) -> tuple[list[Quantizer], list[Decision]]:
    quantizers: list[Quantizer] = []
    decisions: list[Decision] = []
    shared = _shared(stated)
    int8 = (c for c in solution.choices.values() if c.int8)
    asked = {p: s for c in int8 for _, p, s in port_options(c, solution.choices, solution.readers)}
    for grid in solution.grids:
        first = next((p for p in grid.ports if p.role != "out"), grid.ports[0])
        given = first.role == "weight" or is_dynamic(grid.options) or grid.options[0].scale is ScaleRule.FIXED
        leaves = any(c.border is not None for v in grid.values if (c := solution.choices.get(v)) is not None)
        observer = "" if given else "minmax" if leaves else context.recipe.observer_of(first.node)
        quantizers.append(Quantizer(str(first), grid.options[0], grid.values, grid.ports, observer))
        decisions.append(_grid_decision(str(first), grid, solution, shared, asked))
    at = {p: q for q in reversed(quantizers) for p in q.ports}
    for constraint in (c for c in stated if c.kind == "derive"):
        choice = solution.choices[constraint.ports[0].node]
        if choice.row is None or not choice.int8 or bias_of(choice.row, choice.fact, choice.wants) != "int32":
            continue
        derived = _derived(constraint, at, solution)
        quantizers.append(derived)
        decisions.append(Decision(derived.name, str(derived.spec), constraint.author, choice.row.id, constraint.why))
    return quantizers, decisions


def _shared(stated: Sequence[Constraint]) -> dict[str, tuple[int, Constraint]]:
    """Of each value, the first wish to share its grid."""
    found: dict[str, tuple[int, Constraint]] = {}
    for i, constraint in enumerate(c for c in stated if c.kind == "share"):
        for port in (constraint.ports[0], constraint.ports[-1]):
            found.setdefault(port.node, (i, constraint))
    return found


def _derived(constraint: Constraint, at: dict[Port, Quantizer], solution: Solution) -> Quantizer:
    bias, x, weight = constraint.ports
    choices = solution.choices
    _, source = port_of(choices[x.node], x.role, value_at(x, choices), choices)
    found = [at[source], at[weight]]
    per_channel = any(q.spec.granularity is Granularity.PER_CHANNEL for q in found)
    granularity = Granularity.PER_CHANNEL if per_channel else Granularity.PER_TENSOR
    spec = QuantSpec(DType.S32, granularity=granularity, axis=0 if per_channel else None, scale=ScaleRule.DERIVED)
    return Quantizer(str(bias), spec, (str(bias),), (bias,), derived_from=tuple(q.name for q in found))


def _grid_decision(
    name: str,
    grid: Grid,
    solution: Solution,
    shared: dict[str, tuple[int, Constraint]],
    asked: dict[Port, tuple[QuantSpec, ...]],
) -> Decision:
    owner = next(solution.choices[p.node] for p in grid.ports)
    assert owner.row is not None
    spec = grid.options[0]
    value = _and([f"'{v}'" for v in grid.values])
    ports = _and([f"'{p}'" for p in grid.ports])
    why = f"{ports} {'take' if len(grid.ports) > 1 else 'takes'} {value} as {spec}"
    if len(grid.values) > 1:
        sharing = [shared[v] for v in grid.values if v in shared]
        if sharing:
            _, first = min(sharing, key=lambda s: s[0])
            why += f"; {first.author}: {first.why}"
    for border in (solution.choices[v].border for v in grid.values if v in solution.choices):
        why += f"; {border.author}: {border.why}" if border is not None else ""
    wished = {p: asked[p] for p in grid.ports}
    lost = [
        Alternative(str(s), Author("row", _row_id(solution, port)), f"the other readers of {value} need {spec}")
        for port, specs in wished.items()
        for s in specs[:1]
        if s != spec and s.meet(spec) is None
    ]
    rest = [Alternative(str(s), Author("row", owner.row.id), f"{spec} is preferred") for s in grid.options[1:]]
    apart = [
        Alternative("one grid", c.author, reason)
        for c, reason in solution.unshared
        if any(value_at(p, solution.choices) in grid.values for p in c.ports)
    ]
    return Decision(name, str(spec), Author("row", owner.row.id), owner.row.id, why, tuple(lost + rest + apart))


def _and(words: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _row_id(solution: Solution, port: Port) -> str:
    row = solution.choices[port.node].row
    return row.id if row else ""
