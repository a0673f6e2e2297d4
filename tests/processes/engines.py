"""Processes that train together under one engine after another, with a guard that watches, echoes or holds.

    engines.py FOLDER ENGINE ...     engines: see `ENGINES`; a process by itself trains a plain model

Each rank writes what its guard found to ``<engine>-<rank>.pt``; a process by itself is rank "alone".
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import conftest as kit
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from vocabguard import VocabGuard, collective
from vocabguard.guard import checks, hold, layout, watched
from vocabguard.protect.collator import ECHO_KEY

ROWS = 8191  # a prime: neither rows nor elements divide by the processes, so a row lies in two of them
STEPS, BATCH, LENGTH, LR = 6, 4, 32, 2e-3
QUIET: dict[str, Any] = {
    "log": {"console": False, "tensorboard": False}, "alerts": {}, "untrained": {"enabled": False},
    "drift": {"every_n_steps": 2}, "exposure": {"push_every_n_steps": 2}, "probe": {"enabled": False},
    "preflight": {"enabled": False}, "forecast": {"enabled": False}, "reference": {"enabled": False},
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "watch": QUIET | {"probe": {"sample": 32, "every_n_steps": 2}},
    "echo": QUIET | {"echo": {"enabled": True, "dose": 0.5, "list_tokens": 4}},
    "freeze": QUIET | {"hold": {"enabled": True, "mode": "freeze"}},
    "shared": QUIET | {"hold": {"enabled": True, "mode": "shared"}},
    "fault": QUIET | {"hold": {"enabled": True, "mode": "shared"}},
}


class OnPurposeError(RuntimeError):
    """What is raised."""


@cache
def tokenizer_of() -> Any:
    return AutoTokenizer.from_pretrained(kit.ASSETS)


def examples() -> list[dict[str, list[int]]]:
    """Rows of one length, each target of which is one of the first tokens; the same for all processes."""
    ids = torch.randint(300, 800, (STEPS * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


class Engine:
    """One way to train a model over several processes.

    Attributes:
        model: what is called.
        inner: the model with the rows.
        optimizer: does the steps.
        replica: this process's number among those with other data.
        replicas: how many there are.
        step: does one whole step, given the loss.
        rows: gives the whole matrices, gathered.
    """

    def __init__(self, inner: Any, model: Any, replica: int = 0, replicas: int = 1) -> None:
        self.inner, self.model, self.replica, self.replicas = inner, model, replica, replicas
        parameters = model.parameters() if isinstance(model, nn.Module) else inner.parameters()
        self.optimizer: Any = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01, foreach=False)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, batch: Any) -> Tensor:
        found: Tensor = self.model(**batch).loss
        return found

    def rows(self) -> dict[str, Tensor]:
        return {"head": whole(self.inner.lm_head.weight), "embedding": whole(self.inner.get_input_embeddings().weight)}


def whole(weight: Tensor) -> Tensor:
    full: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return full.detach().float().clone()


def model_of(*, tied: bool = False) -> Any:
    model = kit.tiny_model(rows=ROWS, tied=tied)
    return model.train()


def _mesh(*shape: int, names: tuple[str, ...] | None = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def plain() -> Engine:
    model = model_of()
    return Engine(model, model)


def plain_tied() -> Engine:
    model = model_of(tied=True)
    return Engine(model, model)


def ddp() -> Engine:
    model = model_of()
    return Engine(model, nn.parallel.DistributedDataParallel(model), *_place())


def _fsdp2(model: Any, mesh: Any = None) -> None:
    from torch.distributed.fsdp import fully_shard

    options = {} if mesh is None else {"mesh": mesh}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def fsdp2(*, tied: bool = False) -> Engine:
    model = model_of(tied=tied)
    _fsdp2(model)
    return Engine(model, model, *_place())


def fsdp2_tied() -> Engine:
    return fsdp2(tied=True)


def hsdp() -> Engine:
    model = model_of()
    _fsdp2(model, _mesh(2, 2, names=("dp_replicate", "dp_shard")))
    return Engine(model, model, *_place())


def fsdp2_offload() -> Engine:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    model = model_of()
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return Engine(model, model, *_place())


def _tensor_parallel(model: Any, mesh: Any, *, columns: bool = False) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if columns:
        embedding: Any = ColwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        head: Any = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    else:
        embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        head = ColwiseParallel(input_layouts=Replicate(), output_layouts=Replicate(), use_local_output=True)
    plan = {"model.embed_tokens": embedding, "lm_head": head}
    for number in range(len(model.model.layers)):
        layer = f"model.layers.{number}.mlp."
        plan |= {f"{layer}gate_proj": ColwiseParallel(), f"{layer}up_proj": ColwiseParallel(),
                 f"{layer}down_proj": RowwiseParallel(output_layouts=Replicate())}  # fmt: skip
    assert Shard is not None
    parallelize_module(model, mesh, plan)


def tp() -> Engine:
    model = model_of()
    _tensor_parallel(model, _mesh(dist.get_world_size(), names=("tp",)))
    return Engine(model, model)


def tp_columns() -> Engine:
    model = model_of()
    _tensor_parallel(model, _mesh(dist.get_world_size(), names=("tp",)), columns=True)
    return Engine(model, model)


def tp_auto() -> Engine:
    from transformers import AutoModelForCausalLM

    folder = FOLDER / "tp-model"
    if dist.get_rank() == 0 and not folder.exists():
        model_of().save_pretrained(folder)
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).train()
    return Engine(model, model)


def fsdp2_tp() -> Engine:
    mesh = _mesh(dist.get_world_size() // 2, 2, names=("dp", "tp"))
    model = model_of()
    _tensor_parallel(model, mesh["tp"])
    _fsdp2(model, mesh["dp"])
    return Engine(model, model, mesh["dp"].get_local_rank(), mesh["dp"].size())


class Fsdp1(Engine):
    """FSDP's first version."""

    def __init__(self, *, original: bool) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        model = model_of()
        wrapped = FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}), device_id=torch.device("cpu"),
            use_orig_params=original,
        )  # fmt: skip
        super().__init__(model, wrapped, *_place())

    def rows(self) -> dict[str, Tensor]:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
            return super().rows()


