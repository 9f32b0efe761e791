"""The target of CPUs with VNNI: full-range weights, refused where they would be quietly wrong, which is shown."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest

from qatgraph import reference
from qatgraph.backends import emulation, onnx_taps, ort_cpu
from qatgraph.conversion import convert
from qatgraph.errors import VerifyError
from qatgraph.ir.graph import Graph
from qatgraph.parity import RegionParity, compare_regions
from qatgraph.proof import feed_of, prove
from qatgraph.reference import Array
from qatgraph.report import machine
from tests.full_range import Made, made
from tests.lowered import product_weights

WITH = "flags\t\t: avx2 avx512f avx512_vnni"
WITHOUT = {"AVX2": "flags\t\t: avx2", "AVX512": "flags\t\t: avx2 avx512f", "SSE": "flags\t\t: sse4_2"}
VNNI = {
    "AVX512-VNNI": WITH,
    "AVX-VNNI": "flags\t\t: avx2 avx_vnni",
    "AMX": "flags\t\t: avx2 avx512f amx_int8",
}


@pytest.fixture
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the flags of the parameter."""
    text: str = request.param
    monkeypatch.setattr(machine, "_cpu_flags", lambda: set(text.split(":")[1].split()))


def on(flags: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("cpu", flags.values(), ids=flags, indirect=True)


def worst(found: Made) -> dict[str, int]:
    weights = product_weights(found.file)
    return {n.partition("/")[0]: reference.worst_pair(reference.k_rows(w)) for n, w in weights.items()}


def test_its_weights_use_the_full_range_where_those_of_ort_cpu_are_bounded() -> None:
    free, safe = worst(made("ort-cpu-vnni")), worst(made("ort-cpu"))
    paired = [p.node for p in made("ort-cpu").plan.predictions if p.in_pairs]
    assert len(paired) == 4
    assert all(safe[n] <= 128 < free[n] for n in paired)


def test_both_plans_choose_the_same_kernels_and_say_what_they_require() -> None:
    free, safe = made("ort-cpu-vnni").plan, made("ort-cpu").plan
    assert free.predictions == safe.predictions
    assert (free.requires, safe.requires) == ("vnni", "")
    assert ort_cpu.stamps(made("ort-cpu-vnni").file) == (free.hash(), "vnni")
    assert ort_cpu.stamps(made("ort-cpu").file) == (safe.hash(), "")


@on(VNNI)
@pytest.mark.usefixtures("cpu")
def test_on_a_cpu_with_vnni_the_artifact_is_proved_and_says_that_others_differ() -> None:
    found = made("ort-cpu-vnni")
    report = prove(ort_cpu, found.qat, found.file, [found.batch], None)
    expected = [] if has_vnni() else report.failures  # the flags are planted, the kernels are those of this machine
    assert report.failures == expected
    assert report.overflow["requires"] == "vnni"
    assert "by design" in report.overflow["same_on_haswell"]


def has_vnni() -> bool:
    """Whether full-range sums are exact on the machine of these tests."""
    weight, x = np.full((1, 64), 127, np.int8), np.full((4, 64), 255, np.uint8)
    file = pair_file(weight)
    return bool((ort_cpu.run(ort_cpu.session(file), {"x": x})[0] == reference.accumulate(x, 0, weight)).all())


def pair_file(weight: Array) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [4, weight.shape[1]])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [4, len(weight)])
    graph = helper.make_graph([node], "pairs", [x], [y], [numpy_helper.from_array(weight.T.copy(), "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return bytes(model.SerializeToString())


@on(WITHOUT)
@pytest.mark.usefixtures("cpu")
def test_on_a_cpu_without_vnni_it_is_refused_with_the_remedy() -> None:
    found = made("ort-cpu-vnni")
    for refused in (
        lambda: prove(ort_cpu, found.qat, found.file, [found.batch], None),
        lambda: ort_cpu.session(found.file),
    ):
        with pytest.raises(VerifyError) as caught:
            refused()
        assert caught.value.code == "QG610"
        assert "ort-cpu" in caught.value.todo
        assert "session.x64quantprecision" in caught.value.todo
    ort_cpu.session(found.file, session__x64quantprecision="1")  # exact everywhere
    ort_cpu.session(made("ort-cpu").file)


def test_a_file_that_does_not_say_what_it_requires_is_found() -> None:
    found = made("ort-cpu")
    proto = onnx.load_from_string(found.file)
    proto.metadata_props.add(key="qatgraph.requires", value="vnni")
    have = prove(ort_cpu, found.qat, proto.SerializeToString(), [found.batch], None).failures
    assert have[0] == "the file bears that it requires 'vnni' of a CPU, its plan requires ''"


@pytest.mark.parametrize("requires", ["", "vnni"])
def test_the_overflow_check_follows_what_the_plan_requires_and_not_a_name(
    requires: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full-range weights of a target of any name are found, unless it requires VNNI."""
    monkeypatch.setattr(machine, "_cpu_flags", lambda: {"avx_vnni"})
    found = made("ort-cpu-vnni")
    plan = replace(found.plan, target="mine", requires=requires)
    qat = copy.deepcopy(found.qat)
    Graph.of(qat).set_info(plan=plan)
    file = ort_cpu.lower(convert(Graph.of(qat)), plan)
    overflow = prove(ort_cpu, qat, file, [found.batch], None).overflow
    assert bool(overflow["unsafe"]) == (requires == "")


# region by region on an emulated CPU with AVX2 and without VNNI


@pytest.fixture
def haswell() -> None:
    if not emulation.available():
        pytest.skip("NOT RUN: qemu-x86_64 is not installed")


@cache
def there(target: str) -> tuple[Any, ...]:
    """What that CPU read and wrote at each region of the file."""
    found = made(target)
    tapped, names = ort_cpu.tap(found.file, found.plan)
    feed = feed_of(Graph.of(found.qat), found.batch)
    seen = dict(zip(ort_cpu.interface(tapped)[1], emulation.run_on("Haswell", tapped, feed), strict=True))
    return tuple(next(onnx_taps.read_taps([feed | seen], names))[0])


def regions(target: str, *, without_vnni: bool) -> dict[str, RegionParity]:
    qdq = convert(Graph.of(made(target).qat))
    return compare_regions(qdq, there(target), without_vnni=without_vnni)


@pytest.mark.usefixtures("haswell")
def test_its_wrong_numbers_are_those_of_the_model_of_saturation_region_by_region() -> None:
    found = regions("ort-cpu-vnni", without_vnni=True)
    assert len(found) == 5
    assert {n: r.failure for n, r in found.items() if r.failure} == {}
    assert max(r.out_steps for r in found.values()) == 0
    assert max(r.float_rel for r in found.values()) == 0


@pytest.mark.usefixtures("haswell")
def test_the_exact_sums_are_not_those_of_that_cpu_where_products_are_added_in_pairs() -> None:
    wrong = {n for n, r in regions("ort-cpu-vnni", without_vnni=False).items() if r.failure}
    assert wrong == {p.node for p in made("ort-cpu-vnni").plan.predictions if p.in_pairs}


@pytest.mark.usefixtures("haswell")
@pytest.mark.parametrize("without_vnni", [True, False])
def test_the_regions_of_ort_cpu_are_exact_there(without_vnni: bool) -> None:
    assert {n: r.failure for n, r in regions("ort-cpu", without_vnni=without_vnni).items() if r.failure} == {}
