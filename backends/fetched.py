"""What other engines are made of, fetched once into the user's cache: any onnxruntime, and a root of 64-bit Arm."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qatgraph.errors import VerifyError

# Debian resolves what these need: a Python that can import numpy and onnxruntime.
DEBIAN_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
# apt with a state of its own, so that it neither asks nor changes the packages of this machine
APT_CONFIG = """APT::Architecture "arm64"; APT::Architectures {{"arm64";}}; APT::Sandbox::User "root";
Acquire::Languages "none"; Dir::State "{0}/state"; Dir::State::status "{0}/status"; Dir::Cache "{0}/cache";
"""
# onnxruntime asks the system for its cores, and dies if it hears of an x86 or of more than it is told of here
ONE_ARM_CORE = {
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    "CPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n",
    "sys/devices/system/cpu/possible": "0\n",
    "sys/devices/system/cpu/present": "0\n",
}
ARM_WHEELS = ("manylinux_2_28_aarch64", "manylinux2014_aarch64")


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/qatgraph``, or ``~/.cache/qatgraph``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "qatgraph"


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the cache; ``make`` fills it beside its place, so that it is there whole or not at all."""
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    print(f"fetching {name} into {folder.parent}, once", file=sys.stderr, flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as beside:
            made = Path(beside) / name
            made.mkdir()
            make(made)
            if not folder.is_dir():  # else another process was faster
                made.rename(folder)
    except OSError as error:
        todo = "free space there, or name another folder in XDG_CACHE_HOME"
        raise VerifyError(
            "QG611", f"cannot make {name}", where=str(folder.parent), why=str(error), todo=todo
        ) from error
    return folder


def onnxruntime(version: str) -> Path:
    """A folder with onnxruntime in a version, and numpy, for this Python.

    Raises:
        VerifyError: QG611 it cannot be fetched.
    """
    return _onnxruntime(version, sys.implementation.cache_tag, platform.machine(), ())


def arm_onnxruntime(version: str) -> Path:
    """The same for the Python of ``arm_root``."""
    python = (arm_root() / "usr/bin/python3").readlink().name.removeprefix("python")
    options = ["--python-version", python, *(f"--platform={p}" for p in ARM_WHEELS)]
    return _onnxruntime(version, f"cpython-{python.replace('.', '')}", "aarch64", options)


def _onnxruntime(version: str, python: str, machine: str, options: Sequence[str]) -> Path:
    if not re.fullmatch(r"\d+(\.[0-9a-z]+)*", version):
        todo = "name one as PyPI does, e.g. 1.31.1"
        raise _missing(f"onnxruntime '{version}'", "version", "that is no version", todo)
    return cached(f"onnxruntime-{version}-{python}-{machine}", lambda folder: _install(folder, version, options))


def _install(folder: Path, version: str, options: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--target", str(folder), *options, f"onnxruntime=={version}", "numpy"]
    told = _run(command)
    if told is not None:
        todo = "see whether the package index can be reached and has it for this Python: pip index versions onnxruntime"
        raise _missing(f"onnxruntime {version}", "pip", told, todo)


def arm_root() -> Path:
    """The root of a small 64-bit Arm system with a Python, of Debian's packages.

    Raises:
        VerifyError: QG611 it cannot be fetched.
    """
    return cached("debian-arm64", _debian)


def _debian(root: Path) -> None:
    missing = next((tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)), "")
    if missing:
        todo = "use a machine with Debian's package tools, or leave arm64 out"
        raise _missing("Debian's packages for arm64", missing, f"there is no '{missing}' in PATH", todo)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for inner in ("state/lists/partial", "cache/archives/partial"):
            (work / inner).mkdir(parents=True)
        (work / "status").touch()
        (work / "apt.conf").write_text(APT_CONFIG.format(work), encoding="utf-8")
        environment = {**os.environ, "APT_CONFIG": str(work / "apt.conf"), "LC_ALL": "C"}
        download = ["apt-get", "--quiet", "--yes", "--no-install-recommends", "--download-only", "install"]
        # a source that is not for arm64 may fail; what is missing in the end, the second command says
        update = ["apt-get", "--quiet", "--option", "APT::Update::Error-Mode=any", "update"]
        first, second = (_run(c, environment) for c in (update, [*download, *DEBIAN_PACKAGES]))
        if second is not None:
            todo = "see whether the package sources of this machine can be reached, and have arm64: apt-get update"
            raise _missing("Debian's packages for arm64", "apt-get", first or second, todo)
        for package in sorted((work / "cache/archives").glob("*.deb")):
            told = _run(["dpkg-deb", "--extract", str(package), str(root)])
            if told is not None:
                raise _missing(f"Debian's package {package.name}", "dpkg-deb", told, "try again")
    for name, text in ONE_ARM_CORE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str | None:
    """What a command said of why it failed; None if it did not."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith(("E:", "ERROR:"))]
    return (errors or said or [f"exit status {done.returncode}"])[0]


def _missing(what: str, where: str, why: str, todo: str) -> VerifyError:
    return VerifyError("QG611", f"{what} cannot be had", where=where, why=why, todo=todo)
