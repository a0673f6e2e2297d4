"""How a run folder becomes what the report page shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from vocabguard.compare.body_text import body_sentence
from vocabguard.compare.evidence import evidence_sentences
from vocabguard.compare.summary import KINDS, load_scan
from vocabguard.measure.exposure import exposure_classes
from vocabguard.measure.retention import gone, said, said_instead
from vocabguard.report.commands import Next, after_probe, after_run, after_scan
from vocabguard.results import (
    AGREEMENT,
    EXPOSURE_CLASSES,
    AlertStory,
    CheckResult,
    MatrixName,
    NotApplicable,
    ProbeResult,
    TokenReport,
    Transition,
    Watch,
    WatchedMatrix,
)
from vocabguard.rows.tensors import MATRICES
from vocabguard.runlog import NOTES, RunLog, evidence_in
from vocabguard.text import ReportRow, listed, number, report_rows, visible, watch_sentences
from vocabguard.views.findings import Story, story_of

TOP = 500
"""Tokens listed on a page."""

TextOf = Callable[[int], str]
"""The text of an id."""


@dataclass(frozen=True)
class RowNumbers:
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
        recall: float32 <= 0, estimated recall in nats; None too where the estimate does not rank tokens.
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
    recall: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Probed:
    """What the last logged probe found of n tokens.

    Attributes:
        ids: (n,) int64.
        said: (n,) bool, emitted in most contexts now.
        gone: (n,) bool, emitted in fewer than half of them.
        at_base: (n,) bool, said at the base; None where it was not logged.
        probability: (n,) float32 in [0, 1], of the right token, mean over contexts.
        instead: (n,) int64, the wrong token said in most contexts; -1 if always right.
    """

    ids: NDArray[np.int64]
    said: NDArray[np.bool_]
    gone: NDArray[np.bool_]
    at_base: NDArray[np.bool_] | None
    probability: NDArray[np.float32]
    instead: NDArray[np.int64]

    @property
    def lost(self) -> NDArray[np.bool_]:
        """(n,) bool: gone now, and said at the base where that is known."""
        return self.gone if self.at_base is None else self.at_base & self.gone


@dataclass(frozen=True)
class TokenLine:
    """One line of the table of tokens; ``said`` by most contexts of the last probe, None if not probed."""

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
    """

    on: bool
    mode: str
    targets: int
    seconds: float
    by_group: Mapping[str, int]
    by_class: Mapping[str, int]


@dataclass(frozen=True)
class Beside:
    """What was found beside the checks, of one of `vocabguard.runlog.NOTES`, when it was last looked at."""

    kind: str
    step: int
    story: Story


@dataclass(frozen=True)
class Judged:
    """A verdict that a file brings with it, see `vocabguard.compare.verdicts.probe_verdict`."""

    level: str
    sentence: str
    findings: tuple[str, ...]
    not_measured: tuple[str, ...]


@dataclass(frozen=True)
class PageData:
    """One run or scan, ready to be shown.

    Attributes:
        name: the folder or file, for headings.
        step: of the last check; None for a scan.
        end: planned optimizer steps, where a forecast says so; None where that is not known.
        about: sentences on what was measured and what was not.
        matrix: whose drift is shown; None where none was measured.
        live: live tokens; None if not known.
        embedding: the same for the input embedding, where it is a second matrix; else empty.
        sizes: live tokens by row label of the table; labels that are not known are missing.
        scalars: logged keys without ``vocabguard/`` and their latest values; what is not finite is left out.
        curves: the same keys -> steps and values over the run, NaN where a check had none.
        probe_step: step of the last probe; None if there was none.
        alerts: changes of alerts, in order.
        rows: every row's numbers, if they were kept.
        tokens: lost tokens, worst tokens and watched tokens; lost ones first, then by estimated recall or by cosine.
        echo: what echo has done by the last check; None without echo.
        beside: what was found beside the checks, the latest of each kind.
        verdict: that of a probe that the file holds; None where there is none.
        origin: where it comes from, name and value: model, data, date, versions, command.
        vocabulary: what each id says; empty where that is not known.
        commands: what to do next.
        evidence: what it was measured on, as `vocabguard.compare.evidence` has it; empty where it does not tell.
    """

    name: str
    kind: Literal["run", "scan", "probe"]
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
    rows: RowNumbers | None = None
    probed: Probed | None = None
    tokens: tuple[TokenLine, ...] = ()
    echo: EchoDone | None = None
    beside: tuple[Beside, ...] = ()
    verdict: Judged | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict, repr=False)
    text: TextOf = field(default=lambda token: f"<row {token}>", repr=False)
    vocabulary: Sequence[str] = field(default=(), repr=False)
    commands: tuple[Next, ...] = ()

    @property
    def whole(self) -> ReportRow | None:
        """The table's row of all live tokens."""
        return next((row for row in self.table if row.kind == "all"), None)


