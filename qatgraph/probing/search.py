"""Runs rows on an engine, and looks for the smallest case that it does not honour."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.errors import Flaky

from qatgraph.errors import LowerError, TargetError
from qatgraph.ops import keeps_grid
from qatgraph.planning.target import Row, Target
from qatgraph.probing.cases import GONE, Case, Engine, Realized
from qatgraph.probing.draw import BORDER, draw_case, hosts, operation_of
from qatgraph.probing.operation import Expected, Operation, numbers, real
from qatgraph.probing.products import FLOAT_STEP
from qatgraph.probing.readers import HIGHEST, behind
from qatgraph.probing.report import ProbeReport, RowResult
from qatgraph.progress import track
from qatgraph.reference import Array

SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    verbosity=Verbosity.quiet,
    report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
FLOAT_KERNEL = 3e-5  # how far a float kernel may be from float64, of its largest numbers


class NotHonoured(Exception):
    """A case that the engine does not do as the row says."""

    def __init__(self, case: Case, why: str) -> None:
        self.case, self.why = case, why
        super().__init__(why)


def probe(target: Target, engine: Engine, *, rows: str, examples: int, progress: bool) -> ProbeReport:
    """Every row whose id fits the glob ``rows``, each with so many cases; the same ones each time.

    Raises:
        TargetError: QG406 there is no small model of a row's operation, QG407 no row fits.
    """
    chosen = rows_to_probe(target, rows)
    with no_traces():
        found = tuple(probe_row(target, row, engine, examples) for row in track(chosen, "probe", show=progress))
    return ProbeReport(target.name, target.hash(), engine.title, examples, found)


def rows_to_probe(target: Target, rows: str) -> list[Row]:
    """The rows whose id fits a glob.

    Raises:
        TargetError: QG406 there is no small model of a row's operation, QG407 no row fits.
    """
    chosen = [r for r in target.row if fnmatchcase(r.id, rows)]
    if not chosen:
        known = ", ".join(r.id for r in target.row)
        todo = f"see `qatgraph targets {target.name}`"
        raise TargetError("QG407", f"no row fits '{rows}'", where=target.name, why=f"its rows are {known}", todo=todo)
    alone = (r for r in chosen if r.placement != "host" and r.needs not in ("inside", "before"))
    for kind in (k for r in alone for k in r.op.split("|") if k != BORDER):
        operation_of(kind)
    return chosen


@contextmanager
def no_traces() -> Iterator[None]:
    """Hypothesis keeps a cache where it is run, which is nobody's wish here."""
    with tempfile.TemporaryDirectory() as folder:
        set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            set_hypothesis_home_dir(None)


def probe_row(target: Target, row: Row, engine: Engine, examples: int) -> RowResult:
    """One row of a target; hypothesis shrinks the first case that fails."""
    cases, broken = 0, contradiction(target, row)
    if row.placement == "host" or broken:
        return RowResult(row.id, row.kernel, 0, "false" if broken else "host", broken)
    if not row.claims(engine.version):
        return RowResult(row.id, row.kernel, 0, "unclaimed")

    @settings(SETTINGS, max_examples=examples)
    @given(st.data())
    def every_case(data: st.DataObject) -> None:
        nonlocal cases
        case = draw_case(lambda strategy: data.draw(strategy), target, row, engine)
        cases += 1
        why = refutation(case, engine)
        if why:
            raise NotHonoured(case, why)

    try:
        every_case()
    except NotHonoured as found:
        return RowResult(row.id, row.kernel, cases, "false", found.why, found.case.text())
    except Flaky:
        why = "the engine does one and the same case now right, now wrong"
        return RowResult(row.id, row.kernel, cases, "false", why)
    return RowResult(row.id, row.kernel, cases, "holds")


def contradiction(target: Target, row: Row) -> str:
    """Why no case of the row can be drawn: it contradicts itself, or its table; empty if one can."""
    if row.needs in ("inside", "before"):
        homeless = [k for k in row.op.split("|") if not hosts(target, k)]
        return f"no row has '{homeless[0]}' in fuses_after or fuses_before" if homeless else ""
    if row.requant in ("", "float-result") or row.out or row.placement == "host":
        return ""
    return f"it writes integers ({row.requant}), and has no grid 'out'"


