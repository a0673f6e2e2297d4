"""``vocabguard repair --method echo``: a short fine-tune in which the guard's own callback echoes the lost tokens.

It begins with the rows that ``shift`` makes. What those leave lost is lost in the body, which no row brings back: so
the body and the head are trained, with as many echo targets as the data beside them has. The input embedding keeps
still, unless it is the head. Of an adapter on a base its own parameters are trained, and nothing else.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vocabguard.compare.options import Loading
from vocabguard.config import EchoConfig, GuardConfig, ProbeConfig
from vocabguard.files import copy_files
from vocabguard.protect.rows import IGNORE

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vocabguard.compare.repair import Plan
    from vocabguard.data.readers import Example

FEWEST_STEPS = 30
"""Steps of a run that has few tokens to echo: fewer would be a jump instead of a fine-tune."""

_CHUNK = 256
_Row = dict[str, list[int]]


@dataclass(frozen=True)
class EchoRun:
    """How the fine-tune goes.

    Attributes:
        targets: echo targets of each lost token.
        learning_rate: AdamW's, linear to 0.
        batch: data rows in a batch; echo rows with as many targets come on top.
        max_length: tokens of a data row; the rest is cut off.
        seed: of the rows' order and of the echo lists.
        instructions: ways of asking in echo rows, each with one ``{tokens}``; none takes the guard's.
        loading: how an adapter's base is loaded; models of their own are trained in float32.
    """

    targets: float = 2.0
    learning_rate: float = 3e-4
    batch: int = 4
    max_length: int = 512
    seed: int = 0
    instructions: tuple[str, ...] = ()
    loading: Loading = field(default_factory=Loading)


def data_rows(examples: Iterable[Example], tokenizer: Any, targets: float, max_length: int) -> list[_Row]:
    """Training rows with about as many targets as asked, or all that there are.

    Args:
        examples: read until there are enough; the loss is on the assistant's turns, on completions, on all of a text.
        targets: targets that are enough.

    Returns:
        ``input_ids`` and ``labels``, rows without targets left out.

    Raises:
        ValueError: for an example that cannot be used, or if there is no target in them.
    """
    from vocabguard.data.encode import TargetEncoder
    from vocabguard.data.readers import in_chunks

    encoder, rows, found = TargetEncoder(tokenizer, max_length=max_length), [], 0
    for encoded in chain.from_iterable(map(encoder.encode, in_chunks(examples, _CHUNK))):
        asked = int(encoded.target.sum())
        if asked:
            labels = [i if wanted else IGNORE for i, wanted in zip(encoded.ids.tolist(), encoded.target, strict=True)]
            rows.append({"input_ids": encoded.ids.tolist(), "labels": labels})
            found += asked
        if found >= targets:
            break
    if not rows:
        raise ValueError("the data beside has no target; allowed: chats with answers, completions or texts")
    return rows


def steps_for(rows: Sequence[_Row], echo_targets: float, batch: int) -> int:
    """Optimizer steps until there were so many echo targets, one for each data target; `FEWEST_STEPS` or more."""
    data_targets = sum(label != IGNORE for row in rows for label in row["labels"])
    return max(FEWEST_STEPS, math.ceil(echo_targets * len(rows) / data_targets / batch))


def train_echo(
    tuned: Path, plan: Plan, live: int, rows: Sequence[_Row], tokenizer: Any, run: EchoRun,
    tell: Callable[[int, int], None], base: Path | None = None,
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """Fine-tune a model in float32, or an adapter on its base.

    Args:
        tuned: its folder; only read.
        plan: the rows it begins with; their tokens are echoed, or all live ones where these are most of them.
        tell: gets the step and the number of steps.
        base: folder of the model that an adapter sits on.

    Returns:
        The model, in its own dtype again, and what was done: ``steps``, ``echo_targets``, ``data_targets``,
        ``learning_rate``, ``input_embedding``, ``seconds``.

    Raises:
        ValueError: if the model cannot be loaded or echo is refused.
    """
    from transformers import set_seed

    from vocabguard.compare.adapted import is_adapter
    from vocabguard.compare.models import load_model

    adapter = is_adapter(tuned)
    model: Any = load_model(tuned, run.loading if adapter else None, base, trainable=True)
    dtype, began = model.dtype, time.perf_counter()
    # PEFT has an adapter's own weights in float32, whatever its base is in.
    moved = "as the adapter has it" if adapter else _begin(model.float(), plan)
    # A list of most of a vocabulary would only slow the configuration down.
    lost = plan.ids.tolist() if 2 * len(plan.ids) < live else []
    steps = steps_for(rows, run.targets * (len(lost) or live), run.batch)
    set_seed(run.seed)
    counts = _train(model, rows, _guard(tokenizer, lost, run), steps, run, tell)
    told = {
        "steps": steps,
        **counts,
        "learning_rate": run.learning_rate,
        "input_embedding": moved,
        "seconds": time.perf_counter() - began,
    }
    return (model.cpu() if adapter else model.to("cpu", dtype)).eval(), told


def _begin(model: Any, plan: Plan) -> str:
    """Put the plan's rows in and let the input embedding keep still; what becomes of it, in words."""
    import torch

    head, inputs = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if plan.rows is not None:
        with torch.no_grad():
            head[plan.ids.to(head.device)] = plan.rows.to(head.device)
    if inputs is head:
        return "shared with the head: moved with it"
    inputs.requires_grad_(False)
    return "unchanged"


