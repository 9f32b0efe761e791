"""The command that explains a QDQ file of any tool, and repairs what it can."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatgraph.cli.common import AsJson, app, busy, print_table

if TYPE_CHECKING:
    from qatgraph.backends.lint import Lint
    from qatgraph.backends.lint_fix import Repaired

SHOWN = 3  # nodes of one rule; --json has all


@app.command()
def audit(
    file: Annotated[Path, typer.Argument(help="any QDQ model", metavar="FILE.onnx")],
    fix: Annotated[
        Path | None,
        typer.Option("--fix", help="write a file with every exact repair, proved equal", metavar="OUT.onnx"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What is wrong, slow or at risk in any QDQ model, and why.

    Of any tool; ONNX Runtime is asked what it really runs. Exit code 1 if something is wrong: the numbers, not only
    the speed. docs/lint.md has every rule.

    \b
    Example: qatgraph audit build/digits/digits.onnx
    """
    from qatgraph.backends import lint, lint_fix, onnx_file

    model = onnx_file.load(file)
    with busy(f"reading {file.name} and what the engine makes of it"):
        found = lint.lint(model)
    if not as_json:
        _print(file.name, found)
    repaired = None
    if fix is not None and any(f.fix for f in found.findings):
        with busy("repairing, and running both files"):
            repaired = lint_fix.fix(model, found, fix)
    if as_json:
        print(json.dumps({**found.as_json(), "fix": repaired.as_json() if repaired is not None else None}, indent=1))
    else:
        _print_repair(found, fix, repaired)
    if found.counts["wrong"]:
        raise typer.Exit(1)


def _print(name: str, found: Lint) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    counts = ", ".join(f"{number} {severity}" for severity, number in found.counts.items())
    runs = Counter(p.runs for p in found.products)
    console.print(Text(f"{name}: {counts}"))
    console.print(
        Text(f"of {len(found.products)} products (Conv, MatMul, Gemm) {runs['int8']} run in int8, ")
        + Text(f"{runs['float']} in float behind Q/DQ, {runs['bare']} are not quantized")
    )
    if found.unexplained:
        console.print(Text(f"no rule explains the float of {', '.join(found.unexplained)}: report it with the file"))
    for rule in dict.fromkeys(f.rule for f in found.findings):
        hits = [f for f in found.findings if f.rule == rule]
        first = hits[0]
        style = {"wrong": "bold red", "slow": "yellow", "risk": "cyan"}[first.severity]
        title = Text.assemble("\n", (f"{first.severity} ", style), (rule, "bold"), f"  {len(hits)}")
        work = found.work(rule) if first.severity == "slow" else 0
        title += Text(f"  {work:.0%} of the multiplications" if work else "")
        console.print(title + Text("  --fix repairs it" if any(f.fix for f in hits) else ""))
        for hit in hits[:SHOWN]:
            console.print(Padding(Text.assemble((hit.node, "bold"), f": {hit.what}"), (0, 0, 0, 2)))
        if len(hits) > SHOWN:
            console.print(Padding(Text(f"and {len(hits) - SHOWN} more, see --json"), (0, 0, 0, 2)))
        for word, texts in (("why", {f.why: None for f in hits}), ("do", {f.remedy: None for f in hits})):
            for text in list(texts)[:SHOWN]:
                console.print(Padding(Text.assemble((f"{word}: ", "italic"), text), (0, 0, 0, 2)))


def _print_repair(found: Lint, fix: Path | None, repaired: Repaired | None) -> None:
    if fix is None:
        return
    if repaired is None:
        print("\nnothing here can be repaired exactly: no file was written")
        return
    proof = repaired.proof
    how = " (as written: refused at default options)" if proof.refused else ""
    print(
        f"\n{fix}: {repaired.mended} findings repaired, {len(repaired.after.findings)} are left; the outputs differ by "
        f"{proof.outputs:.1g} of the largest number, each part between two quantizes by {proof.regions:.1g} at most; "
        f"{proof.before_ms:.3g} ms before{how}, {proof.after_ms:.3g} ms after "
        f"({proof.isa}, one thread, interleaved medians)"
    )
    changed = repaired.changed(found)
    if changed:
        print_table("kernels", ("node", "before", "after"), changed)
