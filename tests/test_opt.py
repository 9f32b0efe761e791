"""``qatgraph opt``, ``passes NAME`` and ``bisect`` as a user runs them; and the same from Python."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import qatgraph as qg
from qatgraph.cli import main
from qatgraph.cli.common import busy
from qatgraph.passes import BUILTIN, CANONICALIZE
from qatgraph.rewriting.manager import PassManager
from qatgraph.rewriting.pipeline import Pipeline
from qatgraph.sources import load
from tests.test_prediction import python_without

JOBS = Path(__file__).parent / "jobs"
JOB = str(JOBS / "tiny.toml")
MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        z = y * 0.5 * (1.0 + torch.erf(y / 2**0.5))
        return z + x * 0.5 * (1.0 + torch.tanh(x))


class Shared(Net):
    def forward(self, x):
        y = self.fc(x)
        return torch.relu(y) + y


def shared():
    return Shared().eval(), torch.randn(2, 4)


def model():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(2, 4)


def moving():
    return *model(), {"x": {0: "batch"}}


def alone():
    return Net()


def fails():
    raise ValueError("no model today")


def has_gelu(graph):
    return "gelu(" in str(graph)
"""
WRONG = """
from dataclasses import dataclass
import qatgraph as qg


@dataclass(frozen=True)
class TanhForErf(qg.RewritePass):
    name = "tanh-for-erf"
    pattern = qg.Op("erf", qg.AnyValue("x"), name="erf")

    def rewrite(self, match, edit):
        edit.replace(match["erf"], edit.call("tanh", match["x"], at=match["erf"]))
"""


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def qatgraph(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``qatgraph("opt", …)`` runs the command line in this process."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["qatgraph", *words])
        try:
            main()
            code = 0
        except SystemExit as done:
            code = int(done.code or 0)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("opt")
    (path / "net.py").write_text(MODEL, encoding="utf-8")
    (path / "wrong.py").write_text(WRONG, encoding="utf-8")
    (path / "bad.pt2").write_bytes(b"no program")
    scope: dict[str, Any] = {}
    exec(MODEL, scope)
    model, x = scope["model"]()
    torch.export.save(torch.export.export(model, (x,)), path / "net.pt2")
    return path


def source(kind: str, folder: Path) -> str:
    return {"job": JOB, "program": str(folder / "net.pt2"), "function": f"{folder / 'net.py'}:model"}[kind]


SOURCES = pytest.mark.parametrize("kind", ["job", "program", "function"])

# ---------------------------------------------------------------- the three sources


@SOURCES
def test_opt_runs_the_pipeline_over_each_kind_of_source(kind: str, folder: Path, qatgraph: Run) -> None:
    done = qatgraph("opt", source(kind, folder))
    assert (done.code, done.err) == (0, "")
    title, head, *rows = done.out.splitlines()
    assert title.strip() == f"{len(CANONICALIZE)} passes"
    assert re.split(r"  +", head.strip()) == ["pass", "changed", "refused, and why most", "nearest miss"]
    assert [row.split()[0] for row in rows] == list(CANONICALIZE)


def test_a_program_and_the_module_that_it_was_exported_from_give_one_graph(folder: Path) -> None:
    graphs = [load(source(kind, folder))[0] for kind in ("program", "function")]
    assert str(graphs[0]) == str(graphs[1])
    assert graphs[0].structural_hash() == graphs[1].structural_hash()


def test_a_function_may_say_which_sizes_move(folder: Path) -> None:
    assert "float32[batch, 4]" in str(load(f"{folder / 'net.py'}:moving")[0])
    assert "float32[2, 4]" in str(load(f"{folder / 'net.py'}:model")[0])


# ---------------------------------------------------------------- what it shows


def test_print_after_shows_all_what_changed_or_one_pass(folder: Path, qatgraph: Run) -> None:
    def shown(which: str) -> dict[str, str]:
        out = qatgraph("opt", source("function", folder), "-p", "fold-addmm,fold-gelu", "--print-after", which).out
        parts = out.partition("2 passes")[0].split("-- after ")[1:]
        return dict(part.split("\n", 1) for part in parts)

    everything, changed, one = shown("all"), shown("changed"), shown("fold-gelu")
    assert list(everything) == ["fold-addmm", "fold-gelu"]
    assert "  Net:erf = erf(Net:div)" in everything["fold-addmm"]
    assert list(one.items()) == [("fold-gelu", everything["fold-gelu"])]
    assert "Net:gelu = gelu(fc:linear) : float32[2, 4]" in one["fold-gelu"]
    assert list(changed) == ["fold-gelu"]
    assert changed["fold-gelu"].startswith("--- before fold-gelu\n+++ after fold-gelu\n")
    assert shown("fold-addmm")["fold-addmm"] == everything["fold-addmm"]
    assert shown("") == {}


def test_time_adds_the_milliseconds(folder: Path, qatgraph: Run) -> None:
    words = ("opt", source("function", folder), "-p", "fold-gelu")
    plain, timed = qatgraph(*words).out, qatgraph(*words, "--time").out
    assert "ms" not in plain.splitlines()[1].split()
    assert timed.splitlines()[1].split()[-2:] == ["ms", "check"]
    assert timed.splitlines()[2].split()[-1].isdigit()
    assert re.match(r"1 passes in \d+\.\d s, checked in \d+\.\d s", timed)


def test_what_takes_long_says_so_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, err in ((True, True), (False, True), (True, False)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda out=out: out)
        monkeypatch.setattr(sys.stderr, "isatty", lambda err=err: err)
        with busy("capture the model") as say:
            say("and run the passes")
        assert ("and run the passes" in capsys.readouterr().err) == (out and err)


def test_a_job_runs_with_the_threads_that_it_asks_for(tmp_path: Path) -> None:
    """Without, a model that its factory trains took ten times as long on a busy machine."""
    before = torch.get_num_threads()
    text = (JOBS / "tiny.toml").read_text(encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(f"threads = {before + 1}\n{text}", encoding="utf-8")
    source = (JOBS / "tiny.py").read_text(encoding="utf-8")
    noted = "def model(seed: int, **options):\n    print(torch.get_num_threads())\n    return Tiny(16, False).eval()\n"
    (tmp_path / "tiny.py").write_text(f"{source}\n{noted}", encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        load(str(tmp_path / "tiny.toml"))
    assert out.getvalue() == f"{before + 1}\n"
    assert torch.get_num_threads() == before


def test_explain_tells_what_almost_matched_and_what_was_refused(folder: Path, qatgraph: Run) -> None:
    def explained(function: str, name: str) -> list[str]:
        return qatgraph("opt", f"{folder / 'net.py'}:{function}", "--explain", name).out.splitlines()

    assert explained("model", "fold-gelu") == [
        "fold-gelu: 1 changes, 0 refused, 2 did not match",
        "  'Net:mul#4': matched 7 of 18; 'x' stands where mul is wanted",
        "  'Net:mul#3': matched 1 of 18; 'x' stands where mul is wanted",
    ]
    assert explained("shared", "fuse-linear-activation") == [
        "fuse-linear-activation: 0 changes, 1 refused, 0 did not match",
        "  refused at 'Shared:relu': 'fc:linear' has 2 users",
    ]


def test_blame_names_the_passes_that_made_a_node_and_its_line(folder: Path, qatgraph: Run) -> None:
    line = MODEL.splitlines().index("        z = y * 0.5 * (1.0 + torch.erf(y / 2**0.5))") + 1
    done = qatgraph("opt", source("function", folder), "--blame", "Net:gelu")
    assert done.out.splitlines() == [f"Net:gelu  (net.py:{line})", "  fold-gelu", "  fuse-linear-activation"]
    untouched = qatgraph("opt", source("function", folder), "-p", "fold-gelu", "--blame", "fc:linear")
    assert untouched.out.splitlines()[1:] == ["  capture only"]


def test_json_holds_every_report_and_nothing_else_on_standard_output(folder: Path, qatgraph: Run) -> None:
    done = qatgraph("opt", source("function", folder), "--json", "--print-after", "changed")
    assert [r["name"] for r in done.json] == list(CANONICALIZE)
    gelu = next(r for r in done.json if r["name"] == "fold-gelu")
    assert set(gelu) == {
        "name",
        "modified",
        "changes",
        "milliseconds",
        "checking_milliseconds",
        "refused",
        "missed",
        "diff",
    }
    assert (gelu["modified"], gelu["changes"]) == (True, 1)
    assert "+  Net:gelu = gelu(fc:linear)" in gelu["diff"]
    assert set(gelu["missed"][0]) == {"root", "matched", "total", "at", "why"}
    assert "-- after fold-gelu" in done.err


# ---------------------------------------------------------------- dump


def test_dump_writes_text_and_diff_of_each_pass_the_same_each_time(folder: Path, tmp_path: Path, qatgraph: Run) -> None:
    words = ("opt", source("function", folder), "-p", "fold-addmm,fold-gelu", "--dump")
    for name in ("one", "two"):
        qatgraph(*words, str(tmp_path / "deep" / name))
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / "deep" / n).iterdir()} for n in ("one", "two"))
    assert sorted(one) == ["00-fold-addmm.diff", "00-fold-addmm.txt", "01-fold-gelu.diff", "01-fold-gelu.txt"]
    assert one == two
    assert one["00-fold-addmm.diff"] == b""
    assert b"Net:gelu = gelu(fc:linear)" in one["01-fold-gelu.txt"]
    assert one["01-fold-gelu.diff"].startswith(b"--- before fold-gelu\n+++ after fold-gelu\n")


