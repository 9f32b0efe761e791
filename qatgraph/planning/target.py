"""Targets as data: rows of operation x grids x context x the kernel that the engine will choose."""

from __future__ import annotations

import hashlib
import string
from functools import cache
from importlib import resources
from importlib.metadata import EntryPoint
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from qatgraph.errors import TargetError, nearest
from qatgraph.planning.facts import WORDS
from qatgraph.planning.user_files import UserModel, parse_toml, read_text
from qatgraph.rewriting.plugins import Plugins, distribution
from qatgraph.specs import DType, QuantSpec, ScaleRule, Scheme

PLUGINS = Plugins("qatgraph.targets", "target", TargetError, taken="QG404", broken="QG405")
Spec = Annotated[
    QuantSpec,
    BeforeValidator(lambda v: QuantSpec.parse(v) if isinstance(v, str) else v),
    PlainSerializer(str),
]
BiasForm = Literal["none", "int32", "row", "vector"]


class Row(UserModel):
    """What a target does with one kind of operation in one context.

    ``placement``: int8, engine-float (the engine's float kernel) or host. ``form``: how the lowering writes it.
    ``bias``: the forms that this row takes: none, int32 (DequantizeLinear of an int32 tensor), row (``[1, .., N]``)
    or vector (``[N]``). ``not_read_by``: kinds that must not read the result; ``needs``: what the neighbours must be.
    ``why`` and ``remedy`` are sentences with the words of ``NodeFact.words``.
    """

    id: str
    op: str
    placement: Literal["int8", "engine-float", "host"]
    kernel: str
    why: str
    form: str = ""
    rank: tuple[int, ...] = ()
    dynamic: bool | None = None
    x: tuple[Spec, ...] = ()
    weight: tuple[Spec, ...] = ()
    out: tuple[Spec, ...] = ()
    bias: tuple[BiasForm, ...] = ()
    not_read_by: tuple[str, ...] = ()
    needs: Literal["", "inputs-int8"] = ""
    remedy: str = ""
    requant: str = ""
    accumulator: str = ""
    k_order: str = ""
    versions: str = ""
    source: str = ""

    @field_validator("why", "remedy")
    @classmethod
    def _fills(cls, sentence: str) -> str:
        """Refuse a word that no node has, before a plan trips over it."""
        words = {word for _, word, _, _ in string.Formatter().parse(sentence) if word is not None}
        unknown = sorted(words - set(WORDS))
        if unknown:
            raise ValueError(f"there is no word '{{{unknown[0]}}}'; known are {', '.join(WORDS)}")
        return sentence

    @model_validator(mode="after")
    def _can_be_trained(self) -> Row:
        """Refuse a grid that a plan could name and no quantizer makes."""
        for role in ("x", "out", "weight") if self.placement == "int8" else ():
            for spec in getattr(self, role):
                why = _no_quantizer(self.op, role, spec)
                if why:
                    raise ValueError(f"row '{self.id}': no quantizer makes {role} = '{spec}': {why}")
        return self


def _no_quantizer(op: str, role: str, spec: QuantSpec) -> str:
    """Why a grid cannot be trained at this place; empty if it can."""
    if spec.dtype is DType.S32 or spec.scale is ScaleRule.DERIVED:
        return "that is the grid of a bias: bias = ['int32']"
    if role != "weight":
        if spec.axis is not None:
            return "an activation has one scale: per-tensor"
        return "pair-safe is a rule for weights" if spec.scale is ScaleRule.PAIR_SAFE else ""
    if (spec.dtype, spec.scheme) != (DType.S8, Scheme.SYMMETRIC):
        return "weights are s8 symmetric"
    if op == "embedding" and spec.axis is not None:
        return "the rows that are looked up in a table share one scale: per-tensor"
    return ""


class Target(UserModel):
    """A table that passes and the solver ask; they never ask for a target's name.

    ``pipeline`` is the text of the planning passes that are asked, by default the built-in ones.
    """

    name: str
    description: str
    backend: str = ""
    opset: int = 0
    pipeline: str = "plan"
    row: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _lowers(self) -> Target:
        if self.backend and not self.opset:
            raise ValueError("a target with a backend says which ONNX opset it takes: opset = 23")
        return self

    def rows(self, op: str) -> tuple[Row, ...]:
        """The rows of one kind, best first."""
        return tuple(r for r in self.row if r.op == op)

    def hash(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def builtin_names() -> tuple[str, ...]:
    folder = resources.files("qatgraph.backends")
    return tuple(
        sorted(f.name.removesuffix(".toml").replace("_", "-") for f in folder.iterdir() if f.name.endswith(".toml"))
    )


def backend_names() -> tuple[str, ...]:
    """The backends that built-in targets lower with."""
    return tuple(sorted({_builtin(n).backend for n in builtin_names()} - {""}))


def target_names() -> tuple[str, ...]:
    """Every target that can be named: the built-in ones, then those of installed packages."""
    return (*builtin_names(), *PLUGINS.names(builtin_names()))


def load_target(name_or_path: str) -> Target:
    """A target by name (built in, or of an installed package: entry point group ``qatgraph.targets``), or a TOML file.

    Raises:
        TargetError: QG401 unknown name, QG402 the table is not valid, QG404 two packages bring one of this name,
            QG405 the package does not load.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        return _parse(read_text(path, what="target file", error=TargetError, code="QG401"), path.name)
    point = PLUGINS.find(name_or_path, builtin_names())
    if name_or_path in builtin_names():
        return _builtin(name_or_path)
    if point is not None:
        return _of_package(point)
    near = nearest(name_or_path, target_names())
    raise TargetError(
        "QG401",
        f"there is no target '{name_or_path}'",
        where="target",
        why=f"did you mean {near}?" if near else f"known targets: {', '.join(target_names())}",
        todo="see `qatgraph targets`, or give the path of a TOML file",
    )


def _of_package(point: EntryPoint) -> Target:
    """The entry point names a ``Target``, a TOML text, or the path of one (also a resource of the package)."""
    found = PLUGINS.load(point)
    if isinstance(found, str) and found.endswith(".toml"):
        found = Path(found)
    if isinstance(found, Traversable):
        try:
            found = found.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PLUGINS.unusable(point, f"{type(error).__name__}: {error}") from error
    if isinstance(found, str):
        found = _parse(found, f"the target '{point.name}' of {distribution(point)}")
    if not isinstance(found, Target):
        raise PLUGINS.unusable(point, f"'{point.value}' is no Target, no TOML text, and no path of one")
    if found.name != point.name:
        raise PLUGINS.unusable(point, f"its table bears the name '{found.name}'")
    return found


@cache
def _builtin(name: str) -> Target:
    file = resources.files("qatgraph.backends") / f"{name.replace('-', '_')}.toml"
    return _parse(file.read_text(encoding="utf-8"), name)


def _parse(text: str, where: str) -> Target:
    target = parse_toml(
        Target,
        text,
        where=where,
        error=TargetError,
        code="QG402",
        todo="compare with examples/targets/toy_npu.toml",
    )
    ids = [r.id for r in target.row]
    twice = next((i for i in ids if ids.count(i) > 1), None)
    if twice:
        raise TargetError("QG402", f"the row '{twice}' stands twice", where=where, todo="give each row its own id")
    return target
