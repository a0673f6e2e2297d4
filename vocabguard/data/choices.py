"""What a command or a setting chooses between, of training data: apart from the code, so that help needs none of it."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["messages", "completion", "text", "tokens", "preference", "alpaca", "question"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Formats of rows."""

Loss = Literal["assistant", "completion", "all"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
"""Which tokens are targets."""

Rank = Literal["inputs", "reference", "merges"]
RANKS: tuple[Rank, ...] = get_args(Rank)
"""Which tokens at risk come first."""
