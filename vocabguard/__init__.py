"""See and prevent the forgetting of sparse tokens while a language model is fine-tuned.

Trainer callbacks live in `vocabguard.integrations`; nothing here imports a trainer.
"""

from typing import TYPE_CHECKING, Any

from vocabguard.config import ConfigError, GuardConfig, load_config, presets
from vocabguard.guard import VocabGuard
from vocabguard.results import CheckResult, VocabGuardError
from vocabguard.runlog import RunLog, installed_version

if TYPE_CHECKING:
    from vocabguard.measure.metrics import LanguageConfusion, TokenDrift, TokenExposure

__all__ = [
    "CheckResult",
    "ConfigError",
    "GuardConfig",
    "LanguageConfusion",
    "RunLog",
    "TokenDrift",
    "TokenExposure",
    "VocabGuard",
    "VocabGuardError",
    "__version__",
    "load_config",
    "presets",
]

__version__ = installed_version() or "0+unknown"


def __getattr__(name: str) -> Any:
    """The torchmetrics classes, imported when they are asked for: torchmetrics takes seconds and 80 MiB to import."""
    if name in ("LanguageConfusion", "TokenDrift", "TokenExposure"):
        from vocabguard.measure import metrics

        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
