"""Two processes with data of their own are guarded and probed: DDP and FSDP2.

    probing.py FOLDER

Each rank writes, for each kind, what it probed and what it would have drawn by its own data to ``rank-<rank>.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import conftest as kit
import spread
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from vocabguard import VocabGuard
from vocabguard.guard.probe import Population

STEPS, BATCH, LENGTH = 2, 2, 32
OPTIONS: dict[str, Any] = {
    "log": {"console": False, "tensorboard": False}, "on_error": "raise", "untrained": {"enabled": False},
    "drift": {"every_n_steps": 2}, "forecast": {"enabled": False},
    "probe": {"sample": 64, "every_n_steps": 2, "watch": [42]},
}  # fmt: skip


def train(kind: str, folder: Path) -> dict[str, Any]:
    """Two steps on rows that the other process has not."""
    rank = dist.get_rank()
    tokenizer = AutoTokenizer.from_pretrained(kit.ASSETS)
    model: Any = kit.tiny_model().train()
    trained = spread.spread_out(model, kind)
    # Of one language's part of the vocabulary here, of another's there, and not as many rows.
    low, high = ((300, 500), (3000, 5000))[rank]
    shape = ((STEPS + 40 * rank) * BATCH, LENGTH)
    ids = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(rank))
    data: Any = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    loader: Any = DataLoader(data, batch_size=BATCH, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    guard = VocabGuard(tokenizer=tokenizer, **OPTIONS)
    watch = guard.attach(model, optimizer, total_steps=STEPS, run_dir=folder / kind, dataloader=loader)
    for step, batch in zip(range(1, STEPS + 1), loader, strict=False):
        trained(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        guard.step(step)
    guard.finish()
    assert watch is not None
    assert guard.last is not None
    probe, population = guard.last.probe, Population.of(guard.table, watch.preflight, whole=False)
    drawn = population.draw(guard.config.probe.sample, guard.config.seed).tolist()
    own = torch.tensor(sorted({*drawn, *population.frequent.tolist(), 42}))
    return {"ids": probe.ids, "probability": probe.probability, "own": own, "scalars": dict(guard.last.scalars)}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {kind: train(kind, Path(sys.argv[1])) for kind in ("ddp", "fsdp")}
    torch.save(found, Path(sys.argv[1]) / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
