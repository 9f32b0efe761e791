"""Convolutional networks. Batch norms are folded, so none of them is a norm that stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.zoo.entry import Counts, Entry
from tests.zoo.vision import RESNET, vision

STAGES: dict[str, Any] = {"hidden_sizes": [16, 32], "depths": [1, 1]}

CONVOLUTIONAL: dict[str, Entry] = {
    # the stem; two layers of 2 convolutions and 2 ReLU (3 and 3 in a bottleneck); a shortcut
    "resnet": vision("ResNet", Counts(activations=5, convs=6), layer_type="basic", **RESNET),
    "resnet-dynamic": vision(
        "ResNet", Counts(activations=5, convs=6), layer_type="basic", moving="pixel_values", **RESNET
    ),
    "resnet-decomposed": replace(
        vision("ResNet", Counts(activations=5, convs=6), layer_type="basic", **RESNET), decomposed=True
    ),
    "resnet-bottleneck": vision("ResNet", Counts(activations=7, convs=8), layer_type="bottleneck", **RESNET),
    # the stem, 13 times depthwise and pointwise
    "mobilenet-v1": vision(
        "MobileNetV1", Counts(activations=27, convs=27), depth_multiplier=0.25, image_size=32, min_depth=8
    ),
    # 3 in the stem, 16 times 3, the last; no activation behind a projection
    "mobilenet-v2": vision("MobileNetV2", Counts(activations=35, convs=52), depth_multiplier=0.25, image_size=32),
    # the stem, two blocks (the first does not expand) with 2 of squeeze and excite, the top
    "efficientnet": vision(
        "EfficientNet",
        Counts(activations=9, convs=11),
        width_coefficient=0.25,
        depth_coefficient=0.25,
        image_size=32,
        hidden_dim=320,
        kernel_sizes=[3, 3],
        in_channels=[8, 16],
        out_channels=[16, 16],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 4],
    ),
    # the stem, two layers of 3 and 2 of squeeze and excite, two shortcuts
    "regnet": vision("RegNet", Counts(activations=11, convs=13), embedding_size=16, groups_width=8, **STAGES),
    # the stem and a norm, a depthwise convolution and 2 linears in each block, a norm and a convolution between them
    "convnext": vision("ConvNext", Counts(0, 5, 2, 4, 4), num_stages=2, **STAGES),
    "convnextv2": vision("ConvNextV2", Counts(0, 5, 2, 4, 4), num_stages=2, **STAGES),
    # pooling for attention, linears as convolutions
    "poolformer": vision(
        "PoolFormer",
        Counts(0, 4, 2, 0, 6),
        num_encoder_blocks=2,
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        **STAGES,
    ),
    # a layer: 2 depthwise convolutions and a pointwise one, 4 linears, 4 GELU
    "focalnet": vision(
        "FocalNet",
        Counts(0, 7, 8, 8, 8),
        image_size=32,
        embed_dim=16,
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        **STAGES,
    ),
}
