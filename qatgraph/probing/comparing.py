"""The same cases on two engines: which kernels, numbers and verdicts differ, row by row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qatgraph.errors import LowerError
from qatgraph.planning.target import Row, Target
from qatgraph.probing.cases import Case, Engine, Realized
from qatgraph.probing.draw import draw_case
from qatgraph.probing.report import EngineDiff, RowDiff
from qatgraph.probing.search import (
    FLOAT_KERNEL,
    SETTINGS,
    attempt,
    contradiction,
    judged,
    no_traces,
    rows_to_probe,
)
from qatgraph.progress import track


def compare(target: Target, one: Engine, two: Engine, *, rows: str, examples: int, progress: bool) -> EngineDiff:
    """Every row whose id fits the glob ``rows`` and that is the engine's, on cases that both engines do.

    Raises:
        TargetError: QG406 there is no small model of a row's operation, QG407 no row fits.
    """
    chosen = [r for r in rows_to_probe(target, rows) if r.placement != "host" and not contradiction(target, r)]
    with no_traces():
        found = tuple(_compare_row(target, r, one, two, examples) for r in track(chosen, "compare", show=progress))
    return EngineDiff(target.name, target.hash(), (one.title, two.title), examples, found)


@dataclass(frozen=True, eq=False)
class Pair:
    """What two engines made of one case."""

    case: Case
    found: tuple[Realized | LowerError, Realized | LowerError]

    @property
    def kernels(self) -> tuple[str, str]:
        """What ran; a refusal stands for no kernel."""
        one, two = (
            "refused" if isinstance(f, LowerError) else f"{f.kernel} in {'int8' if f.int8 else 'float'}"
            for f in self.found
        )
        return one, two

    @property
    def steps(self) -> int:
        """The largest difference of two integers."""
        return int(self._farthest()) if self._integers else 0

    @property
    def relative(self) -> float:
        """The largest difference of two floats, of the largest of them."""
        return 0.0 if self._integers else self._farthest()

    @property
    def differs(self) -> bool:
        """By more than two float libraries do."""
        return len(set(self.kernels)) > 1 or self.steps > 0 or self.relative > FLOAT_KERNEL

    @property
    def _integers(self) -> bool:
        return any(isinstance(f, Realized) and f.output.dtype.kind in "iu" for f in self.found)

    def _farthest(self) -> float:
        one, two = (f.output.astype(np.float64) if isinstance(f, Realized) else None for f in self.found)
        if one is None or two is None or one.shape != two.shape:
            return 0.0  # the kernels say so
        top = 1.0 if self._integers else float(np.abs(one).max(initial=0.0)) or 1.0
        return float(np.abs(one - two).max(initial=0.0)) / top


class Found(Exception):
    """A case on which two engines differ, for hypothesis to shrink."""

    def __init__(self, case: Case) -> None:
        self.case = case
        super().__init__(case.text())


def _compare_row(target: Target, row: Row, one: Engine, two: Engine, examples: int) -> RowDiff:
    pairs: list[Pair] = []

    def run(data: st.DataObject) -> Pair:
        case = draw_case(lambda strategy: data.draw(strategy), target, row, one)
        return Pair(case, (attempt(case, one), attempt(case, two)))

    @settings(SETTINGS, max_examples=examples)
    @given(st.data())
    def every_case(data: st.DataObject) -> None:
        pairs.append(run(data))

    @settings(SETTINGS, max_examples=examples)
    @given(st.data())
    def until_they_differ(data: st.DataObject) -> None:
        pair = run(data)
        if pair.differs:
            raise Found(pair.case)

    every_case()
    smallest = ""
    if any(p.differs for p in pairs):
        try:
            until_they_differ()
        except Found as found:
            smallest = found.case.text()
    broken = (any(judged(p.case, p.found[i]) for p in pairs) for i in (0, 1))
    first, second = (_verdict(row, engine, wrong) for engine, wrong in zip((one, two), broken, strict=True))
    changed = Counter(" -> ".join(p.kernels) for p in pairs if len(set(p.kernels)) > 1)
    return RowDiff(
        row=row.id,
        cases=len(pairs),
        verdicts=(first, second),
        kernels=dict(changed),
        values=sum(p.steps > 0 or p.relative > 0 for p in pairs),
        steps=max((p.steps for p in pairs), default=0),
        relative=max((p.relative for p in pairs), default=0.0),
        smallest=smallest,
    )


def _verdict(row: Row, engine: Engine, wrong: bool) -> str:
    if not wrong:
        return "holds"
    return "false" if row.claims(engine.version) else "unclaimed"
