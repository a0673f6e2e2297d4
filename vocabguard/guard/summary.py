"""From measurements to what is logged: flat scalars and the tables of tokens. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vocabguard.measure.drift import summarise
from vocabguard.measure.exposure import steps_since_target, summarise_exposure
from vocabguard.measure.forecast import summarise_forecast
from vocabguard.measure.recall import summarise_recall
from vocabguard.measure.retention import Sample, said_instead, summarise_probe
from vocabguard.results import (
    EXPOSURE_CLASSES,
    Exposure,
    Forecast,
    MatrixName,
    NotApplicable,
    ProbeResult,
    Recall,
    RowDrift,
    TokenReport,
)
from vocabguard.vocabulary.table import VocabTable

PREFIX = "vocabguard/"


def group_masks(table: VocabTable) -> dict[str, Tensor]:
    """(V,) bool of each group that has live rows, by name."""
    live = table.live
    masks = {name: table.mask(name) for name in table.names}
    return {name: mask for name, mask in masks.items() if bool((mask & live).any())}


def class_masks(classes: Tensor) -> dict[str, Tensor]:
    """(V,) bool of each exposure class, by name. `classes`: (V,) uint8, index into `EXPOSURE_CLASSES`."""
    return {name: classes == index for index, name in enumerate(EXPOSURE_CLASSES)}


def scalars_of(
    drifts: Mapping[MatrixName, RowDrift | NotApplicable], exposure: Exposure | NotApplicable, classes: Tensor,
    probes: tuple[ProbeResult, ProbeResult] | None, *, live: Tensor, groups: Mapping[str, Tensor],
    sample: Sample | None = None, look: int = 1,
) -> dict[str, float]:  # fmt: skip
    """All logged keys of one check but the guard's own (alerts, overhead).

    Args:
        drifts: ``head`` and ``embedding``.
        exposure: counts, or why there are none; then no key is given by class.
        classes: (V,) uint8.
        probes: the probe at the base and now, if one ran at this check.
        live: (V,) bool.
        groups: masks by group.
        sample: what the probed tokens stand for.
        look: number of this probe since the base's, from 1.
    """
    parts = dict(groups)
    if isinstance(exposure, Exposure):
        parts |= class_masks(classes)
    found: dict[str, float] = {}
    for name, drift in drifts.items():
        if isinstance(drift, RowDrift):
            found |= {f"{name}/{key}": value for key, value in summarise(drift, live, parts).items()}
    if isinstance(exposure, Exposure):
        summary = summarise_exposure(exposure, classes, live)
        found |= {f"exposure/{key}": value for key, value in summary.items()}
        found["exposure/targets"] = float(exposure.data_target.sum())
    if probes is not None:
        summary = summarise_probe(*probes, parts, sample=sample, look=look)
        found |= {f"probe/{key}": value for key, value in summary.items()}
    return {PREFIX + key: value for key, value in found.items()}


def word_scalars(known: int, lost: int) -> dict[str, float]:
    """Logged keys of the watch list: ``probe/watch``, the share of the known words that are not lost, and how many.

    Args:
        known: words that the base says.
        lost: of them.
    """
    return {f"{PREFIX}probe/watch": 1 - lost / known, f"{PREFIX}probe/watch_known": float(known)} if known else {}


def forecast_scalars(
    forecast: Forecast, classes: Tensor, live: Tensor, groups: Mapping[str, Tensor]
) -> dict[str, float]:
    """Logged keys of a forecast.

    Args:
        forecast: of all rows.
        classes: (V,) uint8.
        live: (V,) bool.
        groups: masks by group.
    """
    found = summarise_forecast(forecast, live, {**groups, **class_masks(classes)})
    return {f"{PREFIX}forecast/{key}": value for key, value in found.items()}


def recall_scalars(found: Recall, live: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Logged keys of an estimated recall; see `summarise_recall`."""
    return {f"{PREFIX}recall/{key}": value for key, value in summarise_recall(found, live, parts).items()}


