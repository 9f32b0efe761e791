"""Why are the QDQ files of other tools slow or inaccurate on ONNX Runtime? Each is made, audited, repaired and timed.

Each script of ``benchmarks/peers`` runs in an environment of that peer alone, which is made of the packages that its
head names, on the material of the jobs ``efficientnet_lite0`` and ``minilm`` (``peers/material.py``). The linter then
explains the file and repairs what it can prove. The float model, the file and the repaired file run in turn, one
thread, default session options (on a CPU without VNNI ``session.x64quantprecision=1``, or the sums of the peers' files
saturate). Everything lies in ``build/peers``; what is there already is not made again. ``docs/peers.md`` is written
anew. Fails if a product runs in float and no finding says why.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peers_page
import torch
from peers.material import batches

from qatgraph import fidelity
from qatgraph.backends import lint, lint_fix, onnx_file, ort_cpu
from qatgraph.backends.lint import Lint
from qatgraph.backends.lint_proof import Proof
from qatgraph.errors import LowerError
from qatgraph.job import load_job
from qatgraph.latency import export_float
from qatgraph.proof import feed_of
from qatgraph.report.machine import has_vnni, isa, versions
from qatgraph.runner import set_up

ROOT = Path(__file__).parents[1]
BUILD, SCRIPTS = ROOT / "build" / "peers", ROOT / "benchmarks" / "peers"
MODELS = ("efficientnet_lite0", "minilm")
EXACT = {} if has_vnni() else {"session__x64quantprecision": "1"}
SECONDS = 900  # for one script


@dataclass(frozen=True)
class Peer:
    """One script: its packages, the models that it can take, and what it says that it does."""

    name: str
    packages: tuple[str, ...]
    models: tuple[str, ...]
    about: str


def read(script: Path) -> Peer:
    """The peer of a script, from the head that Python's inline script metadata defines, and its docstring."""
    lines = script.read_text(encoding="utf-8").splitlines()
    end = lines.index("# ///", 1)
    head = tomllib.loads("\n".join(line.removeprefix("#").strip() for line in lines[1:end]))
    text = "\n".join(lines[end + 1 :]).split('"""')[1]
    about = " ".join(text.split("\n\n")[0].split())
    return Peer(script.stem, tuple(head["dependencies"]), tuple(head.get("models", MODELS)), about)


def every_peer() -> list[Peer]:
    return [read(p) for p in sorted(SCRIPTS.glob("*.py")) if p.name != "material.py"]


def write_material(name: str) -> Path:
    """The folder of a model: the float file, and the batches of its job."""
    folder, path = BUILD / name, ROOT / "examples" / "jobs" / f"{name}.toml"
    if (folder / "latency.npz").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    setup = set_up(load_job(path), path, 0)
    export_float(setup.model, setup.graph, folder / "float.onnx")
    parts = {"calibrate": setup.data.calibrate, "evaluate": setup.data.evaluate, "latency": [setup.data.latency]}
    for part, some in parts.items():
        feeds = [feed_of(setup.graph, batch) for batch in some]
        np.savez(folder / f"{part}.npz", **{f"{i:03}/{k}": v for i, feed in enumerate(feeds) for k, v in feed.items()})
    return folder


def environment(peer: Peer) -> Path:
    """The Python of the peer; its packages are installed if they are not, or are others now."""
    folder = BUILD / "venv" / peer.name
    python, stamp = folder / "bin" / "python", folder / "packages.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8").split() != list(peer.packages):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        alone = [p for p in peer.packages if p.startswith("efficientnet")]  # would pull torchvision in
        others = [p for p in peer.packages if p not in alone]
        pin = BUILD / "constraints.txt"
        pin.write_text("torch==2.13.0\n", encoding="utf-8")
        for arguments in ([*others, "-c", str(pin)], ["--no-deps", *alone] if alone else []):
            if arguments:
                _call([str(python), "-m", "pip", "install", "--quiet", *arguments], folder)
        stamp.write_text("\n".join(peer.packages) + "\n", encoding="utf-8")
    return python