def refutation(case: Case, engine: Engine) -> str:
    """Why a case speaks against its row, as a sentence; empty if it does not."""
    return judged(case, attempt(case, engine))


def attempt(case: Case, engine: Engine) -> Realized | LowerError:
    """What the engine makes of a case, or why it refuses it."""
    try:
        return engine.realize(case)
    except LowerError as error:
        return error


def judged(case: Case, found: Realized | LowerError) -> str:
    """Why what was found speaks against the row of the case, as a sentence; empty if it does not."""
    if isinstance(found, LowerError):
        refused = f"the engine refuses it: {found.why}"
        return "" if case.quantized and case.row.placement != "int8" else refused
    if case.row.placement != "int8" and case.quantized:  # the row says: no int8 kernel, or none that is right
        usable = found.int8 and not _misfit(found.output, right(case, slack=2))
        return f"{found.kernel} runs it in int8, and right" if usable else ""
    gone = found.kernel == GONE and keeps_grid(
        case.op
    )  # as ``compare_kernels`` has it: it may become a part of another
    return ("" if gone else _wrong_kernel(case.row, found)) or _misfit(found.output, right(case))


def _wrong_kernel(row: Row, found: Realized) -> str:
    int8 = row.placement == "int8"
    runs = f"{found.kernel} runs in {'int8' if found.int8 else 'float'}"
    if row.kernel and found.kernel not in row.kernel.split("|"):
        return f"{runs}, not {row.kernel.replace('|', ' or ')}"
    return "" if found.int8 == int8 else f"{runs}, not in {'int8' if int8 else 'float'}"


def right(case: Case, slack: int = 0) -> Expected:
    """What may leave the case; integers may be off by ``slack`` steps more."""
    found = behind(case, expected(case, operation_of(case.op)))
    return found if found.low.dtype.kind == "f" else Expected(found.low - slack, found.high + slack)


def expected(case: Case, operation: Operation) -> Expected:
    """The result of the operation itself, as its row says it is computed."""
    if case.row.placement == "int8":
        found = _as_row_says(case, operation)
        return found if case.out is None else _inside(case, found)
    value = real(case, operation)
    slack = FLOAT_KERNEL * (_largest(case) + float(np.abs(value).max(initial=0.0)) + 0.1)
    found = Expected.around(value, slack + operation.slack(case, numbers(case)))
    return found if case.out is None else found.rounded(case.out)


def _largest(case: Case) -> float:
    """The size of terms that may cancel each other in a sum."""
    tops = [float(np.abs(o.real).max(initial=0.0)) for o in case.inputs.values()]
    return max(tops, default=0.0) * (1.0 if case.weight is None else float(np.abs(case.weight.real).max(initial=0.0)))


def _as_row_says(case: Case, operation: Operation) -> Expected:
    way, weight = case.row.requant, case.weight
    if way in operation.exact and (weight is None or weight.grid.axis in (None, 0)):
        return operation.exact[way](case)
    if way == "moved":
        return Expected.around(operation.apply(case, {role: o.q.astype(np.int32) for role, o in case.inputs.items()}))
    value = real(case, operation)
    found = Expected.around(value, FLOAT_STEP * np.abs(value))
    return found if way == "float-result" or case.out is None else found.rounded(case.out)


def _inside(case: Case, found: Expected) -> Expected:
    """Integers as the kernel writes them: between the ends of the activation that it takes in, within the deviation."""
    assert case.out is not None
    low, high = (np.asarray(v).astype(np.int64) for v in (found.low, found.high))
    if case.activation:
        lowest, highest = np.array([0.0]), np.array([HIGHEST[case.activation]])
        ends = Expected(lowest, highest).rounded(case.out)
        low, high = (np.clip(v, ends.low, ends.high) for v in (low, high))
    return Expected(low - case.row.deviation, high + case.row.deviation)


def _misfit(output: Array, right: Expected) -> str:
    """The first element that is wrong; empty if none is."""
    low, high = right.low, right.high
    if output.shape != low.shape:
        return f"the result has the shape {list(output.shape)}, not {list(low.shape)}"
    wrong = ~((output >= low) & (output <= high))
    if not wrong.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    want = f"{low[at]:.9g}" if low[at] == high[at] else f"{low[at]:.9g} to {high[at]:.9g}"
    return f"element {list(at)} is {output[at]:.9g}, not {want} ({int(wrong.sum())} of {wrong.size} are wrong)"