def outdated(latest: Mapping[str, float], found: Mapping[str, float], *, probed: bool) -> dict[str, float]:
    """NaN for each key of earlier checks that this one should give and could not, as where a row turned NaN.

    Best-model selection would keep a dead model by them. What is measured at other times stays: probes, answers at
    evaluations, findings, and where the rules stand.

    >>> outdated({"vocabguard/head/below_0.95": 0.0, "vocabguard/probe/retained": 1.0}, {}, probed=False)
    {'vocabguard/head/below_0.95': nan}
    """
    measured = () if probed else ("probe/", "reference/", "recall/", "echo/copies")
    beside = ("alerts/", "confusion/", "neighbors/", "head_or_body/", *measured)
    missing = (key for key in latest if key not in found)
    return {key: float("nan") for key in missing if not key.removeprefix(PREFIX).startswith(beside)}


def echo_scalars(exposure: Exposure, live: Tensor) -> dict[str, float]:
    """``echo/dose``, echo targets per data target so far, and ``echo/targets_per_live_token``. `live`: (V,) bool."""
    echoed, asked = int(exposure.echo_target.sum()), int(exposure.data_target.sum())
    per_token = float(exposure.echo_target[live].double().mean()) if bool(live.any()) else 0.0
    return {"echo/dose": echoed / asked if asked else 0.0, "echo/targets_per_live_token": per_token}


def worst_ids(drift: RowDrift | NotApplicable, live: Tensor, k: int, recall: Recall | None = None) -> Tensor:
    """(m,) int64, m <= k: the live tokens of lowest estimated recall where that ranks, else of lowest cosine.

    >>> recall = Recall(torch.tensor([-3.0, -1.0, -5.0]), agreement=0.5, taught=99)
    >>> worst_ids(NotApplicable("frozen"), torch.tensor([True, True, False]), 2, recall)
    tensor([0, 1])
    """
    if recall is not None and recall.ranks:
        return lowest(recall.nats, live, k)
    return torch.empty(0, dtype=torch.int64) if isinstance(drift, NotApplicable) else lowest(drift.cosine, live, k)


def lowest(values: Tensor, mask: Tensor, k: int) -> Tensor:
    """(m,) int64, m <= k: places of the lowest finite values, lowest first.

    Args:
        values: (n,) float.
        mask: (n,) bool, places that count.
        k: how many at most.
    """
    ranked = torch.where(mask & values.isfinite(), values, torch.inf)
    found, places = torch.topk(ranked, min(k, len(ranked)), largest=False)
    return places[found < torch.inf]


def token_reports(
    ids: Tensor, drift: RowDrift | NotApplicable, exposure: Exposure | NotApplicable, classes: Tensor,
    probe: ProbeResult | None, table: VocabTable, step: int, recall: Recall | None = None,
) -> tuple[TokenReport, ...]:  # fmt: skip
    """What is known about each of the given tokens, in their order.

    Args:
        ids: (m,) int64.
        drift: of the head, or of the embedding where there is no head.
        exposure: counts, or why there are none.
        classes: (V,) uint8.
        probe: the last probe, if any.
        step: the optimizer step of the check; a guard that began late has counted fewer.
        recall: the latest estimate, if any.
    """
    since = steps_since_target(exposure, step) if isinstance(exposure, Exposure) else None
    place = {} if probe is None else {token: row for row, token in enumerate(probe.ids.tolist())}
    instead = None if probe is None else said_instead(probe)
    reports = []
    for token in ids.tolist():
        row = place.get(token)
        other = -1 if instead is None or row is None else int(instead[row])
        ago = -1 if since is None else int(since[token])
        reports.append(
            TokenReport(
                id=token,
                text=table.text(token),
                group=table.group_of(token),
                exposure_class=EXPOSURE_CLASSES[int(classes[token])] if since is not None else "unknown",
                cosine=float(drift.cosine[token]) if isinstance(drift, RowDrift) else float("nan"),
                residual=float(drift.residual[token]) if isinstance(drift, RowDrift) else float("nan"),
                data_target=int(exposure.data_target[token]) if isinstance(exposure, Exposure) else 0,
                inputs=int(exposure.inputs[token]) if isinstance(exposure, Exposure) else 0,
                steps_since_target=ago if ago >= 0 else None,
                probability=None if probe is None or row is None else float(probe.probability[row].mean()),
                said_instead=table.text(other) if other >= 0 else None,
                recall=None if recall is None else float(recall.nats[token]),
            )
        )
    return tuple(reports)
