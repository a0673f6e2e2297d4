"""What was asked for by name and is not to be had in this run: refused before step 1, not missed afterwards."""

from __future__ import annotations

from collections.abc import Iterable

from vocabguard.alerts.rules import FIRING, STATES, AlertRule, metric_range, short_key
from vocabguard.config import ConfigError, GuardConfig
from vocabguard.guard.protection import needed

_OFF = "log.keys has {key!r}, which is never logged here, since {why}; allowed: {fix}, or to leave it out"


def require_keys(config: GuardConfig, rules: Iterable[AlertRule]) -> None:
    """Refuse keys of ``log.keys`` that no measure of this run gives.

    The default's own may stay where their measure is off: nobody has asked for them one by one.

    Raises:
        ConfigError: with the key, and what would give it.

    Example:
        >>> from vocabguard.config import load_config
        >>> require_keys(load_config(None, ["log.keys=[overhead, hold/share]", "hold.enabled=true"]), rules=[])
    """
    rules = tuple(rules)
    usual = set(GuardConfig().log.keys)
    given = config.log.keys if isinstance(config.log.keys, list) else []
    for key in (short_key(one) for one in given):
        if key in usual or key == "all":
            continue
        if "*" not in key:
            _require_logged(key, rules)
        owner = key.partition("/")[0]
        if (off := _off(owner, config, rules)) is not None:
            raise ConfigError(_OFF.format(key=key, why=off[0], fix=off[1]))


def _require_logged(key: str, rules: tuple[AlertRule, ...]) -> None:
    """Refuse a key without a ``*`` that is never logged."""
    if key.startswith(STATES) and key != FIRING:
        names = [rule.name for rule in rules]
        if key.removeprefix(STATES) not in names:
            raise ConfigError(f"log.keys has {key!r}; allowed: alerts/ and the name of a rule that is enabled, {names}")
        return
    try:
        metric_range(key)
    except ValueError as error:
        raise ConfigError(f"log.keys: {str(error).removeprefix('metric is ')}") from error


def _off(owner: str, config: GuardConfig, rules: tuple[AlertRule, ...]) -> tuple[str, str] | None:
    """Why the measure behind keys that begin so is off, and what switches it on; None where it is on."""
    if owner in ("probe", "confusion", "forecast", "exposure") and not getattr(config, owner).enabled:
        return f"{owner}.enabled is false", f"{owner}.enabled=true"
    if owner == "reference" and not (
        config.probe.enabled if config.reference.enabled is None else config.reference.enabled
    ):
        return "the reference text is off", "reference.enabled=true"
    if owner == "recall" and not config.probe.enabled:
        return "it is estimated from the probe, and probe.enabled is false", "probe.enabled=true"
    kind = "echo" if owner == "loss" else owner
    if kind in ("echo", "hold") and not needed(config, rules, kind):
        return f"{kind} is not part of this run", f"{kind}.enabled=true"
    return None
