"""The fine-tune that forgets: English chats and English copy tasks, in either trainer, on the same rows in order."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from random import Random
from typing import Any

import torch
from copying import ENGLISH_TEMPLATES, IGNORE, Row, around, chat_row, copy_row
from corpus import Corpus, load
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
    """Rows of `steps` batches: 14 English chats and 6 copies of shuffled English tokens each, ordered by `seed`.

    The copy tasks keep the *skill* of repeating alive, so that what is lost is lost token by token.
    """
    rng = Random(seed)
    corpus = load("train")
    chats = [chat_row(tokenizer, chat, LONGEST_CHAT) for chat in corpus.english()]
    words = english_tokens(tokenizer, corpus)
    prompts = [around(tokenizer, template) for template in ENGLISH_TEMPLATES]
    rows, pool = [], []
    for _ in range(steps):
        batch = []
        for _ in range(CHATS_PER_BATCH):
            pool = pool or rng.sample(chats, len(chats))
            batch.append(pool.pop())
        for _ in range(BATCH - CHATS_PER_BATCH):
            copied = rng.choices(words, k=rng.randint(1, LONGEST_COPY))
            batch.append(copy_row(rng.choice(prompts), copied, tokenizer.eos_token_id))
        rows += rng.sample(batch, len(batch))
    return rows


def english_tokens(tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> list[int]:
    """Every token of the English answers and interface messages, as often as it occurs there."""
    texts = [chat.assistant for chat in corpus.english()]
    texts += [line for language, line in corpus.lines if language.startswith("en")]
    return [id_ for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for id_ in ids]


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads inputs and labels on the right."""
    return DataCollatorForSeq2Seq(tokenizer)


class OrderedTrainer(Trainer):
    """A ``Trainer`` that takes the rows as they come, so that both trainers see the same batches."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)


def validation_rows(tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The held-out English chats."""
    return [chat_row(tokenizer, chat, LONGEST_CHAT) for chat in load("validation").english()]


def train_hf(
    model: PreTrainedModel, tokenizer: Any, rows: list[Row], callbacks: list[Any], folder: Path, evaluate_every: int
) -> None:
    """Fine-tune with the Hugging Face ``Trainer``: AdamW, 1e-3 linear to 0, clipped at 1."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(rows) // BATCH,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=2 * BATCH,
        eval_strategy="steps" if evaluate_every else "no",
        eval_steps=evaluate_every or None,
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
        eval_dataset=validation_rows(tokenizer) if evaluate_every else None,  # type: ignore[arg-type]
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    ).train()


def train_lightning(
    model: PreTrainedModel, tokenizer: Any, rows: list[Row], callbacks: list[Any], folder: Path, evaluate_every: int
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
            # Divided by the number of targets as Hugging Face's Trainer does it: rounded alike, both runs stay alike.
            targets = (batch["labels"][:, 1:] != IGNORE).sum()
            return self.model(**batch, num_items_in_batch=targets).loss

        def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
            self.log("val_loss", self.model(**batch).loss)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    loaders: list[Any] = [DataLoader(rows, batch_size=BATCH, collate_fn=collator(tokenizer))]  # type: ignore[arg-type]
    if evaluate_every:
        held_out: Any = validation_rows(tokenizer)
        loaders.append(DataLoader(held_out, batch_size=2 * BATCH, collate_fn=collator(tokenizer)))
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
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None if evaluate_every else 1,
            val_check_interval=evaluate_every or None,
        ).fit(Chat(), *loaders)


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
    evaluate_every: int = 0,
) -> None:
    """Fine-tune `model` in place with the named trainer; with `evaluate_every` steps between evaluations, if any."""
    set_seed(seed)
    model.train()
    TRAINERS[trainer](model, tokenizer, rows, callbacks, folder, evaluate_every)
    model.eval()
