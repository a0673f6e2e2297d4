"""What an alert means, for someone who has not read the manual: pure functions from a transition to sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vocabguard.alerts.rules import ABSENT, PREFIX, UNCHANGED, AlertRule, part_of, short_key, values_by_part
from vocabguard.alerts.states import WHOLE, News, RuleState, Standing
from vocabguard.results import EXPOSURE_CLASSES, AlertStory, Transition
from vocabguard.text import LARGE_GROUP, number, percent
from vocabguard.vocabulary.labels import kinds_of_tokens, label_of

_CLEAR = 0.001

GROUPS_NAMED = 6
"""Parts that a sentence names; more are counted."""

_OVER_WORDS = {">": "over", ">=": "at or over", "<": "under", "<=": "at or under"}
_SAFE_WORDS = {">": "at or under", ">=": "under", "<": "at or over", "<=": "over"}


def message_of(
    rule: AlertRule, news: News, standing: tuple[Standing, Standing], values: Mapping[str, float],
    rows: Mapping[str, int],
) -> str:  # fmt: skip
    """What has happened, in one sentence, of values before and after and, where known, live rows by script group."""
    before, after = standing
    head = f"{rule.name} ({rule.level})"
    if news == "resolves":
        trouble = f"after trouble since step {before.since}."
        if rule.by_part:
            return f"{head} has resolved: {rule.short} {_limit(rule)} in no {_noun(rule)} any more, {trouble}"
        return f"{head} has resolved: {_back(rule, before.parts[WHOLE], values.get(WHOLE, math.nan))}, {trouble}"
    goes_on = " goes on" if news == "again" else ""
    since = f"since step {after.since}."
    if not rule.by_part:
        state = before.parts.get(WHOLE, RuleState())
        return f"{head}{goes_on}: {_trouble(rule, state, values.get(WHOLE, math.nan))}, {since}"
    return f"{head}{goes_on}: {_parts(rule, news, (before, after), values, rows)}, {since}"


def worst_first(rule: AlertRule, names: tuple[str, ...], values: Mapping[str, float]) -> dict[str, float]:
    """Values of some parts, the worst first; NaN, for a part that was not measured, last.

    >>> rule = AlertRule("groups", "head/*/below_0.95", ">", 0.1)
    >>> worst_first(rule, ("ja", "ko", "zh"), {"ja": 0.2, "ko": 0.4})
    {'ko': 0.4, 'ja': 0.2, 'zh': nan}
    """
    found = {name: values.get(name, math.nan) for name in names}
    sign = -1.0 if rule.upward else 1.0
    return dict(sorted(found.items(), key=lambda item: (math.isnan(item[1]), sign * item[1], item[0])))


def _parts(
    rule: AlertRule, news: News, standing: tuple[Standing, Standing], values: Mapping[str, float],
    rows: Mapping[str, int],
) -> str:  # fmt: skip
    before, after = standing
    firing = worst_first(rule, after.firing, values)
    joined = set(after.firing) - set(before.told) if news == "again" else set()
    shown = [_part(rule, name, value, rows) + " (new)" * (name in joined) for name, value in firing.items()]
    more = f" and {len(shown) - GROUPS_NAMED} more" if len(shown) > GROUPS_NAMED else ""
    count = f"{len(shown)} {_noun(rule)}{'s' * (len(shown) != 1)}"
    return f"{rule.short} {_limit(rule)} in {count}: {', '.join(shown[:GROUPS_NAMED])}{more}"


def _part(rule: AlertRule, name: str, value: float, rows: Mapping[str, int]) -> str:
    label = name if rule.at_evaluations else label_of(name)
    if math.isnan(value):
        return label
    shares = "/below_" in rule.short
    # Not where a percentage would hide on which side of the limit it is.
    plain = shares and abs(value - rule.threshold) > _CLEAR
    shown = f"{label} {percent(value) if plain else _apart(value, rule.threshold)[0]}"
    # Only of shares of rows; a probe's or a set of answers' share is of something else.
    if name in rows and shares:
        count = round(value * rows[name])
        return f"{shown} ({count:,} row{'s' * (count != 1)})"
    return shown


def _noun(rule: AlertRule) -> str:
    return "language" if rule.at_evaluations else "group"


def _limit(rule: AlertRule) -> str:
    """What a part that fires does, as a verb and what follows it."""
    if rule.op in (ABSENT, UNCHANGED):
        return "is missing" if rule.op == ABSENT else "stays as it is"
    limit = f"{_OVER_WORDS[rule.op]} {_number(rule.threshold)}"
    return f"has a {rule.change} {limit} to {_checks(rule.over_checks)} ago" if rule.change else f"is {limit}"


def _trouble(rule: AlertRule, before: RuleState, value: float) -> str:
    """What is wrong, of a rule that is not over parts."""
    if rule.op == ABSENT:
        return f"{rule.short} is missing"
    if rule.op == UNCHANGED:
        return f"{rule.short} stays at {_short(value)}"
    if rule.change and before.history and not math.isnan(value):
        return _change(rule, before, value, f"{_OVER_WORDS[rule.op]} {_number(rule.threshold)}")
    shown, limit = _apart(value, rule.threshold)
    return f"{rule.short} is {shown}, {_OVER_WORDS[rule.op]} {limit}"


def _back(rule: AlertRule, before: RuleState, value: float) -> str:
    """What is right again."""
    if rule.op == ABSENT:
        return f"{rule.short} is back at {_short(value)}"
    if rule.op == UNCHANGED:
        return f"{rule.short} moves again and is {_short(value)}"
    if rule.resolve_at is None or rule.resolve_at == rule.threshold:
        bound, words = rule.threshold, _SAFE_WORDS[rule.op]
    else:
        bound, words = rule.resolve_at, "at or under" if rule.upward else "at or over"
    if rule.change and before.history:
        return _change(rule, before, value, f"{words} {_number(bound)}")
    shown, limit = _apart(value, bound)
    return f"{rule.short} is {shown}, {words} {limit}"


def _change(rule: AlertRule, before: RuleState, value: float, limit: str) -> str:
    reading = rule.reading(value, before.history)
    by = f"{_short(reading)} times" if rule.change == "ratio" else f"by {reading:+.3g}"
    then = before.history[-min(rule.over_checks, len(before.history))]
    return f"{rule.short} went from {_short(then)} to {_short(value)} in {_checks(rule.over_checks)}: {by}, {limit}"


def _checks(count: int) -> str:
    return f"{count} check{'s' * (count != 1)}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() or math.isinf(value) else f"{value:.3g}"


def _apart(value: float, limit: float) -> tuple[str, str]:
    """Both numbers as text, short, but with digits enough that different numbers look different."""
    if value.is_integer() or math.isinf(value):
        return f"{value:,.0f}", _number(limit)
    for digits in range(3, 17):
        shown = f"{value:.{digits}g}"
        if (float(shown) < limit) == (value < limit) and (float(shown) > limit) == (value > limit):
            return shown, _number(limit)
    return repr(value), _number(limit)


def _number(limit: float) -> str:
    return f"{limit:,.0f}" if float(limit).is_integer() else repr(limit)


Switch = Literal["on", "armed", "absent"]
Kind = Literal[
    "degraded", "at risk", "turned", "broken", "asked", "targets", "forgotten", "skill", "confused", "rare loss",
    "other",
]  # fmt: skip

NAMED = 4
"""Parts that a sentence names; more are counted."""

COSINES = {
    "cosine_mean": "on average at cosine {} to the base model's",
    "cosine_min": "down to cosine {} to the base model's",
    "cosine_p01": "in their worst hundredth at cosine {} to the base model's or below",
    "residual_p01": "beyond the shift that all rows share, in their worst hundredth at cosine {} to the base model's",
}


@dataclass(frozen=True)
class Scene:
    """What is known of the run when an alert has news.

    Attributes:
        scalars: logged keys and values of the check, or of the last one.
        live: live rows.
        rows: live rows of each script group and exposure class.
        unasked: of those, rows that have not been a target of the data so far; empty where nothing is counted.
        targets: targets of the data so far; 0 where nothing is counted.
        total: planned optimizer steps, if known.
        echo: whether echo is on, could be switched on, or is no part of the run.
        hold: the same of hold.
    """

    scalars: Mapping[str, float]
    live: int
    rows: Mapping[str, int] = field(default_factory=dict)
    unasked: Mapping[str, int] = field(default_factory=dict)
    targets: int = 0
    total: int | None = None
    echo: Switch = "absent"
    hold: Switch = "absent"

    def scalar(self, key: str) -> float:
        """A logged value by its key without ``vocabguard/``; NaN where it is missing."""
        return self.scalars.get(PREFIX + key, math.nan)

    def worst(self, key: str, *, lowest: bool = False) -> dict[str, float]:
        """Values of groups under a key with ``*``, the three worst of those that are large enough to be named."""
        found = values_by_part(key, {short_key(name): value for name, value in self.scalars.items()})
        large = [(name, value) for name, value in found.items() if self.rows.get(name, 0) >= LARGE_GROUP]
        large.sort(key=lambda item: (item[1] if lowest else -item[1], item[0]))
        return dict(large[:3])

    def listed(self, shares: Mapping[str, float]) -> str:
        """Parts with their shares of rows, and how many those are."""
        shown = []
        for name, share in list(shares.items())[:NAMED]:
            size = self.rows.get(name)
            of = f" {count(share, size):,} of {size:,} rows" if size else ""
            shown.append(f"{label_of(name)}{of} ({percent(share)})")
        return joined(shown, len(shares))

    @property
    def end(self) -> str:
        """The end of the run, in parentheses, where it is known."""
        return f" (step {self.total:,})" if self.total else ""


@dataclass(frozen=True)
class About:
    """What a transition is about.

    Attributes:
        owner: first piece of the key.
        last: its last piece.
        values: of the groups, classes or languages concerned, worst first; empty where it is about the whole.
        lost: rows concerned; None where it is not about rows.
        of_rows: live rows that the rule looks at.
    """

    change: Transition
    scene: Scene
    kind: Kind
    owner: str
    last: str
    values: Mapping[str, float]
    lost: int | None
    of_rows: int

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts concerned."""
        return tuple(self.values)

    @property
    def labels(self) -> tuple[str, ...]:
        """Their labels; languages go by their codes."""
        return self.parts if self.owner == "confusion" else tuple(map(label_of, self.parts))

    @property
    def inside(self) -> str:
        """The parts concerned, as what follows a noun."""
        return f" in {joined(self.labels)}" if self.parts else ""

    @property
    def share(self) -> float | None:
        """Rows concerned over the rows that the rule looks at, in [0, 1]."""
        known = self.lost is not None and self.of_rows and self.kind != "broken"
        return self.lost / self.of_rows if self.lost is not None and known else None


