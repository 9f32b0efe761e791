"""How long do the passes and the plan of a Llama take, and how does that grow with its layers? One thread.

Per size: ``canonicalize`` (rewrites and recognition; as a user calls it, and with unchecked contracts) and ``plan``,
which canonicalizes again. The figure is their sum as called, an upper bound of what a user waits for; capture is listed
apart. Sizes and verbs run in turn in one process; medians of CPU seconds, so that other load on the machine does not
enter. Ends with an error if a number of ``LIMITS`` is missed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import transformers
from common import publish

import qatgraph as qg
from qatgraph.passes import CANONICALIZE
from qatgraph.rewriting.manager import PassManager, PassReport
from qatgraph.rewriting.passes import GraphPass
from qatgraph.rewriting.registry import make_pass

LAYERS, ROUNDS, SLOWEST = (2, 4, 8, 16, 32), 5, 5
TOTAL, RATIO = "canonicalize + plan", "largest ratio of canonicalize + plan on twice the layers"
LIMITS = {f"{LAYERS[-1]} layers, {TOTAL} ms": 10_000.0, RATIO: 2.2}


def llama(layers: int) -> torch.nn.Module:
    """Random weights, tiny widths: the time of a pass is that of nodes, not of numbers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model: torch.nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def unchecked(graph: qg.Graph) -> list[PassReport]:
    passes = [p for p in map(make_pass, CANONICALIZE) if isinstance(p, GraphPass)]
    manager = PassManager(passes, checked=False)
    manager.run(graph)
    return manager.reports


VERBS: dict[str, Callable[[qg.Graph], Any]] = {
    "canonicalize": qg.canonicalize,
    "canonicalize, unchecked": unchecked,
    "plan": qg.plan,
}


def cpu_ms(verb: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = verb()
    return (time.process_time() - start) * 1e3, result


def measure() -> dict[str, Any]:
    ids = {"input_ids": torch.arange(16).reshape(2, 8)}
    qg.plan(qg.capture(llama(1), ids))  # what is imported and made once is no time of a pass
    figures: dict[str, Any] = {}
    graphs: dict[int, qg.Graph] = {}
    for n in LAYERS:
        figures[f"{n} layers, capture ms"], graphs[n] = cpu_ms(lambda n=n: qg.capture(llama(n), ids))
    gc.freeze()  # a user has one graph: the others are no burden on the garbage collector
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    own: dict[str, list[float]] = defaultdict(list)  # of each pass, on the largest graph, without its checks
    for _ in range(ROUNDS):
        for n, graph in graphs.items():
            for name, verb in VERBS.items():
                spent, result = cpu_ms(lambda verb=verb, graph=graph: verb(graph))
                times[n, name].append(spent)
                for report in result if verb is unchecked and n == LAYERS[-1] else ():
                    own[report.name].append(report.seconds * 1e3)
    for n, graph in graphs.items():
        figures[f"{n} layers, nodes"] = len(graph.nodes)
        figures |= {f"{n} layers, {name} ms": statistics.median(times[n, name]) for name in VERBS}
        figures[f"{n} layers, {TOTAL} ms"] = sum(figures[f"{n} layers, {name} ms"] for name in TOTAL.split(" + "))
    for name in (*VERBS, TOTAL):
        for half, n in pairwise(LAYERS):
            ratio = figures[f"{n} layers, {name} ms"] / figures[f"{half} layers, {name} ms"]
            figures[f"{half} -> {n} layers, {name}, ratio"] = ratio
    figures[RATIO] = max(v for k, v in figures.items() if k.endswith(f"layers, {TOTAL}, ratio"))
    slowest = sorted(((statistics.median(ms), name) for name, ms in own.items()), reverse=True)[:SLOWEST]
    return figures | {f"{LAYERS[-1]} layers, {name} alone ms": ms for ms, name in slowest}


def main() -> None:
    torch.set_num_threads(1)
    figures = measure()
    publish("passes", figures)
    missed = [
        f"{name} is {figures[name]:.2f}, at most {limit:g}" for name, limit in LIMITS.items() if figures[name] > limit
    ]
    if missed:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
