"""Jobs: a TOML file that names model, data, target, recipe and training; and the folder that it writes."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from qatgraph.errors import JobError, nearest
from qatgraph.planning.user_files import UserModel, parse_toml, read_text

if TYPE_CHECKING:
    import torch

    from qatgraph.ir.graph import Batch

MANIFEST = "manifest.json"


@dataclass
class JobData:
    """What a data factory returns.

    ``labels`` (one tensor an evaluation batch) make the report show top-1; ``latency`` is the batch to time;
    ``facts`` go into the manifest (hash of the corpus, where it is from).
    """

    calibrate: Sequence[Batch]
    evaluate: Sequence[Batch]
    train: Sequence[Batch]
    latency: Batch
    labels: Sequence[torch.Tensor] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Dim(UserModel):
    """Bounds of a dynamic dimension."""

    min: int | None = None
    max: int | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min} is larger than max = {self.max}")
        return self


class Training(UserModel):
    """See ``qatgraph.training.loop.Schedule``."""

    steps: int = Field(default=300, ge=0)
    lr: float = Field(default=1e-5, ge=0, allow_inf_nan=False)
    warmup: int = Field(default=20, ge=0)
    clip: float = Field(default=1.0, gt=0)
    dropout: bool = False


class Job(UserModel):
    """``model`` and ``data`` are ``file.py:function``, relative to the job; both are called with ``seed=`` and their
    options. ``dynamic_shapes`` lists, for each input, the name of each axis (empty: fixed). ``threads`` are torch's
    (0: its default): a tiny model is faster with one, and sums in float depend on them. ``correct_biases`` does so
    after calibration, on its batches."""

    name: str = Field(pattern=r"^\w[\w.-]*$")  # it names files and a folder
    model: str
    data: str
    target: str = "ort-cpu"
    recipe: str = "int8"
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    threads: int = Field(default=0, ge=0)
    outputs: tuple[str, ...] = ()
    dynamic_shapes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    dims: dict[str, Dim] = Field(default_factory=dict)
    model_options: dict[str, Any] = Field(default_factory=dict)
    data_options: dict[str, Any] = Field(default_factory=dict)
    correct_biases: bool = False
    training: Training = Training()

    def shapes(self) -> dict[str, dict[int, Any]]:
        """``dynamic_shapes`` as ``capture`` takes them."""
        import torch

        def dim(name: str) -> Any:
            bounds = self.dims.get(name, Dim())
            return torch.export.Dim(name, min=bounds.min, max=bounds.max)

        return {i: {a: dim(n) for a, n in enumerate(axes) if n} for i, axes in self.dynamic_shapes.items()}


def load_job(path: Path) -> Job:
    """Read a job file.

    Raises:
        JobError: QG801 unreadable, QG802 not a valid job.
    """
    text = read_text(path, what="job", error=JobError, code="QG801")
    return parse_toml(
        Job, text, where=path.name, error=JobError, code="QG802", todo="compare with examples/jobs/digits.toml"
    )


def make(job_path: Path, spec: str, what: str, seed: int, options: dict[str, Any]) -> Any:
    """What the function that ``file.py:function`` names returns.

    Raises:
        JobError: QG803 no such function, or it does not take the options; QG804 something that it needs is missing.
    """
    function = factory(job_path, spec, what)
    try:
        inspect.signature(function).bind(seed=seed, **options)
    except TypeError as error:
        todo = f"compare seed and [{what}_options] with the arguments of the function"
        raise JobError(
            "QG803", f"the {what} factory '{spec}' cannot be called", where=job_path.name, why=str(error), todo=todo
        ) from error
    try:
        return function(seed=seed, **options)
    except ImportError as error:
        raise _does_not_import(spec, job_path, error) from error


def factory(job_path: Path, spec: str, what: str) -> Callable[..., Any]:
    """The function that ``file.py:function`` names.

    Raises:
        JobError: QG803 no such file or function, QG804 the file does not import.
    """
    file, _, name = spec.partition(":")
    path = job_path.parent / file
    if not path.is_file() or not name:
        raise JobError(
            "QG803",
            f"the {what} factory '{spec}' does not exist",
            where=job_path.name,
            why=f"there is no file '{path}'" if not path.is_file() else "the function name is missing",
            todo="write it as file.py:function; in a job, relative to the job file",
        )
    module_name = f"qatgraph_job_{path.stem}"
    module = sys.modules.get(module_name)
    if module is None or getattr(module, "__file__", None) != str(path):
        loader = importlib.util.spec_from_file_location(module_name, path)
        assert loader is not None
        assert loader.loader is not None
        module = importlib.util.module_from_spec(loader)
        sys.modules[module_name] = module
        try:
            loader.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise _does_not_import(file, job_path, error) from error
    found = getattr(module, name, None)
    if not callable(found):
        near = nearest(name, vars(module))
        todo = f"did you mean {near}?" if near else "check the name"
        raise JobError("QG803", f"'{file}' has no function '{name}'", where=job_path.name, todo=todo)
    function: Callable[..., Any] = found
    return function


def _does_not_import(what: str, job_path: Path, error: Exception) -> JobError:
    return JobError(
        "QG804",
        f"'{what}' does not import",
        where=job_path.name,
        why=f"{type(error).__name__}: {error}",
        todo="install what it needs; the example jobs need the extra: pip install 'qatgraph[examples]'",
    )


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` that takes its place when the block ends well; else ``path`` stays as it was.

    Raises:
        JobError: QG805 the folder cannot be written, or holds something else than an earlier run.
    """
    try:
        if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file()):
            raise _unwritable(path, "it holds something else than a run, which would be lost")
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.parent / f".{path.name}.{os.getpid()}"
        scratch.mkdir()
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error
    try:
        yield scratch
        _swap(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(scratch: Path, path: Path) -> None:
    old = scratch.with_name(scratch.name + ".old")
    try:
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(scratch, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error
    shutil.rmtree(old, ignore_errors=True)


def _unwritable(path: Path, why: str) -> JobError:
    return JobError(
        "QG805",
        f"cannot write the output folder '{path.name}'",
        where="--output",
        why=why,
        todo="choose a folder that you may write to: --output DIR",
    )


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