def write_trained(model: Any, tuned: Path, out: Path) -> None:
    """Save a trained model or adapter, and beside it what else the tuned folder holds: tokenizer, template and so on.

    Raises:
        OSError: if it cannot be written.
    """
    from vocabguard.compare.adapted import is_adapter, write_adapter
    from vocabguard.compare.repair import weight_files

    if is_adapter(tuned):
        from peft import get_peft_model_state_dict

        write_adapter(tuned, get_peft_model_state_dict(model, save_embedding_layers=False), out)
        return
    copy_files(tuned, out, but=weight_files(tuned))
    model.save_pretrained(out)


def pad(features: Sequence[_Row]) -> dict[str, Tensor]:
    """Rows as one batch, padded on the right: (B, T) int64 ``input_ids``, ``labels`` and ``attention_mask``."""
    import torch
    from torch import nn

    def padded(name: str, fill: int) -> Tensor:
        parts = [torch.as_tensor(row[name], dtype=torch.int64) for row in features]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    ones = nn.utils.rnn.pad_sequence(
        [torch.ones(len(row["input_ids"]), dtype=torch.int64) for row in features], batch_first=True
    )
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORE), "attention_mask": ones}


def own_instructions() -> list[str]:
    """The guard's ways of asking but those in which recall is measured."""
    from vocabguard.protect.prompts import PLACE

    asked = {text.replace(PLACE, "") for way in ProbeConfig().contexts.values() for text in (way.turns or [way.text])}
    return [text for text in EchoConfig().instructions if text.replace(PLACE, "") not in asked]


def _train(
    model: Any, rows: Sequence[_Row], guard: Any, steps: int, run: EchoRun, tell: Callable[[int, int], None]
) -> dict[str, int]:
    """Run the trainer; the targets of echo and of data that it had."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Teller(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:  # noqa: ARG002
            tell(state.global_step, state.max_steps)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=run.batch,
            learning_rate=run.learning_rate, lr_scheduler_type="linear", seed=run.seed, logging_strategy="no",
            save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=list(rows),
            data_collator=pad,
            callbacks=[guard, Teller()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    exposure = guard.guard.last.exposure
    return {"echo_targets": int(exposure.echo_target.sum()), "data_targets": int(exposure.data_target.sum())}


def _guard(tokenizer: Any, lost: list[int], run: EchoRun) -> Any:
    """The callback that echoes the lost tokens, or all live ones where none are named. It does nothing else."""
    from vocabguard.integrations.huggingface import VocabGuardCallback

    return VocabGuardCallback(
        tokenizer=tokenizer,
        echo={
            "enabled": True,
            "mode": "watch" if lost else "uniform",
            "targets_per_live_token": run.targets,
            "dose_limit": 4.0,  # the steps are chosen for a dose of 1, which batches do not keep exactly
            "instructions": list(run.instructions) or own_instructions(),
        },
        probe={"enabled": False, "watch": lost},
        alerts={name: {"enabled": False} for name in GuardConfig().alerts},
        log={"console": False, "tensorboard": False, "report": False},
        on_error="raise",
        seed=run.seed,
    )
