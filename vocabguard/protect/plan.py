"""Which tokens are echoed, how many a batch, from which batch on.

A plan is a list of ids that is taken in turn, shuffled anew at each pass or in the order of their need, so many tokens
a batch. What a batch gets is a function of the plan, the batch's number and the process alone: workers need no state, a
resumed run goes on alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import regex
import torch
from torch import Tensor

from vocabguard.measure.exposure import CLASS_STARTS, exposure_classes, steps_since_target
from vocabguard.results import EchoPlan, Exposure
from vocabguard.vocabulary.table import VocabTable, resolve_token

Mode = Literal["uniform", "balanced", "least_exposed", "recall", "watch"]
MODES: tuple[Mode, ...] = ("uniform", "balanced", "least_exposed", "recall", "watch")
BY_NEED: tuple[Mode, ...] = ("balanced", "least_exposed", "recall")
"""Modes whose ids are chosen anew at every check, and taken in the order of their need."""

_LEAST_TURNS = 16
_MANY = 2.0**62

_MIX = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: neighbouring numbers become unlike seeds

PATTERN = "re:"
"""Prefix of an exclusion that is a regular expression."""


def allowed_ids(
    table: VocabTable, tokenizer: Any, exclude: Sequence[int | str] = (), key: str = "echo.exclude"
) -> Tensor:
    """(m,) int64, ascending: live tokens (no control, padded, unreachable or never-trained row) without the excluded.

    Args:
        tokenizer: resolves texts; may be None where nothing is excluded by text.
        exclude: ids, texts that are one token, and ``re:`` patterns that a token's text is searched for.
        key: what messages call them.

    Raises:
        ValueError: for an exclusion that is no token or no pattern, or if nothing is left.

    Example:
        >>> from vocabguard.vocabulary.table import plain_table
        >>> allowed_ids(plain_table(4), None, exclude=[1, "re:row 3"])
        tensor([0, 2])
    """
    mask = table.live.clone()
    for item in exclude:
        mask[_excluded(table, tokenizer, item, key)] = False
    ids = mask.nonzero().flatten()
    if len(ids) == 0:
        raise ValueError(f"{key} is {list(exclude)!r}; it leaves no token to echo")
    return ids


def _excluded(table: VocabTable, tokenizer: Any, item: int | str, key: str) -> list[int]:
    if isinstance(item, bool) or not isinstance(item, (int, str)):
        raise ValueError(f"{key} holds {item!r}; allowed: token ids, texts that are one token, 're:' patterns")
    if isinstance(item, str) and item.startswith(PATTERN):
        try:
            pattern = regex.compile(item.removeprefix(PATTERN))
        except regex.error as error:
            raise ValueError(f"{key} holds {item!r}, which is no regular expression: {error}") from error
        return [token for token in range(len(table)) if pattern.search(table.text(token))]
    if isinstance(item, str) and tokenizer is None:
        raise ValueError(f"{key} holds the text {item!r}; without a tokenizer only ids are allowed")
    try:
        return [resolve_token(tokenizer, item, len(table))]
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def ids_in(ids: Tensor, allowed: Tensor) -> Tensor:
    """(k,) int64: those of the (n,) `ids` that are among the (m,) `allowed` ones, in their order.

    >>> ids_in(torch.tensor([7, 2, 5]), torch.tensor([2, 7]))
    tensor([7, 2])
    """
    return ids[torch.isin(ids, allowed)]


def batch_ids(plan: EchoPlan, batch: int, rank: int = 0, world: int = 1) -> list[int]:
    """The ids that one process echoes in one batch.

    Over the batches and processes of a plan each pass takes every id exactly once. Batches are counted over the run,
    from 0; a plan has those from ``plan.first_batch`` on. All processes get their ids in the same batches: each waits
    for the slowest, so rows here and there would delay every step.

    Example:
        >>> at = {"version": 0, "first_batch": 0, "cycle": 0, "offset": 0, "owed": 0.0, "seed": 0}
        >>> plan = EchoPlan(mode="balanced", dose=0.1, rate=3.0, list_tokens=2, ids=torch.arange(5), **at)
        >>> [batch_ids(plan, batch) for batch in range(3)]  # 3 a batch, in whole lists of 2
        [[0, 1], [2, 3, 4, 0], [1, 2]]
    """
    turn = batch - plan.first_batch
    before, after = taken(plan, turn), taken(plan, turn + 1)
    begin = plan.offset + world * before + rank * (after - before)
    return _stream(plan, begin, begin + after - before)


def taken(plan: EchoPlan, batches: int) -> int:
    """Tokens that one process takes in a plan's first `batches` batches: whole turns of ``plan.list_tokens``."""
    if batches <= 0 or plan.rate <= 0:
        # Also where what is owed is a turn to within rounding: it is the first batch's, or the next plan's.
        return 0
    # A hair more: rates that were added up fall short of a whole turn by rounding.
    return plan.list_tokens * math.floor((plan.owed + batches * plan.rate) / plan.list_tokens + 1e-9)


