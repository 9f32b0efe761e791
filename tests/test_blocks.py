"""Weights in blocks, from the recipe to the proof: MatMulNBits over floats; constants bit for bit, sums in a bound."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import qatgraph as qg
from qatgraph import reference
from qatgraph.backends import ort_cpu
from qatgraph.backends.onnx_products import pack_blocks, unpack_blocks
from qatgraph.errors import TargetError
from qatgraph.planning.recipe import load_recipe
from qatgraph.planning.target import load_target
from qatgraph.quantizers.blocks import BlockFakeQuantize, block_scale
from qatgraph.specs import QuantSpec
from tests.lowered import Lowered, faults, lower, read, write
from tests.models import ZOO, captured

FOUR, EIGHT = map(QuantSpec.parse, ("s4 symmetric per-block(32)", "s8 symmetric per-block(32)"))
SPECS = st.builds(
    lambda bits, size: QuantSpec.parse(f"s{bits} symmetric per-block({size})"),
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32, 64, 128, 256]),
)


@cache
def encoder(recipe: str = "int4-weights") -> Lowered:
    return lower(ZOO["encoder"], load_recipe(recipe), seeds=())


def found(lowered: Lowered) -> list[str]:
    return faults(lowered, ZOO["encoder"].inputs(3))


# ---------------------------------------------------------------- the quantizer


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SPECS, st.integers(1, 5), st.integers(1, 300), st.integers(0, 2**16))
def test_every_weight_is_within_half_a_step_of_its_block(spec: QuantSpec, n: int, k: int, seed: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    quantizer = BlockFakeQuantize(spec)
    quantizer.switch_on()
    q, scale = quantizer.integers(weight)
    assert spec.block is not None
    assert (q.shape, scale.shape) == (weight.shape, (n, -(-k // spec.block)))
    assert int(q.abs().max()) <= spec.qmax
    rounded = quantizer(weight)
    np.testing.assert_array_equal(rounded, reference.dequantize_blocks(q.numpy(), scale.numpy(), spec.block))
    step = scale.repeat_interleave(spec.block, 1)[:, :k]
    assert bool(((rounded - weight).abs() <= step * 0.5001).all())
    bits = 4 if spec.dtype == "s4" else 8
    np.testing.assert_array_equal(unpack_blocks(pack_blocks(q.numpy(), spec.block, bits), k, bits), q.numpy())


def test_a_block_of_zeros_and_the_gradient() -> None:
    weight = torch.zeros(2, 40)
    weight[0, 35] = 3.0
    assert block_scale(weight, FOUR).tolist() == [[1.0, pytest.approx(3 / 7)], [1.0, 1.0]]
    quantizer = BlockFakeQuantize(FOUR)
    quantizer.switch_on()
    weight.requires_grad_()
    quantizer(weight).sum().backward()
    assert weight.grad is not None
    assert bool((weight.grad == 1).all())


def test_specs_say_their_block() -> None:
    assert str(FOUR) == "s4 symmetric per-block(32)"
    assert FOUR.meet(EIGHT) is None
    assert FOUR.meet(QuantSpec.parse("s4 symmetric per-block(64)")) is None
    for text in ("s4 symmetric per-block", "s4 symmetric per-block(0)", "s4 symmetric per-block(x)"):
        with pytest.raises(ValueError, match=r"per-block|invalid literal"):
            QuantSpec.parse(text)


@pytest.mark.parametrize("grid", ["u8 affine per-block(32)", "s4 symmetric per-block(32) pair-safe"])
def test_a_row_cannot_offer_blocks_that_no_quantizer_makes(grid: str, tmp_path: Path) -> None:
    file = tmp_path / "npu.toml"
    file.write_text(
        'name = "npu"\ndescription = "x"\n[[row]]\nid = "a"\nop = "linear"\nplacement = "int8"\nkernel = "K"\n'
        f'why = "y"\nweight = ["{grid}"]\n'
    )
    with pytest.raises(TargetError, match="no quantizer makes weight"):
        load_target(str(file))


# ---------------------------------------------------------------- the plan and the proof


def test_nobody_gets_blocks_who_does_not_ask() -> None:
    assert not [q for q in qg.plan(captured("encoder")).quantizers if q.spec.block is not None]
    plan = qg.plan(captured("encoder"), recipe="int4-weights")
    assert {str(q.spec) for q in plan.quantizers} == {str(FOUR)}


@pytest.mark.parametrize("recipe", ["int4-weights", "int8-weights"])
def test_the_kernels_and_regions_are_those_planned(recipe: str) -> None:
    assert found(encoder(recipe)) == []
    assert len(ort_cpu.tap(encoder(recipe).file, encoder(recipe).plan)[1]) == 6
    assert {n.kernel for n in ort_cpu.audit(encoder(recipe).file) if n.int8} == {"MatMulNBits"}


def test_a_planted_nibble_and_a_planted_scale_are_found() -> None:
    for index in (1, 2):
        proto = encoder().proto
        node = next(n for n in proto.graph.node if n.op_type == "MatMulNBits")
        array = read(proto, node.input[index])
        first = array.reshape(-1)
        first[0] = first[0] ^ 1 if index == 1 else first[0] * (1 + 2**-20)
        write(proto, node.input[index], array)
        assert "its weight" in found(encoder().changed(proto))


def test_activations_that_the_engine_rounds_are_found() -> None:
    """The bound of float32 sums is far below what accuracy_level 4 does, and a zero point moves them too."""
    proto = encoder().proto
    for node in (n for n in proto.graph.node if n.op_type == "MatMulNBits"):
        next(a for a in node.attribute if a.name == "accuracy_level").i = 4
    assert any("float sums are farther off" in f for f in found(encoder().changed(proto)))
    proto = encoder().proto
    node = next(n for n in proto.graph.node if n.op_type == "MatMulNBits")
    n, blocks = read(proto, node.input[2]).shape
    zero = np.full((n, (blocks + 1) // 2), 0x99, np.uint8)
    proto.graph.initializer.append(helper.make_tensor("planted", 2, zero.shape, zero.tobytes(), raw=True))
    inputs = [*node.input[:3], "planted", *node.input[4:]]
    del node.input[:]
    node.input.extend(inputs)
    assert any("float sums are farther off" in f for f in found(encoder().changed(proto)))
