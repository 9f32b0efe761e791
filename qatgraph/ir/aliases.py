"""Which operations write into a value, and which values share its memory."""

from __future__ import annotations

import torch
from torch import fx

# Their results may be views of their first input: https://docs.pytorch.org/docs/stable/tensor_view.html
VIEWS = frozenset({
    "alias", "chunk", "contiguous", "detach", "diagonal", "expand", "expand_as", "flatten", "getitem", "movedim",
    "narrow", "permute", "reshape", "reshape_as", "select", "slice", "split", "split_with_sizes", "squeeze", "swapaxes",
    "t", "to", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as", "_unsafe_view",
})  # fmt: skip
BUFFER_WRITE = "copy_"  # the new value of a buffer, at the end of the program


def writes(node: fx.Node) -> bool:
    """Whether the operation writes into its first input, as ``relu_`` does."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable) and operator_name(node) != "detach_"


def writes_apart(node: fx.Node) -> bool:
    """Whether a write may be taken for the computation of a new value: nothing else shares its memory."""
    target = node.args[0]
    if not isinstance(target, fx.Node) or target.op != "call_function" or _is_view(target):
        return False
    return not any(_is_view(user) for user in target.users)


def draws(node: fx.Node) -> bool:
    """Whether the operation draws random numbers, or gives memory that nobody has written."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or operator_name(node).startswith("empty")


def operator_name(node: fx.Node) -> str:
    """``aten.relu_.default`` -> ``relu_``."""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) == 3 else getattr(node.target, "__name__", str(node.target))


def _is_view(node: fx.Node) -> bool:
    return operator_name(node) in VIEWS
