"""Write the parts of the READMEs that come from the code: ``python tests/kits/documents.py``."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from docstring_parser import parse

from vocabguard.alerts import AlertRule
from vocabguard.config.schema import GuardConfig, RuleConfig, default_rules
from vocabguard.views.keys import MEANINGS

ROOT = Path(__file__).parents[2]
LONGEST_DEFAULT = 48


def _cell(text: Any) -> str:
    """One line that a Markdown table takes."""
    return re.sub(r"\s+", " ", str(text).replace("``", "`")).replace("|", r"\|").strip()


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if callable(field.default_factory) else field.default
    if isinstance(value, (list, dict)) and len(repr(value)) > LONGEST_DEFAULT:
        return f"{len(value)} entries"
    return "`" + yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...") + "`"


def _allowed(limits: Mapping[str, Any]) -> str:
    if "choices" in limits:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    least, most = limits.get("at_least"), limits.get("at_most")
    if least is not None and most is not None:
        return f"{least} to {most}"
    if least is not None:
        return f"{least} or more"
    return f"holds `{limits['holds']}`" if "holds" in limits else ""


def _meanings(documented: type) -> dict[str, str]:
    """Field -> meaning, from the docstring of a class."""
    return {one.arg_name: one.description or "" for one in parse(documented.__doc__ or "").params}


def _rows(section: type, prefix: str) -> Iterator[str]:
    """A line a setting; nested sections follow under their own prefix."""
    meanings = _meanings(section)
    for field in dataclasses.fields(section):
        inner = field.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from _rows(inner, f"{prefix}{field.name}.")
        else:
            cells = f"`{prefix}{field.name}`", _default(field), _allowed(field.metadata), meanings[field.name]
            yield f"| {' | '.join(map(_cell, cells))} |"


HEAD = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]


def settings() -> Iterator[str]:
    """Every setting but the rules: a table a section."""
    plain = []
    for field in dataclasses.fields(GuardConfig):
        section = field.default_factory
        if not (isinstance(section, type) and dataclasses.is_dataclass(section)):
            plain.append(field.name)
            continue
        yield from (f"#### `{field.name}`", "", (section.__doc__ or "").partition("\n\n")[0].strip(), "", *HEAD)
        yield from (*_rows(section, f"{field.name}."), "")
    yield from ("#### The rest", "", *HEAD)
    meanings = _meanings(GuardConfig)
    fields = {field.name: field for field in dataclasses.fields(GuardConfig)}
    for name in plain:
        if name != "alerts":
            cells = f"`{name}`", _default(fields[name]), _allowed(fields[name].metadata), meanings[name]
            yield f"| {' | '.join(map(_cell, cells))} |"


def rule_fields() -> Iterator[str]:
    """Every field of a rule."""
    meanings = _meanings(AlertRule) | {"enabled": "whether the rule is followed"}
    yield from HEAD
    for field in dataclasses.fields(RuleConfig):
        cells = f"`{field.name}`", _default(field), _allowed(field.metadata), meanings[field.name]
        yield f"| {' | '.join(map(_cell, cells))} |"


def rules() -> Iterator[str]:
    """The rules of every run."""
    yield from ("| rule | fires when | level |", "|---|---|---|")
    for name, rule in default_rules().items():
        beyond = "" if rule.op in {"absent", "unchanged"} else f" {rule.threshold:g}"
        yield f"| `{name}` | `{rule.metric}` {rule.op}{beyond} | {rule.level} |"


def presets() -> Iterator[str]:
    """Each preset by the comment at its top."""
    yield from ("| preset | what it does |", "|---|---|")
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if path.name == "prompts.yaml":
            continue
        comment = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        words = (line.removeprefix("# ") for line in comment if not line.startswith("#   "))
        yield f"| [`{path.stem}`]({path.name}) | {_cell(' '.join(words))} |"


def keys() -> Iterator[str]:
    """Every logged key."""
    yield from ("| key | meaning |", "|---|---|")
    for key, meaning in MEANINGS.items():
        yield f"| `{key}` | {_cell(meaning)} |"


SHOWN = (
    "row: 1 - cosine", "row: L2", "row: L2 seen by softmax", "exposure: few data targets", "exposure: push so far",
    "neighbour: fall of margin at asks", "text, frequent targets: log p now", "text: fall", "copying: log p now",
    "copying: fall", "recall: 128 probed", "recall: 384 probed", "ceiling: four more asks",
)  # fmt: skip
"""Measures of ``real/rows.json`` in the table; the file has all."""


def measures_of_rows() -> Iterator[str]:
    """AUROC of lost against kept tokens by measure, a column a run."""
    runs = json.loads((ROOT / "tests/benchmarks/real/rows.json").read_text(encoding="utf-8"))
    heads = (f"{one['run']} ({one['part']}; {one['lost']} of {one['known']} lost)" for one in runs)
    yield from _head(("measure", *heads))
    for name in SHOWN:
        cells = []
        for one in runs:
            found = one["measures"].get(name)
            cells.append("-" if found is None else "{auroc:.2f} ({low:.2f} to {high:.2f})".format(**found))
        yield f"| {_cell(name)} | {' | '.join(cells)} |"


SHOWN_EARLY = (
    "row: 1 - cosine", "row: L2", "exposure: few data targets", "neighbour: fall of margin at asks",
    "text, frequent targets: log p now", "copying: log p now", "copying: fall", "recall: 128 probed",
    "recall: 384 probed", "logistic: text, copying, fall of copying",
)  # fmt: skip
"""The same of ``real/rows_early.json``."""


def measures_early_in_the_run() -> Iterator[str]:
    """AUROC of what is lost at the end by what is seen at a fifth and at half of a run."""
    runs = json.loads((ROOT / "tests/benchmarks/real/rows_early.json").read_text(encoding="utf-8"))
    by_name: dict[str, dict[int, Mapping[str, Any]]] = {}
    for one in runs:
        by_name.setdefault(one["run"], {})[one["percent"]] = one
    shown = {name: found for name, found in by_name.items() if {20, 50} <= found.keys()}
    heads = (f"{name} ({one[20]['lost']} of {one[20]['known']} lost)" for name, one in shown.items())
    yield from _head(("measure at 20 %, at 50 % of the run", *heads))
    for measure in SHOWN_EARLY:
        cells = (
            ", ".join(f"{one[percent]['measures'][measure]['auroc']:.2f}" for percent in (20, 50))
            for one in shown.values()
        )
        yield f"| {_cell(measure)} | {' | '.join(cells)} |"


def _interval(found: Mapping[str, Any]) -> str:
    """Verdict of a probe, what is lost, and what natural text lost."""
    value, low, high = (100 * one for one in found["lost"])
    rise = "{:+.2f} ({:+.2f} to {:+.2f}) nats".format(*found["nll_rise"])
    words = "".join(f"; {one.partition(':')[0]}" for one in found["findings"] if "watched words" in one)
    return f"{found['level']}: lost {value:.1f} % ({low:.1f} to {high:.1f}) of {found['known']}{words}; text {rise}"


def _head(names: Sequence[str]) -> tuple[str, str]:
    """The two lines that a table begins with."""
    return f"| {' | '.join(names)} |", "|---" * len(names) + "|"


def known_damage() -> Iterator[str]:
    """What the commands said of each damaged copy, and whether it is right."""
    found = json.loads((ROOT / "tests/benchmarks/known_damage.json").read_text(encoding="utf-8"))
    heads = ("copy of SmolLM2 135M", "`scan`", "`probe`", "`scan --probe`", "right", "CPU s of both")
    yield from _head(heads)
    for name, one in found.items():
        if name == "repair":
            continue
        cost = " and ".join(f"{one['cost'][kind]['cpu_s']:.0f}" for kind in ("probe", "scan_probe"))
        right = "yes" if one["right"] else "no"
        cells = (name, one["scan"], _interval(one["probe"]), _interval(one["scan_probe"]), right, cost)
        yield f"| {' | '.join(map(_cell, cells))} |"


def served_models() -> Iterator[str]:
    """What `probe --url` said of each served model, and whether it is right."""
    found = json.loads((ROOT / "tests/rehearsals/results/served.json").read_text(encoding="utf-8"))
    heads = ("server", "asked by", "copy", "verdict", "lost, of the words that the base repeats", "right")
    yield from _head(heads)
    for name, one in found.items():
        server = f"{name} ({', '.join(f'{key} {value}' for key, value in one['versions'].items())})"
        for kind, told in one.items():
            if not isinstance(told, Mapping) or "known" not in told.get("numbers", {}):
                continue
            numbers = told["numbers"]
            low, high = 100 - 100 * numbers["retained_high"], 100 - 100 * numbers["retained_low"]
            lost = f"{100 * numbers['lost']:.0f} % ({low:.0f} to {high:.0f}) of {numbers['known']:.0f}"
            if zeroed := told.get("zeroed"):
                lost += f"; of {zeroed['known']} zeroed ones {zeroed['lost']}"
            cells = (server, told["by"], kind, told["level"], lost, "yes" if one["right"] else "no")
            yield f"| {' | '.join(map(_cell, cells))} |"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


MODELS_HELD_OUT = {
    "embedded": "embedded (128 wide; data and optimizers that fitting never saw)",
    "gemma3": "Gemma 3 270M (640)",
    "smollm2": "SmolLM2 135M (576)",
}
"""Names of models in ``early_travel.json``; those of small bases are ``w`` and their width."""


def forecast_on_other_models() -> Iterator[str]:
    """How the forecast's range holds on models that were left out of its fit."""
    found = json.loads((ROOT / "tests/benchmarks/early_travel.json").read_text(encoding="utf-8"))
    models = {name: one for name, one in found.items() if isinstance(one, Mapping) and "runs" in one}
    models = {**{name: models[name] for name in sorted(models) if name != "all models"}, "all": models["all models"]}
    yield from _head((
        "held out", "runs, looks", "rows inside the 90 % interval (worst and best run)", "by the networks alone",
        "score over networks", 'over "stays as it is"', "over the best law",
        "error of the log angle: range, networks", "AUROC by range, by networks",
    ))  # fmt: skip
    for name, one in models.items():
        worst, best = one["covered, worst and best run"]
        scores = (one[f"score over {other}"] for other in ("networks", "stays as it is", "best law"))
        cells = (
            MODELS_HELD_OUT.get(name, name), f"{one['runs']}, {one['looks']}",
            f"{_percent(one['covered'])} ({_percent(worst, 0)} to {_percent(best, 0)})",
            _percent(one["networks covered"], 0),
            *(f"{score:.2f}" for score in scores), f"{one['error']:.3f}, {one['networks error']:.3f}",
            "" if one["auroc"] is None else f"{one['auroc']:.3f}, {one['networks auroc']:.3f}",
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    by_moment = (
        f"{moment.replace('%', ' %')} of the run {_percent(one['covered'], 0)}"
        for moment, one in found["by moment"].items()
    )
    yield from ("", f"By moment: {', '.join(by_moment)}.")


def words_by_language() -> Iterator[str]:
    """How often the language that ``coverage --languages`` tells of a token is right."""
    return language_table(json.loads((ROOT / "tests/benchmarks/token_languages.json").read_text(encoding="utf-8")))


def language_table(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What ``benchmarks/token_languages.py`` measures, a line for each tokenizer and number of languages."""
    heads = ("tokenizer", "languages to choose from", "words", "judged", "given to a language", "of these right (95 %)")
    yield from _head((*heads, "CPU s"))
    for one in found:
        low, high = one["interval"]
        cells = (
            one["tokenizer"], one["languages"], f"{one['words']:,}", f"{one['judged']:,}", _percent(one["told"], 0),
            f"{_percent(one['right'])} ({100 * low:.1f} to {100 * high:.1f})", f"{one['cpu_seconds']:.1f}",
        )  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |"


PARTS: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "presets": ("configs/README.md", presets),
    "settings": ("configs/README.md", settings),
    "rules": ("configs/README.md", rules),
    "fields of a rule": ("configs/README.md", rule_fields),
    "keys": ("configs/README.md", keys),
    "measures of rows": ("tests/README.md", measures_of_rows),
    "measures early in the run": ("tests/README.md", measures_early_in_the_run),
    "known damage": ("tests/README.md", known_damage),
    "served models": ("tests/README.md", served_models),
    "forecast on other models": ("tests/README.md", forecast_on_other_models),
    "words by language": ("tests/README.md", words_by_language),
}
"""Mark -> file, and what stands there."""


def written(text: str, mark: str, lines: Iterator[str]) -> str:
    """A document with the lines between its two marks.

    Raises:
        ValueError: if the document lacks the marks.
    """
    begin, end = f"<!-- {mark}: by tests/kits/documents.py -->", f"<!-- end of {mark} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{begin} and {end} are missing")
    return f"{before}{begin}\n" + "\n".join(lines).rstrip() + f"\n{end}{after}"


def main() -> None:
    """Write all parts."""
    for mark, (name, lines) in PARTS.items():
        path = ROOT / name
        path.write_text(written(path.read_text(encoding="utf-8"), mark, lines()), encoding="utf-8")


if __name__ == "__main__":
    main()
