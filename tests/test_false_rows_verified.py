"""A false row is found by verify, too, in a model that uses it, and its node is named; see ``false_rows.py``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

import pytest
from pydantic import ValidationError

import qatgraph as qg
from qatgraph.api import decide
from qatgraph.backends import ort_cpu
from qatgraph.conversion import convert
from qatgraph.errors import QatgraphError
from qatgraph.ir.graph import Graph
from qatgraph.planning.plan import Plan, Prediction
from qatgraph.planning.recipe import Recipe
from qatgraph.planning.target import Row, Target, load_target
from qatgraph.proof import prove
from tests.false_rows import planted
from tests.models import ZOO, canonical
from tests.zoo.road import NATIVE

ORT = load_target("ort-cpu")


@cache
def honest(model: str) -> Plan:
    return decide(canonical(model), ORT, Recipe())


def promise(found: Prediction | None) -> tuple[object, ...]:
    """What a prediction says of the engine."""
    return (found.kernel, found.int8, found.requant, found.accumulator, found.k_order) if found else ()


def lied_to(target: Target, false: Row) -> tuple[str, Plan, list[str]] | None:
    """The first model with nodes of which the false row promises something else than the true table does."""
    for model in ZOO:
        plan = decide(canonical(model), target, Recipe())
        predicted = [p for p in plan.predictions if p.row == false.id]
        nodes = [p.node for p in predicted if promise(p) != promise(honest(model).prediction(p.node))]
        if nodes:
            return model, plan, nodes
    return None


def lies(count: int, seed: int) -> Iterator[tuple[str, str, Plan, list[str]]]:
    """(name, model, plan, nodes) of so many false rows at random, of those that load and that a model uses."""
    every = list(planted(ORT, "native"))
    for name, target, false in random.Random(seed).sample(every, len(every)):
        try:
            Target.model_validate(target.model_dump(mode="json"))
        except ValidationError:
            continue  # refused before a plan is made
        used = lied_to(target, false)
        if used is not None:
            yield name, *used
            count -= 1
        if not count:
            return


def failures(model: str, plan: Plan) -> list[str]:
    """What is said of a model that is prepared, lowered and verified with a plan."""
    case = ZOO[model]
    try:
        qat = qg.prepare(case.capture(), plan).eval()
        qg.calibrate(qat, [case.inputs(1)], progress=False)
        file = ort_cpu.lower(convert(Graph.of(qat)), plan)
        return list(prove(NATIVE, qat, file, [case.inputs(3)], None).failures)
    except QatgraphError as error:
        return [error.text()]


@pytest.mark.slow
def test_20_false_rows_at_random_that_a_model_uses_are_found_by_verify() -> None:
    found = list(lies(20, seed=6))
    assert len(found) == 20
    for name, model, plan, nodes in found:
        said = failures(model, plan)
        assert [line for line in said if any(f"'{n}'" in line for n in nodes)], (name, model, nodes, said)


@pytest.mark.slow
def test_the_true_table_is_not_accused() -> None:
    assert failures("mlp", honest("mlp")) == []
