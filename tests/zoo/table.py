"""The results as a page: what of the zoo is captured, what is left over, what is recognised, what runs in int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.zoo.entry import Entry
from tests.zoo.road import Result

HEAD = """\
# The zoo

Tiny models of real architectures, with random weights, from `transformers`, `diffusers` and `tests/zoo/shapes.py`. Each
walks the whole road: capture, every pass with its checks, plan, prepare, calibrate, one step of training, lower, ONNX
Runtime. `tests/test_zoo.py` compares this page with what it finds; `make golden-zoo` writes it.

- *leftover kinds*: operations after all passes that the table of kinds (`qatgraph/ops.py`) lacks; they stay in float.
- *regions*: attention, norms, activations, linears and convolutions, found / known from the description of the model.
- *int8*: linears that the plan puts in int8 / that ONNX Runtime then runs in int8.
"""
COLUMNS = "| architecture | nodes | captured | leftover kinds | regions | int8 |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Shares:
    """What the zoo promises, in fractions; ``clean``: no fault on the road, of what is captured."""

    captured: float
    clean: float
    regions: float
    int8: float


def shares(results: Sequence[Result], zoo: Mapping[str, Entry]) -> Shares:
    captured = [r for r in results if not r.refused]
    known = sum(sum(zoo[r.name].counts.values()) for r in captured)
    found = sum(min(a, b) for r in captured for a, b in zip(r.found.values(), zoo[r.name].counts.values(), strict=True))
    planned = sum(r.planned for r in captured)
    return Shares(
        captured=len(captured) / len(results),
        clean=sum(not r.faults for r in captured) / max(1, len(captured)),
        regions=found / max(1, known),
        int8=sum(r.realized for r in captured) / max(1, planned),
    )


def page(results: Sequence[Result], groups: Mapping[str, Mapping[str, Entry]]) -> str:
    """The whole page, in the order of the groups."""
    by_name = {r.name: r for r in results}
    zoo = {name: entry for group in groups.values() for name, entry in group.items()}
    total = shares(results, zoo)
    parts = [HEAD, _sums(results, total)]
    for title, group in groups.items():
        lines = [_line(by_name[name], entry) for name, entry in group.items()]
        parts.append("\n".join([f"## {title[0].upper()}{title[1:]}", "", COLUMNS, *lines]) + "\n")
    gaps = [f"- `{name}`: {entry.why} ({_gap(entry)})" for name, entry in zoo.items() if any(entry.gaps.values())]
    parts.append("\n".join(["## What no pass recognises yet", "", *gaps]) + "\n")
    return "\n".join(parts)


def _sums(results: Sequence[Result], total: Shares) -> str:
    captured = sum(not r.refused for r in results)
    planned, realized = sum(r.planned for r in results), sum(r.realized for r in results)
    return (
        f"{len(results)} architectures, {captured} captured ({total.captured:.1%}). Of these {total.clean:.1%} walk\n"
        f"the whole road, {total.regions:.1%} of the regions are recognised, and {realized} of {planned} planned int8\n"
        "linears run in int8.\n"
    )


def _line(result: Result, entry: Entry) -> str:
    if result.refused:
        return f"| {result.name} | | no: {result.refused} | | | |"
    left = ", ".join(f"{kind} {count}" for kind, count in result.leftover.items())
    found, known = sum(result.found.values()), sum(entry.counts.values())
    return f"| {result.name} | {result.nodes} | yes | {left} | {found}/{known} | {result.planned}/{result.realized} |"


def _gap(entry: Entry) -> str:
    named = zip(entry.gaps.names(), entry.gaps.values(), strict=True)
    return ", ".join(f"{count} {name}" for name, count in named if count)