def sizes_of(rows: RowNumbers | None, names: Sequence[str]) -> dict[str, int]:
    """Live tokens of all, of each group and of each exposure class, as far as they are known; without rows none is."""
    if rows is None:
        return {}
    groups = np.bincount(rows.group[rows.live], minlength=len(names)).tolist()
    sizes = {"all": int(rows.live.sum()), **dict(zip(names, groups, strict=False))}
    if rows.classes is None:
        return sizes
    classes = np.bincount(rows.classes[rows.live], minlength=len(EXPOSURE_CLASSES)).tolist()
    return sizes | dict(zip(EXPOSURE_CLASSES, classes, strict=False))


def choose_tokens(rows: RowNumbers, probed: Probed | None, top: int = TOP) -> list[int]:
    """Ids to list: lost tokens, least likely first, in at most half of the lines; then the worst ones.

    Those are the tokens of lowest estimated recall, or where that is not measured, of lowest cosine.
    """
    chosen: list[int] = []
    if probed is not None:
        lost = np.flatnonzero(probed.lost)
        lost = lost[np.argsort(probed.probability[lost], kind="stable")]
        chosen = probed.ids[lost][: top // 2].tolist()
    measured = rows.cosine if rows.recall is None else rows.recall
    if measured is None:
        return chosen
    ranked = np.where(rows.live & np.isfinite(measured), measured, np.inf)
    ranked[chosen] = np.inf
    lowest = np.argsort(ranked, kind="stable")[: top - len(chosen)]
    return [*chosen, *lowest[ranked[lowest] < np.inf].tolist()]


def token_lines(
    ids: Iterable[int], rows: RowNumbers, probed: Probed | None, names: Sequence[str], text: TextOf, step: int,
    watched: Iterable[int] = (),
) -> tuple[TokenLine, ...]:  # fmt: skip
    """What is known about the given tokens, in their order; ids are in [0, V)."""
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
            id=token, text=text(token), group=names[int(rows.group[token])],
            exposure_class="unknown" if rows.classes is None else EXPOSURE_CLASSES[int(rows.classes[token])],
            cosine=at(rows.cosine, token, math.nan), residual=at(rows.residual, token, math.nan),
            data_target=at(rows.targets, token, 0), inputs=at(rows.inputs, token, 0),
            steps_since_target=max(0, step - since) if since >= 0 else None,
            probability=None if probed is None or row is None else float(probed.probability[row]),
            said_instead=text(other) if other >= 0 else None, recall=at(rows.recall, token, None),
        )  # fmt: skip
        lines.append(
            TokenLine(report, None if probed is None or row is None else bool(probed.said[row]), token in on_list)
        )
    return tuple(lines)


_PREFIX = "vocabguard/"
_CONFUSION = "confusion/"
_PROBED = ("probe/", "recall/")


def run_data(log: RunLog, text: TextOf | None = None, top: int = TOP) -> PageData:
    """What a run folder says, as the page needs it.

    Args:
        log: the run folder, finished or still being written.
        text: of any id; None takes the log's own, and calls those that it does not know ``<row 17>``.
        top: tokens to list, those of the watch list not counted.

    Raises:
        ValueError: if a file of the folder is torn or does not hold what a run folder holds.
    """
    try:
        return _run_data(log, text, top)
    except OSError:
        raise
    except Exception as error:
        # Whatever is wrong in a file written by something else: safetensors and JSON raise errors of many kinds.
        detail = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{log.folder} cannot be read as a run folder: {detail}") from error


