"""What an alert rule says, and what it may say: every metric has its own range, and a dead rule is refused."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.transitions import Transition

PREFIX = "vocabguard/"
FIRING = "alerts/firing"

BUILT_IN = ("log", "echo", "hold")
"""Actions that need no callable: ``log`` tells the logger, the guard heeds ``echo`` and ``hold`` by itself."""

Action = Literal["log", "echo", "hold"] | Callable[[Transition], None]

_OVER: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_LEVELS = ("info", "warning", "critical")

_COSINE, _SHARE, _COUNT = (-1.0, 1.0), (0.0, 1.0), (0.0, math.inf)
_MATRICES = ("head", "embedding")
_OF_ROWS = {
    "cosine_mean": _COSINE,
    "cosine_min": _COSINE,
    "cosine_p01": _COSINE,
    "residual_p01": _COSINE,
    "below_0.95": _SHARE,
    "below_0.90": _SHARE,
    "nonfinite_rows": _COUNT,
    "zero_rows": _COUNT,
}
_SINGLE = {
    **{f"exposure/{name}": _SHARE for name in EXPOSURE_CLASSES},
    "exposure/push_share": _SHARE,
    "probe/retained": _SHARE,
    "probe/watch": _SHARE,
    "probe/probability_mean": _SHARE,
    FIRING: _COUNT,
    "overhead": _SHARE,
    "loss/data": _COUNT,
    "loss/echo": _COUNT,
    "echo/dose": _COUNT,
    "echo/targets_per_live_token": _COUNT,
    "hold/share": _SHARE,
}


@dataclass(frozen=True)
class AlertRule:
    """When to raise an alarm about one logged key, when to take it back, and what to do then.

    Attributes:
        name: the rule's name, unique within a machine.
        metric: a logged key, with or without ``vocabguard/``, e.g. ``head/ja/below_0.95``. The keys and their ranges
            are those that `metric_range` knows.
        op: ``>``, ``>=``, ``<`` or ``<=``; the rule is over its threshold when ``value op threshold``.
        threshold: in the metric's range, and not where the rule would always or never fire.
        for_checks: checks in a row over the threshold before it fires, at least 1. A check without the metric neither
            counts nor breaks the row.
        resolve_at: a firing rule resolves once the value is back at this or beyond it; on the safe side of the
            threshold, so that a value that wavers about the threshold does not flap. None takes the threshold.
        cooldown_steps: optimizer steps after resolving in which it may not fire again, at least 0.
        level: ``info``, ``warning`` or ``critical``.
        actions: what to do at each transition: ``"log"``, or a callable that takes the `Transition`; and ``"echo"`` or
            ``"hold"``, which are on while the rule fires.

    Raises:
        ValueError: for a field outside what is allowed; the message names the field, the value and what is allowed.

    Example:
        >>> rule = AlertRule("ja_degraded", "head/ja/below_0.95", ">", 0.05, resolve_at=0.04)
        >>> rule.key, rule.over(0.06), rule.safe(0.045), rule.safe(0.04)
        ('vocabguard/head/ja/below_0.95', True, False, True)
    """

    name: str
    metric: str
    op: str
    threshold: float
    for_checks: int = 1
    resolve_at: float | None = None
    cooldown_steps: int = 0
    level: str = "warning"
    actions: tuple[Action, ...] = ("log",)

    def __post_init__(self) -> None:
        self._require(bool(self.name.strip()), "name", self.name, "any text that is not blank")
        self._require(self.op in _OVER, "op", self.op, f"one of {list(_OVER)}")
        self._require(self.level in _LEVELS, "level", self.level, f"one of {list(_LEVELS)}")
        self._require(self.for_checks >= 1, "for_checks", self.for_checks, "at least 1")
        self._require(self.cooldown_steps >= 0, "cooldown_steps", self.cooldown_steps, "at least 0")
        known = all(one in BUILT_IN or callable(one) for one in self.actions)
        allowed = "a tuple of 'log', 'echo', 'hold' and callables that take a Transition"
        self._require(known, "actions", self.actions, allowed)
        try:
            low, high = metric_range(self.metric)
        except ValueError as error:
            raise ValueError(f"alert rule {self.name!r}: {error}") from None
        self._check_threshold(low, high)
        self._check_resolve_at(low, high)

    @property
    def short(self) -> str:
        """The metric without ``vocabguard/``, as messages show it."""
        return short_key(self.metric)

    @property
    def key(self) -> str:
        """The metric with ``vocabguard/``, as it is logged."""
        return PREFIX + self.short

    @property
    def upward(self) -> bool:
        """Whether high values are the bad ones."""
        return self.op in (">", ">=")

    def over(self, value: float) -> bool:
        """Whether a value is over the threshold, on the side that `op` says. NaN never is."""
        return _OVER[self.op](value, self.threshold)

    def safe(self, value: float) -> bool:
        """Whether a value resolves the rule: not over the threshold, and at `resolve_at` or beyond."""
        if self.resolve_at is None:
            return not self.over(value)
        back = value <= self.resolve_at if self.upward else value >= self.resolve_at
        return back and not self.over(value)

    def _check_threshold(self, low: float, high: float) -> None:
        inside = math.isfinite(self.threshold) and low <= self.threshold <= high
        self._require(inside, "threshold", self.threshold, f"{_interval(low, high)}, the range of {self.short}")
        best, worst = (low, high) if self.upward else (high, low)
        remark = f"; {self.short} lies in {_interval(low, high)}, so {self.op} {self.threshold:g}"
        self._require(not self.over(best), "threshold", self.threshold, "one that does not always fire" + remark)
        self._require(self.over(worst), "threshold", self.threshold, "one that can fire" + remark)

    def _check_resolve_at(self, low: float, high: float) -> None:
        if self.resolve_at is None:
            return
        # A value outside the range could never be reached: the alert would fire for ever.
        low, high = (low, self.threshold) if self.upward else (self.threshold, high)
        allowed = f"{_interval(low, high)}, the safe side of {self.op} {self.threshold:g}, or none"
        inside = math.isfinite(self.resolve_at) and low <= self.resolve_at <= high
        self._require(inside, "resolve_at", self.resolve_at, allowed)

    def _require(self, fine: bool, field: str, value: object, allowed: str) -> None:
        if not fine:
            raise ValueError(f"alert rule {self.name!r}: {field} is {value!r}; allowed: {allowed}")


def short_key(metric: str) -> str:
    """A logged key without ``vocabguard/``."""
    return metric.removeprefix(PREFIX)


def metric_range(metric: str) -> tuple[float, float]:
    """The values that a logged key can take.

    ``<part>`` below is a script group (``ja``) or an exposure class (``never``, ``1-4``, ``5-19``, ``20+``).

    | key | range |
    |---|---|
    | ``head/`` and ``embedding/`` ``cosine_mean``, ``cosine_min``, ``cosine_p01``, ``residual_p01`` | [-1, 1] |
    | ``head/`` and ``embedding/`` ``below_0.95``, ``below_0.90`` | [0, 1] |
    | ``head/`` and ``embedding/`` ``nonfinite_rows``, ``zero_rows`` | [0, inf) |
    | the same after ``head/<part>/`` and ``embedding/<part>/`` | the same |
    | ``exposure/`` ``never``, ``1-4``, ``5-19``, ``20+``, ``push_share`` | [0, 1] |
    | ``probe/`` ``retained``, ``watch``, ``probability_mean``, ``<part>/retained`` | [0, 1] |
    | ``overhead``, ``hold/share`` | [0, 1] |
    | ``loss/data``, ``loss/echo``, ``echo/dose``, ``echo/targets_per_live_token`` | [0, inf) |
    | ``alerts/firing`` | [0, inf) |

    Args:
        metric: a logged key, with or without ``vocabguard/``. A part is not checked here, since the groups are the
            tokenizer's: see `require_parts`.

    Returns:
        Lowest and highest value; the highest is ``inf`` for counts.

    Raises:
        ValueError: for a key that is never logged, with the closest key that is.

    Example:
        >>> metric_range("head/ja/cosine_min")
        (-1.0, 1.0)
    """
    key = short_key(metric)
    if key in _SINGLE:
        return _SINGLE[key]
    owner, _, rest = key.partition("/")
    part, _, last = rest.rpartition("/")
    if "/" not in part and not rest.startswith("/"):
        if owner in _MATRICES and last in _OF_ROWS:
            return _OF_ROWS[last]
        if owner == "probe" and last == "retained":
            return _SHARE
    raise ValueError(f"metric is {metric!r}, which is never logged{_nearest(key, _known_keys(part))}")


def require_parts(rules: Iterable[AlertRule], groups: Iterable[str]) -> None:
    """Refuse rules about a script group that the tokenizer does not have; such a rule would never fire.

    Args:
        rules: the rules.
        groups: names of the tokenizer's script groups.

    Raises:
        ValueError: naming the rule, its metric and the parts that exist.
    """
    parts = (*groups, *EXPOSURE_CLASSES)
    for rule in rules:
        pieces = rule.short.split("/")
        if len(pieces) == 3 and pieces[1] not in parts:
            hint = _nearest(pieces[1], parts)
            raise ValueError(f"alert rule {rule.name!r}: metric is {rule.metric!r}; no part {pieces[1]!r}{hint}")


def _known_keys(part: str) -> list[str]:
    """All keys, those with parts for one part only."""
    rows = [f"{owner}/{last}" for owner in _MATRICES for last in _OF_ROWS]
    if not part:
        return [*rows, *_SINGLE]
    inner = [f"{owner}/{part}/{last}" for owner in _MATRICES for last in _OF_ROWS]
    return [*inner, f"probe/{part}/retained", *rows, *_SINGLE]


def _nearest(text: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    close = difflib.get_close_matches(text, allowed, n=1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" Allowed: {', '.join(allowed)}"


def _interval(low: float, high: float) -> str:
    return f"[{low:g}, inf)" if math.isinf(high) else f"[{low:g}, {high:g}]"
