"""A word for a piece: pieces of words alone, such as ``hesia``, tell a reader nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources

import regex

_WORD = regex.compile(r"\p{L}[\p{L}\p{M}'’-]*")
_LONGEST = 24  # characters of an example
_SEPARATOR = "\n"


def example_words(pieces: Iterable[str], texts: Sequence[str] = ()) -> dict[str, str]:
    """Words in which pieces stand, for those that are parts of words.

    A piece that begins with a space begins a word; any other is looked for inside words. Words come from the packaged
    reference text in 27 languages and from the vocabulary itself; the shortest that is longer than the piece is taken.

    Args:
        pieces: texts of tokens.
        texts: what each id of the vocabulary says.

    Returns:
        Piece -> word; pieces without letters, those that are words, and those of which no word is known, are left out.

    Example:
        >>> example_words(["hesia", " Xyl", "!!"], ["anest", " anesthesia", " Xylem", " Xylophone"])
        {'hesia': 'anesthesia', ' Xyl': 'Xylem'}
    """
    wanted = {piece: piece.strip() for piece in pieces if _WORD.fullmatch(piece.strip())}
    begun = {text[1:] for text in texts if text[:1] == " "}
    whole = {core for piece, core in wanted.items() if _is_word(piece, core, begun)}
    wanted = {piece: core for piece, core in wanted.items() if core not in whole}
    if not wanted:
        return {}
    ordered = sorted(_words(texts))
    lines = _SEPARATOR.join(["", *sorted(ordered, key=len), ""])
    found = {piece: _first(lines, core, begins=piece[:1].isspace()) for piece, core in wanted.items()}
    return {piece: word for piece, word in found.items() if word is not None}


def _is_word(piece: str, core: str, begun: set[str]) -> bool:
    """Whether a piece is a word already: the reference text has it, or words begin with all of it elsewhere."""
    known = _reference_words()
    return len(core) > 2 and (core in known or core.lower() in known or (piece == core and core in begun))


def _first(lines: str, core: str, *, begins: bool) -> str | None:
    """The first of the lines, shortest first, that holds a text and is longer."""
    at = 0
    while True:
        at = lines.find(_SEPARATOR + core if begins else core, at)
        if at < 0:
            return None
        start, end = lines.rfind(_SEPARATOR, 0, at + begins) + 1, lines.find(_SEPARATOR, at + 1)
        if end - start > len(core):
            return lines[start:end]
        at = end


def _words(texts: Sequence[str]) -> frozenset[str]:
    # Only whole words of the vocabulary: what begins with a space or a capital letter.
    whole = (text.strip() for text in texts if text[:1].isspace() or text[:1].isupper())
    short = (word for word in whole if 2 < len(word) <= _LONGEST)
    return _reference_words() | {word for word in short if word.isalpha() or _WORD.fullmatch(word)}


@cache
def _reference_words() -> frozenset[str]:
    text = resources.files("vocabguard").joinpath("configs", "reference.txt").read_text(encoding="utf-8")
    return frozenset(word for word in _WORD.findall(text) if len(word) <= _LONGEST)
