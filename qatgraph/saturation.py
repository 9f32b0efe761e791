"""Where 16-bit pair sums of x86 without VNNI would saturate in a model, and what each cure costs.

Static: the worst case of the integers of the weights. Observed: on the integers that the fake-quantized model's
activations become. Both at full-range scales, ``max|w| / 127``, along the order of K of each kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from qatgraph import borders, fidelity, reference
from qatgraph.conversion import convert
from qatgraph.errors import PlanError
from qatgraph.ir.graph import Batch, Graph, arguments
from qatgraph.ir.masks import weight_of
from qatgraph.ir.meta import record
from qatgraph.operators import DEQUANTIZE
from qatgraph.proof import feed_of, model_run, score
from qatgraph.quantizers.fake_quantize import WeightFakeQuantize
from qatgraph.reference import Array
from qatgraph.regions import Region
from qatgraph.report.machine import has_vnni, isa
from qatgraph.specs import ScaleRule

BATCHES = 4  # on which pair sums are counted
PAIR_SAFE, SEVEN_BITS, EXACT, NOTHING = "pair-safe", "7-bit", "exact", "nothing"
CURES = {
    PAIR_SAFE: "scales at which no pair can overflow",
    SEVEN_BITS: "|w| <= 63",
    EXACT: "the full range with session.x64quantprecision = 1",
    NOTHING: "the full range at default options",
}
RULES = {PAIR_SAFE: ScaleRule.PAIR_SAFE, SEVEN_BITS: ScaleRule.REDUCED_RANGE, EXACT: ScaleRule.FREE}
HERE = ", where nothing saturates and nobody needs the exact option: what the full range gives elsewhere is computed"
Say = Callable[[str], None]


@dataclass
class Layer:
    """One int8 product whose kernel adds in pairs, at full-range scales. Arrays have one entry an output channel.

    ``worst_pairs``: the largest ``|w[2k]| + |w[2k+1]|`` of one sign. ``pairs`` and ``outputs``: the shares of pair sums
    and of outputs that saturate on the data. ``errors``: by cure, of the layer's output against its float weights on
    the same integers, relative, root mean square.
    """

    node: str
    kernel: str
    k: int
    worst_pairs: Array
    pairs: Array
    outputs: Array
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def possible(self) -> float:
        """The share of channels that some input would saturate."""
        return float((self.worst_pairs > 128).mean())

    @property
    def worst_channel(self) -> int:
        """The one with the most wrong outputs on the data, then the most pairs, then the largest pair of weights."""
        return int(np.lexsort((self.worst_pairs, self.pairs, self.outputs))[-1])

    def as_json(self) -> dict[str, Any]:
        worst = self.worst_channel
        return {
            "node": self.node,
            "kernel": self.kernel,
            "k": self.k,
            "channels": len(self.worst_pairs),
            "channels_that_could": self.possible,
            "pairs_that_do": float(self.pairs.mean()),
            "outputs_that_do": float(self.outputs.mean()),
            "worst_channel": {
                "index": worst,
                "pair": int(self.worst_pairs[worst]),
                "pairs_that_do": float(self.pairs[worst]),
                "outputs_that_do": float(self.outputs[worst]),
            },
            "relative_error": self.errors,
        }


@dataclass
class Saturation:
    """The layers in order of execution; by cure the fidelity of the whole model and its median milliseconds here."""

    target: str
    layers: list[Layer]
    batches: int
    fidelity: dict[str, dict[str, float]]
    milliseconds: dict[str, float]

    @property
    def worst(self) -> Layer:
        return max(self.layers, key=lambda r: (float(r.outputs.mean()), float(r.pairs.mean()), r.possible))

    def error(self, cure: str) -> float:
        """The mean over the layers."""
        return float(np.mean([r.errors[cure] for r in self.layers]))

    def summary(self) -> list[str]:
        """What to know of it, in sentences."""
        channels = np.concatenate([r.worst_pairs for r in self.layers])
        worst, index = self.worst, self.worst.worst_channel
        pairs, outputs = (float(np.mean([v.mean() for v in of])) for of in zip(*self._observed(), strict=True))
        errors = {c: self.error(c) / max(self.error(EXACT), 1e-30) for c in CURES}
        slower = self.milliseconds[EXACT] / self.milliseconds[PAIR_SAFE]
        return [
            f"at full range {(channels > 128).mean():.0%} of {len(channels)} output channels of {len(self.layers)} "
            f"products could saturate on x86 without VNNI; of the pair sums {pairs:.2%} do, of the outputs "
            f"{outputs:.2%} ({self.batches} batches, mean over the products)",
            f"worst: '{worst.node}', channel {index}: {worst.outputs[index]:.1%} of its outputs are wrong there, "
            f"{worst.pairs[index]:.2%} of its pair sums saturate",
            f"pair-safe scales cost {errors[PAIR_SAFE]:.2f} x the error of the full range, 7-bit weights "
            f"{errors[SEVEN_BITS]:.2f} x, nothing {errors[NOTHING]:.2f} x; the exact option takes {slower:.2f} x "
            "the time",
            f"times are of this machine, {isa()}" + (HERE if has_vnni() else ""),
        ]

    def _observed(self) -> Iterator[tuple[Array, Array]]:
        return ((r.pairs, r.outputs) for r in self.layers)

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "isa": isa(),
            "vnni": has_vnni(),
            "batches": self.batches,
            "summary": self.summary(),
            "cures": {
                c: {
                    "is": CURES[c],
                    "relative_error": self.error(c),
                    **self.fidelity[c],
                    "milliseconds": self.milliseconds[c],
                }
                for c in CURES
            },
            "layers": [r.as_json() for r in self.layers],
        }


def analyse(
    backend: Any,
    qat: torch.nn.Module,
    float_model: torch.nn.Module,
    batches: Sequence[Batch],
    latency: Batch,
    labels: Sequence[torch.Tensor] | None = None,
    *,
    say: Say = lambda line: None,
) -> Saturation:
    """Count on the first ``BATCHES`` batches, and time whole files on this machine, in turn.

    Args:
        backend: it lowers, loads and times.
        qat: a calibrated model, as ``qatgraph.prepare`` made it; it is left as it is.
        float_model: what the outputs of the whole model are compared with.
        batches: evaluation batches.
        latency: the batch to time.
        labels: one tensor a batch, for top-1.

    Raises:
        PlanError: QG309 no kernel of the plan adds in pairs, QG313 the engine has no exact option.
    """
    prepared = Graph.prepared(qat)
    paired = [p.node for p in prepared.info.plan.predictions if p.int8 and p.in_pairs]
    if not paired:
        raise PlanError(
            "QG309",
            "no kernel of the plan adds products in pairs",
            where=f"target '{prepared.info.plan.target}'",
            why="either nothing is int8, or the rows of the target have accumulators of 32 bits",
            todo="see `qatgraph plan JOB.toml`; for ONNX Runtime choose the target ort-cpu",
        )
    if not backend.PRECISE:
        raise PlanError(
            "QG313",
            f"{backend.NAME} has no option that is exact without VNNI, which a cure could be compared with",
            where=f"target '{prepared.info.plan.target}'",
            todo="choose the target ort-cpu: the layers that saturate are the same",
        )
    batches, labels = batches[:BATCHES], labels[:BATCHES] if labels is not None else None
    graphs = {}
    for cure, rule in RULES.items():
        with _scales(prepared, rule, paired):
            graphs[cure] = convert(prepared)
    wanted = fidelity.outputs(model_run(float_model), batches)
    layers, outputs = _observe(prepared, graphs, paired, batches, say)
    scores = {cure: score(outputs[cure], wanted, labels) for cure in CURES}
    times = _times(backend, prepared, graphs, latency, say)
    return Saturation(prepared.info.plan.target, layers, len(batches), scores, times)


@contextmanager
def _scales(prepared: Graph, rule: ScaleRule, nodes: Sequence[str]) -> Iterator[None]:
    """The weights of some products on scales by another rule."""
    found = {m for _, m in _weight_quantizers(prepared, nodes)}
    specs = {m: m.spec for m in found}
    try:
        for module in found:
            module.spec = replace(module.spec, scale=rule)
        yield
    finally:
        for module, spec in specs.items():
            module.spec = spec


def _weight_quantizers(prepared: Graph, nodes: Sequence[str]) -> Iterator[tuple[fx.Node, WeightFakeQuantize]]:
    """The calls of quantizers in front of the weights of these products, in their order."""
    modules = dict(prepared.module.named_modules(remove_duplicate=False))
    for name in nodes:
        call = dict(arguments(prepared.node(name)))["weight"]
        module = modules[str(call.target)]
        assert isinstance(module, WeightFakeQuantize)
        yield call, module


def _observe(
    prepared: Graph, graphs: Mapping[str, Graph], nodes: Sequence[str], batches: Sequence[Batch], say: Say
) -> tuple[list[Layer], dict[str, list[torch.Tensor]]]:
    """The layers on the data, and by cure the model's first outputs."""
    weights = [weight_of(call.args[0]) for call, _ in _weight_quantizers(prepared, nodes)]
    counters = {}
    for name, weight in zip(nodes, weights, strict=True):
        assert weight is not None
        bias = weight_of(dict(arguments(prepared.node(name))).get("bias"))
        operands = {c: _operands(g.node(name)) for c, g in graphs.items()}
        floats = weight.tensor, None if bias is None else bias.tensor
        counters[name] = _Counter(Region.of(graphs[EXACT], graphs[EXACT].node(name)), floats, operands)
    outputs: dict[str, list[torch.Tensor]] = {cure: [] for cure in CURES}
    for i, batch in enumerate(batches):
        say(f"count saturating sums: batch {i + 1} of {len(batches)}")
        for cure in (PAIR_SAFE, SEVEN_BITS):
            outputs[cure].append(_run(graphs[cure], batch, {}))
        outputs[EXACT].append(_run(graphs[EXACT], batch, {n: c.count for n, c in counters.items()}))
        outputs[NOTHING].append(_run(graphs[EXACT], batch, {n: c.saturated for n, c in counters.items()}))
    return [c.layer() for c in counters.values()], outputs


