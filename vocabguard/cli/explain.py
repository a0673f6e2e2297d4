"""``vocabguard explain BASE TUNED TOKEN...``: what happened to a token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from vocabguard.cli import common
from vocabguard.cli.app import InputError
from vocabguard.cli.common import Column, Grid
from vocabguard.report.commands import Next, command
from vocabguard.text import number, percent, visible
from vocabguard.vocabulary.labels import label_of

if TYPE_CHECKING:
    from vocabguard.compare.scan import Scan

_ASKED = {
    "then": "the base",
    "now": "the tuned model",
    "head_row_back": "tuned, base output row back",
    "both_rows_back": "tuned, both base rows back",
}


def show_story(console: Console, told: Mapping[str, Any]) -> None:
    """Print what `vocabguard.compare.explain.story` found."""
    title = f"\n{visible(told['text'])}  id {told['id']}, {label_of(told['category'])}"
    parts: list[RenderableType] = [Text(title, "bold"), Text(told["diagnosis"], "bold"), Text(told["advice"]), Text("")]
    parts += map(Text, _sentences(told))
    parts.append(_rows(told))
    if told["emission"]:
        parts.append(_emission(told["emission"]))
    else:
        parts.append(Text(f"Not probed: {told['not_asked'] or 'the token has no row in the base'}."))
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
    if "distance_not_measured" in trained:
        line += f"; distance to unused rows not measured: {trained['distance_not_measured']}"
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
    return Text(f"{visible(one['text'], 18)}  ! {label_of(one['category'])}", "red")


def explain(
    base: common.Base, tuned: common.Tuned,
    tokens: Annotated[list[str], typer.Argument(help="Texts of tokens, or their ids.")],
    tokenizer: common.Tokenizer = None, head: common.HeadKey = None, embedding: common.EmbeddingKey = None,
    coverage: common.Coverage = None, run: common.Run = None,
    ask: Annotated[bool, typer.Option(help="Load both models and ask them for the token.")] = True,
    as_json: common.AsJson = False,
) -> None:  # fmt: skip
    """Investigate single tokens: their rows, their neighbours, and whether they can still be said.

    Exit code 0: none is lost; 1: at least one is; 2: bad input.
    """
    from vocabguard.compare.explain import LOST, Sides, story

    pair = common.open_pair(base, tuned, tokenizer, head, embedding, coverage, run)
    rows = pair.tuned.rows or pair.base.rows
    ids = [_id(pair.tokenizer, token, rows) for token in tokens]
    found = common.measured(pair)
    try:
        with common.working("loading and asking both models" if ask else "looking at rows"):
            contexts, models = _askable(found, pair.tokenizer) if ask else ([], "--no-ask was given")
            both = Sides.of(found, models)
            stories = [story(both, pair.tokenizer, token, contexts) for token in ids]
    except ValueError as error:
        raise InputError(str(error)) from error
    if as_json:
        print(json.dumps({"tokens": stories}, ensure_ascii=False, allow_nan=False))
    else:
        for told in stories:
            show_story(Console(), told)
        common.show_next(_next(base, tuned, stories))
    if any(told["kind"] in LOST for told in stories):
        raise typer.Exit(1)


def _next(base: str, tuned: str, stories: list[dict[str, Any]]) -> list[Next]:
    """What helps where a token is lost."""
    from vocabguard.compare.explain import LOST

    if not any(told["kind"] in LOST for told in stories):
        return [Next("Ask for a sample of all tokens", command("vocabguard", "probe", tuned, base))]
    return [Next("Put lost rows right", command("vocabguard", "repair", base, tuned, "--out", "repaired"))]


def _id(tokenizer: Any, token: str, rows: int) -> int:
    """A text is a token's text if there is one, and an id otherwise."""
    from vocabguard.vocabulary.table import resolve_token

    if tokenizer is not None:
        try:
            return resolve_token(tokenizer, token, rows)
        except ValueError as error:
            if not token.isdecimal():
                raise InputError(str(error)) from error
    if not token.isdecimal() or int(token) >= rows:
        raise InputError(f"token {token!r}: allowed without a tokenizer: ids from 0 to {rows - 1}")
    return int(token)


def _askable(found: Scan, tokenizer: Any) -> tuple[list[Any], Any]:
    """Contexts and both models, or no contexts and why they cannot be asked."""
    from vocabguard.compare.explain import asks_of
    from vocabguard.compare.models import load_model

    if tokenizer is None:
        return [], "there is no tokenizer to write prompts with"
    if found.match.by != "id":
        return [], "the base has another vocabulary, so both cannot be probed alike"
    try:
        base = found.base.path
        pool, models = common.ways_of_asking(tokenizer), (load_model(base), load_model(found.tuned.path, base=base))
        return list(asks_of(models[0], found, pool)), models
    except ValueError as error:
        return [], str(error)
