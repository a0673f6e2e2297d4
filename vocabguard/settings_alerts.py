"""Settings of alerts: rules, and where their news goes. `vocabguard.settings` has all sections, these among them."""

from __future__ import annotations

from dataclasses import dataclass, field

from vocabguard.settings_protect import limited


@dataclass
class RuleConfig:
    """One alert rule; its name is its key. See `vocabguard.alerts.AlertRule` for every field.

    Among the `actions`, ``log`` tells the logger, ``echo`` and ``hold`` switch these on while the rule fires,
    ``checkpoint`` and ``stop`` are asked of the trainer once, when it begins to fire; other names stand for callables.
    """

    metric: str = "???"
    op: str = limited(">", choices=(">", ">=", "<", "<=", "absent", "unchanged"))
    threshold: float = 0.0
    for_checks: int = limited(1, at_least=1)
    resolve_at: float | None = None
    cooldown_steps: int = limited(0, at_least=0)
    level: str = limited("warning", choices=("info", "warning", "critical"))
    actions: list[str] = limited(["log"])
    enabled: bool = True
    change: str | None = limited(None, choices=("ratio", "difference"))
    over_checks: int = limited(1, at_least=1)
    floor: float | None = None
    min_rows: int = limited(0, at_least=0)
    retell_steps: int = limited(0, at_least=0)
    remind_steps: int = limited(0, at_least=0)
    latch: bool = False


def default_rules() -> dict[str, RuleConfig]:
    """The rules of every run; each can be changed or switched off by its name."""
    return {
        "at_risk": RuleConfig("forecast/below_0.95", ">", 0.02, resolve_at=0.016),
        "head_degraded": RuleConfig("head/below_0.95", ">", 0.01, resolve_at=0.008),
        "head_severe": RuleConfig("head/below_0.90", ">", 0.02, resolve_at=0.016, level="critical"),
        "group_degraded": RuleConfig("head/*/below_0.95", ">", 0.1, resolve_at=0.08, min_rows=20, retell_steps=100),
        "tokens_forgotten": RuleConfig("probe/retained", "<", 0.95, resolve_at=0.97, level="critical"),
        "watched_forgotten": RuleConfig("probe/watch", "<", 1.0, level="critical"),
        "broken_rows": RuleConfig("head/nonfinite_rows", ">", 0.0, level="critical"),
        "no_targets": RuleConfig("exposure/targets", "unchanged"),
    }


@dataclass
class WebhookConfig:
    """News of alerts as JSON, by HTTP POST.

    Attributes:
        url: where to; null sends none. Only its host is written to the run folder.
        url_env: name of the environment variable that holds it, instead.
        timeout: seconds that connecting, and each answer, may take.
        retries: times that one is sent again where nobody answers, or with 408, 425, 429 or 5xx.
        backoff: seconds before it is sent again, doubled each time.
    """

    url: str | None = None
    url_env: str | None = None
    timeout: float = limited(5.0, at_least=0.01)
    retries: int = limited(4, at_least=0, at_most=20)
    backoff: float = limited(1.0, at_least=0.0)


@dataclass
class SinksConfig:
    """Where news of alerts goes besides the log, the console, TensorBoard and the run folder.

    A thread of its own sends it, from the main process only: a receiver that is slow or gone slows no step.

    Attributes:
        least_level: news of rules below this level is not sent.
        webhook: a receiver of JSON.
        wandb: `wandb.alert`, where the script has a Weights & Biases run going.
        waiting: news that may wait to be sent; what comes beyond is dropped, and said to be.
        finish_seconds: how long the end of a run waits for what is not sent yet.
    """

    least_level: str = limited("warning", choices=("info", "warning", "critical"))
    webhook: WebhookConfig = field(default_factory=WebhookConfig)
    wandb: bool = True
    waiting: int = limited(100, at_least=1)
    finish_seconds: float = limited(10.0, at_least=0.0)