def about_of(change: Transition, scene: Scene) -> About:
    """A transition, taken apart.

    >>> change = Transition("groups", "firing", "warning", "head/*/below_0.95", 0.3, 10, "", parts={"ja": 0.3})
    >>> about = about_of(change, Scene({}, live=1000, rows={"ja": 200}))
    >>> about.kind, about.parts, about.lost, about.of_rows
    ('degraded', ('ja',), 60, 200)
    """
    key = short_key(change.metric)
    owner, last, part = key.split("/")[0], key.split("/")[-1], part_of(key)
    values = dict(change.parts) or ({} if part is None else {part: change.value})
    kind = _kind(owner, last)
    of_rows = sum(scene.rows.get(name, 0) for name in values) if values else scene.live
    lost = None
    if kind in ("degraded", "at risk"):
        lost = sum(count(value, scene.rows.get(name, 0)) for name, value in values.items())
        lost = lost if values else count(change.value, scene.live)
    elif kind == "asked":
        lost = count(change.value, scene.live)
    elif kind == "broken":
        lost = count(sum(values.values()) if values else change.value, 1)
    return About(change, scene, kind, owner, last, values, lost, of_rows)


def count(share: float, rows: int) -> int:
    """So many of the rows; 0 where the share is not known.

    >>> count(0.3, 200), count(math.nan, 200)
    (60, 0)
    """
    return round(share * rows) if math.isfinite(share) else 0


