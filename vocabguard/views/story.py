"""What an alert means, for someone who has not read the manual: pure functions from a transition to sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.transitions import AlertStory, Transition
from vocabguard.views.advice import advice_of
from vocabguard.views.scene import COSINES, About, Kind, Scene, about_of, count, joined
from vocabguard.views.wording import number, percent

_ROWS = {"embedding": "input embedding rows"}
_ASKED = dict(zip(EXPOSURE_CLASSES, ("never", "1 to 4 times", "5 to 19 times", "20 times or more"), strict=True))
_ANSWERS = {
    "latin": "of answers have Latin letters in them",
    "line_pass": "of answers keep to their language in every line",
    "word_pass": "of the answers that keep to their language by line do so by word",
}


def story_of(change: Transition, scene: Scene, tokens: Sequence[str] = ()) -> AlertStory:
    """The story of an alert that fires.

    Args:
        change: the transition.
        scene: what is known of the run.
        tokens: the worst tokens of those concerned by text, worst first.
    """
    about = about_of(change, scene)
    nothing: Callable[[About], str] = lambda about: ""  # noqa: E731, ARG005
    return AlertStory(
        what=_WHAT.get(about.kind, nothing)(about),
        where=_WHERE.get(about.kind, nothing)(about),
        rows=about.lost,
        share=about.share,
        tokens=tuple(tokens),
        since=_since(change),
        outlook=_outlook(about),
        advice=advice_of(about),
    )


def _degraded(about: About) -> str:
    return f"{_some(about)} have turned away from the base model's: cosine below {about.last.removeprefix('below_')}."


def _at_risk(about: About) -> str:
    return f"{_some(about)} will be below cosine 0.95 to the base model's at the end{about.scene.end}."


def _turned(about: About) -> str:
    will = "will end" if about.owner == "forecast" else "are"
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
    return f"The data's targets counted so far stay at {total} from check to check: the guard sees no labels."


def _forgotten(about: About) -> str:
    some = "watched" if about.last == "watch" else "probed"
    share = percent(1.0 - about.change.value)
    return f"{share} of the {some} tokens{about.inside} that the base could repeat are forgotten."


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
    "confused": _confused,
}


def _where_rows(about: About) -> str:
    if len(about.parts) > 1:
        return f"In {about.scene.listed(about.values)}."
    worst = about.scene.worst(f"{about.owner}/*/{about.last}")
    return "" if about.parts or not any(worst.values()) else f"Most in {about.scene.listed(worst)}."


def _where_turned(about: About) -> str:
    worst = about.values if about.change.parts else about.scene.worst(f"{about.owner}/*/{about.last}", lowest=True)
    named = [f"{name} {number(value)}" for name, value in worst.items()]
    return f"Lowest in {joined(named)}." if named and (about.change.parts or not about.parts) else ""


def _where_forgotten(about: About) -> str:
    kept = about.values if about.change.parts else about.scene.worst("probe/*/retained", lowest=True)
    named = [f"{name} {percent(1.0 - value)}" for name, value in kept.items() if value < 1.0]
    return f"Forgotten most in {joined(named)}." if named and (about.change.parts or not about.parts) else ""


def _where_confused(about: About) -> str:
    named = [f"{name} {percent(value)}" for name, value in about.values.items()]
    return f"In {joined(named)}." if about.change.parts else ""


_WHERE: Mapping[Kind, Callable[[About], str]] = {
    "degraded": _where_rows,
    "at risk": _where_rows,
    "turned": _where_turned,
    "forgotten": _where_forgotten,
    "confused": _where_confused,
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
    return f"If nothing{more} is done, {rows} will be below 0.95 at the end{scene.end}{named}."


def _some(about: About) -> str:
    return f"{about.lost:,} of {about.of_rows:,} live {_rows(about)}{about.inside} ({percent(about.share)})"


def _rows(about: About) -> str:
    return _ROWS.get(about.owner, "output rows")
