"""Small bases of other shapes than the embedded one: widths, depths, vocabularies and lengths of pre-training.

A forecast that is fitted on one model learns that model. These are quick to make (5 to 30 s each on an idle core), know
little, and are kept in the benchmark's folder.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from corpus import load
from pretrain_base import choose_never_trained, collate, loss_of, text_rows, train_tokenizer

_LONGEST, _BATCH = 48, 12


@dataclass(frozen=True)
class Shape:
    """A base.

    Attributes:
        width: of its rows.
        layers: of its body.
        rows: of its vocabulary.
        steps: of its pre-training.
        rate: highest learning rate of it.
        heads: of its attention.
    """

    width: int
    layers: int
    rows: int
    steps: int
    rate: float = 3e-3
    heads: int = 4


SHAPES = {
    "w64": Shape(64, 1, 4096, 300),
    "w96": Shape(96, 3, 2048, 400),
    "w160": Shape(160, 2, 6144, 160),
    "w256": Shape(256, 2, 2048, 250, rate=1.5e-3),
    "w48": Shape(48, 2, 8192, 240, heads=3),
    "w320": Shape(320, 1, 3072, 150, rate=2e-3, heads=5),
}
"""By name."""


def base_of(name: str, folder: Path) -> tuple[Any, Any]:
    """A base and its tokenizer; made and kept at the first call."""
    kept = folder / "bases" / name
    if not (kept / "config.json").exists():
        corpus = load("train")
        tokenizer = train_tokenizer(corpus, SHAPES[name].rows)
        tokenizer.save_pretrained(kept)
        pretrained(SHAPES[name], tokenizer, corpus).save_pretrained(kept)
    return AutoModelForCausalLM.from_pretrained(kept), AutoTokenizer.from_pretrained(kept)


def pretrained(shape: Shape, tokenizer: Any, corpus: Any) -> LlamaForCausalLM:
    """A model trained on the texts of all languages; its two matrices are one while it learns, and apart at the end."""
    torch.manual_seed(0)
    rng = Random(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.rows, hidden_size=shape.width, intermediate_size=3 * shape.width,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, max_position_embeddings=512,
            tie_word_embeddings=True, bos_token_id=None, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 50, 1.0) * max(0.02, min(1.0, 1.6 * (1 - s / shape.steps)))
    )
    texts = text_rows(tokenizer, corpus, _LONGEST, set(choose_never_trained(tokenizer, corpus)))
    for _ in range(shape.steps):
        loss = loss_of(model, *collate(rng.choices(texts, k=_BATCH)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model
