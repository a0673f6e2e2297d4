"""What a fine-tune did: validation loss, recall of every live token in the held-out templates, an arm's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from copying import HELD_OUT_TEMPLATES, around
from corpus import load
from finetune import LONGEST_CHAT, collator, validation_rows
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vocabguard.measure.copying import copies_prompt
from vocabguard.measure.probe import probe
from vocabguard.measure.retention import said
from vocabguard.protect.prompts import render_context
from vocabguard.results import EXPOSURE_CLASSES, CheckResult, ProbeResult
from vocabguard.vocabulary.table import VocabTable

LIST_LENGTH = 16
SEED = 7
ANSWER_TOKENS = 32
_LONGEST_LOOP = 8


@torch.no_grad()
def validation_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean cross entropy in nats of the answers in the held-out English chats."""
    rows = validation_rows(tokenizer)
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


def kept(before: ProbeResult, now: ProbeResult, mask: Tensor | None = None) -> float:
    """Of the tokens said in both held-out templates before, the share said in both now; stricter than the guard's."""
    could = said(before) if mask is None else said(before) & mask
    return said(now)[could].float().mean().item() if could.any() else float("nan")


@torch.no_grad()
def repetition(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[float, float]:
    """Shares of the held-out questions, in all languages, whose greedy answer repeats the question, and itself."""
    chats = (*load("validation").chats, *load("probe").chats)
    questions = list(dict.fromkeys(chat.user for chat in chats))
    rows = [tokenizer.encode(question, add_special_tokens=False)[: LONGEST_CHAT // 2] for question in questions]
    before, after = around(tokenizer, "{list}")
    copies = loops = 0
    tokenizer.padding_side = "left"
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        batch = tokenizer.pad({"input_ids": [[*before, *ids, *after] for ids in part]}, return_tensors="pt")
        said = model.generate(**batch, max_new_tokens=ANSWER_TOKENS, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for question, ids in zip(part, said.tolist(), strict=True):
            answer = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
            copies += copies_prompt(question, answer)
            loops += loops_in(answer)
    tokenizer.padding_side = "right"
    return copies / len(rows), loops / len(rows)


def loops_in(answer: list[int]) -> bool:
    """Whether up to eight tokens come three times in a row, as greedy answers of small models often end."""
    return any(
        answer[begin : begin + size] == answer[begin + size : begin + 2 * size] == answer[begin + 2 * size : end]
        for size in range(1, _LONGEST_LOOP + 1)
        for begin in range(len(answer) - 3 * size + 1)
        for end in (begin + 3 * size,)
    )


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


@dataclass(frozen=True)
class Answers:
    """What a model says, before or after.

    Attributes:
        recall: every live token in the held-out templates.
        val_loss: in nats.
        repetition: share of held-out answers that repeat the question.
        loops: share of them that repeat themselves.
    """

    recall: ProbeResult
    val_loss: float
    repetition: float
    loops: float


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: VocabTable) -> Answers:
    """Measure a model in all three ways."""
    return Answers(recall(model, tokenizer, table), validation_loss(model, tokenizer), *repetition(model, tokenizer))


def base_entry(base: Answers, table: VocabTable, classes: Tensor) -> dict[str, Any]:
    """The base model's part of the JSON: its recall, under the key that arms use for what they retained.

    Args:
        base: what the base says.
        table: groups and live rows.
        classes: (V,) uint8, the exposure classes that the fine-tune's data made.
    """
    asked = base.recall
    right = torch.zeros(len(table), dtype=torch.bool)
    right[asked.ids] = said(asked)
    share = {
        kind: {name: float(right[mask].float().mean()) for name, mask in masks.items() if bool(mask.any())}
        for kind, masks in zip(("groups", "classes"), parts(table, classes), strict=True)
    }
    return {
        "head": UNMOVED | {kind: dict.fromkeys(names, UNMOVED) for kind, names in share.items()},
        "retained": {"all": float(right[table.live].float().mean()), **share},
        "val_loss": base.val_loss,
        "repetition": base.repetition,
        "loops": base.loops,
        "echo": NO_ECHO,
        "positions": 0,
        "wall_seconds": 0.0,
        "cpu_seconds": 0.0,
    }


def arm_entry(
    last: CheckResult, base: Answers, tuned: Answers, table: VocabTable, positions: int, seconds: dict[str, float]
) -> dict[str, Any]:
    """One arm's part of the JSON.

    Args:
        last: the last check.
        base: what the base says.
        tuned: what the tuned model says.
        table: groups and live rows.
        positions: tokens that went through the model in training, padding and echo rows included.
        seconds: ``wall_seconds`` and ``cpu_seconds`` of the training, and what of it the guard took.
    """
    before, now = only(base.recall, table.live), only(tuned.recall, table.live)
    groups, classes = parts(table, last.classes)
    head = _head_numbers(last.scalars, groups, classes)
    return {
        "head": head,
        "retained": {
            "all": kept(before, now),
            "groups": {name: kept(before, now, mask[now.ids]) for name, mask in groups.items()},
            "classes": {name: kept(before, now, mask[now.ids]) for name, mask in classes.items()},
        },
        "tokens": {
            "groups": {name: int(mask.sum()) for name, mask in groups.items()},
            "classes": {name: int(mask.sum()) for name, mask in classes.items()},
        },
        "val_loss": tuned.val_loss,
        "repetition": tuned.repetition,
        "loops": tuned.loops,
        "echo": {key: last.scalars.get(f"vocabguard/echo/{key}", 0.0) for key in NO_ECHO},
        "positions": positions,
        **seconds,
    }


def only(result: ProbeResult, live: Tensor) -> ProbeResult:
    """The part of a result that is about live tokens; both recalls ask for the same lists, so they stay comparable."""
    kept = live[result.ids]
    columns = (result.ids, result.emitted, result.probability, result.rank, result.instead)
    return ProbeResult(result.contexts, *(column[kept] for column in columns))


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
