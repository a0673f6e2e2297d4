"""The fewest lines for Lightning: one callback. ``python examples/lightning_trainer.py``"""

import lightning
import torch
from finetune import BATCH, LEARNING_RATE, collator, load_base, training_rows
from torch.utils.data import DataLoader

from vocabguard.integrations.lightning import VocabGuardCallback

STEPS = 60


class ChatModel(lightning.LightningModule):
    """A language model and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.tokenizer = load_base()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The model's own loss."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)


module = ChatModel()
rows = training_rows(module.tokenizer, STEPS, seed=0)
trainer = lightning.Trainer(
    max_steps=STEPS,
    accelerator="cpu",
    default_root_dir="runs/lightning_trainer",
    callbacks=[VocabGuardCallback(overrides=["drift.every_n_steps=20"])],  # this line is all
)
trainer.fit(module, DataLoader(rows, batch_size=BATCH, collate_fn=collator(module.tokenizer)))  # type: ignore[arg-type]
