"""Watch a fine-tune forget tokens: the embedded multilingual base is tuned on English chats, and loses other words.

``python examples/sparse_token_forgetting.py`` runs in under two minutes on 2 cores, offline. What it tells, in order:
what the data will never ask for, how the output rows drift, which alerts fire, and in the end which tokens the model
can no longer say, by group and by exposure class, with names.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from evaluate import arm_entry, base_entry, recall, validation_loss
from finetune import BATCH, TRAINERS, fine_tune, load_base, training_rows
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vocabguard.guard import VocabGuard
from vocabguard.measure.probe import said, said_instead
from vocabguard.results import EXPOSURE_CLASSES, ProbeResult
from vocabguard.vocabulary import VocabTable, build_table

console = Console(highlight=False)

CADENCE = ("drift.every_n_steps=10", "probe.every_n_steps=50")
"""Fixed, and denser than the 1 % of the time that the guard would choose: both trainers tell the story step by step."""


def callback_for(trainer: str, config: str, overrides: list[str]) -> Any:
    """The one object that a user adds to a trainer."""
    if trainer == "hf":
        from vocabguard.integrations.huggingface import VocabGuardCallback
    else:
        from vocabguard.integrations.lightning import VocabGuardCallback  # type: ignore[assignment]
    return VocabGuardCallback(config, overrides=[*CADENCE, *overrides])


def run_arm(name: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fine-tune one arm and measure it: (base entry, arm entry) of the JSON."""
    console.rule(f"[bold]{name}[/], {arguments.trainer}, {arguments.steps} steps, seed {arguments.seed}")
    model, tokenizer = load_base()
    rows = training_rows(tokenizer, arguments.steps, arguments.seed)
    callback = callback_for(arguments.trainer, arguments.config, arguments.overrides)
    folder = arguments.logdir / f"{name}-{arguments.trainer}"
    every_token = build_table(tokenizer, model.get_output_embeddings().weight.shape[0])
    base_loss, base = validation_loss(model, tokenizer), recall(model, tokenizer, every_token)
    began = time.perf_counter()
    fine_tune(
        model, tokenizer, rows, trainer=arguments.trainer, callbacks=[callback], folder=folder, seed=arguments.seed
    )
    wall = time.perf_counter() - began
    guard: VocabGuard = callback.guard
    if guard.last is None or guard.checker is None:
        raise SystemExit(f"the guard stood down: {guard.faults.reason}")
    # The guard has set the never-trained rows apart: they are not asked for.
    table = guard.checker.watched.table
    base, now = only(base, table.live), only(recall(model, tokenizer, every_token), table.live)
    entry = arm_entry(guard.last, base, now, table, validation_loss(model, tokenizer), wall)
    show_table(name, entry, base_loss)
    show_lost(base, now, table, guard.last.classes)
    console.print(f"\nrun folder   {guard.run_dir}\ntensorboard  tensorboard --logdir {arguments.logdir}")
    return base_entry(base, table, guard.last.classes, base_loss), entry


def show_table(name: str, entry: dict[str, Any], base_loss: float) -> None:
    """The report's table: output rows against the base, and what can still be said."""
    table = Table(title=f"Output rows of '{name}' against the base, live tokens", title_justify="left")
    table.add_column("")
    for column in ("tokens", "mean cos", "min cos", "< 0.95", "< 0.90", "retained"):
        table.add_column(column, justify="right")
    head, kept = entry["head"], entry["retained"]
    lines = [("all", sum(entry["tokens"]["groups"].values()), head, kept["all"])]
    for kind in ("groups", "classes"):
        lines += [
            (part, count, head[kind][part], kept[kind][part]) for part, count in entry["tokens"][kind].items() if count
        ]
    for number, (part, count, numbers, share) in enumerate(lines):
        table.add_row(
            part,
            f"{count:,}",
            f"{numbers['cosine_mean']:.4f}",
            f"{numbers['cosine_min']:.4f}",
            f"{numbers['below_0.95']:.1%}",
            f"{numbers['below_0.90']:.1%}",
            f"{share:.1%}",
            end_section=number in (0, len(entry["tokens"]["groups"])),
        )
    console.print(table)
    console.print(f"validation loss {base_loss:.3f} -> {entry['val_loss']:.3f}   {entry['wall_seconds']:.0f} s")


def show_lost(base: ProbeResult, now: ProbeResult, table: VocabTable, classes: torch.Tensor, most: int = 12) -> None:
    """Tokens that the base could say in both held-out templates and the tuned model can in neither."""
    lost = said(base) & ~now.emitted.any(dim=1)
    order = torch.where(lost, now.probability.mean(dim=1), 2.0).argsort()[: min(most, int(lost.sum()))]
    instead = said_instead(now)
    lines = Table(title=f"{int(lost.sum()):,} tokens lost in both templates; the most certain", title_justify="left")
    for column in ("token", "id", "group", "class", "says instead"):
        lines.add_column(column)
    for row in order.tolist():
        token = int(now.ids[row])
        kind = EXPOSURE_CLASSES[int(classes[token])]
        shown = [repr(table.text(token)), str(token), table.group_of(token), kind, repr(table.text(int(instead[row])))]
        lines.add_row(*map(escape, shown))
    console.print(lines)


def only(result: ProbeResult, live: torch.Tensor) -> ProbeResult:
    """The part of a result that is about live tokens; both recalls ask for the same lists, so they stay comparable."""
    kept = live[result.ids]
    parts = (result.ids, result.emitted, result.probability, result.rank, result.instead)
    return ProbeResult(result.contexts, *(part[kept] for part in parts))


def main() -> None:
    """Run the arms that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=sorted(TRAINERS), default="hf")
    parser.add_argument("--arms", default="control", help="comma-separated; today: control")
    parser.add_argument("--config", default="watch", help="a preset or a YAML file")
    parser.add_argument("--logdir", type=Path, default=Path("runs"))
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300, help=f"optimizer steps of {BATCH} rows")
    parser.add_argument("overrides", nargs="*", help="dotted settings, e.g. drift.every_n_steps=10")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for name in arguments.arms.split(","):
        if name != "control":
            parser.error(f"--arms is {name!r}; allowed: control")
        found["base"], found[name] = run_arm(name, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
