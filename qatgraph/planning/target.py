"""Targets as data: rows of operation x grids x context x the kernel that the engine will choose."""

from __future__ import annotations

import hashlib
import re
import string
from functools import cache
from importlib import resources
from importlib.metadata import EntryPoint
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationInfo, field_validator, model_validator

from qatgraph.errors import TargetError, nearest
from qatgraph.planning.cost import Cost
from qatgraph.planning.extending import taken_over
from qatgraph.planning.facts import WORDS
from qatgraph.planning.shadowed import never_chosen
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
# What a neighbour must be: see ``Row.needs``.
Needs = Literal["", "inputs-int8", "readers-int8", "between-int8", "inside", "before"]
# How the kernel makes its result of the int32 sums, or of the integers that it read: see ``Row.requant``.
Requant = Literal["", "float-result", "scaled-sum", "through-float", "in-float", "moved"]
Accumulator = Literal["", "int32", "pair16-without-vnni"]
KOrder = Literal["", "rows", "channels-last", "by-position"]
Requires = Literal["", "vnni"]
LAYERS = ("linear", "conv1d", "conv2d", "conv3d")  # their weights are [out, in, ...]: the sum runs over the rest


class Row(UserModel):
    """What a target does with one kind of operation in one context.

    ``op``: a kind, or several joined by ``|``; so with ``kernel``, where it is empty for what runs inside the kernel of
    another node. ``placement``: int8, engine-float (the engine's float kernel) or host. ``form``: how the lowering
    writes it. ``bias``: the forms that this row takes: none, int32 (DequantizeLinear of an int32 tensor), row (``[1,
    .., N]``) or vector (``[N]``). ``batched``: the input has samples and channels in front of its spatial axes.
    ``depthwise``: whether each channel has a filter of its own and nothing else. ``least_terms``: how many products a
    sum has at least. ``beyond``: whether windows may reach beyond the padding (``ceil_mode``), of an average those that
    count it. ``reads``: how many activations it takes; constants and numbers do
    not count. ``not_read_by``: kinds that must not read the result; of those that the kernel takes in, none may behind
    that and behind what only moves it, see ``NodeFact.behind``. ``fuses_after``: kinds of one region with this node
    that its kernel takes in, if their smallest value is 0; the grid ``out`` stands behind them. ``fuses_before``: kinds
    that it takes in on the way to ``x``, if it alone reads them: a ``pad`` with zeros; the grid stands in front of
    them. ``needs``: ``inputs-int8``, every input is written as integers; ``readers-int8``, every reader takes integers;
    ``between-int8``, both; ``inside``, the node in front has a row that takes this one in; ``before``, the one behind.

    ``requant``: ``float-result``, float32 ``acc * (s_x * s_w)``, which is not rounded to a grid; ``scaled-sum``,
    ``round_half_even(acc * float32(s_x * s_w / s_y)) + z_y``; ``through-float``, the operation in float32 between a
    dequantize and a quantize, as ONNX Runtime's kernels have it; ``in-float``, the same as torch has it, of a product
    on exact sums, with the engine's own quantize behind; ``moved``, the integers as they are. ``deviation``: by how
    many steps the engine may differ from it. ``finest``: the step of the result is at least this share of that of the
    input, or the engine fails. ``accumulator``: ``int32``, or ``pair16-without-vnni``, where products are first added
    in pairs to 16 bits on x86 without VNNI; ``k_order``: along which order of the weight those pairs lie, the rows
    ``[N, K]`` of a matrix or the channels of a filter position by position, where an odd last channel meets the first
    of the next one (``channels-last``) or none (``by-position``). ``versions``: the engine that the row speaks
    of, and the oldest version, ``onnxruntime >= 1.24.1``.

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
    batched: bool = False
    depthwise: bool | None = None
    least_terms: int = 0
    beyond: bool | None = None
    reads: int = 0
    x: tuple[Spec, ...] = ()
    weight: tuple[Spec, ...] = ()
    out: tuple[Spec, ...] = ()
    bias: tuple[BiasForm, ...] = ()
    not_read_by: tuple[str, ...] = ()
    fuses_after: tuple[str, ...] = ()
    fuses_before: tuple[str, ...] = ()
    needs: Needs = ""
    remedy: str = ""
    requant: Requant = ""
    deviation: int = Field(default=0, ge=0)
    finest: float = Field(default=0.0, ge=0)
    accumulator: Accumulator = ""
    k_order: KOrder = ""
    versions: str = Field(default="", pattern=r"^([\w-]+ >= [\w.]+)?$")
    source: str = ""

    @property
    def on_request(self) -> bool:
        """Whether it is about another computation than fixed 8-bit grids: only who asks for such a grid gets it."""
        return self.dynamic_x or any(s.block is not None for s in self.weight)

    @property
    def dynamic_x(self) -> bool:
        """Whether the kernel reads floats, and finds their grid at run time."""
        return any(s.scale is ScaleRule.DYNAMIC for s in self.x)

    @property
    def moves(self) -> bool:
        """Whether the input and the result lie on one grid."""
        return self.placement == "int8" and self.requant == "moved"

    def claims(self, version: str) -> bool:
        """Whether the row speaks of a version of its engine; of one without a number it does."""
        return not version or ordered(version) >= ordered(self.versions.rpartition(" ")[2])

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
                why = no_quantizer(self.op, role, spec)
                if why:
                    raise ValueError(f"row '{self.id}': no quantizer makes {role} = '{spec}': {why}")
        return self

    @model_validator(mode="after")
    def _can_be_moved(self) -> Row:
        """What only moves integers reads and writes one grid."""
        if self.moves and (not self.x or self.x != self.out):
            raise ValueError(f"row '{self.id}': it moves integers, so x and out are the same grids")
        return self

    @model_validator(mode="after")
    def _writes_what_it_says(self) -> Row:
        """Integers need a grid, floats have none."""
        floats = self.requant == "float-result"
        if self.placement == "int8" and self.requant not in ("", "moved") and bool(self.out) == floats:
            has = "a grid 'out'" if self.out else "no grid 'out'"
            raise ValueError(f"row '{self.id}': its result is {self.requant}, and it has {has}")
        return self


def ordered(version: str) -> tuple[int, ...]:
    """Versions as they follow each other: the numbers in front of what is no number, ``1.31.1`` as (1, 31, 1)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def no_quantizer(op: str, role: str, spec: QuantSpec) -> str:
    """Why a grid cannot be trained at this place; empty if it can. ``op``: the kinds of a row; none, of any kind."""
    if spec.dtype is DType.S32 or spec.scale is ScaleRule.DERIVED:
        return "that is the grid of a bias: bias = ['int32']"
    if spec.scale is ScaleRule.DYNAMIC:
        fits = role == "x" and (spec.dtype, spec.scheme) == (DType.U8, Scheme.AFFINE)
        return "" if fits else "a grid that is found at run time is x = 'u8 affine per-tensor dynamic'"
    if spec.block is not None:
        return _no_blocks(op, role, spec)
    if (spec.scale is ScaleRule.FIXED) != (op == "dequantize"):
        return "fixed is the grid of an integer input: it stands in the row of 'dequantize', and alone there"
    if role != "weight":
        if spec.axis is not None:
            return "an activation has one scale: per-tensor"
        bound = spec.scale in (ScaleRule.PAIR_SAFE, ScaleRule.PAIR_SAFE_BY_POSITION, ScaleRule.REDUCED_RANGE)
        return f"{spec.scale.value} is a rule for weights" if bound else ""
    if (spec.dtype, spec.scheme) != (DType.S8, Scheme.SYMMETRIC):
        return "weights are s8 symmetric"
    if op == "embedding" and spec.axis is not None:
        return "the rows that are looked up in a table share one scale: per-tensor"
    if spec.axis and set(op.split("|")) & set(LAYERS):
        return "scales on the input channels cannot leave the sum over them: per-channel(0)"
    return ""