def joined(names: Sequence[str], total: int | None = None) -> str:
    """The first names, and how many more there are.

    >>> joined(["ja", "ko", "zh", "thai", "greek"])
    'ja, ko, zh, thai and 1 more'
    """
    more = (len(names) if total is None else total) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _kind(owner: str, last: str) -> Kind:
    kinds: tuple[tuple[Kind, bool], ...] = (
        ("confused", owner == "confusion"),
        ("rare loss", owner == "reference" and last.startswith("rare_rise")),
        ("forgotten", owner == "probe" and last.startswith(("retained", "lost", "tokens_retained", "watch"))),
        ("skill", owner == "probe" and last.startswith("skill")),
        ("asked", owner == "exposure" and last in EXPOSURE_CLASSES),
        ("targets", owner == "exposure" and last == "targets"),
        ("broken", last in ("nonfinite_rows", "zero_rows")),
        ("turned", last in COSINES),
        ("at risk", owner == "forecast" and last.startswith("below_")),
        ("degraded", last.startswith("below_")),
    )
    return next((kind for kind, here in kinds if here), "other")


_RATE = "lower the learning rate, or train with LoRA: both change the body of the model less."
ECHO_DOSE = 0.1
"""Echo targets for each data target, of the preset ``protect``."""


def advice_of(about: About) -> tuple[str, ...]:
    """What to do, a sentence each."""
    if about.kind == "broken":
        start = about.change.since if about.change.since is not None else about.change.step
        return (
            f"stop, and go on from a checkpoint before step {start:,} with a lower learning rate; in float16 look at "
            "the loss scale.",
        )
    if about.kind == "targets":
        return (
            "if a custom loss takes the labels out of the batch, pass VocabGuardCallback(hidden_labels=True) in the "
            'Hugging Face trainer, or targets=lambda batch: (batch["input_ids"], batch["labels"]) elsewhere.',
            "in a loop of your own, call guard.observe_batch(batch) before each batch reaches the model.",
            "otherwise all labels may be -100: look at one batch, and raise max_length if it cuts the answers off.",
        )
    if about.kind == "confused":
        inside = f" in {joined(about.parts)}" if about.parts else ""
        return (f"see in confusion.jsonl which scripts get in, and clean the data{inside} of such mixtures.",)
    if about.kind == "skill":
        return (
            "look at the validation loss: if it rose, go on from an earlier checkpoint with a lower learning rate; if "
            "it is fine, add a few rows to the data in which the user asks to repeat a text.",
        )
    if about.kind == "other":
        return ()
    first, hold = (_RATE, "") if about.kind == "rare loss" else ("", _hold(about))
    return tuple(filter(None, (first, _echo(about), hold, _data(about))))


