"""One token's story on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from vocabguard.offline.tables import Column, Grid
from vocabguard.views.wording import number, percent, visible

_ASKED = {
    "then": "the base",
    "now": "the tuned model",
    "head_row_back": "tuned, base output row back",
    "both_rows_back": "tuned, both base rows back",
}


def show_story(console: Console, told: Mapping[str, Any]) -> None:
    """Print what `vocabguard.offline.explain_story.story` found."""
    title = f"\n{visible(told['text'])}  id {told['id']}, {told['category']}"
    parts: list[RenderableType] = [Text(title, "bold"), Text(told["diagnosis"], "bold"), Text(told["advice"]), Text("")]
    parts += map(Text, _sentences(told))
    parts.append(_rows(told))
    if told["emission"]:
        parts.append(_emission(told["emission"]))
    else:
        parts.append(Text(f"Not asked: {told['not_asked'] or 'the token has no row in the base'}."))
    parts.append(_neighbours(told["neighbours"]))
    for part in parts:
        console.print(part, highlight=False, soft_wrap=isinstance(part, Text))


def _sentences(told: Mapping[str, Any]) -> list[str]:
    said, cut, trained = [], told["cut"], told["trained"]
    if cut is not None:
        pieces = " + ".join(visible(str(piece)) for piece in cut["pieces"])
        said.append(f"cut      {pieces}: " + ("this very token" if cut["round_trip"] else "not this token alone"))
    line = "trained  " + ("yes" if trained["trained"] else "never")
    for key, words in (("input_norm", "input norm"), ("distance_to_unused", "distance to unused rows")):
        if key in trained:
            line += f"; {words} {number(trained[key], 3)}, above {percent(trained[f'{key}_quantile'])} of live rows"
    said.append(line)
    if told["data_target"] is not None:
        said.append(f"data     a target {told['data_target']:,} times")
    return said


def _rows(told: Mapping[str, Any]) -> Grid:
    table = Grid([
        Column("row", words=True), Column("cosine"), Column("rank"), Column("residual", spare=2), Column("L2"),
        Column("rank ", spare=1), Column("norm ratio", spare=3),
    ])  # fmt: skip
    for name, label in (("head", "output"), ("embedding", "input")):
        facts = told[name]
        if "not_applicable" in facts:
            table.add(f"{label}: {facts['not_applicable']}")
            continue
        of = f"of {facts['live']:,}"
        cosine_rank, l2_rank = f"{facts['cosine_rank'] + 1:,} {of}", f"{facts['l2_rank'] + 1:,} {of}"
        cells = [number(facts["cosine"]), cosine_rank, number(facts["residual"]), number(facts["l2"]), l2_rank]
        table.add(label, *cells, number(facts["norm_ratio"]))
    return table


def _emission(emission: Mapping[str, Any]) -> Grid:
    table = Grid([
        Column("asked", words=True), Column("says it", words=True), Column("contexts"), Column("prob."),
        Column("instead", words=True),
    ])  # fmt: skip
    for key, found in emission.items():
        instead = "" if found["instead"] is None else visible(found["instead"], 24)
        answer = "yes" if found["said"] else "no"
        shown = (_ASKED[key], answer, percent(found["contexts"]), number(found["probability"], 3), instead)
        table.add(*shown)
    return table


def _neighbours(found: Mapping[str, Any]) -> Grid:
    table = Grid([
        Column("nearest then", words=True), Column("cosine"), Column("nearest now", words=True), Column("cosine "),
    ])  # fmt: skip
    then, now = found.get("then", []), found.get("now", [])
    for place in range(max(len(then), len(now))):
        cells: list[Text] = []
        for side in (then, now):
            one = side[place] if place < len(side) else None
            cells.append(Text("") if one is None else _neighbour(one))
            cells.append(Text("" if one is None else number(one["cosine"], 3)))
        table.add(*cells)
    return table


def _neighbour(one: Mapping[str, Any]) -> Text:
    if not one["intruder"]:
        return Text(visible(one["text"], 18))
    return Text(f"{visible(one['text'], 18)}  ! {one['category']}", "red")
