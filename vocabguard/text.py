"""The sentences, table rows and cells that all views share. Pure functions from results to text."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import regex

from vocabguard.results import (
    EXPOSURE_CLASSES,
    CheckResult,
    MatrixName,
    NotApplicable,
    Preflight,
    RowDrift,
    TokenReport,
    Watch,
    WatchedMatrix,
)
from vocabguard.vocabulary.labels import label_of

if TYPE_CHECKING:
    from torch import Tensor

    from vocabguard.vocabulary.table import VocabTable

LARGE_GROUP = 20
"""Live tokens from which a group is large enough for its share to be named in a sentence."""

WORST_COLUMNS = (
    "id", "token", "group", "class", "cosine", "residual", "targets", "inputs", "since target", "prob.", "says instead",
)  # fmt: skip
"""Headings of the table of worst tokens; `token_cells` gives the cells in this order."""

_MISSING = "-"
_TEXT_COLUMNS = frozenset({"token", "group", "class", "says instead"})
# What leaves no mark on the page: separators, controls, format characters, unassigned and private code points, default
# ignorables (zero-width, variation selectors, Hangul fillers) and the blank Braille pattern. Spaces are treated apart.
_INVISIBLE = regex.compile(r"(?! )[\p{Z}\p{C}\p{Default_Ignorable_Code_Point}⠀]")
_PUNCTUATION = regex.compile(r"[!-/:-@\[-`{-~]")


@dataclass(frozen=True)
class ReportRow:
    """One row of the closing table; None where the check did not measure the value.

    Attributes:
        label: ``all``, a group's name or one of `EXPOSURE_CLASSES`.
        mean: mean cosine in [-1, 1].
        minimum: lowest cosine in [-1, 1].
        below_95: share in [0, 1] of live rows with cosine below 0.95.
        below_90: share in [0, 1] below 0.90.
        retained: share in [0, 1] of the tokens emitted at the base that still are.
    """

    label: str
    kind: Literal["all", "group", "class"]
    mean: float | None
    minimum: float | None
    below_95: float | None
    below_90: float | None
    retained: float | None


def percent(share: float | None) -> str:
    """A share in [0, 1] as ``12.3 %``; neither 0 nor 100 is claimed unless exact. Missing: ``-``.

    >>> percent(0.1234), percent(0.0), percent(0.0002), percent(0.9999)
    ('12.3 %', '0 %', '<0.1 %', '>99.9 %')
    """
    if share is None or not math.isfinite(share):
        return _MISSING
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    if 0 < value < 0.05:
        return "<0.1 %"
    return ">99.9 %" if 99.95 <= value < 100 else f"{value:.1f} %"


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many decimals, or ``-`` where it is missing or not finite.

    >>> number(0.95), number(2.5, 1), number(math.nan)
    ('0.9500', '2.5', '-')
    """
    return _MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def visible(text: str, limit: int = 40) -> str:
    r"""A token's text on one line with every character to be seen.

    Spaces become ``␣``, invisible and control characters their escapes, a leading combining mark gets a dotted circle;
    of a text longer than `limit` the end becomes ``…``.

    >>> visible(" the\n"), visible("\u200b"), visible("")
    ('␣the\\n', '\\u200b', '(empty)')
    """
    if not text:
        return "(empty)"
    shown = _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text).replace(" ", "␣")
    if unicodedata.combining(shown[0]) or unicodedata.category(shown[0]) in ("Mn", "Mc", "Me"):
        shown = "◌" + shown
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def escape_markdown(text: str) -> str:
    """Text that every Markdown flavour shows literally, in a table cell too: ASCII punctuation as HTML entities.

    >>> escape_markdown("a|b")
    'a&#124;b'
    """
    return _PUNCTUATION.sub(lambda found: f"&#{ord(found[0])};", text)


def large_groups(table: VocabTable) -> tuple[str, ...]:
    """Names of the groups with at least `LARGE_GROUP` live tokens, in the table's order."""
    counts = table.group[table.live].long().bincount(minlength=len(table.names))
    return tuple(name for name, count in zip(table.names, counts.tolist(), strict=True) if count >= LARGE_GROUP)


