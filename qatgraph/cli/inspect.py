"""Commands that ask about a plan or a target; reading a plan imports neither torch nor an engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatgraph.cli.common import AsJson, PlanFile, app, print_table

if TYPE_CHECKING:
    from rich.tree import Tree


@app.command()
def show(plan_file: PlanFile, as_json: AsJson = False) -> None:
    """A plan as a tree of modules, with totals.

    \b
    Example: qatgraph show build/digits/plan.json
    """
    from rich.console import Console
    from rich.tree import Tree

    from qatgraph.planning.explain import module_tree, partition_text, totals
    from qatgraph.planning.plan import Plan

    found = Plan.load(plan_file)
    tree = module_tree(found)
    if as_json:
        print(json.dumps({"target": found.target, "counts": found.counts(), "modules": tree}, indent=1))
        return
    top = Tree(f"plan for {found.target}, recipe {found.recipe} ({found.hash()[:12]})")
    _grow(top, tree)
    console = Console()
    console.print(top, highlight=False)
    for line in [*totals(found), *(f"  {partition_text(p)}" for p in found.partitions if p.placement == "int8")]:
        console.print(line, highlight=False, markup=False)


@app.command()
def explain(
    plan_file: PlanFile,
    name: Annotated[str, typer.Argument(help="a node, a quantizer or a module with one operation")],
    as_json: AsJson = False,
) -> None:
    """Every decision about one name: who, why, and what lost.

    \b
    Example: qatgraph explain build/digits/plan.json blocks.0.query
    """
    from qatgraph.planning.explain import explain as ask
    from qatgraph.planning.plan import Plan

    answer = ask(Plan.load(plan_file), name)
    print(json.dumps(answer.as_json(), indent=1) if as_json else answer.text(), end="\n" if as_json else "")


@app.command()
def diff(a: PlanFile, b: PlanFile, as_json: AsJson = False) -> None:
    """What two plans decide differently.

    \b
    Example: qatgraph diff build/digits/plan.json npu.json
    """
    from dataclasses import asdict

    from qatgraph.planning.explain import diff as compare
    from qatgraph.planning.plan import Plan

    found = compare(Plan.load(a), Plan.load(b))
    if as_json:
        print(json.dumps([asdict(d) for d in found], indent=1))
        return
    print_table(
        f"{len(found)} decisions differ", ("name", a.name, b.name), [(d.subject, d.before, d.after) for d in found]
    )


@app.command()
def targets(
    name: Annotated[str | None, typer.Argument(help="a target, to print its rows")] = None, as_json: AsJson = False
) -> None:
    """The built-in targets, or the rows of one.

    \b
    Example: qatgraph targets ort-cpu
    """
    from qatgraph.planning.target import load_target, target_names

    if name is None:
        known = [load_target(n) for n in target_names()]
        if as_json:
            print(json.dumps([{"name": t.name, "description": t.description} for t in known], indent=1))
            return
        print_table(f"{len(known)} targets", ("name", "what it is"), [(t.name, t.description) for t in known])
        return
    table = load_target(name)
    if as_json:
        print(table.model_dump_json(indent=1))
        return
    rows = [(r.id, r.op, r.placement, r.kernel, " or ".join(map(str, r.x)), " or ".join(r.bias)) for r in table.row]
    print(f"planning passes: {table.pipeline}" + (f"\nrequires: {table.requires}" if table.requires else "") + "\n")
    print_table(table.description, ("row", "operation", "placement", "kernel", "input grid", "bias"), rows)


def _grow(tree: Tree, level: dict[str, Any]) -> None:
    from rich.text import Text

    for name, below in level.items():
        if isinstance(below, dict):
            _grow(tree.add(Text(name)), below)
        else:
            style = {"int8": "green", "pinned": "yellow"}.get(below.split()[0], "")
            tree.add(Text.assemble(name, "  ", (below, style)))