def _echo(about: About) -> str:
    scene, step = about.scene, about.change.step
    if scene.echo == "on":
        done = scene.scalar("echo/targets_per_live_token")
        return f"echo is on, {number(done, 2)} targets a live token so far: raise its dose if this goes on."
    if scene.echo == "armed":
        return 'switch echo on: guard.switch("echo", True), or "echo" among the actions of this rule.'
    expected = scene.targets / step * scene.total if step and scene.total else 0.0
    cost = f"about {round(ECHO_DOSE * expected):,} extra target tokens, " if expected else "extra target tokens: "
    return f'turn protection on: VocabGuardCallback("protect") ({cost}{100 * ECHO_DOSE:.0f} % of your data).'


def _hold(about: About) -> str:
    scene, still = about.scene, sum(about.scene.unasked.get(name, 0) for name in EXPOSURE_CLASSES)
    rows = f"{still:,} rows that were never a target" if still else "rows that are never a target"
    if scene.hold == "armed":
        return f'switch hold on: guard.switch("hold", True) stops the drift of {rows}.'
    if scene.hold == "on" or scene.echo == "absent" or about.kind == "forgotten":
        return ""
    return f'hold={{"enabled": True}} stops the drift of {rows}.'


def _data(about: About) -> str:
    scene = about.scene
    names = [name for name in about.parts if name in scene.rows and name not in EXPOSURE_CLASSES]
    if not names and about.kind == "rare loss":
        names = [name for name, rise in scene.worst("reference/*/nll_rise").items() if rise > 0]
    elif not names and about.kind == "forgotten":
        names = [name for name, kept in scene.worst("probe/*/retained", lowest=True).items() if kept < 1]
    elif not names:
        key = "forecast" if about.kind == "at risk" else "head"
        names = [name for name, share in scene.worst(f"{key}/*/below_0.95").items() if share > 0]
    names = names[:NAMED]
    unasked = sum(scene.unasked.get(name, 0) for name in names)
    rows = sum(scene.rows.get(name, 0) for name in names)
    # Before the first targets are counted every token has none, which says nothing of the data.
    if not unasked or not scene.targets:
        return ""
    kinds = kinds_of_tokens(names)
    return f"add data that contains {kinds} tokens: {unasked:,} of {rows:,} have never been a target."


