"""Real weights without calibration: MiniLM with dynamic linears, and with 4-bit weights in blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qatgraph as qg
from qatgraph import fidelity
from qatgraph.backends import ort_cpu
from qatgraph.conversion import convert
from qatgraph.ir.graph import Graph
from qatgraph.job import load_job
from qatgraph.kernels import compare_kernels
from qatgraph.planning.recipe import Override, Recipe, load_recipe
from qatgraph.proof import feed_of, model_run
from qatgraph.runner import Setup, set_up
from qatgraph.specs import QuantSpec

pytestmark = pytest.mark.slow

JOB = Path(__file__).parent.parent / "examples" / "jobs" / "minilm.toml"
BATCHES = 2
FOUR = Recipe(
    name="four", override=(Override(select="*:linear*", weight=QuantSpec.parse("s4 symmetric per-block(32)")),)
)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return set_up(load_job(JOB), JOB, 0)


@pytest.mark.parametrize(
    ("recipe", "kernels", "cosine", "megabytes"),
    [
        (load_recipe("int8-dynamic"), {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}, 0.99, 26),
        (FOUR, {"MatMulNBits"}, 0.95, 20),  # 0.98 was hoped for: docs/decisions/weights-in-blocks.md
    ],
    ids=["dynamic", "four-bits"],
)
def test_36_kernels_and_the_cosine(
    setup: Setup, recipe: Recipe, kernels: set[str], cosine: float, megabytes: float
) -> None:
    plan = qg.plan(setup.graph, recipe=recipe)
    qat = qg.prepare(setup.graph, plan).eval()
    qg.calibrate(qat, [], progress=False)
    file = ort_cpu.lower(convert(Graph.of(qat)), plan)
    realized = ort_cpu.audit(file)
    assert compare_kernels(plan, realized) == []
    assert len([n for n in realized if n.int8 and n.kernel in kernels]) == 36
    batches = list(setup.data.evaluate)[:BATCHES]
    session = ort_cpu.session(file)
    have = [
        fidelity.first_output([torch.from_numpy(a) for a in ort_cpu.run(session, feed_of(Graph.of(qat), b))])
        for b in batches
    ]
    found = fidelity.cosine(have, fidelity.outputs(model_run(setup.model), batches))
    print(f"{recipe.name}: {found}, {len(file) / 1e6:.1f} MB")
    assert found["cosine_mean"] >= cosine
    assert len(file) / 1e6 <= megabytes
