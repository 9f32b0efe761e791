"""Where a command finds its model: a job file, ``file.py:function``, or a saved program (``.pt2``)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from qatgraph import api
from qatgraph.errors import JobError, QatgraphError
from qatgraph.ir.graph import Graph
from qatgraph.job import factory, load_job
from qatgraph.rewriting.evidence import Evidence
from qatgraph.runner import make_plan, set_up, threads


def load(source: str) -> tuple[Graph, Evidence | None]:
    """Capture what ``source`` names; a job also brings calibration data for passes.

    ``JOB.toml`` is the job's model; ``FILE.py:FUNCTION`` a function that returns ``(model, batch)`` or
    ``(model, batch, dynamic_shapes)``; ``FILE.pt2`` what ``torch.export.save`` wrote.

    Raises:
        JobError: QG803, QG804 the function cannot be had, QG809 the source is none of the three, or gives no model.
        CaptureError: the model cannot be captured.
    """
    if source.endswith(".toml"):
        path = Path(source)
        job = load_job(path)
        with threads(job.threads):
            setup = set_up(job, path, job.seeds[0])
        return setup.graph, Evidence(setup.data.calibrate, lambda graph: make_plan(job, path, graph))
    if source.endswith(".pt2"):
        return api.capture(_program(Path(source))), None
    if ".py:" in source:
        file, _, name = source.rpartition(":")
        return api.capture(*_made(source, factory(Path(file), f"{Path(file).name}:{name}", "model"))), None
    raise _refused(source, "it is neither a job (.toml), a program (.pt2) nor file.py:function")


def _made(source: str, function: Callable[..., Any]) -> tuple[Any, ...]:
    try:
        found = function()
    except QatgraphError:
        raise
    except Exception as error:
        raise _refused(source, _sentence(error)) from error
    if not isinstance(found, tuple) or len(found) not in (2, 3) or not isinstance(found[0], torch.nn.Module):
        raise _refused(source, f"the function returns a {type(found).__name__}, not (model, batch)")
    return found


def _program(path: Path) -> ExportedProgram:
    if not path.is_file():
        raise _refused(str(path), "there is no such file")
    log = logging.getLogger("torch.export")  # tells a refusal a second time, with a traceback
    was, log.disabled = log.disabled, True
    try:
        return torch.export.load(path)
    except Exception as error:
        raise _refused(str(path), _sentence(error)) from error
    finally:
        log.disabled = was


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _refused(source: str, why: str) -> JobError:
    todo = "name a job file, a .pt2 file, or file.py:function returning (model, batch)"
    return JobError("QG809", f"'{source}' is no model", where="MODEL", why=why, todo=todo)
