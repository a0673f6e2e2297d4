"""The ways in which a served model is asked, see `vocabguard.served.asking`, and the defaults of a client."""

from __future__ import annotations

from typing import Literal

Mode = Literal["echo", "chat", "text"]
MODES: tuple[Mode, ...] = ("echo", "chat", "text")

TIMEOUT = 120.0
"""Seconds that an answer may take."""

TRIES = 5
"""Of each request."""

CONCURRENCY = 4
"""Requests at a time."""
