"""Two processes, or one, train by hand on the same global batches under a guard: DDP or FSDP2 against a plain model.

    spread.py FOLDER [KIND:ROWS ...]     kinds: ddp, fsdp, tied (FSDP2 with tied weights)

Each rank writes what its guard found to ``<kind>-<rows>-<rank>.pt``; a process by itself writes rank "alone".
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vocabguard import VocabGuard

STEPS, BATCH, LENGTH, WIDTH, LR = 60, 4, 8, 16, 2e-4


def model_of(rows: int, *, tied: bool) -> Any:
    """A random causal language model."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=None, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def global_batches(rows: int) -> Tensor:
    """(STEPS, BATCH, LENGTH) ids of a third of the vocabulary; every row has as many targets as the others."""
    return torch.randint(0, rows // 3, (STEPS, BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def spread_out(model: Any, kind: str) -> nn.Module:
    """The model as this kind trains it."""
    if kind == "ddp":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
        return wrapped
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model  # type: ignore[no-any-return]


def whole(weight: Tensor) -> Tensor:
    """All rows of a parameter, gathered if need be."""
    full: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return full.detach().double().clone()


class Sizes:
    """The largest tensor of numbers a row that is sent, in elements."""

    def __init__(self) -> None:
        self.largest = 0
        self._real = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def __enter__(self) -> Sizes:
        def counted(real: Any, *args: Any, **kwargs: Any) -> Any:
            self.largest = max(self.largest, *(one.numel() for one in args if isinstance(one, Tensor)))
            return real(*args, **kwargs)

        for name, real in self._real.items():
            setattr(dist, name, partial(counted, real))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(dist, name, real)


def train(kind: str, rows: int, folder: Path) -> dict[str, Any]:
    """Sixty steps; what the guard found."""
    alone = not dist.is_initialized()
    rank, world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    model = model_of(rows, tied=kind == "tied")
    start = whole(model.lm_head.weight)
    trained = model if alone else spread_out(model, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    guard = VocabGuard(
        drift={"every_n_steps": 20}, exposure={"push_every_n_steps": 7}, untrained={"enabled": True},
        log={"console": False, "tensorboard": False}, on_error="raise",
    )  # fmt: skip
    share = BATCH // world
    with Sizes() as sizes:
        watch = guard.attach(model, optimizer, total_steps=STEPS, run_dir=folder / f"run-{kind}-{rows}-{world}")
    assert watch is not None
    steps_sizes = Sizes()
    with steps_sizes:
        for step, batch in enumerate(global_batches(rows), start=1):
            ids = batch[rank * share : (rank + 1) * share]
            trained(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(step)
    state = guard.state_dict()
    guard.finish()
    found = guard.last
    assert found is not None
    return {
        "head": vars(found.head), "embedding": vars(found.embedding), "exposure": vars(found.exposure),
        "scalars": {key: value for key, value in found.scalars.items() if not key.endswith("overhead")},
        "firing": sorted(found.firing), "trained": guard.table.trained, "live": watch.live,
        "sent_at_attach": sizes.largest, "sent_in_steps": steps_sizes.largest,
        "baselines": {name: dict(reference) for name, reference in state["baselines"].items()},
        "naive": torch.nn.functional.cosine_similarity(start, whole(model.lm_head.weight), dim=1),
        "counts": state["exposure"]["data_target"], "watched": watch.head.baseline,
    }  # fmt: skip


def main() -> None:
    folder, kinds = Path(sys.argv[1]), [argument.split(":") for argument in sys.argv[2:]]
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = str(dist.get_rank()) if dist.is_initialized() else "alone"
    for kind, rows in kinds:
        torch.save(train(kind, int(rows), folder), folder / f"{kind}-{rows}-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
