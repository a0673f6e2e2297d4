"""``vocabguard/cli/README.md``: options of every command and fields of every ``--json``, written from the code.

``python tests/kits/command_page.py`` writes it; tests hold it current.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from vocabguard.cli import app

README = Path(__file__).parents[2] / "vocabguard" / "cli" / "README.md"

MEANINGS = {
    "schema": "version of these fields", "findings": "whether anything is over its threshold, or a sentence each",
    "verdict": "the outcome in words", "level": "`fine`, `drifted`, `lost` or `unknown`",
    "live": "live tokens: reachable, trained at the base, not special", "tokens": "number of tokens",
    "groups": "by script group", "classes": "by how often a token is a target: never, 1-4, 5-19, 20+",
    "cosine_mean": "mean cosine of rows to the base's", "cosine_min": "lowest cosine",
    "cosine_p01": "cosine below which 1 % of the rows are", "residual_p01": "the same without the mean displacement",
    "below_0.95": "share of live rows below cosine 0.95", "below_0.90": "share below 0.90",
    "retained": "share of the tokens that the base repeats that are repeated now",
    "lost": "repeated at the base, not now", "gained": "repeated now, not at the base",
    "data_target": "times a token is a target of the data", "inputs": "times it is read",
    "never_share": "share of live tokens that are never a target", "id": "token id", "text": "what the token says",
    "group": "script group", "cosine": "cosine of the row to the base's", "residual": "cosine without the mean shift",
    "l2": "length of the displacement", "norm_ratio": "norm now over norm at the base",
    "judged": "matrix of the verdict",
    "tied": "whether input and output rows are one matrix",
    "base": "the model before training",
    "tuned": "the model after training", "threshold": "share over which the exit code is 1",
    "seconds": "time that it took", "device": "device and number format", "evidence": "hashes, versions, arguments",
    "not_measured": "what the verdict does not cover", "not_applicable": "why there is no measurement",
    "at_risk": "tokens with the fewest targets", "source": "what was counted", "step": "optimizer step",
    "page": "the page that was written", "out": "what was written", "method": "how rows were repaired",
    "rows": "number of rows", "files": "files, by name", "where": "which base rows bring lost tokens back",
    "firing": "rules that fire", "probe": "what the model repeats", "body": "the layers between the rows",
    "worst": "tokens with the lowest cosine", "matched": "how rows were matched", "unmet_share": "share still in need",
    "nonfinite_rows": "rows with NaN or Inf", "zeroed_rows": "rows that are zero now and were not at the base",
    "forecast": "share that may be below 0.95 at the end", "comparison": "of two sources", "kind": "of the source",
    "said": "whether it is repeated", "probability": "of the right token", "instead": "what is said instead",
    "diagnosis": "what happened to the token", "advice": "what helps", "targets": "targets in all",
}  # fmt: skip
"""What fields mean, by their last name."""


def options_part() -> str:
    """A section a command: what it does and its options."""
    group: Any = typer.main.get_command(app.build(tuple(app.COMMANDS)))
    parts = []
    for name, command in group.commands.items():
        lines = [f"### `vocabguard {name}`", "", inspect.cleandoc(command.help or ""), ""]
        lines += ["| option | default | |", "|---|---|---|"]
        lines += [_option(one) for one in command.params if not getattr(one, "hidden", False)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _option(one: Any) -> str:
    is_argument = one.param_type_name == "argument"
    names = (
        f"`{one.name.upper()}`" if is_argument else ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
    )
    unset = one.default is None or one.default is False or one.default == ()
    default = "required" if one.required else "" if unset else f"`{one.default}`"
    help_ = " ".join((one.help or "").split()).replace("|", "\\|")
    return f"| {names} | {default} | {help_} |"


def json_part(found: Mapping[str, Any]) -> str:
    """A table a command: the fields that ``--json`` may print.

    Args:
        found: command lines, and the fields of each under ``has``.
    """
    by_command: dict[str, set[str]] = {}
    for line, fields in found.items():
        by_command.setdefault(line.split()[0], set()).update(fields["has"])
    parts = []
    for name in (one for one in app.COMMANDS if one in by_command):
        rows = [f"| `{field}` | {_meaning(field)} |" for field in sorted(_shortest(by_command[name]))]
        parts.append("\n".join([f"### `vocabguard {name} --json`", "", "| field | |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _shortest(fields: Iterable[str]) -> set[str]:
    """Without the paths of lists where those of their items are there."""
    every = set(fields)
    return {field for field in every if f"{field}[]" not in every}


def _meaning(field: str) -> str:
    return MEANINGS.get(re.sub(r"\[\]|/\*", "", field).split("/")[-1], "")


def with_part(text: str, name: str, part: str) -> str:
    """A page with the text between a part's marks replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{part}\n\n{end}{after}"


def main() -> None:
    """Write the page anew."""
    import tempfile

    import kept

    with tempfile.TemporaryDirectory() as folder:
        found = kept.facts(Path(folder))["command_line"]()["json"]
    text = with_part(README.read_text(encoding="utf-8"), "options", options_part())
    README.write_text(with_part(text, "json", json_part(found)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
