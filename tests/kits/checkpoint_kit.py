"""Small checkpoints on disk: real models and the embedded base with rows moved."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
ROWS, WIDTH = 96, 16


def llama(seed: int = 0, *, rows: int = ROWS, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A random causal language model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def nudged(model: Any, size: float = 0.02, seed: int = 5) -> Any:
    """The model with all its vocabulary rows moved a little, each differently far."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            reach = torch.rand(len(weight), 1, generator=generator)
            weight.add_((size * reach * torch.randn(weight.shape, generator=generator)).to(weight.dtype))
    return model


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def naive_cosine(now: Tensor, base: Tensor) -> Tensor:
    """Row by row, in float64."""
    now, base = now.detach().double(), base.detach().double()
    return torch.stack([(a @ b) / (a.norm() * b.norm()) for a, b in zip(now, base, strict=True)])


def assets_with(folder: Path, change: Any) -> Path:
    """A copy of the embedded base whose tensors `change` (a function of the dict) has worked on."""
    shutil.copytree(ASSETS, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shuffled_tokenizer(folder: Path, order: list[int]) -> None:
    """Renumber a folder's plain tokens: the id ``i`` becomes ``order[i]``."""
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    state["model"]["vocab"] = {piece: order[i] for piece, i in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = order[token["id"]]
    file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def kit() -> Any:
    """The helpers of this file, for tests that cannot import it."""
    return types.SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("_")})
