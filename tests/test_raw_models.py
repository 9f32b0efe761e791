"""Models in spellings that only the passes can read, on the whole road: what is read, and that it stays true."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch

from qatgraph.backends import ort_cpu
from qatgraph.ir.graph import bind
from qatgraph.ir.meta import record
from qatgraph.kernels import compare_kernels
from qatgraph.planning.plan import Plan
from qatgraph.proof import prove
from tests.lowered import Lowered, lower
from tests.models import RAW, canonical

READ: dict[str, dict[str, int]] = {
    "cnn": {"conv2d": 2, "conv_transpose2d": 1, "linear": 1, "clamp": 1, "relu": 1, "batch_norm": 0, "pad": 0},
    "written": {"layer_norm": 1, "linear": 3, "matmul": 2, "softmax": 1, "gelu": 1, "split": 0, "exp": 0, "pow": 0},
    "llama": {"rms_norm": 2, "linear": 7, "attention": 1, "silu": 1, "residual_add": 2, "chunk": 0, "cos": 0},
    "clip": {"linear": 2, "matmul": 0},
    "pruned": {"linear": 3, "embedding": 1, "relu": 1, "mul": 1},
    "decomposed": {"layer_norm": 2, "linear": 6, "matmul": 2, "safe_softmax": 1, "addmm": 0, "native_layer_norm": 0},
}
REGIONS: dict[str, set[str]] = {
    "cnn": {"clamp", "relu"},
    "written": {"attention", "gelu"},
    "llama": {"rotary"},
    "clip": {"quick_gelu"},
    "pruned": {"relu"},
    "decomposed": {"attention"},
}
DEPTHWISE = {"cnn"}  # between float operations the int8 kernel of a depthwise convolution wins nothing


@pytest.mark.parametrize("name", RAW)
def test_the_layers_are_read(name: str) -> None:
    kinds = Counter(record(n).kind for n in canonical(name).nodes)
    assert {k: kinds[k] for k in READ[name]} == READ[name]
    assert {record(n).region.rpartition("+")[2] for n in canonical(name).nodes} - {""} == REGIONS[name]


@pytest.mark.parametrize("name", RAW)
def test_what_was_read_computes_what_the_model_computes(name: str) -> None:
    args, kwargs = bind(RAW[name].inputs(1))
    with torch.no_grad():
        have, want = canonical(name)(*args, **kwargs), RAW[name].model()(*args, **kwargs)
    assert float((have - want).abs().max() / want.abs().max()) < 1e-5


@cache
def lowered(name: str) -> Lowered:
    return lower(RAW[name])


@pytest.mark.parametrize("name", RAW)
def test_the_lowered_file_is_proved(name: str) -> None:
    found = lowered(name)
    report = prove(ort_cpu, found.qat, found.file, [RAW[name].inputs(s) for s in (3, 4)], found.model)
    report.check()
    products = READ[name]["linear"] + READ[name].get("conv2d", 0) - (name in DEPTHWISE)
    assert report.kernels["planned"] == report.kernels["realized"] == products
    assert found.distance(RAW[name].inputs(3)) < 0.01


def kernel_of(plan: Plan, kind: str) -> set[str]:
    names = {f.name for f in plan.nodes if f.kind == kind}
    return {p.kernel for p in plan.predictions if p.node in names}


@pytest.mark.parametrize(
    ("name", "kind", "kernel"),
    [
        ("llama", "rms_norm", "RMSNormalization"),
        ("llama", "silu", "QuickGelu|Mul"),
        ("decomposed", "safe_softmax", "Softmax"),
    ],
)
def test_the_engine_runs_the_float_kernel_of_the_row(name: str, kind: str, kernel: str) -> None:
    found = lowered(name)
    assert kernel_of(found.plan, kind) == {kernel}
    nodes = {f.name for f in found.plan.nodes if f.kind == kind}
    run = [n for n in ort_cpu.audit(found.file) if n.name.partition("/")[0] in nodes]
    assert {n.kernel for n in run} & set(kernel.split("|"))
    assert not any(n.int8 for n in run)


def test_a_row_that_names_another_kernel_is_seen() -> None:
    found = lowered("llama")
    names = {f.name for f in found.plan.nodes if f.kind == "rms_norm"}
    wrong = tuple(replace(p, kernel="LayerNormalization") if p.node in names else p for p in found.plan.predictions)
    realized = ort_cpu.audit(found.file)
    assert compare_kernels(found.plan, realized) == []
    assert {m.node for m in compare_kernels(replace(found.plan, predictions=wrong), realized)} == names
