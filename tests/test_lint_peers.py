"""Files of ``onnxruntime.quantization``: what its modes bring about on this engine, and what the repair gives back."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from qatgraph.backends import lint_fix, lint_proof
from qatgraph.backends.lint import Lint, lint
from qatgraph.backends.lint_conditions import CONDITIONS
from tests.foreign import Sketch

MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "u8": {"activation_type": QuantType.QUInt8},
    "u8 per channel": {"activation_type": QuantType.QUInt8, "per_channel": True, "reduce_range": True},
    "symmetric": {"extra_options": {"ActivationSymmetric": True}},
    "16 bits": {"activation_type": QuantType.QUInt16},
}


def residual_cnn() -> Sketch:
    """Two convolutions, the second around a residual; a pool, a linear."""
    s = Sketch()
    x = s.op("Relu", s.op("Conv", s.input("x", 1, 3, 8, 8), s.floats(8, 3, 3, 3), s.floats(8), pads=[1] * 4))
    y = s.op("Add", s.op("Conv", x, s.floats(8, 8, 3, 3), s.floats(8), pads=[1] * 4), x)
    y = s.op("Flatten", s.op("GlobalAveragePool", s.op("Relu", y)))
    s.out(s.op("Gemm", y, s.floats(8, 10), s.floats(10)))
    return s


def attention_block() -> Sketch:
    """Query, key and value of one normalized input, their products, a residual."""
    s = Sketch()
    x = s.input("x", 2, 6, 16)
    n = s.op("LayerNormalization", x, s.floats(16), s.floats(16), axis=-1)
    q, k, v = (s.op("Add", s.op("MatMul", n, s.floats(16, 16)), s.floats(16)) for _ in range(3))
    scores = s.op("MatMul", q, s.op("Transpose", k, perm=[0, 2, 1]))
    mixed = s.op("MatMul", s.op("Softmax", scores, axis=-1), v)
    s.out(s.op("Add", s.op("MatMul", mixed, s.floats(16, 16)), x))
    return s


MODELS = {"cnn": residual_cnn, "block": attention_block}


class Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, model: Any) -> None:
        rng, shape = np.random.default_rng(0), [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
        self.left = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(4)]

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


@cache
def quantized(model: str, mode: str, opset: int = 17) -> Any:
    import tempfile

    proto = MODELS[model]().proto()
    proto.opset_import[0].CopyFrom(helper.make_opsetid("", opset))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, source)
        quantize_static(source, target, Batches(proto), **MODES[mode])
        return onnx.load(target)


def rules(found: Lint) -> set[str]:
    return {f.rule for f in found.findings}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_the_engine_does_what_is_said_of_it(model: str, mode: str) -> None:
    found = lint(quantized(model, mode))
    assert rules(found).isdisjoint({"engine-disagrees", "engine-refuses", "silent-float"})
    assert [f for f in found.findings if not (f.what and f.why and f.remedy)] == []


@pytest.mark.parametrize("model", MODELS)
def test_signed_forks_are_what_the_default_costs(model: str) -> None:
    """The same model with unsigned activations has none, and runs on integers."""
    signed, unsigned = lint(quantized(model, "default")), lint(quantized(model, "u8"))
    assert "signed-fork" in rules(signed)
    assert rules(unsigned).isdisjoint({c.__name__.replace("_", "-") for c in CONDITIONS})
    assert integers(signed) < integers(unsigned)


def integers(found: Lint) -> int:
    return sum(k.int8 for k in found.kernels)


@pytest.mark.parametrize("mode", ["default", "symmetric"])
@pytest.mark.parametrize("model", MODELS)
def test_the_repair_gives_the_default_the_kernels_of_unsigned_activations(model: str, mode: str) -> None:
    before = quantized(model, mode)
    after = lint_fix.repair(before, lint(before).findings)
    mended, unsigned = lint(after), lint(quantized(model, "u8"))
    assert "signed-fork" not in rules(mended)
    if mode == "default":
        assert Counter(k.kernel for k in mended.kernels) == Counter(k.kernel for k in unsigned.kernels)
    assert integers(mended) > integers(lint(before))
    assert lint_proof.prove(before, after).regions == 0.0


def test_what_16_bits_bring_about() -> None:
    found = lint(quantized("cnn", "16 bits"))
    assert rules(found) == {"sixteen-bit"}
    kernels = {k.kernel for k in found.kernels if k.int8}
    assert kernels == {"Flatten", "MatMulNBits"}, "integers are moved, and a weight multiplies what was dequantized"


def test_a_reduced_range_does_not_saturate_and_a_full_one_may() -> None:
    assert "saturation" in rules(lint(quantized("cnn", "u8")))
    assert "saturation" not in rules(lint(quantized("cnn", "u8 per channel")))
