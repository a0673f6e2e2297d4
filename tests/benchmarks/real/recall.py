"""The bench's own judge: which tokens a model repeats, asked in two ways that nothing else uses.

One ask is noisy: with other neighbours in the list a base model changes its mind on 7 to 15 % of its tokens. So each
token is asked four times, in both ways and among other neighbours, and the base's own noise is measured by asking it
four times more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from real.data import around
from torch import Tensor

from vocabguard.measure.intervals import wilson

WAYS = ("{}\nNow write that again.", "I wrote {} here. What did I write?")
"""Held out of data, echo rows and probes."""

LIST, ASKS = 8, 4


@torch.no_grad()
def ask(model: Any, tokenizer: Any, ids: Sequence[int], *, seed: int, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Ask for every token `ASKS` times, in lists of `LIST`, teacher-forced.

    Args:
        seed: of the neighbours.

    Returns:
        (n, ASKS) bool, the token was the most likely one, and (n, ASKS) float32, its log-probability in nats.
    """
    said = torch.zeros(len(ids), ASKS, dtype=torch.bool)
    nats = torch.zeros(len(ids), ASKS)
    place = {token: row for row, token in enumerate(ids)}
    for number in range(ASKS):
        before, after = around(tokenizer, WAYS[number % len(WAYS)])
        order = Random(f"{seed} {number}").sample(list(ids), len(ids))
        lists = [order[at : at + LIST] for at in range(0, len(order) - len(order) % LIST, LIST)]
        # What is left over gets neighbours from the front, so that all prompts are of one length.
        lists += [[*order[len(lists) * LIST :], *order][:LIST]] if len(order) % LIST else []
        for at in range(0, len(lists), batch):
            part = lists[at : at + batch]
            rows = torch.tensor([[*before, *tokens, *after, *tokens[:-1]] for tokens in part])
            logits = model(input_ids=rows, logits_to_keep=LIST).logits.float()
            logp = logits.log_softmax(-1)
            for line, tokens in enumerate(part):
                for turn, token in enumerate(tokens):
                    said[place[token], number] = int(logits[line, turn].argmax()) == token
                    nats[place[token], number] = logp[line, turn, token]
    return said, nats


def known(said: Tensor) -> Tensor:
    """(n,) bool: said in at least three of four asks."""
    return said.sum(1) >= ASKS - 1


def gone(said: Tensor) -> Tensor:
    """(n,) bool: said in at most one of four asks."""
    return said.sum(1) <= 1


@dataclass(frozen=True)
class Verdict:
    """What became of some tokens.

    Attributes:
        asked: tokens asked for.
        known: of them, those that the base repeats.
        lost: known ones that are gone now.
        unknown: of the asked, those that the base does not repeat.
        gained: unknown ones that are known now.
        nats: mean change of the known ones' log-probability.
    """

    asked: int
    known: int
    lost: int
    unknown: int
    gained: int
    nats: float

    @property
    def retained(self) -> tuple[float, float, float]:
        """Share of the known ones that are not gone, and its 95 % interval; NaN where none is known."""
        low, high = wilson(self.known - self.lost, self.known)
        return (1 - self.lost / self.known if self.known else math.nan), low, high


def judge(base: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor], chosen: Tensor) -> Verdict:
    """Compare two rounds of asks of the same tokens.

    Args:
        base: of the base model, see `ask`.
        now: of another one, or of the base among other neighbours: then the verdict is noise.
        chosen: (n,) bool, tokens that count.
    """
    knew, lacked = known(base[0]) & chosen, gone(base[0]) & chosen
    change = (now[1] - base[1]).mean(1)[knew]
    return Verdict(
        int(chosen.sum()), int(knew.sum()), int((knew & gone(now[0])).sum()),
        int(lacked.sum()), int((lacked & known(now[0])).sum()), float(change.mean()) if len(change) else math.nan,
    )  # fmt: skip
