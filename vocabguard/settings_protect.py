"""Settings of echo and hold. `vocabguard.settings` has all sections, these among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def limited(default: Any, **limits: Any) -> Any:
    """A field with its limits: ``at_least``, ``at_most``, ``choices``."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=limits)
    return field(default=default, metadata=limits)


@dataclass
class AutoDoseConfig:
    """A dose that follows the probe: up by half while recall suffers, down by a fifth while it does not.

    Attributes:
        enabled: whether to adjust the dose at each probe, starting from `echo.dose`.
        tolerated: rise of the probe's loss over the base's, in nats, up to which the dose is not raised.
        least: smallest dose.
        most: largest dose.
    """

    enabled: bool = False
    tolerated: float = limited(0.05, at_least=0.0)
    least: float = limited(0.01, at_least=0.0)
    most: float = limited(0.5, at_least=0.0)


def _default_instructions() -> list[str]:
    return [
        "Repeat this: {tokens}",
        "Please repeat the following text exactly as it is:\n{tokens}",
        "{tokens}\nPlease repeat the above.",
        "{tokens}\n\nCopy the text above, word for word.",
        "Copy exactly: {tokens}",
        "Say this once more: {tokens}",
        "Write {tokens} again, without changing anything.",
        "Echo the following back to me: {tokens}",
        "I wrote {tokens}. What did I write?",
        "Here is a list: {tokens}\nWrite the same list again.",
        "Wiederhole den folgenden Text genau: {tokens}",
        "Répète exactement ce texte : {tokens}",
        "Repite esto: {tokens}",
        "Повтори: {tokens}",
        "请重复：{tokens}",
        "繰り返してください: {tokens}",
        "다음 텍스트를 그대로 반복하세요: {tokens}",
        "كرر النص التالي كما هو: {tokens}",
    ]


@dataclass
class EchoConfig:
    """Echo rows: lists of live tokens that the model is asked to repeat, added to training batches.

    Attributes:
        enabled: from the first batch on; false waits for a rule with the action ``echo``.
        armed: though no rule names it, `VocabGuard.switch` may switch it on.
        mode: ``uniform`` takes every live token in turn; ``balanced`` too, but those that the data asks for 1 to 19
            times `boost` times as often: hold does not cover them, and the data alone does not keep them;
            ``least_exposed`` takes those first that the data asks for least; ``watch`` the tokens of `probe.watch`.
        boost: turns of such a token for one of any other, with ``balanced``.
        dose: echo targets per data target.
        targets_per_live_token: echo targets that each live token gets over the planned run, instead of `dose`.
        dose_limit: echo targets per data target are never more than this, in any batch: a short run over a large
            vocabulary would be nothing but echo. (A dose of less than a list a batch gives whole lists now and then.)
        auto: a dose that follows the probe.
        list_tokens: tokens in a list.
        fill: share of the batch's length from which an echo row gets no further list; 1 packs as many as fit.
        exclude: never echoed: ids, texts that are one token, and ``re:`` patterns that a token's text is searched for.
        instructions: ways of asking, each with one ``{tokens}``.
        prefetch: batches that a dataloader may have made beyond the one in training; null asks the dataloader.
    """

    enabled: bool = False
    armed: bool = False
    mode: str = limited("uniform", choices=("uniform", "balanced", "least_exposed", "watch"))
    boost: float = limited(3.0, at_least=0.0)
    dose: float = limited(0.1, at_least=0.0, at_most=100.0)
    targets_per_live_token: float | None = limited(None, at_least=0.0, at_most=1e6)
    dose_limit: float = limited(1.0, at_least=0.0)
    auto: AutoDoseConfig = field(default_factory=AutoDoseConfig)
    list_tokens: int = limited(16, at_least=1)
    fill: float = limited(0.4, at_least=0.0, at_most=1.0)
    exclude: list[Any] = limited([])
    instructions: list[str] = field(default_factory=_default_instructions)
    prefetch: int | None = limited(None, at_least=0)


@dataclass
class HoldConfig:
    """Output rows that the data has not asked for keep still. Needs no data of its own.

    Attributes:
        enabled: from the first step on; false waits for a rule with the action ``hold``.
        armed: though no rule names it, `VocabGuard.switch` may switch it on.
        mode: ``freeze`` puts such rows back after each step, ``shared`` moves them by their common mean only.
        window_steps: hold rows without a data target in so many steps; null holds those that never were one.
    """

    enabled: bool = False
    armed: bool = False
    mode: str = limited("shared", choices=("freeze", "shared"))
    window_steps: int | None = limited(None, at_least=1)
