"""Decoders: language models of two layers, width 32, four heads.

A layer as in Llama holds 1 attention, 2 RMSNorms, 1 SiLU and 7 linears (query, key, value, out, gate, up, down);
a final norm and the head (a linear) follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import transformers
from torch import Tensor, nn

from qatgraph.ir.graph import Batch
from tests.models import LENGTH, floats, tokens
from tests.zoo.encoders import SIZE
from tests.zoo.entry import NONE, Counts, Entry

LLAMA = Counts(attention=2, norms=5, activations=2, linears=15)
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def text(seed: int) -> Batch:
    return {"input_ids": tokens(2, 8, seed)}


def causal(name: str, **options: Any) -> nn.Module:
    """``<name>ForCausalLM`` of transformers at tiny size."""
    settings = {**SIZE, "num_key_value_heads": 2, "use_cache": False, **options}
    config = getattr(transformers, settings.pop("config", f"{name}Config"))(**settings)
    cls = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    model: nn.Module = cls(config)
    return model


def decoder(
    name: str, counts: Counts, gaps: Counts = NONE, why: str = "", *, moving: bool = False, **options: Any
) -> Entry:
    dynamic = {"input_ids": LENGTH} if moving else {}
    return Entry(lambda: causal(name, **options), text, dynamic, counts=counts, gaps=gaps, why=why)


class Step(nn.Module):
    """One token with the keys and values of those before it: both go in and come out as tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache = transformers.DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return out.logits, [t for layer in cache.layers for t in (layer.keys, layer.values)]


def step(heads: int) -> Callable[[int], Batch]:
    return lambda seed: {
        "input_ids": tokens(2, 1, seed),
        "past": [floats(2, heads, 5, 8, seed=seed + i) for i in range(4)],
    }


DECODERS: dict[str, Entry] = {
    # one projection for query, key and value
    "gpt2": decoder("GPT2", Counts(2, 5, 2, 9), **GPT2),
    "gpt2-dynamic": decoder("GPT2", Counts(2, 5, 2, 9), moving=True, **GPT2),
    "gpt2-step": Entry(lambda: Step(causal("GPT2", **GPT2)), step(4), counts=Counts(2, 5, 2, 9)),
    "gpt-neo": decoder(
        "GPTNeo",
        Counts(2, 5, 2, 13),
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    # attention and feed-forward network read one norm
    "gptj": decoder("GPTJ", Counts(2, 3, 2, 13), rotary_dim=4, **GPT2),
    "gpt-neox": decoder("GPTNeoX", Counts(2, 5, 2, 9)),
    "opt": decoder("OPT", Counts(2, 5, 2, 13), ffn_dim=37, word_embed_proj_dim=32),
    "bloom": decoder("Bloom", Counts(2, 6, 2, 9), n_layer=2, n_head=4),  # and a norm of the embeddings
    "falcon": decoder("Falcon", Counts(2, 3, 2, 9), num_kv_heads=2),  # one head of key and value for all queries
    "llama": decoder("Llama", LLAMA),
    "llama-dynamic": decoder("Llama", LLAMA, moving=True),
    "llama-decomposed": replace(decoder("Llama", LLAMA), decomposed=True),
    "llama-eager": decoder("Llama", LLAMA, attn_implementation="eager"),
    "llama-step": Entry(lambda: Step(causal("Llama")), step(2), counts=LLAMA),
    "mistral": decoder("Mistral", LLAMA, sliding_window=4),
    "granite": decoder("Granite", LLAMA),
    "smollm3": decoder("SmolLM3", LLAMA, pad_token_id=0),
    "stablelm": decoder("StableLm", LLAMA),
    "qwen2": decoder("Qwen2", LLAMA),
    # norms of query and key
    "qwen3": decoder("Qwen3", LLAMA + Counts(norms=4), head_dim=8),
    "olmo2": decoder("Olmo2", LLAMA + Counts(norms=4)),
    # norms also behind attention and feed-forward network; the last logits are capped by a tanh, those of attention too
    "gemma": decoder("Gemma", LLAMA, head_dim=8),
    "gemma2": decoder(
        "Gemma2",
        LLAMA + Counts(norms=4, activations=3),
        Counts(attention=2),
        "the scores are scaled, then capped",
        head_dim=8,
        sliding_window=4,
    ),
    "gemma3": decoder("Gemma3", LLAMA + Counts(norms=8), config="Gemma3TextConfig", head_dim=8, sliding_window=4),
    # gate and up are one linear
    "glm4": decoder("Glm4", LLAMA + Counts(norms=4, linears=-2), head_dim=8, pad_token_id=0),
    "phi": decoder("Phi", Counts(2, 3, 2, 13)),
    "phi3": decoder("Phi3", Counts(2, 5, 2, 9), pad_token_id=0),
    "cohere": decoder("Cohere", Counts(2, 3, 2, 15)),
    "starcoder2": decoder("Starcoder2", Counts(2, 5, 2, 13)),
    # for the feed-forward network a router (a linear), and experts that are one product over a stack of weights
    "mixtral": decoder(
        "Mixtral",
        LLAMA + Counts(linears=-4),
        intermediate_size=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        experts_implementation="batched_mm",
    ),
    # a layer: four linears, a depthwise convolution, two SiLU and a softplus
    "mamba": decoder(
        "Mamba",
        Counts(0, 3, 6, 9, 2),
        Counts(linears=2),
        "the time step is projected as weight @ x",
        state_size=4,
        use_mambapy=False,
    ),
}
