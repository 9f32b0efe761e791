"""What the rows of a target are run on: the engine of its backend, or a user's function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from qatgraph.errors import LowerError, TargetError
from qatgraph.planning.target import Target
from qatgraph.probing.cases import Case, Engine, Realized

Simulator = Callable[[Case], Realized]


@contextmanager
def open_engine(target: Target, isa: str, version: str = "", simulator: Simulator | None = None) -> Iterator[Engine]:
    """The engine of a target on an instruction set and in a version (empty: the installed one), ready to run;
    ``simulator`` stands in its place.

    Raises:
        TargetError: QG410 the target has no engine, QG409 its engine does not know the instruction set.
        VerifyError: QG608, QG611 what it needs is not installed and cannot be fetched.
    """
    if simulator is not None:
        yield Engine(getattr(simulator, "__name__", "a simulator"), _guarded(simulator))
        return
    backend = import_module(f"qatgraph.backends.{target.backend}") if target.backend else None
    if not hasattr(backend, "engine"):
        raise TargetError(
            "QG410",
            f"there is no engine to run the rows of '{target.name}' on",
            where=target.name,
            why=f"its backend '{target.backend}' has no function engine" if backend else "its table names no backend",
            todo="give a simulator: --engine file.py:function, which returns qatgraph.Realized for a case",
        )
    with backend.engine(target, isa, version) as engine:  # type: ignore[union-attr]
        yield engine


def _guarded(simulator: Simulator) -> Simulator:
    """A simulator whose failures speak against the row, as those of an engine do.

    Raises:
        LowerError: QG508 it raises.
        TargetError: QG411 it returns something else than ``Realized``.
    """

    def realize(case: Case) -> Realized:
        try:
            found = simulator(case)
        except Exception as error:
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise LowerError("QG508", "the simulator fails", where=simulator.__name__, why=why) from error
        if not isinstance(found, Realized):
            what = f"the simulator gives a {type(found).__name__}"
            todo = "return qatgraph.Realized(kernel, int8, output)"
            raise TargetError("QG411", what, where=f"the row '{case.row.id}'", todo=todo)
        return found

    return realize
