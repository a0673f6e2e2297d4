"""What stands on the report's first screen: which tokens were lost and in which words, what to do, one chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vocabguard.report.charts import Figure, forecast_figures, histograms, timelines
from vocabguard.report.data import PageData, TokenLine
from vocabguard.report.sentences import Verdict, at_end, decisive_numbers
from vocabguard.report.words import example_words
from vocabguard.results import DEGRADED
from vocabguard.text import escape_markdown, number, percent, visible
from vocabguard.vocabulary.labels import label_of

SHOWN = 12
"""Tokens in the first table."""

_BADGES = {"fine": "✓ within limits", "drifted": "! rows drifted", "lost": "✕ tokens lost", "unknown": "? not measured"}
_LONGEST = 32  # characters of a text in the table


@dataclass(frozen=True)
class TokenTable:
    """The tokens that matter most.

    Attributes:
        rows: of each token, column and cell.
        more: words of the link to all of them; empty where all are here.
    """

    title: str
    caption: str
    columns: tuple[tuple[str, bool], ...] = ()
    rows: tuple[tuple[tuple[str, str], ...], ...] = field(default=())
    more: str = ""


def badge_of(data: PageData, verdict: Verdict) -> str:
    """The verdict in two words."""
    so_far = " so far" if at_end(data) is not None and verdict.level != "unknown" else ""
    if verdict.level == "fine" and (data.whole is None or data.whole.retained is None):
        return f"✓ rows within limits{so_far}"
    return _BADGES[verdict.level] + so_far


def heading_of(data: PageData, verdict: Verdict) -> str:
    """The page's title."""
    if verdict.level == "lost":
        return "This model lost tokens"
    if verdict.level == "drifted":
        return "Rows drifted over the limit"
    if verdict.level == "unknown":
        return "Not enough was measured for a verdict"
    if data.probed is None:
        return "Rows are within the limits"
    return "Losses are within the limits" if data.probed.lost.any() else "No loss found"


def short_name(path: str) -> str:
    """A run's name: its folder, or the one around it where that is only called ``vocabguard``.

    >>> short_name("out/seed-3/vocabguard"), short_name("out/seed-3/vocabguard-2"), short_name("scan.safetensors")
    ('seed-3', 'seed-3, vocabguard-2', 'scan.safetensors')
    """
    named = Path(path)
    if not named.name.startswith("vocabguard") or named.parent.name in ("", ".", ".."):
        return named.name or str(named)
    return named.parent.name if named.name == "vocabguard" else f"{named.parent.name}, {named.name}"


def first_tokens(data: PageData) -> TokenTable:
    """The lost tokens, least likely first; where none was lost, the rows that drifted most."""
    probed, rows = data.probed, data.rows
    lost = set() if probed is None else set(probed.ids[probed.lost].tolist())
    lines = [line for line in data.tokens if line.report.id in lost]
    if lines and probed is not None:
        known = len(probed.ids) if probed.at_base is None else int(np.count_nonzero(probed.at_base))
        of = "tokens that were probed" if probed.at_base is None else "probed tokens that the base repeats"
        caption = f"{len(lost):,} of {known:,} {of}, least likely first. ␣ is a space; “as in” names a word with it."
        return _table(data, "Lost tokens", caption, lines, len(lost))
    drifted = [line for line in data.tokens if line.report.cosine < DEGRADED]
    if drifted:
        count = len(drifted)
        if rows is not None and rows.cosine is not None:
            with np.errstate(invalid="ignore"):
                count = int(np.count_nonzero(rows.live & (rows.cosine < DEGRADED)))
        drifted.sort(key=lambda line: line.report.cosine)
        caption = f"{count:,} live rows are below cosine {DEGRADED}, lowest first. A low cosine is a risk, not a loss."
        return _table(data, "Rows that drifted most", caption, drifted, count)
    if not data.table:
        return TokenTable("No measurement yet", "No check was logged, so there is nothing to show.")
    if probed is None:
        return TokenTable(
            "No row below 0.95", "There was no probe: whether tokens are still repeated was not measured."
        )
    return TokenTable("No lost token found", none_lost(data))


