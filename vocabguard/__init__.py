"""See and prevent the forgetting of rare tokens while a language model is fine-tuned.

Trainer callbacks live in `vocabguard.integrations`; nothing here imports a trainer. Names are imported when they are
first used: ``import vocabguard`` itself imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vocabguard.installation import VERSION, warn_of_other_owner

if TYPE_CHECKING:
    from vocabguard.config import ConfigError, GuardConfig, load_config, presets
    from vocabguard.guard import VocabGuard
    from vocabguard.measure.metrics import LanguageConfusion, TokenDrift, TokenExposure
    from vocabguard.results import CheckResult, VocabGuardError
    from vocabguard.runlog import RunLog

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

__version__ = VERSION

_HOMES = {
    "CheckResult": "results",
    "ConfigError": "config",
    "GuardConfig": "config",
    "LanguageConfusion": "measure.metrics",
    "RunLog": "runlog",
    "TokenDrift": "measure.metrics",
    "TokenExposure": "measure.metrics",
    "VocabGuard": "guard",
    "VocabGuardError": "results",
    "load_config": "config",
    "presets": "config",
}
_ROOMS = ("config", "guard", "results", "runlog", "settings")
"""Modules that documentation and examples name; ``vocabguard.config`` works without an import of its own."""

warn_of_other_owner()


def __getattr__(name: str) -> Any:
    """A public name or module, imported when it is first asked for (PEP 562)."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
