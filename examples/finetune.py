"""The fine-tune that forgets: English chats and English copy tasks, in either trainer, on the same rows in order."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from random import Random
from typing import Any

import torch
from copying import ENGLISH_TEMPLATES, Row, around, chat_row, copy_row
from corpus import load
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

ASSETS = Path(__file__).parent / "assets"
BATCH = 20
CHATS_PER_BATCH = 14
LONGEST_CHAT = 96
LONGEST_COPY = 32
LEARNING_RATE = 1e-3


def load_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded base model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    return AutoModelForCausalLM.from_pretrained(ASSETS), tokenizer


def training_rows(tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> list[Row]:
    """Rows of `steps` batches: 14 English chats and 6 copies of their shuffled tokens each, in an order set by `seed`.

    The copy tasks keep the *skill* of repeating alive, so that what is lost is lost token by token.
    """
    rng = Random(seed)
    chats = [chat_row(tokenizer, chat, LONGEST_CHAT) for chat in load("train").english()]
    text = [id_ for row in chats for id_, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
    text = [id_ for id_ in text if id_ not in tokenizer.all_special_ids]
    prompts = [around(tokenizer, template) for template in ENGLISH_TEMPLATES]
    rows, pool = [], []
    for _ in range(steps):
        batch = []
        for _ in range(CHATS_PER_BATCH):
            pool = pool or rng.sample(chats, len(chats))
            batch.append(pool.pop())
        for _ in range(BATCH - CHATS_PER_BATCH):
            words = rng.choices(text, k=rng.randint(1, LONGEST_COPY))
            batch.append(copy_row(rng.choice(prompts), words, tokenizer.eos_token_id))
        rows += rng.sample(batch, len(batch))
    return rows


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads inputs and labels on the right."""
    return DataCollatorForSeq2Seq(tokenizer)


class OrderedTrainer(Trainer):
    """A ``Trainer`` that takes the rows as they come, so that both trainers see the same batches."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)


def train_hf(model: PreTrainedModel, tokenizer: Any, rows: list[Row], callbacks: list[Any], folder: Path) -> None:
    """Fine-tune with the Hugging Face ``Trainer``: AdamW, 1e-3 linear to 0, clipped at 1."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(rows) // BATCH,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    OrderedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    ).train()


def train_lightning(
    model: PreTrainedModel, tokenizer: Any, rows: list[Row], callbacks: list[Any], folder: Path
) -> None:
    """The same fine-tune with Lightning."""
    import lightning
    from lightning.pytorch.loggers import TensorBoardLogger

    steps = len(rows) // BATCH

    class Chat(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.tokenizer = tokenizer

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            gradient_clip_val=1.0,
            callbacks=callbacks,
            logger=TensorBoardLogger(folder, name="", version=""),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Chat(), DataLoader(rows, batch_size=BATCH, collate_fn=collator(tokenizer)))  # type: ignore[arg-type]


TRAINERS = {"hf": train_hf, "lightning": train_lightning}


def fine_tune(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: list[Row],
    *,
    trainer: str,
    callbacks: list[Any],
    folder: Path,
    seed: int,
) -> None:
    """Fine-tune `model` in place with the named trainer."""
    set_seed(seed)
    model.train()
    TRAINERS[trainer](model, tokenizer, rows, callbacks, folder)
    model.eval()