_ROWS = {"embedding": "input embedding rows"}
_ASKED = dict(zip(EXPOSURE_CLASSES, ("never", "1 to 4 times", "5 to 19 times", "20 times or more"), strict=True))
_ANSWERS = {
    "latin": "of answers have Latin letters in them",
    "line_pass": "of answers keep to their language in every line",
    "word_pass": "of the answers that keep to their language by line do so by word",
}


def alert_story(change: Transition, scene: Scene, tokens: Sequence[str] = ()) -> AlertStory:
    """The story of an alert that fires; `tokens` are the worst of those concerned, as text.

    Example:
        >>> change = Transition("degraded", "firing", "warning", "head/below_0.95", 0.02, 120, "", since=100)
        >>> story = alert_story(change, Scene({}, live=1000))
        >>> story.rows, story.share, story.since
        (20, 0.02, 'Since step 100, 20 steps ago.')
    """
    about = about_of(change, scene)
    nothing: Callable[[About], str] = lambda about: ""  # noqa: E731, ARG005
    return AlertStory(
        what=_WHAT.get(about.kind, nothing)(about), where=_WHERE.get(about.kind, nothing)(about), rows=about.lost,
        share=about.share, tokens=tuple(tokens), since=_since(change), outlook=_outlook(about),
        advice=advice_of(about),
    )  # fmt: skip


def _degraded(about: About) -> str:
    return f"{_some(about)} have turned away from the base model's: cosine below {about.last.removeprefix('below_')}."


_RELIABLE = 0.1  # of the run; see the evidence of the forecast in tests/README.md


def _at_risk(about: About) -> str:
    step, total = about.change.step, about.scene.total
    said = f"{_some(about)} may be below cosine 0.95 to the base model's at the end{about.scene.end}, by the forecast."
    if not total or step >= _RELIABLE * total:
        return said
    when = f"after step {step:,}" if step else "before step 1"
    return f"Early estimate ({when}): {said} It is reliable from about 10 % of the run on."


def _turned(about: About) -> str:
    will = "may end" if about.owner == "forecast" else "are"
    value = number(about.change.value)
    return f"The live {_rows(about)}{about.inside} {will} {COSINES[about.last].format(value)}."


def _broken(about: About) -> str:
    state = "hold NaN or infinity" if about.last == "nonfinite_rows" else "are all zeros"
    return f"{about.lost:,} live {_rows(about)}{about.inside} {state}."


def _asked(about: About) -> str:
    share = percent(about.share)
    return f"{about.lost:,} of {about.of_rows:,} live tokens ({share}): {_ASKED[about.last]} a target so far."


def _targets(about: About) -> str:
    total = f"{about.change.value:,.0f}"
    if not about.change.value:
        return (
            f"No target has been counted in {about.change.step:,} steps: the guard sees no labels, and what it says of "
            "tokens that are never a target is not to be relied on."
        )
    return f"The data's targets counted so far stay at {total} from check to check: the guard sees no labels."


def _forgotten(about: About) -> str:
    scene = about.scene
    if about.last == "watch":
        known = scene.scalar("probe/watch_known")
        if math.isnan(known):
            return f"{percent(1.0 - about.change.value)} of the watched words that the base repeats are lost."
        gone = count(1.0 - about.change.value, int(known))
        return f"{gone:,} of {known:,.0f} watched words that the base repeats are lost."
    known, lost = scene.scalar("probe/known"), scene.scalar("probe/lost")
    sample = "" if math.isnan(known) or about.parts else f" (a sample of {known:,.0f})"
    if about.last.startswith("tokens_retained") and not math.isnan(lost):
        kept = scene.scalar("probe/tokens_retained_high")
        least = f", at least {percent(1 - kept)} beyond noise and skill" if kept < 1 else ""
        return f"{percent(lost)} of the live tokens that the base repeats are lost{least}{sample}."
    share = percent(1.0 - about.change.value)
    return f"{share} of the probed tokens{about.inside} that the base repeats are lost{sample}."


def _skill(about: About) -> str:
    kept = about.scene.scalar("probe/skill")
    share = percent(None if math.isnan(kept) else kept)
    return (
        f"The model repeats only {share} of frequent targets, so what is lost is the skill of "
        "repeating, or the model itself, for all tokens alike."
    )