def fsdp1_orig() -> Engine:
    return Fsdp1(original=True)


def fsdp1_flat() -> Engine:
    return Fsdp1(original=False)


class Gathering(nn.Module):
    """A model that is called with parts of sequences and sees whole ones, as if its attention did."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, shift_labels: Tensor | None = None, **kwargs: Any) -> Any:
        if shift_labels is None:
            return self.module(input_ids=input_ids, **kwargs)
        rank, world = _place()
        parts = [torch.empty_like(input_ids) for _ in range(world)]
        dist.all_gather(parts, input_ids.contiguous())
        found = self.module(input_ids=torch.cat(parts, dim=1))
        found.logits = found.logits.chunk(world, dim=1)[rank]
        return found


class Sequence(Engine):
    """Each process has a part of every sequence, with labels as the adapters of context and sequence parallelism hand
    them on; the loss is the mean over all of them, gradients are averaged."""

    def __init__(self) -> None:
        model = model_of()
        super().__init__(model, nn.parallel.DistributedDataParallel(Gathering(model)))

    def loss(self, batch: Any) -> Tensor:
        rank, world = _place()
        labels, each = batch["labels"], batch["labels"].shape[1] // world
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        mine = slice(rank * each, (rank + 1) * each)
        logits = self.model(input_ids=batch["input_ids"][:, mine], shift_labels=shifted[:, mine]).logits
        total: Tensor = nn.functional.cross_entropy(
            logits.flatten(0, 1), shifted[:, mine].flatten(), ignore_index=-100, reduction="sum"
        )
        return total * world / (labels[:, 1:] != -100).sum()


def context() -> Engine:
    return Sequence()


def sequence() -> Engine:
    return Sequence()


class Stages(Engine):
    """A model of which each process has a part: the first has no head, the last no input embedding, others neither."""

    def __init__(self) -> None:
        model = model_of()
        rank, world = _place()
        if rank != world - 1:
            model.lm_head = nn.Identity()
        if rank != 0:
            model.model.embed_tokens = nn.Identity()
        super().__init__(model, model)

    def loss(self, batch: Any) -> Tensor:
        return sum(p.square().sum() for p in self.model.parameters())  # type: ignore[return-value]

    def rows(self) -> dict[str, Tensor]:
        return {}


def pipeline() -> Engine:
    return Stages()


class Zero(Engine):
    """DeepSpeed's ZeRO."""

    def __init__(self, stage: int, *, offload: bool = False) -> None:
        import deepspeed

        self.inner = model_of()
        self.replica, self.replicas = _place()
        optimizer = torch.optim.AdamW(self.inner.parameters(), lr=LR, weight_decay=0.01)
        zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
        if offload:
            zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=self.inner, optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": BATCH // self.replicas, "train_batch_size": BATCH,
                "zero_allow_untested_optimizer": True, "zero_optimization": zero,
            },
        )  # fmt: skip

    def step(self, loss: Tensor) -> None:
        self.model.backward(loss)
        self.model.step()

    def rows(self) -> dict[str, Tensor]:
        import deepspeed

        weights = [self.inner.lm_head.weight, self.inner.get_input_embeddings().weight]
        with deepspeed.zero.GatheredParameters(weights):
            return super().rows()


def zero1() -> Engine:
    return Zero(1)


