"""Runs files on an x86 CPU that this machine is not: user-mode emulation by qemu (Debian package qemu-user)."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from qatgraph.errors import LowerError, VerifyError
from qatgraph.reference import Array

EMULATOR = "qemu-x86_64"
CPUS = {"avx2": "Haswell", "sse": "Nehalem"}  # instruction set without VNNI -> a CPU that has it and no more
# Runs inside the emulator, where only numpy and the engine are needed. A message is frames of 8 bytes of length and the
# content: file, feed (npz) and "y" for the optimized graph; back come an error, the graph and the outputs (npz). The
# engine's own part has a function ``answer`` that gives these three.
HEAD = """
import io, json, os, sys, tempfile
answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what a library prints is no answer
import numpy as np
def frame():
    return sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(8), "little"))
"""
ORT = """
import onnxruntime as ort
def answer(model, feed, graph):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for entry in sys.argv[1:]:
        options.add_session_config_entry(*entry.split("="))
    if graph:
        options.optimized_model_filepath = folder + "/optimized.onnx"
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    outputs = io.BytesIO()
    np.savez(outputs, *session.run(None, dict(np.load(io.BytesIO(feed)))))
    return b"", open(folder + "/optimized.onnx", "rb").read() if graph else b"", outputs.getvalue()
"""
LOOP = """
with tempfile.TemporaryDirectory() as folder:
    while model := frame():
        try:
            found = answer(model, frame(), frame())
        except Exception as error:
            found = str(error).encode(), b"", b""
        for content in found:
            answers.write(len(content).to_bytes(8, "little") + content)
        answers.flush()
"""


def available() -> bool:
    return shutil.which(EMULATOR) is not None


def run_on(cpu: str, model: bytes, feed: dict[str, Array], **config: str) -> list[Array]:
    """The outputs of a file on an emulated CPU, e.g. ``Haswell`` (AVX2 without VNNI), at default session options;
    ``config`` are session config entries with ``__`` for ``.``.

    Raises:
        VerifyError: QG605 the emulated run failed.
    """
    return run_once(Worker(cpu, **config), model, feed)


def run_once(worker: Worker, model: bytes, feed: dict[str, Array]) -> list[Array]:
    """The outputs of a file, by a worker that then ends.

    Raises:
        VerifyError: QG605 the emulated run failed.
    """
    with worker:
        try:
            return worker.run(model, feed, graph=False)[1]
        except LowerError as error:
            raise VerifyError(
                "QG605",
                f"the file does not run on an emulated {worker.cpu}",
                where=EMULATOR,
                why=error.why,
                todo="run it on such a machine, or look at the message",
            ) from error


class Worker:
    """A process under emulation that runs one file after another: it starts in seconds, then takes some 40 ms a file.

    ``engine`` is the package that runs it, and ``program`` its part of the program; ``config`` are session config
    entries with ``__`` for ``.``.

    Raises:
        VerifyError: QG608 the emulator is not installed.
    """

    def __init__(self, cpu: str, *, engine: str = "onnxruntime", program: str = ORT, **config: str) -> None:
        if not available():
            raise VerifyError(
                "QG608", f"an emulated {cpu} cannot be had: there is no '{EMULATOR}'", where="PATH",
                why="it runs the code of another CPU on this one",
                todo="install the Debian package qemu-user, or use the machine's own instruction set",
            )  # fmt: skip
        packages = [str(Path(str(import_module(m).__file__)).parent.parent) for m in ("numpy", engine)]
        # numpy's BLAS asks the real CPU what it can do, and dies of an instruction that the emulated one does not have
        blas = {"OPENBLAS_CORETYPE": "Nehalem"} if cpu == "Nehalem" else {}
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), "OMP_NUM_THREADS": "1", **blas}
        command = [EMULATOR, "-cpu", cpu, os.path.realpath(sys.executable), "-c", HEAD + program + LOOP]
        command += [f"{key.replace('__', '.')}={value}" for key, value in config.items()]
        self.cpu, self.engine = cpu, engine
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in ``close``
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def run(self, model: bytes, feed: dict[str, Array], *, graph: bool = True) -> tuple[bytes, list[Array]]:
        """The graph that the engine runs, as a file (empty unless ``graph``), and its outputs.

        Raises:
            LowerError: QG508 the engine refuses the file or fails when it runs it.
            VerifyError: QG609 the process died.
        """
        packed = io.BytesIO()
        np.savez(packed, **feed)  # type: ignore[arg-type]
        error, optimized, outputs = self._ask(model, packed.getvalue(), b"y" if graph else b"")
        if error:
            why = error.decode(errors="replace").splitlines()[0]
            raise LowerError(
                "QG508", f"{self.engine} fails when it runs the file", where=f"emulated {self.cpu}", why=why
            )
        with np.load(io.BytesIO(outputs)) as found:
            return optimized, [found[name] for name in found.files]

    def _ask(self, *question: bytes) -> list[bytes]:
        assert self.process.stdin is not None
        try:
            for content in question:
                self.process.stdin.write(len(content).to_bytes(8, "little") + content)
            self.process.stdin.flush()
            return [self._frame() for _ in range(3)]
        except (BrokenPipeError, EOFError) as error:
            raise self._died() from error

    def _frame(self) -> bytes:
        assert self.process.stdout is not None
        head = self.process.stdout.read(8)
        content = self.process.stdout.read(int.from_bytes(head, "little"))
        if len(head) < 8 or len(content) < int.from_bytes(head, "little"):
            raise EOFError
        return content

    def _died(self) -> VerifyError:
        code = self.process.wait()
        self.log.seek(0)
        said = [line for line in self.log.read().decode(errors="replace").splitlines() if "warning" not in line]
        return VerifyError(
            "QG609", f"the process on the emulated {self.cpu} died", where=f"{EMULATOR}, exit status {code}",
            why=said[-1] if said else "it said nothing",
            todo=f"look whether the engine runs there: {EMULATOR} -cpu {self.cpu} python -c 'import {self.engine}'",
        )  # fmt: skip
