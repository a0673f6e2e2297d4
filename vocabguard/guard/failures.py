"""What happens when the guard itself fails: reported once, then it disables itself and training continues."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vocabguard import collective
from vocabguard.config import ConfigError
from vocabguard.guard.agreement import RefusedError

logger = logging.getLogger("vocabguard")


class Faults:
    """Contains the guard's exceptions and adds up the time that its work takes.

    Args:
        on_error: ``"warn"`` logs the first fault and disables the guard; ``"raise"`` raises it.
    """

    def __init__(self, on_error: str) -> None:
        self._raise = on_error == "raise"
        self._depth = 0
        self.reason: str | None = None
        self.seconds = 0.0

    @property
    def down(self) -> bool:
        """Whether the guard has disabled itself."""
        return self.reason is not None

    def stand_down(self, what: str, error: Exception) -> None:
        """Stop guarding; only the first fault is kept and reported."""
        if self.down:
            return
        plain = isinstance(error, (collective.PeerFaultError, RefusedError))
        self.reason = str(error) if plain else f"{what} failed with {type(error).__name__}: {error}"
        told = None if plain else error
        logger.warning("vocabguard disabled itself; training continues: %s", self.reason, exc_info=told)

    @contextmanager
    def contain(self, what: str, *, refuses: bool = False) -> Iterator[None]:
        """Run a piece of the guard's work: timed, and with its exceptions contained.

        What a handler of signals raises passes: it is meant for the training, and only happens to arrive here.

        Args:
            refuses: whether a `ConfigError` passes: bad configuration is the user's to hear before step 1.

        Raises:
            ConfigError: where it passes; and, where faults are to be raised, whatever comes.
        """
        with self.timed():
            try:
                yield
            except Exception as error:
                self.take(what, error, refuses=refuses)

    def take(self, what: str, error: Exception, *, refuses: bool) -> None:
        """What `contain` does with an exception, for the ``except`` block that has caught it."""
        # Whatever becomes of it here: the other processes must not wait for this one.
        collective.report_failure()
        if self._raise or (refuses and isinstance(error, ConfigError)) or _by_signal(error):
            raise error
        self.stand_down(what, error)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count what is done inside as the guard's work."""
        began = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            # Nested work is already inside the outer piece's time.
            if self._depth == 0:
                self.seconds += time.perf_counter() - began


def _by_signal(error: Exception) -> bool:
    """Whether a handler of signals raised it, as jobs that are about to be preempted do."""
    handlers = {getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()} - {None}
    place = error.__traceback__
    while place is not None:
        if place.tb_frame.f_code in handlers:
            return True
        place = place.tb_next
    return False