def _run_data(log: RunLog, text: TextOf | None, top: int) -> PageData:
    checks, names = Checks(log.each_check()), tuple(str(name) for name in log.meta["groups"])
    watch = _watch(log.meta["watch"], str(log.folder))
    evidence = evidence_in(log.folder) or {}
    notes = {kind: found for kind in NOTES if (found := log.notes(kind))}
    curves = _with_languages(checks.curves, notes.get("confusion", ()))
    scalars = checks.scalars | {key: values[-1] for key, (_, values) in curves.items() if key.startswith(_CONFUSION)}
    matrix = _measured(scalars)
    steps = log.row_steps
    vectors = log.rows(steps[-1]) if steps else {}
    rows = _rows(vectors, steps[-1] if steps else None, matrix, len(names))
    if rows is not None and scalars.get("recall/agreement", 0.0) < AGREEMENT:
        rows = replace(rows, recall=None)
    probed = _probed(vectors)
    last = checks.last
    unforeseen = (last.get("forecast") or {}).get("not_applicable")
    known, written = checks.texts, log.texts()
    say = text or (lambda token: "".join(written[token : token + 1]) or known.get(token, f"<row {token}>"))
    result = _result(scalars)
    tied = isinstance(watch.head, WatchedMatrix) and watch.head.tied
    both = matrix == "head" and not tied and "embedding/cosine_mean" in scalars
    return PageData(
        name=str(log.folder), kind="run", step=int(last["step"]) if last else None,
        end=_end(checks, scalars, matrix),
        about=(*watch_sentences(watch), *([f"No forecast of the end: {unforeseen}."] if unforeseen else []),
               *evidence_sentences({**evidence, "versions": None})),
        names=names, matrix=matrix, live=watch.live, table=report_rows(result, names, matrix) if last else (),
        embedding=report_rows(result, names, "embedding") if both else (), sizes=sizes_of(rows, names),
        scalars=scalars, curves=curves,
        probe_step=checks.probe_step,
        alerts=tuple(map(plain_alert, log.alerts())), rules=rules_of(log.meta["config"]),
        firing=tuple(map(str, last.get("firing", ()))), rows=rows, probed=probed,
        tokens=_tokens(rows, probed, names, say, top, last), echo=_echo(last.get("echo")),
        beside=tuple(_beside(kind, lines) for kind, lines in notes.items()), settings=_flat(log.meta["config"]),
        text=say, origin=_run_origin(log.meta), vocabulary=written,
        commands=after_run(log.folder, log.meta.get("origin"), lost=probed is not None and bool(probed.lost.any())),
        evidence=evidence,
    )  # fmt: skip


def _watch(meta: Mapping[str, Any], folder: str) -> Watch:
    """The `Watch` that a log keeps, without its vectors."""

    def matrix(entry: Mapping[str, Any]) -> WatchedMatrix | NotApplicable:
        return _absent(entry) or WatchedMatrix(**{spec.name: entry[spec.name] for spec in fields(WatchedMatrix)})

    return Watch(
        head=matrix(meta["head"]), embedding=matrix(meta["embedding"]), probe=_absent(meta["probe"] or {}),
        preflight=NotApplicable("its counts are not logged"), live=int(meta["live"]),
        never_trained=int(meta["never_trained"]), run_dir=folder, notes=tuple(map(str, meta["notes"])),
    )  # fmt: skip


def _absent(entry: Mapping[str, Any]) -> NotApplicable | None:
    return NotApplicable(str(entry["not_applicable"])) if "not_applicable" in entry else None


def _value(number: float | None) -> float:
    return math.nan if number is None else float(number)


