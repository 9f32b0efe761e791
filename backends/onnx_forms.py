"""How the forms of a target's rows are written, each an edit of the exported model around one of our nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from qatgraph.backends.onnx_file import MOVES
from qatgraph.backends.onnx_products import MICROSOFT, block_node, dynamic_nodes, pack_blocks, product_of

# what ORT takes for an int8 operation where Q and DQ stand around it
PARTED = (
    "MatMul", "Gemm", "Conv", "ConvTranspose", "Add", "Mul", "Sigmoid", "LeakyRelu", "Softmax", "AveragePool",
    "GlobalAveragePool", "Concat", "Where",
)  # fmt: skip
PASSES = frozenset({*MOVES, "Identity"})  # what a quantize moves past, and what is removed before


def _as_matmul(model: Any, nodes: list[Any], bias: str) -> None:
    """DQ(w[N,K]) -> Transpose -> MatMul -> Add(b) becomes DQ(w[K,N]) -> MatMul -> Add(b of the wanted shape).

    At rank 2 and without a bias the exporter writes Gemm, which becomes the same.
    """
    matmul = next(n for n in nodes if n.op_type in ("MatMul", "Gemm"))
    dequantize = matmul.inputs[1].producer()
    if dequantize.op_type == "Transpose":
        dequantize = dequantize.inputs[0].producer()
    weight = dequantize.inputs[0]
    turned = np.ascontiguousarray(weight.const_value.numpy().T)
    dequantize.replace_input_with(0, initializer(model, f"{weight.name}/transposed", turned))
    if dequantize.inputs[1].shape.rank():
        dequantize.attributes["axis"] = _int_attribute("axis", 1)
    dequantize.outputs[0].shape = None
    matmul.replace_input_with(1, dequantize.outputs[0])
    if matmul.op_type == "Gemm":
        matmul.op_type, matmul.name = "MatMul", matmul.name.removesuffix("/Gemm") + "/MatMul"
        matmul.attributes.clear()
    if bias == "none":
        return
    add = _the(nodes, "Add")
    index = next(i for i, value in enumerate(add.inputs) if value.const_value is not None)
    vector = add.inputs[index]
    if vector.const_value.numpy().size == 1:
        add.op_type = "Sum"  # as Add ORT would drop a single zero (EliminateNoop), and what follows meets the product
    if bias == "row":
        rank = add.outputs[0].shape.rank()
        row = vector.const_value.numpy().reshape([1] * (rank - 1) + [-1])
        add.replace_input_with(index, initializer(model, f"{vector.name}/row{rank}", row))


def _as_dynamic(model: Any, nodes: list[Any], bias: str) -> None:
    core, dequantize, vector = product_of(nodes)
    weight = dequantize.inputs[0]
    turned = initializer(model, f"{weight.name}/transposed", np.ascontiguousarray(weight.const_value.numpy().T))
    _instead(model, core, nodes, dynamic_nodes(core, dequantize, vector, turned))


def _as_blocks(bits: int) -> Callable[[Any, list[Any], str], None]:
    def write(model: Any, nodes: list[Any], bias: str) -> None:
        core, dequantize, vector = product_of(nodes)
        weight, block = dequantize.inputs[0], dequantize.attributes["block_size"].as_int()
        packed = initializer(model, f"{weight.name}/packed", pack_blocks(weight.const_value.numpy(), block, bits))
        model.opset_imports[MICROSOFT] = 1
        _instead(model, core, nodes, [block_node(core, dequantize, vector, packed, bits)])

    return write


def _instead(model: Any, core: Any, nodes: list[Any], new: list[Any]) -> None:
    """Put other nodes in the place of a linear."""
    import onnx_ir as ir

    old = [n for n in nodes if n is core or n.op_type == "Add"]
    result, last = old[-1].outputs[0], new[-1].outputs[0]
    last.dtype, last.shape = result.dtype, result.shape
    ir.convenience.replace_nodes_and_values(model.graph, old[-1], old, new, [result], [last])


def _as_gather(model: Any, nodes: list[Any], bias: str) -> None:
    """Keep what only moves rows from the dequantize behind the look-up.

    ORT 1.32 moves an s8 dequantize behind such a node (QDQPropagation), where it makes it u8 (QDQS8ToU8), but not its
    ``output_dtype``: from opset 21 on it then refuses its own graph.
    """
    gather = _the(nodes, "Gather")
    dequantize = gather.outputs[0].uses()[0].node
    if any(use.node.op_type in PASSES for use in dequantize.outputs[0].uses()):
        _copy_behind(model, dequantize, gather)


def _as_sum(model: Any, nodes: list[Any], bias: str) -> None:
    add = _the(nodes, "Add")
    add.op_type = "Sum"
    add.name = add.name.removesuffix("/Add") + "/Sum"


def _as_max(model: Any, nodes: list[Any], bias: str) -> None:
    """Relu -> Max(x, 0)."""
    import onnx_ir as ir

    relu = _the(nodes, "Relu")
    name = relu.name.removesuffix("/Relu") + "/Max"
    zero = initializer(model, f"{name}/zero", np.zeros((), np.float32))
    new = ir.Node("", "Max", [relu.inputs[0], zero], num_outputs=1, name=name)
    new.outputs[0].dtype, new.outputs[0].shape = relu.outputs[0].dtype, relu.outputs[0].shape
    ir.convenience.replace_nodes_and_values(model.graph, relu, [relu], [new], relu.outputs, new.outputs)


def _as_min_max(model: Any, nodes: list[Any], bias: str) -> None:
    """Clip(x, low, high) -> Min(Max(x, low), high)."""
    import onnx_ir as ir

    clip = _the(nodes, "Clip")
    stem, (value, *bounds) = clip.name.removesuffix("/Clip"), clip.inputs
    new = []
    for op, bound in zip(("Max", "Min"), bounds, strict=False):
        if bound is not None:
            new.append(ir.Node("", op, [value, bound], num_outputs=1, name=f"{stem}/{op}"))
            value = new[-1].outputs[0]
            value.dtype, value.shape = clip.outputs[0].dtype, clip.outputs[0].shape
    ir.convenience.replace_nodes_and_values(model.graph, clip, [clip], new, clip.outputs, [value])


def _as_global_pool(model: Any, nodes: list[Any], bias: str) -> None:
    """The mean over the image -> GlobalAveragePool.

    Where channels lie last in memory, the exporter also writes how the result lies there: that goes.
    """
    import onnx_ir as ir

    mean = _the(nodes, "ReduceMean")
    if nodes[-1] is not mean:
        ir.convenience.replace_all_uses_with(nodes[-1].outputs[0], mean.outputs[0], replace_graph_outputs=True)
    mean.op_type, mean.name = "GlobalAveragePool", mean.name.removesuffix("/ReduceMean") + "/GlobalAveragePool"
    mean.resize_inputs(1)
    mean.attributes.clear()


def _as_average_pool(model: Any, nodes: list[Any], bias: str) -> None:
    """Count no padding where there is none: ORT would also count what the last window meets beyond the input."""
    pool = _the(nodes, "AveragePool")
    if "pads" not in pool.attributes or not any(pool.attributes["pads"].as_ints()):
        pool.attributes["count_include_pad"] = _int_attribute("count_include_pad", 0)


def _as_conv_pads(model: Any, nodes: list[Any], bias: str) -> None:
    """Pad -> Conv becomes a Conv with other pads at the two ends of an axis."""
    import onnx_ir as ir

    pad = _the(nodes, "Pad")
    (use,) = pad.outputs[0].uses()
    conv, axes = use.node, pad.outputs[0].shape.rank() - 2
    ends = pad.inputs[1].const_value.numpy()
    more = [*ends[2 : 2 + axes], *ends[-axes:]]
    own = conv.attributes["pads"].as_ints() if "pads" in conv.attributes else [0] * (2 * axes)
    conv.attributes["pads"] = ir.AttrInt64s("pads", [int(a + b) for a, b in zip(own, more, strict=True)])
    conv.replace_input_with(0, pad.inputs[0])


def _as_attention(model: Any, nodes: list[Any], bias: str) -> None:
    attention = _the(nodes, "Attention")
    _pack_heads(attention)
    _write_mask_out(model, attention)


def _pack_heads(attention: Any) -> None:
    """Attention over ``[batch, length, heads * width]``: drop the reshapes and transposes around it, if they are there.

    The kernel splits the heads itself; bit-equal, and 11 % of MiniLM's time (docs/decisions/attention-heads.md).
    """
    import onnx_ir as ir

    query, key, value = attention.inputs[:3]
    packed = [_packed(v) for v in (query, key, value)]
    merged = _reader(attention.outputs[0], "Transpose")
    joined = _reader(merged.outputs[0], "Reshape") if merged is not None else None
    if joined is None or joined.outputs[0].is_graph_output() or any(v is None for v in packed):
        return
    whole = [query.shape[0], query.shape[2], query.shape[1] * value.shape[3]]
    if not _same(joined.outputs[0].shape, whole) or list(merged.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return
    for name, split in (("q_num_heads", query), ("kv_num_heads", key)):
        attention.attributes[name] = ir.AttrInt64(name, split.shape[1])
    for i, source in enumerate(packed):
        attention.replace_input_with(i, source)
    attention.outputs[0].shape = joined.outputs[0].shape
    ir.convenience.replace_all_uses_with(joined.outputs[0], attention.outputs[0])


def _packed(value: Any) -> Any:
    """The ``[batch, length, heads * width]`` value behind Reshape -> Transpose(0, 2, 1, 3), or None."""
    transpose = value.producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    reshape = transpose.inputs[0].producer()
    if list(transpose.attributes["perm"].as_ints()) != [0, 2, 1, 3] or reshape is None or reshape.op_type != "Reshape":
        return None
    batch, heads, length, width = value.shape
    if not (isinstance(heads, int) and isinstance(width, int)):
        return None
    source = reshape.inputs[0]
    return source if _same(source.shape, [batch, length, heads * width]) else None


def _same(shape: Any, sizes: list[Any]) -> bool:
    """Whether all sizes are known and equal: a reshape may also cut the length into chunks, or join samples."""
    if shape is None or shape.rank() != len(sizes):
        return False
    return all(str(a) == str(b) != "None" for a, b in zip(shape, sizes, strict=True))


def _write_mask_out(model: Any, attention: Any) -> None:
    """Give a mask that is the same for all queries its rows: ORT's kernel refuses to broadcast it over them."""
    import onnx_ir as ir

    mask = attention.inputs[3] if len(attention.inputs) > 3 else None
    if mask is None or mask.shape[-2] != 1:
        return
    stem, axis = attention.name.removesuffix("/Attention"), attention.inputs[0].shape.rank() - 2
    ends = {"start": ir.AttrInt64("start", axis), "end": ir.AttrInt64("end", axis + 1)}
    length = ir.Node("", "Shape", attention.inputs[:1], ends, num_outputs=1, name=f"{stem}/Shape")
    one = initializer(model, f"{stem}/Concat/one", np.ones(1, np.int64))
    rows = ir.Node("", "Concat", [length.outputs[0], one], {"axis": ir.AttrInt64("axis", 0)}, name=f"{stem}/Concat")
    full = ir.Node("", "Expand", [mask, rows.outputs[0]], num_outputs=1, name=f"{stem}/Expand")
    model.graph.insert_before(attention, [length, rows, full])
    attention.replace_input_with(3, full.outputs[0])


