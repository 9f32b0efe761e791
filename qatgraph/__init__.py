"""qatgraph: a compiler for quantization-aware training, whose plan is proved.

The public names load on first use, so that ``import qatgraph`` costs little more than ``import torch``
and a plan can be read without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qatgraph.version import __version__

if TYPE_CHECKING:
    from qatgraph.api import (
        calibrate,
        canonicalize,
        capture,
        correct_biases,
        lower,
        plan,
        prepare,
        probe,
        probe_diff,
        verify,
    )
    from qatgraph.errors import QatgraphError
    from qatgraph.ir.graph import Graph
    from qatgraph.job import JobData
    from qatgraph.operators import OnnxOp, register_operation
    from qatgraph.pattern_code import Code, Weight
    from qatgraph.planning.constraints import Constraint, pin
    from qatgraph.planning.plan import Plan
    from qatgraph.planning.recipe import Override, Recipe
    from qatgraph.planning.target import Target
    from qatgraph.probing.cases import Realized
    from qatgraph.report.report import Report
    from qatgraph.rewriting.bisect import bisect
    from qatgraph.rewriting.edit import Edit
    from qatgraph.rewriting.manager import PassManager
    from qatgraph.rewriting.passes import GraphPass, PlanningPass, RewritePass, changes_grid, same, within
    from qatgraph.rewriting.pattern import Alt, Const, Group, Match, Moved, Number, Op, Opt
    from qatgraph.rewriting.pattern import Any as AnyValue
    from qatgraph.rewriting.pipeline import Pipeline
    from qatgraph.training.loop import distill

_HOME = {
    "Alt": "rewriting.pattern",
    "AnyValue": "rewriting.pattern:Any",
    "Code": "pattern_code",
    "Const": "rewriting.pattern",
    "Constraint": "planning.constraints",
    "Edit": "rewriting.edit",
    "Graph": "ir.graph",
    "GraphPass": "rewriting.passes",
    "Group": "rewriting.pattern",
    "JobData": "job",
    "Match": "rewriting.pattern",
    "Moved": "rewriting.pattern",
    "Number": "rewriting.pattern",
    "OnnxOp": "operators",
    "Op": "rewriting.pattern",
    "Opt": "rewriting.pattern",
    "Override": "planning.recipe",
    "PassManager": "rewriting.manager",
    "Pipeline": "rewriting.pipeline",
    "Plan": "planning.plan",
    "PlanningPass": "rewriting.passes",
    "QatgraphError": "errors",
    "Realized": "probing.cases",
    "Recipe": "planning.recipe",
    "Report": "report.report",
    "RewritePass": "rewriting.passes",
    "Target": "planning.target",
    "Weight": "pattern_code",
    "bisect": "rewriting.bisect",
    "calibrate": "api",
    "canonicalize": "api",
    "capture": "api",
    "correct_biases": "api",
    "changes_grid": "rewriting.passes",
    "distill": "training.loop",
    "lower": "api",
    "pin": "planning.constraints",
    "plan": "api",
    "prepare": "api",
    "probe": "api",
    "probe_diff": "api",
    "register_operation": "operators",
    "same": "rewriting.passes",
    "verify": "api",
    "within": "rewriting.passes",
}

__all__ = [
    "Alt",
    "AnyValue",
    "Code",
    "Const",
    "Constraint",
    "Edit",
    "Graph",
    "GraphPass",
    "Group",
    "JobData",
    "Match",
    "Moved",
    "Number",
    "OnnxOp",
    "Op",
    "Opt",
    "Override",
    "PassManager",
    "Pipeline",
    "Plan",
    "PlanningPass",
    "QatgraphError",
    "Realized",
    "Recipe",
    "Report",
    "RewritePass",
    "Target",
    "Weight",
    "bisect",
    "calibrate",
    "canonicalize",
    "capture",
    "correct_biases",
    "changes_grid",
    "distill",
    "lower",
    "pin",
    "plan",
    "prepare",
    "probe",
    "probe_diff",
    "register_operation",
    "same",
    "verify",
    "within",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qatgraph' has no attribute '{name}'")
    home, _, attribute = _HOME[name].partition(":")
    value = getattr(import_module(f"qatgraph.{home}"), attribute or name)
    globals()[name] = value
    return value