def _no_blocks(op: str, role: str, spec: QuantSpec) -> str:
    if role != "weight" or op not in ("", "linear"):
        return "only the weight of a linear has blocks"
    if spec.dtype not in (DType.S4, DType.S8) or spec.scheme is not Scheme.SYMMETRIC:
        return "blocks are s4 or s8 symmetric"
    return "" if spec.scale is ScaleRule.FREE else "the scale of a block is free"


class Target(UserModel):
    """A table that passes and the solver ask; they never ask for a target's name.

    ``pipeline`` is the text of the planning passes that are asked, by default the built-in ones. ``requires`` is what
    the CPU must have, or the file would be quietly wrong: with ``vnni`` (AVX512-VNNI, AVX-VNNI or AMX) no sum of
    products passes through 16 bits, so that rows may use the full range of a weight. ``tested``: the oldest and the
    newest version of the engine on which every row was probed that speaks of it.

    ``cost`` is what its kernels and borders cost; without it a plan counts borders, and does not weigh them.

    ``extends`` names another target, or a TOML file beside this one. Its table is taken over but for name and
    description: ``without`` lists the ids of rows that go, a row with the id of one of its rows gives the keys that
    change, and other rows stand in front. What ``row`` holds is the whole table.
    """

    name: str
    description: str
    extends: str = ""
    without: tuple[str, ...] = ()
    requires: Requires = ""
    backend: str = ""
    opset: int = 0
    tested: tuple[str, str] | None = None
    pipeline: str = "plan"
    cost: Cost | None = None
    row: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _takes_over(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("extends"), str) or not data["extends"]:
            return data
        folder, files = info.context or (Path(), ())
        return taken_over(data, _base(data["extends"], folder, files))

    @model_validator(mode="after")
    def _lowers(self) -> Target:
        if self.backend and not self.opset:
            raise ValueError("a target with a backend says which ONNX opset it takes: opset = 23")
        return self

    @model_validator(mode="after")
    def _every_row_is_of_use(self) -> Target:
        if not self.extends and (told := never_chosen(self.row)):  # rows of its own may hide those of the base
            raise ValueError(f"{told}; order them from best to last, or leave one out")
        return self

    def rows(self, op: str) -> tuple[Row, ...]:
        """The rows of one kind, best first."""
        return tuple(r for r in self.row if op in r.op.split("|"))

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


