"""Fidelity against hand numbers, and nothing bad reported as good; latency, which leaves everything as it was."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import qatgraph as qg
from qatgraph import fidelity
from qatgraph.backends.ort_cpu import audit, median_latencies
from qatgraph.errors import VerifyError
from qatgraph.ir.graph import Graph
from qatgraph.latency import export_float, lower_float, measure
from tests.models import ZOO, captured, floats

NAN, INF = float("nan"), float("inf")


def rows(*values: list[float]) -> list[Tensor]:
    """One batch."""
    return [torch.tensor(values)]


# ---------------------------------------------------------------- cosine


def test_cosine_against_hand_numbers() -> None:
    have, want = rows([3.0, 4.0], [1.0, 0.0]), rows([4.0, 3.0], [-2.0, 0.0])
    assert fidelity.cosine(have, want) == {"cosine_mean": pytest.approx(-0.02), "cosine_min": pytest.approx(-1.0)}
    assert fidelity.cosine(want, want) == {"cosine_mean": pytest.approx(1.0), "cosine_min": pytest.approx(1.0)}


def test_every_sample_counts_the_same_whatever_its_batch() -> None:
    have = [*rows([1.0, 0.0]), *rows([1.0, 0.0], [0.0, 1.0], [3.0, 4.0])]
    want = [*rows([0.0, 1.0]), *rows([1.0, 0.0], [0.0, 1.0], [3.0, 4.0])]
    assert fidelity.cosine(have, want)["cosine_mean"] == pytest.approx(0.75)


def test_a_sample_is_one_row_whatever_its_rank() -> None:
    have, want = floats(2, 3, 4), floats(2, 3, 4, seed=1)
    flat = fidelity.cosine([have.reshape(2, 12)], [want.reshape(2, 12)])
    assert fidelity.cosine([have], [want]) == flat
    assert fidelity.cosine([have.reshape(6, 4)], [want.reshape(6, 4)]) != flat
    assert fidelity.cosine([have[0, 0]], [want[0, 0]]) == fidelity.cosine([have[0, :1]], [want[0, :1]])


def test_a_difference_below_float32_is_seen() -> None:
    want = torch.ones(1, 1000)
    have = want.clone()
    have[0, 0] += 1e-3
    assert 1e-10 < 1 - fidelity.cosine([have], [want])["cosine_mean"] < 1e-9


@pytest.mark.parametrize(("have", "want"), [([0.0, 0.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0]), ([0.0] * 2, [0.0] * 2)])
def test_a_row_of_zeros_is_never_good(have: list[float], want: list[float]) -> None:
    found = fidelity.cosine(rows(have, [1.0, 1.0]), rows(want, [1.0, 1.0]))
    assert found == {"cosine_mean": pytest.approx(0.5), "cosine_min": 0.0}


# ---------------------------------------------------------------- top-1


def test_top1_against_hand_numbers() -> None:
    logits = [*rows([0.1, 0.7, 0.2], [0.9, 0.0, 0.1], [0.0, 0.1, 0.2]), *rows([5.0, 1.0, 1.0])]
    assert fidelity.top1(logits, [torch.tensor([1, 0, 0]), torch.tensor([0])]) == {"top1": 0.75}
    assert fidelity.top1(logits, [torch.tensor([1, 0, 2]), torch.tensor([0])]) == {"top1": 1.0}
    assert fidelity.top1(logits, [torch.tensor([0, 1, 0]), torch.tensor([2])]) == {"top1": 0.0}


def test_top1_of_tokens_counts_every_token() -> None:
    logits = [torch.eye(3)[None], torch.eye(3)[None, :2]]
    assert fidelity.top1(logits, [torch.tensor([[0, 1, 0]]), torch.tensor([[0, 0]])]) == {"top1": 0.6}


# ---------------------------------------------------------------- what cannot be compared

GOOD = rows([1.0, 2.0], [3.0, 4.0])


def bad(value: float) -> list[Tensor]:
    return rows([1.0, 2.0], [value, 4.0])


def refused(code: str, function: Any, *args: Any) -> str:
    with pytest.raises(VerifyError) as caught:
        function(*args)
    assert caught.value.code == code
    assert caught.value.where
    assert caught.value.todo
    return caught.value.text()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_is_refused_on_either_side(value: float) -> None:
    assert "NaN or infinity" in refused("QG607", fidelity.cosine, bad(value), GOOD)
    refused("QG607", fidelity.cosine, GOOD, bad(value))
    refused("QG607", fidelity.cosine, bad(value), bad(value))
    refused("QG607", fidelity.top1, bad(value), [torch.tensor([1, 0])])
    assert fidelity.top1(bad(3.0), [torch.tensor([1, 1])]) == {"top1": 1.0}  # the control


@pytest.mark.parametrize(
    ("have", "want", "sentence"),
    [
        (GOOD, rows([1.0, 2.0]), "in batch 0 they are [1, 2], not [2, 2]"),  # would be broadcast
        (GOOD, [torch.ones(2, 1)], "in batch 0 they are [2, 1], not [2, 2]"),  # would be broadcast
        ([*GOOD, *GOOD], GOOD, "in batch 1 they are nothing, not [2, 2]"),
        (GOOD, [*GOOD, *GOOD], "in batch 1 they are [2, 2], not nothing"),
    ],
)
def test_outputs_of_other_shapes_are_refused(have: list[Tensor], want: list[Tensor], sentence: str) -> None:
    assert sentence in refused("QG606", fidelity.cosine, have, want)


@pytest.mark.parametrize("labels", [[[1], [0]], [1], [1, 0, 1]])
def test_labels_that_do_not_fit_are_refused(labels: list[Any]) -> None:
    assert "the labels do not fit" in refused("QG606", fidelity.top1, GOOD, [torch.tensor(labels)])


def test_the_first_float_output_is_compared() -> None:
    ids, logits = torch.tensor([1]), torch.ones(2, requires_grad=True)
    found = fidelity.first_output({"ids": ids, "none": None, "logits": logits, "more": torch.zeros(3)})
    assert torch.equal(found, torch.ones(2))
    assert not found.requires_grad
    refused("QG606", fidelity.first_output, (ids, None, 3))


# ---------------------------------------------------------------- latency

X = floats(4, 32)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = captured("mlp")
    qat = qg.prepare(graph, qg.plan(graph))
    qg.calibrate(qat, [X], progress=False)
    return qg.lower(qat, tmp_path_factory.mktemp("latency") / "mlp.onnx")


def state(model: nn.Module, graph: Graph) -> dict[str, Any]:
    return {
        "values": {n: t.tolist() for n, t in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "graph": (graph.structural_hash(), graph.weights_hash(), graph.stage, graph.module.training),
    }


def test_latency_keeps_its_promises_and_touches_nothing(artifact: Path) -> None:
    model, graph = ZOO["mlp"].model().train(), captured("mlp")
    model.get_submodule("up").eval()
    model(X).sum().backward()
    before, content = state(model, graph), artifact.read_bytes()
    found = measure(model, graph, artifact, X, "ort_cpu")
    assert set(found) == {
        *("isa", "float_ms", "float_same_options_ms", "engine_ms", "ratio", "ratio_same_options", "batch", "how")
    }
    assert all(found[k] > 0 for k in found if k.endswith("_ms") or k.startswith("ratio"))
    assert found["ratio"] == pytest.approx(found["float_ms"] / found["engine_ms"])
    assert found["ratio_same_options"] == pytest.approx(found["float_same_options_ms"] / found["engine_ms"])
    assert found["batch"] == {"x": [4, 32]}
    assert state(model, graph) == before
    assert artifact.read_bytes() == content
    model.eval()
    assert state(model, graph) != before  # the comparison sees even a mode


def test_both_float_files_compute_the_model(artifact: Path, tmp_path: Path) -> None:
    model, graph = ZOO["mlp"].model(), captured("mlp")
    export_float(model, graph, tmp_path / "stock.onnx")
    lower_float(graph, tmp_path / "own.onnx")

    def distance(file: Path) -> float:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        assert [i.shape for i in session.get_inputs()] == [["batch", 32]]
        return float(np.abs(session.run(None, {"x": X.numpy()})[0] - model(X).detach().numpy()).max())

    for name in ("stock.onnx", "own.onnx"):
        assert distance(tmp_path / name) < 1e-5
        assert not [n for n in audit(str(tmp_path / name)) if n.int8]
    assert distance(artifact) > 1e-4
    assert [n for n in audit(str(artifact)) if n.int8]


class Sleeper:
    """A session that takes a known time, and says when it is called."""

    def __init__(self, name: str, seconds: float, calls: list[str]) -> None:
        self.name, self.seconds, self.calls = name, seconds, calls

    def run(self, outputs: None, feed: dict[str, Any]) -> None:
        self.calls.append(self.name)
        time.sleep(self.seconds * (20 if len(self.calls) == 5 else 1))  # one outlier: the median does not see it


def test_latencies_are_medians_of_interleaved_runs() -> None:
    calls: list[str] = []
    sessions = {name: Sleeper(name, seconds, calls) for name, seconds in (("slow", 0.01), ("fast", 0.001))}
    times = median_latencies(sessions, {}, rounds=5, warmup=1)
    assert calls == ["slow", "fast"] * 6
    assert 10 <= times["slow"] < 100
    assert 1 <= times["fast"] < times["slow"]
