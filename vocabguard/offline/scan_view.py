"""A scan's summary in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from vocabguard.views.wording import number, percent, visible

_BARS = " ▁▂▃▄▅▆▇█"
_UNMOVED = 0.9999
_LABELS = {"head": "head", "embedding": "input embedding"}


def show_scan(console: Console, found: Mapping[str, Any], top: int = 20) -> None:
    """Print a `vocabguard.offline.scan_summary.summary`: the verdict, the tables, the worst tokens."""
    for part in _parts(found, top):
        console.print(part, highlight=False, soft_wrap=isinstance(part, Text))


def verdict_of(found: Mapping[str, Any]) -> str:
    """One sentence: how many live rows of which matrix drifted how far."""
    judged = found["judged"]
    if judged is None:
        return f"Not applicable: {found['head']['not_applicable']}."
    numbers, live = found[judged], found["tokens"]["live"]
    if "cosine_mean" not in numbers:
        return f"No live row of the {_LABELS[judged]} could be measured."
    return (
        f"{percent(numbers['below_0.95'])} of {live:,} live rows of the {_LABELS[judged]} are below cosine 0.95, "
        f"{percent(numbers['below_0.90'])} below 0.90; mean {number(numbers['cosine_mean'])}, "
        f"min {number(numbers['cosine_min'])}."
    )


def plain_table(*columns: str, text: Sequence[str] = ()) -> Table:
    """A table in the house's style; columns named in ``text`` are words, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", collapse_padding=True, pad_edge=False)
    for name in columns:
        words = name in text
        # Words wrap, so that they are the first to give way.
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return table


def with_whole_numbers(table: Table) -> Table:
    """The same table, whose columns of numbers never give way to words: where there is little room, texts wrap."""
    for column in table.columns:
        if column.justify == "right":
            column.min_width = max(len(str(cell)) for cell in (column.header, *column.cells))
    return table


def _parts(found: Mapping[str, Any], top: int) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(verdict_of(found), "bold"), *map(Text, _sentences(found))]
    same = all(found["tied"][side] for side in ("base", "tuned"))
    for name in ("head",) if same else ("head", "embedding"):
        parts += _matrix(found, name)
    if found["worst"]:
        parts += ["", Text("worst live tokens, by cosine", "bold"), _tokens(found["worst"][:top])]
    if found["control_moved"]:
        parts += [Text("control tokens that moved most, by L2", "bold"), _tokens(found["control_moved"][:5])]
    return parts


def _sentences(found: Mapping[str, Any]) -> list[str]:
    tokens, matched = found["tokens"], found["matched"]
    said = [f"base {found['base']}", f"tuned {found['tuned']}"]
    line = f"{tokens['rows']:,} rows matched by {matched['by']}"
    if matched["added"] or matched["removed"]:
        line += f"; {matched['added']:,} have no base row, {matched['removed']:,} of the base are gone"
    set_apart = [f"{tokens[key]:,} {key}" for key in ("control", "unreachable", "padded") if tokens[key]]
    if tokens["never_trained"]:
        set_apart.append(f"{tokens['never_trained']:,} never trained at the base")
    if set_apart:
        line += f"; set apart: {', '.join(set_apart)}"
    said.append(f"{line}.")
    tied = [side for side in ("base", "tuned") if found["tied"][side]]
    if tied:
        said.append(f"Tied in the {' and the '.join(tied)}: the embedding is the head.")
    if found["judged"]:
        said.append(f"Residual: without the mean displacement of the {found['residual_over']}.")
    return said


def _matrix(found: Mapping[str, Any], name: str) -> list[RenderableType]:
    numbers = found[name]
    title = Text(f"\n{_LABELS[name]}", "bold")
    if "not_applicable" in numbers:
        return [] if found["judged"] is None else [title, Text(f"not applicable: {numbers['not_applicable']}")]
    if numbers.get("cosine_min", 0.0) >= _UNMOVED:
        return [title, Text("every live row is where it was (cosine above 0.9999)")]
    counts = found["tokens"]["groups"]
    table = plain_table("", "tokens", "mean", "min", "residual p01", "< 0.95", "< 0.90", text=("",))
    table.add_row(*_cells("all", found["tokens"]["live"], numbers), end_section=True)
    groups = sorted(numbers["groups"].items(), key=lambda item: -item[1].get("below_0.95", -1.0))
    for place, (label, part) in enumerate(groups):
        table.add_row(*_cells(label, counts.get(label), part), end_section=place == len(groups) - 1)
    for label, part in numbers.get("classes", {}).items():
        table.add_row(*_cells(f"targets {label}", None, part))
    return [title, Group(with_whole_numbers(table), *map(Text, _asides(numbers)))]


def _asides(numbers: Mapping[str, Any]) -> list[str]:
    said = []
    counts, edges = numbers["l2_histogram"]["counts"], numbers["l2_histogram"]["edges"]
    if counts:
        most = max(counts)
        bars = "".join(_BARS[0 if not n else 1 + round((len(_BARS) - 2) * n / most)] for n in counts)
        said.append(f"L2 0 |{bars}| {edges[-1]:.3g}")
    outliers = numbers["norm_outliers"]
    if outliers["count"]:
        said.append(
            f"{outliers['count']:,} rows with a norm out of line (the median row's is {outliers['median_ratio']:.3f} "
            f"times what it was): ids {outliers['ids'][:8]}"
        )
    said += [
        f"{int(numbers[key]):,} live rows {what}"
        for key, what in (("nonfinite_rows", "with NaN or Inf"), ("zero_rows", "of zeros"))
        if numbers[key]
    ]
    return said


def _cells(label: str, count: int | None, part: Mapping[str, Any]) -> list[str]:
    return [
        label,
        "" if count is None else f"{count:,}",
        number(part.get("cosine_mean")),
        number(part.get("cosine_min")),
        number(part.get("residual_p01")),
        percent(part.get("below_0.95")),
        percent(part.get("below_0.90")),
    ]


def _tokens(tokens: Sequence[Mapping[str, Any]]) -> Table:
    counted = any(token["data_target"] is not None for token in tokens)
    names = ("id", "token", "category", "cosine", "residual", "L2", "norm ratio", "embedding")
    table = plain_table(*names, *(("targets",) if counted else ()), text=("token", "category"))
    for token in tokens:
        cells = [str(token["id"]), visible(token["text"], 24), token["category"]]
        cells += [number(token[key]) for key in ("cosine", "residual", "l2", "norm_ratio", "embedding_cosine")]
        cells += ["-" if token["data_target"] is None else f"{token['data_target']:,}"] if counted else []
        table.add_row(*map(Text, cells))
    return with_whole_numbers(table)