def _reader(value: Any, op_type: str) -> Any:
    """The one node that reads the value, if it is of this type."""
    readers = list(value.uses())
    return readers[0].node if len(readers) == 1 and readers[0].node.op_type == op_type else None


def part_from_quantize(model: Any, owners: dict[str, list[Any]], names: Iterable[str]) -> None:
    """Put a ``Sum`` of one operand between a quantize and the node of a row that promises a float result.

    Between a dequantize and a quantize ORT takes a kernel that writes integers, and of a convolution, also a transposed
    one, and a Gemm it quantizes the float weight by itself (``weight_bias_quantization.cc``).
    """
    for node in [n for name in names for n in owners.get(name, ()) if n.op_type in PARTED]:
        sources = [v.producer() for v in node.inputs if v is not None]
        reads = any(s is not None and s.op_type == "DequantizeLinear" for s in sources)
        if reads and _meets_quantize(node.outputs[0]):
            _copy_behind(model, node, node)


def _copy_behind(model: Any, node: Any, owner: Any) -> None:
    """Let all that reads the result read a ``Sum`` of it alone, which no fusion of ORT's looks through."""
    import onnx_ir as ir

    result, name = node.outputs[0], f"{owner.name.rpartition('/')[0]}/Sum"
    copy = ir.Node("", "Sum", [result], num_outputs=1, name=name)
    copy.outputs[0].dtype, copy.outputs[0].shape = result.dtype, result.shape
    for reader, index in [use for use in result.uses() if use.node is not copy]:
        reader.replace_input_with(index, copy.outputs[0])
    model.graph.insert_after(node, copy)


