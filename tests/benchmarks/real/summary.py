"""The bench's committed results as the tables of ``tests/README.md``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from real.recall import ASKS

from vocabguard.measure.intervals import wilson

RESULTS = Path(__file__).parent
README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- real models: begin -->", "<!-- real models: end -->"
FORGOTTEN = 0.02
"""Share of the never class over which a run has lost tokens: the default limit of ``tokens_forgotten``."""
_ORDER = ("control", "early", "hold", "echo", "protect", "hold_echo")


def _read(name: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return found


def _name(entry: Mapping[str, Any]) -> tuple[str, str, int]:
    return entry["recipe"], entry["arm"], entry["seed"]


def _share(count: int, of: int) -> str:
    low, high = wilson(count, of)
    return f"{count} of {of}: {100 * count / max(1, of):.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def truth_of(entry: Mapping[str, Any]) -> str:
    """``lost``, ``kept`` or ``open``: the interval of the never class's lost share against `FORGOTTEN`."""
    never = entry["tokens"]["never"]
    low, high = wilson(never["lost"], never["known"])
    return "lost" if low > FORGOTTEN else "kept" if high <= FORGOTTEN else "open"


def recall_table(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line a run, in Markdown."""
    lines = [
        "| recipe | arm | seed | lost, of the never-a-target tokens that the base says (95 %) | gained, of the others "
        "| lost, asked for 20 times and more | validation loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        never, often = entry["tokens"]["never"], entry["tokens"]["20+"]
        before, after = entry["loss"]
        lines.append(
            f"| {entry['recipe']} | {entry['arm']} | {entry['seed']} | {_share(never['lost'], never['known'])} "
            f"| {never['gained']} of {never['unknown']} | {often['lost']} of {often['known']} "
            f"| {before:.3f} to {after:.3f} |"
        )
    return lines


def time_table(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lost and gained of the never class while the runs went on; see ``judge --percent``."""
    lines = ["| recipe | arm | seed | never class: lost, gained at % of the run |", "|---|---|---|---|"]
    for entry in entries:
        parts = [
            f"{percent} %: {100 * lost / max(1, known):.1f} % of {known}, "
            f"{100 * gained / max(1, unknown):.0f} % of {unknown}"
            for percent, (lost, known, gained, unknown) in entry.get("over_time", {}).items()
        ]
        if parts:
            lines.append(f"| {entry['recipe']} | {entry['arm']} | {entry['seed']} | {'; '.join(parts)} |")
    return lines


def alert_table(entries: Iterable[Mapping[str, Any]], replays: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """Which rules fired at warning or above, beside what was lost; a replay's alerts stand before the run's own."""
    lines = ["| recipe | arm | seed | never class, asked back | rules that fired | |", "|---|---|---|---|---|---|"]
    for entry in entries:
        replayed = replays.get(_name(entry))
        told = entry.get("alerts") if replayed is None else sorted({one["rule"] for one in replayed["alerts"]})
        if told is None:
            continue
        truth, fired = truth_of(entry), any(rule in told for rule in ("tokens_forgotten", "skill_lost"))
        verdict = {("lost", True): "right", ("kept", False): "right", ("lost", False): "**missed**",
                   ("kept", True): "**false**"}.get((truth, fired), "the interval holds the limit")  # fmt: skip
        said = ", ".join(told) or "none"
        lines.append(f"| {entry['recipe']} | {entry['arm']} | {entry['seed']} | {truth} | {said} | {verdict} |")
    return lines


def markdown() -> str:
    """Both tables, from ``results.json`` and ``replays.json``."""

    def order(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        arm = entry["arm"]
        return entry["recipe"], _ORDER.index(arm) if arm in _ORDER else len(_ORDER), arm, entry["seed"]

    entries = sorted(_read("results.json"), key=order)
    replays = {_name(one): one for one in _read("replays.json")}
    noise = [entry["tokens"]["base among other neighbours"] for entry in entries]
    lost, known = sum(one["lost"] for one in noise), sum(one["known"] for one in noise)
    return "\n".join(
        [
            *recall_table(entries),
            "",
            f"Each token is asked for {ASKS} times: the base says it where it does three times or more, and it is lost",
            "where the run's model does once or never. Asked once more among other neighbours, the bases themselves",
            f"'lose' {lost} of {known}; so a run's model is asked among the base's neighbours.",
            "",
            *time_table(entries),
            "",
            *alert_table(entries, replays),
        ]
    )


def written(readme: Path = README) -> str:
    """The README with the tables as they are now.

    Raises:
        ValueError: if the README has no place for them.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} lacks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}"