def builtin_for(backend: str) -> str:
    """The first built-in target that lowers with a backend."""
    return next(n for n in builtin_names() if _builtin(n).backend == backend)


def target_names() -> tuple[str, ...]:
    """Every target that can be named: the built-in ones, then those of installed packages."""
    return (*builtin_names(), *PLUGINS.names(builtin_names()))


def load_target(name_or_path: str) -> Target:
    """A target by name (built in, or of an installed package: entry point group ``qatgraph.targets``), or a TOML file.

    Raises:
        TargetError: QG401 unknown name, QG402 the table is not valid, QG404 two packages bring one of this name,
            QG405 the package does not load.
    """
    if name_or_path.endswith(".toml"):
        return _of_file(Path(name_or_path))
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


def _of_file(path: Path, extended_by: tuple[Path, ...] = ()) -> Target:
    text = read_text(path, what="target file", error=TargetError, code="QG401")
    return _parse(text, path.name, (path.parent, (*extended_by, path.resolve())))


def _base(name: str, folder: Path, files: tuple[Path, ...]) -> Target:
    """The target that one of ``folder`` extends; ``files`` are those that extend it."""
    if not name.endswith(".toml"):
        return load_target(name)
    if (folder / name).resolve() in files:
        raise ValueError(f"extends: '{name}' extends itself")
    return _of_file(folder / name, files)


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


def _parse(text: str, where: str, context: Any = None) -> Target:
    target = parse_toml(
        Target,
        text,
        context=context,
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
