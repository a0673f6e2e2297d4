"""What the report page shows of one run or scan, as plain data.

A source, be it a run folder or a scan of two checkpoints, only fills a `PageData`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vocabguard.results import EXPOSURE_CLASSES, MatrixName, TokenReport
from vocabguard.transitions import Transition
from vocabguard.views.findings import Story
from vocabguard.views.wording import ReportRow

TOP = 500
"""Tokens listed on a page."""

TextOf = Callable[[int], str]
"""The text of an id."""


@dataclass(frozen=True)
class Rows:
    """Every row's numbers; (V,) arrays, None where not measured.

    Attributes:
        step: optimizer step at which they were taken; None for a scan.
        group: uint8, index into the group names.
        live: bool.
        cosine: float32 in [-1, 1] of the measured matrix; NaN where the row is bad or of zero norm.
        residual: float32 in [-1, 1], NaN as above.
        targets: int64, data targets so far.
        inputs: int64, data inputs so far.
        last_target: int64, step in which it last was a target; -1 if never.
        classes: uint8, index into `EXPOSURE_CLASSES`.
        l2: float32, length of the displacement.
    """

    step: int | None
    group: NDArray[np.uint8]
    live: NDArray[np.bool_]
    cosine: NDArray[np.float32] | None = None
    residual: NDArray[np.float32] | None = None
    targets: NDArray[np.int64] | None = None
    inputs: NDArray[np.int64] | None = None
    last_target: NDArray[np.int64] | None = None
    classes: NDArray[np.uint8] | None = None
    l2: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Probed:
    """What the last logged probe found of n tokens.

    Attributes:
        ids: (n,) int64.
        said: (n,) bool, emitted in most contexts now.
        at_base: (n,) bool, the same at the base; None where it was not logged.
        probability: (n,) float32 in [0, 1], of the right token, mean over contexts.
        instead: (n,) int64, the wrong token said in most contexts; -1 if always right.
    """

    ids: NDArray[np.int64]
    said: NDArray[np.bool_]
    at_base: NDArray[np.bool_] | None
    probability: NDArray[np.float32]
    instead: NDArray[np.int64]

    @property
    def lost(self) -> NDArray[np.bool_]:
        """(n,) bool: not said now, and said at the base where that is known."""
        return ~self.said if self.at_base is None else self.at_base & ~self.said


@dataclass(frozen=True)
class TokenLine:
    """One line of the table of tokens.

    Attributes:
        report: what is known about the token.
        said: whether most contexts of the last probe got it; None if not probed.
        watched: whether it is on the watch list.
    """

    report: TokenReport
    said: bool | None
    watched: bool = False


@dataclass(frozen=True)
class EchoDone:
    """What echo has done by the last check.

    Attributes:
        on: whether it was switched on then.
        mode: of the newest plan; empty before the first.
        targets: echo targets so far, all processes.
        seconds: time that making rows has taken.
        by_group: echo targets by script group.
        by_class: echo targets by exposure class.
    """

    on: bool
    mode: str
    targets: int
    seconds: float
    by_group: Mapping[str, int]
    by_class: Mapping[str, int]


@dataclass(frozen=True)
class Beside:
    """What was found beside the checks, of one kind.

    Attributes:
        kind: one of `vocabguard.runlog.NOTES`.
        step: at which it was last looked at.
        story: in words, and as a table.
    """

    kind: str
    step: int
    story: Story


@dataclass(frozen=True)
class PageData:
    """One run or scan, ready to be shown.

    Attributes:
        name: the folder or file, for headings.
        kind: ``run`` or ``scan``.
        step: of the last check; None for a scan.
        end: planned optimizer steps, where a forecast says so; None where that is not known.
        about: sentences on what was measured and what was not.
        names: the groups.
        matrix: whose drift is shown; None where none was measured.
        live: live tokens; None if not known.
        table: the closing table's rows.
        embedding: the same for the input embedding, where it is a second matrix; else empty.
        sizes: live tokens by row label of the table; labels that are not known are missing.
        scalars: logged keys without ``vocabguard/`` and their latest values; what is not finite is left out.
        curves: the same keys -> steps and values over the run, NaN where a check had none.
        probe_step: step of the last probe; None if there was none.
        alerts: changes of alerts, in order.
        rules: names of the rules that were switched on.
        firing: names of the rules that fire at the end.
        rows: every row's numbers, if they were kept.
        probed: the last logged probe, if it was kept.
        tokens: lost tokens, worst tokens and watched tokens; lost ones first, then by cosine.
        echo: what echo has done by the last check; None without echo.
        beside: what was found beside the checks, the latest of each kind.
        settings: dotted keys and values.
        text: the text of any id.
    """

    name: str
    kind: Literal["run", "scan"]
    step: int | None
    about: tuple[str, ...]
    names: tuple[str, ...]
    matrix: MatrixName | None
    live: int | None
    table: tuple[ReportRow, ...]
    embedding: tuple[ReportRow, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    probe_step: int | None = None
    end: int | None = None
    alerts: tuple[Transition, ...] = ()
    rules: tuple[str, ...] = ()
    firing: tuple[str, ...] = ()
    rows: Rows | None = None
    probed: Probed | None = None
    tokens: tuple[TokenLine, ...] = ()
    echo: EchoDone | None = None
    beside: tuple[Beside, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    text: TextOf = field(default=lambda token: f"<row {token}>", repr=False)


def sizes_of(rows: Rows | None, names: Sequence[str]) -> dict[str, int]:
    """Live tokens of all, of each group and of each exposure class, as far as they are known.

    Args:
        rows: of V rows; None gives nothing.
        names: the groups.
    """
    if rows is None:
        return {}
    groups = np.bincount(rows.group[rows.live], minlength=len(names)).tolist()
    sizes = {"all": int(rows.live.sum()), **dict(zip(names, groups, strict=False))}
    if rows.classes is None:
        return sizes
    classes = np.bincount(rows.classes[rows.live], minlength=len(EXPOSURE_CLASSES)).tolist()
    return sizes | dict(zip(EXPOSURE_CLASSES, classes, strict=False))


def choose_tokens(rows: Rows, probed: Probed | None, top: int = TOP) -> list[int]:
    """Ids to list: lost tokens, least likely first, in at most half of the lines; then those of lowest cosine.

    Args:
        rows: of V rows.
        probed: the last probe, if it was kept.
        top: the most ids wanted.
    """
    chosen: list[int] = []
    if probed is not None:
        lost = np.flatnonzero(probed.lost)
        lost = lost[np.argsort(probed.probability[lost], kind="stable")]
        chosen = probed.ids[lost][: top // 2].tolist()
    if rows.cosine is None:
        return chosen
    cosine = np.where(rows.live & np.isfinite(rows.cosine), rows.cosine, np.inf)
    cosine[chosen] = np.inf
    lowest = np.argsort(cosine, kind="stable")[: top - len(chosen)]
    return [*chosen, *lowest[cosine[lowest] < np.inf].tolist()]


def token_lines(
    ids: Iterable[int],
    rows: Rows,
    probed: Probed | None,
    names: Sequence[str],
    text: TextOf,
    step: int,
    watched: Iterable[int] = (),
) -> tuple[TokenLine, ...]:
    """What is known about the given tokens, in their order.

    Args:
        ids: of tokens, each in [0, V).
        rows: of V rows.
        probed: the last probe, if it was kept.
        names: the groups.
        text: of any id.
        step: the last optimizer step.
        watched: ids of the watch list.
    """
    place = {} if probed is None else {token: row for row, token in enumerate(probed.ids.tolist())}
    on_list = set(watched)

    def at(vector: NDArray[Any] | None, token: int, missing: Any) -> Any:
        return missing if vector is None else vector[token].item()

    lines = []
    for token in ids:
        row = place.get(token)
        other = -1 if probed is None or row is None else int(probed.instead[row])
        since = at(rows.last_target, token, -1)
        report = TokenReport(
            id=token,
            text=text(token),
            group=names[int(rows.group[token])],
            exposure_class="unknown" if rows.classes is None else EXPOSURE_CLASSES[int(rows.classes[token])],
            cosine=at(rows.cosine, token, math.nan),
            residual=at(rows.residual, token, math.nan),
            data_target=at(rows.targets, token, 0),
            inputs=at(rows.inputs, token, 0),
            steps_since_target=max(0, step - since) if since >= 0 else None,
            probability=None if probed is None or row is None else float(probed.probability[row]),
            said_instead=text(other) if other >= 0 else None,
        )
        lines.append(
            TokenLine(report, None if probed is None or row is None else bool(probed.said[row]), token in on_list)
        )
    return tuple(lines)
