"""How a run folder becomes what the report page shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from vocabguard.measure.probe import said, said_instead
from vocabguard.results import (
    CheckResult,
    MatrixName,
    NotApplicable,
    ProbeResult,
    TokenReport,
    Watch,
    WatchedMatrix,
)
from vocabguard.runlog import NOTES, RunLog
from vocabguard.views.findings import story_of
from vocabguard.views.html_alerts import plain_alert, rules_of
from vocabguard.views.html_data import (
    TOP,
    Beside,
    EchoDone,
    PageData,
    Probed,
    Rows,
    TextOf,
    TokenLine,
    choose_tokens,
    sizes_of,
    token_lines,
)
from vocabguard.views.wording import report_rows, watch_sentences

_PREFIX = "vocabguard/"
_CONFUSION = "confusion/"


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
    checks, names = log.checks(), tuple(str(name) for name in log.meta["groups"])
    watch = _watch(log.meta["watch"], str(log.folder))
    notes = {kind: found for kind in NOTES if (found := log.notes(kind))}
    curves = _curves(checks) | _confusion_curves(notes.get("confusion", ()))
    scalars = _latest(checks) | {key: values[-1] for key, (_, values) in curves.items() if key.startswith(_CONFUSION)}
    matrix = _measured(scalars)
    steps = log.row_steps
    vectors = log.rows(steps[-1]) if steps else {}
    rows = _rows(vectors, steps[-1] if steps else None, matrix, len(names))
    probed = _probed(vectors)
    last: Mapping[str, Any] = checks[-1] if checks else {}
    known, written = _texts(checks), log.texts()
    say = text or (lambda token: "".join(written[token : token + 1]) or known.get(token, f"<row {token}>"))
    result = _result(scalars, last)
    tied = isinstance(watch.head, WatchedMatrix) and watch.head.tied
    both = matrix == "head" and not tied and "embedding/cosine_mean" in scalars
    return PageData(
        name=str(log.folder),
        kind="run",
        step=int(last["step"]) if checks else None,
        end=_end(checks, scalars, matrix),
        about=(*watch_sentences(watch), *_unforeseen(last)),
        names=names,
        matrix=matrix,
        live=watch.live,
        table=report_rows(result, names, matrix) if checks else (),
        embedding=report_rows(result, names, "embedding") if both else (),
        sizes=sizes_of(rows, names),
        scalars=scalars,
        curves=curves,
        probe_step=max((check["step"] for check in checks if check["probed"]), default=None),
        alerts=tuple(map(plain_alert, log.alerts())),
        rules=rules_of(log.meta["config"]),
        firing=tuple(map(str, last.get("firing", ()))),
        rows=rows,
        probed=probed,
        tokens=_tokens(rows, probed, names, say, top, last),
        echo=_echo(last.get("echo")),
        beside=tuple(_beside(kind, lines) for kind, lines in notes.items()),
        settings=_flat(log.meta["config"]),
        text=say,
    )


def _watch(meta: Mapping[str, Any], folder: str) -> Watch:
    """The `Watch` that a log keeps, without its vectors."""

    def matrix(entry: Mapping[str, Any]) -> WatchedMatrix | NotApplicable:
        return _absent(entry) or WatchedMatrix(**{spec.name: entry[spec.name] for spec in fields(WatchedMatrix)})

    return Watch(
        head=matrix(meta["head"]),
        embedding=matrix(meta["embedding"]),
        probe=_absent(meta["probe"] or {}),
        preflight=NotApplicable("its counts are not logged"),
        live=int(meta["live"]),
        never_trained=int(meta["never_trained"]),
        run_dir=folder,
        notes=tuple(map(str, meta["notes"])),
    )


def _absent(entry: Mapping[str, Any]) -> NotApplicable | None:
    return NotApplicable(str(entry["not_applicable"])) if "not_applicable" in entry else None


def _value(number: float | None) -> float:
    return math.nan if number is None else float(number)


def _curves(checks: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    found: dict[str, tuple[list[int], list[float]]] = {}
    for check in checks:
        for key, value in check["scalars"].items():
            steps, values = found.setdefault(key.removeprefix(_PREFIX), ([], []))
            steps.append(int(check["step"]))
            values.append(_value(value))
    return found


def _confusion_curves(notes: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Shares of answers with foreign letters, by language and their mean, over the evaluations."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in notes:
        for key, share in line["shares"].items():
            if key == "foreign" or key in line["answers"]:
                steps, values = found.setdefault(_CONFUSION + key, ([], []))
                steps.append(int(line["step"]))
                values.append(_value(share))
    return found


def _beside(kind: str, lines: Sequence[Mapping[str, Any]]) -> Beside:
    """What the lines of the latest step say."""
    step = int(lines[-1]["step"])
    return Beside(kind, step, story_of(kind, [line for line in lines if line["step"] == step]))


def _latest(checks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last check's scalars; those of the probe from the last check that had one."""
    found: dict[str, float] = {}
    for check in checks:
        named = {key.removeprefix(_PREFIX): _value(value) for key, value in check["scalars"].items()}
        if check["probed"] or check is checks[-1]:
            found = named if check["probed"] else {key: found[key] for key in found if key.startswith("probe/")} | named
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _end(checks: Sequence[Mapping[str, Any]], scalars: Mapping[str, float], matrix: MatrixName | None) -> int | None:
    """Planned steps of the run. Earlier versions did not write them; what is just as forecast then is at its end."""
    totals = [int(said["total"]) for check in checks if (said := check.get("forecast")) and "total" in said]
    if totals or not checks:
        return totals[-1] if totals else None
    now, then = (scalars.get(f"{owner}/below_0.95", math.nan) for owner in (matrix, "forecast"))
    return int(checks[-1]["step"]) if math.isclose(now, then, abs_tol=1e-9) else None