def none_lost(data: PageData) -> str:
    """What a probe says that found no token lost; by older logs less may be retained than all."""
    retained = None if data.whole is None else data.whole.retained
    if retained is None or retained == 1:
        return "All probed tokens that the base repeats are still repeated."
    return f"No token fails in more than half of its asks; the log gives {percent(retained)} as retained."


def _table(data: PageData, title: str, caption: str, lines: Sequence[TokenLine], count: int) -> TokenTable:
    shown = lines[:SHOWN]
    words = example_words([line.report.text for line in shown], data.vocabulary)
    asked = any(line.report.probability is not None for line in shown)
    counted = data.rows is None or data.rows.targets is not None
    columns = ["token", "as in", *(["says instead"] if asked else []), "group", *(["targets"] if counted else [])]
    columns += ["cosine"] if any(math.isfinite(line.report.cosine) for line in shown) else []
    rows = []
    for line in shown:
        report = line.report
        instead = report.said_instead
        cells = {
            "token": visible(report.text, _LONGEST),
            "as in": visible(words.get(report.text, ""), _LONGEST) if report.text in words else "",
            "says instead": "" if instead is None else visible(instead, _LONGEST),
            "group": label_of(report.group),
            "targets": f"{report.data_target:,}",
            "cosine": number(report.cosine),
        }
        rows.append(tuple((name, cells[name]) for name in columns))
    numeric = {"targets", "cosine"}
    more = f"All {count:,}, to search and sort" if count > len(shown) else "All listed tokens, to search and sort"
    return TokenTable(title, caption, tuple((name, name in numeric) for name in columns), tuple(rows), more)


def firing_advice(data: PageData) -> tuple[str, ...]:
    """What the rules that fire at the end advise, each once, the gravest rule's first."""
    latest = {}
    for change in data.alerts:
        latest[change.rule] = change
    firing = [change for change in latest.values() if change.state == "firing" and change.story is not None]
    firing.sort(key=lambda change: change.level != "critical")
    found = [advice for change in firing if change.story is not None for advice in change.story.advice]
    # Two rules may advise the same of other groups: the graver one's stands.
    first: dict[str, str] = {}
    for advice in found:
        first.setdefault(" ".join(advice.lower().split()[:3]), f"{advice[:1].upper()}{advice[1:]}")
    return tuple(first.values())


def main_chart(data: PageData) -> Figure | None:
    """The one chart that says most: the forecast of a run that goes on, what is retained, or what drifted."""
    if at_end(data) is not None and (forecast := forecast_figures(data)):
        return forecast[0]
    by_title = {figure.title: figure for figure in timelines(data)}
    for title in ("Retained, of what the base repeats", "Rows below cosine 0.95", "Cosine to the base"):
        if title in by_title:
            return by_title[title]
    return next(iter(histograms(data)), None) if data.kind == "scan" else None


def table_markdown(tokens: TokenTable) -> list[str]:
    """Lines of the table, after an empty one; none where it has no rows."""
    if not tokens.rows:
        return []
    names = [name for name, _ in tokens.columns]
    lines = ["", f"{tokens.title}: {tokens.caption}", "", f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    return lines + [f"| {' | '.join(escape_markdown(cell) for _, cell in row)} |" for row in tokens.rows]


def markdown_of(data: PageData, verdict: Verdict, tokens: TokenTable, advice: Sequence[str]) -> str:
    """The first screen as Markdown, for an issue or a chat."""
    step = "" if data.step is None else f", step {data.step:,}"
    lines = [f"**{badge_of(data, verdict)}**: {escape_markdown(short_name(data.name))}{step}", "", verdict.sentence, ""]
    lines += [f"- {name}: {value}" for name, value in decisive_numbers(data)]
    if data.origin:
        lines += [f"- {name}: {escape_markdown(value)}" for name, value in data.origin.items() if name != "command"]
    lines += table_markdown(tokens)
    lines += ["", "What to do:", *(f"- {one}" for one in advice)] if advice else []
    lines += [f"- {one.why}: `{one.command}`" for one in data.commands]
    return "\n".join(lines)
