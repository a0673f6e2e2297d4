"""The logged keys: what each means, and which are shown first (in trackers, and under TensorBoard's own heading)."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence

_PREFIX = "vocabguard/"
_DETAIL = "vocabguard-detail"

MEANINGS = {
    "head/cosine_mean": "mean cosine of the live output rows to the base model's",
    "head/cosine_min": "smallest such cosine",
    "head/cosine_p01": "first percentile of the cosines",
    "head/residual_p01": "first percentile of the cosines after the shift that all never-a-target rows share is taken "
    "off (softmax does not see it)",
    "head/below_0.95": "share of live output rows with a cosine below 0.95, in [0, 1]",
    "head/below_0.90": "share below 0.90",
    "head/nonfinite_rows": "rows that hold NaN or Inf",
    "head/zero_rows": "rows of zeros",
    "head/<part>/*": "the same of a script group (`ja`, `ko`, `zh`, `cyrillic`, `arabic`, `hebrew`, `devanagari`, "
    "`thai`, `greek`, `latin`, `digits_punctuation`, `code`, `bytes`, `other`; in tables and messages: Japanese, "
    "Korean, Chinese, ..., digits and punctuation, code and markup, byte pieces) or an exposure class (`never`, `1-4`, "
    "`5-19`, `20+`: targets so far)",
    "embedding/*": "all of these for the input rows",
    "exposure/<class>": "share of live tokens in each exposure class so far",
    "exposure/targets": "data targets counted so far",
    "exposure/push_share": "share of the last sampled row gradient that fell on rows that were no target",
    "probe/base": "share of the live tokens that the base model repeats, estimated from the sample",
    "probe/asked": "tokens probed",
    "probe/known": "of these, how many the base model repeats: the denominator of the shares below",
    "probe/retained": "of the tokens that the base repeats, the share that is not lost; ends of its interval: `_low`, "
    "`_high`",
    "probe/lost": "of the tokens that the base repeats, the share that is lost",
    "probe/gained": "of the other tokens, the share that is repeated now",
    "probe/<part>/retained": "the same of a script group or an exposure class",
    "probe/<part>/known": "of how many tokens",
    "probe/tokens_retained": "retained beyond noise and skill (`_low`, `_high`)",
    "probe/noise": "share that the base itself would lose among other neighbours",
    "probe/skill": "retained of the most frequent targets: what they lose is the skill of repeating (`_low`, `_high`)",
    "probe/nats": "mean change of the log-probability of the tokens that the base repeats (`_low`, `_high`)",
    "probe/watch": "share of the watched words that the base repeats which are not lost",
    "probe/watch_known": "watched words that the base repeats",
    "probe/probability_mean": "mean probability of the right token",
    "recall/nats": "mean estimated recall of live tokens: the log-probability with which the model would repeat them, "
    "carried over from the probed tokens to all",
    "recall/<part>/nats": "the same of a script group or an exposure class",
    "recall/agreement": "correlation of that estimate with what the probe measured on tokens left out of the fit; from "
    "0.3 on it ranks the worst tokens, below that cosine does",
    "reference/nll": "mean negative log-likelihood of the reference text's tokens, in nats",
    "reference/nll_rise": "its mean rise over the base model, token by token (`_low`, `_high`: 95 % over all readings)",
    "reference/targets": "target tokens in the reference text",
    "reference/<part>/nll_rise": "the rise of a script group, an exposure class or `watch`; absent under 200 targets: "
    "not measured",
    "reference/<part>/targets": "of how many target tokens",
    "reference/rare_rise": "rise of the rare tokens (fewer than 5 training targets so far) less the rise of the others,"
    " of the targets that the base predicted with a chance of 1 in 8 or more (`_low`, `_high`)",
    "reference/{rare,frequent}/targets": "how many of each",
    "loss/{data,echo}": "mean loss since the last check on data targets and on echo targets (needs logits)",
    "echo/dose": "echo targets so far per data target",
    "echo/targets_per_live_token": "echo targets so far per live token",
    "echo/copies": "share of 16 greedy answers to everyday questions that copy the question (at probes, with echo on)",
    "forecast/below_0.95": "share of live output rows that may end below 0.95 if nothing is done (rows up to 256 wide)",
    "forecast/rows": "the same as a number",
    "forecast/cosine_mean": "mean cosine that they may end at",
    "forecast/<part>/{below_0.95,rows}": "the same of a script group or an exposure class",
    "hold/share": "share of live output rows held in the last step",
    "confusion/<language>": "share of answers with letters of a script that does not belong (at evaluations)",
    "confusion/<language>/*": "the same for Latin letters only, and line and word pass rates",
    "confusion/foreign": "the share over all languages",
    "confusion/{line_pass,word_pass}": "pass rates of the Language Confusion Benchmark",
    "alerts/firing": "rules that fire",
    "alerts/<rule>": "0 quiet, 0.5 pending, 1 firing",
    "overhead": "the guard's share of the time so far",
}
"""Every logged key without ``vocabguard/``: ``{a,b}`` alternatives, ``<part>`` a name, ``*`` any rest; ``_low`` and
``_high`` of a key are ends of its interval."""


def _matcher(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern).replace(r"\*", ".+")
    text = re.sub(r"<\w+>", "[^/]+", text)
    text = re.sub(r"\\\{(.+?)\\\}", lambda found: f"(?:{found[1].replace(',', '|')})", text)
    return re.compile(text + "(?:_low|_high)?")


def meaning(key: str) -> str | None:
    """What a logged key means, or None for a key that is not documented.

    >>> meaning("vocabguard/head/below_0.90"), meaning("hold/share")
    ('share below 0.90', 'share of live output rows held in the last step')
    """
    short = key.removeprefix(_PREFIX)
    if short in MEANINGS:
        return MEANINGS[short]
    return next((text for pattern, text in MEANINGS.items() if _matcher(pattern).fullmatch(short)), None)


class ChosenKeys:
    """The keys that the setting ``log.keys`` names.

    Args:
        patterns: keys with or without ``vocabguard/``, in which ``*`` stands for any characters; ``all`` for every key.

    Example:
        >>> chosen = ChosenKeys(["head/*/below_0.95", "vocabguard/overhead"])
        >>> "vocabguard/head/ja/below_0.95" in chosen, "vocabguard/head/below_0.95" in chosen
        (True, False)
        >>> chosen.tag("vocabguard/head/below_0.95"), chosen.tag("vocabguard/alerts/at_risk")
        ('vocabguard-detail/head/below_0.95', 'vocabguard-detail-alerts/at_risk')
    """

    def __init__(self, patterns: str | Sequence[str]) -> None:
        given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        whole = ("*" if one == "all" else one.removeprefix(_PREFIX) for one in given)
        # Names of rules and groups may hold what else would be a set of characters.
        self._match = re.compile("|".join(fnmatch.translate(one.replace("[", "[[]")) for one in whole) or r"(?!)").match

    def __contains__(self, key: str) -> bool:
        return self._match(key.removeprefix(_PREFIX)) is not None

    def of(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """The chosen keys of a check that have a value."""
        return {key: value for key, value in scalars.items() if key in self and math.isfinite(value)}

    def tag(self, key: str) -> str:
        """Where TensorBoard shows a key: the chosen ones first, then the others, and where each rule stands last."""
        if key in self:
            return key
        short = key.removeprefix(_PREFIX)
        return f"{_DETAIL}-{short}" if short.startswith("alerts/") else f"{_DETAIL}/{short}"
