"""The reference text of a run: which texts are read, the base's reading that later ones are held against."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.config import ConfigError, GuardConfig, ReferenceConfig
from vocabguard.data.readers import DataError, Text, is_plain_text, read_examples
from vocabguard.guard.cadence import forward_tokens
from vocabguard.measure.intervals import z_of_look
from vocabguard.measure.probe import probe_applicable
from vocabguard.measure.recall import LogitMoments
from vocabguard.measure.reference import Windows, cut_windows, summarise_reference, token_nll
from vocabguard.results import NotApplicable
from vocabguard.rows.models import longest_prompt

logger = logging.getLogger("vocabguard")

_SHIPPED = "reference.txt"
_BLANK_LINES = re.compile(r"\n\s*\n")


LEAST_READ = 3072
"""Targets that are read in the shortest run, if so many are wanted: of 2,048, SmolLM2 predicted too few frequent ones
for ``reference/rare_rise`` to be measured."""


def reference_texts(config: ReferenceConfig) -> tuple[str, ...]:
    """The texts that a configuration names, in their order.

    Raises:
        ConfigError: for a file that is missing or cannot be read, or where there is no text.

    Example:
        >>> len(reference_texts(ReferenceConfig())), reference_texts(ReferenceConfig(texts=["One.", " "]))
        (55, ('One.',))
    """
    key, given = "reference.texts", config.texts
    if given is None:
        found = _paragraphs(resources.files("vocabguard").joinpath("configs", _SHIPPED).read_text(encoding="utf-8"))
    elif isinstance(given, (str, Path)):
        found = _read(Path(given), key)
    elif isinstance(given, Sequence) and all(isinstance(text, str) for text in given):
        found = list(given)
    else:
        raise ConfigError(f"{key} is {given!r}; allowed: a file, a list of texts, or null")
    texts = tuple(text for text in found if text.strip())
    if not texts:
        raise ConfigError(f"{key} is {given!r} and holds no text; allowed: one text or more")
    return texts


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in _BLANK_LINES.split(text)]


def _read(path: Path, key: str) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"{key} is {str(path)!r}; allowed: a file of texts, a list of texts, or null")
    try:
        if is_plain_text(path) and path.suffix != ".gz":
            return _paragraphs(path.read_text(encoding="utf-8"))
        return [example.text for example in read_examples([path], kind="text") if isinstance(example, Text)]
    except (DataError, UnicodeError) as error:
        raise ConfigError(f"{key}: {error}") from error


def windows_of(model: nn.Module, tokenizer: Any, texts: Sequence[str], config: ReferenceConfig) -> Windows:
    """The windows in which a model reads some texts.

    Raises:
        ConfigError: if the texts hold no target.
    """
    window = min(config.window, longest_prompt(model) or config.window)
    # Of more texts than tokens are wanted, not all need to be tokenized.
    chosen = texts[:: -(-len(texts) // config.max_tokens)]
    begin = tokenizer.bos_token_id
    begins = begin is not None and tokenizer.encode(chosen[0])[:1] == [begin]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in chosen]
    try:
        return cut_windows(ids, window=window, max_tokens=config.max_tokens, prefix=[begin] if begins else [])
    except ValueError as error:
        raise ConfigError(f"reference.texts: {error}") from error


@dataclass
class Reader:
    """Lets a model read the same windows again and again.

    Attributes:
        watched: (w,) int64 ids of the watch list.
        batch_tokens: tokens in one forward pass.
        least: targets below which a part is not measured.
        base: (n, L - 1) float32, the first reading; see `token_nll`.
        looks: readings after the base's, in all processes that the run has had.
        moments: logits of every token at the places of the latest reading.
    """

    windows: Windows
    watched: Tensor
    batch_tokens: int
    least: int
    base: Tensor | None = None
    looks: int = 0
    moments: LogitMoments = field(default_factory=LogitMoments)

    def read(self, model: nn.Module) -> Tensor:
        """(n, L - 1) float32, negative log-likelihoods now; the first call sets the base."""
        self.moments = LogitMoments()
        now = token_nll(model, self.windows, batch_tokens=self.batch_tokens, moments=self.moments)
        if self.base is None:
            self.base = now
        else:
            self.looks += 1
        return now

    def scalars(self, now: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float]:
        """The keys of a reading, without ``vocabguard/``.

        Args:
            now: what `read` gave last.
            parts: (V,) bool masks by script group and exposure class.
        """
        assert self.base is not None
        if self.looks == 0:
            found = summarise_reference(self.windows, now, now, {}, z=0.0)
            return {f"reference/{key}": found[key] for key in ("nll", "targets") if key in found}
        if len(self.watched) and parts:
            watch = torch.zeros_like(next(iter(parts.values())))
            watch[self.watched] = True
            parts = {**parts, "watch": watch}
        # Intervals are for all looks together: a run that is looked at often must not alarm by chance.
        z = z_of_look(self.looks)
        found = summarise_reference(self.windows, self.base, now, parts, z=z, least=self.least)
        return {f"reference/{key}": value for key, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """The windows, the base's reading and the number of looks; empty before the base was read."""
        if self.base is None:
            return {}
        return {"ids": self.windows.ids, "lengths": self.windows.lengths, "base": self.base, "looks": self.looks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take texts and base of an earlier run; one that read none begins here, and the log says so."""
        if not state:
            logger.warning(
                "vocabguard: the saved state holds no reading of the reference text: reference/nll_rise is measured "
                "against this checkpoint, not against the base model"
            )
            return
        self.windows = Windows(state["ids"], state["lengths"])
        self.base, self.looks = state["base"], state["looks"]


def choose_reader(
    model: nn.Module, config: GuardConfig, tokenizer: Any, watched: Tensor, to_train: float = math.nan
) -> Reader | NotApplicable:
    """What reads the reference text that a configuration asks for, or why nothing does.

    Args:
        watched: (w,) int64.
        to_train: tokens that the run will train on; NaN where unknown. In a short run fewer tokens are read, so that a
            reading at the base and one at the end take at most `probe.budget` of it, but `LEAST_READ` or more.

    Raises:
        ConfigError: for texts that cannot be read; see `reference_texts`.
    """
    wanted = config.reference
    if not (config.probe.enabled if wanted.enabled is None else wanted.enabled):
        return NotApplicable("the reference text is off")
    reason = NotApplicable("the reference text needs a tokenizer") if tokenizer is None else probe_applicable(model)
    if reason is not None:
        if wanted.texts is not None:
            logger.warning("vocabguard: reference.texts are not read: %s", reason.reason)
        return reason
    if not math.isnan(to_train):
        affordable = int(forward_tokens(config.probe.budget, to_train))
        wanted = replace(wanted, max_tokens=min(wanted.max_tokens, max(LEAST_READ, affordable)))
    windows = windows_of(model, tokenizer, reference_texts(wanted), wanted)
    # All processes read what rank 0 has found: a file may differ between machines.
    return Reader(collective.agree(windows), watched, wanted.batch_tokens, wanted.least_targets)
