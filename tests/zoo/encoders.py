"""Text encoders: two layers, width 32, four heads.

A layer as in BERT holds 1 attention, 2 LayerNorms, 1 activation and 6 linears (query, key, value, out, up, down);
the embeddings hold 1 LayerNorm, the pooler a linear and a tanh.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from qatgraph.ir.graph import Batch
from tests.models import LENGTH, padded
from tests.zoo.entry import Counts, Entry

SIZE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,  # an odd sum length
    "max_position_embeddings": 64,
}
BODY = Counts(attention=2, norms=5, activations=2, linears=12)
POOLER = Counts(activations=1, linears=1)
MOVING = {"input_ids": LENGTH, "attention_mask": LENGTH}


def text(seed: int) -> Batch:
    return padded(2, 8, seed)


def encoder(
    name: str, counts: Counts, *, moving: bool = False, decomposed: bool = False, refused: str = "", **options: Any
) -> Entry:
    """``<name>Model`` of transformers at tiny size."""

    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**{**SIZE, **options})
        model: nn.Module = getattr(transformers, f"{name}Model")(config)
        return model

    return Entry(make, text, MOVING if moving else {}, decomposed, counts=counts, refused=refused)


DISENTANGLED: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
}

ENCODERS: dict[str, Entry] = {
    "bert": encoder("Bert", BODY + POOLER),
    "bert-dynamic": encoder("Bert", BODY + POOLER, moving=True),
    "bert-eager": encoder("Bert", BODY + POOLER, attn_implementation="eager"),
    "bert-decomposed": encoder("Bert", BODY + POOLER, decomposed=True),
    "roberta": encoder("Roberta", BODY + POOLER),
    "xlm-roberta": encoder("XLMRoberta", BODY + POOLER),
    "distilbert": encoder("DistilBert", BODY, dim=32, n_layers=2, n_heads=4, hidden_dim=37),
    # one layer that runs twice; the embeddings are projected from 16 to 32
    "albert": encoder("Albert", BODY + POOLER + Counts(linears=1), embedding_size=16),
    "electra": encoder("Electra", BODY + Counts(linears=1), embedding_size=16),
    "rembert": encoder("RemBert", BODY + POOLER + Counts(linears=1), input_embedding_size=16),
    "layoutlm": encoder("LayoutLM", BODY + POOLER),
    "mpnet": encoder("MPNet", BODY + POOLER),
    # the positions have a norm, and the key and query weights of each layer project them
    "deberta-v2": encoder(
        "DebertaV2",
        BODY + Counts(norms=1, linears=4),
        **DISENTANGLED,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_buckets=8,
    ),
    # one projection for query, key and value, two for the positions
    "deberta": encoder("Deberta", BODY, **DISENTANGLED),
    # a layer: one projection for query, key and value, one for up and gate; the first has no norm before its attention
    "modernbert": encoder(
        "ModernBert", Counts(2, 5, 2, 8), pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
    # its linears are convolutions of width 1
    "squeezebert": encoder("SqueezeBert", Counts(2, 5, 3, 1, 12), embedding_size=32, intermediate_size=64),
    # a layer: 2 + 2 more linears around a bottleneck and in a second feed-forward network, and no true norms
    "mobilebert": encoder(
        "MobileBert", Counts(2, 0, 5, 24), embedding_size=32, intra_bottleneck_size=32, num_feedforward_networks=2
    ),
    # a layer: half of the heads are convolutions, whose kernels two linears compute
    "convbert": encoder("ConvBert", Counts(2, 5, 2, 16, 4), embedding_size=32, conv_kernel_size=3, num_groups=1),
    # Fourier transforms for attention
    "fnet": encoder("FNet", Counts(0, 5, 3, 6)),
    "longformer": encoder("Longformer", BODY + POOLER, attention_window=4, refused="QG101"),
}
