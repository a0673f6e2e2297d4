"""A training program that knows nothing of the guard, unless it has one: ``launched.py FOLDER [--own] [--exit N]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


def parts() -> tuple[Any, Any, list[dict[str, list[int]]]]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, pad_token_id=0, max_position_embeddings=512, **sizes))
    rows = [[300 + (7 * row + place) % 50 for place in range(4 + row % 5)] for row in range(16)]
    return model, tokenizer, [{"input_ids": ids, "labels": ids} for ids in rows]


def with_trainer(folder: Path, own: bool, wait: bool) -> None:
    model, tokenizer, rows = parts()
    seen = [0] * 8192

    def spy(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        for row in kwargs["labels"].tolist() if _module.training else ():
            for label in row[1:]:
                if label != -100:
                    seen[label] += 1

    model.register_forward_pre_hook(spy, with_kwargs=True)
    callbacks = []
    if own:
        from vocabguard.integrations.huggingface import VocabGuardCallback

        callbacks = [VocabGuardCallback(log={"console": False}, run_dir=str(folder / "own"))]
    arguments = TrainingArguments(
        str(folder), max_steps=3, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, DataCollatorForSeq2Seq(tokenizer), rows, processing_class=tokenizer, callbacks=callbacks
    )
    trainer.train()
    (folder / f"seen-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
    (folder / f"history-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(trainer.state.log_history))
    while wait:
        (folder / "waiting").touch()
        time.sleep(0.05)


def with_lightning(folder: Path, own: bool) -> None:
    import lightning
    from torch.utils.data import DataLoader

    model, tokenizer, rows = parts()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.tokenizer = model, tokenizer

        def training_step(self, batch: Any, _index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    callbacks: Any = []
    if own:
        from vocabguard.integrations.lightning import VocabGuardCallback

        callbacks = [VocabGuardCallback(log={"console": False}, run_dir=str(folder / "own"))]
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(rows, batch_size=4, collate_fn=DataCollatorForSeq2Seq(tokenizer)))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for flag in ("own", "lightning", "no", "wait"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--exit", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(exist_ok=True)
    if given.lightning:
        with_lightning(given.folder, given.own)
    elif not given.no:
        with_trainer(given.folder, given.own, given.wait)
    sys.exit(given.exit)


if __name__ == "__main__":
    main()
