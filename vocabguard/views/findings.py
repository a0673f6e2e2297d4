"""What is found beside the checks, as lines of the run log, a sentence and a table: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vocabguard.measure.body import HeadOrBody
from vocabguard.measure.confusion import ConfusionCounts, confusion_matrix, summarise_confusion
from vocabguard.measure.neighbors import NearestRows, Neighborhoods, intruders
from vocabguard.results import Finding, MatrixName
from vocabguard.views.wording import escape_markdown, number, percent, visible
from vocabguard.vocabulary import VocabTable

_PREFIX = "vocabguard/confusion/"
_NAMED = 4


def confusion_finding(step: int, counts: ConfusionCounts) -> Finding:
    """Answers in many languages.

    Args:
        step: the optimizer step.
        counts: of all answers.
    """
    shares, matrix = summarise_confusion(counts), confusion_matrix(counts)
    answers = dict(zip(counts.languages, counts.counts[:, 0].tolist(), strict=True))
    line = {"answers": answers, "shares": shares, "into": matrix}
    table = _table(
        ("language", "answers", "foreign script", "into", "lines pass", "words pass", "with Latin"),
        [_confusion_row(language, answers[language], shares, matrix) for language in counts.languages],
    )
    scalars = {_PREFIX + key: value for key, value in shares.items()}
    return Finding("confusion", step, (line,), _confusion_sentence(counts, shares, matrix), table, scalars)


def neighbors_finding(step: int, name: MatrixName, found: Neighborhoods, table: VocabTable) -> Finding:
    """The nearest rows of some tokens, then and now.

    Args:
        step: the optimizer step.
        name: whose rows.
        found: the neighbours.
        table: texts and groups.
    """
    overlap = found.overlap.tolist()
    lines = []
    for place, token in enumerate(found.ids.tolist()):
        about = {"matrix": name, "id": token, "text": table.text(token), "group": table.group_of(token)}
        sides = {key: _named(table, found, side)[place] for key, side in (("then", found.then), ("now", found.now))}
        lines.append({**about, "overlap": overlap[place], **sides})
    columns = ("id", "token", "group", "kept", "near then", "near now")
    return Finding("neighbors", step, tuple(lines), _neighbors_sentence(lines), _table(columns, map(_beside, lines)))


def body_finding(step: int, found: HeadOrBody) -> Finding:
    """Where forgotten tokens were lost.

    Args:
        step: the optimizer step.
        found: which came back with the base's rows.
    """
    counts = found.counts
    line = {**counts, "ids": found.ids.tolist(), "with_head": found.with_head.tolist()}
    line["with_rows"] = found.with_rows.tolist()
    total = counts["forgotten"]
    said = [
        f"{counts[part]:,} ({percent(counts[part] / total)}) {words}"
        for part, words in (
            ("head", "back with the base's output rows"),
            ("input", "with its input rows too"),
            ("body", "with neither (lost in the body)"),
        )
        if counts[part]
    ]
    sentence = f"{total:,} forgotten token{'s' * (total != 1)}: {', '.join(said)}"
    return Finding("head_or_body", step, (line,), sentence)


def _confusion_row(
    language: str, answers: int, shares: Mapping[str, float], matrix: Mapping[str, Mapping[str, int]]
) -> tuple[str, ...]:
    into = ", ".join(f"{script} {count}" for script, count in matrix.get(language, {}).items())
    rates = (percent(shares.get(f"{language}/{kind}")) for kind in ("line_pass", "word_pass", "latin"))
    return (language, f"{answers}", percent(shares.get(language)), into, *rates)


def _confusion_sentence(
    counts: ConfusionCounts, shares: Mapping[str, float], matrix: Mapping[str, Mapping[str, int]]
) -> str:
    total, foreign = counts.counts[:, :2].sum(0).tolist()
    worst = sorted((language for language in matrix), key=lambda language: -shares[language])
    named = [f"{language} {percent(shares[language])} {'/'.join(matrix[language])}" for language in worst[:_NAMED]]
    shown = f" ({', '.join(named)}{', ...' * (len(worst) > _NAMED)})" if named else ""
    passed = "".join(
        f"; {words} pass {percent(shares[key])}"
        for key, words in (("line_pass", "lines"), ("word_pass", "words"))
        if key in shares
    )
    languages = int((counts.counts[:, 0] > 0).sum())
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
    kept = [line["overlap"] for line in lines if line["overlap"] == line["overlap"]]
    then, now = (sum(one["intruder"] for line in lines for one in line[key]) for key in ("then", "now"))
    share = f"keep {percent(sum(kept) / len(kept))} of their nearest rows" if kept else "had no rows near them"
    return f"{len(lines)} worst and watched tokens {share}; intruders among them: {then:,} then, {now:,} now"


def _beside(line: Mapping[str, Any]) -> tuple[str, ...]:
    token = (str(line["id"]), visible(line["text"]), line["group"], percent(line["overlap"]))
    return (*token, *(" · ".join(_neighbor(one) for one in line[key]) for key in ("then", "now")))


def _neighbor(one: Mapping[str, Any]) -> str:
    mark = f" [{one['group']}!]" if one["intruder"] else ""
    return f"{visible(one['text'], 24)}{mark} {number(one['cosine'], 2)}"


def _table(columns: Sequence[str], rows: Any) -> str:
    lines = [columns, ["---"] * len(columns), *([escape_markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