def zero2() -> Engine:
    return Zero(2)


def zero3() -> Engine:
    return Zero(3)


class Ulysses(Engine):
    """DeepSpeed's sequence parallelism for the models of transformers, and its own adapter of batches; without ZeRO."""

    def __init__(self) -> None:
        import deepspeed

        self.inner, (self.place, self.world) = model_of(), _place()
        self.replica, self.replicas = 0, 1
        groups = _ulysses_groups(self.world)
        self.group = groups.get_sequence_parallel_group()
        optimizer = torch.optim.AdamW(self.inner.parameters(), lr=LR, weight_decay=0.01, foreach=False)
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=self.inner, optimizer=optimizer, mpu=groups,
            config={
                "train_micro_batch_size_per_gpu": BATCH, "train_batch_size": BATCH,
                "zero_allow_untested_optimizer": True, "sequence_parallel_size": self.world,
            },
        )  # fmt: skip

    def loss(self, batch: Any) -> Tensor:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter

        whole = {name: batch[name] for name in ("input_ids", "labels")}
        whole["position_ids"] = torch.arange(LENGTH).expand_as(batch["input_ids"])
        part = next(UlyssesSPDataLoaderAdapter([whole], self.place, self.group, self.world, torch.device("cpu")))
        shifted = part["shift_labels"]
        logits = self.model(**part).logits
        found = nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")
        # Gradients of the parts of a sequence are added up.
        mean: Tensor = found / (batch["labels"][:, 1:] != -100).sum()
        return mean

    def step(self, loss: Tensor) -> None:
        self.model.backward(loss)
        self.model.step()


