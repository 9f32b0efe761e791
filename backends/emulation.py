"""Runs files on a CPU that this machine is not, by qemu in user mode (Debian package qemu-user), or in another
onnxruntime."""

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

from qatgraph.backends import fetched
from qatgraph.errors import LowerError, VerifyError
from qatgraph.reference import Array

EMULATOR = "qemu-x86_64"
ARM_EMULATOR = "qemu-aarch64"
# instruction set -> a CPU that has it and no more: x86 without VNNI, 64-bit Arm without and with dot products
X86_CPUS = {"avx2": "Haswell", "sse": "Nehalem"}
ARM_CPUS = {"arm64": "cortex-a72", "arm64-dot": "neoverse-n1"}
CPUS = X86_CPUS | ARM_CPUS
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
    """Whether x86 CPUs can be emulated."""
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
                f"the file does not run on {worker.place}",
                where=EMULATOR,
                why=error.why,
                todo="run it on such a machine, or look at the message",
            ) from error


class Worker:
    """A process that runs one file after another: under emulation it starts in seconds, then takes some 40 ms a file.

    ``cpu`` is one that qemu knows, or empty for the machine's own. ``engine`` is the package that runs the files, and
    ``program`` its part of the program; ``version`` that of onnxruntime, by default the installed one. ``config`` are
    session config entries with ``__`` for ``.``.

    Raises:
        VerifyError: QG608 the emulator is not installed, QG611 what runs in it cannot be fetched.
    """

    def __init__(
        self, cpu: str, version: str = "", *, engine: str = "onnxruntime", program: str = ORT, **config: str
    ) -> None:
        self.place = " with ".join([f"an emulated {cpu}" if cpu else "this CPU", *([version] if version else [])])
        self.python, environment = _python_on(cpu, version, engine)
        self.engine = engine
        settings = [f"{key.replace('__', '.')}={value}" for key, value in config.items()]
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in ``close``
        self.process = subprocess.Popen(
            [*self.python, "-c", HEAD + program + LOOP, *settings],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
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
            raise LowerError("QG508", f"{self.engine} fails when it runs the file", where=self.place, why=why)
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
            "QG609", f"the process on {self.place} died", where=f"exit status {code}",
            why=said[-1] if said else "it said nothing",
            todo=f"look whether the engine runs there: {' '.join(self.python)} -c 'import {self.engine}'",
        )  # fmt: skip


def _python_on(cpu: str, version: str, engine: str) -> tuple[list[str], dict[str, str]]:
    """The command that starts Python on a CPU, and the environment in which it finds numpy and the engine."""
    installed = import_module(engine)
    own = os.path.realpath(sys.executable)
    arm = cpu in ARM_CPUS.values()
    emulator = ARM_EMULATOR if arm else EMULATOR
    if cpu and not shutil.which(emulator):
        raise VerifyError(
            "QG608", f"an emulated {cpu} cannot be had: there is no '{emulator}'", where="PATH",
            why="it runs the code of another CPU on this one",
            todo="install the Debian package qemu-user, or use the machine's own instruction set",
        )  # fmt: skip
    if arm:
        packages, root = fetched.arm_onnxruntime(version or installed.__version__), str(fetched.arm_root())
        return [emulator, "-L", root, "-cpu", cpu, f"{root}/usr/bin/python3"], {"PYTHONPATH": str(packages)}
    folders = [fetched.onnxruntime(version)] if version else [Path(str(m.__file__)).parents[1] for m in (np, installed)]
    # numpy's BLAS asks the real CPU what it can do, and dies of an instruction that the emulated one does not have
    blas = {"OPENBLAS_CORETYPE": "Nehalem"} if cpu == "Nehalem" else {}
    return [*([emulator, "-cpu", cpu] if cpu else []), own], {"PYTHONPATH": os.pathsep.join(map(str, folders)), **blas}
