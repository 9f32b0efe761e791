"""Models of diffusers: what denoises, and what goes between images and latents.

A residual block holds 2 GroupNorms, 2 SiLU, 2 convolutions, a shortcut (a convolution) where the width changes, and in
a denoiser a linear of the time; the SiLU of the time is the same in all blocks, and counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from qatgraph.ir.graph import Batch
from tests.models import floats
from tests.zoo.entry import Counts, Entry

TINY: dict[str, Any] = {"sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


def model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = getattr(diffusers, name)(**options)
        return made

    return make


def times(seed: int) -> Tensor:
    return torch.tensor([10 + seed, 500])


def noisy(seed: int) -> Batch:
    return {"sample": floats(2, 3, 16, 16, seed=seed), "timestep": times(seed)}


def conditioned(seed: int) -> Batch:
    words = floats(2, 5, 32, seed=seed)
    return {"sample": floats(2, 4, 16, 16, seed=seed), "timestep": times(seed), "encoder_hidden_states": words}


def labelled(seed: int) -> Batch:
    labels = torch.tensor([1, seed])
    return {"hidden_states": floats(2, 4, 8, 8, seed=seed), "timestep": times(seed), "class_labels": labels}


def joint(seed: int) -> Batch:
    words, pooled = floats(2, 5, 16, seed=seed), floats(2, 16, seed=seed)
    latents = floats(2, 4, 8, 8, seed=seed)
    return {
        "hidden_states": latents, "encoder_hidden_states": words, "pooled_projections": pooled, "timestep": times(seed)
    }  # fmt: skip


DIFFUSION: dict[str, Entry] = {
    # 8 residual blocks (5 shortcuts), 4 attentions with a norm each, 2 linears of the time
    "unet2d": Entry(
        model(
            "UNet2DModel",
            **TINY,
            in_channels=3,
            out_channels=3,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        noisy,
        counts=Counts(4, 21, 19, 26, 25),
    ),
    # the same blocks; 4 transformers of 2 attentions, 4 norms, a gated GELU, 10 linears and 2 convolutions
    "unet2d-condition": Entry(
        model(
            "UNet2DConditionModel",
            **TINY,
            in_channels=4,
            out_channels=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        conditioned,
        counts=Counts(8, 33, 23, 50, 33),
    ),
    # 10 residual blocks (2 shortcuts), an attention with a norm on both sides
    "vae": Entry(
        model(
            "AutoencoderKL",
            **TINY,
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        lambda seed: floats(2, 3, 16, 16, seed=seed),
        counts=Counts(2, 24, 22, 8, 30),
    ),
    "vae-tiny": Entry(
        model(
            "AutoencoderTiny",
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        lambda seed: floats(2, 3, 16, 16, seed=seed),
        counts=Counts(activations=14, convs=18),
    ),
    # a block: 1 attention, 2 norms, 3 activations, 9 linears, 2 of them of the time, which the end takes of the first
    "dit": Entry(
        model(
            "DiTTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            norm_num_groups=1,
        ),
        labelled,
        counts=Counts(2, 5, 6, 20, 1),
    ),
    # a joint block: 1 attention over both streams, 3 norms, 11 linears
    "sd3": Entry(
        model(
            "SD3Transformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        joint,
        counts=Counts(1, 4, 4, 18, 1),
    ),
}