def _run(graph: Graph, batch: Batch, layers: Mapping[str, Callable[..., torch.Tensor]]) -> torch.Tensor:
    with torch.no_grad():
        results = _WithLayers(graph, layers).run(*graph.leaves(batch, "evaluation batch"), enable_io_processing=False)
    return fidelity.first_output(borders.in_float(results, graph.info.outputs, borders.output_grids(graph)))


class _WithLayers(fx.Interpreter):
    """A graph run node by node, where functions of the arguments stand in for some nodes."""

    def __init__(self, graph: Graph, layers: Mapping[str, Callable[..., torch.Tensor]]) -> None:
        super().__init__(graph.module)
        self.layers = {graph.node(name): function for name, function in layers.items()}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.layers:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        return self.layers[n](*args)


def _operands(node: fx.Node) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a product in the stage qdq, as the floats that they stand for."""
    found = dict(arguments(node))
    weight = _value(found["weight"])
    assert weight is not None
    return weight, _value(found.get("bias"))


def _value(argument: Any) -> torch.Tensor | None:
    if not isinstance(argument, fx.Node):
        return None
    graph = Graph(argument.graph.owning_module)  # type: ignore[arg-type]
    if argument.target is not DEQUANTIZE:
        return graph.parameter(argument)
    *parts, axis = argument.args
    value: torch.Tensor = DEQUANTIZE(*(graph.parameter(p) for p in parts), axis)  # type: ignore[arg-type]
    return value


class _Counter:
    """Sums up over batches what one layer does at full range, and by cure how far it is from its float weights."""

    def __init__(
        self,
        region: Region,
        floats: tuple[torch.Tensor, torch.Tensor | None],
        operands: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]],
    ) -> None:
        self.region, self.floats, self.operands = region, floats, operands
        (self.weight, self.scale), self.windows = region.weight, region.windows
        self.seen, self.total = 0, 0.0
        self.pairs, self.outputs = np.zeros(len(self.weight)), np.zeros(len(self.weight))
        self.squares = dict.fromkeys(CURES, 0.0)

    def count(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        """The exact result; what saturation would make of it is counted."""
        target, rest = self._target, args[2:]
        want = target(x, *self.floats, *rest)
        have = {cure: target(x, *operands, *rest) for cure, operands in self.operands.items()}
        integers, grid = self.region.quantized(x.numpy())
        lost = self._lost(integers, grid)
        axes = tuple(i for i in range(lost.ndim) if i != (1 if self.windows else lost.ndim - 1))
        self.outputs += (lost != 0).mean(axes) * len(x)
        self.pairs += reference.saturated_share(integers, int(grid.zero_point), self.weight, **self.windows) * len(x)
        self.seen += len(x)
        self.total += float(want.double().square().sum())
        have[NOTHING] = have[EXACT] + torch.from_numpy(lost) * self._unit(grid)
        for cure, y in have.items():
            self.squares[cure] += float((y.double() - want).square().sum())
        return have[EXACT]

    def saturated(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        """The result on x86 without VNNI."""
        exact: torch.Tensor = self._target(x, *args)
        integers, grid = self.region.quantized(x.numpy())
        return exact + torch.from_numpy(self._lost(integers, grid)) * self._unit(grid)

    def layer(self) -> Layer:
        rows = reference.k_rows(self.weight, groups=self.windows.get("groups", 1))
        prediction = self.region.qdq.info.plan.prediction(record(self.region.node).name)
        seen = max(self.seen, 1)
        return Layer(
            node=prediction.node,
            kernel=prediction.kernel,
            k=rows.shape[1],
            worst_pairs=reference.worst_pairs(rows),
            pairs=self.pairs / seen,
            outputs=self.outputs / seen,
            errors={c: (s / max(self.total, 1e-30)) ** 0.5 for c, s in self.squares.items()},
        )

    @property
    def _target(self) -> Callable[..., torch.Tensor]:
        target: Any = self.region.node.target
        return target  # type: ignore[no-any-return]

    def _unit(self, grid: reference.Grid) -> torch.Tensor:
        """What one step of the accumulator stands for."""
        unit = torch.from_numpy(np.asarray(grid.scale * self.scale))
        return unit.reshape(-1, *[1] * (self.weight.ndim - 2)) if self.windows else unit

    def _lost(self, integers: Array, grid: reference.Grid) -> Array:
        """By how much saturation changes the accumulators, float32."""
        zero = int(grid.zero_point)
        if self.windows:
            exact = reference.accumulate_conv(integers, zero, self.weight, **self.windows)
            wrong = reference.accumulate_conv_pair16(integers, zero, self.weight, **self.windows)
        else:
            exact = reference.accumulate(integers, zero, self.weight)
            wrong = reference.accumulate_pair16(integers, zero, self.weight)
        lost: Array = (wrong.astype(np.int64) - exact).astype(np.float32)
        return lost


def _times(backend: Any, prepared: Graph, graphs: Mapping[str, Graph], latency: Batch, say: Say) -> dict[str, float]:
    """Median milliseconds of whole files, run in turn, one thread; that of the full range with nothing may be wrong."""
    plan = replace(prepared.info.plan, requires="")
    files = {}
    for cure, graph in graphs.items():
        say(f"lower: {cure}")
        files[cure] = backend.lower(graph, plan)
    say(f"time {len(CURES)} files in turn on this machine, {isa()}")
    sessions = {
        cure: backend.session(files.get(cure, files[EXACT]), threads=1, **(backend.PRECISE if cure == EXACT else {}))
        for cure in CURES
    }
    found: dict[str, float] = backend.median_latencies(sessions, feed_of(prepared, latency))
    return found
