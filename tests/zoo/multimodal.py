"""Sound, and images with text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor, nn

from qatgraph.ir.graph import Batch
from tests.models import floats, padded
from tests.zoo.encoders import SIZE
from tests.zoo.entry import Counts, Entry
from tests.zoo.vision import BODY, PATCHES

WAVES: dict[str, Any] = {
    **SIZE,
    "conv_dim": [16, 16],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
TOWERS: dict[str, Any] = {"text_config": SIZE, "vision_config": PATCHES}
# two convolutions (the first with a norm), a norm and a projection, a convolution of positions, a norm, two layers
SPEECH = Counts(attention=2, norms=7, activations=5, linears=13, convs=3)


def model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))
        return made

    return make


def wave(seed: int) -> Tensor:
    return floats(2, 160, seed=seed)


def spectrogram(seed: int) -> Tensor:
    return floats(2, 24, 16, seed=seed)


def captioned(seed: int) -> Batch:
    return {**padded(2, 8, seed), "pixel_values": floats(2, 3, 30, 30, seed=seed)}


MULTIMODAL: dict[str, Entry] = {
    "wav2vec2": Entry(model("Wav2Vec2", **WAVES), wave, counts=SPEECH),
    "hubert": Entry(model("Hubert", **WAVES), wave, counts=SPEECH),
    # a linear and a sigmoid more in each layer gate the position bias
    "wavlm": Entry(model("WavLM", **WAVES), wave, counts=SPEECH + Counts(activations=2, linears=2)),
    # a norm behind both convolutions, and four convolutions of positions with a norm and a GELU each
    "data2vec-audio": Entry(
        model("Data2VecAudio", **WAVES), wave, counts=SPEECH + Counts(norms=5, activations=3, convs=3)
    ),
    "ast": Entry(
        model("AST", **{**PATCHES, "patch_size": 4}, max_length=24, num_mel_bins=16, frequency_stride=4, time_stride=4),
        spectrogram,
        counts=BODY,
    ),
    # two towers of two layers, the norm at the end of one, two norms around the other, two projections
    "clip": Entry(model("CLIP", projection_dim=16, **TOWERS), captioned, counts=Counts(4, 11, 4, 26, 1)),
    # a head of text (a linear), and one of images: an attention of 3 linears (key and value are one), a norm, an MLP
    "siglip": Entry(model("Siglip", **TOWERS), captioned, counts=Counts(5, 11, 5, 30, 1)),
    # query, key and value of the images are one linear; the text has a pooler
    "blip": Entry(model("Blip", projection_dim=16, **TOWERS), captioned, counts=Counts(4, 11, 5, 23, 1)),
    "vilt": Entry(model("Vilt", **{**SIZE, **PATCHES}), captioned, refused="QG101"),
}