def watch_sentences(watch: Watch) -> tuple[str, ...]:
    """What is watched, what is not and why, and where the run is logged; preflight has its own sentences."""
    head, embedding = watch.head, watch.embedding
    if isinstance(head, WatchedMatrix) and isinstance(embedding, WatchedMatrix) and head.tied:
        said = [_matrix_sentence("Head and input embedding, one tied matrix", head)]
    else:
        said = [_matrix_sentence("Head", head), _matrix_sentence("Input embedding", embedding)]
    if watch.probe is not None:
        said.append(f"No probe: {_ended(watch.probe.reason)}")
    tokens = _count(watch.live, "live token")
    if watch.never_trained:
        were = "was" if watch.never_trained == 1 else "were"
        tokens += f"; {watch.never_trained:,} more {were} never trained at the base and can raise no alarm"
    said.append(f"{tokens}.")
    said.append(f"Run folder: {watch.run_dir}" if watch.run_dir else "No run folder is written.")
    return (*said, *watch.notes)


def preflight_sentences(preflight: Preflight | NotApplicable, table: VocabTable) -> tuple[str, ...]:
    """Which tokens are targets of the training data and which never are, before step 1."""
    if isinstance(preflight, NotApplicable):
        return (f"No preflight: {_ended(preflight.reason)}",)
    live = table.live
    never = live & (preflight.data_target == 0)
    scarce = int((live & (preflight.data_target > 0) & (preflight.data_target < 5)).sum())
    total, missing = int(live.sum()), int(never.sum())
    tokens, data = _count(total, "live token"), data_read(preflight)
    said = [f"Each of {tokens} is a target in {data}."]
    if missing:
        verb = "is" if missing == 1 else "are"
        said = [f"Of {tokens} {missing:,} ({percent(missing / total)}) {verb} never a target in {data}."]
    if scarce:
        said.append(f"Another {scarce:,} {'is' if scarce == 1 else 'are'} a target fewer than 5 times.")
    hit = _hardest_hit(never, table)
    if hit:
        said.append(f"Hit hardest, tokens that are never a target: {', '.join(hit)}.")
    return tuple(said)


def verdict(result: CheckResult, groups: Collection[str] | None = None) -> str:
    """One line for one check; what was not measured is left out. Only `groups` are named as the worst, or any."""
    scalars = result.scalars
    parts = [_drift_part(result, groups)]
    broken = _finite(scalars, f"vocabguard/{measured_matrix(result) or 'head'}/nonfinite_rows")
    if broken:
        parts.append(_count(int(broken), "broken row"))
    never = _finite(scalars, "vocabguard/exposure/never")
    # Before the first targets every token has none, which says nothing.
    if never is not None and scalars.get("vocabguard/exposure/targets") != 0:
        parts.append(f"{percent(never)} never a target")
    retained = _finite(scalars, "vocabguard/probe/retained")
    if retained is not None:
        known = _finite(scalars, "vocabguard/probe/known")
        of = "" if known is None else f" of {known:,.0f} sampled"
        parts.append(f"retained {percent(retained)}{of}")
    if echoed := _finite(scalars, "vocabguard/echo/targets_per_live_token"):
        parts.append(f"echoed {number(echoed, 2)} times a token")
    if result.firing:
        parts.append(f"{_count(len(result.firing), 'alert')} firing")
    return f"step {result.step:,}: {'; '.join(parts)}"


