"""What happens when the guard itself fails: reported once, then it stands down and training goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vocabguard import collective
from vocabguard.config import ConfigError

logger = logging.getLogger("vocabguard")


class Faults:
    """Contains the guard's exceptions and adds up the time that its work takes.

    Args:
        on_error: ``"warn"`` logs the first fault and stands down; ``"raise"`` raises it.
    """

    def __init__(self, on_error: str) -> None:
        self._raise = on_error == "raise"
        self._depth = 0
        self.reason: str | None = None
        self.seconds = 0.0

    @property
    def down(self) -> bool:
        """Whether the guard has stood down."""
        return self.reason is not None

    def stand_down(self, what: str, error: Exception) -> None:
        """Stop guarding; only the first fault is kept and reported."""
        if self.down:
            return
        elsewhere = isinstance(error, collective.PeerFaultError)
        self.reason = str(error) if elsewhere else f"{what} failed with {type(error).__name__}: {error}"
        told = None if elsewhere else error
        logger.warning("vocabguard stands down, training goes on: %s", self.reason, exc_info=told)

    @contextmanager
    def contain(self, what: str) -> Iterator[None]:
        """Run a piece of the guard's work: timed, and with its exceptions contained.

        Bad configuration is the user's to hear before step 1, so `ConfigError` always passes.

        Raises:
            ConfigError: as it comes; and, where faults are to be raised, whatever comes.
        """
        began = time.perf_counter()
        self._depth += 1
        try:
            yield
        except Exception as error:
            # Whatever becomes of it here: the other processes must not wait for this one.
            collective.report_failure()
            if self._raise or isinstance(error, ConfigError):
                raise
            self.stand_down(what, error)
        finally:
            self._depth -= 1
            # Nested work is already inside the outer piece's time.
            if self._depth == 0:
                self.seconds += time.perf_counter() - began
