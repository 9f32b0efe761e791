"""Write ``docs/peers.md`` from what ``bench_peers.py`` measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

HEAD = """# The files of other tools

What `qatgraph audit` says of QDQ files that other tools write, each with its own defaults, and what `--fix` gives back.
Written by `make peers`, which installs each tool in an environment of its own; the scripts are in `benchmarks/peers`.
The models are those of the jobs `efficientnet_lite0` (50 products) and `minilm`, calibrated on the batches of the job.
[lint.md](lint.md) has every rule. Tools that quantize modules only take the first model. neural-compressor-pt 3.10
installs, but writes no ONNX file any more.

A product is a Conv, MatMul or Gemm: *int8*, in *float* though an operand is dequantized, or *not* quantized at all. Of
the products in float a check apart from the rules demands that some finding says why. A repaired file computes the
same numbers between any two quantizes; the cosines differ where a kernel on integers rounds a tie to the other side,
which cascades. Where the file is inaccurate, the repaired one is, too.
"""
COLUMNS = (
    "peer", "int8, float, not", "after --fix", "float ms", "file ms", "fixed ms", "float / file", "float / fixed",
    "cosine", "fixed",
)  # fmt: skip


def page(result: dict[str, Any]) -> str:
    """The page of a run: for each model a table, then what is wrong with each file."""
    return "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield HEAD
    silent = [f"{name} of {r['name']}" for r in result["records"] for name in r.get("unexplained", ())]
    yield f"In float without an explanation: {', '.join(silent) or 'none'}.\n"
    options = "default session options" if not result["options"] else "session.x64quantprecision=1"
    engine = result["versions"].get("onnxruntime", "")
    yield f"Measured on {result['isa']} with onnxruntime {engine}: one thread, {options}, batch 8, medians of 15 rounds"
    yield "in which the float model, the file and the repaired file ran in turn, so that other load meets all alike."
    yield "Cosines to float are means over the evaluation batches. Times compare within a row only.\n"
    for model in dict.fromkeys(r["model"] for r in result["records"]):
        records = [r for r in result["records"] if r["model"] == model]
        yield f"## {model}\n"
        yield _row(COLUMNS)
        yield _row(["---"] * len(COLUMNS))
        yield from (_row(_cells(r)) for r in records)
        yield ""
        for record in records:
            yield from _section(record)


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(record: dict[str, Any]) -> list[str]:
    if record["error"]:
        return [record["name"], "no file", *[""] * (len(COLUMNS) - 2)]
    fix, measured = record["fix"], record["measured"]
    times = [measured[k]["ms"] if k in measured else None for k in ("float", "file", "fixed")]
    ratios = [times[0] / t if times[0] and t else None for t in times[1:]]
    cosines = [measured[k]["cosine"] if k in measured else None for k in ("file", "fixed")]
    shown = [*(_number(t, 1) for t in times), *(_number(r, 2) for r in ratios), *(_number(c, 4) for c in cosines)]
    return [record["name"], _products(record), _products(fix) if fix else "-", *shown]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _products(counted: dict[str, Any]) -> str:
    return ", ".join(str(counted["products"][kind]) for kind in ("int8", "float", "bare"))


def _section(record: dict[str, Any]) -> Iterator[str]:
    yield f"### {record['name']} on {record['model']}\n"
    packages = ", ".join(p for p in record["packages"] if not p.startswith("efficientnet"))
    yield f"{record['about']} ({packages})\n"
    if record["error"]:
        yield f"It writes no file here: `{record['error']}`\n"
        return
    yield from (_group(g) for g in record["groups"])
    if not record["groups"]:
        yield "Nothing was found."
    yield ""
    yield f"{_repair(record)}\n"


def _group(group: dict[str, Any]) -> str:
    """One item of the list: what, where for example, why and what to do."""
    work = f", {group['work']:.0%} of the multiplications" if group["work"] >= 0.005 else ""
    fixed = "; `--fix` repairs " + ("it" if group["fix"] == group["hits"] else f"{group['fix']} of them")
    title = f"**{group['severity']} `{group['rule']}`, {group['hits']}{work}{fixed if group['fix'] else ''}.**"
    return f"- {title} Such as {group['example']}. *Why*: {group['why']} *Do*: {group['remedy']}"


def _repair(record: dict[str, Any]) -> str:
    fix = record["fix"]
    if record.get("fix_refused"):
        return f"No repair: {record['fix_refused']}."
    if not fix:
        return "Nothing of it can be repaired exactly."
    return (
        f"`--fix` repairs {fix['mended']} findings, {fix['left']} are left: {_products(fix)} products int8, float, not "
        f"quantized. Between two quantizes the numbers differ by {fix['regions']:.1g} of the largest at most."
    )
