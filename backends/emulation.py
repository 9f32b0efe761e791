"""Runs a file on an x86 CPU that this machine is not: user-mode emulation by qemu (Debian package qemu-user)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from qatgraph.errors import VerifyError
from qatgraph.reference import Array

EMULATOR = "qemu-x86_64"
# runs inside the emulator, where only numpy and onnxruntime are needed
PROBE = """
import sys, numpy as np, onnxruntime as ort
folder = sys.argv[1]
options = ort.SessionOptions(); options.log_severity_level = 3
session = ort.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
np.savez(folder + "/out.npz", *session.run(None, dict(np.load(folder + "/in.npz"))))
"""


def available() -> bool:
    return shutil.which(EMULATOR) is not None


def run_on(cpu: str, model: bytes, feed: dict[str, Array]) -> list[Array]:
    """The outputs of a file on an emulated CPU, e.g. ``Haswell`` (AVX2 without VNNI), at default session options.

    Raises:
        VerifyError: QG605 the emulated run failed.
    """
    import onnxruntime

    packages = [str(Path(str(m.__file__)).parent.parent) for m in (np, onnxruntime)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.onnx").write_bytes(model)
        np.savez(Path(folder) / "in.npz", **feed)  # type: ignore[arg-type]
        command = [EMULATOR, "-cpu", cpu, os.path.realpath(sys.executable), "-c", PROBE, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise VerifyError(
                "QG605",
                f"the file does not run on an emulated {cpu}",
                where=EMULATOR,
                why=(done.stderr.strip().splitlines() or ["no message"])[-1],
                todo="run it on such a machine, or look at the message",
            )
        with np.load(Path(folder) / "out.npz") as found:
            return [found[name] for name in found.files]
