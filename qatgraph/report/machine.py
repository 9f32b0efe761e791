"""What a number was measured on."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from qatgraph.errors import VerifyError

PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "onnxscript", "onnx-ir", "numpy", "transformers")


def isa() -> str:
    """The widest integer instruction set of this CPU that decides int8 kernels, e.g. ``AVX512-VNNI``."""
    flags = _cpu_flags()
    for flag, name in (
        ("amx_int8", "AMX"),
        ("avx512_vnni", "AVX512-VNNI"),
        ("avx_vnni", "AVX-VNNI"),
        ("avx512f", "AVX512 without VNNI"),
        ("avx2", "AVX2 without VNNI"),
    ):
        if flag in flags:
            return name
    return platform.machine()


def has_vnni() -> bool:
    return isa() in ("AMX", "AVX512-VNNI", "AVX-VNNI")


def check_cpu(requires: str, where: str) -> None:
    """Refuse a CPU on which a file of a target that ``requires`` something would be quietly wrong.

    Raises:
        VerifyError: QG610 this CPU has no VNNI.
    """
    if requires != "vnni" or has_vnni():
        return
    raise VerifyError(
        "QG610",
        f"this CPU has no VNNI ({isa()}), and the file needs it",
        where=where,
        why="its weights use their full range: on x86 without VNNI sums of two products saturate at 16 bits, unseen",
        todo="lower for the target ort-cpu, which is exact on every CPU, or run the file with the session option "
        "session.x64quantprecision = 1, which is slower",
    )


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    return set(next((line.split(":")[1] for line in text.splitlines() if line.startswith("flags")), "").split())


def versions() -> dict[str, str]:
    from qatgraph.version import __version__

    found = {"python": platform.python_version(), "qatgraph": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
