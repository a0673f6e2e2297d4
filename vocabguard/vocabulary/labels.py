"""What groups of tokens and exposure classes are called for people; settings, keys and JSON keep the identifiers."""

from __future__ import annotations

from collections.abc import Sequence

ROW_KINDS = {"head": "output", "embedding": "input"}
"""What the rows of each matrix are called."""

_SCRIPTS = (
    "arabic", "armenian", "bengali", "cyrillic", "devanagari", "ethiopic", "georgian", "greek", "gujarati", "gurmukhi",
    "hebrew", "kannada", "khmer", "lao", "latin", "malayalam", "myanmar", "sinhala", "tamil", "telugu", "thai",
    "tibetan",
)  # fmt: skip
_GROUPS = {
    **{name: name.capitalize() for name in _SCRIPTS},
    "ja": "Japanese",
    "ko": "Korean",
    "zh": "Chinese",
    "digits_punctuation": "digits and punctuation",
    "code": "code and markup",
    "bytes": "byte pieces",
    "byte": "byte piece",
}
_CLASSES = {"never": "never a target", "1-4": "1-4 times", "5-19": "5-19 times", "20+": "20+ times"}
_BEFORE_TOKENS = {"digits_punctuation": "digit or punctuation", "code": "code or markup", "bytes": "byte"}


def label_of(name: str) -> str:
    """The label of a group or exposure class, as a row of a table has it.

    >>> label_of("ja"), label_of("thai"), label_of("never"), label_of("all")
    ('Japanese', 'Thai', 'never a target', 'all live tokens')
    """
    if name == "all":
        return "all live tokens"
    return _GROUPS.get(name) or _CLASSES.get(name) or name


def kinds_of_tokens(names: Sequence[str]) -> str:
    """Groups as what stands before "tokens".

    >>> kinds_of_tokens(["latin"]), kinds_of_tokens(["bytes", "zh"]), kinds_of_tokens(["ja", "ko", "thai"])
    ('Latin', 'byte and Chinese', 'Japanese, Korean and Thai')
    """
    *first, last = (_BEFORE_TOKENS.get(name) or label_of(name) for name in names)
    return f"{', '.join(first)} and {last}" if first else last
