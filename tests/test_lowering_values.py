"""The lowered file computes what the model computes: at other sizes, in odd forms, with values that many read."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from qatgraph.backends import ort_cpu
from qatgraph.errors import LowerError
from qatgraph.ir.graph import Batch
from qatgraph.kernels import KernelNode, compare_kernels, owner
from tests.lowered import lower, lowered, read, write
from tests.models import BATCH, LENGTH, Case, floats, padded, tokens
from tests.test_lowering import STEP, foreign_border, foreign_kernels, invalid, packed, shared_constants

OTHER_SIZES: list[tuple[str, Batch]] = [
    ("mlp", floats(1, 32)),
    ("gpt2", floats(7, 5, 32)),
    ("tied", tokens(1, 5)),
    *((name, padded(*size)) for name in ("encoder", "table") for size in ((1, 1), (1, 6), (3, 64))),
]


@pytest.mark.parametrize(("name", "batch"), OTHER_SIZES, ids=lambda v: v if isinstance(v, str) else "")
def test_it_runs_at_other_sizes_than_the_example(name: str, batch: Batch) -> None:
    assert lowered(name).distance(batch) < STEP


def test_a_size_that_is_fixed_is_refused_and_another_weight_is_seen() -> None:
    """The controls of the test above."""
    found = lowered("erf-gelu")
    with pytest.raises(LowerError, match="QG508"):
        ort_cpu.run(ort_cpu.session(found.file), {"x": floats(1, 32).numpy()})
    proto = found.proto
    write(proto, "fc.weight/int8", -read(proto, "fc.weight/int8"))
    assert found.distance(floats(4, 32)) < STEP < found.changed(proto).distance(floats(4, 32))


# forms that the pattern does not hold, and models whose values have several readers


class Heads(nn.Module):
    """Attention over [batch, length, 16] with two heads, in the spelling of a subclass."""

    dynamic: ClassVar[dict[str, Any]] = {"x": LENGTH}

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)

    def mix(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (self.split(p(x)) for p in (self.query, self.key, self.value))
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.mix(x).transpose(1, 2).reshape(x.shape))


class Masked(Heads):
    def forward(self, x: Tensor) -> Any:
        mask = (x[:, None, None, :, 0] > -1) | (x[:, None, None, :, 1] > -1)  # one row for all queries
        return self.out(self.mix(x, mask).transpose(1, 2).reshape(x.shape))


class Chunks(Heads):
    """Each half of the sequence attends to itself only."""

    dynamic: ClassVar[dict[str, Any]] = {"x": BATCH}

    def split(self, x: Tensor) -> Tensor:
        return x.view(2 * x.shape[0], x.shape[1] // 2, 2, 8).transpose(1, 2)


class Joined(Heads):
    """The samples stand one behind the other in the result."""

    def forward(self, x: Tensor) -> Any:
        return self.out(self.mix(x).transpose(1, 2).reshape(1, x.shape[0] * x.shape[1], 16))


class Shown(Heads):
    """The mixed heads are an output as well."""

    def forward(self, x: Tensor) -> Any:
        mixed = self.mix(x)
        return mixed, self.out(mixed.transpose(1, 2).reshape(x.shape))


class ShownTurned(Heads):
    def forward(self, x: Tensor) -> Any:
        mixed = self.mix(x).transpose(1, 2)
        return mixed, self.out(mixed.reshape(x.shape))


class FourDimensional(Heads):
    def forward(self, x: Tensor) -> Any:
        return self.mix(x)


ATTENTIONS: dict[type[Heads], bool] = {
    Heads: True, Masked: True, Chunks: False, Joined: False, Shown: False, ShownTurned: False, FourDimensional: False
}  # fmt: skip


@pytest.mark.parametrize("kind", ATTENTIONS, ids=lambda k: k.__name__)
def test_attention_packs_its_heads_where_the_pattern_stands_exactly(kind: type[Heads]) -> None:
    found = lower(Case(kind, lambda seed: floats(4, 6, 16, seed=seed), {"x": kind.dynamic["x"]}))
    assert packed(found.proto, f"{kind.__name__}:attention") == ATTENTIONS[kind]
    assert max(found.distance(floats(size, 6, 16, seed=size)) for size in (1, 4)) < STEP


class Odd(nn.Module):
    """One linear, whatever a subclass does with it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)  # square: a weight that is turned twice still fits