class Checks:
    """What a page needs of a run's checks, which are read one at a time.

    Attributes:
        last: the last check; empty if there is none.
        probe_step: the last step with a probe.
        total: planned steps of the run, as the last forecast has them.
        curves: each scalar's steps and values.
        scalars: the last check's; those of the probe from the last check that had one.
        texts: of all tokens that the checks name.
    """

    def __init__(self, checks: Iterable[Mapping[str, Any]]) -> None:
        self.last: Mapping[str, Any] = {}
        self.probe_step: int | None = None
        self.total: int | None = None
        self.curves: dict[str, tuple[list[int], list[float]]] = {}
        self.texts: dict[int, str] = {}
        probed: Mapping[str, float | None] = {}
        curve_of: dict[str, Curve] = {}
        for check in checks:
            self.last = check
            _add_points(self.curves, "", int(check["step"]), check["scalars"], curve_of)
            if check["probed"]:
                self.probe_step = max(check["step"], -1 if self.probe_step is None else self.probe_step)
                probed = check["scalars"]
            if (said := check.get("forecast")) and "total" in said:
                self.total = int(said["total"])
            for token in (*check["worst"], *check["watched"]):
                self.texts[int(token["id"])] = str(token["text"])
        kept = {key: value for key, value in _named(probed).items() if key.startswith(_PROBED)}
        latest = _named(self.last.get("scalars", {}))
        latest = latest if self.last.get("probed") else kept | latest
        self.scalars = {key: value for key, value in latest.items() if math.isfinite(value)}


def _named(scalars: Mapping[str, float | None]) -> dict[str, float]:
    return {key.removeprefix(_PREFIX): _value(value) for key, value in scalars.items()}


Curve = tuple[list[int], list[float]]
"""Steps and values."""


def _add_points(
    curves: dict[str, Curve], prefix: str, step: int, values: Mapping[str, float | None],
    curve_of: dict[str, Curve] | None = None,
) -> None:  # fmt: skip
    """Add a value to each curve. `curve_of`: by the whole key, for calls with the same prefix to look up quickly."""
    known = {} if curve_of is None else curve_of
    for key, value in values.items():
        if (curve := known.get(key)) is None:
            curve = known[key] = curves.setdefault(prefix + key.removeprefix(_PREFIX), ([], []))
        curve[0].append(step)
        curve[1].append(math.nan if value is None else float(value))


def _with_languages(
    curves: dict[str, tuple[list[int], list[float]]], confusion: Iterable[Mapping[str, Any]]
) -> dict[str, tuple[list[int], list[float]]]:
    """Also shares of answers with foreign letters, by language and their mean."""
    for line in confusion:
        shares = {key: share for key, share in line["shares"].items() if key == "foreign" or key in line["answers"]}
        _add_points(curves, _CONFUSION, int(line["step"]), shares)
    return curves


def _beside(kind: str, lines: Sequence[Mapping[str, Any]]) -> Beside:
    """What the lines of the latest step say."""
    step = int(lines[-1]["step"])
    return Beside(kind, step, story_of(kind, [line for line in lines if line["step"] == step]))


def _end(checks: Checks, scalars: Mapping[str, float], matrix: MatrixName | None) -> int | None:
    """Planned steps of the run. Earlier versions did not write them; what is just as forecast then is at its end."""
    if checks.total is not None or not checks.last:
        return checks.total
    now, then = (scalars.get(f"{owner}/below_0.95", math.nan) for owner in (matrix, "forecast"))
    return int(checks.last["step"]) if math.isclose(now, then, abs_tol=1e-9) else None


def _measured(scalars: Mapping[str, float]) -> MatrixName | None:
    return next(
        (name for name in MATRICES if f"{name}/nonfinite_rows" in scalars or f"{name}/cosine_mean" in scalars), None
    )


def _result(scalars: Mapping[str, float]) -> CheckResult:
    """A check as `report_rows` reads it, which looks at the scalars alone."""
    gone = NotApplicable("only the numbers are read")
    named = {_PREFIX + key: value for key, value in scalars.items()}
    return CheckResult(0, gone, gone, gone, torch.empty(0, dtype=torch.uint8), None, named)


