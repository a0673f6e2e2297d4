"""What is found beside the checks, as lines of the run log, a sentence and a table: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vocabguard.measure.languages import ConfusionCounts, confusion_matrix, summarise_confusion
from vocabguard.measure.localize import HeadOrBody
from vocabguard.measure.neighbors import NearestRows, Neighborhoods, intruders
from vocabguard.results import Finding, MatrixName
from vocabguard.text import escape_markdown, number, percent, visible
from vocabguard.vocabulary.labels import label_of
from vocabguard.vocabulary.table import VocabTable

_PREFIX = "vocabguard/confusion/"
_NAMED = 4
_CONFUSION = ("language", "answers", "foreign script", "into", "lines pass", "words pass", "with Latin")
_NEIGHBORS = ("id", "token", "group", "kept", "near then", "near now")

Cell = str | tuple[str, ...]
"""A text, or several that are shown apart: one right-to-left piece does not reorder the others."""


@dataclass(frozen=True)
class Story:
    """Lines of the run log as people read them: a sentence, and a table where that does not say all."""

    sentence: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()

    def markdown(self) -> str:
        """The table, escaped; empty where there is none."""
        if not self.columns:
            return ""
        cells = ([escape_markdown(_joined(cell)) for cell in row] for row in self.rows)
        lines = [self.columns, ["---"] * len(self.columns), *cells]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def confusion_finding(step: int, counts: ConfusionCounts) -> Finding:
    """Answers in many languages."""
    shares = summarise_confusion(counts)
    answers = dict(zip(counts.languages, counts.counts[:, 0].tolist(), strict=True))
    line = {"answers": answers, "shares": shares, "into": confusion_matrix(counts)}
    return _finding("confusion", step, [line], {_PREFIX + key: value for key, value in shares.items()})


def neighbors_finding(step: int, name: MatrixName, found: Neighborhoods, table: VocabTable) -> Finding:
    """The nearest rows of some tokens, then and now."""
    overlap = found.overlap.tolist()
    lines = []
    for place, token in enumerate(found.ids.tolist()):
        about = {"matrix": name, "id": token, "text": table.text(token), "group": table.group_of(token)}
        sides = {key: _named(table, found, side)[place] for key, side in (("then", found.then), ("now", found.now))}
        lines.append({**about, "overlap": overlap[place], **sides})
    return _finding("neighbors", step, lines)


def body_finding(step: int, found: HeadOrBody) -> Finding:
    """Where forgotten tokens were lost."""
    line = {**found.counts, "ids": found.ids.tolist(), "with_head": found.with_head.tolist()}
    line |= {"with_rows": found.with_rows.tolist(), "with_all": found.with_all.tolist()}
    return _finding("head_or_body", step, [line])


def story_of(kind: str, lines: Sequence[Mapping[str, Any]]) -> Story:
    """What the run log's lines of one step and kind say: ``confusion``, ``neighbors`` or ``head_or_body``."""
    if kind == "neighbors":
        return Story(_neighbors_sentence(lines), _NEIGHBORS, tuple(map(_beside, lines)))
    if kind == "head_or_body":
        return Story(_body_sentence(lines[-1]))
    answers, shares, into = (lines[-1][key] for key in ("answers", "shares", "into"))
    rows = tuple(_confusion_row(language, count, shares, into) for language, count in answers.items())
    return Story(_confusion_sentence(answers, shares, into), _CONFUSION, rows)


def _finding(
    kind: str, step: int, lines: Sequence[Mapping[str, Any]], scalars: Mapping[str, float] | None = None
) -> Finding:
    story = story_of(kind, lines)
    return Finding(kind, step, tuple(lines), story.sentence, story.markdown(), scalars or {})


def _body_sentence(counts: Mapping[str, Any]) -> str:
    total = counts["forgotten"]
    said = [
        f"{counts[part]:,} ({percent(counts[part] / total)}) {'comes' if counts[part] == 1 else 'come'} back {words}"
        for part, words in (
            ("head", "with the base's output row"),
            ("input", "with its input row too"),
            ("other_rows", "only with the rows of all tokens (other rows drown them)"),
            ("body", "with no row (lost in the body)"),
        )
        if counts.get(part)
    ]
    return f"of {total:,} lost token{'s' * (total != 1)} probed again, {', '.join(said)}"


def _confusion_row(
    language: str, answers: int, shares: Mapping[str, float], matrix: Mapping[str, Mapping[str, int]]
) -> tuple[str, ...]:
    into = ", ".join(f"{label_of(script)} {count}" for script, count in matrix.get(language, {}).items())
    rates = (percent(shares.get(f"{language}/{kind}")) for kind in ("line_pass", "word_pass", "latin"))
    return (language, f"{answers}", percent(shares.get(language)), into, *rates)


def _confusion_sentence(
    answers: Mapping[str, int], shares: Mapping[str, float], matrix: Mapping[str, Mapping[str, int]]
) -> str:
    total = sum(answers.values())
    foreign = sum(round(count * shares.get(language, 0.0)) for language, count in answers.items())
    worst = sorted((language for language in matrix), key=lambda language: -shares[language])
    named = [
        f"{language} {percent(shares[language])} {'/'.join(map(label_of, matrix[language]))}"
        for language in worst[:_NAMED]
    ]
    shown = f" ({', '.join(named)}{', ...' * (len(worst) > _NAMED)})" if named else ""
    passed = "".join(
        f"; {words} pass {percent(shares[key])}"
        for key, words in (("line_pass", "lines"), ("word_pass", "words"))
        if key in shares
    )
    languages = sum(count > 0 for count in answers.values())
    said = f"{total:,} answer{'s' * (total != 1)} in {languages} language{'s' * (languages != 1)}"
    return f"{said}: {percent(foreign / total if total else None)} with foreign script{shown}{passed}"


def _named(table: VocabTable, found: Neighborhoods, side: NearestRows) -> list[list[dict[str, Any]]]:
    """Each token's neighbours with texts and groups."""
    strange = intruders(table, found.ids, side.ids)
    return [
        [
            {"id": i, "text": table.text(i), "group": table.group_of(i), "cosine": cosine, "intruder": intruder}
            for i, cosine, intruder in zip(*row, strict=True)
            if i >= 0
        ]
        for row in zip(side.ids.tolist(), side.cosine.tolist(), strange.tolist(), strict=True)
    ]


def _neighbors_sentence(lines: Sequence[Mapping[str, Any]]) -> str:
    # In a log a token that had no rows near it has null, before that NaN.
    kept = [line["overlap"] for line in lines if line["overlap"] is not None and line["overlap"] == line["overlap"]]
    then, now = (sum(one["intruder"] for line in lines for one in line[key]) for key in ("then", "now"))
    share = f"keep {percent(sum(kept) / len(kept))} of their nearest rows" if kept else "had no rows near them"
    return f"{len(lines)} worst and watched tokens {share}; intruders among them: {then:,} then, {now:,} now"


def _beside(line: Mapping[str, Any]) -> tuple[Cell, ...]:
    token = (str(line["id"]), visible(line["text"]), label_of(line["group"]), percent(line["overlap"]))
    return (*token, *(tuple(_neighbor(one) for one in line[key]) for key in ("then", "now")))


def _neighbor(one: Mapping[str, Any]) -> str:
    mark = f" [{label_of(one['group'])}!]" if one["intruder"] else ""
    return f"{visible(one['text'], 24)}{mark} {number(one['cosine'], 2)}"


def _joined(cell: Cell) -> str:
    return cell if isinstance(cell, str) else " · ".join(cell)
