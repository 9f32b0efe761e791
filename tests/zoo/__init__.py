"""The zoo: tiny models of real architectures with random weights, and what is known of each."""

from __future__ import annotations

from tests.zoo.convolutional import CONVOLUTIONAL
from tests.zoo.decoders import DECODERS
from tests.zoo.diffusion import DIFFUSION
from tests.zoo.encoders import ENCODERS
from tests.zoo.entry import Entry
from tests.zoo.multimodal import MULTIMODAL
from tests.zoo.seq2seq import SEQ2SEQ
from tests.zoo.shapes import SHAPES
from tests.zoo.vision import VISION

GROUPS: dict[str, dict[str, Entry]] = {
    "encoders": ENCODERS,
    "decoders": DECODERS,
    "encoder-decoders": SEQ2SEQ,
    "images": VISION,
    "convolutions": CONVOLUTIONAL,
    "sound, and images with text": MULTIMODAL,
    "diffusion": DIFFUSION,
    "shapes of our own": SHAPES,
}
ZOO: dict[str, Entry] = {name: entry for group in GROUPS.values() for name, entry in group.items()}
