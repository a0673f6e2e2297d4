"""Echo data as files: lists of tokens that the assistant repeats, so that every token is a target as often as asked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vocabguard.data.readers import in_chunks
from vocabguard.files import one_line, replacing, require_regular, write_lines
from vocabguard.protect.prompts import PLACE
from vocabguard.protect.rows import IGNORE, EchoPrompt, exchange
from vocabguard.vocabulary.table import VocabTable

_BATCH = 16


@dataclass(frozen=True)
class EchoTally:
    """What a written file was found to hold.

    Attributes:
        targets: targets in it, of the tokens that were wanted.
        longest: tokens of its longest row.
        survived: share in [0, 1] of the asked targets that are in it; below 1 only where lists are text, since
            neighbours may merge into other tokens when they are encoded again.
        tokens_lost: tokens that were wanted and are no target at all.
    """

    conversations: int
    targets: int
    longest: int
    survived: float
    tokens_lost: int


def echo_lists(ids: Sequence[int], targets: int, list_tokens: int, rng: Random) -> list[list[int]]:
    """Shuffles of the ids, each cut into lists of nearly one length, so that every id comes up exactly as often.

    Args:
        targets: how often each is in a list; at least 1.
        list_tokens: longest list; at least 1.

    Raises:
        ValueError: if there are no ids, or a number is below 1.

    Example:
        >>> sorted(len(part) for part in echo_lists(range(10), targets=2, list_tokens=4, rng=Random(0)))
        [3, 3, 3, 3, 4, 4]
    """
    if len(ids) == 0:
        raise ValueError("there is no token to echo")
    for name, value in (("targets", targets), ("list_tokens", list_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: at least 1")
    lists: list[list[int]] = []
    parts = math.ceil(len(ids) / list_tokens)
    for _ in range(targets):
        order = list(ids)
        rng.shuffle(order)
        edges = [len(order) * part // parts for part in range(parts + 1)]
        lists += [order[begin:end] for begin, end in pairwise(edges)]
    return lists


def needy_ids(path: str | Path, rows: int, *, below: int | None, cosine: float | None) -> tuple[Tensor, Tensor]:
    """The tokens that a coverage or scan file shows to be in need.

    Args:
        path: what ``vocabguard coverage --out``, ``vocabguard scan --out`` or ``vocabguard probe --out`` wrote. Of a
            probe, where neither bar is given, the tokens that it found lost are in need.
        rows: V of the tokenizer; a scan may have more, padded rows.
        below: tokens with fewer data targets are in need.
        cosine: tokens whose head row (embedding row where there is no head) has a lower cosine, or none that is finite,
            are in need.

    Returns:
        (V,) bool in need by either, and (V,) bool trained at the base; both for the tokenizer's ids.

    Raises:
        ValueError: if the file cannot be read, lacks what is asked for, or is of fewer rows.
    """
    found = _vectors(path, ("data_target", "head/cosine", "embedding/cosine", "trained", "lost"))
    if below is None and cosine is None and "lost" not in found:
        raise ValueError(f"{path}: holds no lost tokens; allowed: a file of `vocabguard probe MODEL BASE --out`")
    drift = found.get("head/cosine", found.get("embedding/cosine"))
    if below is not None and "data_target" not in found:
        raise ValueError(f"{path}: holds no data_target; allowed with --below: a file of `vocabguard coverage --out`")
    if cosine is not None and drift is None:
        raise ValueError(f"{path}: holds no cosine; allowed with --cosine: a file of `vocabguard scan --out`")
    short = {name: list(vector.shape) for name, vector in found.items() if vector.ndim != 1 or len(vector) < rows}
    if short:
        raise ValueError(f"{path}: its shapes are {short}, the tokenizer has {rows} ids; they do not belong together")
    needy = torch.zeros(rows, dtype=torch.bool)
    if below is None and cosine is None:
        needy |= found["lost"][:rows].bool()
    if below is not None:
        needy |= found["data_target"][:rows] < below
    if cosine is not None and drift is not None:
        needy |= ~(drift[:rows] >= cosine)
    return needy, found.get("trained", torch.ones(rows))[:rows].bool()


def holds_lost(path: str | Path) -> bool:
    """Whether a file says which tokens were found lost, as `vocabguard probe MODEL BASE --out` writes it."""
    return "lost" in _vectors(path, ("lost",))


def write_ids(
    path: str | Path, lists: Sequence[Sequence[int]], prompts: Sequence[EchoPrompt], rng: Random
) -> EchoTally:
    """Write lists as ``input_ids`` and ``labels``; the file is read back and counted before it gets its name.

    Args:
        lists: ids to repeat; not empty.
        prompts: ways of asking, drawn from at random.

    Raises:
        ValueError: if the file does not hold every id exactly as often as the lists do.
        OSError: if it cannot be written.
    """
    rows = (exchange(rng.choice(prompts), part) for part in lists)
    with replacing(path) as new:
        write_lines(new, (json.dumps({"input_ids": row.input_ids, "labels": row.labels}) for row in rows))
        found, longest = _count_ids(new)
        asked = _counts(lists)
        if found != asked:
            wrong = sorted(i for i in found.keys() | asked.keys() if found.get(i, 0) != asked.get(i, 0))
            raise ValueError(f"{path}: {len(wrong)} ids are not written as often as asked, {wrong[:5]} among them")
    return EchoTally(len(lists), sum(found.values()), longest, 1.0, 0)


def write_chats(
    path: str | Path, lists: Sequence[Sequence[int]], instructions: Sequence[str], rng: Random, *, tokenizer: Any,
    table: VocabTable, separator: str,
) -> EchoTally:  # fmt: skip
    """Write lists as ``messages``; the answers in the file are encoded again and counted.

    Tokens that are parts of characters have no text and are left out.

    Args:
        lists: ids to repeat; not empty.
        instructions: ways of asking, each with one ``{tokens}``, drawn from at random.
        table: texts and control tokens of the same tokenizer.
        separator: between the tokens' texts.

    Raises:
        ValueError: if no token has a text, or tokens beside each other spell a control token.
        OSError: if it cannot be written.
    """
    raw = table.names.index("bytes")
    readable = [[table.text(i) for i in part if int(table.group[i]) != raw] for part in lists]
    said = [separator.join(texts) for texts in readable if texts]
    if not said:
        raise ValueError("none of the tokens is whole text; allowed in chats: tokens that are whole characters")
    with replacing(path) as new:
        write_lines(new, (_chat(rng.choice(instructions).replace(PLACE, text), text) for text in said))
        found, longest = _count_texts(new, tokenizer, len(table))
        spelled = ((torch.from_numpy(found) > 0) & table.control).nonzero().flatten().tolist()
        if spelled:
            names = [table.text(i) for i in spelled[:3]]
            raise ValueError(f"{path}: neighbours spell control tokens, {names} among them; give a --separator")
    return _survivors(len(said), _counts(lists), found, longest)


def _chat(question: str, answer: str) -> str:
    """A line of ``messages``."""
    turns = (("user", question), ("assistant", answer))
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


def _survivors(conversations: int, asked: dict[int, int], found: NDArray[np.int64], longest: int) -> EchoTally:
    kept = sum(min(count, int(found[i])) for i, count in asked.items())
    lost = sum(found[i] == 0 for i in asked)
    targets = sum(int(found[i]) for i in asked)
    return EchoTally(conversations, targets, longest, kept / max(1, sum(asked.values())), int(lost))


def _counts(lists: Iterable[Sequence[int]]) -> dict[int, int]:
    flat = np.concatenate([np.asarray(part, dtype=np.int64) for part in lists])
    ids, counts = np.unique(flat, return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def _count_ids(path: Path) -> tuple[dict[int, int], int]:
    """How often each id is a target in a file, label by label, and the length of its longest row."""
    parts, longest = [], 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            labels = np.array(row["labels"], dtype=np.int64)
            longest = max(longest, len(labels))
            # The model predicts the next token: the first label is never a target.
            parts.append(labels[1:][labels[1:] != IGNORE])
    return _counts(parts), longest


def _count_texts(path: Path, tokenizer: Any, rows: int) -> tuple[NDArray[np.int64], int]:
    """(rows,) int64 how often each id is in the answers of a file as they are encoded again, and the longest answer."""
    counts, longest = np.zeros(rows, dtype=np.int64), 0
    with path.open(encoding="utf-8") as file:
        for lines in in_chunks(file, _BATCH):
            texts = [json.loads(line)["messages"][-1]["content"] for line in lines]
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                counts += np.bincount(np.array(ids, dtype=np.int64), minlength=rows)
                longest = max(longest, len(ids))
    return counts, longest


def _vectors(path: str | Path, names: Sequence[str]) -> dict[str, Tensor]:
    try:
        with safe_open(str(require_regular(path)), framework="pt") as file:
            there = set(file.keys())
            return {name: file.get_tensor(name) for name in names if name in there}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a coverage or scan file ({one_line(error)})") from error
