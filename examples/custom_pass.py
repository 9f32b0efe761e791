"""Two passes of your own: a rewrite and a planning pass. Use them with

qatgraph run examples/jobs/digits.toml --passes examples/custom_pass.py
"""

from dataclasses import dataclass

import qatgraph as qg


@dataclass(frozen=True)
class RemoveMulByOne(qg.RewritePass):
    """Remove multiplications by 1, which scaled models leave behind."""

    name = "remove-mul-by-one"
    numerics = qg.same
    pattern = qg.Op("mul", qg.AnyValue("x"), qg.Number(1.0), name="mul")

    def check(self, match):
        return match.refuse("'x' is not computed") if match["x"].op == "get_attr" else None

    def rewrite(self, match, edit):
        edit.bypass(match["mul"], match["x"])


@dataclass(frozen=True)
class PinFirstLinear(qg.PlanningPass):
    """Keep the first linear in float: it sees raw pixels or tokens."""

    name = "pin-first-linear"

    def state(self, graph, context):
        first = next((f for f in context.facts if f.kind == "linear"), None)
        if first is not None:
            yield qg.pin(first.name, by=self.name, why=f"'{first.name}' reads the raw input")
