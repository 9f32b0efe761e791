"""What torch's ONNX exporter has to be told: forms of our operations, of attention, and of the users'."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from qatgraph.operators import DEQUANTIZE, DEQUANTIZE_BLOCKS, QUANTIZE, ROUND_DYNAMICALLY, TRANSLATIONS, OnnxOp

Table = dict[Callable[..., Any], Callable[..., Any]]


def translations(opset: int) -> Table:
    """The ``custom_translation_table`` of ``torch.onnx.export``."""
    op: Any = getattr(importlib.import_module("onnxscript"), f"opset{opset}")

    def quantize(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.QuantizeLinear(x, scale, zero_point)

    def dequantize(q: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        return op.DequantizeLinear(q, scale, zero_point, axis=axis)

    def round_dynamically(x: Any) -> Any:
        return op.DequantizeLinear(*op.DynamicQuantizeLinear(x))

    def dequantize_blocks(q: Any, scale: Any, block: int) -> Any:
        return op.DequantizeLinear(q, scale, axis=1, block_size=block)

    table: Table = {QUANTIZE: quantize, DEQUANTIZE: dequantize, ROUND_DYNAMICALLY: round_dynamically,
                    DEQUANTIZE_BLOCKS: dequantize_blocks}  # fmt: skip
    if opset >= 23:
        table[torch.ops.aten.scaled_dot_product_attention.default] = _attention(op)
    for overload, form in TRANSLATIONS.items():
        table[overload] = _one_node(overload, form, opset) if isinstance(form, OnnxOp) else form
    return table


def _attention(op: Any) -> Callable[..., Any]:
    """One Attention node. The exporter's own form refuses inputs without an axis of heads, and heads that broadcast."""

    def attention(
        query: Any, key: Any, value: Any, mask: Any = None, dropout: float = 0.0, causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        bare = len(query.shape) == 3
        if bare:
            query, key, value = (_with_heads(t, op) for t in (query, key, value))
            mask = mask if mask is None or len(mask.shape) < 3 else _with_heads(mask, op)
        mixed = op.Attention(query, key, value, attn_mask=mask, scale=scale, is_causal=causal)[0]
        return op.Squeeze(mixed, op.Constant(value_ints=[1])) if bare else mixed

    return attention


def _with_heads(value: Any, op: Any) -> Any:
    """``[batch, length, width]`` -> ``[batch, 1, length, width]``, with its shape, which the row's form asks for."""
    import onnx_ir as ir

    out = op.Unsqueeze(value, op.Constant(value_ints=[1]))
    out.shape = ir.Shape([value.shape[0], 1, *list(value.shape)[1:]])
    return out


def _one_node(overload: OpOverload, form: OnnxOp, opset: int) -> Callable[..., Any]:
    """A translation that writes one node: tensors are its inputs, other arguments attributes of their name."""
    from onnxscript import values

    arguments = overload._schema.arguments
    engine = values.Opset(form.domain, 1 if form.domain else opset)

    def translate(*args: Any, **kwargs: Any) -> Any:
        tensors: list[Any] = []
        attributes: dict[str, Any] = dict(form.attributes)
        for i, argument in enumerate(arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            if "Tensor" in str(argument.type):
                tensors += value if isinstance(value, (list, tuple)) else [value]
            elif value is not None:
                attributes[argument.name] = value
        schema = _schema(form.name, engine, len(overload._schema.returns), attributes)
        return values.Op(engine, form.name, schema)(*tensors, **attributes)

    return translate


def _schema(name: str, engine: Any, results: int, attributes: dict[str, Any]) -> Any:
    """What onnxscript wants to know of an operation, and onnx does not know of an engine's own domain."""
    from onnx.defs import OpSchema

    kinds = {
        **{bool: OpSchema.AttrType.INT, int: OpSchema.AttrType.INT},
        **{float: OpSchema.AttrType.FLOAT, str: OpSchema.AttrType.STRING},
    }
    lists = {int: OpSchema.AttrType.INTS, float: OpSchema.AttrType.FLOATS}

    def kind(value: Any) -> Any:
        return lists[type(value[0])] if isinstance(value, (list, tuple)) else kinds[type(value)]

    anything = OpSchema.FormalParameterOption.Variadic
    return OpSchema(
        name,
        engine.domain,
        engine.version,
        inputs=[OpSchema.FormalParameter("inputs", "T", param_option=anything, is_homogeneous=False, min_arity=0)],
        outputs=[OpSchema.FormalParameter(f"y{i}", "T") for i in range(results)],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(key, kind(value), "") for key, value in attributes.items()],
    )


def trace_inlined(onnx_program: Any) -> None:
    """Give back their fx node to what the exporter wrote as a function and put in line: only its text is left."""
    nodes = {n.name: n for n in onnx_program.exported_program.graph.nodes}
    for node in onnx_program.model.graph:
        text = re.match(r"%(\w+)", node.metadata_props.get("pkg.torch.onnx.fx_node", ""))
        if "node" not in node.meta and text is not None and text[1] in nodes:
            node.meta["node"] = nodes[text[1]]