def _unforeseen(last: Mapping[str, Any]) -> tuple[str, ...]:
    """Why the last check made no forecast, where it says so."""
    reason = (last.get("forecast") or {}).get("not_applicable")
    return (f"No forecast of the end: {reason}.",) if reason else ()


def _measured(scalars: Mapping[str, float]) -> MatrixName | None:
    names: tuple[MatrixName, ...] = ("head", "embedding")
    return next(
        (name for name in names if f"{name}/nonfinite_rows" in scalars or f"{name}/cosine_mean" in scalars), None
    )


def _result(scalars: Mapping[str, float], last: Mapping[str, Any]) -> CheckResult:
    """The check as `report_rows` reads it, which looks at the scalars alone."""
    gone = NotApplicable("rows are read apart")
    named = {_PREFIX + key: value for key, value in scalars.items()}
    return CheckResult(int(last.get("step", 0)), gone, gone, gone, torch.empty(0, dtype=torch.uint8), None, named)


def _rows(vectors: Mapping[str, Tensor], step: int | None, matrix: MatrixName | None, groups: int) -> Rows | None:
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
    return Rows(
        step=step,
        group=group,
        live=live.astype(bool),
        cosine=vector(f"{matrix}/cosine"),
        residual=vector(f"{matrix}/residual"),
        targets=vector("exposure/data_target"),
        inputs=vector("exposure/inputs"),
        last_target=vector("exposure/last_target"),
        classes=vector("classes") if counted else None,
    )


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
        at_base=None if base is None else (base.sum(1) * 2 > base.shape[1]).numpy(),
        probability=probability.mean(1).numpy(),
        instead=said_instead(now).numpy(),
    )


def _texts(checks: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Texts of all tokens that the checks name."""
    return {int(token["id"]): str(token["text"]) for check in checks for token in (*check["worst"], *check["watched"])}


def _tokens(
    rows: Rows | None, probed: Probed | None, names: Sequence[str], text: TextOf, top: int, last: Mapping[str, Any]
) -> tuple[TokenLine, ...]:
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
        id=int(token["id"]),
        text=str(token["text"]),
        group=str(token["group"]),
        exposure_class=str(token["exposure_class"]),
        cosine=_value(token["cosine"]),
        residual=_value(token["residual"]),
        data_target=int(token["data_target"]),
        inputs=int(token["inputs"]),
        steps_since_target=None if since is None else int(since),
        probability=None if probability is None else float(probability),
        said_instead=None if instead is None else str(instead),
    )


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
