"""Commands for those who write passes: passes, opt, bisect."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatgraph.cli.common import AsJson, app, busy, print_table
from qatgraph.errors import LowerError, PassError

if TYPE_CHECKING:
    from qatgraph.ir.graph import Graph
    from qatgraph.rewriting.manager import PassReport
    from qatgraph.rewriting.pipeline import Pipeline

Model = Annotated[str, typer.Argument(help="JOB.toml, FILE.pt2, or FILE.py:FUNCTION", metavar="MODEL")]
PipelineOption = Annotated[
    str, typer.Option("-p", "--pipeline", help="passes, files of passes and pipelines, joined by commas")
]


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="a pass, to print its documentation")] = None,
    as_json: AsJson = False,
) -> None:
    """The passes that can be named, or the documentation of one.

    \b
    Example: qatgraph passes fold-gelu
    """
    import inspect
    from dataclasses import fields

    from qatgraph.rewriting.registry import pass_class, pass_names

    if name is not None:
        cls = pass_class(name)
        options = ", ".join(f"{f.name} = {f.default!r}" for f in fields(cls))
        print(f"{name}\n\n{inspect.cleandoc(cls.__doc__ or '')}\nOptions: {options or 'none'}.")
        return
    rows = [(n, _kind(n), pass_class(n).summary()) for n in pass_names()]
    if as_json:
        print(json.dumps([dict(zip(("name", "kind", "summary"), r, strict=True)) for r in rows], indent=1))
        return
    print_table(f"{len(rows)} passes", ("name", "kind", "what it does"), rows)


@app.command()
def opt(
    model: Model,
    pipeline: PipelineOption = "canonicalize",
    print_after: Annotated[str, typer.Option(help="print the graph after: all, changed, or a pass")] = "",
    dump: Annotated[
        Path | None, typer.Option(help="write the text after each pass, and the diffs, to this folder")
    ] = None,
    time: Annotated[bool, typer.Option("--time", help="show the milliseconds of each pass, and of its checks")] = False,
    explain: Annotated[str, typer.Option(help="what almost matched, for this pass")] = "",
    blame: Annotated[str, typer.Option(help="which passes made or changed this node")] = "",
    as_json: AsJson = False,
) -> None:
    """Run passes over a model and see everything that they do.

    \b
    Example: qatgraph opt examples/jobs/digits.toml --print-after changed --time
    """
    from qatgraph.rewriting.manager import PassManager
    from qatgraph.rewriting.pipeline import Pipeline
    from qatgraph.sources import load

    steps = Pipeline.parse(pipeline)
    for named in (explain, "" if print_after in ("", "all", "changed") else print_after):
        if named:
            _check_step(steps, named)
    with busy(f"capture {model}") as say:
        graph, evidence = load(model)
        manager = PassManager(steps.steps, leaves=graph.stage, evidence=evidence)

        def watch(report: PassReport) -> None:
            _watch(len(manager.reports) - 1, report, print_after, dump, as_json)
            say(f"{report.name} is done, {len(manager.reports)} of {len(steps.graph_passes())} passes")

        manager.watch = watch
        try:
            after = manager.run(graph)
        except PassError as error:
            if error.diff:
                print(error.diff, file=sys.stderr)
            if dump is not None and error.after:
                number = len(manager.reports)
                _dump(dump, f"{number:02d}-{steps.graph_passes()[number].name}", error.after, error.diff)
            raise
    if as_json:
        print(json.dumps([r.as_json() for r in manager.reports], indent=1))
    elif explain:
        _explain(next(r for r in manager.reports if r.name == explain))
    elif blame:
        _blame(after, blame)
    else:
        _summary(manager.reports, time)


@app.command()
def bisect(
    model: Model,
    pipeline: PipelineOption = "canonicalize",
    script: Annotated[
        str, typer.Option(help="FILE.py:FUNCTION, true for a bad graph; default: the numbers differ")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """The first pass and rewrite that change the numbers or fail.

    With --script, the first with which a function of yours says so. Its exit code is 1 where nothing is to blame.

    \b
    Example: qatgraph bisect examples/jobs/digits.toml -p canonicalize,examples/custom_pass.py
    """
    from dataclasses import asdict

    from qatgraph.job import factory
    from qatgraph.rewriting.bisect import bisect as search
    from qatgraph.rewriting.bisect import numbers_differ
    from qatgraph.rewriting.pipeline import Pipeline
    from qatgraph.sources import load

    steps = Pipeline.parse(pipeline)
    with busy(f"capture {model}") as say:
        graph, evidence = load(model)
        if script:
            file, _, name = script.rpartition(":")
            bad = factory(Path(file), f"{Path(file).name}:{name}", "predicate")
        else:
            bad = numbers_differ(graph)
        say("search: the pipeline runs again and again")
        found = search(graph, steps, bad, evidence)
    print(json.dumps(asdict(found), indent=1) if as_json else str(found))


def _kind(name: str) -> str:
    from qatgraph.rewriting.passes import PlanningPass
    from qatgraph.rewriting.registry import pass_class

    return "planning" if issubclass(pass_class(name), PlanningPass) else "rewrite"


def _check_step(pipeline: Pipeline, name: str) -> None:
    """Refuse a step that will not report: one that the pipeline does not have, or one that plans."""
    if pipeline.steps[pipeline.index(name)] not in pipeline.graph_passes():
        todo = "name a pass that changes the graph; see `qatgraph plan` for what the others decide"
        why = "it states constraints for the plan, and changes no graph"
        raise PassError("QG212", f"the step '{name}' does not run here", where=str(pipeline), why=why, todo=todo)


def _watch(number: int, report: PassReport, print_after: str, dump: Path | None, as_json: bool) -> None:
    """Show and write what a pass did as soon as it is done: a later one may fail."""
    if print_after in ("all", report.name) or (print_after == "changed" and report.modified):
        shown = report.diff() if print_after == "changed" else report.after
        print(f"-- after {report.name}\n{shown}", flush=True, file=sys.stderr if as_json else sys.stdout)
    if dump is not None:
        _dump(dump, f"{number:02d}-{report.name}", report.after, report.diff())


def _dump(folder: Path, stem: str, after: str, diff: str) -> None:
    from qatgraph.backends.qdq_onnx import write_atomically

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        todo = "name a folder that can be written"
        raise LowerError("QG504", f"cannot write '{folder.name}'", where="--dump", why=str(error), todo=todo) from error
    for suffix, text in (("txt", after), ("diff", diff)):
        write_atomically(folder / f"{stem}.{suffix}", text.encode())


def _summary(reports: list[PassReport], time: bool) -> None:
    rows = []
    for r in reports:
        reasons = Counter(refusal.reason for refusal in r.refused).most_common(1)
        refused = f"{len(r.refused)}: {reasons[0][0]}" if reasons else "0"
        near = str(r.missed[0]) if r.missed and r.missed[0].near else ""
        times = [f"{r.seconds * 1e3:.0f}", f"{r.checking * 1e3:.0f}"] if time else []
        rows.append((r.name, str(r.changes), refused, near, *times))
    columns = ("pass", "changed", "refused, and why most", "nearest miss", *(["ms", "check"] if time else []))
    took = f" in {sum(r.seconds for r in reports):.1f} s, checked in {sum(r.checking for r in reports):.1f} s"
    print_table(f"{len(reports)} passes{took if time else ''}", columns, rows)


def _explain(report: PassReport) -> None:
    print(f"{report.name}: {report.changes} changes, {len(report.refused)} refused, {len(report.missed)} did not match")
    for refusal in report.refused:
        print(f"  refused at '{refusal.node}': {refusal.reason}")
    for miss in report.missed:
        print(f"  {miss}")


def _blame(graph: Graph, name: str) -> None:
    from qatgraph.ir.meta import record

    found = record(graph.node(name))
    print(f"{name}  ({found.source or 'no line of the model'})")
    for author in found.history or ("capture only",):
        print(f"  {author}")
