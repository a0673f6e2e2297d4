"""Read by mypy in CI, never run: a wrong setting by keyword is refused, a right one is not.

Each ``type: ignore`` is an error that mypy must find, since an unused one is an error itself.
"""

from vocabguard import VocabGuard
from vocabguard.config import ProbeConfig
from vocabguard.integrations import huggingface, lightning


def settings() -> None:
    """Of every kind."""
    VocabGuard(
        "watch", probe={"sample": 64, "watch": ["word", 7]}, echo={"mode": "balanced", "auto": {"enabled": True}}
    )
    VocabGuard(probe=ProbeConfig(sample=64), alerts={"mine": {"metric": "head/below_0.95", "threshold": 0.1}}, seed=1)
    huggingface.VocabGuardCallback("protect", hold={"window_steps": 100}, on_error="raise")
    lightning.VocabGuardCallback(log={"console": False}, confusion={"allow": {"ja": ["latin"]}})

    VocabGuard(prob={"sample": 64})  # type: ignore[call-arg]
    VocabGuard(probe={"smaple": 64})  # type: ignore[arg-type]
    VocabGuard(probe={"sample": "64"})  # type: ignore[arg-type]
    VocabGuard(hold={"mode": "frozen"})  # type: ignore[arg-type]
    huggingface.VocabGuardCallback(on_error="stop")  # type: ignore[arg-type]
    lightning.VocabGuardCallback(sed=1)  # type: ignore[call-arg]
