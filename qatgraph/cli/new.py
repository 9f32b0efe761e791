"""Commands that write a skeleton that works: new pass, new target."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from qatgraph.cli.common import app
from qatgraph.errors import JobError

new = typer.Typer(no_args_is_help=True, help="Write a skeleton that works, with its test and golden text.")
app.add_typer(new, name="new")

Output = Annotated[Path, typer.Option(help="the folder to write to", metavar="DIR")]
WORDS = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@new.command("pass")
def new_pass(
    name: Annotated[str, typer.Argument(help="its verb first: fold-double-negation")], output: Output = Path()
) -> None:
    """A graph pass, a test, and its golden text.

    \b
    Example: qatgraph new pass fold-double-negation --output my_passes
    """
    from qatgraph.rewriting.registry import pass_names

    _check_name(name, "pass", pass_names())
    if "-" not in name:
        raise _bad_name(name, "pass", "it is one word", "name what the pass does to what, as fold-batch-norm does")
    _write("pass", "py", name, output)
    print(f"next: pytest {output / f'test_{_module(name)}.py'}")
    print(f"      qatgraph opt MODEL -p canonicalize,{output / f'{_module(name)}.py'} --print-after changed")


@new.command("target")
def new_target(name: Annotated[str, typer.Argument(help="as my-npu")], output: Output = Path()) -> None:
    """A target table, a test, and its golden text.

    \b
    Example: qatgraph new target my-npu --output my_target
    """
    from qatgraph.planning.target import target_names

    _check_name(name, "target", target_names())
    _write("target", "toml", name, output)
    print(f"next: pytest {output / f'test_{_module(name)}.py'}")
    print(f"      qatgraph plan JOB.toml --target {output / f'{_module(name)}.toml'}")


def _check_name(name: str, what: str, taken: Iterable[str]) -> None:
    if not WORDS.fullmatch(name):
        raise _bad_name(name, what, "it is not of small letters and digits, joined by hyphens", "write it as fold-gelu")
    if name in taken:
        raise _bad_name(name, what, f"there is a {what} of this name", "choose another name")


def _bad_name(name: str, what: str, why: str, todo: str) -> JobError:
    return JobError("QG810", f"'{name}' cannot be the name of a {what}", where=f"new {what}", why=why, todo=todo)


def _module(name: str) -> str:
    return name.replace("-", "_")


def _write(what: str, suffix: str, name: str, folder: Path) -> None:
    """Fill the templates of one kind; nothing is written if one of the files is there."""
    from qatgraph.backends.qdq_onnx import write_atomically

    words = {"NAME": name, "MODULE": _module(name), "CLASS": "".join(w.capitalize() for w in name.split("-"))}
    files = {
        folder / f"{_module(name)}.{suffix}": f"{what}.{suffix}.in",
        folder / f"test_{_module(name)}.py": f"test_{what}.py.in",
        folder / "golden" / f"{name}.txt": f"{what}.txt.in",
    }
    there = next((path for path in files if path.exists()), None)
    if there is not None:
        raise _unwritable(there, "it exists, and would be lost", "choose another name, or --output another folder")
    try:
        (folder / "golden").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        todo = "choose a folder that you may write to: --output DIR"
        raise _unwritable(folder, error.strerror or str(error), todo) from error
    for path, template in files.items():
        text = (resources.files("qatgraph") / "skeletons" / template).read_text(encoding="utf-8")
        write_atomically(path, Template(text).substitute(words).encode())
        print(f"wrote {path}")


def _unwritable(path: Path, why: str, todo: str) -> JobError:
    return JobError("QG811", f"cannot write '{path.name}'", where=str(path), why=why, todo=todo)
