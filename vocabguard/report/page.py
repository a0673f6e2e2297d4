"""The report page: one HTML file that needs no network, with its style and script inside.

The page works without its script, which only sorts and searches. Nothing of a run reaches the script or the style: all
data are escaped text and attributes of the document, and a Content-Security-Policy allows the page's own script and
style by their hashes and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import math
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import regex
from markupsafe import Markup

from vocabguard.files import write_file
from vocabguard.installation import VERSION
from vocabguard.report.alerts import alert_timeline, told_of
from vocabguard.report.charts import exposure_figure, forecast_figures, histograms, length_figure, timelines
from vocabguard.report.compare import compare
from vocabguard.report.data import EchoDone, PageData, TextOf, TokenLine, run_data
from vocabguard.report.either import lost_in_either, markdown_of_two
from vocabguard.report.first import (
    badge_of,
    firing_advice,
    first_tokens,
    heading_of,
    main_chart,
    markdown_of,
    short_name,
)
from vocabguard.report.limits import Limits
from vocabguard.report.many import distinct_names, side_by_side
from vocabguard.report.sentences import beside_label, decisive_numbers, key_numbers, verdict_of
from vocabguard.runlog import RunLog
from vocabguard.text import WORST_COLUMNS, number, percent, token_cells, visible
from vocabguard.vocabulary.labels import label_of

# Controls that HTML forbids or that reorder the text around them, and halves of surrogate pairs, which UTF-8 has not.
_UNSAFE = regex.compile(r"[\p{Cc}\p{Cs}\p{Bidi_Control}\ufeff\ufffe\uffff--[\n\t]]", regex.VERSION1)
_TEMPLATE = "report.html.j2"
_ORDER = (
    "token", "said now", "says instead", "group", "class", "targets", "cosine", "prob.", "residual", "inputs",
    "since target", "id",
)  # fmt: skip
"""Columns of the table of tokens: what decides comes first, where a phone shows it."""
_NUMERIC = frozenset({"id", "cosine", "residual", "targets", "inputs", "since target", "prob."})


def write_report(
    log: RunLog | str | Path, path: str | Path, *, text: TextOf | None = None, limits: Limits | None = None
) -> Path:
    """Write the report page of a run.

    Args:
        text: the text of any id, such as `VocabTable.text`; None knows only the tokens that the log names.
        limits: from where on a finding counts; None takes the defaults of `Limits`.


    Raises:
        FileNotFoundError: if there is no run folder.
        ValueError: if it cannot be read.
    """
    opened = log if isinstance(log, RunLog) else RunLog.open(log)
    return write_page(render(run_data(opened, text), limits=limits), path)


def write_page(page: str, path: str | Path) -> Path:
    """Write a rendered page; its folder is made if missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, page)
    return path


def render(
    first: PageData, second: PageData | None = None, *more: PageData, limits: Limits | None = None
) -> str:  # fmt: skip
    """The page as text; without limits by the defaults of `Limits`.

    One run has a page of its own, two are compared token by token, more are a table.
    """
    limits = limits or Limits()
    shown = (first,) if second is None else (first, second, *more)
    common = _frame(shown)
    if more:
        return _environment().get_template("report_many.html.j2").render(many=side_by_side(shown, limits), **common)
    return (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            sources=[_source(data, place, len(shown), limits) for place, data in enumerate(shown)],
            heading=heading_of(first, verdict_of(first, limits)),
            **_both(first, second, limits),
            histograms=histograms(first, second),
            exposure=exposure_figure(first, second),
            lengths=length_figure(first, second),
            forecasts=forecast_figures(first) if second is None else (),
            timelines=timelines(first, second),
            **common,
        )
    )


def _both(first: PageData, second: PageData | None, limits: Limits) -> dict[str, Any]:
    """What the template shows of two runs together; None where there is one."""
    if second is None:
        return {"both": None, "either": None, "markdown": ""}
    both = compare(first, second)
    either = None if both.unmatched else lost_in_either(first, second)
    return {"both": both, "either": either, "markdown": markdown_of_two(both, (first, second), either, limits)}