def nothing_found(result: CheckResult) -> str:
    """The end of a run without findings in one sentence, with its limits; empty where there is something to show.

    There is none where no alert fires, no live row is below 0.95 or broken, and no sampled or watched token is lost.
    """
    scalars, matrix = result.scalars, measured_matrix(result)
    below = None if matrix is None else _finite(scalars, f"vocabguard/{matrix}/below_0.95")
    retained, watched = _finite(scalars, "vocabguard/probe/retained"), _finite(scalars, "vocabguard/probe/watch")
    broken = _finite(scalars, f"vocabguard/{matrix}/nonfinite_rows")
    lost = [share for share in (retained, watched) if share is not None and share < 1]
    if result.firing or below or broken or lost or (below is None and retained is None):
        return ""
    parts = []
    if retained is not None:
        known, low = _finite(scalars, "vocabguard/probe/known"), _finite(scalars, "vocabguard/probe/retained_low")
        count = "" if known is None else f"{known:,.0f} "
        unseen = f"; up to {percent(1 - low)} could be lost unseen" if low is not None and low < 1 else ""
        parts.append(f"no loss found: all {count}sampled tokens that the base repeats are still repeated{unseen}")
    else:
        parts.append("no row drifted far; whether tokens are still repeated was not measured")
    if below is not None:
        mean = number(_finite(scalars, f"vocabguard/{matrix}/cosine_mean"))
        parts.append(f"no live row of the {'head' if matrix == 'head' else 'input embedding'} is below cosine 0.95 "
                     f"(mean {mean})")  # fmt: skip
    said = ". ".join(part[:1].upper() + part[1:] for part in parts)
    return f"step {result.step:,}: {said}."


def measured_matrix(result: CheckResult) -> MatrixName | None:
    """The matrix whose drift a report speaks of: the head, else the embedding, else none."""
    if isinstance(result.head, RowDrift):
        return "head"
    return "embedding" if isinstance(result.embedding, RowDrift) else None


def report_rows(
    result: CheckResult, group_names: Sequence[str], matrix: MatrixName | None = "head"
) -> tuple[ReportRow, ...]:
    """Rows of the closing table: all, the groups (worst first), the exposure classes; as far as they were measured.

    Without a matrix there is only what the probe found.
    """
    every = _report_row(result.scalars, matrix, None, "all")
    groups = [_report_row(result.scalars, matrix, name, "group") for name in group_names]
    classes = [_report_row(result.scalars, matrix, name, "class") for name in EXPOSURE_CLASSES]
    return (every, *sorted(filter(_measured, groups), key=_badness), *filter(_measured, classes))


def token_cells(report: TokenReport) -> tuple[str, ...]:
    """One worst token as cells in the order of `WORST_COLUMNS`: visible text, not yet escaped."""
    return (
        str(report.id),
        visible(report.text),
        label_of(report.group),
        label_of(report.exposure_class),
        number(report.cosine),
        number(report.residual),
        f"{report.data_target:,}",
        f"{report.inputs:,}",
        "never" if report.steps_since_target is None else f"{report.steps_since_target:,}",
        _repeated(report),
        _MISSING if report.said_instead is None else visible(report.said_instead),
    )


def worst_markdown(worst: Sequence[TokenReport]) -> str:
    """Reported tokens as a Markdown table, in their order."""
    if not worst:
        return "No live row was measured."
    rule = ["---" if name in _TEXT_COLUMNS else "---:" for name in WORST_COLUMNS]
    lines = [WORST_COLUMNS, rule]
    lines += [tuple(escape_markdown(cell) for cell in token_cells(report)) for report in worst]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _matrix_sentence(label: str, matrix: WatchedMatrix | NotApplicable) -> str:
    if isinstance(matrix, NotApplicable):
        return f"{label} not watched: {_ended(matrix.reason)}"
    bias = ", with a bias" if matrix.bias else ""
    return (
        f"{label}: {matrix.rows:,} rows x {matrix.width:,}, {matrix.dtype}{bias}; baseline: {_ended(matrix.baseline)}"
    )


def data_read(preflight: Preflight) -> str:
    """How much of the training data was read, in words."""
    rows = _count(preflight.rows, "row")
    if not preflight.batches:  # counted beforehand, from the data itself
        return f"all {rows} of the training data"
    batches = _count(preflight.batches, "batch", "batches")
    return f"{'all' if preflight.complete else 'a sample of'} {batches} ({rows}) of the training data"