@cache
def _ulysses_groups(world: int) -> Any:
    """Made once: DeepSpeed forgets neither its groups nor the attention that it puts into transformers."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model_of(), core_attn_implementation="sdpa", sequence_parallel_size=world,
        micro_batch_size=BATCH, seq_length=LENGTH, seq_length_is_variable=False,
    )  # fmt: skip


def ulysses() -> Engine:
    return Ulysses()


ENGINES: dict[str, Callable[[], Engine]] = {
    one.__name__: one
    for one in (
        plain, plain_tied, ddp, fsdp1_orig, fsdp1_flat, fsdp2, fsdp2_tied, fsdp2_offload, hsdp, tp, tp_columns, tp_auto,
        fsdp2_tp, context, sequence, pipeline, ulysses, zero1, zero2, zero3,
    )
}  # fmt: skip
FOUR = ("hsdp", "fsdp2_tp")
"""Engines that are tried in four processes."""
DEEPSPEED = ("ulysses", "zero1", "zero2", "zero3")
FOLDER = Path()


class Sent:
    """What the guard's own process group sends: values of 4 bytes, and messages."""

    def __init__(self) -> None:
        self.elements, self.largest, self.messages = 0.0, 0.0, 0
        self._stack = ExitStack()

    def __enter__(self) -> Sent:
        # Where each of them has the tensor that is sent.
        for name, place in {"all_reduce": 0, "broadcast": 0, "all_gather": 1}.items():
            self._stack.enter_context(patch.object(dist, name, self._counted(getattr(dist, name), place)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _counted(self, real: Any, place: int) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if any(kwargs.get("group") is line.group for line in collective._lines):
                size = args[place].numel() * args[place].element_size() / 4
                self.elements += size
                self.largest = max(self.largest, size)
                self.messages += 1
            return real(*args, **kwargs)

        return counted


def _around(kind: str, mode: str, stack: ExitStack) -> None:
    """What a case is tried in: a mesh that accelerate would know of, a fault of one process in mid-run."""
    if kind in ("context", "sequence"):
        mesh = _mesh(dist.get_world_size(), names=("cp" if kind == "context" else "sp",))
        stack.enter_context(patch.object(layout, "_accelerate_state", lambda: {"device_mesh": mesh}))
    if mode == "fault" and _place()[0] == 1:
        # In mid-step where rows are held, which is the third step; else in a check.
        stack.enter_context(patch.object(hold, "rows_to_hold", _broken(hold.rows_to_hold, 3)))
        stack.enter_context(patch.object(checks, "measuring", _broken(checks.measuring, 5)))


def _broken(real: Any, fails_at: int) -> Any:
    calls = [0]

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] >= fails_at:
            raise OnPurposeError("broken on purpose")
        return real(*args, **kwargs)

    return broken


def train(kind: str, mode: str, folder: Path) -> dict[str, Any]:
    """Six steps under one engine; what the guard found."""
    engine = ENGINES[kind]()
    start = engine.rows()
    options = MODES[mode]
    share = BATCH // engine.replicas
    mine = [row for place, row in enumerate(examples()) if place % BATCH // share == engine.replica]
    collate: Any = DataCollatorForSeq2Seq(tokenizer_of())
    guard = VocabGuard(tokenizer=tokenizer_of(), **options)
    if mode == "echo":
        collate = guard.collator(collate)
    loader: Any = DataLoader(mine, batch_size=share, collate_fn=collate)  # type: ignore[arg-type]
    seen, losses, same = torch.zeros(2, ROWS, dtype=torch.int64), [], True
    result: dict[str, Any] = {"refused": None, "watch": {}, "notes": ()}
    with ExitStack() as stack:
        _around(kind, mode, stack)
        began = time.perf_counter()
        watch = guard.attach(engine.model, engine.optimizer, total_steps=STEPS, run_dir=folder, dataloader=loader)
        result["attach_seconds"] = time.perf_counter() - began
        if watch is not None:
            told = {name: getattr(watch, name) for name in ("head", "embedding", "probe")}
            result["watch"] = {name: getattr(one, "reason", None) for name, one in told.items()}
            result["notes"] = watch.notes
        for number, batch in enumerate(loader, start=1):
            seen += _asked(batch)
            if engine.replicas != _place()[1] and dist.is_initialized():
                same = same and _all_alike(batch, engine)
            loss = engine.loss(batch)
            engine.step(loss)
            losses.append(float(loss.detach()))
            with Sent() as sent:
                last = guard.step(number)
            when = "sent_at_check" if last is not None else "sent_in_step"
            result[when] = (sent.elements, sent.largest, sent.messages)
        result |= {"losses": losses, "start": start, "now": engine.rows(), "seen": seen, "same_batches": same}
        result |= {"failure": guard.failure, "latest": dict(guard.latest)}
        found = guard.last
        if found is not None:
            result |= {name: _drift(getattr(found, name)) for name in ("head", "embedding")}
            result["exposure"] = _vectors(found.exposure)
            probe = found.probe
            result["probe"] = None if probe is None else {"ids": probe.ids, "probability": probe.probability}
        state = guard.state_dict()
        result["counts"] = state.get("exposure", {}).get("data_target")
        guard.finish()
    return result


def _asked(batch: Any) -> Tensor:
    """(2, ROWS) data and echo targets of a batch, by plain indexing."""
    labels, mask = batch["labels"], batch.get(ECHO_KEY)
    echo = torch.zeros_like(labels, dtype=torch.bool) if mask is None else mask[:, None].expand_as(labels)
    labels, echo = labels[:, 1:], echo[:, 1:]
    kinds = (~echo & (labels >= 0), echo & (labels >= 0))
    return torch.stack([torch.bincount(labels[kind], minlength=ROWS) for kind in kinds])


def _all_alike(batch: Any, engine: Engine) -> bool:
    """Whether processes of one replica have one batch."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, (engine.replica, batch["input_ids"].tolist()))
    return all(ids == batch["input_ids"].tolist() for replica, ids in box if replica == engine.replica)


def _drift(found: Any) -> Any:
    return (
        {"reason": found.reason} if hasattr(found, "reason") else {"cosine": found.cosine, "residual": found.residual}
    )


def _vectors(found: Any) -> dict[str, Any]:
    names = ("data_target", "echo_target", "inputs", "last_target", "pull", "push", "push_samples")
    return {"reason": found.reason} if hasattr(found, "reason") else {name: getattr(found, name) for name in names}


def main() -> None:
    global FOLDER
    FOLDER, asked = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    # A hang is a failed test, not a long one.
    collective.PATIENCE = datetime.timedelta(seconds=60)
    watched.build_table = cache(watched.build_table)
    deepspeed = any(kind.partition(":")[0] in DEEPSPEED for kind in asked)
    if deepspeed:
        _start_deepspeed()
    elif "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=90))
    rank = str(dist.get_rank()) if dist.is_initialized() else "alone"
    for one in asked:
        kind, _, modes = one.partition(":")
        for mode in modes.split(",") if modes else MODES:
            found = train(kind, mode, FOLDER / f"run-{kind}-{mode}-{rank}")
            torch.save(found, FOLDER / f"{kind}-{mode}-{rank}.pt")
            print(kind, mode, "done", flush=True)
    sys.stdout.flush()
    if deepspeed:
        os._exit(0)  # its threads do not end by themselves
    if dist.is_initialized():
        dist.destroy_process_group()


def _start_deepspeed() -> None:
    """On a CPU, without its compiled operator for shared memory."""
    import deepspeed
    import deepspeed.comm.torch

    # By its full name: `deepspeed.comm.torch` as an attribute is torch itself.
    backend: Any = sys.modules["deepspeed.comm.torch"]
    backend.build_shm_op = lambda: None
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=120))


if __name__ == "__main__":
    main()