def test_what_ran_before_a_failure_is_dumped_and_what_failed(folder: Path, tmp_path: Path, qatgraph: Run) -> None:
    words = ("-p", f"fold-addmm,{folder / 'wrong.py'},fold-gelu", "--dump", str(tmp_path))
    done = qatgraph("opt", source("function", folder), *words)
    assert done.code == 1
    stems = ("00-fold-addmm", "01-tanh-for-erf")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{s}.{e}" for s in stems for e in ("diff", "txt")]
    before, after = ((tmp_path / f"{stem}.txt").read_text() for stem in stems)
    assert ("Net:erf = erf(Net:div)" in before, "Net:tanh#2 = tanh(Net:div)" in after) == (True, True)
    assert "Net:erf" not in after
    assert (tmp_path / "01-tanh-for-erf.diff").read_text() in done.err


def test_qg504_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path, qatgraph: Run) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    done = qatgraph("opt", source("function", folder), "--dump", str(tmp_path / "file"))
    assert done.code == 1
    assert done.err.startswith("QG504: cannot write 'file'")


# ---------------------------------------------------------------- passes NAME


def test_passes_lists_all_and_documents_one(qatgraph: Run) -> None:
    rows = qatgraph("passes", "--json").json
    assert [r["name"] for r in rows] == list(BUILTIN)
    assert {r["kind"] for r in rows} == {"rewrite", "planning"}
    assert qatgraph("passes", "pin-small-embeddings").out.endswith("Options: min_bytes = 4194304.\n")
    page = qatgraph("passes", "fold-gelu").out
    assert page.endswith("\nOptions: none.\n")
    assert page.startswith("fold-gelu\n\n")
    for heading in ("What:", "Why:", "Before and after:", "Refuses:", "Numerics:"):
        assert heading in page
    assert qatgraph("passes", "fold-gellu").err.startswith("QG201: there is no pass 'fold-gellu'")


