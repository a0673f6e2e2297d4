"""What a guard saves and how it goes on from there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vocabguard import collective
from vocabguard.config import ConfigError
from vocabguard.rows.baselines import CopiedBaseline, save_baseline
from vocabguard.rows.sharding import ShardBaseline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vocabguard.guard.session import VocabGuard

logger = logging.getLogger("vocabguard")

VERSION = 1

_ROWS_SENT = 4096

_BEGINS_LATE = (
    "vocabguard: %d steps are done and no saved state of a guard is there: drift and counts begin here, not at the base"
)
_COUNTS_LATE = (
    "vocabguard: %d steps are done and no saved state of a guard is there: counts begin here, drift is measured "
    "against snapshot.source"
)


def to_go_on(
    saved: Mapping[str, Any], suggested: str | Path | None, steps_done: int, source: str | None
) -> Mapping[str, Any]:
    """A state whose run folder may have been moved since, with the baselines in it.

    Says so where there is none and the trainer is in mid-run.

    Args:
        saved: the state; empty where no run goes on.
        suggested: the folder that the trainer would give a run.
        steps_done: optimizer steps that the trainer has behind it.
        source: the checkpoint of the base that drift is measured against, if one is named.

    Returns:
        The state itself while its folder is where it was, else one that names the suggested folder, if a run is there.
    """
    if steps_done > 0 and not saved:
        logger.warning(_BEGINS_LATE if source is None else _COUNTS_LATE, steps_done)
    before = saved.get("run_dir")
    if before is None or suggested is None or Path(before).exists() or not (Path(suggested) / "run.json").exists():
        return saved
    here, moved = Path(suggested).resolve(), {}
    for name, reference in saved["baselines"].items():
        inside = isinstance(reference, dict) and Path(reference["path"]).parent.name == Path(before).name
        moved[name] = {**reference, "path": str(here / Path(reference["path"]).name)} if inside else reference
    return {**saved, "run_dir": str(suggested), "baselines": moved}


def require_known(saved: Mapping[str, Any]) -> None:
    """Refuse a state that a newer version has written.

    Raises:
        ConfigError: with both versions.
    """
    if saved.get("version", VERSION) > VERSION:
        raise ConfigError(f"state: version is {saved['version']}; this vocabguard reads up to {VERSION}")


def collect(guard: VocabGuard) -> dict[str, Any]:
    """The state of an attached guard: V-sized vectors, plain values, the baselines or where they are."""
    checker = guard.checker
    assert checker is not None
    return {
        "version": VERSION,
        "step": guard.steps,
        "run_dir": None if guard.run_dir is None else str(guard.run_dir),
        "baselines": _baselines(guard),
        "trained": checker.watched.table.trained,
        "exposure": checker.counter.state_dict() if checker.counter is not None else {},
        "probe": checker.prober.state_dict() if checker.prober is not None else {},
        "alerts": checker.alerts.state_dict(),
        "cadence": {
            "every": guard.cadence.every,
            "probe_every": guard.cadence.probe_every,
            "last_probe": guard.cadence.last_probe,
            "check_seconds": checker.check_seconds,
            "probe_seconds": checker.probe_seconds,
        },
        "latest": dict(guard.latest),
        "forecast": checker.forecaster.state_dict() if checker.forecaster is not None else {},
        "protection": guard.protection.state_dict() if guard.protection is not None else {},
    }


def _baselines(guard: VocabGuard) -> dict[str, dict[str, str] | Tensor]:
    """Where the baselines can be read again; one that lives in memory is first written to the run folder.

    Without a run folder the rows themselves go along: a resumed run could not find them anywhere else.
    """
    assert guard.checker is not None
    baselines = guard.checker.watched.baselines
    if guard.run_dir is None:
        return {
            name: baseline.tensor if isinstance(baseline, CopiedBaseline) else baseline.reference()
            for name, baseline in baselines.items()
        }
    for name, baseline in baselines.items():
        path = guard.run_dir / f"baseline-{name}.safetensors"
        if isinstance(baseline, ShardBaseline):
            _save_shards(baseline, path, name)
        elif isinstance(baseline, CopiedBaseline) and collective.is_main():
            baselines[name] = save_baseline(baseline, path, name)
    return collective.agree({name: baseline.reference() for name, baseline in baselines.items()})


def _save_shards(baseline: ShardBaseline, path: Path, key: str) -> None:
    """Write the rows of all processes, sent chunk by chunk, to one file, once; rank 0 does."""
    if baseline.saved:
        return
    parts = [rows for _, rows in baseline.chunks(_ROWS_SENT) if collective.is_main()]
    saved = save_baseline(CopiedBaseline(torch.cat(parts)), path, key).reference() if parts else {}
    baseline.saved = collective.agree(saved)


def restore(guard: VocabGuard, saved: Mapping[str, Any]) -> None:
    """Give an attached guard the numbers of the run it goes on from; baselines were opened by `attach`."""
    checker = guard.checker
    assert checker is not None
    guard.steps = saved["step"]
    if checker.counter is not None and saved["exposure"]:
        checker.counter.load_state_dict(saved["exposure"])
    if checker.prober is not None:
        checker.prober.load_state_dict(saved["probe"])
    checker.alerts.load_state_dict(saved["alerts"])
    cadence = saved["cadence"]
    guard.cadence.every, guard.cadence.probe_every = cadence["every"], cadence["probe_every"]
    guard.cadence.last_probe = cadence["last_probe"]
    # Known before the cadence is chosen: a run may stop within its first steps.
    checker.check_seconds, checker.probe_seconds = cadence["check_seconds"], cadence["probe_seconds"]
    guard.latest.update(saved["latest"])
    if checker.forecaster is not None and saved.get("forecast"):
        checker.forecaster.load_state_dict(saved["forecast"])
    if guard.protection is not None and saved.get("protection"):
        guard.protection.load_state_dict(saved["protection"])
