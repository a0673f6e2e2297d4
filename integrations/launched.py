"""Guards that come by the environment variable ``VOCABGUARD``: of ``vocabguard run``, or Lightning's entry point.

``VOCABGUARD`` is a preset's name, a YAML file, or ``1`` for the defaults; ``VOCABGUARD_SET`` holds dotted settings,
separated as in a shell: ``VOCABGUARD=protect VOCABGUARD_SET="echo.dose=0.2 log.console=false"``. A trainer that has a
guard already is left as it is.
"""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vocabguard.config import ConfigSource

CONFIG, SETTINGS = "VOCABGUARD", "VOCABGUARD_SET"
_DEFAULTS, _NOTHING = {"1", "true", "on"}, {"", "0", "false", "off"}


def asked() -> tuple[ConfigSource, tuple[str, ...]] | None:
    """The configuration and the dotted settings that the environment asks for; None where it asks for no guard.

    Raises:
        ConfigError: for settings whose quotes do not end.

    Example:
        >>> before = dict(os.environ)
        >>> os.environ.update({"VOCABGUARD": "protect", "VOCABGUARD_SET": "echo.dose=0.2 log.console=false"})
        >>> asked()
        ('protect', ('echo.dose=0.2', 'log.console=false'))
        >>> os.environ.update({"VOCABGUARD": "0"})
        >>> asked() is None
        True
        >>> _ = os.environ.clear(), os.environ.update(before)
    """
    config = os.environ.get(CONFIG, "").strip()
    if config.lower() in _NOTHING:
        return None
    try:
        settings = tuple(shlex.split(os.environ.get(SETTINGS, "")))
    except ValueError as error:
        from vocabguard.config import ConfigError

        raise ConfigError(
            f"{SETTINGS} is {os.environ[SETTINGS]!r}: {error}; allowed: key=value, quoted as in a shell"
        ) from error
    return (None if config.lower() in _DEFAULTS else config), settings


def guard_trainer(trainer: Any) -> bool:
    """Give a Hugging Face trainer that is about to train the guard that the environment asks for.

    Returns:
        Whether it has a guard now, its own or this one.

    Raises:
        ConfigError: for a configuration that cannot be used.
    """
    from vocabguard.integrations.huggingface import VocabGuardCallback

    wanted = asked()
    has = any(isinstance(one, VocabGuardCallback) for one in trainer.callback_handler.callbacks)
    if not has and wanted is not None:
        VocabGuardCallback.add_to(trainer, wanted[0], overrides=wanted[1])
    if trainer.is_world_process_zero():
        _tell(trainer, has, wanted)
    return has or wanted is not None


def guard_lightning(trainer: Any) -> bool:
    """The same for a Lightning ``Trainer`` that is about to fit."""
    from vocabguard.integrations.lightning import GuardAtSetup, VocabGuardCallback

    wanted = asked()
    has = any(isinstance(one, VocabGuardCallback) for one in trainer.callbacks)
    if not has and wanted is not None and not any(isinstance(one, GuardAtSetup) for one in trainer.callbacks):
        trainer.callbacks.insert(0, VocabGuardCallback(wanted[0], overrides=wanted[1]))
    if trainer.is_global_zero:
        _tell(trainer, has, wanted)
    return has or wanted is not None


def lightning_callbacks() -> list[Any]:
    """Lightning's entry point ``lightning.pytorch.callbacks_factory``: nothing unless ``VOCABGUARD`` is set.

    Raises:
        ConfigError: for a configuration that cannot be used.
    """
    wanted = asked()
    if wanted is None:
        return []
    from vocabguard.integrations.lightning import GuardAtSetup

    return [GuardAtSetup(wanted[0], overrides=wanted[1])]


def _tell(trainer: Any, has: bool, wanted: tuple[ConfigSource, tuple[str, ...]] | None) -> None:
    name = type(trainer).__name__
    if has:
        said = f"{name} has a guard of its own; nothing was added"
    elif wanted is not None:
        settings = " ".join((str(wanted[0] or "default settings"), *wanted[1]))
        said = f"{name} is guarded ({settings})"
    else:
        return
    print(f"vocabguard: {said}", file=sys.stderr)
