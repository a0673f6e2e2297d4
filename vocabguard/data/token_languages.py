"""Which language the words of a vocabulary are of, as far as one word tells: by lingua, where it is installed.

A word of four letters is little to go by, so languages are asked for by name, and a word of which the detector is not
sure is of none. ``tests/benchmarks/token_languages.py`` measures how often it is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vocabguard.data.ranking import WORD
from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.vocabulary.table import VocabTable

if TYPE_CHECKING:
    from vocabguard.data.coverage import Coverage

SCRIPTS_OF_MANY = ("latin", "cyrillic", "arabic", "devanagari")
"""Groups whose words may be of several languages."""

COMMON = (
    "en", "de", "fr", "es", "pt", "it", "nl", "pl", "tr", "vi", "id", "sv", "cs", "ro", "ru", "uk", "bg", "ar", "fa",
    "ur", "hi", "mr",
)  # fmt: skip
"""The languages that ``common`` stands for, in ISO 639-1."""

UNCLEAR = "unclear"
"""Of a word that the detector gives to no language for sure."""

SURE = 0.5
"""Probability from which on a language is told; see ``tests/README.md`` for how often it is the right one."""

_FEWEST_LETTERS = 4


def token_languages(table: VocabTable, languages: Sequence[str]) -> list[str]:
    """The language of each of V tokens.

    Args:
        languages: ISO 639-1 codes to choose from, two or more. The fewer, the surer: name those of the data and of the
            model's users.

    Returns:
        A code for each token that is a word of at least four letters after a space, in a script of several languages;
        `UNCLEAR` where none is more probable than all others together, and "" for tokens that are no such words, or
        are written in letters of none of the languages.

    Raises:
        ValueError: for a code that the detector does not know, fewer than two, or without the detector.

    Example:
        >>> from dataclasses import replace
        >>> from vocabguard.vocabulary.table import GROUPS, plain_table
        >>> texts = (" Geschwindigkeit", " through", "tion", ";")
        >>> latin = torch.full((4,), GROUPS.index("latin"), dtype=torch.uint8)
        >>> token_languages(replace(plain_table(4), texts=texts, group=latin), ["de", "en"])
        ['de', 'en', '', '']
    """
    by_code = _by_code(languages)
    code_of = {language: code for code, language in by_code.items()}
    detector = _lingua().LanguageDetectorBuilder.from_languages(*by_code.values()).build()
    many = torch.stack([table.mask(name) for name in SCRIPTS_OF_MANY]).any(dim=0) & table.live
    texts = table.texts
    chosen = [
        i for i in many.nonzero().flatten().tolist() if len(texts[i]) > _FEWEST_LETTERS and WORD.fullmatch(texts[i])
    ]
    words = [texts[i].strip().lower() for i in chosen]
    distinct = list(dict.fromkeys(words))
    told = detector.compute_language_confidence_values_in_parallel(distinct)
    of = {word: _sure(values, code_of) for word, values in zip(distinct, told, strict=True)}
    found = [""] * len(table)
    for i, word in zip(chosen, words, strict=True):
        found[i] = of[word]
    return found


def language_rows(
    coverage: Coverage, table: VocabTable, languages: Sequence[str], group: str
) -> list[tuple[str, tuple[int, ...]]]:
    """Words of one script by language and exposure class: (code, counts in the order of `EXPOSURE_CLASSES`).

    The languages with most words come first, `UNCLEAR` last.

    Args:
        languages: of V tokens, from `token_languages`.
    """
    counts: dict[str, list[int]] = {}
    classes = coverage.classes.tolist()
    for i in (coverage.live & table.mask(group)).nonzero().flatten().tolist():
        if languages[i]:
            counts.setdefault(languages[i], [0] * len(EXPOSURE_CLASSES))[classes[i]] += 1
    return sorted(
        ((name, tuple(row)) for name, row in counts.items()), key=lambda one: (one[0] == UNCLEAR, -sum(one[1]), one[0])
    )


def language_names(codes: Sequence[str]) -> dict[str, str]:
    """English names of languages by their codes, as the detector has them.

    >>> language_names(["de", "unclear"])
    {'de': 'German', 'unclear': 'language unclear'}
    """
    lingua = _lingua()
    names = {UNCLEAR: "language unclear"}
    for one in lingua.Language.all():
        names[_code(one)] = one.name.capitalize()
    return {code: names[code] for code in codes}


def chosen_languages(told: str) -> tuple[str, ...]:
    """Codes parted by commas, or ``common``.

    Raises:
        ValueError: for a code that the detector does not know, fewer than two, or without the detector.

    >>> chosen_languages("de, EN")
    ('de', 'en')
    """
    languages = COMMON if told.strip() == "common" else tuple(part.strip().lower() for part in told.split(","))
    _by_code(languages)
    return languages


def _sure(values: Sequence[Any], code_of: Mapping[Any, str]) -> str:
    """What the detector's probabilities, the highest first, say of a word."""
    if not values or values[0].value == 0:
        return ""
    return code_of[values[0].language] if values[0].value >= SURE else UNCLEAR


def _by_code(languages: Sequence[str]) -> dict[str, Any]:
    """The detector's languages of some codes."""
    known = {_code(one): one for one in _lingua().Language.all()}
    unknown = [code for code in languages if code not in known]
    if unknown or len(set(languages)) < 2:
        what = repr(unknown[0]) if unknown else f"{list(languages)}"
        raise ValueError(f"--languages is {what}; allowed: two or more of {', '.join(sorted(known))}, or common")
    return {code: known[code] for code in languages}


def _code(language: Any) -> str:
    return str(language.iso_code_639_1.name).lower()


def _lingua() -> Any:
    try:
        import lingua
    except ImportError as error:
        raise ValueError(
            "telling words by language needs a detector; `pip install lingua-language-detector`"
        ) from error
    return lingua
