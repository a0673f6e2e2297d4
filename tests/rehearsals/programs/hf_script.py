"""A fine-tune as in Hugging Face's own example scripts, with nothing of the guard's: ``hf_script.py FOLDER OUT``."""

import json
import sys
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)


def main() -> None:
    """Train on whole chats."""
    folder, out = Path(sys.argv[1]), sys.argv[2]
    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lines = (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [" ".join(turn["content"] for turn in json.loads(line)["messages"]) for line in lines]
    rows: Any = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=TrainingArguments(
            output_dir=out, max_steps=6, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
            logging_steps=1, save_strategy="no", report_to="tensorboard", seed=1,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


main()
