"""Models of images: transformers over patches, detectors.

A layer as in ViT holds 1 attention, 2 LayerNorms, 1 GELU and 6 linears; a convolution cuts the patches, a norm ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import transformers
from torch import Tensor, nn

from qatgraph.ir.graph import Batch
from tests.models import BATCH, floats
from tests.zoo.entry import NONE, Counts, Entry

PATCHES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 30,
    "patch_size": 10,
}
BODY = Counts(attention=2, norms=5, activations=2, linears=12, convs=1)
POOLER = Counts(activations=1, linears=1)
WINDOWS: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 32,
    "patch_size": 4,
}
PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
}  # fmt: skip
RESNET: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}


def image(size: int) -> Callable[[int], Tensor]:
    return lambda seed: floats(2, 3, size, size, seed=seed)


def vision(
    name: str, counts: Counts, gaps: Counts = NONE, why: str = "", *, size: int = 32, head: str = "Model",
    moving: str = "", **options: Any,
) -> Entry:  # fmt: skip
    """``<name><head>`` of transformers; ``moving`` names the input whose batch moves."""

    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**options)
        model: nn.Module = getattr(transformers, f"{name}{head}")(config)
        return model

    return Entry(make, image(size), {moving: BATCH} if moving else {}, counts=counts, gaps=gaps, why=why)


def patches(name: str, more: Counts, **options: Any) -> Entry:
    return vision(name, BODY + more, size=30, **{**PATCHES, **options})


def masked_autoencoder() -> Entry:
    """ViT-MAE, with the noise that chooses the patches as an input: an engine draws no random numbers."""

    def inputs(seed: int) -> Batch:
        return {"pixel_values": floats(2, 3, 30, 30, seed=seed), "noise": floats(2, 9, seed=seed + 100)}

    return Entry(patches("ViTMAE", Counts()).make, inputs, counts=BODY)


def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(**RESNET, layer_type="basic", out_features=["stage2"])
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=37,
        decoder_ffn_dim=37, num_queries=5, num_labels=3,
    )  # fmt: skip
    model: nn.Module = transformers.DetrForObjectDetection(config)
    return model


VISION: dict[str, Entry] = {
    "vit": patches("ViT", POOLER),
    "vit-dynamic": patches("ViT", POOLER, moving="pixel_values"),
    "vit-decomposed": replace(patches("ViT", POOLER), decomposed=True),
    "deit": patches("DeiT", POOLER),
    "beit": patches("Beit", Counts(), use_relative_position_bias=True),
    "dinov2": patches("Dinov2", Counts()),
    "vit-mae": masked_autoencoder(),
    # two stages of one layer: a norm behind the patches, a norm and a linear between the stages
    "swin": vision("Swin", Counts(2, 7, 2, 13, 1), **WINDOWS),
    # two linears, a ReLU and a sigmoid more in each layer compute the position bias
    "swinv2": vision(
        "Swinv2", Counts(2, 7, 6, 17, 1), Counts(attention=2), "the scores are scaled by a parameter", **WINDOWS
    ),
    # attention over a shortened sequence: a convolution and a norm in the first stage
    "segformer": vision(
        "Segformer", Counts(2, 9, 2, 12, 5), sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], **PYRAMID
    ),
    "pvt": vision(
        "Pvt",
        Counts(2, 8, 2, 12, 3),
        image_size=32,
        sequence_reduction_ratios=[2, 1],
        patch_sizes=[4, 2],
        strides=[4, 2],
        **PYRAMID,
    ),
    # three stages, and two subsampling attentions between them: 2 + 2 and 3 + 2 linears; batch norms go
    "levit": vision(
        "Levit",
        Counts(5, 0, 13, 22, 4),
        size=64,
        image_size=64,
        hidden_sizes=[16, 32, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    # 7 inverted residuals, 9 layers of attention in 3 blocks
    "mobilevit": vision(
        "MobileViT",
        Counts(9, 21, 34, 54, 35),
        size=64,
        image_size=64,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        num_attention_heads=2,
        initializer_range=0.2,  # else fifty layers in a row leave nothing of the input
    ),
    # additive attention without softmax: five products with weights in each of four blocks
    "swiftformer": vision(
        "SwiftFormer", Counts(0, 0, 10, 20, 25), size=64, depths=[1, 1, 1, 1], embed_dims=[16, 16, 32, 32]
    ),
    # two heads of three linears: classes and boxes
    "yolos": vision(
        "Yolos",
        BODY + Counts(activations=5, linears=6),
        size=30,
        head="ForObjectDetection",
        num_detection_tokens=5,
        use_mid_position_embeddings=False,
        **{**PATCHES, "image_size": [30, 30]},
    ),
    # ResNet (6, 5), a projection, an encoder layer, a decoder layer and its norm, heads of 1 and 3 linears
    "detr": Entry(detr, image(64), counts=Counts(3, 6, 10, 20, 7)),
    # four layers, each of which is read out, resized and fused into a map of depth
    "dpt": vision(
        "DPT",
        Counts(4, 8, 24, 28, 33),
        head="ForDepthEstimation",
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        is_hybrid=False,
        **{**PATCHES, "image_size": 32, "patch_size": 16, "num_hidden_layers": 4},
    ),
}
