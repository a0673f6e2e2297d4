"""Real trainers on tiny models: the same rows, the same optimizer, with or without a guard."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from vocabguard.integrations import huggingface
from vocabguard.integrations import lightning as lightning_adapter

# Trainers collect garbage when they start; what imports have made, here and in the scripts that import this, is none.
gc.freeze()

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
ROWS = 8192
BATCH = 4
CLIP = 0.05
QUIET = {"log": {"console": False}, "on_error": "raise"}


@pytest.fixture(scope="session", autouse=True)
def tables(shared_tables: None) -> None:
    """Guards share the table of the example's vocabulary."""


def tiny_model(kind: str = "llama", *, tied: bool = False, rows: int = ROWS) -> nn.Module:
    """A random model of 8,192 rows x 16; Llama has no dropout. BERT and T5, always tied, do not shift labels."""
    torch.manual_seed(0)
    if kind == "bert":
        return BertForMaskedLM(
            BertConfig(
                vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=64,
            )
        )  # fmt: skip
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=rows, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
                pad_token_id=0, initializer_factor=0.05,
            )
        )  # fmt: skip
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=rows, n_embd=16, n_layer=1, n_head=2, n_positions=64, tie_word_embeddings=tied)
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0,
        )
    )  # fmt: skip


def random_rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of different lengths over few tokens, the first part of each masked."""
    rng = Random(seed)
    rows = []
    for _ in range(count):
        ids = [int(rng.paretovariate(0.6)) % 500 + 300 for _ in range(rng.randint(4, 12))]
        masked = rng.randint(0, 3)
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return rows


def naive_counts(
    rows: list[dict[str, list[int]]], rows_a_step: int, *, shift: bool = True, first_step: int = 1
) -> tuple[list[int], list[int], list[int]]:
    """Data targets, inputs and the last step as a target, by plain loops over rows that are read in order."""
    targets, inputs, last = [0] * ROWS, [0] * ROWS, [-1] * ROWS
    for number, row in enumerate(rows):
        for token in row["input_ids"]:
            inputs[token] += 1
        for label in row["labels"][1 if shift else 0 :]:
            if label != -100:
                targets[label] += 1
                last[label] = first_step + number // rows_a_step
    return targets, inputs, last


def assert_counts(found: Any, expected: tuple[list[int], list[int], list[int]]) -> None:
    """An `Exposure` holds exactly these counts."""
    targets, inputs, last = expected
    assert found.data_target.tolist() == targets
    assert found.inputs.tolist() == inputs
    assert found.last_target.tolist() == last


def naive_cosine(before: Tensor, now: Tensor) -> Tensor:
    """(V,) float64."""
    return torch.nn.functional.cosine_similarity(before.double(), now.double(), dim=1)


def naive_below(before: Tensor, now: Tensor, live: Tensor, limit: float = 0.95) -> float:
    """Share of the live rows whose cosine is below the limit."""
    return float((naive_cosine(before, now)[live] < limit).double().mean())


def assert_same_findings(found: Any, expected: Any) -> None:
    """Two checks agree in counts exactly and in numbers to what rounding makes of two trainings.

    Each run's own figures are held to 1e-6 of its weights elsewhere; here the weights themselves part by rounding, and
    AdamW at the tests' learning rates has been seen to take one row in 8,192 over 1e-6.
    """
    assert found.step == expected.step
    for name in ("data_target", "inputs", "last_target", "echo_target", "push_samples", "steps"):
        one, other = getattr(found.exposure, name), getattr(expected.exposure, name)
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), name
    for name in ("pull", "push"):
        torch.testing.assert_close(getattr(found.exposure, name), getattr(expected.exposure, name))
    for matrix in ("head", "embedding"):
        for name in ("cosine", "residual", "l2"):
            one, other = getattr(getattr(found, matrix), name), getattr(getattr(expected, matrix), name)
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0, equal_nan=True)
    assert found.firing == expected.firing


# An optimizer class is hooked by torch when it is first made. With the parent hooked too, each step fires hooks twice:
# so it is in any process that has used plain AdamW before, and the numbers must not depend on it.
torch.optim.AdamW([torch.zeros(1)])


class RecordingAdamW(torch.optim.AdamW):
    """Keeps a copy of the head's gradient at every step, without any hook."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=2e-3)
        self.head = model.get_output_embeddings().weight
        self.gradients: list[Tensor] = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            self.gradients.append(self.head.grad.detach().clone())
            return super().step()
        # Lightning computes the gradient inside the closure.
        with torch.enable_grad():
            loss = closure()
        self.gradients.append(self.head.grad.detach().clone())
        super().step()
        return loss


class OrderedTrainer(Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)


@dataclass
class Run:
    """What one training run left behind."""

    model: nn.Module
    optimizer: RecordingAdamW
    losses: list[float]
    callback: Any = None
    trainer: Any = None
    base: dict[str, Tensor] = field(default_factory=dict)


def run_hf(
    model: nn.Module,
    rows: Any,
    tokenizer: Any,
    folder: Path,
    *,
    steps: int = 6,
    accumulation: int = 1,
    shuffle: bool = False,
    callbacks: tuple[Any, ...] = (),
    resume: bool | str = False,
    collator: Any = None,
    **arguments: Any,
) -> Run:
    base = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = RecordingAdamW(model)
    set_seed(1)
    defaults: dict[str, Any] = {"save_strategy": "no", "logging_steps": 1, "report_to": "none"}
    trainer = (Trainer if shuffle else OrderedTrainer)(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=CLIP,
            disable_tqdm=True,
            use_cpu=True,
            **(defaults | arguments),
        ),
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume or None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(model, optimizer, losses, callbacks[0] if callbacks else None, trainer, base)


class Module(lightning.LightningModule):
    """The fewest lines of a LightningModule around a Hugging Face model."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        self.optimizer = RecordingAdamW(self.model)
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / 100)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run_lightning(
    model: nn.Module,
    rows: Any,
    tokenizer: Any,
    folder: Path,
    *,
    steps: int = 6,
    accumulation: int = 1,
    shuffle: bool = False,
    callbacks: tuple[Any, ...] = (),
    module: type[Module] = Module,
    collate: Any = None,
    validate: bool = False,
    checkpoint: str | None = None,
    workers: int = 0,
    **arguments: Any,
) -> Run:
    base = {name: value.detach().clone() for name, value in model.state_dict().items()}
    lightning.seed_everything(1, verbose=False)
    loop = module(model, tokenizer)
    defaults: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "gradient_clip_val": CLIP}
    collate = collate or DataCollatorForSeq2Seq(tokenizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*but have no `val_dataloader`.*")
        warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty.*")
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            accumulate_grad_batches=accumulation,
            default_root_dir=folder,
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            **(defaults | arguments),
        )
        trainer.fit(
            loop,
            DataLoader(rows, batch_size=BATCH, shuffle=shuffle, collate_fn=collate, num_workers=workers),
            DataLoader(rows[:4], batch_size=BATCH, collate_fn=collate) if validate else None,
            ckpt_path=checkpoint,
        )
    return Run(model, loop.optimizer, loop.losses, callbacks[0] if callbacks else None, trainer, base)


RUNS = {"hf": run_hf, "lightning": run_lightning}
CALLBACKS = {"hf": huggingface.VocabGuardCallback, "lightning": lightning_adapter.VocabGuardCallback}


@pytest.fixture(params=["hf", "lightning"])
def trainer_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kit() -> Any:
    """The helpers of this file, for tests that cannot import it."""
    import types

    return types.SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("_")})
