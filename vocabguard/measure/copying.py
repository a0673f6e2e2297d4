"""Answers that copy the prompt: what a model learns beside, where it is trained to repeat lists."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

SHORTEST = 3
"""Tokens of the shortest run that counts as copied."""


def copies_prompt(prompt: Sequence[int], answer: Sequence[int]) -> bool:
    """Whether half of an answer or more is one run of its prompt's tokens, of at least three.

    Args:
        prompt: ids of what the user said, without the template around it.
        answer: ids.

    Example:
        >>> copies_prompt([5, 6, 7, 8], [5, 6, 7, 9]), copies_prompt([5, 6, 7, 8], [5, 6, 9, 7, 8])
        (True, False)
    """
    run = SequenceMatcher(None, list(prompt), list(answer), autojunk=False).find_longest_match().size
    return run >= SHORTEST and 2 * run >= len(answer)
