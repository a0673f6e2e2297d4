"""Which tokens are probed and how, and the probe at the base that later ones are held against."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.config import ConfigError, GuardConfig, ProbeConfig
from vocabguard.measure.exposure import exposure_classes
from vocabguard.measure.probe import PromptContext, probe, probe_applicable, said, stratified_sample
from vocabguard.protect.prompts import render_context
from vocabguard.results import NotApplicable, Preflight, ProbeResult
from vocabguard.vocabulary.table import VocabTable, resolve_token


def watched_ids(tokenizer: Any, watch: Sequence[int | str], rows: int) -> Tensor:
    """(w,) int64 ids of the watch list.

    Raises:
        ConfigError: for an entry that is no token.
    """
    ids = []
    for item in watch:
        if isinstance(item, bool) or not isinstance(item, (int, str)):
            raise ConfigError(f"probe.watch holds {item!r}; allowed: token ids, and texts that are one token")
        try:
            ids.append(resolve_token(tokenizer, item, rows))
        except ValueError as error:
            raise ConfigError(f"probe.watch: {error}") from error
    return torch.tensor(list(dict.fromkeys(ids)), dtype=torch.int64)


def probed_ids(config: ProbeConfig, table: VocabTable, classes: Tensor | None, watched: Tensor, seed: int) -> Tensor:
    """(n,) int64, sorted: every live token, or a sample by group (and expected class), and the watched ones.

    Args:
        classes: (V,) uint8 exposure classes that preflight expects, if it ran.
        watched: (w,) int64.
        seed: of the sample's own generator.
    """
    if config.whole_vocabulary:
        chosen = table.live.nonzero().flatten()
    else:
        # 8 leaves room for the four exposure classes: a stratum is a pair of group and class.
        strata = table.group.long() * 8 + (0 if classes is None else classes.long())
        chosen = stratified_sample(strata, table.live, config.sample, seed)
    return torch.tensor(sorted({*chosen.tolist(), *watched.tolist()}), dtype=torch.int64)


@dataclass
class Prober:
    """Asks a model for a fixed set of tokens in fixed contexts.

    Attributes:
        ids: (n,) int64.
        watched: (w,) int64, a part of `ids`.
        batch_tokens: tokens in one forward pass.
        seed: of the shuffles; the same at every probe, so that probes differ only by the model.
        base: the first result.
        last: the latest result.
        runs: how often the model was asked, in this process.
        seconds: time that asking took.
        cpu_seconds: the same by the process's own clock, in which other programs do not count.
    """

    contexts: tuple[PromptContext, ...]
    ids: Tensor
    watched: Tensor
    batch_tokens: int
    seed: int
    base: ProbeResult | None = None
    last: ProbeResult | None = None
    runs: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def run(self, model: nn.Module) -> ProbeResult:
        """Probe now; the first call sets the base."""
        with self.timed():
            self.last = probe(model, self.ids, self.contexts, seed=self.seed, batch_tokens=self.batch_tokens)
        self.base = self.base or self.last
        return self.last

    def lost(self) -> Tensor:
        """(n,) bool, aligned with `ids`: said at the base, and not in the last probe; none before the second probe."""
        if self.base is None or self.last is None or self.last is self.base:
            return torch.zeros(len(self.ids), dtype=torch.bool)
        return said(self.base) & ~said(self.last)

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
        """The base's result as tensors."""
        return {} if self.base is None else result_state(self.base)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the base and its ids from an earlier run.

        Raises:
            ConfigError: if that run asked in other contexts.
        """
        if state:
            self.base = ProbeResult(**{**state, "contexts": tuple(state["contexts"])})
            self.ids = self.base.ids
            kept = {context.name for context in self.contexts}
            if kept != set(self.base.contexts):
                raise ConfigError(
                    f"probe.contexts are {sorted(kept)}, but this run began with {sorted(self.base.contexts)}"
                )


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
    model: nn.Module, config: GuardConfig, tokenizer: Any, table: VocabTable, flight: Preflight | NotApplicable
) -> Prober | NotApplicable:
    """The prober that a configuration asks for, or why there is none.

    Args:
        flight: what preflight found: tokens are drawn by the exposure that it expects.

    Raises:
        ConfigError: see `build_prober`.
    """
    if not config.probe.enabled:
        return NotApplicable("the probe is off")
    if tokenizer is None:
        return NotApplicable("the probe needs a tokenizer")
    if (reason := probe_applicable(model)) is not None:
        return reason
    expected = exposure_classes(flight.data_target) if isinstance(flight, Preflight) else None
    return build_prober(config.probe, tokenizer, table, expected, config.seed)


def build_prober(config: ProbeConfig, tokenizer: Any, table: VocabTable, classes: Tensor | None, seed: int) -> Prober:
    """The prober that a configuration asks for; all processes probe the tokens that rank 0 has drawn.

    Raises:
        ConfigError: for a watch entry that is no token or a context that cannot be rendered.
    """
    watched = watched_ids(tokenizer, config.watch, len(table))
    try:
        contexts = tuple(
            render_context(tokenizer, name, context.text, context.k) for name, context in config.contexts.items()
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # Each process has looked at its own part of the data, and would draw other tokens.
    ids = collective.agree(probed_ids(config, table, classes, watched, seed))
    return Prober(contexts, ids, watched, config.batch_tokens, seed)
