"""Commands that run a job: run, plan, verify, replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qatgraph.cli.common import AsJson, JobFile, OutputOption, PassesOption, TargetOption, app, busy, print_table

MaxFallback = Annotated[
    str | None,
    typer.Option("--max-fallback", help="refuse a plan of which more of the work than this falls back to float: 10%"),
]
Require = Annotated[
    list[str] | None, typer.Option("--require", help="a kind of which every node must be int8; may be repeated")
]


@app.command()
def run(
    job: JobFile,
    target: TargetOption = None,
    train: Annotated[bool, typer.Option("--train/--no-train", help="train after calibration")] = True,
    output: OutputOption = None,
    passes: PassesOption = None,
    max_fallback: MaxFallback = None,
    require: Require = None,
) -> None:
    """Capture, plan, calibrate, train, lower and verify a model.

    \b
    Example: qatgraph run examples/jobs/digits.toml --no-train
    """
    from qatgraph.runner import run_job

    report, folder = run_job(
        job,
        output,
        target=_target(target),
        train=train,
        passes=passes or [],
        budget=_budget(max_fallback, require),
        say=lambda s: print(s, flush=True),
    )
    _show_report(report.as_json())
    print(f"\nwrote {folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")


@app.command()
def plan(
    job: JobFile,
    target: TargetOption = None,
    output: Annotated[Path | None, typer.Option("--output", help="also write the plan to this file")] = None,
    passes: PassesOption = None,
    max_fallback: MaxFallback = None,
    require: Require = None,
    as_json: AsJson = False,
) -> None:
    """Decide what becomes int8, without calibration or training.

    \b
    Example: qatgraph plan examples/jobs/digits.toml --target examples/targets/toy_npu.toml --output npu.json
    """
    from qatgraph.backends.qdq_onnx import write_atomically
    from qatgraph.job import load_job
    from qatgraph.rewriting.registry import parse_passes
    from qatgraph.runner import canonicalize, make_plan, set_up, threads

    found, budget = load_job(job), _budget(max_fallback, require)
    if target is not None:
        found = found.model_copy(update={"target": _target(target)})
    with busy(f"capture and plan {job}"), threads(found.threads):
        extra = parse_passes(passes or [])
        made = make_plan(found, job, canonicalize(found, job, set_up(found, job, found.seeds[0]), extra), extra, budget)
    if output is not None:
        write_atomically(output, made.to_json().encode())
    print(made.to_json() if as_json else str(made), end="")


@app.command()
def verify(
    job: JobFile,
    output: OutputOption = None,
    as_json: AsJson = False,
) -> None:
    """Prove again what a run has written.

    Its kernels, that no sum overflows, every int8 region, and the distance to the float model.

    \b
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
    """Run again from plan and manifest; the bytes must be equal.

    It fails unless the file comes out byte for byte as it was.

    \b
    Example: qatgraph replay build/digits examples/jobs/digits.toml --output build/digits-again
    """
    from qatgraph.runner import replay_folder

    digest = replay_folder(folder, job, output, say=lambda s: print(s, flush=True))
    print(f"the same bytes: sha256 {digest}")


@app.command()
def saturation(job: JobFile, target: TargetOption = None, passes: PassesOption = None, as_json: AsJson = False) -> None:
    """What 16-bit sums cost without VNNI, by cure.

    \b
    Pair sums of 16 bits at full-range scales: by layer and output channel, the worst case and what happens on data.
    Cures: pair-safe scales, 7-bit weights, the exact session option. The model is calibrated, not trained.

    \b
    Example: qatgraph saturation examples/jobs/digits.toml
    """
    from qatgraph.runner import saturation as analyse

    with busy(f"capture {job}") as say:
        found = analyse(job, target=_target(target), passes=passes or [], say=say).as_json()
    print(json.dumps(found, indent=1)) if as_json else _show_saturation(found)


def _show_saturation(found: dict[str, Any]) -> None:
    layers, cures = found["layers"], found["cures"]
    shares, worst = ("channels_that_could", "pairs_that_do", "outputs_that_do"), "{index}:{outputs_that_do:.0%}"
    print_table(
        f"{found['target']} at full range on x86 without VNNI: channels that could saturate, pair sums and outputs "
        "that do, the worst channel and its share of outputs",
        ("product", "kernel", "K", "could", "pairs", "outputs", "worst"),
        [
            (r["node"], r["kernel"], str(r["k"]), *(f"{r[s]:.1%}" for s in shares), worst.format(**r["worst_channel"]))
            for r in layers
        ],
    )
    print_table(
        "\nrelative error of each product's output against its float weights, by cure",
        ("product", *cures),
        [(r["node"], *(f"{r['relative_error'][c]:.2%}" for c in cures)) for r in layers],
    )
    print("", *(f"{c}: {v['is']}" for c, v in cures.items()), sep="\n")
    measures = [k for k in next(iter(cures.values())) if k not in ("is", "relative_error")]
    print_table(
        f"\nthe whole model; milliseconds on {found['isa']}, one thread",
        ("cure", "error", *measures),
        [(c, f"{v['relative_error']:.2%}", *(f"{v[m]:.4f}" for m in measures)) for c, v in cures.items()],
    )
    print("", *found["summary"], sep="\n")


def _target(target: str | None) -> str | None:
    """A target file is named from where the user stands, not from the job's folder."""
    return str(Path(target).resolve()) if target is not None and target.endswith(".toml") else target


def _budget(max_fallback: str | None, require: list[str] | None) -> dict[str, Any]:
    """What the command line says of the budget; the rest is the recipe's."""
    from qatgraph.planning.budget import parse_share

    found: dict[str, Any] = {"require": tuple(require)} if require else {}
    if max_fallback is not None:
        try:
            found["max_fallback"] = parse_share(max_fallback)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--max-fallback") from error
    return found


def _show_report(report: dict[str, Any]) -> None:
    from qatgraph.report.report import flatten, format_value

    rows = []
    for section in ("fidelity", "parity", "kernels", "fallback", "overflow", "latency", "files"):
        for key, value in flatten(report[section]):
            if key != "how" and not key.startswith("by_seed"):
                rows.append((section, key, format_value(value)))
    verdict = "every check passed" if report["ok"] else "FAILED"
    print_table(f"\n{report['job']} on {report['target']}: {verdict}", ("", "what", "value"), rows)
