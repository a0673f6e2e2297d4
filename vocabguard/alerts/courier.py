"""Carries news of alerts to receivers beyond this machine, in a thread of its own: training never waits for them."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from vocabguard.alerts.rules import LEVELS
from vocabguard.transitions import Transition

logger = logging.getLogger("vocabguard")

Wait = Callable[[float], bool]
"""Waits so many seconds, before another attempt; False says at once that there is to be none."""


class Receiver(Protocol):
    """Where news goes."""

    name: str

    def open(self) -> bool:
        """Whether there is anyone to receive now."""

    def send(self, change: Transition, wait: Wait) -> None:
        """Deliver, or raise whatever came of it."""


class Courier:
    """Hands transitions to receivers, in order, from a daemon thread that is started with the first one.

    Nothing here raises or waits but `close`. What cannot be delivered is told once a receiver, and counted in the end.

    Args:
        receivers: each gets every transition.
        least_level: news of rules below it is not sent: ``info``, ``warning`` or ``critical``.
        waiting: transitions that may wait; what comes beyond is dropped.
        finish_seconds: how long `close` waits.
    """

    def __init__(
        self,
        receivers: Sequence[Receiver],
        *,
        least_level: str = "warning",
        waiting: int = 100,
        finish_seconds: float = 10,
    ) -> None:
        self._receivers = tuple(receivers)
        self._levels = LEVELS[LEVELS.index(least_level) :]
        self._most = waiting
        self._finish_seconds = finish_seconds
        self._queue: queue.SimpleQueue[Transition | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._told: set[str] = set()
        self._sent, self._lost, self._dropped = 0, 0, 0

    def send(self, change: Transition) -> None:
        """Take a transition along. Returns at once."""
        if change.level not in self._levels or not any(receiver.open() for receiver in self._receivers):
            return
        if self._queue.qsize() >= self._most:
            self._dropped += 1
            self._warn("full", "vocabguard: %d alerts wait to be sent; later ones are dropped", self._most)
            return
        self._queue.put(change)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="vocabguard-alerts", daemon=True)
            self._thread.start()
            # A script that dies of what an alert is about does not come to `close`.
            atexit.register(self.close)

    def close(self) -> None:
        """Deliver what waits, for so long as was said; what is not delivered then is told, and never will be."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        atexit.unregister(self.close)
        self._queue.put(None)
        thread.join(self._finish_seconds)
        self._given_up.set()
        # An attempt that is under way counts as failed.
        waiting = self._queue.qsize() if thread.is_alive() else 0
        if lost := self._lost + self._dropped + waiting:
            logger.warning("vocabguard: %d news of alerts could not be delivered, %d were", lost, self._sent)

    def _work(self) -> None:
        while (change := self._queue.get()) is not None and not self._given_up.is_set():
            for receiver in self._receivers:
                self._deliver(receiver, change)

    def _deliver(self, receiver: Receiver, change: Transition) -> None:
        try:
            if receiver.open():
                receiver.send(change, self._wait)
                self._sent += 1
        # Whatever a receiver or a library raises: nobody is there to catch it.
        except Exception as error:
            self._lost += 1
            failed = "vocabguard: news of alert %s could not be sent to the %s, training goes on: %s: %s"
            self._warn(receiver.name, failed, change.rule, receiver.name, type(error).__name__, error)

    def _wait(self, seconds: float) -> bool:
        return not self._given_up.wait(seconds)

    def _warn(self, kind: str, message: str, *values: object) -> None:
        level = logging.DEBUG if kind in self._told else logging.WARNING
        self._told.add(kind)
        logger.log(level, message, *values)
