"""Lightning's ``ModelParallelStrategy`` (FSDP2) in two processes under the guard's callback.

model_parallel.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import spread
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from vocabguard.integrations.lightning import VocabGuardCallback

ROWS, STEPS = 509, 20


class Module(lightning.LightningModule):
    """A model that Lightning's strategy asks to shard itself."""

    def __init__(self) -> None:
        super().__init__()
        self.model = spread.model_of(ROWS, tied=False)
        self.start = spread.whole(self.model.lm_head.weight)
        self.seen = torch.zeros(ROWS, dtype=torch.int64)

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += torch.bincount(batch["labels"][:, 1:].flatten(), minlength=ROWS)
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=spread.LR)


def main() -> None:
    folder = Path(sys.argv[1])
    rows = spread.global_batches(ROWS).reshape(-1, spread.LENGTH)
    guarded = VocabGuardCallback(
        drift={"every_n_steps": 5}, log={"console": False, "tensorboard": False}, on_error="raise"
    )
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=STEPS, callbacks=[guarded], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=2))
    found, weight = guarded.guard.last, module.model.lm_head.weight
    assert found is not None
    naive = torch.nn.functional.cosine_similarity(module.start, spread.whole(weight), dim=1)
    result = {
        "step": found.step, "cosine": found.head.cosine, "naive": naive, "targets": found.exposure.data_target,
        "mine": module.seen, "here": len(weight.to_local()), "state": guarded.guard.state_dict()["step"],
    }  # fmt: skip
    torch.save(result, folder / f"rank-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
