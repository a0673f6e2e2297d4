"""Types of the settings as keyword arguments, so that an editor completes them and a type checker refuses wrong ones.

Their meaning, defaults and limits stand in `vocabguard.config.schema`; a test holds both together.
"""

# ruff: noqa: D101, a section is documented in the schema
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from vocabguard.config import schema


class AutoDoseOptions(TypedDict, total=False):
    enabled: bool
    tolerated: float
    least: float
    most: float


class EchoOptions(TypedDict, total=False):
    enabled: bool
    armed: bool
    mode: Literal["uniform", "balanced", "least_exposed", "recall", "watch"]
    boost: float
    dose: float
    targets_per_live_token: float | None
    dose_limit: float
    auto: AutoDoseOptions | schema.AutoDoseConfig
    list_tokens: int
    fill: float
    exclude: Sequence[Any]
    instructions: Sequence[str]
    prefetch: int | None


class HoldOptions(TypedDict, total=False):
    enabled: bool
    armed: bool
    mode: Literal["freeze", "shared"]
    window_steps: int | None
    anchor: Literal["device", "host"]


class RuleOptions(TypedDict, total=False):
    metric: str
    op: Literal[">", ">=", "<", "<=", "absent", "unchanged"]
    threshold: float
    for_checks: int
    resolve_at: float | None
    cooldown_steps: int
    level: Literal["info", "warning", "critical"]
    actions: Sequence[str]
    enabled: bool
    change: Literal["ratio", "difference"] | None
    over_checks: int
    floor: float | None
    min_rows: int
    retell_steps: int
    remind_steps: int
    latch: bool


class NamedRuleOptions(RuleOptions, total=False):
    name: str


class WebhookOptions(TypedDict, total=False):
    url: str | None
    url_env: str | None
    timeout: float
    retries: int
    backoff: float
    format: Literal["auto", "json", "slack", "discord"]


class SinksOptions(TypedDict, total=False):
    least_level: Literal["info", "warning", "critical"]
    webhook: WebhookOptions | schema.WebhookConfig
    wandb: bool
    trackio: bool
    waiting: int
    finish_seconds: float


class MatricesOptions(TypedDict, total=False):
    head: str | None
    embedding: str | None


class DriftOptions(TypedDict, total=False):
    every_n_steps: int | None
    chunk_rows: int


class SnapshotOptions(TypedDict, total=False):
    source: str | None


class ExposureOptions(TypedDict, total=False):
    enabled: bool
    prior: str | None
    push_every_n_steps: int
    shift_labels: bool | None


class PreflightOptions(TypedDict, total=False):
    enabled: bool
    max_batches: int
    max_seconds: float


class UntrainedOptions(TypedDict, total=False):
    enabled: bool


class ContextOptions(TypedDict, total=False):
    text: str
    k: int
    turns: Sequence[str]
    chat: bool


class ProbeOptions(TypedDict, total=False):
    enabled: bool
    every_n_steps: int | None
    sample: int
    whole_vocabulary: bool
    watch: Sequence[Any]
    contexts: Mapping[str, ContextOptions | schema.ContextConfig]
    asks: int
    batch_tokens: int
    budget: float
    head_or_body: bool


class ReferenceOptions(TypedDict, total=False):
    enabled: bool | None
    texts: str | Sequence[str] | None
    max_tokens: int
    window: int
    batch_tokens: int
    least_targets: int


class ConfusionOptions(TypedDict, total=False):
    enabled: bool
    prompts: str | None
    languages: Sequence[str]
    per_language: int
    allow: Mapping[str, Sequence[str]]
    max_new_tokens: int
    batch_prompts: int


class NeighborsOptions(TypedDict, total=False):
    k: int
    rows: int
    every_n_checks: int


class ForecastOptions(TypedDict, total=False):
    enabled: bool


class CadenceOptions(TypedDict, total=False):
    budget: float
    settle_steps: int
    max_checks: int


class LogOptions(TypedDict, total=False):
    keys: str | Sequence[str]
    console: bool
    tensorboard: bool
    histogram: bool
    top_k: int
    rows_every_n_checks: int
    report: bool


class Options(TypedDict, total=False):
    """All settings, as `VocabGuard` and the callbacks take them by keyword."""

    matrices: MatricesOptions | schema.MatricesConfig
    drift: DriftOptions | schema.DriftConfig
    snapshot: SnapshotOptions | schema.SnapshotConfig
    exposure: ExposureOptions | schema.ExposureConfig
    preflight: PreflightOptions | schema.PreflightConfig
    untrained: UntrainedOptions | schema.UntrainedConfig
    probe: ProbeOptions | schema.ProbeConfig
    reference: ReferenceOptions | schema.ReferenceConfig
    confusion: ConfusionOptions | schema.ConfusionConfig
    neighbors: NeighborsOptions | schema.NeighborsConfig
    forecast: ForecastOptions | schema.ForecastConfig
    cadence: CadenceOptions | schema.CadenceConfig
    echo: EchoOptions | schema.EchoConfig
    hold: HoldOptions | schema.HoldConfig
    alerts: Mapping[str, RuleOptions | schema.RuleConfig] | Sequence[NamedRuleOptions]
    sinks: SinksOptions | schema.SinksConfig
    log: LogOptions | schema.LogConfig
    on_error: Literal["warn", "raise"]
    run_dir: str | None
    seed: int
