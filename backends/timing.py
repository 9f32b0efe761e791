"""How long sessions take, measured so that they can be compared."""

from __future__ import annotations

import statistics
import time
from typing import Any

from qatgraph.reference import Array


def median_latencies(
    sessions: dict[str, Any], feed: dict[str, Array], *, rounds: int = 15, warmup: int = 2
) -> dict[str, float]:
    """Median milliseconds of each session, run in turn (A B C A B C …) so that drift hits all alike.

    A session has ``run(None, feed)``, as those of ONNX Runtime do.
    """
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for i in range(warmup + rounds):
        for name, one in sessions.items():
            start = time.perf_counter()
            one.run(None, feed)
            if i >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}
