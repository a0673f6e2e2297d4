"""``vocabguard repair BASE TUNED --out DIR``: puts lost rows right without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import Tensor

from vocabguard.cli import scan as scanning
from vocabguard.cli.app import InputError
from vocabguard.offline.explain import load_model
from vocabguard.offline.repair import METHODS, STRENGTH, check_out, lost_rows, plan_repair, write_repaired
from vocabguard.offline.repair_measure import recall_of, text_loss
from vocabguard.offline.scan import Scan
from vocabguard.views.wording import number, percent


def repair(
    base: scanning.Base,
    tuned: scanning.Tuned,
    out: Annotated[Path, typer.Option(help="Folder for the repaired model; new or empty.")],
    method: Annotated[
        str, typer.Option(help="shift: base rows plus a part of the mean shift of their class; rows: plain base rows.")
    ] = "shift",
    strength: Annotated[float, typer.Option(min=0, max=1, help="Part of the mean shift that is added.")] = STRENGTH,
    cosine_below: Annotated[float, typer.Option(min=-1, max=1, help="Rows to repair, without counts.")] = 0.95,
    targets_below: Annotated[int, typer.Option(min=1, help="Rows to repair, by counts of data targets.")] = 20,
    tokenizer: scanning.Tokenizer = None,
    head: scanning.HeadKey = None,
    embedding: scanning.EmbeddingKey = None,
    coverage: scanning.Coverage = None,
    run: scanning.Run = None,
    text: Annotated[Path | None, typer.Option(help="A text whose loss is measured before and after.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Live tokens to ask for before and after; 0: all.")] = 2048,
    ask: Annotated[bool, typer.Option(help="Load the models and measure recall and loss.")] = True,
    as_json: scanning.AsJson = False,
) -> None:
    """Write a copy of TUNED whose lost output rows are made from BASE's.

    Exit code 0: written; 2: bad input.
    """
    if method not in METHODS:
        raise InputError(f"--method is {method!r}; allowed: {', '.join(METHODS)}")
    if text is not None and not text.is_file():
        raise InputError(f"--text {text}: not found")
    pair = scanning.open_pair(base, tuned, tokenizer, head, embedding, coverage, run)
    try:
        check_out(pair.tuned, out)
        found = scanning.measured(pair)
        lost, rule = lost_rows(found, cosine_below, targets_below)
        plan = plan_repair(found, lost, rule, method, strength)
        write_repaired(pair.tuned, plan, out)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    told: dict[str, Any] = {"out": str(out), "method": method, "rows": len(plan.ids), "chosen_by": rule}
    told |= _measured(found, pair.tokenizer, lost, out, text, sample) if ask else {"not_measured": "--no-ask was given"}
    if as_json:
        print(json.dumps(told, ensure_ascii=False, allow_nan=False))
    else:
        _show(told)


def _measured(found: Scan, tokenizer: Any, lost: Tensor, out: Path, text: Path | None, sample: int) -> dict[str, Any]:
    """Recall and loss of the base, the tuned and the repaired model, or why they were not measured."""
    if tokenizer is None:
        return {"not_measured": "there is no tokenizer to write prompts with"}
    paths = {"base": found.base.path, "tuned": found.tuned.path, "repaired": out}
    told: dict[str, Any] = {}
    try:
        models = {name: load_model(path) for name, path in paths.items() if name != "base" or found.match.by == "id"}
        if "base" in models:
            told["recall"] = recall_of(models, found, tokenizer, lost, sample)
        if text is not None:
            told["loss"] = {name: text_loss(model, tokenizer, text) for name, model in models.items()}
    except ValueError as error:
        return told | {"not_measured": str(error)}
    return told if told else {"not_measured": "the base has another vocabulary, so both cannot be asked alike"}


def _show(told: dict[str, Any]) -> None:
    said = [f"{told['rows']:,} output rows replaced ({told['chosen_by']}; method {told['method']}): {told['out']}"]
    recall, loss = told.get("recall"), told.get("loss")
    if recall:
        said.append(
            f"recall of {recall['said_at_base']:,} tokens that the base says: tuned {percent(recall['tuned'])}, "
            f"repaired {percent(recall['repaired'])}; {percent(recall['returned'])} of the loss returned"
        )
    if loss:
        change = loss["repaired"] / loss["tuned"] - 1
        said.append(
            f"loss on the text: tuned {number(loss['tuned'])}, repaired {number(loss['repaired'])} "
            f"({100 * change:+.2f} %)"
        )
    if "not_measured" in told:
        said.append(f"Not measured: {told['not_measured']}.")
    for line in said:
        Console(highlight=False, markup=False, soft_wrap=True).print(line)
