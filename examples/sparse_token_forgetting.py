"""Watch a fine-tune forget tokens, and keep it from it: the embedded multilingual base is tuned on English chats.

``python examples/sparse_token_forgetting.py`` runs two arms on the same rows in under four minutes on 2 cores, offline:
``control`` is watched only, ``hold_echo`` is held and echoed. What it tells of each, in order: what the data will never
ask for, how the output rows drift, which alerts fire, and in the end which tokens the model can no longer say, by group
and by exposure class, with names. Then both side by side.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from arms import Arm, base_answers, run_arm
from evaluate import Answers, base_entry, only
from finetune import BATCH, TRAINERS
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vocabguard.config import presets
from vocabguard.measure.retention import said, said_instead
from vocabguard.results import EXPOSURE_CLASSES, ProbeResult
from vocabguard.vocabulary.table import VocabTable

console = Console(highlight=False)


def show_arm(name: str, arm: Arm, base: Answers) -> None:
    """An arm's own tables."""
    show_table(name, arm.entry, base.val_loss)
    assert arm.guard.last is not None
    show_lost(
        only(base.recall, arm.table.live), only(arm.tuned.recall, arm.table.live), arm.table, arm.guard.last.classes
    )
    console.print(f"\nrun folder   {arm.guard.run_dir}")


def show_together(entries: dict[str, dict[str, Any]]) -> None:
    """All arms, a line each: what protection keeps and what it costs."""
    table = Table(
        title="Arms side by side, same rows in the same order",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("arm")
    for column in ("all", *EXPOSURE_CLASSES, "< 0.95", "loss", "rep.", "echo", "s"):
        table.add_column(column, justify="right")
    for name, entry in entries.items():
        kept = entry["retained"]
        shares = [kept["all"], *(kept["classes"].get(kind, math.nan) for kind in EXPOSURE_CLASSES)]
        table.add_row(
            escape(name),
            *("-" if math.isnan(share) else f"{100 * share:.1f}" for share in shares),
            f"{100 * entry['head']['below_0.95']:.1f}",
            f"{entry['val_loss']:.3f}",
            f"{100 * entry['repetition']:.1f}",
            f"{entry['echo']['targets_per_live_token']:.2f}",
            f"{entry['wall_seconds']:.0f}",
        )
    console.print(table)
    console.print(
        "all, never, ... 20+: retained, in %; < 0.95: live rows, in %; loss and rep.: on held-out chats, rep. the "
        "share of answers that repeat the question, in %; echo: targets a token; s: seconds of training"
    )


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


def main() -> None:
    """Run the arms that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=sorted(TRAINERS), default="hf")
    parser.add_argument("--arms", default="control,hold_echo", help="comma-separated: control, presets, YAML files")
    parser.add_argument("--logdir", type=Path, default=Path("runs"))
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300, help=f"optimizer steps of {BATCH} rows")
    parser.add_argument("overrides", nargs="*", help="dotted settings, e.g. drift.every_n_steps=10")
    arguments = parser.parse_args()
    names = arguments.arms.split(",")
    for name in names:
        if name != "control" and name not in presets() and not Path(name).is_file():
            parser.error(f"--arms has {name!r}; allowed: control, a YAML file, or one of {list(presets())}")
    base = base_answers()
    found: dict[str, Any] = {}
    for name in names:
        console.rule(f"[bold]{escape(name)}[/], {arguments.trainer}, {arguments.steps} steps, seed {arguments.seed}")
        arm = run_arm(
            name,
            base,
            folder=arguments.logdir / f"{Path(name).stem}-{arguments.trainer}",
            trainer=arguments.trainer,
            steps=arguments.steps,
            seed=arguments.seed,
            overrides=arguments.overrides,
        )
        show_arm(name, arm, base)
        assert arm.guard.last is not None
        found["base"], found[name] = base_entry(base, arm.table, arm.guard.last.classes), arm.entry
    show_together(found)
    console.print(f"tensorboard  tensorboard --logdir {arguments.logdir}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