def _rows(vectors: Mapping[str, Tensor], step: int | None, matrix: MatrixName | None, groups: int) -> RowNumbers | None:
    if not vectors:
        return None
    group, live = vectors["group"].numpy(), vectors["live"].numpy()
    if group.shape != live.shape or group.ndim != 1 or (group.size and group.max() >= groups):
        raise ValueError(f"rows: group is {group.shape}, live {live.shape}, for {groups} groups")

    def vector(name: str) -> Any:
        found = vectors.get(name)
        if found is not None and found.shape != group.shape:
            raise ValueError(f"rows: {name} is {tuple(found.shape)}; expected {group.shape}")
        return None if found is None else found.numpy()

    # Without counts every class is logged as "never", which says nothing.
    counted = "exposure/data_target" in vectors
    return RowNumbers(
        step=step, group=group, live=live.astype(bool), cosine=vector(f"{matrix}/cosine"),
        residual=vector(f"{matrix}/residual"), targets=vector("exposure/data_target"),
        inputs=vector("exposure/inputs"), last_target=vector("exposure/last_target"),
        classes=vector("classes") if counted else None, recall=vector("recall/nats"),
    )  # fmt: skip


def _probed(vectors: Mapping[str, Tensor]) -> Probed | None:
    if "probe/ids" not in vectors:
        return None
    ids, emitted = vectors["probe/ids"], vectors["probe/said"]
    probability, instead = vectors["probe/probability"], vectors["probe/instead"]
    # A log keeps no ranks, and neither function below reads them.
    now = ProbeResult((), ids, emitted, probability, torch.zeros_like(instead), instead)
    base = vectors.get("probe/base_said")
    return Probed(
        ids=ids.numpy(),
        said=said(now).numpy(),
        gone=gone(now).numpy(),
        at_base=None if base is None else (base.sum(1) * 2 > base.shape[1]).numpy(),
        probability=probability.mean(1).numpy(),
        instead=said_instead(now).numpy(),
    )


def _tokens(
    rows: RowNumbers | None, probed: Probed | None, names: Sequence[str], text: TextOf, top: int,
    last: Mapping[str, Any],
) -> tuple[TokenLine, ...]:  # fmt: skip
    """The tokens to list; where no rows were kept, those that the last check names."""
    watched = [int(token["id"]) for token in last.get("watched", ())]
    if rows is None:
        logged = [_as_report(token) for token in (*last.get("worst", ()), *last.get("watched", ()))]
        once = {report.id: TokenLine(report, None, report.id in watched) for report in logged}
        return tuple(once.values())
    chosen = choose_tokens(rows, probed, top)
    chosen += sorted(set(watched) - set(chosen))
    return token_lines(chosen, rows, probed, names, text, int(last.get("step", 0)), watched)


def _as_report(token: Mapping[str, Any]) -> TokenReport:
    since, probability, instead = (token[name] for name in ("steps_since_target", "probability", "said_instead"))
    return TokenReport(
        id=int(token["id"]), text=str(token["text"]), group=str(token["group"]),
        exposure_class=str(token["exposure_class"]), cosine=_value(token["cosine"]),
        residual=_value(token["residual"]), data_target=int(token["data_target"]), inputs=int(token["inputs"]),
        steps_since_target=None if since is None else int(since),
        probability=None if probability is None else float(probability),
        said_instead=None if instead is None else str(instead),
        # Logs of earlier versions have none.
        recall=None if (recall := token.get("recall")) is None else float(recall),
    )  # fmt: skip


def _echo(report: Mapping[str, Any] | None) -> EchoDone | None:
    if report is None:
        return None
    counts = [{str(name): int(count) for name, count in report[by].items()} for by in ("by_group", "by_class")]
    return EchoDone(
        on=bool(report["on"]),
        mode="" if report["plan"] is None else str(report["plan"]["mode"]),
        targets=int(report["targets"]),
        seconds=float(report["seconds"] or 0.0),
        by_group=counts[0],
        by_class=counts[1],
    )


