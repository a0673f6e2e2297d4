"""Which tokens may be echoed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import regex
import torch
from torch import Tensor

from vocabguard.vocabulary.table import VocabTable, resolve_token

PATTERN = "re:"
"""Prefix of an exclusion that is a regular expression."""


def allowed_ids(
    table: VocabTable, tokenizer: Any, exclude: Sequence[int | str] = (), key: str = "echo.exclude"
) -> Tensor:
    """(m,) int64, ascending: live tokens (no control, padded, unreachable or never-trained row) without the excluded.

    Args:
        tokenizer: resolves texts; may be None where nothing is excluded by text.
        exclude: ids, texts that are one token, and ``re:`` patterns that a token's text is searched for.
        key: what messages call them.

    Raises:
        ValueError: for an exclusion that is no token or no pattern, or if nothing is left.

    Example:
        >>> from vocabguard.vocabulary.table import plain_table
        >>> allowed_ids(plain_table(4), None, exclude=[1, "re:row 3"])
        tensor([0, 2])
    """
    mask = table.live.clone()
    for item in exclude:
        mask[_excluded(table, tokenizer, item, key)] = False
    ids = mask.nonzero().flatten()
    if len(ids) == 0:
        raise ValueError(f"{key} is {list(exclude)!r}; it leaves no token to echo")
    return ids


def _excluded(table: VocabTable, tokenizer: Any, item: int | str, key: str) -> list[int]:
    if isinstance(item, bool) or not isinstance(item, (int, str)):
        raise ValueError(f"{key} holds {item!r}; allowed: token ids, texts that are one token, 're:' patterns")
    if isinstance(item, str) and item.startswith(PATTERN):
        try:
            pattern = regex.compile(item.removeprefix(PATTERN))
        except regex.error as error:
            raise ValueError(f"{key} holds {item!r}, which is no regular expression: {error}") from error
        return [token for token in range(len(table)) if pattern.search(table.text(token))]
    if isinstance(item, str) and tokenizer is None:
        raise ValueError(f"{key} holds the text {item!r}; without a tokenizer only ids are allowed")
    try:
        return [resolve_token(tokenizer, item, len(table))]
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def ids_in(ids: Tensor, allowed: Tensor) -> Tensor:
    """(k,) int64: those of the (n,) `ids` that are among the (m,) `allowed` ones, in their order.

    >>> ids_in(torch.tensor([7, 2, 5]), torch.tensor([2, 7]))
    tensor([7, 2])
    """
    return ids[torch.isin(ids, allowed)]
