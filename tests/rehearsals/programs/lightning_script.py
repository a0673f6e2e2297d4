"""A fine-tune with Lightning, with nothing of the guard's: ``lightning_script.py FOLDER OUT``.

It counts for itself what it trains on; rows beyond those of the dataloader's batch are echo's.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

ROWS = 2
SEEN: dict[str, Any] = {"data": {}, "echo": {}, "steps": 0, "history": [], "kind": "lightning.Trainer"}


class Module(lightning.LightningModule):
    """The fewest lines around a Hugging Face model."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).train()

    def training_step(self, batch: Any, _index: int) -> Any:
        """One batch; what it asks for is counted."""
        SEEN["steps"] += 1
        for row, line in enumerate(batch["labels"].tolist()):
            of = SEEN["data" if row < ROWS else "echo"]
            for label in line[1:]:
                if label != -100:
                    of[label] = of.get(label, 0) + 1
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train on the assistant's turns."""
    folder, out = Path(sys.argv[1]), sys.argv[2]
    lightning.seed_everything(1)
    module = Module(folder / "model")
    rows: Any = []
    for line in (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines():
        chat = json.loads(line)["messages"]
        asked = module.tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        whole = module.tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        rows.append({"input_ids": whole, "labels": [-100] * len(asked) + whole[len(asked) :]})
    trainer = lightning.Trainer(
        max_steps=6, accelerator="cpu", default_root_dir=out, logger=TensorBoardLogger(out, name="tb"),
        log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=ROWS, collate_fn=DataCollatorForSeq2Seq(module.tokenizer)))
    SEEN["global_step"] = trainer.global_step
    Path(f"{os.environ['SPY']}-0.json").write_text(json.dumps(SEEN), encoding="utf-8")


main()