def _flat(settings: Any, before: str = "") -> dict[str, str]:
    """Dotted keys and values as text."""
    if not isinstance(settings, Mapping) or not settings:
        return {before.rstrip("."): str(settings)}
    return {key: value for name, inner in settings.items() for key, value in _flat(inner, f"{before}{name}.").items()}


def _run_origin(meta: Mapping[str, Any]) -> dict[str, str]:
    """Where a run comes from, as far as ``run.json`` tells."""
    known = meta.get("origin") or {}
    size = known.get("parameters")
    model = known.get("model") or known.get("model_class")
    resumed = len(meta.get("resumed") or ())
    started = str(meta.get("created") or "").replace("T", " ").replace("+00:00", " UTC")
    facts = {
        "model": f"{model} ({_parameters(size)})" if model and isinstance(size, int) else model,
        "data": known.get("data"),
        "started": started + (f", resumed {resumed} time{'s'[: resumed > 1]}" if resumed else ""),
        "command": known.get("command"),
        "versions": _versions(known.get("versions") or {"vocabguard": meta.get("vocabguard")}),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _file_origin(found: Mapping[str, Any], evidence: Mapping[str, Any]) -> dict[str, str]:
    """Where a file of `scan` or `probe` comes from."""
    facts = {
        "model": found.get("tuned"),
        "base": None if found.get("one_sided") else found.get("base"),
        "device": evidence.get("device"),
        "versions": _versions(evidence.get("versions") or {}),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _file_commands(path: str, found: Mapping[str, Any], probed: Probed | None) -> tuple[Next, ...]:
    """What follows from a file of `scan` or `probe`."""
    base = None if found.get("one_sided") else found.get("base")
    worst = [str(token["id"]) for token in found.get("worst", ())]
    if probed is None:
        return after_scan(base, found["tuned"], None, tokens=worst)
    lost = probed.ids[probed.lost].tolist() if base else []
    return after_probe(found["tuned"], base, path, tokens=lost, lost=bool(lost))[: 3 if lost else 0]


def _versions(found: Mapping[str, Any]) -> str:
    shown = ("vocabguard", "torch", "transformers", "python")
    return ", ".join(f"{name} {found[name]}" for name in shown if found.get(name))


def _parameters(count: int) -> str:
    """A model's size as people say it: ``135 M parameters``."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit} parameters"
    return f"{count} parameters"


def scan_data(path: str | Path, top: int = TOP) -> PageData:
    """What a file of `vocabguard.compare.summary.save_scan` says, as the page needs it.

    Raises:
        ValueError: if it is no scan's file, or of another schema.
    """
    vectors, found, texts = load_scan(path)
    try:
        return _scan_data(str(path), vectors, found, texts, top)
    except OSError:
        raise
    except Exception as error:
        # A header that something else wrote can be wrong in any way.
        raise ValueError(
            f"{path}: is no file of `vocabguard scan --out` ({type(error).__name__}: {error}); allowed too: a file of "
            "`probe --out`, a run folder, a trainer's output folder"
        ) from error


def _scan_data(
    path: str, vectors: Mapping[str, Tensor], found: Mapping[str, Any], texts: list[str], top: int
) -> PageData:
    names, matrix = _group_names(path), found["judged"]
    rows = _scan_rows(vectors, matrix)
    scalars = {key: value for name in MATRICES for key, value in _scan_flat(name, found[name])}
    scalars |= dict(_asked_flat(found.get("probe")))
    probed = _probed(vectors)
    tied = found["tied"]["base"] and found["tied"]["tuned"]
    both = matrix == "head" and not tied and "embedding/cosine_mean" in scalars
    evidence = found.get("evidence") or {}

    def text(token: int) -> str:
        return texts[token] or f"<row {token}>"

    return PageData(
        name=path, kind=_kind_of(path), step=None,
        about=(*_about(found, asked=probed is not None), *_odd_rows(found, matrix), *evidence_sentences(evidence)),
        names=names, matrix=matrix, live=int(found["tokens"]["live"]),
        table=report_rows(_result(scalars), names, matrix),
        embedding=report_rows(_result(scalars), names, "embedding") if both else (), sizes=sizes_of(rows, names),
        scalars=scalars, rows=rows, probed=probed,
        tokens=token_lines(choose_tokens(rows, probed, top), rows, probed, names, text, 0), text=text,
        verdict=_page_verdict(found.get("probe")), settings=_flat(evidence.get("arguments") or {}) if evidence else {},
        origin=_file_origin(found, evidence), vocabulary=texts, commands=_file_commands(path, found, probed),
        evidence=evidence,
    )  # fmt: skip


def _page_verdict(probe: Mapping[str, Any] | None) -> Judged | None:
    if not probe:
        return None
    found = probe["verdict"]
    return Judged(
        str(found["level"]), str(found["sentence"]), tuple(map(str, found["findings"])),
        tuple(map(str, found["not_measured"])),
    )  # fmt: skip


def _asked_flat(probe: Mapping[str, Any] | None) -> Iterator[tuple[str, float]]:
    """A probe's numbers by the keys that a run logs."""
    if not probe:
        return
    parts = {"": probe["numbers"], **probe.get("groups", {}), **probe.get("classes", {})}
    for part, values in parts.items():
        for key, value in values.items():
            if isinstance(value, (int, float)) and key not in ("low", "high"):
                yield f"probe/{part}/{key}" if part else f"probe/{key}", float(value)
    for key, value in probe.get("reference", {}).items():
        if isinstance(value, (int, float)):
            yield f"reference/{key}", float(value)
    known = [word for word in probe.get("words", ()) if word["known"]]
    if known and "outright" in probe:
        yield "probe/watch", 1 - sum(bool(word["lost"]) for word in known) / len(known)


def _kind_of(path: str) -> Literal["scan", "probe"]:
    """What a file says of itself."""
    with safe_open(path, framework="pt") as file:
        return "probe" if (file.metadata() or {}).get("kind") == KINDS[1] else "scan"


def _group_names(path: str) -> tuple[str, ...]:
    with safe_open(path, framework="pt") as file:
        return tuple(str(name) for name in json.loads(file.metadata()["groups"]))


def _scan_rows(vectors: Mapping[str, Tensor], matrix: MatrixName | None) -> RowNumbers:
    counts = vectors.get("data_target")
    # A probe's vectors are of the tokens that it asked for.
    of_rows = {name: one for name, one in vectors.items() if not name.startswith(("probe/", "reference/", "words/"))}
    shapes = {name: tuple(vector.shape) for name, vector in of_rows.items() if vector.shape != vectors["live"].shape}
    if shapes:
        raise ValueError(f"vectors of other lengths than live's {tuple(vectors['live'].shape)}: {shapes}")

    def vector(name: str) -> Any:
        return vectors[name].numpy() if name in vectors else None

    return RowNumbers(
        step=None, group=vectors["group"].numpy(), live=vectors["live"].numpy(), cosine=vector(f"{matrix}/cosine"),
        residual=vector(f"{matrix}/residual"), l2=vector(f"{matrix}/l2"), targets=vector("data_target"),
        classes=None if counts is None else exposure_classes(counts).numpy(),
    )  # fmt: skip


def _scan_flat(name: str, numbers: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """One matrix's numbers by the keys that a run logs."""
    if zeroed := (numbers.get("zeroed_rows") or {}).get("count"):
        yield f"{name}/zeroed_rows", float(zeroed)
    parts = {"": numbers, **numbers.get("groups", {}), **numbers.get("classes", {})}
    for part, values in parts.items():
        for key, value in values.items():
            if isinstance(value, (int, float)):
                yield f"{name}/{part}/{key}" if part else f"{name}/{key}", float(value)


def _about(found: Mapping[str, Any], *, asked: bool) -> tuple[str, ...]:
    tokens, matched = found["tokens"], found["matched"]
    said = ["Base: none"] if found.get("one_sided") else [f"Base: {found['base']}"]
    said.append(f"{'Model' if found.get('one_sided') else 'Tuned'}: {found['tuned']}")
    said += [
        f"{name.capitalize()} not applicable: {found[name]['not_applicable']}."
        for name in MATRICES
        if "not_applicable" in found[name]
    ]
    added = f"; {matched['added']:,} have no base row, {matched['removed']:,} of the base are gone"
    said.append(f"{tokens['rows']:,} rows matched by {matched['by']}{added if matched['added'] else ''}.")
    said.append(f"Residual: without the mean displacement of the {found['residual_over']}.")
    apart = f"{tokens['control']:,} control, {tokens['unreachable']:,} unreachable, {tokens['padded']:,} padded"
    said.append(f"Set apart: {apart}, {tokens['never_trained']:,} never trained at the base.")
    if body := found.get("body"):
        sentence = body_sentence(body)
        said.append(f"{sentence[0].upper()}{sentence[1:]}.")
    if asked:
        return (*said, *_how_asked(found["probe"]))
    return (*said, "A scan reads weights only: whether a token is still repeated was not measured.")


def _how_asked(probe: Mapping[str, Any]) -> tuple[str, ...]:
    asked = probe["asked"]
    sampled = "all" if asked["whole"] else f"{asked['tokens']:,} sampled"
    said = [
        f"Asked for {sampled} of {asked['live']:,} live tokens, {len(asked['asks'])} times each "
        f"({', '.join(asked['asks'])}; seed {asked['seed']}).",
        f"Not measured: {'; '.join(probe['verdict']['not_measured'])}.",
    ]
    if where := probe.get("where"):
        said.append(
            f"Of {where['forgotten']:,} lost tokens probed again, {where['head']:,} come back with the base's "
            f"output row, {where['input']:,} with its input row too, {where.get('other_rows', 0):,} only with the "
            f"rows of all tokens, {where['body']:,} with no row."
        )
    return tuple(said)


def _odd_rows(found: Mapping[str, Any], matrix: MatrixName | None) -> list[str]:
    """Rows that were never trained, and those whose norm is out of line, by name."""
    said, untrained = [], found.get("untrained")
    if untrained and untrained["count"]:
        named = listed([visible(name, 24) for name in untrained["texts"]], untrained["count"])
        said.append(f"Never trained at the base: {named}.")
    if untrained and untrained.get("not_measured"):
        reason = untrained["not_measured"]
        said.append(f"Under-trained tokens not measured: {reason}; only rows of tiny norm are set apart.")
    outliers = found[matrix].get("norm_outliers") if matrix else None
    if outliers and outliers["count"]:
        named = listed([visible(name, 24) for name in outliers["texts"]], outliers["count"])
        said.append(
            f"{outliers['count']:,} live rows have a norm out of line (the median row's is "
            f"{number(outliers['median_ratio'], 3)} times what it was): {named}."
        )
    return said


def plain_alert(alert: Transition) -> Transition:
    """The same with every field of its type, or an error here rather than on the page."""
    return Transition(
        rule=str(alert.rule), state="resolved" if alert.state == "resolved" else "firing", level=str(alert.level),
        metric=str(alert.metric), value=float(alert.value), step=int(alert.step), message=str(alert.message),
        since=None if alert.since is None else int(alert.since), again=bool(alert.again),
        parts={str(part): float(value) for part, value in alert.parts.items()},
        story=None if alert.story is None else _plain_story(alert.story),
    )  # fmt: skip


def _plain_story(story: AlertStory) -> AlertStory:
    return AlertStory(
        what=str(story.what), where=str(story.where), rows=None if story.rows is None else int(story.rows),
        share=None if story.share is None else float(story.share), tokens=tuple(map(str, story.tokens)),
        since=str(story.since), outlook=str(story.outlook), advice=tuple(map(str, story.advice)),
    )  # fmt: skip


def rules_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the rules that the settings of a run switch on; none where they do not tell."""
    alerts = settings.get("alerts")
    found = alerts.items() if isinstance(alerts, Mapping) else ()
    return tuple(str(name) for name, rule in found if isinstance(rule, Mapping) and rule.get("enabled", True))
