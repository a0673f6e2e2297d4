"""What to do about an alert, with the run's own numbers: pure functions."""

from __future__ import annotations

from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.views.scene import About, joined
from vocabguard.views.wording import number, percent

ECHO_TARGETS = 1.45
"""Echo targets a live token of the preset ``protect``."""


def advice_of(about: About) -> tuple[str, ...]:
    """What to do, a sentence each.

    Args:
        about: what the alert is about.
    """
    if about.kind == "broken":
        start = about.change.since if about.change.since is not None else about.change.step
        return (
            f"stop, and go on from a checkpoint before step {start:,} with a lower learning rate; in float16 look at "
            "the loss scale.",
        )
    if about.kind == "targets":
        return (
            "where a custom loss takes the labels out of the batch, say targets=, or hidden_labels=True in the Hugging "
            "Face trainer; otherwise look whether the batches have labels other than -100.",
        )
    if about.kind == "confused":
        inside = f" in {joined(about.parts)}" if about.parts else ""
        return (f"see in confusion.jsonl which scripts get in, and clean the data{inside} of such mixtures.",)
    if about.kind == "other":
        return ()
    return tuple(filter(None, (_echo(about), _hold(about), _data(about))))


def _echo(about: About) -> str:
    scene, step = about.scene, about.change.step
    if scene.echo == "on":
        done = scene.scalar("echo/targets_per_live_token")
        return f"echo is on, {number(done, 2)} targets a live token so far: raise its dose if this goes on."
    if scene.echo == "armed":
        return 'switch echo on: guard.switch("echo", True), or "echo" among the actions of this rule.'
    cost = round(ECHO_TARGETS * scene.live)
    expected = scene.targets / step * scene.total if step and scene.total else 0.0
    share = f", {percent(cost / expected)} of the data's own" if expected else ""
    if expected and cost > expected:
        share = ", more than the data's own: echo.dose_limit adds fewer"
    both = "echo and hold" if scene.hold == "absent" else "echo"
    return f'{both}: config="protect" adds {cost:,} targets over the run{share}.'


def _hold(about: About) -> str:
    scene, still = about.scene, sum(about.scene.unasked.get(name, 0) for name in EXPOSURE_CLASSES)
    rows = f"{still:,} rows that the data has not asked for so far" if still else "rows that the data does not ask for"
    if scene.hold == "armed":
        return f'switch hold on: guard.switch("hold", True) stops the drift of {rows}.'
    if scene.hold == "on" or scene.echo == "absent":
        return ""
    return f'hold: config="protect" stops the drift of {rows}.'


def _data(about: About) -> str:
    scene = about.scene
    names = [name for name in about.parts if name in scene.rows and name not in EXPOSURE_CLASSES]
    if not names and about.kind == "forgotten":
        names = [name for name, kept in scene.worst("probe/*/retained", lowest=True).items() if kept < 1]
    elif not names:
        key = "forecast" if about.kind == "at risk" else "head"
        names = [name for name, share in scene.worst(f"{key}/*/below_0.95").items() if share > 0]
    unasked = sum(scene.unasked.get(name, 0) for name in names)
    rows = sum(scene.rows.get(name, 0) for name in names)
    if not unasked:
        return ""
    return f"data with {joined(names)}: {unasked:,} of their {rows:,} tokens have not been a target so far."
