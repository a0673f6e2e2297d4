"""One fine-tune of the bench: a real model, an arm, a seed; weights every tenth, so that all else is a replay."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from real.data import Row, target_counts, training_rows, validation_rows
from real.models import load_base
from safetensors.torch import save_file
from torch.utils.data import SequentialSampler
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

from vocabguard.integrations.huggingface import VocabGuardCallback

TENTHS = 10
QUIET = {"log": {"tensorboard": False, "report": False}}
ARMS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "control": {"config": "watch"},
    "hold": {"config": "hold"},
    "echo": {"config": "echo"},
    "protect": {"config": "protect"},
    "hold_echo": {"config": "hold_echo"},
    "early": {"config": "early"},
}
"""Arm -> arguments of the callback; None trains without it."""


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned.

    Attributes:
        model: name of `models.SOURCES`.
        untied: whether the output rows get a matrix of their own.
        rate: peak learning rate, after 5 % of warm-up.
        schedule: of transformers.
        beta2: of AdamW, which has no weight decay here.
        batch: rows; `copies` of them are copy tasks.
        longest: tokens of a chat.
        lora: rank of an adapter on all linear layers; 0 trains all weights.
        frozen_head: whether both vocabulary matrices keep still.
    """

    model: str
    untied: bool = False
    rate: float = 1e-3
    schedule: str = "linear"
    beta2: float = 0.95
    steps: int = 120
    batch: int = 4
    copies: int = 1
    longest: int = 48
    lora: int = 0
    frozen_head: bool = False


RECIPES = {
    "tied": Recipe("smollm2"),
    "untied": Recipe("smollm2", untied=True),
    "constant": Recipe("smollm2", untied=True, schedule="constant_with_warmup", steps=100),
    "gemma": Recipe("gemma3", rate=2e-4, steps=60),
    # Ordinary recipes, in which nothing should be said to be lost unless it is.
    "lora": Recipe("smollm2", rate=2e-4, beta2=0.999, lora=16),
    "full2e-5": Recipe("smollm2", rate=2e-5, beta2=0.999),
    "full1e-4": Recipe("smollm2", rate=1e-4, beta2=0.999),
    "frozen": Recipe("smollm2", rate=1e-4, beta2=0.999, frozen_head=True),
}
"""By the names of the command line."""


