"""What a fine-tune did: validation loss, recall of every live token in the held-out templates, an arm's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from copying import HELD_OUT_TEMPLATES, chat_row
from corpus import load
from finetune import LONGEST_CHAT, collator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vocabguard.measure.probe import probe, retained, said
from vocabguard.prompts import render_context
from vocabguard.results import EXPOSURE_CLASSES, CheckResult, ProbeResult
from vocabguard.vocabulary import VocabTable

LIST_LENGTH = 16
SEED = 7


@torch.no_grad()
def validation_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean cross entropy in nats of the answers in the held-out English chats."""
    rows = [chat_row(tokenizer, chat, LONGEST_CHAT) for chat in load("validation").english()]
    total, targets = 0.0, 0
    for start in range(0, len(rows), 32):
        batch = collator(tokenizer)(rows[start : start + 32])
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * count
        targets += count
    return total / targets


def recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: VocabTable) -> ProbeResult:
    """Every live token asked back in the held-out templates."""
    contexts = [
        render_context(tokenizer, f"held_out_{number}", template.replace("{list}", "{tokens}"), LIST_LENGTH)
        for number, template in enumerate(HELD_OUT_TEMPLATES)
    ]
    return probe(model, table.live.nonzero().flatten(), contexts, seed=SEED, batch_tokens=8192)


def parts(table: VocabTable, classes: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(V,) bool masks of the groups with live tokens and of the exposure classes."""
    groups = {name: table.mask(name) & table.live for name in table.names}
    return (
        {name: mask for name, mask in groups.items() if bool(mask.any())},
        {name: (classes == index) & table.live for index, name in enumerate(EXPOSURE_CLASSES)},
    )


NO_ECHO = {"dose": 0.0, "targets_per_live_token": 0.0}
UNMOVED = {"cosine_mean": 1.0, "cosine_min": 1.0, "residual_p01": 1.0, "below_0.95": 0.0, "below_0.90": 0.0}
"""A base against itself."""


def base_entry(asked: ProbeResult, table: VocabTable, classes: Tensor, val_loss: float) -> dict[str, Any]:
    """The base model's part of the JSON: its recall, under the key that arms use for what they retained.

    Args:
        asked: the base's recall.
        table: groups and live rows.
        classes: (V,) uint8, the exposure classes that the fine-tune's data made.
        val_loss: in nats.
    """
    right = torch.zeros(len(table), dtype=torch.bool)
    right[asked.ids] = said(asked)
    share = {
        kind: {name: float(right[mask].float().mean()) for name, mask in masks.items() if bool(mask.any())}
        for kind, masks in zip(("groups", "classes"), parts(table, classes), strict=True)
    }
    return {
        "head": UNMOVED | {kind: dict.fromkeys(names, UNMOVED) for kind, names in share.items()},
        "retained": {"all": float(right[table.live].float().mean()), **share},
        "val_loss": val_loss,
        "echo": NO_ECHO,
        "wall_seconds": 0.0,
    }


def arm_entry(
    last: CheckResult, base: ProbeResult, now: ProbeResult, table: VocabTable, val_loss: float, wall_seconds: float
) -> dict[str, Any]:
    """One arm's part of the JSON."""
    groups, classes = parts(table, last.classes)
    head = _head_numbers(last.scalars, groups, classes)
    return {
        "head": head,
        "retained": {
            "all": retained(base, now),
            "groups": {name: retained(base, now, mask[now.ids]) for name, mask in groups.items()},
            "classes": {name: retained(base, now, mask[now.ids]) for name, mask in classes.items()},
        },
        "tokens": {
            "groups": {name: int(mask.sum()) for name, mask in groups.items()},
            "classes": {name: int(mask.sum()) for name, mask in classes.items()},
        },
        "val_loss": val_loss,
        "echo": NO_ECHO,
        "wall_seconds": wall_seconds,
    }


def _head_numbers(scalars: Mapping[str, float], groups: Any, classes: Any) -> dict[str, Any]:
    """The logged keys ``vocabguard/head/...`` as nested dicts."""
    prefix = "vocabguard/head/"
    flat = {key.removeprefix(prefix): value for key, value in scalars.items() if key.startswith(prefix)}
    head: dict[str, Any] = {key: value for key, value in flat.items() if "/" not in key}
    for kind, names in (("groups", groups), ("classes", classes)):
        head[kind] = {
            name: {key.removeprefix(f"{name}/"): value for key, value in flat.items() if key.startswith(f"{name}/")}
            for name in names
        }
    return head
