"""The settings by their earlier name: `vocabguard.config`."""

from vocabguard.config.schema import *  # noqa: F403