def _hardest_hit(never: Tensor, table: VocabTable, most: int = 5) -> list[str]:
    """Large groups with at least the vocabulary's own share of never-targets, most tokens first."""
    names = table.names
    totals = table.group[table.live].long().bincount(minlength=len(names)).tolist()
    missing = table.group[never].long().bincount(minlength=len(names)).tolist()
    overall = sum(missing) / max(sum(totals), 1)
    hit = [
        (lost, total, name)
        for lost, total, name in zip(missing, totals, names, strict=True)
        if lost and total >= LARGE_GROUP and lost / total >= overall
    ]
    worst = sorted(hit, reverse=True)[:most]
    return [f"{lost:,} of {total:,} {label_of(name)} ({percent(lost / total)})" for lost, total, name in worst]


def _drift_part(result: CheckResult, groups: Collection[str] | None, most: int = 3) -> str:
    matrix = measured_matrix(result)
    if matrix is None:
        return "row drift not applicable"
    row = _report_row(result.scalars, matrix, None, "all")
    said = f"{matrix} mean {number(row.mean)}, min {number(row.minimum, 3)}; {percent(row.below_95)} below 0.95"
    shares = _group_shares(result.scalars, matrix)
    allowed = shares if groups is None else groups
    bar = 1.2 * (row.below_95 or 0.0)
    worse = [(share, name) for name, share in shares.items() if share > bar and name in allowed]
    named = ", ".join(f"{label_of(name)} {percent(share)}" for share, name in sorted(worse, reverse=True)[:most])
    return f"{said} ({named})" if named else said


def _group_shares(scalars: Mapping[str, float], matrix: MatrixName) -> dict[str, float]:
    """Share below 0.95 of each group that was logged."""
    prefix, suffix = f"vocabguard/{matrix}/", "/below_0.95"
    names = (
        key.removeprefix(prefix).removesuffix(suffix) for key in scalars if key.startswith(prefix) and suffix in key
    )
    shares = {name: _finite(scalars, f"{prefix}{name}{suffix}") for name in names if name not in EXPOSURE_CLASSES}
    return {name: share for name, share in shares.items() if share is not None}


def _report_row(
    scalars: Mapping[str, float], matrix: MatrixName | None, part: str | None, kind: Literal["all", "group", "class"]
) -> ReportRow:
    inner = "" if part is None else f"{part}/"

    def drift(name: str) -> float | None:
        return None if matrix is None else _finite(scalars, f"vocabguard/{matrix}/{inner}{name}")

    return ReportRow(
        label=part or "all", kind=kind, mean=drift("cosine_mean"), minimum=drift("cosine_min"),
        below_95=drift("below_0.95"), below_90=drift("below_0.90"),
        retained=_finite(scalars, f"vocabguard/probe/{inner}retained"),
    )  # fmt: skip


def _measured(row: ReportRow) -> bool:
    return any(value is not None for value in (row.mean, row.minimum, row.below_95, row.below_90, row.retained))


def _badness(row: ReportRow) -> tuple[float, float]:
    """Sorts the most degraded first, then the least retained."""
    degraded = -1.0 if row.below_95 is None else row.below_95
    return -degraded, 2.0 if row.retained is None else row.retained


def _finite(scalars: Mapping[str, float], key: str) -> float | None:
    value = scalars.get(key)
    return value if value is not None and math.isfinite(value) else None


def _repeated(report: TokenReport) -> str:
    """The probed probability of a token; an estimated one where it was not probed."""
    recall = report.recall
    if report.probability is None and recall is not None and math.isfinite(recall):
        return f"~{_probability(math.exp(recall))}"
    return _probability(report.probability)


def _probability(value: float | None) -> str:
    return "<0.001" if value is not None and 0 <= value < 0.0005 else number(value, 3)


def _count(count: int, singular: str, plural: str | None = None) -> str:
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def _ended(sentence: str) -> str:
    sentence = sentence.strip()
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."


def listed(names: Sequence[str], count: int, shown: int = 8) -> str:
    """The first few of so many names, and how many there are beside them.

    >>> listed(["a", "b", "c"], 12, 2)
    'a, b and 10 more'
    """
    more = count - min(shown, len(names))
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")
