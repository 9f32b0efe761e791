"""The built-in passes (one a file) and the pipelines, on one page."""

from __future__ import annotations

# name -> class; the module is the name with underscores
BUILTIN: dict[str, str] = {
    # rewrites
    "remove-no-ops": "RemoveNoOps",
    "restore-dropout": "RestoreDropout",
    "fold-addmm": "FoldAddmm",
    "fold-gelu": "FoldGelu",
    "fuse-linear-activation": "FuseLinearActivation",
    "mark-residual-add": "MarkResidualAdd",
    # planning
    "pin-layer-norm": "PinLayerNorm",
    "pin-softmax": "PinSoftmax",
    "pin-attention": "PinAttention",
    "pin-small-embeddings": "PinSmallEmbeddings",
    "share-through-shape-ops": "ShareThroughShapeOps",
    "derive-bias": "DeriveBias",
}

CANONICALIZE: tuple[str, ...] = (
    "remove-no-ops",
    "restore-dropout",
    "fold-addmm",
    "fold-gelu",
    "fuse-linear-activation",
    "mark-residual-add",
)

PLANNING: tuple[str, ...] = (
    "pin-layer-norm",
    "pin-softmax",
    "pin-attention",
    "pin-small-embeddings",
    "share-through-shape-ops",
    "derive-bias",
)
