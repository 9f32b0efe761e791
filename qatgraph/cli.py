"""The command line. Reading a plan imports neither torch nor an engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatgraph.errors import LowerError, QatgraphError

if TYPE_CHECKING:
    from rich.tree import Tree

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Quantization-aware training as a compiler: plan, train, lower and prove int8 models.",
)

JobFile = Annotated[Path, typer.Argument(help="the job, a TOML file", metavar="JOB.toml")]
PlanFile = Annotated[Path, typer.Argument(help="a plan, as JSON", metavar="plan.json")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
TargetOption = Annotated[str | None, typer.Option("--target", help="a built-in target or a TOML file")]
OutputOption = Annotated[Path | None, typer.Option("--output", help="the folder of the run, by default build/NAME")]
PassesOption = Annotated[
    list[str] | None, typer.Option("--passes", help="a pass with options, or a Python file of passes; may be repeated")
]


@app.command()
def run(
    job: JobFile,
    target: TargetOption = None,
    train: Annotated[bool, typer.Option("--train/--no-train", help="train after calibration")] = True,
    output: OutputOption = None,
    passes: PassesOption = None,
) -> None:
    """Capture, plan, calibrate, train, lower and verify a model.

    Example: qatgraph run examples/jobs/digits.toml --no-train
    """
    from qatgraph.runner import run_job

    report, folder = run_job(
        job, output, target=_target(target), train=train, passes=passes or [], say=lambda s: print(s, flush=True)
    )
    _show_report(report.as_json())
    print(f"\nwrote {folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")


@app.command()
def plan(
    job: JobFile,
    target: TargetOption = None,
    output: Annotated[Path | None, typer.Option("--output", help="also write the plan to this file")] = None,
    passes: PassesOption = None,
    as_json: AsJson = False,
) -> None:
    """Decide what becomes int8, without calibration or training.

    Example: qatgraph plan examples/jobs/digits.toml --target examples/targets/toy_npu.toml
    """
    from qatgraph.backends.qdq_onnx import write_atomically
    from qatgraph.job import load_job
    from qatgraph.rewriting.registry import parse_passes
    from qatgraph.runner import make_plan, set_up, threads

    found = load_job(job)
    if target is not None:
        found = found.model_copy(update={"target": _target(target)})
    with threads(found.threads):
        made = make_plan(found, job, set_up(found, job, found.seeds[0]), parse_passes(passes or []))
    if output is not None:
        write_atomically(output, made.to_json().encode())
    print(made.to_json() if as_json else str(made), end="")


@app.command()
def verify(
    job: JobFile,
    output: OutputOption = None,
    as_json: AsJson = False,
) -> None:
    """Prove again what a run has written: kernels, overflow, regions, distance to the float model.

    Example: qatgraph verify examples/jobs/digits.toml
    """
    from qatgraph.runner import verify_folder

    report = verify_folder(job, output)
    print(report.to_json(), end="") if as_json else _show_report(report.as_json())
    report.check()


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="the folder of a run", metavar="DIR")],
    job: JobFile,
    output: Annotated[Path, typer.Option("--output", help="where to write the second run")],
) -> None:
    """Run a job again from a recorded plan and manifest; fails unless the bytes of the file are the same.

    Example: qatgraph replay build/digits examples/jobs/digits.toml --output build/digits-again
    """
    from qatgraph.runner import replay_folder

    digest = replay_folder(folder, job, output, say=lambda s: print(s, flush=True))
    print(f"the same bytes: sha256 {digest}")


@app.command()
def audit(
    file: Annotated[Path, typer.Argument(help="any QDQ model", metavar="FILE.onnx")],
    as_json: AsJson = False,
) -> None:
    """What ONNX Runtime really runs: which nodes in int8, which in float although Q/DQ stand around them.

    Example: qatgraph audit build/minilm/minilm.onnx
    """
    from qatgraph.backends.ort_cpu import audit_file

    if not file.is_file():
        raise LowerError("QG506", f"there is no file '{file}'", where="audit", todo="check the path")
    found = audit_file(file.read_bytes())
    if as_json:
        print(json.dumps(found.as_json(), indent=1))
        return
    _table(
        f"{file.name}: {len(found.int8)} nodes run in int8, {len(found.silent_float)} silently in float, "
        f"{found.other} were never quantized",
        ("node", "kernel", "runs in"),
        [(n.name, n.kernel, "int8") for n in found.int8] + [(n.name, n.kernel, "FLOAT") for n in found.silent_float],
    )


@app.command()
def show(plan_file: PlanFile, as_json: AsJson = False) -> None:
    """A plan as a tree of modules, with totals.

    Example: qatgraph show build/minilm/plan.json
    """
    from rich.console import Console
    from rich.tree import Tree

    from qatgraph.planning.explain import module_tree, totals
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
    for line in totals(found):
        console.print(line, highlight=False, markup=False)


@app.command()
def explain(
    plan_file: PlanFile,
    name: Annotated[str, typer.Argument(help="a node, a quantizer or a module with one operation")],
    as_json: AsJson = False,
) -> None:
    """Every decision about one name: who decided, why, what lost, the kernel.

    Example: qatgraph explain build/minilm/plan.json encoder.encoder.layer.0.attention.self.query
    """
    from qatgraph.planning.explain import explain as ask
    from qatgraph.planning.plan import Plan

    answer = ask(Plan.load(plan_file), name)
    print(json.dumps(answer.as_json(), indent=1) if as_json else answer.text(), end="\n" if as_json else "")


@app.command()
def diff(a: PlanFile, b: PlanFile, as_json: AsJson = False) -> None:
    """What two plans decide differently.

    Example: qatgraph diff ort.json npu.json
    """
    from dataclasses import asdict

    from qatgraph.planning.explain import diff as compare
    from qatgraph.planning.plan import Plan

    found = compare(Plan.load(a), Plan.load(b))
    if as_json:
        print(json.dumps([asdict(d) for d in found], indent=1))
        return
    _table(f"{len(found)} decisions differ", ("name", a.name, b.name), [(d.subject, d.before, d.after) for d in found])


@app.command()
def passes(as_json: AsJson = False) -> None:
    """The built-in passes.

    Example: qatgraph passes --json
    """
    from qatgraph.rewriting.registry import builtin_names, pass_class

    rows = [(n, "planning" if _is_planning(n) else "rewrite", pass_class(n).summary()) for n in builtin_names()]
    if as_json:
        print(json.dumps([dict(zip(("name", "kind", "summary"), r, strict=True)) for r in rows], indent=1))
        return
    _table(f"{len(rows)} passes, in the order of the pipelines", ("name", "kind", "what it does"), rows)


@app.command()
def targets(
    name: Annotated[str | None, typer.Argument(help="a target, to print its rows")] = None, as_json: AsJson = False
) -> None:
    """The built-in targets, or the rows of one.

    Example: qatgraph targets ort-cpu
    """
    from qatgraph.planning.target import load_target, target_names

    if name is None:
        known = [load_target(n) for n in target_names()]
        if as_json:
            print(json.dumps([{"name": t.name, "description": t.description} for t in known], indent=1))
            return
        _table(f"{len(known)} targets", ("name", "what it is"), [(t.name, t.description) for t in known])
        return
    table = load_target(name)
    if as_json:
        print(table.model_dump_json(indent=1))
        return
    rows = [(r.id, r.op, r.placement, r.kernel, " or ".join(map(str, r.x)), " or ".join(r.bias)) for r in table.row]
    _table(table.description, ("row", "operation", "placement", "kernel", "input grid", "bias"), rows)


def main() -> None:
    """Entry point: a refusal is a sentence on standard error and exit code 1."""
    try:
        app()
    except QatgraphError as error:
        print(error.text(), file=sys.stderr)
        raise SystemExit(1) from None


def _target(target: str | None) -> str | None:
    """A target file is named from where the user stands, not from the job's folder."""
    return str(Path(target).resolve()) if target is not None and target.endswith(".toml") else target


def _is_planning(name: str) -> bool:
    from qatgraph.rewriting.passes import PlanningPass
    from qatgraph.rewriting.registry import pass_class

    return issubclass(pass_class(name), PlanningPass)


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def _grow(tree: Tree, level: dict[str, Any]) -> None:
    from rich.text import Text

    for name, below in level.items():
        if isinstance(below, dict):
            _grow(tree.add(Text(name)), below)
        else:
            style = {"int8": "green", "pinned": "yellow"}.get(below.split()[0], "")
            tree.add(Text.assemble(name, "  ", (below, style)))


def _show_report(report: dict[str, Any]) -> None:
    from qatgraph.report.report import flatten, format_value

    rows = []
    for section in ("fidelity", "parity", "kernels", "overflow", "latency", "files"):
        for key, value in flatten(report[section]):
            if key != "how" and not key.startswith("by_seed"):
                rows.append((section, key, format_value(value)))
    verdict = "every check passed" if report["ok"] else "FAILED"
    _table(f"\n{report['job']} on {report['target']}: {verdict}", ("", "what", "value"), rows)