class Twice(Odd):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * self.fc(x)


class Bare(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.fc(x[:, 0])), self.fc(x)


class TwoRanks(Odd):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x[:, None]), self.fc(x), self.fc(x[:, 0] * 3)


class GivenBack(Odd):
    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.fc(x))
        return x, y, y


class Constant(Odd):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) + torch.relu(self.fc.bias)


class Namesakes(Odd):
    """Parameters that are named as an input and as the output are."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.output = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * self.x + self.output


@pytest.mark.parametrize("kind", [Twice, Bare, TwoRanks, GivenBack, Constant, Namesakes], ids=lambda k: k.__name__)
def test_values_with_several_readers_keep_their_meaning(kind: type[Odd]) -> None:
    found = lower(Case(kind, lambda seed: floats(4, 6, 16, seed=seed), {"x": BATCH}))
    batch = floats(3, 6, 16, seed=5)
    assert found.distance(batch) < STEP
    assert [c for check in (invalid, foreign_border, foreign_kernels, shared_constants) for c in check(found)] == []
    assert len({v.name for v in found.proto.graph.output}) == len(found.proto.graph.output)
    precise = found.run(batch, precise=True)
    assert [a.tobytes() for a in found.run(batch)] == [a.tobytes() for a in precise]


class Spectrum(Heads):
    """A decomposition that the exporter does not know."""

    def forward(self, x: Tensor) -> Any:
        return torch.linalg.eigvalsh(self.query(x) @ self.key(x).transpose(1, 2))


def test_what_the_exporter_refuses_is_named_with_its_reason() -> None:
    with pytest.raises(LowerError) as caught:
        lower(Case(Spectrum, lambda seed: floats(4, 6, 16, seed=seed)))
    error = caught.value
    assert (error.code, error.where) == ("QG503", "aten._linalg_eigh.default")
    assert error.why.startswith("DispatchError: No ONNX function found")


def test_a_broken_file_is_refused_with_place_reason_and_remedy() -> None:
    with pytest.raises(LowerError) as caught:
        ort_cpu.session(b"no model")
    assert re.match(r"QG505: .*\n  where: default options\n  why: .*\n  do: ", caught.value.text())


# ---------------------------------------------------------------- what the engine may leave out


def test_a_shape_operation_on_integers_may_go_and_a_pool_may_not() -> None:
    plan, nodes = lowered("images").plan, ort_cpu.audit(lowered("images").file)

    def without(name: str) -> list[str]:
        return [m.node for m in compare_kernels(plan, [n for n in nodes if owner(n.name) != name])]

    assert compare_kernels(plan, nodes) == []
    assert without("Images:flatten") == []
    assert without("Images:max_pool2d") == ["Images:max_pool2d"]
    floats = [replace(n, int8=False) if owner(n.name) == "Images:flatten" else n for n in nodes]
    assert [m.node for m in compare_kernels(plan, floats)] == ["Images:flatten"]


def test_what_a_kernel_takes_in_has_none_of_its_own() -> None:
    plan, nodes = lowered("images").plan, ort_cpu.audit(lowered("images").file)
    for name in ("Images:relu", "Images:clamp", "Images:pad"):
        stray = KernelNode(f"{name}/Relu", "Relu", int8=False)
        (mismatch,) = compare_kernels(plan, [*nodes, stray])
        assert str(mismatch).endswith("predicts no kernel of its own, the engine runs float Relu")
