"""What an alert rule says, and what it may say: every metric has its own range, and a dead rule is refused."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vocabguard.measure.languages import LANGUAGES
from vocabguard.results import EXPOSURE_CLASSES, Transition

PREFIX = "vocabguard/"
FIRING = "alerts/firing"
STATES = "alerts/"
"""Before a rule's name: where the rule stands. Such keys are logged; rules are not about them."""
ANY = "*"
"""In the place of a part: each script group, or each language."""

_COSINE, _SHARE, _COUNT, _NATS = (-1.0, 1.0), (0.0, 1.0), (0.0, math.inf), (-math.inf, math.inf)
_BESIDE = (0.0, 2.0)
PROBED = (
    "retained", "retained_low", "retained_high", "lost", "gained", "noise", "base", "skill", "skill_low", "skill_high",
    "watch", "probability_mean",
)  # fmt: skip
"""Keys of the probe that are shares."""
_MATRICES = ("head", "embedding")
_OF_ROWS = {
    **dict.fromkeys(("cosine_mean", "cosine_min", "cosine_p01", "residual_p01"), _COSINE),
    **dict.fromkeys(("below_0.95", "below_0.90"), _SHARE),
    **dict.fromkeys(("nonfinite_rows", "zero_rows"), _COUNT),
}
_OF_REFERENCE = {**dict.fromkeys(("nll_rise", "nll_rise_low", "nll_rise_high"), _NATS), "targets": _COUNT}
_OF_RECALL = {"nats": (-math.inf, 0.0)}
_OF_FORECAST = {"below_0.95": _SHARE, "rows": _COUNT}
_OF_PROBE = {"retained": _SHARE, "known": _COUNT}
_BY_OWNER = {
    **dict.fromkeys(_MATRICES, _OF_ROWS),
    "forecast": _OF_FORECAST, "probe": _OF_PROBE, "recall": _OF_RECALL, "reference": _OF_REFERENCE,
}  # fmt: skip
_OF_ANSWERS = ("latin", "line_pass", "word_pass")
_SINGLE = {
    **{f"exposure/{name}": _SHARE for name in (*EXPOSURE_CLASSES, "push_share")},
    "exposure/targets": _COUNT,
    "forecast/cosine_mean": _COSINE,
    **{f"probe/{name}": _SHARE for name in PROBED},
    **{f"probe/{name}": _BESIDE for name in ("tokens_retained", "tokens_retained_low", "tokens_retained_high")},
    **{f"probe/{name}": _NATS for name in ("nats", "nats_low", "nats_high")},
    **{f"probe/{name}": _COUNT for name in ("asked", "known", "watch_known")},
    "recall/agreement": _COSINE,
    **{f"confusion/{name}": _SHARE for name in ("foreign", "line_pass", "word_pass")},
    **dict.fromkeys(("reference/nll", "reference/targets"), _COUNT),
    **{f"reference/{name}{end}": _NATS for name in ("nll_rise", "rare_rise") for end in ("", "_low", "_high")},
    **{f"reference/watch/{name}": known for name, known in _OF_REFERENCE.items()},
    **dict.fromkeys(("reference/rare/targets", "reference/frequent/targets"), _COUNT),
    **dict.fromkeys((FIRING, "loss/data", "loss/echo", "echo/dose", "echo/targets_per_live_token"), _COUNT),
    **dict.fromkeys(("overhead", "hold/share", "echo/copies"), _SHARE),
}


def short_key(metric: str) -> str:
    """A logged key without ``vocabguard/``.

    >>> short_key("vocabguard/head/below_0.95")
    'head/below_0.95'
    """
    return metric.removeprefix(PREFIX)


