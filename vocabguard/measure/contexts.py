"""Which ways of asking a model follows, and what each costs: a probe uses those that its base follows best."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vocabguard.measure.probe import PromptContext, probe, prompts_of
from vocabguard.results import ProbeResult
from vocabguard.rows.models import longest_prompt

_FIRST = 3
"""All contexts are asked for one in so many of the tokens, the better ones for the others too."""
_BETTER = 2
"""How many those are, in asks that are wanted."""


def choose_contexts(shares: Mapping[str, float], lengths: Mapping[str, float], asks: int) -> tuple[str, ...]:
    """Names of the contexts that a model follows best: the shorter ones of those that it follows about alike.

    Args:
        shares: of some tokens, the share in [0, 1] that the model repeats in each context.
        lengths: tokens of a prompt for each token that it asks for.
        asks: at most so many; fewer where others are followed by less than nine tenths of the best one's share.

    Example:
        >>> shares = {"list": 0.5, "lines": 0.94, "items": 0.95, "turns": 0.88, "long": 0.96}
        >>> lengths = {"list": 2.0, "lines": 4.1, "items": 4.6, "turns": 5.4, "long": 8.4}
        >>> choose_contexts(shares, lengths, asks=4)
        ('lines', 'items', 'long', 'turns')
    """
    best = max(shares.values())
    alike = sorted((name for name in shares if shares[name] >= 0.95 * best), key=lambda name: (lengths[name], name))
    others = sorted((name for name in shares if name not in alike), key=lambda name: (-shares[name], name))
    return tuple(name for name in (*alike, *others)[:asks] if shares[name] >= 0.9 * best)


@dataclass(frozen=True)
class Asks:
    """The asks of a probe, chosen by what a model follows.

    Attributes:
        contexts: an ask each.
        shares: what it repeats of the tokens that it was chosen by, in [0, 1], by context, or of a third of them where
            a context fell behind there; empty where all are used.
        seconds: that a token of a prompt took; NaN where nothing was asked.
    """

    contexts: tuple[PromptContext, ...]
    shares: Mapping[str, float]
    seconds: float


def choose_asks(
    model: nn.Module, pool: Sequence[PromptContext], ids: Tensor, asks: int, *, seed: int, batch_tokens: int
) -> Asks:
    """Choose the contexts of a pool that a model follows best; see `choose_contexts`.

    Prompts longer than the model takes are left out, unless all are. All contexts are asked for a third of the tokens,
    and twice as many as are wanted for the rest: the choice is as good as if all were, for two thirds of the price.

    Args:
        ids: (n,) int64 tokens to choose by; choose by others than those that are reported, or the choice flatters.
        asks: how many are wanted; a pool of as many or fewer is used as it is.

    Example:
        >>> from types import SimpleNamespace
        >>> class Parrot(nn.Module):
        ...     def forward(self, input_ids):
        ...         return SimpleNamespace(logits=9 * torch.eye(4)[input_ids])
        >>> ways = {"odd": ((), 2), "one": ((), 1), "x": ((1,), 1)}
        >>> pool = [PromptContext(name, (), after, k) for name, (after, k) in ways.items()]
        >>> found = choose_asks(Parrot(), pool, torch.arange(4), 2, seed=0, batch_tokens=8)
        >>> [context.name for context in found.contexts], found.shares["one"]
        (['one', 'one 2'], 1.0)
    """
    longest = longest_prompt(model)
    fitting = [one for one in pool if longest is None or prompt_length(one) * one.k <= longest] or list(pool)
    if len(fitting) <= asks or not len(ids):
        return Asks(asked_in(fitting, asks), {}, math.nan)
    began, lengths = time.perf_counter(), {context.name: prompt_length(context) for context in fitting}

    def ask(some: Tensor, contexts: Sequence[PromptContext]) -> ProbeResult:
        return probe(model, some, contexts, seed=seed, batch_tokens=batch_tokens)

    first = torch.arange(len(ids)) % _FIRST == 0
    of_first = ask(ids[first], fitting)
    shares = dict(zip(of_first.contexts, of_first.emitted.float().mean(0).tolist(), strict=True))
    order = sorted(fitting, key=lambda one: (-shares[one.name], lengths[one.name], one.name))
    better, read = order[: _BETTER * asks], int(first.sum()) * sum(lengths.values())
    if not bool(first.all()):
        of_rest = ask(ids[~first], better)
        read += int((~first).sum()) * sum(lengths[name] for name in of_rest.contexts)
        for place, name in enumerate(of_rest.contexts):
            of_both = [of_first.emitted[:, of_first.contexts.index(name)], of_rest.emitted[:, place]]
            shares[name] = float(torch.cat(of_both).float().mean())
    names = choose_contexts({one.name: shares[one.name] for one in better}, lengths, asks)
    chosen = [context for name in names for context in fitting if context.name == name]
    return Asks(asked_in(chosen, asks), shares, (time.perf_counter() - began) / read)


def prompt_length(context: PromptContext) -> float:
    """Tokens of a prompt for each token that it asks for.

    >>> prompt_length(PromptContext("list", before=(1, 2), after=(3,), k=4))
    2.5
    """
    probe_list = torch.zeros(1 + (context.shots or 0) // context.k + 1, context.k, dtype=torch.int64)
    return prompts_of(probe_list, context)[0].shape[1] / context.k


def asked_in(contexts: Sequence[PromptContext], asks: int) -> tuple[PromptContext, ...]:
    """As many asks as wanted: the contexts in turn, from the second round on under a name of their own.

    Lists depend on the name, so a context that is used again asks among other neighbours.

    >>> lines = PromptContext("lines", before=(), after=(), k=16)
    >>> [context.name for context in asked_in([lines], asks=2)]
    ['lines', 'lines 2']
    """
    rounds = -(-asks // len(contexts))
    found = [
        context if turn == 0 else replace(context, name=f"{context.name} {turn + 1}")
        for turn in range(rounds)
        for context in contexts
    ]
    return tuple(found[:asks])
