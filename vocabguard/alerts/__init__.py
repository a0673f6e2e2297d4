"""Rules over logged keys, the machine that follows them, and where transitions go."""

from vocabguard.alerts.machine import AlertMachine
from vocabguard.alerts.rules import AlertRule

__all__ = ["AlertMachine", "AlertRule"]
