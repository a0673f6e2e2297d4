"""All settings, and how presets, files and keyword arguments are merged into them."""

from vocabguard.config.loading import ConfigError, ConfigSource, load_config, load_questions, presets, webhook_url
from vocabguard.config.schema import (
    AutoDoseConfig,
    CadenceConfig,
    ConfusionConfig,
    ContextConfig,
    DriftConfig,
    EchoConfig,
    ExposureConfig,
    ForecastConfig,
    GuardConfig,
    HoldConfig,
    LogConfig,
    MatricesConfig,
    NeighborsConfig,
    PreflightConfig,
    ProbeConfig,
    RuleConfig,
    SinksConfig,
    SnapshotConfig,
    UntrainedConfig,
    WebhookConfig,
    default_rules,
)

__all__ = [
    "AutoDoseConfig", "CadenceConfig", "ConfigError", "ConfigSource", "ConfusionConfig", "ContextConfig", "DriftConfig",
    "EchoConfig", "ExposureConfig", "ForecastConfig", "GuardConfig", "HoldConfig", "LogConfig", "MatricesConfig",
    "NeighborsConfig", "PreflightConfig", "ProbeConfig", "RuleConfig", "SinksConfig", "SnapshotConfig",
    "UntrainedConfig", "WebhookConfig", "default_rules", "load_config", "load_questions", "presets", "webhook_url",
]  # fmt: skip
