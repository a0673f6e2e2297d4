"""What a run that goes on finds of the one before: its saved state and run folder, or less than that."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vocabguard.config import ConfigError
from vocabguard.files import one_line
from vocabguard.vocabulary.table import fit_rows

logger = logging.getLogger("vocabguard")

STATE_VERSION = 1
"""Of the states that `VocabGuard.state_dict` gives."""

_UNREADABLE = "unreadable"
_NONE_SAVED = "no saved vocabguard state"


def read_state(path: Path) -> dict[str, Any]:
    """A state from the file that a checkpoint has; one that cannot be read says why, and `restart_reason` tells."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # unpickling raises what it likes
        return {_UNREADABLE: f"{path} cannot be read ({type(error).__name__}: {one_line(error, 100)})"}
    return state if isinstance(state, dict) else {_UNREADABLE: f"{path} holds a {type(state).__name__}, not a state"}


def restart_reason(saved: Mapping[str, Any]) -> str | None:
    """Why a state cannot be gone on from; None where it can."""
    return _NONE_SAVED if not saved else saved.get(_UNREADABLE)


def tell_restart(why: str, step: int, source: str | None) -> None:
    """Say from where drift and counts count.

    Args:
        step: optimizer steps that the trainer has behind it.
        source: the checkpoint of the base that drift is measured against, if one is named.
    """
    if source is None:
        logger.warning("vocabguard: %s: drift and counts restart from this checkpoint (step %d)", why, step)
    else:
        logger.warning(
            "vocabguard: %s: counts restart from this checkpoint (step %d), drift is measured against snapshot.source",
            why, step,
        )  # fmt: skip


def moved_along(saved: Mapping[str, Any], suggested: str | Path | None) -> Mapping[str, Any]:
    """A state whose run folder may have been moved since, with the baselines in it.

    Args:
        suggested: the folder that the trainer would give a run.

    Returns:
        The state itself while its folder is where it was, else one that names the suggested folder, if a run is there.
    """
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
    if saved.get("version", STATE_VERSION) > STATE_VERSION:
        raise ConfigError(f"state: version is {saved['version']}; this vocabguard reads up to {STATE_VERSION}")


def fit_state(saved: Mapping[str, Any], rows: int) -> Mapping[str, Any]:
    """A state whose vectors have a place for each of `rows` rows, where tokens were added to the checkpoint since.

    New rows start at nothing; of rows that are gone nothing is asked any more.
    """
    before = len(saved["trained"])
    if before == rows:
        return saved

    def vector(value: Any, fill: float) -> Any:
        # What has another length is damaged, which is found where it is read.
        return fit_rows(value, rows, fill) if isinstance(value, Tensor) and value.shape == (before,) else value

    def of_ids(part: Mapping[str, Any], keep: Tensor) -> dict[str, Any]:
        # What is of the watched words is not of the ids.
        return {
            name: value[keep] if isinstance(value, Tensor) and name != "words" else value
            for name, value in part.items()
        }

    exposure = {name: vector(value, -1 if name.startswith("last") else 0) for name, value in saved["exposure"].items()}
    probe, forecast = saved["probe"], dict(saved.get("forecast", {}))
    forecast["pasts"] = [
        {name: vector(value, math.nan) for name, value in past.items()} for past in forecast.get("pasts", ())
    ]
    protection = dict(saved.get("protection", {}))
    if "echo" in protection:
        plans = [{**plan, "ids": plan["ids"][plan["ids"] < rows]} for plan in protection["echo"]["plans"]]
        protection["echo"] = {**protection["echo"], "plans": [plan for plan in plans if len(plan["ids"])]}
    return {
        **saved,
        "trained": vector(saved["trained"], False),
        "exposure": exposure,
        "probe": of_ids(probe, probe["ids"] < rows) if probe else probe,
        "forecast": forecast if "forecast" in saved else {},
        "protection": protection,
    }
