"""What cannot be captured, as an error with the user's source line and what to do."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from pathlib import Path

import torch
from torch import fx

from qatgraph.errors import CaptureError


def check_weights(tensors: dict[str, torch.Tensor], root: str) -> None:
    """Refuse NaN anywhere, and infinity in a parameter (a mask may hold -inf)."""
    bad = [n for n, t in tensors.items() if isinstance(t, torch.nn.Parameter) and not bool(torch.isfinite(t).all())]
    bad += [n for n, t in tensors.items() if isinstance(t, torch.Tensor) and bool(torch.isnan(t).any())]
    if bad:
        raise CaptureError(
            "QG103",
            "a weight contains NaN or infinity",
            where=f"'{bad[0]}' of {root}",
            why="no scale can be computed for it",
            todo="load the checkpoint again, or find the training step that produced it",
        )


def explain(error: Exception, model: torch.nn.Module) -> CaptureError:
    text = str(error)
    line = _user_line(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if "data-dependent" in text.lower() or "DataDependent" in type(error).__name__:
        return CaptureError(
            "QG101",
            "the model branches on the values of a tensor",
            where=line,
            why=f"one graph cannot hold both branches ({first})",
            todo="replace the branch by torch.where, or hoist it out of forward()",
        )
    if "suggested fixes" in text.lower() or "constraints violated" in text.lower():
        fixes = text.lower().find("suggested fixes")
        hint = " ".join(text[fixes:].split())[:300] if fixes >= 0 else "make the dimension static"
        return CaptureError(
            "QG104",
            "a dynamic dimension does not hold for this model",
            where=line,
            why=" ".join(first.split()),
            todo=hint,
        )
    return CaptureError(
        "QG102",
        f"torch.export cannot capture {type(model).__name__}",
        where=line,
        why=f"{type(error).__name__}: {first}",
        todo="run torch.export.export(model, inputs) alone, and rewrite the line that it names",
    )


def _user_line(error: BaseException) -> str:
    """The innermost line of the traceback that is neither ours, nor torch's, nor of the standard library."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    standard, installed = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        library = frame.filename.startswith(standard) and not frame.filename.startswith(installed)
        if not library and not frame.filename.startswith(ours) and Path(frame.filename).exists():
            code = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f"{Path(frame.filename).name}:{frame.lineno}: {code}"
    return "the call of capture"


def nested(node: fx.Node, root: str) -> CaptureError:
    lines = (source(user) for user in [node, *node.users])
    return CaptureError(
        "QG102",
        f"torch.export cannot capture {root} as one graph",
        where=next((line for line in lines if line), root),
        why=f"it puts a block into a graph of its own ({node.target})",
        todo="replace the control flow by torch.where, or hoist it out of forward()",
    )


def foreign_write(node: fx.Node) -> CaptureError:
    name = str(node.target).removesuffix(".default")
    return CaptureError(
        "QG107",
        f"the operation '{name}' writes into its arguments",
        where=source(node) or name,
        why=f"a graph holds values that nobody changes, and no other form of it is known: {node.target._schema}",  # type: ignore[union-attr]
        todo="let it return a new tensor, with mutates_args=()",
    )


def source(node: fx.Node) -> str:
    """``file.py:line`` of the user's code: the last frame in a file, without the folders of this machine."""
    library = str(Path(torch.__file__).parent)
    lines = (node.meta.get("stack_trace") or "").splitlines()
    frames = [line.strip() for line in lines if "File" in line and library not in line and 'File "<' not in line]
    if not frames:
        return ""
    parts = frames[-1].split('"')
    number = parts[2].split("line ")[-1].split(",")[0] if len(parts) > 2 else ""
    return f"{Path(parts[1]).name}:{number}"
