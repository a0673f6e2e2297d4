"""Modules that are proposed as vocabulary matrices, in models of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from vocabguard.rows.matrices import find_matrices
from vocabguard.rows.proposals import proposal, proposed


def names(model: nn.Module, tokens: int | None = None) -> tuple[list[str], list[str]]:
    found = proposed(model, tokens)
    return list(found["head"]), list(found["embedding"])


class Gpt(nn.Module):
    """Names and sizes as in litgpt: V is padded, the inner layer is wider than it, positions are learned."""

    def __init__(self, rows: int = 64, inner: int = 96, places: int = 128) -> None:
        super().__init__()
        self.lm_head = nn.Linear(8, rows, bias=False)
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(rows, 8), "wpe": nn.Embedding(places, 8),
            "h": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, inner), "proj": nn.Linear(inner, 8)})]),
        })  # fmt: skip


@pytest.mark.parametrize("tokens", [None, 50, 60, 64])
def test_the_head_and_the_inputs_and_not_positions_or_inner_layers(tokens: int | None) -> None:
    assert names(Gpt(), tokens) == (["lm_head"], ["transformer.wte"])
    assert names(nn.DataParallel(Gpt()), tokens) == (["lm_head"], ["transformer.wte"])


def test_one_of_the_two_alone() -> None:
    assert names(nn.ModuleDict({"words": nn.Embedding(50, 8), "score": nn.Linear(8, 2)})) == ([], ["words"])
    assert names(nn.ModuleDict({"out": nn.Linear(8, 50), "score": nn.Linear(8, 2)}), tokens=48) == (["out"], [])
    assert names(nn.ModuleDict({"score": nn.Linear(8, 2)})) == ([], [])


def test_many_are_few_in_words() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(50, 8)} | {f"out{n}": nn.Linear(8, 50) for n in range(9)})
    assert proposal(model, ("head",)).count(" or ") == 2
    assert proposal(model, ("head",)).endswith("out8 (Linear, 50 rows)")


def test_a_classifier_gets_no_proposal() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=60, intermediate_size=100, **sizes))
    found = find_matrices(model, tokens=60)["head"]
    assert "it may be" not in found.reason
