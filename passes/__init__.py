"""The built-in passes (one a file) and the pipelines, on one page."""

from __future__ import annotations

# name -> class; the module is the name with underscores
BUILTIN: dict[str, str] = {
    # rewrites, in the order in which they run
    "functionalize-in-place": "FunctionalizeInPlace",
    "remove-no-ops": "RemoveNoOps",
    "recompose-layers": "RecomposeLayers",
    "restore-dropout": "RestoreDropout",
    "merge-equal-operations": "MergeEqualOperations",
    "fold-constants": "FoldConstants",
    "normalize-reductions": "NormalizeReductions",
    "fold-global-pool": "FoldGlobalPool",
    "fold-powers": "FoldPowers",
    "fold-split": "FoldSplit",
    "fold-clamp": "FoldClamp",
    "fold-addmm": "FoldAddmm",
    "fold-matmul": "FoldMatmul",
    "fold-padding": "FoldPadding",
    "fold-batch-norm": "FoldBatchNorm",
    "fold-normalization": "FoldNormalization",
    "fold-layer-norm": "FoldLayerNorm",
    "fold-rms-norm": "FoldRmsNorm",
    "fold-softmax": "FoldSoftmax",
    "fold-safe-softmax": "FoldSafeSoftmax",
    "fold-gelu": "FoldGelu",
    "fold-silu": "FoldSilu",
    "fuse-quick-gelu": "FuseQuickGelu",
    "fuse-attention": "FuseAttention",
    "fuse-rotary": "FuseRotary",
    "fuse-linear-activation": "FuseLinearActivation",
    "fuse-conv-activation": "FuseConvActivation",
    "mark-residual-add": "MarkResidualAdd",
    "fuse-add-activation": "FuseAddActivation",
    # rewrites on request
    "fold-attention-scale": "FoldAttentionScale",
    "merge-query-key-value": "MergeQueryKeyValue",
    "equalize-layers": "EqualizeLayers",
    "scale-outliers": "ScaleOutliers",
    "keep-pruning-masks": "KeepPruningMasks",
    # planning
    "pin-layer-norm": "PinLayerNorm",
    "pin-rms-norm": "PinRmsNorm",
    "pin-group-norm": "PinGroupNorm",
    "pin-softmax": "PinSoftmax",
    "pin-attention": "PinAttention",
    "pin-small-embeddings": "PinSmallEmbeddings",
    "share-through-shape-ops": "ShareThroughShapeOps",
    "derive-bias": "DeriveBias",
}

CANONICALIZE: tuple[str, ...] = (
    "functionalize-in-place",
    "remove-no-ops",
    "recompose-layers",
    "restore-dropout",
    "merge-equal-operations",
    "fold-constants",
    "normalize-reductions",
    "fold-global-pool",
    "fold-powers",
    "fold-split",
    "fold-clamp",
    "fold-addmm",
    "fold-matmul",
    "fold-padding",
    "fold-batch-norm",
    "fold-normalization",
    "fold-layer-norm",
    "fold-rms-norm",
    "fold-softmax",
    "fold-safe-softmax",
    "fold-gelu",
    "fold-silu",
    "fuse-quick-gelu",
    "fuse-attention",
    "fuse-rotary",
    "fuse-linear-activation",
    "fuse-conv-activation",
    "mark-residual-add",
    "fuse-add-activation",
)

# What pays on some engines only: a pipeline names them, or `passes=` of plan and prepare.
ON_REQUEST: tuple[str, ...] = (
    "fold-attention-scale",
    "merge-query-key-value",
    "equalize-layers",
    "scale-outliers",
    "keep-pruning-masks",
)

PLANNING: tuple[str, ...] = (
    "pin-layer-norm",
    "pin-rms-norm",
    "pin-group-norm",
    "pin-softmax",
    "pin-attention",
    "pin-small-embeddings",
    "share-through-shape-ops",
    "derive-bias",
)

PIPELINES: dict[str, tuple[str, ...]] = {"canonicalize": CANONICALIZE, "plan": PLANNING}
