"""Which tokens are probed and how, and the probe at the base that later ones are held against."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.config import ConfigError, ContextConfig, GuardConfig, ProbeConfig
from vocabguard.guard.cadence import forward_tokens
from vocabguard.guard.words import WatchedWord, watched_words
from vocabguard.measure.contexts import asked_in, choose_asks, prompt_length
from vocabguard.measure.exposure import exposure_classes
from vocabguard.measure.probe import PromptContext, ask_words, probe, probe_applicable
from vocabguard.measure.recall import LogitMoments
from vocabguard.measure.retention import Sample, lost, words_lost
from vocabguard.measure.sampling import sample_weights, stratified_sample
from vocabguard.protect.prompts import render_pool
from vocabguard.results import EXPOSURE_CLASSES, NotApplicable, Preflight, ProbeResult
from vocabguard.text import percent
from vocabguard.vocabulary.table import VocabTable

LEAST_SAMPLE = 128
"""Tokens that are probed in the shortest run, if so many are wanted."""
CHOOSING = 48
"""Live tokens, none of the sample, by which contexts are chosen: a list of the usual length, then two."""
FREQUENT = 64
"""The most frequent targets of the data, probed beside the sample: what they lose is no token, but the skill."""
OFTEN = EXPOSURE_CLASSES.index("5-19")
"""The class from which on they are taken: short runs have few tokens of 20 targets and more. Those of 5 to 19 are lost
about as rarely (3 and 1 % on the real models of the bench, where 3 to 45 % of the others were)."""
WORD_ASKS = 4
"""Times as often as a token of the sample a watched word is asked: its verdict is of its own."""
_SAY_EVERY = 10.0
EARLIER = {
    "list": ("Repeat exactly: {tokens}", 16),
    "three": ("{tokens}\nRepeat these three.", 3),
    "quoted": ('Say "{tokens}" once more.', 1),
    "sentence": ("I wrote {tokens} here. What did I write?", 1),
}
"""Default contexts of 0.1.0."""


@dataclass(frozen=True)
class Population:
    """The live tokens that a probe samples.

    Attributes:
        strata: (V,) int64, group and expected exposure class.
        live: (V,) bool.
        frequent: (f,) int64, the most frequent targets among the live tokens, as far as that is known beforehand.
        whole: probe all live tokens.
    """

    strata: Tensor
    live: Tensor
    frequent: Tensor
    whole: bool = False

    @classmethod
    def of(cls, table: VocabTable, flight: Preflight | NotApplicable, *, whole: bool) -> Population:
        """By script group, and by what preflight counted, if it ran."""
        strata, frequent = table.group.long() * 8, torch.empty(0, dtype=torch.int64)
        if isinstance(flight, Preflight):
            # 8 leaves room for the four exposure classes: a stratum is a pair of group and class.
            classes = exposure_classes(flight.data_target)
            strata = strata + classes.long()
            often = torch.where(table.live & (classes >= OFTEN), flight.data_target, 0)
            found = torch.topk(often, min(FREQUENT, len(often)))
            frequent = found.indices[found.values > 0]
        return cls(strata, table.live, frequent, whole)

    def draw(self, size: int, seed: int) -> Tensor:
        """(n,) int64, sorted."""
        if self.whole:
            return self.live.nonzero().flatten()
        return stratified_sample(self.strata, self.live, size, seed)


@dataclass
class Prober:
    """Asks a model for a fixed set of tokens in fixed contexts, which are chosen when the base is asked.

    Attributes:
        pool: contexts to choose from.
        asks: how often each token is asked.
        population: tokens to draw from.
        size: most tokens drawn.
        watched: (w,) int64, tokens of the watch list that are words of their own.
        words: the watch list.
        batch_tokens: tokens in one forward pass.
        seed: of the shuffles; the same at every probe, so that probes differ only by the model.
        budget: share of the run that a probe at the base and one at the end may take, above `LEAST_SAMPLE` tokens.
        to_train: tokens that the run will train on; NaN where unknown.
        beside: tokens of the reference text that is read with each probe.
        say: says what the base's probe will cost, and how far it is.
        earlier: default contexts of earlier versions, in which a run that is resumed may have been asked.
        shares: what the base repeats of some other tokens, by context; empty before the base was asked.
        contexts: the asks; empty before the base was asked.
        ids: (n,) int64, the probed tokens.
        weights: (n,) float32, live tokens that each of them stands for; 0 for watched and frequent ones beside it.
        base: the first result.
        last: the latest result.
        base_words: (w, A) bool, asks of the watched words that the base got right.
        last_words: the same of the latest probe.
        looks: probes since the base.
        moments: logits of every token at the places of the latest probe.
        runs: how often the model was asked, in this process.
        seconds: time that asking took.
        cpu_seconds: the same by the process's own clock, in which other programs do not count.
    """

    pool: tuple[PromptContext, ...]
    asks: int
    population: Population
    size: int
    words: tuple[WatchedWord, ...]
    batch_tokens: int
    seed: int
    budget: float = 0.005
    to_train: float = math.nan
    earlier: tuple[PromptContext, ...] = ()
    beside: int = 0
    say: Callable[[str], None] | None = None
    shares: dict[str, float] = field(default_factory=dict)
    contexts: tuple[PromptContext, ...] = ()
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    base: ProbeResult | None = None
    last: ProbeResult | None = None
    base_words: Tensor | None = None
    last_words: Tensor | None = None
    looks: int = 0
    moments: LogitMoments = field(default_factory=LogitMoments)
    runs: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._draw(self.size)

    @property
    def watched(self) -> Tensor:
        """(w,) int64, words of the watch list that are one token."""
        return torch.tensor([word.ids[0] for word in self.words if len(word.ids) == 1], dtype=torch.int64)

    def _draw(self, size: int) -> None:
        """Draw the tokens; all processes probe those that rank 0 has drawn, as each has seen its own data."""
        sample = self.population.draw(size, self.seed)
        beside = {*self.watched.tolist(), *self.population.frequent.tolist()}
        ids = torch.tensor(sorted({*sample.tolist(), *beside}), dtype=torch.int64)
        weights = torch.zeros(len(ids))
        weights[torch.isin(ids, sample)] = sample_weights(self.population.strata, self.population.live, sample)
        self.ids, self.weights = collective.agree((ids, weights))

    def run(self, model: nn.Module) -> ProbeResult:
        """Probe now; the first call chooses contexts and sets the base."""
        with self.timed():
            if self.base is None:
                self._choose(model)
            began = time.perf_counter()
            self.moments = LogitMoments()
            self.last = probe(
                model, self.ids, self.contexts, seed=self.seed, batch_tokens=self.batch_tokens,
                progress=self._teller(began) if self.base is None else None, moments=self.moments,
            )  # fmt: skip
            self.last_words = self._ask_words(model)
        if self.base is None:
            self.base, self.base_words = self.last, self.last_words
        else:
            self.looks += 1
        return self.last

    def _ask_words(self, model: nn.Module) -> Tensor:
        asks = asked_in(self.contexts, WORD_ASKS * len(self.contexts))
        words, others = [word.ids for word in self.words], self.ids if len(self.ids) else self.watched
        return ask_words(model, words, others, asks, seed=self.seed, batch_tokens=self.batch_tokens)

    def _choose(self, model: nn.Module) -> None:
        """Choose contexts by tokens that are not in the sample, and see what they cost."""
        others = self.population.live.clone()
        others[self.ids] = False
        others = others if bool(others.any()) else self.population.live
        ids = collective.agree(stratified_sample(torch.zeros_like(self.population.strata), others, CHOOSING, self.seed))
        found = choose_asks(model, self.pool, ids, self.asks, seed=self.seed + 1, batch_tokens=self.batch_tokens)
        self.contexts, self.shares = found.contexts, dict(found.shares)
        if found.shares:
            self._fit_size(collective.agree(found.seconds))

    def _fit_size(self, seconds: float) -> None:
        """Ask for fewer tokens where two probes would take more of the run than they may.

        Args:
            seconds: that a token of a prompt takes.
        """
        length = sum(map(prompt_length, self.contexts))
        if not (self.population.whole or math.isnan(self.to_train)):
            allowed = forward_tokens(self.budget, self.to_train) / length
            beside = len(self.ids) - int((self.weights > 0).sum())
            self._draw(min(self.size, max(LEAST_SAMPLE, int(allowed) - beside)))
        if self.say is not None:
            best = max(self.shares[context.name] for context in self.contexts if context.name in self.shares)
            text = ", with the reference text" if self.beside else ""
            drawn, live = int((self.weights > 0).sum()), int(self.population.live.sum())
            weak = f" The base repeats only {percent(best)} of {CHOOSING} tokens at best, so it tells little." * (
                best < 0.5
            )
            took = seconds * (length * len(self.ids) + self.beside)
            self.say(
                f"Probe: {drawn:,} of {live:,} live tokens, {len(self.contexts)} asks each; about {took:.0f} s a probe"
                f"{text}.{weak}"
            )

    def _teller(self, began: float) -> Callable[[float], None]:
        """Says how far the base is asked, every ten seconds."""
        told = [began]

        def tell(done: float) -> None:
            now = time.perf_counter()
            if self.say is not None and 0 < done < 1 and now - told[0] >= _SAY_EVERY:
                told[0] = now
                left = (now - began) * (1 - done) / done
                self.say(f"Probe: {percent(done)} of the base's answers, about {left:.0f} s left.")

        return tell

    def sample(self, classes: Tensor) -> Sample:
        """What each probed token stands for. `classes`: (V,) uint8 exposure classes so far."""
        frequent = torch.isin(self.ids, self.population.frequent) | (classes[self.ids] == 3)
        return Sample(self.weights, frequent)

    def lost(self) -> Tensor:
        """(n,) bool, aligned with `ids`: said at the base, and gone in the last probe; none before the second probe."""
        if self.base is None or self.last is None or self.last is self.base:
            return torch.zeros(len(self.ids), dtype=torch.bool)
        return lost(self.base, self.last)

    def words_of(self, kind: str) -> list[str]:
        """Watched words by verdict.

        Args:
            kind: ``lost``; ``known``, which the base says; or ``unknown``.
        """
        if self.base_words is None or self.last_words is None:
            return []
        known, missing = words_lost(self.base_words, self.last_words)
        chosen = {"lost": missing, "known": known, "unknown": ~known}[kind]
        return [word.text for word, flag in zip(self.words, chosen.tolist(), strict=True) if flag]

    def read_beside(self, tokens: int) -> None:
        """So many tokens of a reference text are read with each probe: a part of its price."""
        self.beside = tokens

    def tell_through(self, say: Callable[[str], None]) -> None:
        """Say by this what the base's probe will cost, and how far it is."""
        self.say = say

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count what is asked inside as this prober's."""
        began, worked = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.runs += 1
            self.seconds += time.perf_counter() - began
            self.cpu_seconds += time.process_time() - worked

    def state_dict(self) -> dict[str, Any]:
        """The base's result as tensors, and what was asked how."""
        if self.base is None:
            return {}
        beside = {"weights": self.weights, "words": self.base_words, "looks": self.looks, "shares": dict(self.shares)}
        return result_state(self.base) | beside

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the base, its ids and its contexts from an earlier run.

        Raises:
            ConfigError: if that run asked in other contexts.
        """
        if not state:
            return
        result = {key: state[key] for key in ("ids", "emitted", "probability", "rank", "instead")}
        base = ProbeResult(contexts=tuple(state["contexts"]), **result)
        earlier = set(base.contexts) == {context.name for context in self.earlier}
        pool = {context.name: context for context in (self.earlier if earlier else self.pool)}
        asks = [_named(pool, name) for name in base.contexts]
        if not all(asks):
            raise ConfigError(f"probe.contexts are {sorted(pool)}, but this run began with {sorted(base.contexts)}")
        self.base, self.ids, self.contexts = base, base.ids, tuple(ask for ask in asks if ask is not None)
        self.weights = state.get("weights", torch.ones(len(base.ids)))
        words = state.get("words")
        # A run of an earlier version, or with another watch list, asked the base for other words.
        self.base_words = words if words is not None and len(words) == len(self.words) else None
        self.looks, self.shares = int(state.get("looks", 0)), dict(state.get("shares", {}))


def _named(pool: Mapping[str, PromptContext], name: str) -> PromptContext | None:
    """A context of the pool under the name of an ask, such as ``lines 2``."""
    if name in pool:
        return pool[name]
    owner, _, turn = name.rpartition(" ")
    return replace(pool[owner], name=name) if turn.isdigit() and owner in pool else None


def result_state(result: ProbeResult) -> dict[str, Any]:
    """A `ProbeResult` as a dict that ``torch.load(weights_only=True)`` takes."""
    return {
        "contexts": list(result.contexts),
        "ids": result.ids,
        "emitted": result.emitted,
        "probability": result.probability,
        "rank": result.rank,
        "instead": result.instead,
    }


def choose_prober(
    model: nn.Module, config: GuardConfig, tokenizer: Any, table: VocabTable, flight: Preflight | NotApplicable,
    batches: int | None = None,
) -> Prober | NotApplicable:  # fmt: skip
    """The prober that a configuration asks for, or why there is none.

    Args:
        flight: what preflight found: tokens are drawn by the exposure that it expects.
        batches: training batches to come, if known.

    Raises:
        ConfigError: see `build_prober`.
    """
    if not config.probe.enabled:
        return NotApplicable("the probe is off")
    if tokenizer is None:
        return NotApplicable("the probe needs a tokenizer")
    if (reason := probe_applicable(model)) is not None:
        return reason
    to_train = math.nan
    if isinstance(flight, Preflight) and flight.batches and flight.tokens and batches:
        to_train = batches * flight.tokens / flight.batches
    return build_prober(config.probe, tokenizer, table, flight, config.seed, to_train)


def build_prober(
    config: ProbeConfig, tokenizer: Any, table: VocabTable, flight: Preflight | NotApplicable, seed: int,
    to_train: float = math.nan,
) -> Prober:  # fmt: skip
    """The prober that a configuration asks for.

    Raises:
        ConfigError: for a watch entry that is no word or a context that cannot be rendered.
    """
    words = watched_words(tokenizer, config.watch, len(table))
    try:
        pool = render_pool(tokenizer, config.contexts)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    shortest = min(context.k for context in pool)
    if long := [word for word in words if len(word.ids) > shortest]:
        raise ConfigError(
            f"probe.watch holds {long[0].text!r}, which has {len(long[0].ids)} tokens; allowed: {shortest}, a list's k"
        )
    population = Population.of(table, flight, whole=config.whole_vocabulary)
    earlier = render_pool(tokenizer, {name: ContextConfig(*way) for name, way in EARLIER.items()})
    return Prober(
        pool, config.asks, population, config.sample, words, config.batch_tokens, seed, config.budget, to_train, earlier
    )  # fmt: skip
