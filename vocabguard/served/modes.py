"""The ways in which a served model is asked; see `vocabguard.served.asking`."""

from __future__ import annotations

from typing import Literal

Mode = Literal["echo", "chat", "text"]
MODES: tuple[Mode, ...] = ("echo", "chat", "text")
