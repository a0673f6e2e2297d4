"""Two processes, or one, under a guard that probes, echoes, holds or resumes: DDP and FSDP2 in a hand-written loop.

    strategies.py FOLDER KIND     kinds: ddp, fsdp; a process by itself trains a plain model

Each rank writes what it found to ``rank-<rank>.pt``; a process by itself is rank "alone".
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import conftest as kit
import spread
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from vocabguard import VocabGuard
from vocabguard.protect.collator import ECHO_KEY

STEPS, BATCH, LENGTH = 6, 4, 32
QUIET: dict[str, Any] = {
    "log": {"console": False, "tensorboard": False}, "on_error": "raise", "alerts": {}, "untrained": {"enabled": False},
    "drift": {"every_n_steps": 2}, "exposure": {"push_every_n_steps": 2}, "probe": {"enabled": False},
}  # fmt: skip
# Each process has rows of its own, and so would expect, and ask for, other tokens.
PROBE = QUIET | {"probe": {"sample": 32, "every_n_steps": 2}, "preflight": {"enabled": False}}
ECHO = QUIET | {"echo": {"enabled": True, "dose": 0.5, "list_tokens": 4}}
HOLD = QUIET | {"hold": {"enabled": True, "mode": "freeze"}}


def rows() -> list[dict[str, list[int]]]:
    """Rows of one length without masks, so that every process has as many targets as the others."""
    ids = torch.randint(300, 800, (STEPS * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def train(kind: str, folder: Path, options: dict[str, Any], *, stop: int = STEPS, saved: Any = None) -> dict[str, Any]:
    """Steps up to `stop`, from the start or from what an earlier call gave."""
    alone = not dist.is_initialized()
    rank, world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    tokenizer = AutoTokenizer.from_pretrained(kit.ASSETS)
    model: Any = kit.tiny_model().train()
    trained = model if alone else spread.spread_out(model, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    done = 0
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["guard"]["step"]
    base = spread.whole(model.lm_head.weight)
    guard = VocabGuard(tokenizer=tokenizer, **options)
    collate: Any = DataCollatorForSeq2Seq(tokenizer)
    share = BATCH // world
    mine = [row for place, row in enumerate(rows()) if place % BATCH // share == rank]
    loader: Any = DataLoader(
        mine,  # type: ignore[arg-type]
        batch_size=share,
        collate_fn=guard.collator(collate) if "echo" in options else collate,
    )
    guard.attach(
        model, optimizer, total_steps=STEPS, run_dir=folder, dataloader=loader, steps_done=done,
        resumed=None if saved is None else saved["guard"],
    )  # fmt: skip
    echoed = torch.zeros(kit.ROWS, dtype=torch.int64)
    for step, batch in enumerate(loader, start=1):
        if step <= done:
            continue
        if ECHO_KEY in batch:
            asked = batch["labels"][batch[ECHO_KEY]]
            echoed += torch.bincount(asked[asked != -100], minlength=kit.ROWS)
        trained(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        guard.step(step)
        if step == stop:
            break
    state = guard.state_dict()
    guard.finish(check=stop == STEPS)
    now, found = spread.whole(model.lm_head.weight), guard.last
    assert found is not None
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "guard": state, "echoed": echoed,
        "base": base, "now": now, "last": found, "latest": dict(guard.latest),
    }  # fmt: skip


def exposure(run: dict[str, Any]) -> dict[str, Tensor]:
    """Counts and row gradients."""
    names = ("data_target", "inputs", "echo_target", "last_target", "pull", "push")
    return {name: getattr(run["last"].exposure, name) for name in names}


def main() -> None:
    torch.set_num_threads(1)
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    whole = train(kind, folder / "whole", PROBE)
    first = train(kind, folder / "parts", PROBE, stop=2)
    second = train(kind, folder / "parts", PROBE, saved=first)
    echo = train(kind, folder / "echo", ECHO)
    hold = train(kind, folder / "hold", HOLD)
    held = {"now": hold["now"], "base": hold["base"], "share": hold["latest"]["vocabguard/hold/share"]}
    probe = whole["last"].probe
    rank = str(dist.get_rank()) if dist.is_initialized() else "alone"
    result = {
        "probe": {"ids": probe.ids, "probability": probe.probability, "emitted": probe.emitted},
        "whole": exposure(whole) | {"cosine": whole["last"].head.cosine, "now": whole["now"]},
        "second": exposure(second) | {"cosine": second["last"].head.cosine, "now": second["now"]},
        "echo": exposure(echo) | {"mine": echo["echoed"]},
        "hold": held,
    }  # fmt: skip
    torch.save(result, folder / f"rank-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
