"""The operations that qatgraph knows by name: which ATen overloads they are and what their arguments mean.

Everything else keeps the name of its ATen operator as its kind and stays in float.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OpKind:
    """``targets`` are ATen overloads; ``roles`` name the arguments by position; ``keeps_grid`` says
    that the operation only moves elements, so that its input and output may share one grid."""

    name: str
    targets: tuple[str, ...]
    roles: tuple[str, ...] = ("x",)
    keeps_grid: bool = False
    commutes: bool = False  # its two operands may be swapped


KINDS: tuple[OpKind, ...] = (
    OpKind("linear", ("aten.linear.default",), ("x", "weight", "bias")),
    OpKind("addmm", ("aten.addmm.default",), ("bias", "x", "weight")),
    OpKind("matmul", ("aten.matmul.default", "aten.mm.default", "aten.bmm.default"), ("x", "y")),
    OpKind("embedding", ("aten.embedding.default",), ("weight", "indices")),
    OpKind("layer_norm", ("aten.layer_norm.default",), ("x", "shape", "weight", "bias", "eps")),
    OpKind("rms_norm", ("aten.rms_norm.default",), ("x", "shape", "weight", "eps")),
    OpKind("group_norm", ("aten.group_norm.default",), ("x", "groups", "weight", "bias", "eps")),
    OpKind("batch_norm", ("aten.batch_norm.default",), ("x", "weight", "bias", "mean", "variance")),
    OpKind("conv1d", ("aten.conv1d.default",), ("x", "weight", "bias")),
    OpKind("conv2d", ("aten.conv2d.default",), ("x", "weight", "bias")),
    OpKind("conv3d", ("aten.conv3d.default",), ("x", "weight", "bias")),
    OpKind("conv_transpose1d", ("aten.conv_transpose1d.default",), ("x", "weight", "bias")),
    OpKind("conv_transpose2d", ("aten.conv_transpose2d.input",), ("x", "weight", "bias")),
    OpKind("max_pool1d", ("aten.max_pool1d.default",)),
    OpKind("max_pool2d", ("aten.max_pool2d.default",)),
    OpKind("max_pool3d", ("aten.max_pool3d.default",)),
    OpKind("avg_pool1d", ("aten.avg_pool1d.default",)),
    OpKind("avg_pool2d", ("aten.avg_pool2d.default",)),
    OpKind("avg_pool3d", ("aten.avg_pool3d.default",)),
    OpKind("adaptive_avg_pool2d", ("aten.adaptive_avg_pool2d.default",), ("x", "size")),
    OpKind("pad", ("aten.pad.default",), ("x", "pad")),
    OpKind("cat", ("aten.cat.default",), ("x", "dim")),
    OpKind("softmax", ("aten.softmax.int",), ("x", "dim")),
    OpKind("safe_softmax", ("aten._safe_softmax.default",), ("x", "dim")),
    OpKind("attention", ("aten.scaled_dot_product_attention.default",), ("query", "key", "value", "mask")),
    OpKind("gelu", ("aten.gelu.default",)),
    OpKind("silu", ("aten.silu.default",)),
    OpKind("relu", ("aten.relu.default",)),
    OpKind("clamp", ("aten.clamp.default",), ("x", "min", "max")),
    OpKind("leaky_relu", ("aten.leaky_relu.default",)),
    OpKind("sigmoid", ("aten.sigmoid.default",)),
    OpKind("tanh", ("aten.tanh.default",)),
    OpKind("erf", ("aten.erf.default",)),
    OpKind("add", ("aten.add.Tensor",), ("x", "y"), commutes=True),
    OpKind("mul", ("aten.mul.Tensor",), ("x", "y"), commutes=True),
    OpKind("div", ("aten.div.Tensor",), ("x", "y")),
    OpKind("dropout", ("aten.dropout.default",), ("x", "p", "train"), keeps_grid=True),
    OpKind("cast", ("aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten._to_copy.default")),
    OpKind("dequantize", ("qatgraph.dequantize.default",), ("x", "scale", "zero_point", "axis")),
    OpKind("slice", ("aten.slice.Tensor",), ("x", "dim", "start", "end", "step"), keeps_grid=True),
    OpKind("select", ("aten.select.int",), ("x", "dim", "index"), keeps_grid=True),
    OpKind("expand", ("aten.expand.default",), ("x", "shape"), keeps_grid=True),
    OpKind(
        "reshape",
        ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"),
        ("x", "shape"),
        keeps_grid=True,
    ),
    OpKind("flatten", ("aten.flatten.using_ints",), keeps_grid=True),
    OpKind("squeeze", ("aten.squeeze.dim", "aten.squeeze.dims"), keeps_grid=True),
    OpKind("unsqueeze", ("aten.unsqueeze.default",), keeps_grid=True),
    OpKind(
        "transpose",
        ("aten.transpose.int", "aten.permute.default", "aten.t.default", "aten.numpy_T.default"),
        keeps_grid=True,
    ),
)

BY_TARGET: dict[str, OpKind] = {target: kind for kind in KINDS for target in kind.targets}
BY_NAME: dict[str, OpKind] = {kind.name: kind for kind in KINDS}
# Kinds that a pass gives to a node whose ATen operator stays the same.
REFINED: dict[str, str] = {"residual_add": "add", "global_avg_pool": "adaptive_avg_pool2d"}


def kind_of_target(target: str) -> str:
    """The kind of an overload such as ``aten.linear.default``; unknown ones name themselves."""
    known = BY_TARGET.get(target)
    if known is not None:
        return known.name
    if target.count(".") == 2 and not target.startswith("aten."):
        return target.rpartition(".")[0]  # of a user's library: mylib.swish
    if target.startswith("<"):  # Python's own: getitem takes one of several results, the others compute sizes
        name = target.split("function ")[-1].split()[0].strip("<>")
        return name if name == "getitem" else f"sym_{name.removeprefix('sym_')}"
    name = target.removeprefix("aten.").split(".")[0]
    if name.startswith("__"):
        return name.strip("_") or target  # __and__ is and
    return name.removeprefix("_") or target  # relu_ writes into its input: it is not relu


def add_kind(kind: OpKind) -> None:
    """Enter an operation of a user's library into the table."""
    BY_NAME[kind.name] = kind  # its target names itself: see kind_of_target


def roles_of(kind: str) -> tuple[str, ...]:
    known = BY_NAME.get(REFINED.get(kind, kind))
    return known.roles if known is not None else ("x",)


def keeps_grid(kind: str) -> bool:
    known = BY_NAME.get(kind)
    return known is not None and known.keeps_grid