def _meets_quantize(value: Any) -> bool:
    """Whether ORT finds a quantize behind the value; it moves one up past operations that only move elements."""
    readers = [use.node for use in value.uses()]
    through = {*PASSES, "Relu", "Clip"}
    return any(
        r.op_type == "QuantizeLinear" or (r.op_type in through and _meets_quantize(r.outputs[0])) for r in readers
    )


# How the forms of a target's rows are written; a form that is not here is what the exporter writes anyway.
FORMS: dict[str, Callable[[Any, list[Any], str], None]] = {
    "gather": _as_gather,
    "matmul": _as_matmul,
    "dynamic": _as_dynamic,
    "blocks-8": _as_blocks(8),
    "blocks-4": _as_blocks(4),
    "sum": _as_sum,
    "max": _as_max,
    "min-max": _as_min_max,
    "packed-heads": _as_attention,
    "global-pool": _as_global_pool,
    "average-pool": _as_average_pool,
    "conv-pads": _as_conv_pads,
}


def _the(nodes: list[Any], op_type: str) -> Any:
    return next(n for n in nodes if n.op_type == op_type)


def initializer(model: Any, name: str, array: np.ndarray[Any, Any]) -> Any:
    import onnx_ir as ir

    known = model.graph.initializers.get(name)
    if known is not None:
        return known
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    model.graph.initializers[name] = value
    return value


def _int_attribute(name: str, value: int) -> Any:
    import onnx_ir as ir

    return ir.AttrInt64(name, value)