def _rare_loss(about: About) -> str:
    rise, low, high = (about.scene.scalar(f"reference/rare_rise{end}") for end in ("", "_low", "_high"))
    rare, frequent = (about.scene.scalar(f"reference/{name}/targets") for name in ("rare", "frequent"))
    return (
        "Of the tokens that the base predicted in the reference text, those seen fewer than 5 times as a training "
        f"target lost more than the others: their mean loss rose by {number(rise, 2)} nats more (95 % interval over "
        f"all checks so far: {number(low, 2)} to {number(high, 2)}; {rare:,.0f} and {frequent:,.0f} targets)."
    )


def _confused(about: About) -> str:
    said = _ANSWERS.get(about.last, "of answers have letters of a script that is foreign to their language")
    inside = f", worst in {about.parts[0]}" if about.parts else ""
    return f"{percent(about.change.value)} {said}{inside}."


_WHAT: Mapping[Kind, Callable[[About], str]] = {
    "degraded": _degraded,
    "at risk": _at_risk,
    "turned": _turned,
    "broken": _broken,
    "asked": _asked,
    "targets": _targets,
    "forgotten": _forgotten,
    "skill": _skill,
    "confused": _confused,
    "rare loss": _rare_loss,
}


def _where_rows(about: About) -> str:
    if len(about.parts) > 1:
        return f"In {about.scene.listed(about.values)}."
    worst = about.scene.worst(f"{about.owner}/*/{about.last}")
    return "" if about.parts or not any(worst.values()) else f"Most in {about.scene.listed(worst)}."


def _where_turned(about: About) -> str:
    worst = about.values if about.change.parts else about.scene.worst(f"{about.owner}/*/{about.last}", lowest=True)
    named = [f"{label_of(name)} {number(value)}" for name, value in worst.items()]
    return f"Lowest in {joined(named)}." if named and (about.change.parts or not about.parts) else ""


def _where_forgotten(about: About) -> str:
    kept = about.values if about.change.parts else about.scene.worst("probe/*/retained", lowest=True)
    named = [f"{label_of(name)} {percent(1.0 - value)}" for name, value in kept.items() if value < 1.0]
    return f"Lost most in {joined(named)}." if named and (about.change.parts or not about.parts) else ""


def _where_rare_loss(about: About) -> str:
    risen = {name: value for name, value in about.scene.worst("reference/*/nll_rise").items() if value > 0}
    named = [f"{label_of(name)} {value:+.2f}" for name, value in risen.items()]
    return f"Mean loss rose most in {joined(named)} nats." if named else ""


def _where_confused(about: About) -> str:
    named = [f"{name} {percent(value)}" for name, value in about.values.items()]
    return f"In {joined(named)}." if about.change.parts else ""


_WHERE: Mapping[Kind, Callable[[About], str]] = {
    "degraded": _where_rows,
    "at risk": _where_rows,
    "turned": _where_turned,
    "forgotten": _where_forgotten,
    "confused": _where_confused,
    "rare loss": _where_rare_loss,
}


def _since(change: Transition) -> str:
    if change.since is None or change.since == change.step:
        return f"Since this check, at step {change.step:,}."
    return f"Since step {change.since:,}, {change.step - change.since:,} steps ago."


def _outlook(about: About) -> str:
    """What the end of the run will bring, where a forecast says so."""
    scene, share = about.scene, about.scene.scalar("forecast/below_0.95")
    if about.kind not in ("degraded", "turned", "asked", "forgotten") or math.isnan(share) or about.owner == "forecast":
        return ""
    if scene.total is not None and about.change.step >= scene.total:
        return ""
    more = " more" if "on" in (scene.echo, scene.hold) else ""
    by_part = {name: scene.scalar(f"forecast/{name}/below_0.95") for name in about.parts}
    chosen = {name: value for name, value in by_part.items() if not math.isnan(value)} or scene.worst(
        "forecast/*/below_0.95"
    )
    named = f"; {scene.listed(chosen)}" if any(chosen.values()) else ""
    rows = f"{count(share, scene.live):,} of {scene.live:,} live output rows ({percent(share)})"
    return f"If nothing{more} is done, {rows} may be below 0.95 at the end{scene.end}{named}."


def _some(about: About) -> str:
    return f"{about.lost:,} of {about.of_rows:,} live {_rows(about)}{about.inside} ({percent(about.share)})"


def _rows(about: About) -> str:
    return _ROWS.get(about.owner, "output rows")
