"""A tiny random model with the embedded tokenizer and chat template, and a few chats: what each client trains on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
WORDS = [
    "the",
    "a",
    "small",
    "model",
    "says",
    "word",
    "after",
    "word",
    "and",
    "then",
    "some",
    "more",
    "of",
    "it",
    "while",
    "rain",
    "falls",
    "on",
    "the",
    "quiet",
    "hill",
]


def chats(count: int, seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """Chats of one turn, of 3 to 60 words."""
    rng = Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))

    return [
        {"messages": [{"role": "user", "content": text(3, 20)}, {"role": "assistant", "content": text(20, 60)}]}
        for _ in range(count)
    ]


def write(folder: Path, count: int = 64) -> None:
    """``model/`` (8,192 rows x 32, one layer, random) and ``chats.jsonl`` below a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    for one in ASSETS.iterdir():
        if one.name != "model.safetensors":
            shutil.copy(one, model / one.name)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(ASSETS)
    config.update(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 1024}
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(model)
    lines = [json.dumps(one) for one in chats(count)]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
