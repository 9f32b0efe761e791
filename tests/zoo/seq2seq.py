"""Encoder-decoders, and their halves.

An encoder layer holds 1 attention, 2 norms, 1 activation, 6 linears; a decoder layer 2, 3, 1 and 10.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from qatgraph.ir.graph import Batch
from tests.models import floats, tokens
from tests.zoo.entry import Counts, Entry

SIZE: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 2,
}
BODY = Counts(attention=6, norms=10, activations=4, linears=32)
T5: dict[str, Any] = {"d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}


def both(seed: int) -> Batch:
    return {"input_ids": tokens(2, 8, seed), "decoder_input_ids": tokens(2, 6, seed + 100)}


def pair(name: str, more: Counts, head: str = "Model", **options: Any) -> Entry:
    """``<name><head>`` of transformers at tiny size; ``more`` is what it has beside its layers."""

    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**{**SIZE, **options})
        model: nn.Module = getattr(transformers, f"{name}{head}")(config)
        return model

    return Entry(make, both, counts=BODY + more)


def whisper(part: str) -> nn.Module:
    """The encoder or the decoder alone."""
    from transformers.models.whisper import modeling_whisper

    config = transformers.WhisperConfig(**SIZE, num_mel_bins=8, max_source_positions=20, max_target_positions=64)
    model: nn.Module = getattr(modeling_whisper, f"Whisper{part}")(config)
    return model


SEQ2SEQ: dict[str, Entry] = {
    "t5": pair("T5", Counts(norms=2), **T5),
    "t5-gated": pair("T5", Counts(norms=2, linears=4), feed_forward_proj="gated-gelu", **T5),
    "bart": pair("Bart", Counts(norms=2)),
    "mbart": pair("MBart", Counts(norms=4)),
    "pegasus": pair("Pegasus", Counts(norms=2)),
    "marian": pair("Marian", Counts(linears=1), head="MTModel"),
    "m2m100": pair("M2M100", Counts(norms=2)),
    "blenderbot": pair("Blenderbot", Counts(norms=2)),
    "whisper-encoder": Entry(
        lambda: whisper("Encoder"), lambda seed: floats(2, 8, 40, seed=seed), counts=Counts(2, 5, 4, 12, 2)
    ),
    "whisper-decoder": Entry(
        lambda: whisper("Decoder"),
        lambda seed: {"input_ids": tokens(2, 6, seed), "encoder_hidden_states": floats(2, 20, 32, seed=seed)},
        counts=Counts(attention=4, norms=7, activations=2, linears=20),
    ),
}
