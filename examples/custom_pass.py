"""Two passes of your own: a rewrite and a planning pass. Use them with

qatgraph run examples/jobs/digits.toml --passes examples/custom_pass.py
"""

from dataclasses import dataclass

import qatgraph as qg


@dataclass(frozen=True)
class MergeFactors(qg.RewritePass):
    """Merge two factors in a row into one, as a scale and a temperature leave them behind."""

    name = "merge-factors"
    numerics = qg.within(1e-12)
    inner = qg.Op("mul", qg.AnyValue("x"), qg.Number(name="a"), name="inner")
    pattern = qg.Op("mul", inner, qg.Number(name="b"), name="outer")

    def check(self, match):
        return match.refuse("the first product is read elsewhere") if len(match["inner"].users) > 1 else None

    def rewrite(self, match, edit):
        merged = edit.call("mul", match["x"], match["a"] * match["b"], at=match["outer"])
        edit.replace(match["outer"], merged)


@dataclass(frozen=True)
class PinFirstLinear(qg.PlanningPass):
    """Keep the first linear in float: it sees raw pixels or tokens."""

    name = "pin-first-linear"

    def state(self, graph, context):
        first = next((f for f in context.facts if f.kind == "linear"), None)
        if first is not None:
            yield qg.pin(first.name, by=self.name, why=f"'{first.name}' reads the raw input")
