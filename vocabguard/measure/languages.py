"""Whether answers are in the language that was asked for, judged by the scripts of their letters.

Three numbers, of a list of answers in one language:

- *foreign*: the share of answers with a letter of a script that does not belong to the language. This sees a Japanese
  answer that slips into Cyrillic for one word, which the two published rates do not.
- *line pass rate*: of the answers with a line long enough to judge, the share in which every such line is in the right
  language. *Word pass rate*: of those that pass, in languages not written in Latin letters, the share without an
  English word. Both after the Language Confusion Benchmark (Marchisio et al., "Understanding and Mitigating Language
  Confusion in LLMs", EMNLP 2024).

What is like the benchmark: lines of fewer than five words are not judged, answers without a line to judge are left out
of both rates, English words are those of at least four letters in lower case. Where this departs from it:

- A line's language is judged by its letters, not by a language identifier: at least half of them must be of the
  language's own scripts. Languages of one script (English and French, Russian and Ukrainian) are not told apart, except
  Japanese, which needs a kana, and Chinese, of which less than a fifth may be kana.
- Where words are not parted by spaces, two letters count as a word, in the place of a tokenizer for each language.
- Without a dictionary every run of at least four letters a-z is taken for an English word; French ones are too.

What counts: letters and marks of the prose. Not digits, punctuation, emoji and symbols, code in backticks, URLs, e-mail
addresses, HTML tags, LaTeX commands, or a Greek letter that stands alone (it is a symbol). Names and loanwords in Latin
letters belong to every language unless `allow` says otherwise, and answers that have any are counted apart. A quoted
word of a third script counts as foreign: prompts should not ask for one. Scripts go by the group names of
`vocabguard.vocabulary` (``ja`` is kana, ``zh`` is Han, ``ko`` is hangul), and by their own where there is no group.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import regex
import torch
from torch import Tensor

_PROPERTIES = {
    "ja": r"\p{Hiragana}\p{Katakana}[[\p{scx=Hira}\p{scx=Kana}]--\p{Han}]",
    "ko": r"\p{Hangul}",
    "zh": r"\p{Han}\p{Bopomofo}",
    "cyrillic": r"\p{Cyrillic}",
    "arabic": r"\p{Arabic}\p{scx=Arab}",
    "hebrew": r"\p{Hebrew}",
    "devanagari": r"\p{Devanagari}",
    "thai": r"\p{Thai}",
    "greek": r"\p{Greek}",
    "latin": r"\p{Latin}",
    **{
        name: rf"\p{{{name}}}"
        for name in (
            "armenian", "bengali", "ethiopic", "georgian", "gujarati", "gurmukhi", "kannada", "khmer", "lao",
            "malayalam", "myanmar", "sinhala", "tamil", "telugu", "tibetan",
        )
    },
    "other": r"[\p{Any}--[\p{Common}\p{Inherited}]]",
}  # fmt: skip

SCRIPTS: tuple[str, ...] = tuple(_PROPERTIES)
"""Names of scripts; ``other`` is every script without a name here."""

# A character goes to the first script that has it.
_RUN = regex.compile(
    "(?V1)" + "|".join(f"(?P<{name}>[[{chars}]&&[\\p{{L}}\\p{{M}}]]+)" for name, chars in _PROPERTIES.items())
)
_UNSPACED = frozenset({"ja", "zh", "thai", "khmer", "lao", "myanmar", "tibetan"})

_LANGUAGES_OF = {
    ("latin",): "af az ca cs cy da de en es et eu fi fil fr ga gl hr hu id is it lt lv ms nl no pl pt ro sk sl sq sv "
    "sw tr uz vi",
    ("cyrillic",): "be bg kk ky mk mn ru tg uk", ("cyrillic", "latin"): "bs sr", ("arabic",): "ar fa ps ur",
    ("hebrew",): "he yi", ("devanagari",): "hi mr ne sa", ("ja", "zh"): "ja", ("ko",): "ko", ("zh",): "zh yue",
    ("thai",): "th", ("greek",): "el", ("armenian",): "hy", ("bengali",): "bn as", ("ethiopic",): "am ti",
    ("georgian",): "ka", ("gujarati",): "gu", ("gurmukhi",): "pa", ("kannada",): "kn", ("khmer",): "km",
    ("lao",): "lo", ("malayalam",): "ml", ("myanmar",): "my", ("sinhala",): "si", ("tamil",): "ta",
    ("telugu",): "te", ("tibetan",): "bo",
}  # fmt: skip

LANGUAGES: Mapping[str, tuple[str, ...]] = dict(
    sorted((code, scripts) for scripts, codes in _LANGUAGES_OF.items() for code in codes.split())
)
"""ISO 639 code -> the scripts that the language is written in."""

ALLOWED = ("latin",)
"""Scripts of names and loanwords that belong to every language, unless `allow` says otherwise."""

_NO_PROSE = regex.compile(
    r"""
      ``` .*? (?: ``` | \Z ) | ` [^`\n]* `          # code, also a block that was cut off
    | \w+://\S+ | www\.\S+ | [\w.+-]+@[\w-]+\.\w+   # addresses
    | </?[A-Za-z][^<>\n]*> | &\#?\w+; | \\[A-Za-z]+ # markup
    """,
    regex.VERBOSE | regex.DOTALL,
)
_ENGLISH = regex.compile(r"[a-z]{4,}")
_COUNTED = ("answers", "foreign", "latin", "judged", "lines_pass", "words_pass")


@dataclass(frozen=True)
class Answer:
    """What one answer shows.

    Attributes:
        letters: letters of the prose by script; no entry for a script that does not occur.
        foreign: those of scripts that do not belong.
        judged_lines: lines long enough to judge.
        wrong_lines: those of them that are not in the language.
        english: English words in the judged lines; empty for languages written in Latin letters.
    """

    letters: Mapping[str, int]
    foreign: Mapping[str, int]
    judged_lines: int
    wrong_lines: int
    english: tuple[str, ...]


def scripts_of(language: str) -> tuple[str, ...]:
    """The scripts that a language is written in; a ValueError for one that is not in `LANGUAGES`.

    >>> scripts_of("ja"), scripts_of("sr")
    (('ja', 'zh'), ('cyrillic', 'latin'))
    """
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}; allowed: {', '.join(LANGUAGES)}")
    return LANGUAGES[language]


def prose_of(text: str) -> str:
    """The text with spaces in the place of code, addresses, HTML tags and LaTeX commands.

    >>> prose_of("Voir `print(x)` et <b>https://example.org</b> !").split()
    ['Voir', 'et', '!']
    """
    return _NO_PROSE.sub(" ", text)


def count_letters(prose: str) -> dict[str, int]:
    """Letters and marks of each script that occurs, without Greek letters that stand alone.

    Example:
        >>> count_letters("東京タワー is 333 m, Δ = 0")
        {'zh': 2, 'ja': 3, 'latin': 3}
    """
    found: dict[str, int] = {}
    for run in _RUN.finditer(prose):
        size, script = len(run[0]), str(run.lastgroup)
        if size > 1 or script != "greek":
            found[script] = found.get(script, 0) + size
    return found


def judge_answer(
    text: str, language: str, *, allow: Sequence[str] = ALLOWED, least_words: int = 5,
    english: Collection[str] | None = None,
) -> Answer:  # fmt: skip
    """Look at one answer; see the module's text for what counts.

    Args:
        language: ISO 639 code of the language expected, one of `LANGUAGES`.
        allow: scripts that belong besides the language's own.
        least_words: shorter lines are not judged.
        english: English words in lower case; None takes every run of at least four letters a-z for one.

    Raises:
        ValueError: for a language or a script that is not known.

    Example:
        >>> judge_answer("今日は хорошо ですね、really。", "ja")  # doctest: +NORMALIZE_WHITESPACE
        Answer(letters={'zh': 2, 'ja': 4, 'cyrillic': 6, 'latin': 6}, foreign={'cyrillic': 6}, judged_lines=1,
               wrong_lines=1, english=('really',))
    """
    own = scripts_of(language)
    _check_scripts(allow)
    prose = prose_of(text)
    letters = count_letters(prose)
    foreign = {script: count for script, count in letters.items() if script not in (*own, *allow)}
    lines = [line for line in prose.splitlines() if _words(line) >= least_words]
    wrong = sum(not _fits(count_letters(line), language) for line in lines)
    words = () if "latin" in own else tuple(word for line in lines for word in _english_words(line, english))
    return Answer(letters, foreign, len(lines), wrong, words)


@dataclass(frozen=True)
class ConfusionCounts:
    """Answers counted by language, to be added up.

    Attributes:
        languages: L codes.
        counts: (L, 6) int64: all answers; with foreign letters; with Latin letters beside the language's own script;
            with a line to judge; of those, with all lines right; of those, without an English word.
        into: (L, S) int64, answers with letters of each of `SCRIPTS` that does not belong: the matrix from -> into.
    """

    languages: tuple[str, ...]
    counts: Tensor
    into: Tensor


def count_answers(
    answers: Iterable[tuple[str, str]], languages: Sequence[str], *,
    allow: Mapping[str, Sequence[str]] | None = None, least_words: int = 5, english: Collection[str] | None = None,
) -> ConfusionCounts:  # fmt: skip
    """Count answers, (language expected, text) each; see `judge_answer`.

    Args:
        allow: language -> scripts that belong besides its own, for those where it is not `ALLOWED`.

    Raises:
        ValueError: for a language that is not among `languages`, or a language or script that is not known.

    Example:
        >>> answers = [("ja", "今日は хорошо ですね。"), ("ja", "はい。"), ("ko", "네, все хорошо, спасибо большое.")]
        >>> count_answers(answers, ["ja", "ko"]).counts.tolist()
        [[2, 1, 0, 1, 1, 1], [1, 1, 0, 1, 0, 0]]
    """
    counts = torch.zeros(len(languages), len(_COUNTED), dtype=torch.int64)
    into = torch.zeros(len(languages), len(SCRIPTS), dtype=torch.int64)
    for language, scripts in (allow or {}).items():
        scripts_of(language)
        _check_scripts(scripts)
    place = {language: row for row, language in enumerate(languages)}
    words = None if english is None else frozenset(english)
    for language, text in answers:
        if language not in place:
            raise ValueError(f"language is {language!r}; allowed: {', '.join(languages)}")
        own = (allow or {}).get(language, ALLOWED)
        answer = judge_answer(text, language, allow=own, least_words=least_words, english=words)
        lines_pass = answer.judged_lines > 0 and answer.wrong_lines == 0
        loaned = "latin" in answer.letters and "latin" not in LANGUAGES[language]
        flags = (True, bool(answer.foreign), loaned, answer.judged_lines > 0, lines_pass)
        counts[place[language]] += torch.tensor([*flags, lines_pass and not answer.english], dtype=torch.int64)
        for script in answer.foreign:
            into[place[language], SCRIPTS.index(script)] += 1
    return ConfusionCounts(tuple(languages), counts, into)


def summarise_confusion(found: ConfusionCounts) -> dict[str, float]:
    """Shares in [0, 1] by language and over all of them; one without an answer behind it is left out.

    ``<language>``: share of answers with foreign letters; ``<language>/latin``, with Latin letters, in languages not
    written in them; ``<language>/line_pass``; ``<language>/word_pass``, in the same languages; and ``foreign``,
    ``line_pass``, ``word_pass``: means over the languages that have them.

    Example:
        >>> found = count_answers([("ko", "네, все хорошо, спасибо большое."), ("fr", "Oui, très bien.")], ["ko", "fr"])
        >>> summarise_confusion(found)
        {'ko': 1.0, 'ko/latin': 0.0, 'ko/line_pass': 0.0, 'fr': 0.0, 'foreign': 0.5, 'line_pass': 0.0}
    """
    by_kind: dict[str, list[float]] = {"foreign": [], "line_pass": [], "word_pass": []}
    shares: dict[str, float] = {}
    for language, row in zip(found.languages, found.counts.tolist(), strict=True):
        answers, foreign, latin, judged, lines_pass, words_pass = row
        spaced = "latin" not in LANGUAGES[language]
        rates = {
            "foreign": _share(foreign, answers),
            "latin": _share(latin, answers if spaced else 0),
            "line_pass": _share(lines_pass, judged),
            "word_pass": _share(words_pass, lines_pass if spaced else 0),
        }
        for kind, rate in rates.items():
            if not math.isnan(rate):
                shares[language if kind == "foreign" else f"{language}/{kind}"] = rate
                by_kind.get(kind, []).append(rate)
    return shares | {kind: sum(rates) / len(rates) for kind, rates in by_kind.items() if rates}


def confusion_matrix(found: ConfusionCounts) -> dict[str, dict[str, int]]:
    """From language -> into script -> answers, most frequent first; languages without foreign letters left out.

    >>> confusion_matrix(count_answers([("ko", "네, 좋은 天氣."), ("ko", "네, 天 или ไทย.")], ["ko", "ja"]))
    {'ko': {'zh': 2, 'cyrillic': 1, 'thai': 1}}
    """
    matrix = {}
    for language, row in zip(found.languages, found.into.tolist(), strict=True):
        named = {script: count for script, count in zip(SCRIPTS, row, strict=True) if count}
        if named:
            matrix[language] = dict(sorted(named.items(), key=lambda item: -item[1]))
    return matrix


def _check_scripts(scripts: Sequence[str]) -> None:
    unknown = [script for script in scripts if script not in SCRIPTS]
    if unknown:
        raise ValueError(f"allow has {unknown}; allowed: {', '.join(SCRIPTS)}")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _words(line: str) -> int:
    """Words parted by spaces; of letters in scripts without spaces, half as many as letters."""
    words = 0
    for piece in line.split():
        letters = count_letters(piece)
        dense = sum(count for script, count in letters.items() if script in _UNSPACED)
        words += max(min(1, sum(letters.values())), (dense + 1) // 2)
    return words


def _fits(letters: Mapping[str, int], language: str) -> bool:
    """Whether a line with these letters is taken to be in the language."""
    own = LANGUAGES[language]
    kana, han = letters.get("ja", 0), letters.get("zh", 0)
    if (language == "ja" and not kana) or (own == ("zh",) and 5 * kana >= kana + han):
        return False
    return 2 * sum(letters.get(script, 0) for script in own) >= sum(letters.values())


def _english_words(line: str, english: Collection[str] | None) -> list[str]:
    words = [run[0] for run in _RUN.finditer(line) if run.lastgroup == "latin" and _ENGLISH.fullmatch(run[0])]
    return [word for word in words if english is None or word in english]
