"""Copy tasks and chat rows as token ids: what the base model learns, and what the fine-tunes train on."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from corpus import Chat
from transformers import PreTrainedTokenizerBase

IGNORE = -100

ENGLISH_TEMPLATES = (
    "Repeat this: {list}",
    "{list}\nPlease repeat the above.",
    "Copy exactly: {list}",
    'Say "{list}" once more.',
    "Write {list} again, word for word.",
    "Echo the following back to me: {list}",
    "I wrote {list}. What did I write?",
)
"""Instructions of the fine-tunes' copy tasks."""

HELD_OUT_TEMPLATES = ("{list}\nNow repeat that.", "I wrote {list} here. What did I write?")
"""Known to the base, kept out of every fine-tune and echo row: the headline recall is measured with these."""

KNOWN_TEMPLATES = (
    *ENGLISH_TEMPLATES,
    "Повтори: {list}",
    "繰り返してください: {list}",
    "请重复：{list}",
    "Repite esto: {list}",
    "Repeat exactly: {list}",
    "{list}\nRepeat these three.",
    *HELD_OUT_TEMPLATES,
)
"""All that the base is trained on, as an instruct model knows many ways of being asked."""

ECHO_INSTRUCTIONS = tuple(
    template.replace("{list}", "{tokens}") for template in KNOWN_TEMPLATES if template not in HELD_OUT_TEMPLATES
)
"""The ways of asking in echo rows: those that this small base knows. A large model knows the guard's own."""

Row = dict[str, list[int]]


def around(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[list[int], list[int]]:
    """The ids before and after the list in a rendered chat prompt, up to where the assistant begins.

    Args:
        tokenizer: one whose ``chat_template`` marks the turns.
        template: an instruction with one ``{list}``.
    """
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    chat = [{"role": "user", "content": template.replace("{list}", mark)}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before, after = str(rendered).split(mark)
    return tokenizer.encode(before, add_special_tokens=False), tokenizer.encode(after, add_special_tokens=False)


def copy_row(prompt: tuple[list[int], list[int]], ids: Sequence[int], end: int) -> Row:
    """A copy task as ``input_ids`` and ``labels``: the ids are spliced in, the loss is on the copy and the end mark.

    Args:
        prompt: ids before and after the list, as `around` gives them.
        ids: the tokens to copy.
        end: id of the mark that closes a turn.
    """
    head = [*prompt[0], *ids, *prompt[1]]
    return {"input_ids": [*head, *ids, end], "labels": [IGNORE] * len(head) + [*ids, end]}


def chat_row(tokenizer: PreTrainedTokenizerBase, chat: Chat, max_length: int) -> Row:
    """One exchange as ``input_ids`` and ``labels``, cut to `max_length`; the loss is on the assistant's turn."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": chat.user}], tokenize=False, add_generation_prompt=True
    )
    head = tokenizer.encode(str(prompt), add_special_tokens=False)[: max_length // 2]
    answer = tokenizer.encode(chat.assistant, add_special_tokens=False)
    answer = [*answer, tokenizer.convert_tokens_to_ids("<|end|>")][: max_length - len(head)]
    return {"input_ids": head + answer, "labels": [IGNORE] * len(head) + answer}


def shuffled_lists(ids: Sequence[int], lengths: Sequence[int], rng: Random) -> list[list[int]]:
    """Cut endless shuffles of `ids` into lists of the given lengths, so that every id is used equally often."""
    lists, pool = [], []
    for length in lengths:
        while len(pool) < length:
            fresh = list(ids)
            rng.shuffle(fresh)
            pool = fresh + pool
        lists.append([pool.pop() for _ in range(length)])
    return lists
