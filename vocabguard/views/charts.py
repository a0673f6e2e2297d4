"""TensorBoard's charts of several scalars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vocabguard.views.keys import ChosenKeys

# A key of `log.keys` stands under the first, all others under the second.
_ANY = "vocabguard(-detail)?"
_CLASSES = r"(never|1-4|5-19|20\+)"
_GROUPS = rf"(?!{_CLASSES}/)[^/]+"
# TensorBoard matches these as regular expressions, so that one chart holds a line for each group that is logged.
_LAYOUT = {
    "vocabguard": {
        "head rows below 0.95, by group": ["Multiline", [rf"{_ANY}/head/{_GROUPS}/below_0\.95$"]],
        "head rows below 0.95, by exposure class": ["Multiline", [rf"{_ANY}/head/{_CLASSES}/below_0\.95$"]],
        "forecast of head rows below 0.95, by group": ["Multiline", [rf"{_ANY}/forecast/{_GROUPS}/below_0\.95$"]],
        "retained, by group": ["Multiline", [rf"{_ANY}/probe/{_GROUPS}/retained$"]],
        "retained, by exposure class": ["Multiline", [rf"{_ANY}/probe/{_CLASSES}/retained$"]],
    }
}


def charts(groups: Sequence[str], chosen: ChosenKeys) -> dict[str, dict[str, list[Any]]]:
    """Charts of several scalars: all groups on one, and for each large one how it is and how it will end."""
    ends = {}
    for name in ("all", *groups):
        inner = "" if name == "all" else f"{name}/"
        now, then = (chosen.tag(f"vocabguard/{part}/{inner}below_0.95") for part in ("head", "forecast"))
        # A line for now, and a band from it to the forecast.
        ends[f"{name}: head rows below 0.95, now and forecast for the end"] = ["Margin", [now, now, then]]
    return {**_LAYOUT, "vocabguard, now and at the end": ends}
