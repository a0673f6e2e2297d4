"""What the report page says in words: the verdict, the key numbers, and the same as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from vocabguard.measure.retention import ENOUGH
from vocabguard.report.data import PageData
from vocabguard.report.limits import Limits
from vocabguard.results import EVERYDAY_QUESTIONS
from vocabguard.text import LARGE_GROUP, ReportRow, number, percent
from vocabguard.vocabulary.labels import label_of

Level = Literal["fine", "drifted", "lost", "unknown"]

_BESIDE_LABELS = {
    "confusion": "Answers in many languages",
    "neighbors": "Nearest rows, then and now",
    "head_or_body": "Where forgotten tokens were lost",
}


_SKILL = 0.8  # as the rule `skill_lost`


@dataclass(frozen=True)
class Verdict:
    """The page's first sentence.

    Attributes:
        level: ``lost`` where too many tokens are lost, ``drifted`` where only too many rows drifted, ``unknown`` where
            nothing was measured, or too little to tell.
        sentence: what was lost, how many tokens, which groups; or that no loss was found, and by how much evidence.
        findings: what is over its limit, a sentence each.
    """

    level: Level
    sentence: str
    findings: tuple[str, ...]


def beside_label(kind: str) -> str:
    """The heading of what was found beside the checks.

    >>> beside_label("confusion")
    'Answers in many languages'
    """
    return _BESIDE_LABELS.get(kind, kind)


def verdict_of(data: PageData, limits: Limits) -> Verdict:
    """What was lost, in one sentence, and whether it is more than allowed."""
    if data.verdict is None:
        return _verdict_by_numbers(data, limits)
    rows, asked = (
        _verdict_by_numbers(replace(data, scalars=_rows_only(data.scalars), probed=None), limits),
        data.verdict,
    )
    # What the file judged when it was written, and the rows by the limits of the page.
    by_rows = data.matrix is not None
    sentence = f"{asked.sentence} {rows.sentence if by_rows else ''}".strip()
    kind: Level = (
        "lost" if asked.level in ("lost", "harder", "unsaid") else "fine" if asked.level == "fine" else "unknown"
    )
    level = max(kind, rows.level if by_rows else kind, key=("fine", "unknown", "drifted", "lost").index)
    return Verdict(level, sentence, (*asked.findings, *(rows.findings if by_rows else ())))


def _rows_only(scalars: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in scalars.items() if not key.startswith(("probe/", "reference/"))}


def _verdict_by_numbers(data: PageData, limits: Limits) -> Verdict:
    row = data.whole
    forgotten = None if row is None or row.retained is None else 1.0 - row.retained
    degraded = None if row is None else row.below_95
    findings = []
    level: Level = "fine"
    if degraded is not None and degraded > limits.degraded:
        findings.append(f"{percent(degraded)} of live rows are below cosine 0.95; allowed: {percent(limits.degraded)}")
        level = "drifted"
    kept = data.scalars.get("probe/tokens_retained_high")
    sure = forgotten if kept is None else 1 - kept
    if sure is not None and sure > limits.forgotten:
        least = "" if sure == forgotten else "at least "
        said = f"{least}{percent(sure)} of the tokens that the base repeats are lost"
        findings.append(f"{said}; allowed: {percent(limits.forgotten)}")
        level = "lost"
    skill = data.scalars.get("probe/skill_high")
    if forgotten and skill is not None and skill < _SKILL:
        findings.append(
            f"at least {percent(1 - skill)} of the frequent targets are lost too, so the model no longer repeats what "
            f"it is asked to; allowed: {percent(1 - _SKILL)}"
        )
        level = "lost"
    if level == "fine" and _too_few(data):
        level = "unknown"
    broken = int(data.scalars.get(f"{data.matrix}/nonfinite_rows", 0))
    if broken:
        findings.append(f"{broken:,} live rows hold NaN or Inf; allowed: none")
        level = "lost"
    zeroed = int(data.scalars.get(f"{data.matrix}/zeroed_rows", 0))
    if zeroed:
        findings.append(f"{zeroed:,} live rows are zero now and were not at the base; allowed: none")
        level = "lost"
    if forgotten is None and degraded is None and not broken and not zeroed:
        return Verdict("unknown", _nothing_measured(data), ())
    # The part about behaviour is the probe's own, where a file brings one.
    parts = [] if data.verdict else [_forgotten_part(data, forgotten)]
    parts.append(_degraded_part(data, degraded))
    parts += [f"{broken:,} live {'row holds' if broken == 1 else 'rows hold'} NaN or Inf"] if broken else []
    parts += [f"{zeroed:,} live {'row is' if zeroed == 1 else 'rows are'} zero now"] if zeroed else []
    parts = [part for part in (*parts, _end_part(data)) if part]
    sentence = f"{'; '.join(parts)}."
    return Verdict(level, sentence[0].upper() + sentence[1:], tuple(findings))


def at_end(data: PageData, group: str = "all") -> float | None:
    """Share in [0, 1] of live head rows that may be below 0.95 at the end, by the last check's forecast.

    Args:
        group: one of its groups, or ``all``.

    Returns:
        None where there is no forecast, or the run is at its end.
    """
    if data.step is None or (data.end is not None and data.step >= data.end):
        return None
    return data.scalars.get("forecast/below_0.95" if group == "all" else f"forecast/{group}/below_0.95")


def key_numbers(data: PageData) -> tuple[tuple[str, str], ...]:
    """Names and values of the numbers under the verdict; what was not measured is left out."""
    row = data.whole
    found: list[tuple[str, str | None]] = [("live tokens", None if data.live is None else f"{data.live:,}")]
    if row is not None:
        found += [
            ("below cosine 0.95", _counted(data, row.below_95, 0.95)),
            ("below 0.95, forecast", _counted(data, at_end(data))),
            ("below cosine 0.90", _counted(data, row.below_90, 0.90)),
            ("mean cosine", _known(row.mean)),
            ("lowest cosine", _known(row.minimum)),
            ("retained", _interval(data, "retained", row.retained)),
            ("base repeats", _interval(data, "base", data.scalars.get("probe/base"))),
        ]
    if (never := data.scalars.get("exposure/never")) is not None:
        found.append(("never a target", _counted(data, never)))
    if (watched := data.scalars.get("probe/watch")) is not None:
        found.append(("watched words retained", percent(watched)))
    rise, low, high = (data.scalars.get(f"reference/rare_rise{end}") for end in ("", "_low", "_high"))
    if rise is not None and low is not None and high is not None:
        found.append(("rare tokens' loss in natural text, nats", f"{rise:+.2f} ({low:+.2f} to {high:+.2f})"))
    if (foreign := data.scalars.get("confusion/foreign")) is not None:
        found.append(("answers with foreign script", percent(foreign)))
    if (copied := data.scalars.get("echo/copies")) is not None:
        found.append(("answers that copy the question", f"{percent(copied)} of {EVERYDAY_QUESTIONS}"))
    if data.kind == "run":
        found.append(("alerts firing", str(len(data.firing))))
        found.append(("optimizer steps", None if data.step is None else f"{data.step:,}"))
    return tuple((name, value) for name, value in found if value is not None)


_DECISIVE = (
    "retained", "below 0.95, forecast", "below cosine 0.95", "rare tokens' loss in natural text, nats",
    "watched words retained", "never a target", "answers with foreign script",
)  # fmt: skip


def decisive_numbers(data: PageData) -> tuple[tuple[str, str], ...]:
    """Those of the key numbers that a verdict rests on, the most telling first."""
    known = dict(key_numbers(data))
    return tuple((name, known[name]) for name in _DECISIVE if name in known)


def as_json(data: PageData, limits: Limits) -> dict[str, Any]:
    """The verdict and the key numbers as values that JSON can hold; null for what was not measured."""
    verdict = verdict_of(data, limits)
    rows = {kind: {row.label: _row(data, row) for row in data.table if row.kind == kind} for kind in ("group", "class")}
    whole = {} if data.whole is None else _row(data, data.whole)
    return {
        "source": data.name,
        "kind": data.kind,
        "step": data.step,
        "level": verdict.level,
        "verdict": verdict.sentence,
        "findings": list(verdict.findings),
        "matrix": data.matrix,
        "live": data.live,
        **{key: value for key, value in whole.items() if key != "tokens"},
        "forecast": None if (end := at_end(data)) is None else {"below_0.95": end, "step": data.end},
        "never": data.scalars.get("exposure/never"),
        "probe": None if data.probed is None else {"step": data.probe_step, "tokens": len(data.probed.ids)},
        "echo": {key: data.scalars.get(f"echo/{key}") for key in ("dose", "targets_per_live_token", "copies")},
        "firing": list(data.firing),
        "beside": {one.kind: one.story.sentence for one in data.beside},
        "groups": rows["group"],
        "classes": rows["class"],
    }


def _row(data: PageData, row: ReportRow) -> dict[str, float | int | None]:
    return {
        "tokens": data.sizes.get(row.label),
        "cosine_mean": row.mean,
        "cosine_min": row.minimum,
        "below_0.95": row.below_95,
        "below_0.90": row.below_90,
        "retained": row.retained,
    }


def _known(value: float | None) -> str | None:
    return None if value is None else number(value)


def _counted(data: PageData, share: float | None, bar: float | None = None) -> str | None:
    """A share of the live tokens, and how many these are.

    Args:
        share: in [0, 1]; None gives None.
        bar: where the share is of rows with a cosine below it.
    """
    if share is None:
        return None
    count = _count_of(data, share, bar)
    return percent(share) if not count else f"{percent(share)} ({count:,})"


def _count_of(data: PageData, share: float, bar: float | None) -> int | None:
    """How many live tokens a share is: counted where rows of the last step were kept, else worked out."""
    rows = data.rows
    if bar is not None and rows is not None and rows.cosine is not None and rows.step == data.step:
        with np.errstate(invalid="ignore"):
            return int(np.count_nonzero(rows.live & (rows.cosine < bar)))
    return None if data.live is None else round(share * data.live)


def _nothing_measured(data: PageData) -> str:
    if not data.table:
        return "No check was logged: nothing is known about this run."
    return "Neither row drift nor what the model can say was measured; see below why."


def _forgotten_part(data: PageData, forgotten: float | None) -> str:
    if forgotten is None:
        return "what the model can say was not measured"
    sampled, low = _sampled(data), data.scalars.get("probe/retained_low")
    probed = data.probed
    could = None if probed is None or probed.at_base is None else int(np.count_nonzero(probed.at_base))
    those = f"{'' if could is None else f'{could:,} '}{'probed ' if sampled else ''}tokens that the base repeats"
    of = f" (a probe of {len(probed.ids):,} tokens)" if could is None and probed is not None and sampled else ""
    if _too_few(data):
        return (
            f"not enough evidence of what the model can say: {those.replace('tokens that', 'tokens are all that')}{of}"
        )
    if forgotten == 0:
        unseen = f"; up to {percent(1 - low)} could be lost unseen" if low is not None and sampled else ""
        return f"no loss found: all {those} are still repeated{of}{unseen}"
    if could is None or probed is None:
        lead = f"{percent(forgotten)} of the {those} are lost{of}"
    else:
        of_all = "of all live ones " if sampled else ""
        lead = f"{np.count_nonzero(probed.lost):,} of {those} are lost ({of_all}{_interval(data, 'lost', forgotten)})"
    skill = data.scalars.get("probe/skill")
    lead += f"; of frequent targets {percent(1 - skill)} are lost" if skill is not None else ""
    few = _barely_probed(data)
    rows = [
        (1.0 - row.retained, row.label)
        for row in data.table
        if row.kind == "group" and row.retained is not None and row.label not in few
    ]
    return f"{lead}{_hit(data, rows, forgotten)}"


def _too_few(data: PageData) -> bool:
    """Whether the base repeats too few tokens for a verdict."""
    known = data.scalars.get("probe/known")
    return known is not None and known < ENOUGH


def _sampled(data: PageData) -> bool:
    """Whether the probe did not ask for every live token."""
    return data.probed is not None and len(data.probed.ids) != data.live


def _interval(data: PageData, name: str, share: float | None) -> str | None:
    """A share of the probe with its interval, where that is known."""
    if share is None:
        return None
    if name == "lost":
        low, high = (data.scalars.get(f"probe/retained_{end}") for end in ("high", "low"))
        low, high = (None if bound is None else 1 - bound for bound in (low, high))
    else:
        low, high = (data.scalars.get(f"probe/{name}_{end}") for end in ("low", "high"))
    if low is None or high is None or not _sampled(data):
        return percent(share)
    return f"{percent(share)}, {percent(low)} to {percent(high)}"


def _barely_probed(data: PageData, least: int = 10) -> set[str]:
    """Groups of which so few tokens were asked for that their share says little."""
    if data.probed is None or data.rows is None:
        return set()
    asked = np.bincount(data.rows.group[data.probed.ids], minlength=len(data.names)).tolist()
    return {name for name, count in zip(data.names, asked, strict=True) if count < least}


def _degraded_part(data: PageData, degraded: float | None) -> str:
    if degraded is None:
        return "row drift does not apply" if data.matrix is None else ""
    rows_of = "head row" if data.matrix == "head" else "input embedding row"
    if degraded == 0:
        told = any(sentence.startswith("Body: ") for sentence in data.about)
        body = "; the body was not measured" if data.kind == "scan" and not told else ""
        return f"no live {rows_of} is below cosine 0.95{body}"
    count = _count_of(data, degraded, 0.95)
    if data.live is None or count is None:
        lead = f"{percent(degraded)} of the live {rows_of}s have drifted below cosine 0.95"
    else:
        verb = "has" if count == 1 else "have"
        lead = f"{count:,} of {data.live:,} live {rows_of}s ({percent(degraded)}) {verb} drifted below cosine 0.95"
    rows = [(row.below_95, row.label) for row in data.table if row.kind == "group" and row.below_95 is not None]
    return f"{lead}{_hit(data, rows, degraded)}"


def _end_part(data: PageData) -> str:
    """What the forecast says of a run that has not come to its end."""
    share = at_end(data)
    if share is None:
        return ""
    step = "" if data.end is None else f" (step {data.end:,})"
    rows = "" if data.live is None else f"{round(share * data.live):,} of {data.live:,} live "
    lead = f"by the forecast, {rows}head rows ({percent(share)}) may be below 0.95 at the end{step}"
    by_group = [(name, at_end(data, name)) for name in data.names]
    return f"{lead}{_hit(data, [(group, name) for name, group in by_group if group is not None], share)}"


def _hit(data: PageData, shares: list[tuple[float, str]], overall: float, most: int = 3) -> str:
    """Large groups that are clearly worse than all tokens together, worst first."""
    large = [(share, name) for share, name in shares if data.sizes.get(name, LARGE_GROUP) >= LARGE_GROUP]
    worse = sorted((pair for pair in large if pair[0] > 1.1 * overall), reverse=True)[:most]
    named = ", ".join(f"{label_of(name)} {percent(share)}" for share, name in worse)
    return f", hit hardest {named}" if named else ""
