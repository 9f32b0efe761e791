"""scale-outliers: into what the factors go, what they are worth, what is refused, and the whole road of a job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qatgraph as qg
from qatgraph.api import decide
from qatgraph.errors import PassError, QatgraphError
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from qatgraph.passes import scale_outliers
from qatgraph.planning.plan import Plan
from qatgraph.planning.recipe import Override, Recipe
from qatgraph.quantizers import smoothing
from qatgraph.quantizers.smoothing import Activation, Reader, search
from qatgraph.rewriting import channel_source
from qatgraph.rewriting.channel_source import source_of
from qatgraph.rewriting.evidence import Evidence
from qatgraph.rewriting.manager import PassManager
from qatgraph.rewriting.registry import make_pass
from qatgraph.runner import replay_folder, run_job, verify_folder
from qatgraph.specs import QuantSpec
from tests.conftest import Golden
from tests.models import floats
from tests.rewritten import after, lines, rewritten

JOBS = Path(__file__).parent / "jobs"
EXAMPLES = Path(__file__).parent.parent / "examples"
WIDTH, HEADS = 16, 4
BATCH = floats(8, 12, WIDTH)


class Net(nn.Module):
    """Whatever a function makes of a few layers; some channels of ``source``, ``norm`` and ``rms`` are outliers."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.source, self.down, self.other = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.narrow = nn.Linear(WIDTH, WIDTH // 2)
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        with torch.no_grad():
            for layer in (self.source, self.narrow, self.norm, self.rms):
                layer.weight[3] *= 60.0
                layer.weight[6] *= 25.0
            self.down.weight[:, 3] /= 60.0  # so that what the other channels say counts
            self.down.weight[:, 6] /= 25.0

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def attend(query: Tensor, value: Tensor, key: Tensor | None = None, **options: Any) -> Tensor:
    """Attention of 4 query heads; keys and values have so many as their width gives: [batch, length, width] each."""

    def heads(t: Tensor) -> Tensor:
        return t.view(*t.shape[:2], -1, WIDTH // HEADS).transpose(1, 2)

    key = query[..., : value.shape[-1]] if key is None else key
    mixed = functional.scaled_dot_product_attention(heads(query), heads(key), heads(value), **options)
    return mixed.transpose(1, 2).reshape(query.shape)


def written_out(query: Tensor, value: Tensor) -> Tensor:
    probabilities = (query @ query.transpose(1, 2)).softmax(-1)
    return probabilities @ value


# name -> the model, the nodes whose outputs are divided, how many products appear
HOMES: dict[str, tuple[Callable[[Any, Tensor], Tensor], set[str], int]] = {
    "a layer norm": (lambda m, x: m.down(m.norm(x)), {"norm:layer_norm"}, 0),
    "an rms norm": (lambda m, x: m.down(m.rms(x)), {"rms:rms_norm"}, 0),
    "a norm that a residual reads": (lambda m, x: (y := m.norm(x)) + m.down(y), set(), 1),
    "a relu": (lambda m, x: m.down(m.source(x).relu()), {"source:linear"}, 0),
    "a gate": (lambda m, x: m.down(functional.silu(m.other(x)) * m.source(x)), {"source:linear"}, 0),
    "a gelu": (lambda m, x: m.down(functional.gelu(m.source(x))), set(), 1),
    "the value of attention": (lambda m, x: m.down(attend(m.other(x), m.source(x))), {"source:linear"}, 0),
    "shared heads": (
        lambda m, x: m.down(attend(m.other(x), m.narrow(x), enable_gqa=True)), {"narrow:linear"}, 0,
    ),
    "keys that are the values": (lambda m, x: m.down(attend(m.other(x), v := m.source(x), v)), set(), 1),
    "a square": (lambda m, x: m.down((y := m.source(x)) * y), set(), 1),
    "attention written out": (lambda m, x: m.down(written_out(m.other(x), m.source(x))), {"source:linear"}, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Scaled:
    before: Graph
    graph: Graph
    refused: dict[str, str]
    recipe: Recipe


def scaled(function: Callable[[Any, Tensor], Tensor]) -> Scaled:
    """Only ``down`` is int8, so that the one group of the test is the one that is scaled."""
    torch.manual_seed(0)
    before = qg.canonicalize(qg.capture(Net(function).eval(), BATCH))
    first = [record(n).name for n in before.nodes if record(n).name.startswith(("source", "other", "narrow"))]
    recipe = Recipe(override=tuple(Override(select=n, place="float") for n in first))
    seen = Evidence([BATCH], lambda graph: decide(graph, "ort-cpu", recipe))
    manager = PassManager([make_pass("scale-outliers")], leaves=before.stage, evidence=seen)
    return Scaled(before, manager.run(before), {r.node: r.reason for r in manager.reports[0].refused}, recipe)


def error(graph: Graph, found: Scaled) -> float:
    """The squared error of the fake-quantized graph on other inputs, relative to the float result."""
    qat = qg.prepare(graph, qg.plan(graph, recipe=found.recipe))
    qg.calibrate(qat, [BATCH], progress=False)
    x = floats(8, 12, WIDTH, seed=1)
    with torch.no_grad():
        have, want = qat(x), found.before(x)
    return float((have - want).square().sum() / want.square().sum())


# ---------------------------------------------------------------- scale-outliers


def test_the_text(golden: Golden) -> None:
    golden("scale-outliers", str(scaled(HOMES["the value of attention"][0]).graph))


@pytest.mark.parametrize("name", HOMES)
def test_the_factors_go_where_they_cost_least(name: str) -> None:
    function, divided, products = HOMES[name]
    found = scaled(function)
    moved = {line.partition(" = ")[0] for line in lines(found.graph) if "/scaled" in line}
    assert moved == divided | {"down:linear"}
    assert len(lines(found.graph)) - len(lines(found.before)) == products
    assert error(found.graph, found) < 0.5 * error(found.before, found)


def test_a_second_run_changes_nothing() -> None:
    once = scaled(HOMES["a gelu"][0]).graph
    twice, refused = rewritten("scale-outliers", qg.canonicalize(once))
    assert lines(twice) == lines(once)
    assert set(refused.values()) == {"the graph is scaled already"}


def test_channels_of_shared_heads_share_a_factor() -> None:
    found = scaled(HOMES["shared heads"][0])
    old, new = (
        g.module.get_parameter(f"down.weight{suffix}") for g, suffix in ((found.before, ""), (found.graph, "/scaled"))
    )
    factors = (new / old)[0].reshape(2, 2, WIDTH // HEADS)  # key heads, query heads of each, width of a head
    assert torch.allclose(factors[:, 0], factors[:, 1], rtol=1e-4)
    assert float(factors.max() / factors.min()) > 2


def test_no_data_is_as_good_as_none() -> None:
    graph = qg.capture(Net(HOMES["a relu"][0]).eval(), BATCH)
    with pytest.raises(PassError) as caught:
        qg.canonicalize(graph, [make_pass("scale-outliers")], data=[])
    assert caught.value.code == "QG218"


def test_data_that_says_nothing_moves_nothing() -> None:
    graph = qg.capture(nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval(), BATCH)
    found = qg.canonicalize(graph, [make_pass("scale-outliers")], data=[torch.zeros_like(BATCH)])
    assert lines(found) == lines(qg.canonicalize(graph))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_refused_and_double_is_scaled(dtype: torch.dtype) -> None:
    """The contract of the pass looks at the numbers."""
    graph = qg.capture(Net(HOMES["a relu"][0]).to(dtype).eval(), BATCH.to(dtype))
    found = qg.canonicalize(graph, [make_pass("scale-outliers")], data=[BATCH.to(dtype)])
    assert any("/scaled" in line for line in lines(found)) == (dtype is torch.float64)


class Gate(nn.Module):
    """Half of the gates are shut: the channels behind them are next to nothing, those of ``source`` are not."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.gate, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        with torch.no_grad():
            self.gate.bias.copy_(torch.tensor([-30.0, 3.0]).repeat_interleave(WIDTH // 2))
            self.gate.weight[WIDTH // 2 :] *= 0.1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.source(x))
        return y


def keeps_shut_gates() -> bool:
    """On a target with one scale for a whole weight and result."""
    torch.manual_seed(1)
    target, model = str(EXAMPLES / "targets" / "toy_npu.toml"), Gate().eval()
    graph, x, errors = qg.capture(model, BATCH), floats(8, 12, WIDTH, seed=1), []
    for passes in ([], [make_pass("scale-outliers")]):
        found = qg.canonicalize(graph, passes, data=[BATCH], target=target)
        qat = qg.prepare(found, qg.plan(found, target))
        qg.calibrate(qat, [BATCH], progress=False)
        with torch.no_grad():
            errors.append(float((qat(x) - model(x)).norm() / model(x).norm()))
    return errors[1] < 2 * errors[0]


def test_factors_do_not_widen_grids_of_one_scale() -> None:
    assert keeps_shut_gates()


def test_factors_that_widen_them_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_outliers, "_coarsens", lambda group, source, found: False)
    assert not keeps_shut_gates()


class Norm(nn.Module):
    """Channel 3 is an outlier of a norm over two axes."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.norm, self.down = nn.LayerNorm(shape), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.norm.weight[:, 3] *= 60.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.norm(x))
        return y


class Product(nn.Module):
    """The value of a product has fewer axes than the product."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.down = nn.Linear(WIDTH, WIDTH), nn.LazyLinear(WIDTH)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y: Tensor = self.down(1e2 * x.square() @ self.source(z))
        return y


ODD: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "a norm of as many rows as channels": (lambda: Norm(WIDTH, WIDTH), (floats(4, WIDTH, WIDTH),)),
    "a norm of fewer rows": (lambda: Norm(4, WIDTH), (floats(4, 4, WIDTH),)),
    "a product with a matrix": (Product, (floats(4, 6, WIDTH), floats(WIDTH, WIDTH, seed=1))),
    "a product with a vector": (Product, (floats(64, 6, WIDTH), floats(WIDTH, seed=1))),
}


@pytest.mark.parametrize("name", ODD)
def test_channels_in_odd_places_are_scaled_right(name: str) -> None:
    """The contract of the pass looks at the numbers."""
    make, inputs = ODD[name]
    torch.manual_seed(0)
    model = make()
    model(*inputs)  # shapes of lazy layers
    graph = qg.capture(model.eval(), inputs)
    found = qg.canonicalize(graph, [make_pass("scale-outliers")], data=[inputs])
    assert any("down.weight/scaled" in line for line in lines(found))


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, str]] = {
    "a shared weight": (lambda m, x: m.down(m.norm(m.down(x))), "down:linear", "the weight of 'down:linear' is shared"),
    "a computed weight": (
        lambda m, x: functional.linear(m.norm(x), m.down.weight * x.mean()), "", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_is_left_alone(name: str) -> None:
    function, node, reason = REFUSED[name]
    found = scaled(function)
    assert lines(found.graph) == lines(found.before)
    assert found.refused.get(node, "") == reason


def test_what_nothing_improves_is_left_alone() -> None:
    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(WIDTH, WIDTH)
            nn.init.constant_(self.down.weight, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(x.sign())
            return y

    before = qg.canonicalize(qg.capture(Even().eval(), floats(4, WIDTH)))
    graph, refused = rewritten("scale-outliers", before)
    assert lines(graph) == lines(before)
    assert refused["down:linear"].startswith("no factors lower the error of what reads its input (best: ")


# ---------------------------------------------------------------- where channels come from


@pytest.mark.parametrize("name", [n for n in HOMES if HOMES[n][1]])
def test_a_factor_at_the_source_is_the_factor_of_the_value(name: str) -> None:
    """Numerically: divide one output channel of the source, and just its channels of the value are divided."""
    torch.manual_seed(0)
    net = Net(HOMES[name][0]).eval()
    graph = qg.canonicalize(qg.capture(net, BATCH))
    reader = graph.node("down:linear")
    source = source_of(reader.args[0])  # type: ignore[arg-type]
    assert not isinstance(source, str)
    seen = []
    handle = net.down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        net(BATCH)
        for parameter in net.get_submodule(record(source.node).module).parameters():
            parameter[3] *= 0.5
        net(BATCH)
    handle.remove()
    want = torch.where(source.channels == 3, 0.5, 1.0) * seen[0]
    assert torch.allclose(seen[1], want, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(seen[1], seen[0], rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------- the search


def outliers() -> tuple[Activation, list[Reader]]:
    rows = floats(256, WIDTH)
    rows[:, 3] *= 80
    weight = floats(WIDTH, WIDTH, seed=1)
    spec, weights = QuantSpec.parse("u8 affine per-tensor"), QuantSpec.parse("s8 symmetric per-channel(0)")
    return Activation(rows, rows.abs().amax(0), spec, "minmax", torch.arange(WIDTH)), [Reader(weight, weights)]


def lowers_the_error() -> bool:
    x, readers = outliers()
    found = search(x, readers)
    judges = replace(x, rows=x.rows[1::2])
    after, before = (sum(smoothing._errors(judges, readers, f)) for f in (found.factors, torch.ones(WIDTH)))
    return found.error < 0.2 and abs(after / before - found.error) < 1e-6


def worsens_no_layer(patch: pytest.MonkeyPatch) -> bool:
    """Whatever is scaled helps one of two layers a lot, and costs the other a little."""
    x, (reader,) = outliers()
    patch.setattr(smoothing, "_errors", lambda x, readers, f: [1.0, 1.0] if bool((f == 1).all()) else [0.1, 1.1])
    return bool((search(x, [reader, reader]).factors == 1).all())


def test_the_search_worsens_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worsens_no_layer(monkeypatch)


def test_a_search_that_looks_at_the_sum_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "_worse", lambda after, before: False)
    assert not worsens_no_layer(monkeypatch)


def test_the_search_lowers_the_error() -> None:
    assert lowers_the_error()


def test_a_search_that_knows_no_outliers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "STRENGTHS", (0.0,))
    monkeypatch.setattr(smoothing, "QUANTILES", (1.0,))
    assert not lowers_the_error()


# ---------------------------------------------------------------- planted faults, which the contract sees


def tile_the_heads(patch: pytest.MonkeyPatch) -> None:
    monkey = torch.Tensor.repeat_interleave

    def tiled(self: Tensor, repeats: Any, dim: int) -> Tensor:
        return torch.cat([self] * repeats, dim) if isinstance(repeats, int) else monkey(self, repeats, dim)

    patch.setattr(torch.Tensor, "repeat_interleave", tiled)


def forget_the_bias(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scale_outliers, "ROLES", ("weight",))


def believe_that_gelu_keeps_factors(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(channel_source, "_SAME", frozenset({"relu", "dropout", "gelu"}))


def forget_other_readers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scale_outliers, "_alone", lambda group: True)


def count_a_square_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(channel_source, "_uses", lambda node, of: 1)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (tile_the_heads, "shared heads"),
        (forget_the_bias, "a relu"),
        (believe_that_gelu_keeps_factors, "a gelu"),
        (forget_other_readers, "a norm that a residual reads"),
        (count_a_square_once, "a square"),
        (count_a_square_once, "keys that are the values"),
    ],
)
def test_a_planted_fault_breaks_the_contract(
    fault: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(PassError, match="declares its numerics") as caught:
        scaled(HOMES[name][0])
    assert caught.value.code == "QG207"


# ---------------------------------------------------------------- data, and the road of a job


def test_without_data_it_is_refused_before_anything_runs() -> None:
    graph = qg.capture(Net(HOMES["a relu"][0]).eval(), BATCH)
    with pytest.raises(PassError, match="looks at calibration data, and there is none here") as caught:
        qg.canonicalize(graph, [make_pass("scale-outliers")])
    assert caught.value.code == "QG218"
    with pytest.raises(PassError, match="looks at calibration data"):
        after(graph, "scale-outliers")


def test_it_sees_the_grids_of_the_target_and_recipe_that_are_named() -> None:
    graph = qg.capture(Net(HOMES["a relu"][0]).eval(), BATCH)
    float_only = Recipe(override=(Override(select="*", place="float"),))
    found = qg.canonicalize(graph, [make_pass("scale-outliers")], data=[BATCH], recipe=float_only)
    assert not any("/scaled" in line for line in lines(found))
    found = qg.canonicalize(graph, [make_pass("scale-outliers")], data=[BATCH])
    assert any("/scaled" in line for line in lines(found))


def test_a_batch_that_does_not_fit_is_named() -> None:
    graph = qg.capture(Net(HOMES["a relu"][0]).eval(), BATCH)
    with pytest.raises(QatgraphError, match="does not fit the captured model") as caught:
        qg.canonicalize(graph, [make_pass("scale-outliers")], data=[BATCH, floats(8, 13, WIDTH)])
    assert (caught.value.code, caught.value.where.split(",")[0]) == ("QG110", "calibration batch 1")


def test_a_job_runs_is_verified_and_replayed_with_it(tmp_path: Path) -> None:
    report, folder = run_job(JOBS / "tiny.toml", tmp_path / "tiny", train=False, passes=["scale-outliers"])
    assert "/scaled" in str(sorted(Plan.load(folder / "plan.json").nodes, key=lambda n: n.name))
    assert report.ok
    assert verify_folder(JOBS / "tiny.toml", folder).ok
    assert replay_folder(folder, JOBS / "tiny.toml", tmp_path / "again")
