"""All settings, and how presets, files and keyword arguments are merged into them."""

from vocabguard.config.loading import ConfigError as ConfigError
from vocabguard.config.loading import ConfigSource as ConfigSource
from vocabguard.config.loading import load_config as load_config
from vocabguard.config.loading import load_questions as load_questions
from vocabguard.config.loading import presets as presets
from vocabguard.config.loading import webhook_url as webhook_url
from vocabguard.config.options import Options as Options
from vocabguard.config.schema import *  # noqa: F403, every section of the settings