# ---------------------------------------------------------------- bisect


def test_bisect_finds_the_pass_that_changes_the_numbers(folder: Path, qatgraph: Run) -> None:
    words = ("bisect", source("function", folder), "-p", f"fold-addmm,{folder / 'wrong.py'},fold-gelu")
    done = qatgraph(*words)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("'tanh-for-erf': rewrite 1, at 'Net:erf' (of ")
    assert "+  Net:tanh#2 = tanh(Net:div)" in done.out
    found = qatgraph(*words, "--json").json
    assert (found["pass_name"], found["rewrite"], found["node"]) == ("tanh-for-erf", 1, "Net:erf")


def test_bisect_asks_a_script(folder: Path, qatgraph: Run) -> None:
    done = qatgraph("bisect", source("program", folder), "--script", f"{folder / 'net.py'}:has_gelu")
    assert done.out.startswith("'fold-gelu': rewrite 1, at 'Net:mul#2' (of ")


# ---------------------------------------------------------------- errors

ERRORS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "no source": (("opt", "what"), "QG809: 'what' is no model", "it is neither a job"),
    "no such program": (("opt", "none.pt2"), "QG809: 'none.pt2' is no model", "there is no such file"),
    "no program": (("opt", "{}/bad.pt2"), "QG809: ", "is no model"),
    "no such job": (("opt", "none.toml"), "QG801: ", "none.toml"),
    "no such file": (("opt", "{}/none.py:model"), "QG803: ", "none.py"),
    "no such function": (("opt", "{}/net.py:none"), "QG803: 'net.py' has no function 'none'", ""),
    "a function misspelt": (("opt", "{}/net.py:modle"), "QG803: 'net.py' has no function 'modle'", "mean 'model'?"),
    "a model alone": (("opt", "{}/net.py:alone"), "QG809: ", "the function returns a Net, not (model, batch)"),
    "a function that fails": (("opt", "{}/net.py:fails"), "QG809: ", "ValueError: no model today"),
    "no such node": (("opt", JOB, "--blame", "first:linaer"), "QG217: ", "did you mean 'first:linear'?"),
    "no such step to explain": (("opt", JOB, "--explain", "fold-gellu"), "QG212: ", "did you mean 'fold-gelu'?"),
    "no such step to print": (("opt", JOB, "--print-after", "fold-gellu"), "QG212: ", "did you mean 'fold-gelu'?"),
    "a step that plans": (("opt", JOB, "-p", "plan", "--explain", "pin-softmax"), "QG212: ", "changes no graph"),
    "no such pass": (("opt", JOB, "-p", "fold-gellu"), "QG201: there is no pass 'fold-gellu'", "'fold-gelu'"),
    "no such option": (("opt", JOB, "-p", "fold-gelu{eps=1}"), "QG202: ", "fold-gelu"),
    "nothing to find": (("bisect", JOB), "QG214: ", "nothing is to blame"),
    "no such script": (("bisect", JOB, "--script", "none.py:bad"), "QG803: the predicate", "none.py"),
    "no function in a script": (("bisect", JOB, "--script", "none.py"), "QG803: the predicate", "none.py"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ERRORS)