def metric_range(metric: str) -> tuple[float, float]:
    """The values that a logged key can take.

    ``<part>`` below is a script group (``ja``), an exposure class (``never``, ``1-4``, ``5-19``, ``20+``), or ``*`` for
    each script group; ``<language>`` is an ISO 639 code, or ``*`` for each language.

    | key | range |
    |---|---|
    | ``head/`` and ``embedding/`` ``cosine_mean``, ``cosine_min``, ``cosine_p01``, ``residual_p01`` | [-1, 1] |
    | ``head/`` and ``embedding/`` ``below_0.95``, ``below_0.90`` | [0, 1] |
    | ``head/`` and ``embedding/`` ``nonfinite_rows``, ``zero_rows`` | [0, inf) |
    | the same after ``head/<part>/`` and ``embedding/<part>/`` | the same |
    | ``forecast/below_0.95``, ``forecast/<part>/below_0.95`` | [0, 1] |
    | ``forecast/rows``, ``forecast/<part>/rows`` | [0, inf) |
    | ``forecast/cosine_mean`` | [-1, 1] |
    | ``exposure/`` ``never``, ``1-4``, ``5-19``, ``20+``, ``push_share`` | [0, 1] |
    | ``exposure/targets`` | [0, inf) |
    | ``probe/`` ``base``, ``retained``, ``lost``, ``gained``, ``noise``, ``skill``, ``watch`` | [0, 1] |
    | ``probe/probability_mean`` | [0, 1] |
    | ``probe/`` ``tokens_retained`` | [0, 2] |
    | ``probe/`` ``nats`` | (-inf, inf) |
    | ``retained``, ``skill``, ``tokens_retained``, ``nats`` with ``_low``, ``_high``: ends of the interval | the same |
    | ``probe/`` ``asked``, ``known``, ``watch_known``, ``<part>/known`` | [0, inf) |
    | ``probe/<part>/retained`` | [0, 1] |
    | ``recall/`` ``nats``, ``<part>/nats`` | (-inf, 0] |
    | ``recall/agreement`` | [-1, 1] |
    | ``reference/`` ``nll``, ``targets``, ``rare/targets``, ``frequent/targets``, ``<part>/targets`` | [0, inf) |
    | ``reference/`` ``nll_rise``, ``rare_rise``, ``<part>/nll_rise``, also with ``_low``, ``_high`` | any number |
    | ``confusion/`` ``foreign``, ``line_pass``, ``word_pass``, ``<language>`` (at evaluations) | [0, 1] |
    | ``confusion/<language>/`` ``latin``, ``line_pass``, ``word_pass`` (at evaluations) | [0, 1] |
    | ``overhead``, ``hold/share``, ``echo/copies`` | [0, 1] |
    | ``loss/data``, ``loss/echo``, ``echo/dose``, ``echo/targets_per_live_token`` | [0, inf) |
    | ``alerts/firing`` | [0, inf) |

    Keys may be given with ``vocabguard/``. A part is not checked here, since the groups are the tokenizer's: see
    `require_parts`. A ValueError for a key that is never logged names the closest key that is.

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
        if last in (known := _BY_OWNER.get(owner, {})):
            return known[last]
        if owner == "confusion" and ((not part and _is_language(last)) or (part and last in _OF_ANSWERS)):
            return _SHARE
    raise ValueError(f"metric is {metric!r}, which is never logged{_nearest(key, _known_keys(owner, part))}")


def part_of(metric: str) -> str | None:
    """The script group, exposure class or language that a key is about, or ``*``; None where it is about the whole.

    >>> part_of("head/ja/below_0.95"), part_of("confusion/*"), part_of("head/below_0.95")
    ('ja', '*', None)
    """
    key = short_key(metric)
    if key in _SINGLE:
        return None
    pieces = key.split("/")
    if pieces[0] == "confusion":
        return pieces[1]
    return pieces[1] if len(pieces) == 3 else None


def values_by_part(metric: str, scalars: Mapping[str, float]) -> dict[str, float]:
    """What was logged (without ``vocabguard/``) of each script group, or language, under a key with ``*``.

    Exposure classes are no parts: their rows would count twice. Nor is the watch list.

    Example:
        >>> values_by_part("head/*/below_0.95", {"head/ja/below_0.95": 0.2, "head/below_0.95": 0.1})
        {'ja': 0.2}
    """
    before, _, after = short_key(metric).partition(ANY)
    languages = before == "confusion/"
    found = {}
    for key, value in scalars.items():
        if key in _SINGLE:
            continue
        if len(key) > len(before) + len(after) and key.startswith(before) and key.endswith(after):
            part = key[len(before) : len(key) - len(after)]
            if "/" not in part and (part in LANGUAGES if languages else part not in EXPOSURE_CLASSES):
                found[part] = value
    return found


def require_part(metric: str, groups: Iterable[str], languages: Collection[str]) -> None:
    """Refuse a key about a script group that the tokenizer does not have, or a language that is not asked in.

    Args:
        languages: ISO 639 codes that are asked in at evaluations; empty where nothing is asked.

    Example:
        >>> require_part("probe/jaa/retained", groups=["ja"], languages=[])
        Traceback (most recent call last):
        ValueError: metric is 'probe/jaa/retained'; no part 'jaa'; did you mean 'ja'? Allowed: ja, never, 1-4, 5-19, 20+
    """
    key, part = short_key(metric), part_of(metric)
    if key.startswith("confusion/") and not languages:
        raise ValueError(f"metric is {metric!r}, and no questions are asked; allowed with it: confusion.enabled: true")
    if part is None or part == ANY:
        return
    parts = (*languages,) if key.startswith("confusion/") else (*groups, *EXPOSURE_CLASSES)
    if part not in parts:
        raise ValueError(f"metric is {metric!r}; no part {part!r}{_nearest(part, parts)}")


def _is_language(name: str) -> bool:
    return name == ANY or name in LANGUAGES


def _known_keys(owner: str, part: str) -> list[str]:
    """All keys, those with parts for one part only; languages only where the key is about them."""
    inner = f"{part}/" if part else ""
    keys = [f"{matrix}/{inner}{last}" for matrix in _MATRICES for last in _OF_ROWS]
    keys += [f"forecast/{inner}{last}" for last in _OF_FORECAST]
    keys += [f"recall/{inner}{last}" for last in _OF_RECALL]
    if owner == "confusion":
        keys += [f"confusion/{inner}{last}" for last in (_OF_ANSWERS if part else LANGUAGES)]
    if part:
        keys += [f"reference/{part}/{last}" for last in _OF_REFERENCE]
        keys += [*(f"probe/{part}/{last}" for last in _OF_PROBE), *_known_keys("", "")]
        return keys
    return [*keys, *_SINGLE]


def _nearest(text: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    close = difflib.get_close_matches(text, allowed, n=1)
    return (f"; did you mean {close[0]!r}?" if close else ".") + f" Allowed: {', '.join(allowed)}"


BUILT_IN = ("log", "echo", "hold", "checkpoint", "stop")
"""Actions that need no callable: ``log`` tells the logger, the guard heeds ``echo`` and ``hold`` by itself, the trainer
is asked for ``checkpoint`` and ``stop``."""

Action = Literal["log", "echo", "hold", "checkpoint", "stop"] | Callable[[Transition], None]

_OVER: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
ABSENT, UNCHANGED = "absent", "unchanged"
OPS = (*_OVER, ABSENT, UNCHANGED)
CHANGES = ("ratio", "difference")
LEVELS = ("info", "warning", "critical")


@dataclass(frozen=True)
class AlertRule:
    """When to raise an alarm about one logged key, when to take it back, and what to do then.

    Attributes:
        name: the rule's name, unique within a machine.
        metric: a logged key, with or without ``vocabguard/``, e.g. ``head/ja/below_0.95``. The keys and their ranges
            are those that `metric_range` knows. With ``*`` in the place of the part (``head/*/below_0.95``) it is one
            rule over all script groups, or all languages: it fires once, and names those that are over.
        op: ``>``, ``>=``, ``<`` or ``<=``: over its threshold when ``value op threshold``; ``absent``: when the key is
            missing or NaN; ``unchanged``: when its value is that of the check before (a missing one says nothing).
        threshold: in the metric's range (with `change`, in that of the change), and not where the rule would always or
            never fire; 0 with ``absent`` and ``unchanged``.
        for_checks: checks in a row over the threshold before it fires, at least 1. A check without the metric neither
            counts nor breaks the row, but with ``absent``. Rules about ``confusion/`` count evaluations.
        resolve_at: a firing rule resolves once the value is back at this or beyond it; on the safe side of the
            threshold, so that a value that wavers about it does not flap. None takes the threshold.
        latch: never resolve: what the rule has switched on stays on, even if that is why the value is back.
        cooldown_steps: optimizer steps after resolving in which it may not fire again, at least 0.
        level: ``info``, ``warning`` or ``critical``.
        actions: what to do at each transition: ``"log"``, or a callable that takes the `Transition`, both in the main
            process only, between two steps; ``"echo"`` or ``"hold"``, which are on while the rule fires; and
            ``"checkpoint"`` or ``"stop"``, which all processes ask of their trainer once, when it begins to fire.
        change: compare, in the value's place, what became of it: ``ratio``, the value over that of `over_checks` ago,
            or ``difference``, the value less that one. None compares the value itself.
        over_checks: checks that a change is taken over, at least 1, of those that brought the metric.
        floor: with `change`, smaller values count as this one, so that a ratio of next to nothing is no alarm. A ratio
            needs one over 0; None is none.
        min_rows: with ``*``, script groups with fewer live rows are ignored.
        retell_steps: with ``*``, fewest optimizer steps between two notifications about groups that join.
        remind_steps: optimizer steps after which a firing rule notifies again; 0 never.

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
    threshold: float = 0.0
    for_checks: int = 1
    resolve_at: float | None = None
    cooldown_steps: int = 0
    level: str = "warning"
    actions: tuple[Action, ...] = ("log",)
    change: str | None = None
    over_checks: int = 1
    floor: float | None = None
    min_rows: int = 0
    retell_steps: int = 0
    remind_steps: int = 0
    latch: bool = False

    def __post_init__(self) -> None:
        self._require(bool(self.name.strip()), "name", self.name, "any text that is not blank")
        self._require(self.name != "firing", "name", self.name, "another, since alerts/firing is a logged key")
        self._require(self.op in OPS, "op", self.op, f"one of {list(OPS)}")
        self._require(self.level in LEVELS, "level", self.level, f"one of {list(LEVELS)}")
        for field, least in (("for_checks", 1), ("over_checks", 1), ("cooldown_steps", 0), ("min_rows", 0),
                             ("retell_steps", 0), ("remind_steps", 0)):  # fmt: skip
            self._require(getattr(self, field) >= least, field, getattr(self, field), f"at least {least}")
        known = all(one in BUILT_IN or callable(one) for one in self.actions)
        allowed = f"a tuple of {', '.join(map(repr, BUILT_IN))} and callables that take a Transition"
        self._require(known, "actions", self.actions, allowed)
        try:
            low, high = metric_range(self.metric)
        except ValueError as error:
            raise ValueError(f"alert rule {self.name!r}: {error}") from None
        self._check_change(low, high)
        self._check_parts()
        fine = not self.latch or self.resolve_at is None
        self._require(fine, "resolve_at", self.resolve_at, "none, since the rule is latched")
        if self.op in (ABSENT, UNCHANGED):
            for field, nothing in (("threshold", 0.0), ("resolve_at", None), ("change", None)):
                value = getattr(self, field)
                self._require(value == nothing, field, value, f"{nothing}, since the rule is {self.op}")
            return
        low, high = self._compared(low, high)
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
        return self.op not in ("<", "<=")

    @property
    def by_part(self) -> bool:
        """Whether it is a rule over all script groups or languages."""
        return part_of(self.metric) == ANY

    def repeats(self, other: AlertRule) -> bool:
        """Whether, where there is one script group only, it tells nothing that the `other`, over all rows, does not."""
        strict = other.threshold <= self.threshold if self.upward else other.threshold >= self.threshold
        alike = ("op", "change", "over_checks", "floor")
        return (
            self.by_part
            and other.short == self.short.replace(f"{ANY}/", "")
            and all(getattr(self, field) == getattr(other, field) for field in alike)
            and strict
            and other.for_checks <= self.for_checks
            and LEVELS.index(other.level) >= LEVELS.index(self.level)
            and all(action in other.actions for action in self.actions)
        )

    @property
    def at_evaluations(self) -> bool:
        """Whether its metric comes with evaluations, not with checks."""
        return self.short.startswith("confusion/")

    @property
    def memory(self) -> int:
        """How many earlier values it looks at."""
        return self.over_checks if self.change is not None else int(self.op == UNCHANGED)

    def reading(self, value: float, earlier: Sequence[float]) -> float:
        """What is compared with the threshold, of a value (NaN where missing) and up to `memory` earlier, oldest first.

        The value; or its change, in the metric's unit or as a ratio; or 1 and 0 for yes and no with ``absent`` and
        ``unchanged``. NaN where nothing can be said.
        """
        if self.op == ABSENT:
            return float(math.isnan(value))
        if self.memory == 0 or math.isnan(value):
            return value
        if len(earlier) < self.memory:
            return math.nan
        if self.op == UNCHANGED:
            return float(value == earlier[-1])
        floor = -math.inf if self.floor is None else self.floor
        now, then = max(value, floor), max(earlier[-self.memory], floor)
        return now / then if self.change == "ratio" else now - then

    def over(self, value: float) -> bool:
        """Whether a reading is over the threshold, on the side that `op` says. NaN never is."""
        return value > 0 if self.op in (ABSENT, UNCHANGED) else _OVER[self.op](value, self.threshold)

    def safe(self, value: float) -> bool:
        """Whether a reading resolves the rule: not over the threshold, at `resolve_at` or beyond, and not latched."""
        if self.latch:
            return False
        if self.resolve_at is None:
            return not self.over(value)
        back = value <= self.resolve_at if self.upward else value >= self.resolve_at
        return back and not self.over(value)

    def _compared(self, low: float, high: float) -> tuple[float, float]:
        """The range of what is compared."""
        if self.change is None:
            return low, high
        return (0.0, math.inf) if self.change == "ratio" else (low - high, high - low)

    def _check_change(self, low: float, high: float) -> None:
        if self.change is None:
            self._require(self.over_checks == 1, "over_checks", self.over_checks, "1 where there is no change")
            self._require(self.floor is None, "floor", self.floor, "none where there is no change")
            return
        self._require(self.change in CHANGES, "change", self.change, f"one of {list(CHANGES)}, or none")
        least, bracket = low, "["
        if self.change == "ratio":
            allowed = f"'difference', since {self.short} can be negative"
            self._require(low >= 0, "change", self.change, allowed)
            least, bracket = math.nextafter(0.0, 1.0), "("
        inside = self.floor is not None and math.isfinite(self.floor) and least <= self.floor <= high
        fine = inside or (self.floor is None and self.change == "difference")
        self._require(fine, "floor", self.floor, bracket + _interval(low, high)[1:] + f", the range of {self.short}")

    def _check_parts(self) -> None:
        if not self.by_part:
            for field in ("min_rows", "retell_steps"):
                allowed = f"0, since {self.short} has no {ANY!r} in it"
                self._require(getattr(self, field) == 0, field, getattr(self, field), allowed)

    def _check_threshold(self, low: float, high: float) -> None:
        what = f"a {self.change} of {self.short}" if self.change else self.short
        inside = math.isfinite(self.threshold) and low <= self.threshold <= high
        self._require(inside, "threshold", self.threshold, f"{_interval(low, high)}, the range of {what}")
        best, worst = (low, high) if self.upward else (high, low)
        if self.change:
            best = 1.0 if self.change == "ratio" else 0.0
            remark = f"; {what} is {best:g} where nothing changes, so {self.op} {self.threshold:g}"
        else:
            remark = f"; {what} lies in {_interval(low, high)}, so {self.op} {self.threshold:g}"
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


def require_parts(rules: Iterable[AlertRule], groups: Iterable[str], languages: Collection[str] = ()) -> None:
    """Refuse rules about a script group that the tokenizer does not have; such a rule would never fire.

    See `require_part`; the error names the rule too.
    """
    groups = tuple(groups)
    for rule in rules:
        try:
            require_part(rule.metric, groups, languages)
        except ValueError as error:
            raise ValueError(f"alert rule {rule.name!r}: {error}") from None


def _interval(low: float, high: float) -> str:
    left = f"({low:g}" if math.isinf(low) else f"[{low:g}"
    return f"{left}, inf)" if math.isinf(high) else f"{left}, {high:g}]"