class Snapshots(TrainerCallback):
    """Saves the weights in bfloat16 at each tenth of the run, and times the steps."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder, self._steps = folder, steps
        self._began = (0.0, 0.0)
        self.seconds: list[tuple[float, float]] = []
        self.saving = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        wall, work = self._began
        self.seconds.append((time.perf_counter() - wall, time.process_time() - work))
        tenth = state.global_step * TENTHS // self._steps
        if tenth > (state.global_step - 1) * TENTHS // self._steps:
            began = time.perf_counter()
            save_weights(model, self._folder / f"weights-{10 * tenth:03d}.safetensors")
            self.saving += time.perf_counter() - began


def save_weights(model: Any, path: Path) -> None:
    """All parameters in bfloat16, a shared one once; an adapter is merged into a copy."""
    if hasattr(model, "merge_adapter"):
        model.merge_adapter()
    named = {name: value for name, value in model.named_parameters() if "lora_" not in name}
    tensors = {name.replace("base_model.model.", "").replace(".base_layer", ""): v for name, v in named.items()}
    save_file({name: value.detach().to(torch.bfloat16).contiguous() for name, value in tensors.items()}, path)
    if hasattr(model, "unmerge_adapter"):
        model.unmerge_adapter()


class Ordered(Trainer):
    """Takes the rows as they come, so that all arms see the same batches."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    """Cross entropy in nats a target."""
    training, total, targets = model.training, 0.0, 0
    model.eval()
    for at in range(0, len(rows), 8):
        batch = DataCollatorForSeq2Seq(tokenizer)(list(rows[at : at + 8]))
        count = int((batch["labels"][:, 1:] != -100).sum())
        total, targets = total + float(model(**batch).loss) * count, targets + count
    model.train(training)
    return total / targets


def prepared(recipe: Recipe, model: Any) -> Any:
    """The model with what the recipe lets learn."""
    if recipe.frozen_head:
        model.get_input_embeddings().weight.requires_grad_(False)
        model.get_output_embeddings().weight.requires_grad_(False)
    if not recipe.lora:
        return model
    from peft import LoraConfig, get_peft_model

    linear = LoraConfig(r=recipe.lora, lora_alpha=2 * recipe.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, linear)


def run(
    cache: Path, name: str, arm: str, seed: int, *, overrides: Sequence[str] = (), label: str | None = None
) -> Path:
    """Train one arm, if it has not been trained yet.

    Args:
        cache: the bench's folder.
        name: of `RECIPES`.
        overrides: settings of the guard beside the arm's, dotted.
        label: what the arm is called with them.

    Returns:
        Its folder: ``run.json``, ``vocabguard/`` and ``weights-<percent>.safetensors``.
    """
    recipe, folder = RECIPES[name], cache / name / f"{label or arm}-{seed}"
    if (folder / "run.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model, tokenizer = load_base(cache, recipe.model, untied=recipe.untied)
    rows = training_rows(
        tokenizer, steps=recipe.steps, batch=recipe.batch, copies=recipe.copies, longest=recipe.longest, seed=seed
    )
    held_out = validation_rows(tokenizer, recipe.longest, 96)
    size = model.get_output_embeddings().weight.shape[0]
    before = mean_loss(model, tokenizer, held_out)
    model = prepared(recipe, model)
    snapshots, options = Snapshots(folder, recipe.steps), ARMS[arm]
    guarded = (
        None if options is None else VocabGuardCallback(**options, overrides=[*overrides, f"seed={seed}"], **QUIET)
    )
    set_seed(seed)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=recipe.steps, per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.rate, lr_scheduler_type=recipe.schedule, warmup_steps=max(1, recipe.steps // 20),
        weight_decay=0.0, adam_beta2=recipe.beta2, logging_steps=20, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, seed=seed,
    )  # fmt: skip
    # The guard's last check is part of the last step's time, so the clock comes after it.
    callbacks = [*([] if guarded is None else [guarded]), snapshots]
    began = time.perf_counter(), time.process_time()
    Ordered(
        model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer, callbacks=callbacks,
    ).train()  # fmt: skip
    found: dict[str, Any] = {
        "recipe": asdict(recipe), "arm": label or arm, "seed": seed, "overrides": list(overrides),
        "loss": [before, mean_loss(model, tokenizer, held_out)],
        "wall": time.perf_counter() - began[0] - snapshots.saving, "cpu": time.process_time() - began[1],
        "step_seconds": snapshots.seconds, "threads": torch.get_num_threads(),
        "data_target": target_counts(rows, size).tolist(),
    }  # fmt: skip
    if guarded is not None:
        guard = guarded.guard
        found |= {"timings": asdict(guard.timings), "latest": guard.latest, "failure": guard.failure}
    (folder / "run.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


def short_run(cache: Path, name: str, callbacks: Sequence[TrainerCallback], *, steps: int, planned: int) -> None:
    """Train a recipe's model without keeping anything of it, for what callbacks measure on the way.

    Args:
        cache: the bench's folder.
        name: of `RECIPES`.
        callbacks: the guard among them, in their order.
        steps: that there is data for.
        planned: optimizer steps that the trainer is told of.
    """
    recipe = RECIPES[name]
    model, tokenizer = load_base(cache, recipe.model, untied=recipe.untied)
    rows = training_rows(
        tokenizer, steps=steps, batch=recipe.batch, copies=recipe.copies, longest=recipe.longest, seed=0
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=planned, per_device_train_batch_size=recipe.batch, learning_rate=1e-5,
            logging_steps=1000, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        Ordered(
            model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer, callbacks=list(callbacks),
        ).train()  # fmt: skip
