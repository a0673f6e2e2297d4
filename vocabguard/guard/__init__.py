"""The guard itself: session, check, observation, cadence, state and faults."""

from vocabguard.guard.session import VocabGuard

__all__ = ["VocabGuard"]
