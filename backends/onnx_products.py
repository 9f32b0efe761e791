"""How linears are written that are no Q/DQ around a product, and how their constants are read back.

Dynamic: DynamicQuantizeLinear, MatMulInteger and what makes its sums floats, which ONNX Runtime joins to
DynamicQuantizeMatMul. In blocks: MatMulNBits itself (docs/decisions/weights-in-blocks.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qatgraph.reference import Array

MICROSOFT = "com.microsoft"
IN_FLOAT = 1  # accuracy_level: activations stay float32


def pack_blocks(weight: Array, block: int, bits: int) -> Array:
    """Symmetric integers ``[N, K]`` as MatMulNBits holds them: ``[N, blocks, bytes]``, unsigned, the even one of two
    of 4 bits in the low half; the last block of a row ends in zeros."""
    padded = np.pad(weight.astype(np.int16), ((0, 0), (0, -weight.shape[1] % block)))
    unsigned = (padded + 2 ** (bits - 1)).astype(np.uint8).reshape(len(weight), -1, block)
    packed: Array = unsigned if bits == 8 else unsigned[..., 0::2] | unsigned[..., 1::2] << 4
    return packed


def unpack_blocks(packed: Array, k: int, bits: int) -> Array:
    """``[N, K]`` int8 of what ``pack_blocks`` packed; its zero point is the middle."""
    halves = packed[..., None] if bits == 8 else np.stack([packed & 15, packed >> 4], -1)
    whole: Array = (halves.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8).reshape(len(packed), -1)[:, :k]
    return whole


def product_of(nodes: list[Any]) -> tuple[Any, Any, Any]:
    """Of what the exporter wrote for a linear: the product, the dequantize of its weight, and the bias or None."""
    core = next(n for n in nodes if n.op_type in ("MatMul", "Gemm"))
    dequantize = core.inputs[1].producer()
    if dequantize.op_type == "Transpose":
        dequantize = dequantize.inputs[0].producer()
    add = next((n for n in nodes if n.op_type == "Add"), None)
    if add is not None:
        return core, dequantize, next(v for v in add.inputs if v.const_value is not None)
    return core, dequantize, core.inputs[2] if len(core.inputs) > 2 else None


def dynamic_nodes(core: Any, dequantize: Any, bias: Any, turned: Any) -> list[Any]:
    """What takes the place of a linear; ``turned`` is its weight ``[K, N]``."""
    import onnx_ir as ir

    stem = core.name.rpartition("/")[0]
    integers, scale, zero = core.inputs[0].producer().inputs
    product = ir.Node("", "MatMulInteger", [integers, turned, zero], name=f"{stem}/MatMulInteger")
    cast = ir.Node("", "Cast", product.outputs, {"to": ir.AttrInt64("to", ir.DataType.FLOAT)}, name=f"{stem}/Cast")
    unit = ir.Node("", "Mul", [scale, dequantize.inputs[1]], name=f"{stem}/Mul")
    last = ir.Node("", "Mul", [cast.outputs[0], unit.outputs[0]], name=f"{stem}/Mul#2")
    nodes = [product, cast, unit, last]
    if bias is None:
        return nodes
    op = "Sum" if bias.const_value.numpy().size == 1 else "Add"  # an Add of a single zero is dropped: then none fuses
    return [*nodes, ir.Node("", op, [last.outputs[0], bias], name=f"{stem}/Add")]


def block_node(core: Any, dequantize: Any, bias: Any, packed: Any, bits: int) -> Any:
    """What takes the place of a linear; ``packed`` is its weight."""
    import onnx_ir as ir

    n, k = dequantize.inputs[0].shape
    sizes = {"K": k, "N": n, "bits": bits, "block_size": dequantize.attributes["block_size"].as_int()}
    attributes = {key: ir.AttrInt64(key, value) for key, value in {**sizes, "accuracy_level": IN_FLOAT}.items()}
    inputs = [core.inputs[0], packed, dequantize.inputs[1], *([] if bias is None else [None, None, bias])]
    name = f"{core.name.rpartition('/')[0]}/MatMulNBits"
    return ir.Node(MICROSOFT, "MatMulNBits", inputs, attributes, name=name)


def constants_of(node: Any, constants: Mapping[str, Array], readers: Mapping[str, Any]) -> dict[str, tuple[Array, ...]]:
    """(integers, scale) of the weight of a MatMulInteger or MatMulNBits as they are written here, ``[N, K]``; empty
    of another. ``readers``: of each value the node that reads it, if one does."""
    if node.op_type == "MatMulNBits" and {*node.input[1:3]} <= constants.keys():
        sizes = {a.name: a.i for a in node.attribute}
        packed, scale = (constants[name] for name in node.input[1:3])
        shape = (sizes["N"], -(-sizes["K"] // sizes["block_size"]))
        return {"weight": (unpack_blocks(packed.reshape(*shape, -1), sizes["K"], sizes["bits"]), scale.reshape(shape))}
    if node.op_type == "MatMulInteger" and node.input[1] in constants:
        unit = _scale_behind(node, constants, readers)
        return {} if unit is None else {"weight": (constants[node.input[1]].T, unit)}
    return {}


def _scale_behind(node: Any, constants: Mapping[str, Array], readers: Mapping[str, Any]) -> Array | None:
    """The constant factor of ``s_x * s_w`` that the sums of a MatMulInteger meet."""
    cast = readers.get(node.output[0])
    if cast is None or cast.op_type != "Cast":
        return None
    product = readers.get(cast.output[0])
    if product is None or product.op_type != "Mul":
        return None
    writers = {o: n for n in readers.values() for o in n.output}
    unit = next((writers[v] for v in product.input if v != cast.output[0] and v in writers), None)
    return None if unit is None else next((constants[v] for v in unit.input if v in constants), None)
