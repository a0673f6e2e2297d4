"""The lost tokens of two runs in one table: what each of the two says, those that only one lost first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, zip_longest

import numpy as np

from vocabguard.report.compare import Comparison
from vocabguard.report.data import PageData, Probed, TokenLine
from vocabguard.report.first import SHOWN, TokenTable, badge_of, first_tokens, none_lost, short_name, table_markdown
from vocabguard.report.limits import Limits
from vocabguard.report.sentences import verdict_of
from vocabguard.report.words import example_words
from vocabguard.results import DEGRADED
from vocabguard.text import escape_markdown, number, visible
from vocabguard.vocabulary.labels import label_of

REPEATED, NOT_PROBED = "✓", "-"
_LONGEST = 20  # characters of a text in the table


def lost_in_either(first: PageData, second: PageData) -> TokenTable:
    """Tokens that the last probe of either run found lost; where there are none, rows of either that drifted most.

    Both must be of one vocabulary; see `vocabguard.report.compare.compare`.
    """
    sides = (first, second)
    lost = [_lost(data) for data in sides]
    asked = [set() if data.probed is None else set(data.probed.ids.tolist()) for data in sides]
    chosen = _order(lost, asked)
    if not any(lost):
        return _drifted(sides)
    counts = " and ".join(
        f"{np.count_nonzero(data.probed.lost):,} of {_known(data.probed):,} in {name}"
        for name, data in zip("AB", sides, strict=True)
        if data.probed is not None
    )
    both = f"; {len(lost[0].keys() & lost[1].keys()):,} in both" if all(asked) else ""
    caption = (
        f"Lost, of the probed tokens that the base repeats: {counts}{both}. A and B: what is said instead; {REPEATED} "
        f"repeated, {NOT_PROBED} not probed. ␣ is a space; “as in” names a word with it."
    )
    shown = chosen[:SHOWN]
    lines = {token: line for side in reversed(lost) for token, line in side.items()}
    words = example_words([lines[token].report.text for token in shown], first.vocabulary or second.vocabulary)
    rows = []
    for token in shown:
        report = lines[token].report
        cells = [_cell(token, side, known) for side, known in zip(lost, asked, strict=True)]
        word = visible(words[report.text], _LONGEST) if report.text in words else ""
        rows.append((("token", visible(report.text, _LONGEST)), ("A says", cells[0]), ("B says", cells[1]),
                     ("as in", word), ("group", label_of(report.group))))  # fmt: skip
    return TokenTable("Lost tokens", caption, tuple((name, False) for name, _ in rows[0]), tuple(rows))


def _known(probed: Probed) -> int:
    """Probed tokens that the base repeats; all of them where that was not logged."""
    return len(probed.ids) if probed.at_base is None else int(np.count_nonzero(probed.at_base))


def _lost(data: PageData) -> dict[int, TokenLine]:
    """Lost tokens that are listed, least likely first."""
    if data.probed is None:
        return {}
    ids = set(data.probed.ids[data.probed.lost].tolist())
    return {line.report.id: line for line in data.tokens if line.report.id in ids}


def _order(lost: Sequence[dict[int, TokenLine]], asked: Sequence[set[int]]) -> list[int]:
    """Those that one run lost and the other repeats, in turns; then both; then what one was asked for alone."""
    alone = [
        [token for token in lost[side] if token in asked[1 - side] and token not in lost[1 - side]] for side in (0, 1)
    ]
    both = [token for token in lost[0] if token in lost[1]]
    unprobed = [[token for token in lost[side] if token not in asked[1 - side]] for side in (0, 1)]
    turns = (chain.from_iterable(zip_longest(*pair)) for pair in (alone, unprobed))
    first, last = ([token for token in turn if token is not None] for turn in turns)
    return [*first, *both, *last]


def _cell(token: int, lost: dict[int, TokenLine], asked: set[int]) -> str:
    if token not in asked:
        return NOT_PROBED
    if token not in lost:
        return REPEATED
    instead = lost[token].report.said_instead
    return "other" if instead is None else visible(instead, _LONGEST)


def _drifted(sides: Sequence[PageData]) -> TokenTable:
    """Rows below 0.95 in either, the lowest first; no more than the two pages list."""
    reports = {line.report.id: line.report for data in reversed(sides) for line in data.tokens}
    cosines = {token: tuple(_cosine(data, token) for data in sides) for token in reports}
    low = {token: min(filter(math.isfinite, pair), default=math.nan) for token, pair in cosines.items()}
    chosen = sorted((token for token, value in low.items() if value < DEGRADED), key=low.__getitem__)[:SHOWN]
    probed = [f"{name}: {none_lost(data)}" for name, data in zip("AB", sides, strict=True) if data.probed is not None]
    said = " ".join(probed) or "There was no probe: whether tokens are still repeated was not measured."
    if not chosen:
        return TokenTable("No lost token found" if probed else "No row below 0.95", said)
    rows = tuple(
        (("token", visible(reports[token].text, _LONGEST)), ("cosine A", number(cosines[token][0])),
         ("cosine B", number(cosines[token][1])), ("group", label_of(reports[token].group)))
        for token in chosen
    )  # fmt: skip
    columns = tuple((name, name.startswith("cosine")) for name, _ in rows[0])
    caption = f"Live rows below cosine {DEGRADED} in either, lowest first. A low cosine is a risk, not a loss. {said}"
    return TokenTable("Rows that drifted most", caption, columns, rows)


def _cosine(data: PageData, token: int) -> float:
    rows = data.rows
    return math.nan if rows is None or rows.cosine is None else float(rows.cosine[token])


def markdown_of_two(both: Comparison, sides: Sequence[PageData], table: TokenTable | None, limits: Limits) -> str:
    """The comparison as Markdown, for an issue or a chat.

    Args:
        table: of `lost_in_either`; None takes the first tokens of each side.
    """
    lines = [both.sentence, ""]
    for name, data in zip("AB", sides, strict=True):
        verdict = verdict_of(data, limits)
        title = f"{name}, {escape_markdown(short_name(data.name))}, **{badge_of(data, verdict)}**"
        lines.append(f"- {title}: {verdict.sentence}")
    for shown in [first_tokens(data) for data in sides] if table is None else [table]:
        lines += table_markdown(shown)
    if both.settings:
        lines += ["", "Settings that differ:", "", "| setting | A | B |", "| --- | --- | --- |"]
        lines += [f"| {' | '.join(map(escape_markdown, row))} |" for row in both.settings]
    return "\n".join(lines)
