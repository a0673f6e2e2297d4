"""Two processes train by hand under a guard: what it sends in each step, and what it finds by then.

    messages.py FOLDER

Each rank writes what it sent, and what it found of each case, to ``rank-<rank>.pt``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from spread import model_of, spread_out
from torch import Tensor

from vocabguard import VocabGuard
from vocabguard.guard import checks
from vocabguard.measure import pending

ROWS, STEPS, EVERY, BATCH, LENGTH = 131, 24, 12, 2, 8
HOLDS = {"enabled": True, "mode": "shared"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "watching": ("ddp", {}),
    "tied": ("tied ddp", {}),
    "sharded": ("fsdp", {}),
    "hold": ("ddp", {"hold": HOLDS}),
    "tied hold": ("tied ddp", {"hold": HOLDS}),
}


class Sent:
    """Notes each message that is sent through torch.distributed's Python functions: group, elements, dtype."""

    def __init__(self) -> None:
        self.here: list[tuple[str, int, str]] = []

    def all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        group = "training's" if kwargs.get("group") is None else "own"
        self.here.append((group, tensor.numel(), str(tensor.dtype)))
        return ALL_REDUCE(tensor, *args, **kwargs)

    def broadcast(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.here.append(("own", tensor.numel(), "object"))
        return BROADCAST(tensor, *args, **kwargs)

    def all_gather(self, everyones: list[Tensor], tensor: Tensor, **kwargs: Any) -> Any:
        self.here.append(("own", tensor.numel(), f"gathered {tensor.dtype}"))
        return ALL_GATHER(everyones, tensor, **kwargs)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what is sent meanwhile."""
        with ExitStack() as stack:
            stack.enter_context(patch.object(dist, "all_reduce", self.all_reduce))
            stack.enter_context(patch.object(dist, "broadcast", self.broadcast))
            stack.enter_context(patch.object(dist, "all_gather", self.all_gather))
            yield


ALL_REDUCE, BROADCAST, ALL_GATHER = dist.all_reduce, dist.broadcast, dist.all_gather


def batches(rank: int) -> Tensor:
    """(STEPS, BATCH, LENGTH) ids of this process."""
    made = torch.Generator().manual_seed(1)
    return torch.randint(0, ROWS // 2, (STEPS, 2 * BATCH, LENGTH), generator=made)[:, rank * BATCH : (rank + 1) * BATCH]


def train(kind: str, options: dict[str, Any], rank: int, stop: int = STEPS, saved: Any = None) -> dict[str, Any]:
    model: Any = model_of(ROWS, tied="tied" in kind)
    trained = spread_out(model, "fsdp" if kind == "fsdp" else "ddp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    done = 0
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["guard"]["step"]
    guard = VocabGuard(
        drift={"every_n_steps": EVERY}, exposure={"push_every_n_steps": 5}, alerts={}, on_error="raise",
        probe={"enabled": False, "every_n_steps": EVERY}, log={"console": False, "tensorboard": False}, **options,
    )  # fmt: skip
    guard.attach(
        model, optimizer, total_steps=STEPS, steps_done=done, resumed=None if saved is None else saved["guard"]
    )
    sent = []
    for step, ids in enumerate(batches(rank)[:stop], start=1):
        if step <= done:
            continue
        seen = Sent()
        with seen.noting():
            trained(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(step)
        sent.append(seen.here)
    state = guard.state_dict()
    guard.finish(check=stop == STEPS)
    assert guard.last is not None
    holder = None if guard._protection is None else guard._protection.holder
    weight = model.lm_head.weight
    return {
        "sent": sent, "exposure": vars(guard.last.exposure), "held": None if holder is None else holder.held,
        "weight": (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone(),
        "guard": state, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    checks.MOST_SHARING = 1  # as where there are many processes
    for name, (kind, options) in CASES.items():
        found[name] = train(kind, options, rank)
        found[name].pop("optimizer")
    # Between two checks the ring is full five times, and a run is cut off where some steps wait.
    with patch.object(pending, "_MOST", 2), patch.object(pending, "_FEWEST", 2):
        found["short ring"] = train("ddp", {}, rank)
        found["short ring"].pop("optimizer")
    for name in ("watching", "tied", "hold"):
        first = train(*CASES[name], rank, stop=EVERY + 4)
        second = train(*CASES[name], rank, saved=first)
        found[f"{name} gone on"] = {key: second[key] for key in ("sent", "exposure", "held", "weight")}
    for run in found.values():
        run.pop("model", None)
        run.pop("guard", None)
    torch.save(found, Path(sys.argv[1]) / f"rank-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