def most_targets(plan: EchoPlan, data_targets: int, limit: float) -> int:
    """Echo targets that one batch may get of a plan, given the data targets that it really has.

    A plan's rate comes from the mean of many batches; in a short run, or in a batch of short answers, it would be more
    than `limit` echo targets per data target. A plan of less than a turn a batch gives a turn now and then: that one
    has the room of all the batches that it stands for.
    """
    if plan.rate <= 0:
        return 0
    # A rate next to nothing makes of a limit what no integer holds.
    return math.floor(min(limit * data_targets * min(max(1.0, plan.list_tokens / plan.rate), _MANY), _MANY) + 1e-9)


def lists_at_a_time(in_a_row: int, list_tokens: int, *, rate: float, data: float, batches: int | None) -> int:
    """How many lists a batch gets together: a row that is padded to a batch's length costs as much as a full one.

    Args:
        in_a_row: lists that a row of the batch's length holds.
        list_tokens: tokens in a list.
        rate: echo tokens a batch and process.
        data: data targets a batch and process; a batch gets no more echo targets than that at a time.
        batches: batches to come, if known: there are at least `_LEAST_TURNS` turns in them.

    Example:
        >>> lists_at_a_time(38, 16, rate=100.0, data=1000.0, batches=5000)
        38
        >>> lists_at_a_time(38, 16, rate=30.0, data=300.0, batches=100)
        11
    """
    most = min(data, math.inf if batches is None else rate * batches / _LEAST_TURNS)
    return max(1, min(in_a_row, int(most // list_tokens)))


def next_plan(
    plan: EchoPlan, *, first_batch: int, rate: float, world: int = 1, ids: Tensor | None = None,
    list_tokens: int | None = None,
) -> EchoPlan:  # fmt: skip
    """The plan after this one; with the same ids it goes on in the same pass.

    Args:
        first_batch: the first batch that the new plan holds for, not before the old one's.
        rate: echo tokens a batch and process; 0 stops.
        ids: (m,) int64, another list; None keeps the list.
        list_tokens: tokens that a batch gets together; None keeps the number.
    """
    batches = max(0, first_batch - plan.first_batch)
    given = taken(plan, batches)
    owed = min(max(0.0, plan.owed + batches * plan.rate - given), float(plan.list_tokens))
    after = replace(
        plan, version=plan.version + 1, first_batch=first_batch, rate=rate, offset=plan.offset + world * given,
        owed=owed, list_tokens=list_tokens or plan.list_tokens,
    )  # fmt: skip
    return after if ids is None else replace(after, ids=ids, cycle=after.version, offset=0)


def least_exposed(allowed: Tensor, exposure: Exposure, cosine: Tensor | None, count: int, step: int) -> Tensor:
    """At most `count` ids that need an echo most: by exposure class, then steps since last a target, then drift.

    The neediest come first; ids alike in all three keep their order.

    Args:
        allowed: (m,) int64, ids that may be echoed.
        exposure: echo targets do not change a token's class, but count as "last a target".
        cosine: (V,) float32 of the head rows, if there is a drift.
    """
    classes = exposure_classes(exposure.data_target)[allowed]
    since = steps_since_target(exposure, step)[allowed]
    since = torch.where(since < 0, torch.iinfo(since.dtype).max, since)
    order = torch.arange(len(allowed))
    # From the least to the most important key: stable sorts keep what the earlier ones found.
    if cosine is not None:
        order = order[torch.argsort(cosine[allowed].nan_to_num(nan=1.0), stable=True)]
    order = order[torch.argsort(since[order], descending=True, stable=True)]
    order = order[torch.argsort(classes[order], stable=True)]
    return allowed[order[:count]]


def balanced(allowed: Tensor, exposure: Exposure, count: int, boost: float, seed: int) -> Tensor:
    """At most `count` ids, furthest behind their turns first; tokens that are seldom a target get more turns.

    A token that was never a target can be held still; one with 20 targets or more is kept by the data. Those between
    are neither: a row is let go at its first target, and few more come.

    Args:
        allowed: (m,) int64, ids that may be echoed.
        boost: how many turns a token with 1 to 19 data targets gets for one of any other.
        seed: of the order of ids whose turn it is alike.
    """
    shuffled = allowed[torch.randperm(len(allowed), generator=torch.Generator().manual_seed(seed))]
    seldom = (exposure.data_target >= CLASS_STARTS[0]) & (exposure.data_target < CLASS_STARTS[-1])
    turns = exposure.echo_target.double() / torch.where(seldom, boost, 1.0)
    return shuffled[torch.argsort(turns[shuffled], stable=True)[:count]]


AT_RISK_SHARE = 0.25
"""Share of the allowed tokens, those of lowest estimated recall, that a plan by recall draws more often."""


def by_recall(allowed: Tensor, exposure: Exposure, nats: Tensor | None, count: int, boost: float, seed: int) -> Tensor:
    """At most `count` ids, drawn at random: those of low estimated recall more often, those echoed already later.

    What echo keeps is the skill of repeating as much as single tokens, and for that its lists have to be mixed: so the
    tokens at risk are favoured, and no token is left out.

    Args:
        allowed: (m,) int64, ids that may be echoed.
        nats: (V,) float32, estimated recall, NaN where unknown; None where nothing is estimated: then all are alike.
        boost: how much more often one of the `AT_RISK_SHARE` at risk is drawn, and how many turns it gets for one.
        seed: of the draw.

    Example:
        >>> none = torch.zeros(8, dtype=torch.int64)
        >>> counts = Exposure(none, none, none, none, none.float(), none.float(), none.float(), 0, 0.0, 0)
        >>> nats = torch.tensor([-9.0, -9.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
        >>> by_recall(torch.arange(8), counts, nats, count=2, boost=1000.0, seed=0).sort().values
        tensor([0, 1])
    """
    weight = torch.ones(len(allowed), dtype=torch.float64)
    if nats is not None:
        known = nats[allowed].nan_to_num(nan=torch.inf)
        at_risk = torch.topk(known, math.ceil(AT_RISK_SHARE * len(allowed)), largest=False)
        weight[at_risk.indices[at_risk.values < torch.inf]] = max(boost, 1e-9)
    generator = torch.Generator().manual_seed(seed)
    # The order of exponential waiting times is a draw without replacement in proportion to the weights.
    waiting = -torch.rand(len(allowed), generator=generator, dtype=torch.float64).clamp(min=1e-300).log() / weight
    drawn = torch.argsort(waiting)
    turns = exposure.echo_target[allowed].double() / weight
    return allowed[drawn[torch.argsort(turns[drawn], stable=True)][:count]]


def foreseen(exposure: Exposure, plan: EchoPlan, batches: range, world: int, step: int) -> Exposure:
    """The counts with the echo targets of batches that are made already, or will be before another plan can hold."""
    ids = [token for batch in batches if batch >= plan.first_batch for rank in range(world)
           for token in batch_ids(plan, batch, rank, world)]  # fmt: skip
    to_come = torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=len(exposure.echo_target))
    last = exposure.last_target.masked_fill(to_come > 0, step)
    return replace(exposure, echo_target=exposure.echo_target + to_come, last_target=last)


def adjusted_dose(dose: float, rise: float, *, tolerated: float, least: float, most: float) -> float:
    """The next dose of the automatic mode: up by half when recall suffers, down by a fifth when it does not.

    Args:
        dose: echo targets per data target now.
        rise: how much the probe's loss (mean -log p of the probed tokens, nats) has risen over the base's.
        tolerated: the rise that is tolerated; between half of it and it the dose stays.

    Example:
        >>> [round(adjusted_dose(0.1, rise, tolerated=0.05, least=0.01, most=0.5), 3) for rise in (0.2, 0.04, 0.0)]
        [0.15, 0.1, 0.08]
    """
    factor = 1.5 if rise > tolerated else 0.8 if rise < tolerated / 2 else 1.0
    return min(most, max(least, dose * factor))


def _stream(plan: EchoPlan, begin: int, end: int) -> list[int]:
    """Ids ``begin`` to ``end`` of the endless stream of shuffled passes."""
    found: list[int] = []
    size = len(plan.ids)
    while begin < end and size:
        place = begin % size
        count = min(end - begin, size - place)
        part = plan.ids[place : place + count]
        if plan.mode not in BY_NEED:
            part = plan.ids[_order(plan.seed, plan.cycle, begin // size, size)[place : place + count]]
        found += part.tolist()
        begin += count
    return found


@lru_cache(maxsize=2)
def _order(seed: int, cycle: int, number: int, size: int) -> Tensor:
    """The shuffle of one pass, by a generator of its own."""
    mixed = seed
    for part in (cycle, number):
        mixed = ((mixed ^ part) * _MIX + 1) % 2**63
    return torch.randperm(size, generator=torch.Generator().manual_seed(mixed))
