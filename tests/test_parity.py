"""Parity: every region of a lowered file agrees with the reference, and each planted fault is found where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from qatgraph.backends import onnx_taps, ort_cpu
from qatgraph.conversion import convert
from qatgraph.ir.graph import Graph
from qatgraph.kernels import owner
from qatgraph.parity import FLOAT_LIMIT, RegionParity, RegionTap, compare_regions, has_region
from qatgraph.planning.explain import kind
from qatgraph.proof import feed_of, other_constants
from qatgraph.reference import Array, EngineQuantize
from qatgraph.regions import Region
from tests.lowered import LOWERED, case_of, lowered, node, read, write

Feeds = list[dict[str, Array]]


@cache
def converted(name: str) -> Graph:
    """Read it, do not change it."""
    return convert(Graph.of(lowered(name).qat))


def taps_of(name: str, model: bytes, batches: Feeds) -> list[RegionTap]:
    seen = ort_cpu.run_taps(*ort_cpu.tap(model, lowered(name).plan), batches)
    return [tap for taps, _ in seen for tap in taps]


def feeds(name: str) -> Feeds:
    return [feed_of(converted(name), case_of(name).inputs(seed)) for seed in range(2)]


@cache
def taps(name: str) -> tuple[RegionTap, ...]:
    return tuple(taps_of(name, lowered(name).file, feeds(name)))


def compare(name: str, seen: Iterable[RegionTap], **how: Any) -> dict[str, RegionParity]:
    return compare_regions(converted(name), seen, **how)


def failures(found: dict[str, RegionParity]) -> dict[str, str]:
    return {region: parity.failure for region, parity in found.items() if parity.failure}


# ---------------------------------------------------------------- what is right agrees


@pytest.mark.parametrize("name", LOWERED)
def test_every_region_of_the_file_agrees_with_the_reference(name: str) -> None:
    found = compare(name, taps(name))
    plan = lowered(name).plan
    assert set(found) == {p.node for p in plan.predictions if has_region(p, kind(plan, p.node))}
    assert failures(found) == {}
    assert all(r.elements > 0 for r in found.values())
    assert any(r.integers > 0 for r in found.values()) == (name != "pixels")  # there nothing is quantized
    assert all(r.steps == r.off == r.out_steps == 0 for r in found.values())
    assert all(r.float_rel <= FLOAT_LIMIT for r in found.values())


def test_the_counts_are_those_of_all_batches() -> None:
    (up, down), count = compare("mlp", taps("mlp")).values(), 2 * 4 * 32
    assert (up.integers, up.elements) == (count, 2 * count)
    assert (down.integers, down.elements) == (2 * count, count)


# ---------------------------------------------------------------- faults in the file


def operands(proto: Any, region: str) -> dict[str, str]:
    """The constants of a region in the file, by role."""
    behind = {o: n for n in proto.graph.node for o in n.output}
    names = {n.name for n in proto.graph.node}
    core = node(proto, next(f"{region}/{op}" for op in onnx_taps.CORES if f"{region}/{op}" in names))
    if core.op_type == "Gather":
        rows = next(n for n in proto.graph.node if core.output[0] in n.input)
        return {"weight": core.input[0], "weight scale": rows.input[1]}
    x, weight = (behind[value] for value in core.input[:2])
    bias = node(proto, f"{region}/Add").input[1] if core.op_type == "MatMul" else behind[core.input[2]].input[0]
    found = {"weight": weight.input[0], "weight scale": weight.input[1], "bias": bias}
    found |= {"x scale": x.input[1], "x zero": x.input[2]}
    written = core.output[0]
    while (reader := next(n for n in proto.graph.node if written in n.input)).op_type in ("Relu", "Clip"):
        written = reader.output[0]
    if reader.op_type == "QuantizeLinear":
        found |= {"out scale": reader.input[1], "out zero": reader.input[2]}
    return found | {f"quantize {part}": behind[x.input[0]].input[i] for i, part in ((1, "scale"), (2, "zero"))}


def lowest_bit(weight: Array) -> Array:
    """One bit of one weight, the smallest that there is."""
    changed = weight.copy()
    odd = tuple(np.argwhere((weight > 0) & (weight % 2 == 1))[0])
    changed[odd] ^= 1
    return changed


def one_channel(scale: Array) -> Array:
    changed = scale.copy().reshape(-1)
    changed[len(changed) // 2] *= np.float32(1.001)
    return changed.reshape(scale.shape)


def one_more(value: Array) -> Array:
    return value + value.dtype.type(1) if value.ndim == 0 else np.concatenate([value[..., :1] + 1, value[..., 1:]], -1)


def planted(name: str, region: str, role: str, change: Callable[[Array], Array]) -> bytes:
    proto = lowered(name).proto
    constant = operands(proto, region)[role]
    before = read(proto, constant)
    after = change(before).astype(before.dtype)
    assert after.shape == before.shape
    assert not np.array_equal(after, before)
    write(proto, constant, after)
    return lowered(name).changed(proto).file


FAULTS: dict[str, Callable[[Array], Array]] = {
    "weight": lowest_bit,
    "weight scale": one_channel,
    "bias": one_more,
    "x scale": one_channel,
    "x zero": one_more,
    "quantize scale": one_channel,
    "quantize zero": one_more,
    "out scale": one_channel,
    "out zero": one_more,
}
WRITERS = ["stem:conv2d", "same:conv2d", "depth:conv2d", "grouped:conv2d", "gate:conv2d", "hidden:linear"]
REGIONS = [
    ("mlp", "up:linear"),
    ("mlp", "down:linear"),
    ("table", "layer.0.mlp.up:linear"),
    ("gpt2", "c_proj:linear"),
]
PLANTED = [(*region, role) for region in REGIONS for role in FAULTS if not role.startswith("out")]
PLANTED += [("images", region, role) for region in WRITERS for role in FAULTS if not role.startswith("quantize")]
PLANTED += [("images", "stem:conv2d", f"quantize {part}") for part in ("scale", "zero")]
PLANTED += [("table", "token:embedding", role) for role in ("weight", "weight scale")]


@pytest.mark.parametrize(("name", "region", "role"), PLANTED)
def test_a_fault_in_the_file_is_found_in_its_region_and_nowhere_else(name: str, region: str, role: str) -> None:
    batches = feeds(name)
    if region == "token:embedding":  # look up the whole table, so that the changed row is among them
        rows = np.arange(50, dtype=np.int64).reshape(2, 25)
        batches = [{"input_ids": rows, "attention_mask": np.ones_like(rows)}]
    file = planted(name, region, role, FAULTS[role])
    found = failures(compare(name, taps_of(name, file, batches)))
    if name == "images" and not found:  # too small for a result of 8 bits
        assert role.startswith(("weight", "bias", "x"))
        assert misfits(name, file) == [region]
        return
    assert list(found) == [region]
    integers = role.startswith("quantize") or (region, role) == ("token:embedding", "weight")
    what = "integers that it writes" if name == "images" and not integers else "integers" if integers else "float"
    assert what in found[region]


def misfits(name: str, file: bytes) -> list[str]:
    """The regions of which the constants in the file are not those of the converted graph."""
    qdq = converted(name)
    return [
        owner(node)
        for node, have in ort_cpu.product_constants(file).items()
        if other_constants(have, Region.of(qdq, qdq.node(owner(node))).constants)
    ]


def test_a_file_as_it_is_holds_the_constants_that_were_converted() -> None:
    assert all(misfits(name, lowered(name).file) == [] for name in LOWERED)


def test_there_are_fifty_planted_faults() -> None:
    assert len(PLANTED) >= 50


# ---------------------------------------------------------------- faults in what the engine saw


def floats(tap: RegionTap) -> Array:
    (border,) = tap.borders
    assert border is not None
    return border


CHANGES: dict[str, Callable[[RegionTap], RegionTap]] = {
    "one wrong integer": lambda t: replace(t, integers=(t.integers[0] ^ np.eye(4, 64, 63, np.uint8),)),
    "one integer of another border": lambda t: replace(t, borders=(floats(t) + np.eye(4, 64, 63, np.float32),)),
    "an output beyond the limit": lambda t: replace(t, out=t.out + 2 * FLOAT_LIMIT * np.abs(t.out).max()),
    "NaN": lambda t: replace(t, out=np.full_like(t.out, np.nan)),
    "infinity": lambda t: replace(t, out=np.full_like(t.out, np.inf)),
    "a missing row of integers": lambda t: replace(t, integers=(t.integers[0][:-1],)),
    "a missing column of integers": lambda t: replace(t, integers=(t.integers[0][:, :-1],)),
    "one row for all": lambda t: replace(t, integers=(t.integers[0][:1],)),
    "integers of another type": lambda t: replace(t, integers=(t.integers[0].astype(np.int16),)),
    "a missing column of outputs": lambda t: replace(t, out=t.out[:, :-1]),
    "an output that would broadcast": lambda t: replace(t, out=t.out[:1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fault_in_one_batch_is_kept_and_named(change: str) -> None:
    seen = list(taps("mlp"))
    assert [t.node for t in seen] == ["up:linear", "down:linear"] * 2
    seen[1] = CHANGES[change](seen[1])
    assert list(failures(compare("mlp", seen))) == ["down:linear"]


def test_the_first_value_beyond_the_row_is_named() -> None:
    """One step is allowed, at the second place it is two."""
    seen = next(t for t in taps("images") if t.node == "stem:conv2d")
    out = seen.out.astype(np.int64)
    out[0, 1, 2, 3] += 1 if out[0, 1, 2, 3] < 255 else -1
    out[1, 2, 0, 4] += 2 if out[1, 2, 0, 4] < 254 else -2
    (parity,) = compare("images", [replace(seen, out=out.astype(np.uint8))]).values()
    assert (parity.out_off, parity.out_steps) == (2, 2)
    assert "first at [0, 1, 2, 3]" in parity.failure
    parity = RegionParity("x", allowed=1)
    parity.compare_result(out.astype(np.uint8), seen.out)
    assert f"first at [1, 2, 0, 4]: {out[1, 2, 0, 4]}, where the reference has {seen.out[1, 2, 0, 4]}" in parity.failure


def test_an_output_within_the_limit_passes() -> None:
    first, *_ = taps("mlp")
    near = replace(first, out=first.out + np.float32(0.3 * FLOAT_LIMIT) * np.abs(first.out).max())
    assert 0 < compare("mlp", [near])["up:linear"].float_rel < FLOAT_LIMIT
    assert failures(compare("mlp", [near])) == {}


@pytest.mark.parametrize("what", ["integers", "out"])
def test_another_shape_is_said_in_words(what: str) -> None:
    first, *_ = taps("mlp")
    fault = (
        replace(first, integers=(first.integers[0][:2],)) if what == "integers" else replace(first, out=first.out[:2])
    )
    (text,) = failures(compare("mlp", [fault])).values()
    assert text.startswith(f"{'integers are uint8' if what == 'integers' else 'outputs are float32'} of shape [2, ")


def test_two_regions_that_changed_places_are_found() -> None:
    query, key = "layer.0.attention.query:linear", "layer.0.attention.key:linear"
    turned = {query: key, key: query}
    seen = [replace(t, node=turned.get(t.node, t.node)) for t in taps("table")]
    assert set(failures(compare("table", seen))) == {query, key}


def test_an_integer_that_was_not_read_is_seen_where_integers_only_move() -> None:
    parity, read = RegionParity("pool"), np.array([1, 2, 3], np.uint8)
    parity.compare_moved(np.array([3, 1], np.uint8), [read])
    assert parity.failure == ""
    parity.compare_moved(np.array([3, 4], np.uint8), [read])
    assert "1 of 2 integers are none that it read" in parity.failure


# ---------------------------------------------------------------- faults in the reference


def half_away(x: Array, scale: Array, zero_point: Array) -> Array:
    span, raw = np.iinfo(zero_point.dtype), x / scale
    rounded = np.trunc(raw + np.copysign(np.float32(0.5), raw)) + np.float32(zero_point)
    wrong: Array = np.clip(rounded, span.min, span.max).astype(zero_point.dtype)
    return wrong


def test_rounding_half_away_from_zero_is_found_at_a_tie() -> None:
    scale = np.float32(next(b for n, b in converted("erf-gelu").module.named_buffers() if n.endswith("x/scale")))
    values = (np.arange(-60, 60, dtype=np.float32) + np.float32(0.5)) * scale
    ties = values[np.abs(values / scale % 1) == 0.5]
    assert len(ties) > 32
    seen = taps_of("erf-gelu", lowered("erf-gelu").file, [{"x": np.resize(ties, (4, 32))}])
    assert failures(compare("erf-gelu", seen)) == {}
    (parity,) = compare("erf-gelu", seen, quantize=EngineQuantize(half_away)).values()
    assert (parity.node, parity.steps) == ("fc:linear", 1)
    assert parity.failure.startswith(f"{parity.off} of 128 integers differ, by up to 1 steps; first at [0, 1]: 81, ")
    ordinary = compare("mlp", taps("mlp"), quantize=EngineQuantize(half_away))
    assert failures(ordinary) == {}  # no tie, no difference: ordinary data would not tell


def test_a_bias_in_other_units_than_the_accumulator_is_found() -> None:
    """The engine adds the raw integers: a file with such a bias runs, and is wrong."""
    qdq = converted("mlp").clone()
    path = next(n for n, _ in qdq.module.named_buffers() if "down" in n and n.endswith("bias/scale"))
    owner, _, leaf = path.rpartition(".")
    scale = qdq.module.get_submodule(owner).get_buffer(leaf)
    qdq.module.get_submodule(owner).register_buffer(leaf, scale * torch.tensor(1.01))
    assert list(failures(compare_regions(qdq, taps("mlp")))) == ["down:linear"]
    assert failures(compare("mlp", taps("mlp"))) == {}
