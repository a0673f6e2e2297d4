"""See and prevent the forgetting of sparse tokens while a language model is fine-tuned.

Trainer callbacks live in `vocabguard.integrations`; nothing here imports a trainer.
"""

from vocabguard.config import ConfigError, load_config, presets
from vocabguard.guard import VocabGuard
from vocabguard.measure.metrics import LanguageConfusion, TokenDrift, TokenExposure
from vocabguard.results import CheckResult
from vocabguard.runlog import RunLog
from vocabguard.settings import GuardConfig

__all__ = [
    "CheckResult",
    "ConfigError",
    "GuardConfig",
    "LanguageConfusion",
    "RunLog",
    "TokenDrift",
    "TokenExposure",
    "VocabGuard",
    "load_config",
    "presets",
]
