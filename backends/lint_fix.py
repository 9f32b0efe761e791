"""The repairs of ``qatgraph audit --fix``: edits of a QDQ file after which it means exactly what it meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qatgraph.backends.lint import Lint, lint
from qatgraph.backends.lint_proof import Proof, prove
from qatgraph.backends.lint_rule import Finding
from qatgraph.backends.lint_structure import clampable, float_weights, tables
from qatgraph.backends.onnx_facts import Reader, between
from qatgraph.backends.onnx_file import CONVERSIONS, OnnxFile, attribute
from qatgraph.backends.qdq_onnx import write_atomically
from qatgraph.backends.stored_grids import StoredConstant, grid_of
from qatgraph.reference import Array, quantize

ROUNDS = 3  # one repair may bring another to light
TYPES = {"u8": np.uint8, "s8": np.int8}


class Editor:
    """One file under repair. Names in the file are those of before; what is new is named after the node it is for."""

    def __init__(self, model: Any) -> None:
        import onnx

        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(model)
        self.refresh()

    def refresh(self) -> None:
        """Read the file anew after an edit of its nodes."""
        self.file = OnnxFile(self.proto)

    def store(self, name: str, array: Array) -> str:
        """An initializer of this name, or of one like it that is free."""
        from onnx import numpy_helper

        taken = {i.name for i in self.proto.graph.initializer} | set(self.file.producers) | self.file.inputs
        free = (
            name if name not in taken else next(n for i in range(len(taken) + 1) if (n := f"{name}#{i}") not in taken)
        )
        self.proto.graph.initializer.append(numpy_helper.from_array(np.array(array, order="C"), free))
        return free

    def insert_behind(self, node: Any, new: Any) -> None:
        at = next(i for i, n in enumerate(self.proto.graph.node) if n is node or n.output[0] == node.output[0])
        self.proto.graph.node.insert(at + 1, new)

    def redirect(self, old: str, new: str) -> None:
        """Let everything that reads one value read another."""
        for node in self.proto.graph.node:
            for i, value in enumerate(node.input):
                if value == old:
                    node.input[i] = new

    def sweep(self) -> None:
        """Remove what nobody reads any more."""
        graph = self.proto.graph
        outputs = {o.name for o in graph.output}
        while True:
            read = {v for n in graph.node for v in n.input} | outputs
            dead = [n for n in graph.node if not any(o in read for o in n.output)]
            if not dead:
                break
            for node in dead:
                graph.node.remove(node)
        for tensor in [i for i in graph.initializer if i.name not in read]:
            graph.initializer.remove(tensor)
        known = {o for n in graph.node for o in n.output}
        for info in [v for v in graph.value_info if v.name not in known]:
            graph.value_info.remove(info)


def repair(model: Any, findings: Iterable[Finding]) -> Any:
    """A copy of the file in which everything that can be repaired exactly is."""
    nodes: dict[str, set[str]] = {}
    for finding in findings:
        if finding.fix:
            nodes.setdefault(finding.rule, set()).add(finding.node)
    editor = Editor(model)
    for rule, mend in FIXES.items():
        if rule in nodes:
            mend(editor, nodes[rule])
            editor.sweep()
            editor.refresh()
    return editor.proto


def own_constants(editor: Editor, labels: set[str]) -> None:
    """Every weight gets a zero point of its own. Those of activations stay shared: the engine joins equal quantizes."""
    for operation in Reader(editor.file).operations:
        if operation.weight is None:
            continue
        node = operation.weight.constant.dequantize
        zero = editor.file.constant(node.input[2]) if len(node.input) > 2 else None
        if zero is not None:
            node.input[2] = editor.store(f"{node.output[0]}/zero_point", zero)


def scalars(editor: Editor, labels: set[str]) -> None:
    """Every scale and zero point of one number becomes a scalar."""
    made: dict[str, str] = {}
    for node in (n for n in editor.file.nodes if n.op_type in CONVERSIONS):
        for i, value in list(enumerate(node.input))[1:]:
            array = editor.file.constant(value) if value else None
            if array is not None and array.shape == (1,):
                made[value] = made.get(value) or editor.store(f"{value}/scalar", array.reshape(()))
                node.input[i] = made[value]


def zero_points(editor: Editor, labels: set[str]) -> None:
    """Every 8-bit Q/DQ node without a zero point gets one of 0."""
    made: dict[tuple[str, str], str] = {}
    for node in editor.file.nodes:
        grid = grid_of(editor.file, node, 0) if node.op_type in CONVERSIONS else None
        if grid is None or grid.given or grid.scale is None or grid.dtype not in TYPES:
            continue
        key = (node.input[1], grid.dtype)
        zeros = np.zeros(grid.scale.shape, TYPES[grid.dtype])
        made[key] = made.get(key) or editor.store(f"{node.input[1]}/zero_point", zeros)
        inputs = [*node.input[:2], made[key]]
        del node.input[:]
        node.input.extend(inputs)


def one_quantize(editor: Editor, labels: set[str]) -> None:
    """What reads one of several equal quantizes reads the first."""
    for operation in (o for o in Reader(editor.file).operations if o.label in labels):
        first, *others = operation.result.quantizes
        for other in others:
            if other.grid.equals(first.grid) and other.node.input[0] == first.node.input[0] and not other.border:
                editor.redirect(other.node.output[0], first.node.output[0])


def sums(editor: Editor, labels: set[str]) -> None:
    """MatMul and Add of a bias become MatMul and Sum, and so does a Gemm without factors."""
    from onnx import helper

    for operation in [o for o in Reader(editor.file).operations if o.label in labels]:
        if operation.add is not None:
            operation.add.op_type = "Sum"
            continue
        node = operation.node
        if node.op_type != "Gemm" or operation.bias is None or operation.weight is None or not _plain_gemm(node):
            continue
        product, bias = f"{node.output[0]}/product", node.input[2]
        weight = _columns(editor, operation.weight.constant) if attribute(node, "transB", 0) else node.input[1]
        total = helper.make_node("Sum", [product, bias], [node.output[0]], f"{node.name}/Sum")
        new = helper.make_node("MatMul", [node.input[0], weight], [product], node.name)
        editor.insert_behind(node, total)
        editor.insert_behind(node, new)
        editor.proto.graph.node.remove(node)


def _plain_gemm(node: Any) -> bool:
    return attribute(node, "alpha", 1.0) == 1.0 == attribute(node, "beta", 1.0) and not attribute(node, "transA", 0)


def _columns(editor: Editor, constant: StoredConstant) -> str:
    """A dequantize of the transposed integers; the value that it gives."""
    from onnx import helper

    old, name = constant.dequantize, f"{constant.dequantize.output[0]}/columns"
    own = [editor.store(f"{name}/{i}", a) for i in old.input[1:] if (a := editor.file.constant(i)) is not None]
    axis = {} if constant.grid.axis is None else {"axis": 1 - constant.grid.axis}
    inputs = [editor.store(f"{name}/integers", constant.integers.T), *own]
    editor.insert_behind(old, helper.make_node("DequantizeLinear", inputs, [name], name, **axis))
    return name


def extremes(editor: Editor, labels: set[str]) -> None:
    """Relu becomes ``Max(x, 0)``, Clip becomes ``Min(Max(x, low), high)``."""
    from onnx import helper

    nodes = [o.result.activation for o in Reader(editor.file).operations if o.label in labels]
    for node in (n for n in nodes if n is not None):
        low, high = between(editor.file, node).bounds or (-np.inf, np.inf)
        value, result = node.input[0], node.output[0]
        steps = [(kind, bound) for kind, bound in (("Max", low), ("Min", high)) if np.isfinite(bound)]
        written = []
        for i, (kind, bound) in enumerate(steps):
            out = result if i == len(steps) - 1 else f"{result}/{kind}"
            operands = [value, editor.store(f"{result}/{kind}/bound", np.asarray(bound, np.float32))]
            written.append(helper.make_node(kind, operands, [out], f"{node.name}/{kind}"))
            value = out
        for new in reversed(written):
            editor.insert_behind(node, new)
        if written:
            editor.proto.graph.node.remove(node)


def lookups(editor: Editor, labels: set[str]) -> None:
    """DequantizeLinear(table) -> Gather becomes Gather(table) -> DequantizeLinear."""
    from onnx import helper

    for node, old in list(tables(editor.file)):
        if editor.file.label(node) not in labels:
            continue
        result, rows = node.output[0], f"{node.output[0]}/integers"
        new = helper.make_node("DequantizeLinear", [rows, *old.input[1:]], [result], f"{node.name}/DequantizeLinear")
        node.input[0], node.output[0] = old.input[0], rows
        editor.insert_behind(node, new)


def stored_integers(editor: Editor, labels: set[str]) -> None:
    """A float constant and its quantize become the integers."""
    for node, _ in list(float_weights(editor.file)):
        grid = grid_of(editor.file, node, len(editor.file.shape(node.input[0])))
        if editor.file.label(node) not in labels or grid.dtype not in TYPES or grid.scale is None:
            continue
        integers = StoredConstant(editor.file, node, grid, node).integers
        editor.redirect(node.output[0], editor.store(f"{node.output[0]}/integers", integers))


def single_pairs(editor: Editor, labels: set[str]) -> None:
    """A quantize behind a dequantize of the same grid gives what the dequantize took."""
    for node in editor.file.nodes:
        first = editor.file.producers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if first is None or first.op_type != "DequantizeLinear" or node.output[0] in editor.file.outputs:
            continue
        if grid_of(editor.file, first, 0).equals(grid_of(editor.file, node, 0)):
            editor.redirect(node.output[0], first.input[0])


def residual_sums(editor: Editor, labels: set[str]) -> None:
    """The addition in front of a LayerNormalization becomes a Sum."""
    for node in editor.file.nodes:
        if editor.file.label(node) in labels:
            add = editor.file.producers.get(node.input[0])
            if add is not None and add.op_type == "Add":
                add.op_type = "Sum"


def unsigned(editor: Editor, labels: set[str]) -> None:
    """Signed integers between a quantize and its dequantizes, and of constant operands, become unsigned.

    ``q + 128`` on a grid with ``z + 128`` is the same number. Integers at the border of the model stay as they are.
    """
    file, made = editor.file, dict[str, str]()
    for node in file.nodes:
        readers = file.readers.get(node.output[0], []) if node.op_type == "QuantizeLinear" else []
        inner = readers and all(r.op_type == "DequantizeLinear" for r in readers) and node.output[0] not in file.outputs
        if inner and file.constant(node.input[0]) is None and all(_shiftable(file, n) for n in (node, *readers)):
            for each in (node, *readers):
                _shift(editor, each, made)
    for operation in Reader(file).operations:
        for port in operation.ports if operation.label in labels else ():
            if port.constant is not None and port.constant.quantize is None and _shiftable(file, port.source):
                integers = port.constant.integers.astype(np.int16) + 128
                port.source.input[0] = editor.store(f"{port.source.output[0]}/unsigned", integers.astype(np.uint8))
                _shift(editor, port.source, made)


def _shiftable(file: OnnxFile, node: Any) -> bool:
    grid = grid_of(file, node, 0)
    return grid.dtype == "s8" and grid.given and grid.zero_point is not None


def _shift(editor: Editor, node: Any, made: dict[str, str]) -> None:
    """Nodes that share a zero point share the new one: the engine joins equal quantizes."""
    old = node.input[2]
    if old not in made:
        zero = editor.file.constant(old)
        assert zero is not None
        made[old] = editor.store(f"{old}/unsigned", (zero.astype(np.int16) + 128).astype(np.uint8))
    node.input[2] = made[old]
    for info in [v for v in editor.proto.graph.value_info if v.name in (node.output[0], node.input[0])]:
        editor.proto.graph.value_info.remove(info)  # its type is another now


def clamped_integers(editor: Editor, labels: set[str]) -> None:
    """Activation -> quantize becomes quantize -> Clip of the integers, unsigned ones, with which the engine fuses."""
    from onnx import helper

    file = editor.file
    for operation in [o for o in Reader(file).operations if o.label in labels and clampable(file, o)]:
        node, grid = operation.result.quantizes[0].node, operation.result.quantizes[0].grid
        assert grid.scale is not None
        assert grid.zero_point is not None
        integers, raw = node.output[0], f"{node.output[0]}/unclamped"
        made: dict[str, str] = {}
        for each in (node, *file.readers[integers]) if grid.dtype == "s8" else ():
            _shift(editor, each, made)
        bounds = [b.bounds for b in operation.result.inside if b.bounds is not None]
        low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
        zero = np.asarray(grid.unsigned.zero_point).reshape(()).astype(np.uint8)
        limits = quantize(np.asarray([low, high], np.float32), grid.scale.reshape(()), zero)
        stored = [editor.store(f"{integers}/{word}", q) for word, q in zip(("low", "high"), limits, strict=True)]
        node.input[0], node.output[0] = operation.result.value, raw
        clip = helper.make_node("Clip", [raw, *stored], [integers], f"{node.name}/Clip")
        editor.insert_behind(node, clip)


FIXES: dict[str, Callable[[Editor, set[str]], None]] = {
    "double-quantize": single_pairs,
    "two-quantizes": one_quantize,
    "float-weight": stored_integers,
    "bias-form": sums,
    "activation-behind": extremes,
    "activation-not-redundant": clamped_integers,
    "dequantized-table": lookups,
    "skip-layer-norm": residual_sums,
    "missing-zero-point": zero_points,
    "signed-fork": unsigned,
    "signed-move": unsigned,
    "scale-rank": scalars,
    "shared-zero-point": own_constants,
}


@dataclass(frozen=True)
class Repaired:
    """What ``fix`` wrote: what the linter says of it, how many findings are gone, and the proof."""

    after: Lint
    mended: int
    proof: Proof

    def changed(self, before: Lint) -> list[tuple[str, str, str]]:
        """The nodes whose kernels are others now, as (name, before, after)."""
        old, new = _by_node(before), _by_node(self.after)
        names = [n for n in dict.fromkeys((*old, *new)) if old.get(n) != new.get(n)]
        return [(n, old.get(n, "-"), new.get(n, "-")) for n in names]

    def as_json(self) -> dict[str, Any]:
        return {"mended": self.mended, "after": self.after.as_json(), "proof": self.proof.as_json()}


def fix(model: Any, found: Lint, path: Path) -> Repaired:
    """Repair what can be repaired exactly, prove it, and write the file whole or not at all.

    Raises:
        LowerError: QG504 the folder does not take it, QG513 the file runs on no random input, QG514 the repaired file
            does not compute the same; then nothing is written.
    """
    after, again = model, found
    for _ in range(ROUNDS):
        if any(f.fix for f in again.findings):
            after = repair(after, again.findings)
            again = lint(after)
    proof = prove(model, after)
    write_atomically(path, bytes(after.SerializeToString()))
    left = {(f.rule, f.node) for f in again.findings}
    return Repaired(again, len({(f.rule, f.node) for f in found.findings if f.fix} - left), proof)


def _by_node(found: Lint) -> dict[str, str]:
    kernels: dict[str, list[str]] = {}
    for kernel in found.kernels:
        kernels.setdefault(kernel.name, []).append(kernel.kernel)
    return {name: ", ".join(sorted(k)) for name, k in kernels.items()}