def make(peer: Peer, folder: Path) -> tuple[Path, str]:
    """The peer's file, and why there is none (empty if there is one)."""
    file, failed = folder / f"{peer.name}.onnx", folder / f"{peer.name}.failed.txt"
    if not file.is_file() and not failed.is_file():
        own = folder / peer.name  # some tools write into the file that they read
        own.mkdir(exist_ok=True)
        for part in ("float.onnx", "calibrate.npz"):
            shutil.copy(folder / part, own)
        try:
            _call([str(environment(peer)), str(SCRIPTS / f"{peer.name}.py"), str(own), str(file)], own)
        except RuntimeError as error:
            file.unlink(missing_ok=True)
            failed.write_text(f"{error}\n", encoding="utf-8")
    return file, "" if file.is_file() else failed.read_text(encoding="utf-8").strip()


def _call(command: list[str], folder: Path) -> None:
    """Run a command in a folder, where some tools leave files behind.

    Raises:
        RuntimeError: it fails or takes too long; its last line of error.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"it took more than {SECONDS} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(" ")]
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")


def explain(file: Path) -> dict[str, Any]:
    """What the linter finds, and what the repair makes of it."""
    model = onnx_file.load(file)
    found = lint.lint(model)
    record: dict[str, Any] = {"bytes": file.stat().st_size, **_counts(found), "groups": _groups(found), "fix": None}
    record["unexplained"] = found.unexplained
    repaired(file).unlink(missing_ok=True)
    try:
        if any(f.fix for f in found.findings):
            fixed = lint_fix.fix(model, found, repaired(file))
            record["fix"] = {"mended": fixed.mended, "left": len(fixed.after.findings), **_counts(fixed.after)}
            record["fix"] |= _proof(fixed.proof)
    except LowerError as error:
        record["fix_refused"] = f"{error.code}: {error.what}"
    return record


def repaired(file: Path) -> Path:
    return file.with_suffix(".fixed.onnx")


def _proof(proof: Proof) -> dict[str, Any]:
    return {k: v for k, v in asdict(proof).items() if k in ("outputs", "regions", "refused")}


def _counts(found: Lint) -> dict[str, Any]:
    runs = [p.runs for p in found.products]
    return {"products": {kind: runs.count(kind) for kind in ("int8", "float", "bare")}, "counts": found.counts}


def _groups(found: Lint) -> list[dict[str, Any]]:
    """The findings by rule, in the order of the audit."""
    groups = []
    for rule in dict.fromkeys(f.rule for f in found.findings):
        hits = [f for f in found.findings if f.rule == rule]
        first = hits[0]
        work = found.work(rule) if first.severity == "slow" else 0.0
        groups.append({
            "rule": rule, "severity": first.severity, "hits": len(hits), "work": work, "fix": sum(f.fix for f in hits),
            "example": f"{first.node}: {first.what}", "why": first.why, "remedy": first.remedy,
        })  # fmt: skip
    return groups


def measure(folder: Path, files: dict[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds on the batch for latency, and the mean cosine to float on those for evaluation, by name."""
    sessions, feed = {}, batches(folder / "latency.npz")[0]
    for name, file in files.items():
        try:
            sessions[name] = ort_cpu.session(str(file), threads=1, **EXACT)
        except LowerError as error:
            print(f"  {name}: {error.why}")
    times = ort_cpu.median_latencies(sessions, feed, rounds=rounds)
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in sessions}
    for batch in batches(folder / "evaluate.npz"):
        for name, session in sessions.items():
            outputs[name].append(torch.from_numpy(ort_cpu.run(session, batch)[0]))
    return {
        name: {"ms": times[name], "cosine": fidelity.cosine(outputs[name], outputs["float"])["cosine_mean"]}
        for name in sessions
    }


def main() -> None:
    records: list[dict[str, Any]] = []
    for model in MODELS:
        folder = write_material(model)
        for peer in every_peer():
            if model not in peer.models:
                continue
            print(f"{model}: {peer.name}", flush=True)
            file, error = make(peer, folder)
            record = {"model": model, **asdict(peer), "error": error}
            if not error:
                record |= explain(file)
                files = {"float": folder / "float.onnx", "file": file, "fixed": repaired(file)}
                record["measured"] = measure(folder, {k: f for k, f in files.items() if f.is_file()}, rounds=15)
            records.append(record)
    result = {"isa": isa(), "versions": versions(), "options": EXACT, "records": records}
    (BUILD / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / "peers.md").write_text(peers_page.page(result), encoding="utf-8")
    silent = [f"{r['model']} {r['name']}: {', '.join(r['unexplained'])}" for r in records if r.get("unexplained")]
    if silent:
        raise SystemExit("run in float, and no finding says why: " + "; ".join(silent))


if __name__ == "__main__":
    main()
