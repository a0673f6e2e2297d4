"""Tiny real models, a few batches and a hand-written loop, with or without a guard."""

from __future__ import annotations

import types
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
ROWS = 64
TOKENIZER_ROWS = 8192
QUIET: dict[str, Any] = {"log": {"console": False, "tensorboard": False}, "on_error": "raise"}


@pytest.fixture(scope="session", autouse=True)
def tables(shared_tables: None) -> None:
    """Guards share the table of the example's vocabulary."""


def llama(rows: int = ROWS, *, tied: bool = False, width: int = 16) -> Any:
    """A random causal language model."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=None, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


class Plain(nn.Module):
    """A model that only torch knows: no getters, no labels in forward."""

    def __init__(self, rows: int = ROWS, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(rows, 8)
        self.body = nn.Linear(8, 8)
        self.out = nn.Linear(8, rows, bias=False)
        if tied:
            self.out.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(self.words(ids))))


PLAIN = {"head": "out", "embedding": "words"}


def batches(count: int, rows: int = ROWS, seed: int = 0) -> list[dict[str, Tensor]]:
    """Three rows of six tokens a batch, some masked and padded; few tokens often, most never."""
    rng = Random(seed)
    found = []
    for _ in range(count):
        ids = torch.tensor([[int(rng.paretovariate(0.6)) % (rows // 2) + 3 for _ in range(6)] for _ in range(3)])
        labels, mask = ids.clone(), torch.ones_like(ids)
        for row in range(3):
            labels[row, : rng.randint(0, 3)] = -100
        labels[2, 4:], mask[2, 4:] = -100, 0
        found.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return found


def sgd(model: nn.Module, lr: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def loop(guard: Any, model: Any, optimizer: Any, data: list[dict[str, Tensor]], first: int = 1) -> list[float]:
    """The hand-written loop; `guard` may be None."""
    losses = []
    model.train()
    for step, batch in enumerate(data, start=first):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if guard is not None:
            guard.step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def naive_counts(data: list[dict[str, Tensor]], rows: int = ROWS) -> dict[str, list[int]]:
    """Targets, inputs and last step as a target, by plain loops; the model predicts the next token."""
    target, inputs, last = [0] * rows, [0] * rows, [-1] * rows
    for step, batch in enumerate(data, start=1):
        for line in range(len(batch["labels"])):
            for place, label in enumerate(batch["labels"][line].tolist()):
                if batch["attention_mask"][line, place]:
                    inputs[int(batch["input_ids"][line, place])] += 1
                if place > 0 and label != -100:
                    target[label] += 1
                    last[label] = step
    return {"data_target": target, "inputs": inputs, "last_target": last}


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def hooks_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Hooks left on the model and the optimizer."""
    return len(model._forward_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


@pytest.fixture
def kit() -> Any:
    """The helpers of this file, for tests that cannot import it."""
    return types.SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("_")})
