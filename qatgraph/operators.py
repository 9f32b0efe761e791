"""The operators that are not ATen: quantize and dequantize of the stage qdq, and those that users register."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from qatgraph.errors import PassError
from qatgraph.ops import OpKind, add_kind
from qatgraph.quantizers.blocks import in_blocks, out_of_blocks
from qatgraph.quantizers.dynamic import round_dynamically
from qatgraph.quantizers.grids import channel_shape, quantize


@torch.library.custom_op("qatgraph::quantize", mutates_args=())
def quantize_linear(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """float32 -> the integer type of ``zero_point``, per tensor."""
    span = torch.iinfo(zero_point.dtype)
    return quantize(x, scale, zero_point.float(), span.min, span.max, None).to(zero_point.dtype)


@quantize_linear.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("qatgraph::dequantize", mutates_args=())
def dequantize_linear(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    """Integers -> ``(q - zero_point) * scale`` in the type of the scale; ``axis`` counts when that is a vector."""
    shape = channel_shape(q, axis if scale.ndim else None)
    steps = q.to(torch.int32) - zero_point.to(torch.int32).reshape(shape)
    return steps.to(scale.dtype) * scale.reshape(shape)


@dequantize_linear.register_fake
def _(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


@torch.library.custom_op("qatgraph::round_dynamically", mutates_args=())
def dynamic_quantize_linear(x: torch.Tensor) -> torch.Tensor:
    """float32 -> the float32 that its integers stand for, on the grid that DynamicQuantizeLinear finds for it."""
    return round_dynamically(x)


@dynamic_quantize_linear.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qatgraph::dequantize_blocks", mutates_args=())
def dequantize_blocks(q: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Integers ``[N, K]`` -> ``q * scale`` in float32; ``scale [N, ceil(K / block)]``."""
    return out_of_blocks(in_blocks(q.float(), block) * scale.unsqueeze(-1), q.shape[1]).contiguous()


@dequantize_blocks.register_fake
def _(q: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    return torch.empty_like(q, dtype=torch.float32)


QUANTIZE = torch.ops.qatgraph.quantize.default
DEQUANTIZE = torch.ops.qatgraph.dequantize.default
ROUND_DYNAMICALLY = torch.ops.qatgraph.round_dynamically.default
DEQUANTIZE_BLOCKS = torch.ops.qatgraph.dequantize_blocks.default


@dataclass(frozen=True, init=False)
class OnnxOp:
    """One ONNX operation, of any domain: ``OnnxOp("com.microsoft::QuickGelu", alpha=1.0)``.

    As the form of a custom operation it reads the same tensors; what else that takes becomes an attribute of its name.
    """

    domain: str
    name: str
    attributes: tuple[tuple[str, int | float | str], ...]

    def __init__(self, name: str, /, **attributes: int | float | str) -> None:
        domain, _, operation = name.rpartition("::")
        object.__setattr__(self, "domain", domain)
        object.__setattr__(self, "name", operation)
        object.__setattr__(self, "attributes", tuple(attributes.items()))


Translation = Callable[..., Any] | OnnxOp
TRANSLATIONS: dict[OpOverload, Translation] = {}  # what lowering to ONNX writes for the users' operations


def register_operation(
    operation: Any,
    *,
    onnx: Translation | None = None,
    roles: tuple[str, ...] = ("x",),
    keeps_grid: bool = False,
    commutes: bool = False,
) -> None:
    """Make an operation of a ``torch.library`` known: its kind is its name there, ``mylib.swish``.

    Without this call it is captured and stays in float; with it, patterns, target rows and lowering know it.
    Shapes and gradients are torch's business: ``register_fake`` and ``register_autograd``.

    Args:
        operation: what ``torch.library.custom_op`` returned, or an overload such as ``torch.ops.mylib.swish.default``.
        onnx: how it is written in ONNX: a function over onnxscript operations, as ``custom_translation_table`` of
            ``torch.onnx.export`` takes it, or an ``OnnxOp``, which may be of an engine's own domain.
        roles: the names of its arguments in target rows, by position: ``("x", "weight", "bias")``.
        keeps_grid: it only moves elements, so that its input and output may share one grid.
        commutes: its two operands may be swapped.

    Raises:
        PassError: QG220 it is no operation that a graph could hold.
    """
    overload = _overload(operation)
    name = str(overload)
    problem = _problem(overload, onnx, roles, commutes)
    if problem:
        what, todo = problem
        raise _refused(name, what, todo)
    add_kind(OpKind(name.rpartition(".")[0], (name,), tuple(roles), keeps_grid, commutes))
    if onnx is not None:
        TRANSLATIONS[overload] = onnx


def _overload(operation: Any) -> OpOverload:
    if isinstance(operation, OpOverloadPacket):
        packet: Any = operation
        names = packet.overloads()
        if len(names) > 1:
            todo = f"register each of them: torch.ops.{packet}.{names[0]} …"
            raise _refused(str(packet), "it has several overloads", todo)
        operation = getattr(packet, names[0])
    found = getattr(operation, "_opoverload", operation)  # of what torch.library.custom_op returned
    if isinstance(found, OpOverload):
        return found
    name = getattr(operation, "__name__", repr(operation))
    raise _refused(name, "torch.export would look into it", "define it with torch.library.custom_op")


def _problem(
    overload: OpOverload, onnx: Translation | None, roles: tuple[str, ...], commutes: bool
) -> tuple[str, str] | None:
    """Why the operation cannot be registered, and what to do."""
    schema = overload._schema
    if overload.namespace in ("aten", "prim", "prims", "qatgraph"):
        return "it is built in", "register an operation of a library of your own"
    if schema.is_mutable:
        return f"it writes into its arguments: {schema}", "return a new tensor, and declare mutates_args=()"
    if not roles or len(roles) > len(schema.arguments) or len(set(roles)) < len(roles):
        why = f"it has {len(schema.arguments)} arguments, the roles are {', '.join(roles) or 'none'}"
        return why, "give each argument a role of its own"
    wrong = next((r for r in roles if r == "out" or not r.isidentifier()), None)
    if wrong is not None:
        return f"'{wrong}' is no name for an argument", "name its arguments as target rows do: x, y, weight, bias"
    if commutes and len(roles) != 2:
        return f"it commutes, but has the roles {', '.join(roles)}", "name its two operands: roles=('x', 'y')"
    if onnx is not None and (not callable(onnx) or hasattr(onnx, "to_function_proto")) and not isinstance(onnx, OnnxOp):
        todo = "give a plain function (without @script) over onnxscript operations, or a qatgraph.OnnxOp"
        return f"its ONNX form is {type(onnx).__name__}", todo
    return None


def _refused(name: str, why: str, todo: str) -> PassError:
    return PassError("QG220", f"'{name}' cannot be registered", where="register_operation", why=why, todo=todo)
