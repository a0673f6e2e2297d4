"""What a probe found, as the terminal shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from vocabguard.cli.common import Column, Grid
from vocabguard.text import listed, number, percent, visible
from vocabguard.vocabulary.labels import label_of

_WORD_KINDS = (("lost", "lost"), ("known", "still said"), ("unknown", "not repeated by the base"))


def probe_parts(told: Mapping[str, Any], top: int, *, verdict: bool = True) -> list[RenderableType]:
    """What a probe found, for a terminal.

    Args:
        told: what `vocabguard.cli.asking.Interview.told` gave.
        top: 0 leaves the lists of tokens out.
        verdict: begin with the verdict, and end the sentences with what was not measured.
    """
    parts: list[RenderableType] = []
    if verdict:
        parts.append(Text(told["verdict"]["sentence"], "bold"))
        parts += [Text(f"over the threshold: {one}", "red") for one in told["verdict"]["findings"]]
    parts += map(Text, _sentences(told))
    if verdict:
        parts.append(Text(f"Not measured: {'; '.join(told['verdict']['not_measured'])}."))
    parts += [_share_table(told, kind) for kind in ("groups", "classes") if told.get(kind)]
    lists = (("lost", "lost tokens, by their probability"), ("gained", "repeated only now"), ("unsaid", "not repeated"))
    for key, title in lists:
        if told.get(key) and top:
            more = told[f"{key}_count"] - len(told[key])
            parts += [Text(f"\n{title}{f' ({more:,} more)' if more else ''}", "bold"), _token_table(told[key])]
    return parts


def _sentences(told: Mapping[str, Any]) -> list[str]:
    asked, said = told["asked"], []
    follows = max(asked["base_follows"].values(), default=None)
    best = "" if follows is None else f"; in the best of these the base repeats {percent(follows)} of other tokens"
    prompts = f"{len(asked['asks'])} ({', '.join(asked['asks'])}{best})"
    said.append(f"Prompts for each token: {prompts}. Seed {asked['seed']}; {percent(asked['confidence'])} intervals.")
    if told["instead"]:
        named = [f"{visible(one['text'], 16)} ({one['answers']:,})" for one in told["instead"][:8]]
        said.append(f"Said instead: {listed(named, len(told['instead']))}.")
    if where := where_sentence(told.get("where")):
        said.append(where)
    return said + _word_sentences(told["words"])


def _word_sentences(words: Sequence[Mapping[str, Any]]) -> list[str]:
    sorted_out: dict[str, list[str]] = {kind: [] for kind, _ in _WORD_KINDS}
    for word in words:
        kind = "lost" if word["lost"] else "known" if word["known"] else "unknown"
        sorted_out[kind].append(visible(word["text"], 24))
    return [
        f"Watched words, {label}: {listed(sorted_out[kind], len(sorted_out[kind]))}."
        for kind, label in _WORD_KINDS
        if sorted_out[kind]
    ]


def _share_table(told: Mapping[str, Any], kind: str) -> Grid:
    """Groups or classes with their intervals, the worst first."""
    two = "outright" in told
    value, count = ("retained", "known") if two else ("repeated", "asked")
    counted = "base repeats" if two else "asked"
    grid = Grid([Column("", words=True), Column(counted, spare=1), Column(value), Column("from", spare=2),
                 Column("to", spare=2)])  # fmt: skip
    numbers = told["numbers"]
    whole = (numbers.get(count), numbers.get(value), numbers.get(f"{value}_low"), numbers.get(f"{value}_high"))
    if kind == "groups":
        grid.add(label_of("all"), *_share_cells(*whole), end=True)
    parts = list(told[kind].items())
    if kind == "groups":
        parts.sort(key=lambda item: 2.0 if item[1][value] is None else item[1][value])
    for name, part in parts:
        if part[count]:
            grid.add(label_of(name), *_share_cells(part[count], part[value], part["low"], part["high"]))
    return grid


def _share_cells(count: float | None, value: float | None, low: float | None, high: float | None) -> list[str]:
    return ["-" if count is None else f"{count:,.0f}", percent(value), percent(low), percent(high)]


def _token_table(tokens: Sequence[Mapping[str, Any]]) -> Grid:
    two = any("probability_at_base" in token for token in tokens)
    counted = any(token["data_target"] is not None for token in tokens)
    columns = [Column("id"), Column("token", words=True), Column("group", words=True, spare=1)]
    columns += [Column("base", spare=2)] if two else []
    columns += [Column("prob."), Column("says instead", words=True, spare=1)]
    columns += [Column("targets", spare=3)] if counted else []
    grid = Grid(columns)
    for token in tokens:
        cells = [str(token["id"]), visible(token["text"], 24), label_of(token["group"])]
        cells += [number(token["probability_at_base"], 3)] if two else []
        cells += [number(token["probability"], 3)]
        cells += ["" if token["instead"] is None else visible(token["instead"], 24)]
        cells += ["-" if token["data_target"] is None else f"{token['data_target']:,}"] if counted else []
        grid.add(*cells)
    return grid


def where_sentence(where: Mapping[str, int] | None) -> str:
    """What brings lost tokens back, in words; empty where that is not known.

    >>> where_sentence({"forgotten": 12, "head": 11, "input": 0, "body": 1})
    "Of 12 lost tokens probed again, 11 come back with the base's output row, 1 with no row: lost in the body."
    """
    if not where or not where["forgotten"]:
        return ""
    ways = (("head", "with the base's output row"), ("input", "with its input row too"),
            ("other_rows", "only with the rows of all tokens: other rows drown them"),
            ("body", "with no row: lost in the body"))  # fmt: skip
    first, *others = ((where[key], words) for key, words in ways if where.get(key))
    parts = [f"{first[0]:,} {'comes' if first[0] == 1 else 'come'} back {first[1]}"]
    parts += [f"{count:,} {words}" for count, words in others]
    return f"Of {where['forgotten']:,} lost tokens probed again, {', '.join(parts)}."
