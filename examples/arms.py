"""One arm of the comparison: the same base, rows and order, fine-tuned with one preset of the guard, then measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copying import ECHO_INSTRUCTIONS
from evaluate import Answers, arm_entry, ask
from finetune import fine_tune, load_base, training_rows

from vocabguard.guard import VocabGuard
from vocabguard.vocabulary.table import VocabTable, build_table

PRESETS = {"control": "watch"}
"""Arms that are not called like their preset."""

CADENCE = ("drift.every_n_steps=10", "probe.every_n_steps=50")
"""Fixed, and denser than the 1 % of the time that the guard would choose: both trainers tell the story step by step."""


@dataclass(frozen=True)
class Arm:
    """What an arm did.

    Attributes:
        entry: its part of the JSON.
        tuned: what the tuned model says.
        guard: the guard after the run.
        table: groups and live rows; the guard has set the never-trained rows apart.
    """

    entry: dict[str, Any]
    tuned: Answers
    guard: VocabGuard
    table: VocabTable


def base_answers() -> Answers:
    """What the base says."""
    model, tokenizer = load_base()
    return ask(model, tokenizer, whole_table(model, tokenizer))


def whole_table(model: Any, tokenizer: Any) -> VocabTable:
    """All rows, the never-trained ones among them: every arm is asked for the same tokens in the same lists."""
    return build_table(tokenizer, model.get_output_embeddings().weight.shape[0])


def callback_for(trainer: str, config: str, overrides: list[str], **options: Any) -> Any:
    """The one object that a user adds to a trainer."""
    if trainer == "hf":
        from vocabguard.integrations.huggingface import VocabGuardCallback
    else:
        from vocabguard.integrations.lightning import VocabGuardCallback
    return VocabGuardCallback(
        config, overrides=[*CADENCE, *overrides], echo={"instructions": list(ECHO_INSTRUCTIONS)}, **options
    )


def run_arm(
    name: str,
    base: Answers,
    *,
    folder: Path,
    trainer: str = "hf",
    steps: int = 300,
    seed: int = 0,
    overrides: list[str] | None = None,
    **options: Any,
) -> Arm:
    """Fine-tune one arm and measure it.

    Args:
        name: ``control``, or a preset's name or a YAML file.
        base: what the base says.
        folder: for logs.
        trainer: ``hf`` or ``lightning``.
        steps: optimizer steps.
        seed: of the data's order and of the trainer.
        overrides: dotted settings.
        **options: sections of the configuration.
    """
    model, tokenizer = load_base()
    rows = training_rows(tokenizer, steps, seed)
    callback = callback_for(trainer, PRESETS.get(name, name), overrides or [], **options)
    positions = []

    def count(module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            positions.append(kwargs["input_ids"].numel())

    model.register_forward_pre_hook(count, with_kwargs=True)
    began, worked = time.perf_counter(), time.process_time()
    # Questions in many languages are asked at evaluations: without them none are needed.
    evaluate_every = -(-steps // 3) if callback.guard.config.confusion.enabled else 0
    fine_tune(
        model, tokenizer, rows, trainer=trainer, callbacks=[callback], folder=folder, seed=seed,
        evaluate_every=evaluate_every,
    )  # fmt: skip
    seconds = {"wall_seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    guard: VocabGuard = callback.guard
    if guard.last is None or guard.table is None:
        raise SystemExit(f"the guard disabled itself: {guard.failure}")
    seconds |= costs(guard)
    table, tuned = guard.table, ask(model, tokenizer, whole_table(model, tokenizer))
    return Arm(arm_entry(guard.last, base, tuned, table, sum(positions), seconds), tuned, guard, table)


def costs(guard: VocabGuard) -> dict[str, float]:
    """What the guard took of the training's time, by its own clock; the probes alone by the process's clock too."""
    return {
        "guard_seconds": guard.timings.total,
        "probes": guard.timings.probes,
        "probe_seconds": guard.timings.probing,
        "probe_cpu_seconds": guard.timings.probing_cpu,
    }
