"""The callback ``vocabguard`` for ms-swift (4.x), whose trainers take files of plugins.

    VOCABGUARD=protect swift sft ... --callbacks vocabguard \\
        --external_plugins "$(python -m vocabguard.integrations.plugins.ms_swift)"

``VOCABGUARD`` and ``VOCABGUARD_SET`` say which configuration: see `vocabguard.integrations.launched`. Without them it
is that of the defaults.
"""

from __future__ import annotations

from typing import Any


def vocabguard(_args: Any, trainer: Any) -> Any:
    """The callback of a trainer, as ms-swift's ``callbacks_map`` wants it.

    Args:
        trainer: that is being made; its ``log`` gets the keys of ``log.keys``.

    Raises:
        ConfigError: for a configuration that cannot be used.
    """
    from vocabguard.integrations.huggingface import VocabGuardCallback
    from vocabguard.integrations.launched import asked

    config, settings = asked() or (None, ())
    return VocabGuardCallback(config, overrides=settings, trainer=trainer)


if __name__ == "__main__":
    print(__file__)
else:
    from swift.callbacks import callbacks_map

    callbacks_map["vocabguard"] = vocabguard