def test_a_fault_is_a_sentence_on_standard_error(fault: str, folder: Path, qatgraph: Run) -> None:
    words, start, part = ERRORS[fault]
    done = qatgraph(*(word.format(folder) if word.startswith("{}/") else word for word in words))
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(start)
    assert part in done.err
    assert "\n  do: " in done.err
    assert "Traceback" not in done.err


def test_a_file_that_is_no_program_brings_no_words_of_torch(folder: Path) -> None:
    """In a process of its own: torch's log goes to the standard error that it found when it started."""
    done = python_without((), "from qatgraph.cli import main; main()", "opt", str(folder / "bad.pt2"))
    assert done.returncode == 1
    assert done.stderr.startswith("QG809: ")
    assert done.stderr.count("\n") == 4


def test_a_wrong_pass_is_shown_with_what_it_did(folder: Path, qatgraph: Run) -> None:
    done = qatgraph("opt", source("function", folder), "-p", str(folder / "wrong.py"))
    assert (done.code, done.out) == (1, "")
    diff, _, sentence = done.err.partition("QG207: ")
    assert "-  Net:erf = erf(Net:div)" in diff
    assert sentence.startswith("'tanh-for-erf' declares its numerics as same, but the output 'output' differs")
    assert "the first value that differs is 'Net:add'" in sentence


# ---------------------------------------------------------------- the same from Python


@SOURCES
def test_python_says_what_the_command_line_says(kind: str, folder: Path, qatgraph: Run) -> None:
    graph = load(source(kind, folder))[0]
    manager = PassManager(Pipeline.parse("canonicalize").steps, leaves=graph.stage)
    manager.run(graph)

    def told(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if "milliseconds" not in k} for r in reports]

    from_python = json.loads(json.dumps([r.as_json() for r in manager.reports]))
    assert told(from_python) == told(qatgraph("opt", source(kind, folder), "--json").json)


def test_the_names_for_this_are_public(folder: Path) -> None:
    graph = qg.capture(torch.export.load(folder / "net.pt2"))
    pipeline = qg.Pipeline.parse(f"{folder / 'wrong.py'}")
    with pytest.raises(qg.QatgraphError, match="QG207") as caught:
        qg.PassManager(pipeline.steps).run(graph)
    assert "+  Net:tanh#2 = tanh(Net:div)" in caught.value.diff  # type: ignore[attr-defined]
    assert qg.bisect(graph, pipeline).pass_name == "tanh-for-erf"