def _frame(shown: Sequence[PageData]) -> dict[str, Any]:
    """What every page has: title, policy, script, style."""
    script, style = _part("report_script.html.j2"), _part("report_style.html.j2")
    return {
        "title": f"vocabguard: {' and '.join(distinct_names([data.name for data in shown]))}",
        "policy": f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        "script": Markup(script),
        "style": Markup(style),
        "version": VERSION,
    }


def _source(data: PageData, place: int, count: int, limits: Limits) -> dict[str, Any]:
    """What the template shows of one run alone."""
    told = told_of(data)
    verdict, tokens, advice = verdict_of(data, limits), first_tokens(data), firing_advice(data)
    return {
        "data": data,
        "mark": "AB"[place] if count > 1 else "",
        "key": f"run-{'ab'[place]}",
        "name": short_name(data.name),
        "verdict": verdict,
        "badge": badge_of(data, verdict),
        "decisive": decisive_numbers(data),
        "first": tokens,
        "advice": advice,
        "commands": [one for one in data.commands if not one.command.startswith("vocabguard report")],
        "chart": main_chart(data) if count == 1 else None,
        "markdown": markdown_of(data, verdict, tokens, advice),
        "fired": f"{len(told)} fired, {len(data.firing)} firing at the end" if told else "none fired",
        "numbers": key_numbers(data),
        "told": told,
        "alert_timeline": alert_timeline(data, told),
        "quiet": [rule for rule in data.rules if rule not in {change.rule for change in data.alerts}],
        "columns": [(name, name in _NUMERIC) for name in _columns(data)],
        "lines": [_line(line, _columns(data)) for line in data.tokens],
        "groups": sorted({line.report.group for line in data.tokens}, key=label_of),
        "echo_rows": _echo_rows(data.echo),
    }


def _columns(data: PageData) -> tuple[str, ...]:
    """Columns of the table of tokens: what was not measured at all has none."""
    rows, probed = data.rows, data.probed
    if rows is None:
        return tuple(sorted(WORST_COLUMNS, key=_ORDER.index))
    known = {
        "class": rows.classes is not None,
        "targets": rows.targets is not None,
        "inputs": rows.inputs is not None,
        "since target": rows.last_target is not None,
        "prob.": probed is not None,
        "says instead": probed is not None,
        "said now": probed is not None,
    }
    return tuple(name for name in _ORDER if known.get(name, True))


def _line(line: TokenLine, columns: Sequence[str]) -> dict[str, Any]:
    """One token: cells as text, values to sort by, what the search looks through."""
    report = line.report
    cells = token_cells(report)
    keys = (
        report.id, None, None, None, report.cosine, report.residual, report.data_target, report.inputs,
        report.steps_since_target, report.probability, None,
    )  # fmt: skip
    state = {None: "not asked", True: "yes", False: "no"}[line.said]
    known = {name: (name, cell, _sort_key(key)) for name, cell, key in zip(WORST_COLUMNS, cells, keys, strict=True)}
    known["said now"] = ("said now", state, "")
    return {
        "cells": [known[name] for name in columns],
        "group": report.group,
        "state": state,
        "watched": line.watched,
        # Precomposed, as people type.
        "find": unicodedata.normalize("NFC", f"{report.id} {cells[1]} {label_of(report.group)} {cells[-1]}").lower(),
    }


def _sort_key(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.9g}"


def _echo_rows(echo: EchoDone | None) -> list[tuple[str, int]]:
    """Echo targets by group, most first, then by class; those with none left out."""
    if echo is None:
        return []
    groups = sorted(echo.by_group.items(), key=lambda pair: -pair[1])
    return [(name, count) for name, count in (*groups, *echo.by_class.items()) if count]


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vocabguard.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        finalize=_clean, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "number": number, "visible": visible}
    environment.filters |= {"label_of": label_of, "beside_label": beside_label}
    return environment


def _clean(value: Any) -> Any:
    """Text whose characters a page can hold and show: unsafe ones become their escapes."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), value)


@cache
def _part(name: str) -> str:
    """A part of the page that is taken as it is, with the newlines that a browser hashes."""
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0].replace("\r\n", "\n")


def _hash(part: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(part.encode('utf-8')).digest()).decode('ascii')}"
