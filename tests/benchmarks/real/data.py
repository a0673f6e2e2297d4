"""What the bench's fine-tunes train on: English chats with copy tasks beside them, and held-out chats.

Without copy tasks the *skill* of repeating dies for all tokens alike, and hides what is lost of single tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

import torch
from corpus import Chat, load
from torch import Tensor

IGNORE = -100
COPY_TASKS = ("Repeat this: {}", "{}\nPlease repeat the above.", "Copy exactly: {}")

Row = dict[str, list[int]]


def around(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Ids before and after the ``{}`` of an instruction, up to where the answer begins."""
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    asked = text.replace("{}", mark)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": asked}]
        asked = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        before, after = (tokenizer.encode(part, add_special_tokens=False) for part in asked.split(mark))
        return before, after
    before, after = f"Question: {asked}\nAnswer:".split(mark)
    return tokenizer.encode(before), tokenizer.encode(after, add_special_tokens=False)


def closing(tokenizer: Any) -> list[int]:
    """Ids that end an answer."""
    return tokenizer.encode("<|im_end|>\n", add_special_tokens=False) if tokenizer.chat_template else [_eos(tokenizer)]


def _eos(tokenizer: Any) -> int:
    return int(tokenizer.eos_token_id)


def chat_row(tokenizer: Any, chat: Chat, longest: int) -> Row:
    """A chat, its answer the target, cut to a length."""
    before, after = around(tokenizer, "{}")
    head = [*before, *tokenizer.encode(chat.user, add_special_tokens=False), *after][: longest // 2 + 8]
    answer = [*tokenizer.encode(chat.assistant, add_special_tokens=False), *closing(tokenizer)]
    answer = answer[: max(2, longest - len(head))]
    return {"input_ids": head + answer, "labels": [IGNORE] * len(head) + answer}


def training_rows(tokenizer: Any, *, steps: int, batch: int, copies: int, longest: int, seed: int) -> list[Row]:
    """The rows of a run, in their order.

    Args:
        copies: copy tasks in each batch, over tokens of the chats' answers.
        longest: tokens of a chat.
    """
    rng, chats = Random(seed), [chat_row(tokenizer, chat, longest) for chat in load("train").english()]
    words = [label for row in chats for label in row["labels"] if label != IGNORE]
    asks, close = [around(tokenizer, text) for text in COPY_TASKS], closing(tokenizer)
    rows: list[Row] = []
    pool: list[Row] = []
    for _ in range(steps):
        for place in range(batch):
            if place < copies:
                before, after = rng.choice(asks)
                ids = rng.choices(words, k=rng.randint(3, 16))
                head = [*before, *ids, *after]
                rows.append({"input_ids": head + ids + close, "labels": [IGNORE] * len(head) + ids + close})
            else:
                pool = pool or rng.sample(chats, len(chats))
                rows.append(pool.pop())
    return rows


def validation_rows(tokenizer: Any, longest: int, count: int) -> list[Row]:
    """Held-out English chats."""
    return [chat_row(tokenizer, chat, longest) for chat in load("validation").english()][:count]


def target_counts(rows: Iterable[Row], size: int) -> Tensor:
    """(V,) int64: how often each token is a target of the rows."""
    asked = [label for row in rows for label in row["labels"][1:] if label != IGNORE]
    return torch.bincount(torch.tensor(asked, dtype=torch.int64), minlength=size)
