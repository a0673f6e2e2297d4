"""`VocabGuardPlugin` for axolotl: two entries of its YAML file, nothing else.

    plugins:
      - vocabguard.integrations.axolotl.VocabGuardPlugin
    vocabguard:
      config: protect          # a preset or a YAML file; leave it out for the defaults
      echo:
        dose: 0.2              # sections and settings as in a file of the guard's own

``vocabguard: protect`` alone names a preset or a file. The keys of ``log.keys`` go to everything that axolotl reports
to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from vocabguard.config import ConfigError, load_config
from vocabguard.integrations.huggingface import VocabGuardCallback

SECTION = "vocabguard"


class VocabGuardArgs(BaseModel):
    """What axolotl's own checks let through: the section is checked by the guard.

    Attributes:
        vocabguard: the section, or a preset's or file's name alone.
    """

    vocabguard: dict[str, Any] | str | None = None


class VocabGuardPlugin(BasePlugin):  # type: ignore[misc, unused-ignore]
    """Adds a `VocabGuardCallback` to the trainer that axolotl makes."""

    def __init__(self) -> None:
        super().__init__()
        self._section: Any = None

    def get_input_args(self) -> str:
        """Where the section's model is."""
        return f"{__name__}.{VocabGuardArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """Check the section before axolotl loads data and model. `cfg`: its file as it was read.

        Raises:
            ConfigError: for a section that cannot be used.
        """
        # Kept as it is here: axolotl's own checks drop what is null, and null is a setting.
        self._section = as_dicts(cfg.get(SECTION))
        config, options = settings_of(self._section)
        load_config(config, options=options)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The callback, unless the trainer has one."""
        if any(isinstance(one, VocabGuardCallback) for one in trainer.callback_handler.callbacks):
            return []
        config, options = settings_of(self._section)
        return [VocabGuardCallback(config, trainer=trainer, **options)]


def settings_of(section: Any) -> tuple[str | None, dict[str, Any]]:
    """The preset or file, and the settings, of a section ``vocabguard``.

    Raises:
        ConfigError: for a section that is none.
    """
    if section is None or isinstance(section, str):
        return section, {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{SECTION} is {section!r}; allowed: a preset's name, a YAML file, or a section of settings")
    options = dict(section)
    config = options.pop("config", None)
    if config is not None and not isinstance(config, str):
        raise ConfigError(f"{SECTION}.config is {config!r}; allowed: a preset's name or a YAML file")
    return config, options


def as_dicts(value: Any) -> Any:
    """A part of axolotl's configuration as dicts and lists, which its own mapping is not for every library."""
    if isinstance(value, Mapping):
        return {str(key): as_dicts(one) for key, one in value.items()}
    return [as_dicts(one) for one in value] if isinstance(value, list) else value
