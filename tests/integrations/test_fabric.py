"""Lightning Fabric around a model and your own loop, as litgpt has them: no labels in the forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from by_path import module_of
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from vocabguard import ConfigError, VocabGuard
from vocabguard.results import NotApplicable, Preflight, RowDrift
from vocabguard.rows.models import unwrapped

EXAMPLE = Path(__file__).parents[2] / "examples" / "fabric_loop.py"
NAMED = {"head": "lm_head", "embedding": "wte"}


@pytest.fixture
def gpt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's model, its helpers left out."""
    import sys
    import types

    helpers = types.ModuleType("finetune")
    for name in ("BATCH", "LEARNING_RATE", "collator", "load_base", "training_rows"):
        setattr(helpers, name, None)
    monkeypatch.setitem(sys.modules, "finetune", helpers)
    module = module_of(EXAMPLE)
    torch.manual_seed(0)
    return module.GPT(tokens=8192)


class Loop:
    """A few steps with Fabric, with or without a guard; what the data and echo asked for is counted before the loss."""

    def __init__(self, kit: Any, tokenizer: Any, model: Any, guard: VocabGuard | None, **attach: Any) -> None:
        fabric = Fabric(accelerator="cpu", devices=1)
        self.rows = kit.random_rows(24)
        collate: Any = DataCollatorForSeq2Seq(tokenizer)
        self.base = model.lm_head.weight.detach().clone()
        self.inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.model, optimizer = fabric.setup(model, self.inner)
        loader = fabric.setup_dataloaders(DataLoader(self.rows, batch_size=4, collate_fn=collate))  # type: ignore[arg-type]
        self.losses: list[float] = []
        self.asked = [0] * 8192
        if guard is not None:
            self.watch = guard.attach(
                self.model, optimizer, total_steps=6, dataloader=loader, hook_model=False, inject="batch", **attach
            )
        self.model.train()
        for step, batch in enumerate(loader, start=1):
            if guard is not None:
                guard.observe_batch(batch)
            logits = self.model(batch["input_ids"])
            for row in batch["labels"].tolist():
                for label in row[1:]:
                    self.asked[label] += label != -100
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            fabric.backward(loss)
            optimizer.step()
            if guard is not None:
                guard.step(step)
            optimizer.zero_grad()
            self.losses.append(float(loss.detach()))


def test_counts_drift_gradients_and_probe(kit: Any, tokenizer: Any, gpt: Any) -> None:
    guard = VocabGuard(
        tokenizer=tokenizer, matrices=NAMED, call=lambda model, ids: model(ids), drift={"every_n_steps": 3},
        probe={"sample": 24, "asks": 1}, **kit.QUIET,
    )  # fmt: skip
    loop = Loop(kit, tokenizer, gpt, guard)
    last = guard.last
    assert last is not None
    kit.assert_counts(last.exposure, kit.naive_counts(loop.rows, 4))
    assert isinstance(loop.watch.preflight, Preflight)
    assert isinstance(last.head, RowDrift)
    expected = kit.naive_cosine(loop.base, gpt.lm_head.weight.detach())
    torch.testing.assert_close(last.head.cosine.double(), expected, atol=1e-5, rtol=0)
    asked = last.exposure.data_target > 0
    assert bool((last.exposure.pull[asked] > 0).all())
    assert guard.timings.probes > 0
    assert "vocabguard/probe/base" in guard.latest
    assert any(key.startswith("vocabguard/reference/") for key in guard.latest)


def test_the_loop_is_bit_for_bit_the_same_without(kit: Any, tokenizer: Any, gpt: Any) -> None:
    state = {name: value.clone() for name, value in gpt.state_dict().items()}
    plain = Loop(kit, tokenizer, gpt, None)
    after = {name: value.clone() for name, value in gpt.state_dict().items()}
    gpt.load_state_dict(state)
    guard = VocabGuard(
        tokenizer=tokenizer, matrices=NAMED, call=lambda model, ids: model(ids), probe={"sample": 24}, **kit.QUIET
    )
    watched = Loop(kit, tokenizer, gpt, guard)
    assert watched.losses == plain.losses
    assert all(torch.equal(value, after[name]) for name, value in gpt.state_dict().items())


def test_echo_and_hold(kit: Any, tokenizer: Any, gpt: Any) -> None:
    guard = VocabGuard(
        tokenizer=tokenizer, matrices=NAMED, probe={"enabled": False}, drift={"every_n_steps": 2},
        echo={"enabled": True, "dose": 0.5, "list_tokens": 4}, hold={"enabled": True, "mode": "freeze"}, **kit.QUIET,
    )  # fmt: skip
    loop = Loop(kit, tokenizer, gpt, guard)
    assert guard.last is not None
    found = guard.last.exposure
    targets, _, _ = kit.naive_counts(loop.rows, 4)
    assert found.data_target.tolist() == targets
    assert (found.data_target + found.echo_target).tolist() == loop.asked
    assert int(found.echo_target.sum()) > 20
    kept = (found.data_target == 0) & (found.echo_target == 0)
    assert torch.equal(gpt.lm_head.weight[kept], loop.base[kept])


class Parallel(nn.Module):
    """Holds a model as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrappers_are_looked_through(gpt: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    alone = fabric.setup_module(gpt)
    assert unwrapped(alone) is gpt
    assert unwrapped(_FabricModule(Parallel(gpt), fabric.strategy, original_module=gpt)) is gpt
    assert unwrapped(nn.Sequential(gpt)) is not gpt


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda model, ids: model(ids)[0], "gives a tensor of shape"),
        (lambda model, ids: (model(ids), None), "gives tuple"),
        (lambda model, ids: model(input_ids=ids), "fails with TypeError"),
    ],
)
def test_a_call_that_gives_no_logits_is_refused(kit: Any, tokenizer: Any, gpt: Any, call: Any, why: str) -> None:
    guard = VocabGuard(tokenizer=tokenizer, matrices=NAMED, call=call, log={"console": False})
    with pytest.raises(ConfigError, match=why):
        guard.attach(gpt, torch.optim.SGD(gpt.parameters(), lr=0.1))


def test_without_a_call_the_reason_names_it(tokenizer: Any, gpt: Any) -> None:
    guard = VocabGuard(tokenizer=tokenizer, matrices=NAMED, log={"console": False})
    watch = guard.attach(gpt, torch.optim.SGD(gpt.parameters(), lr=0.1))
    assert watch is not None
    assert isinstance(watch.probe, NotApplicable)
    assert "`call=`" in watch.probe.reason
    guard.finish(check=False)


def test_hold_without_an_optimizer_is_refused(tokenizer: Any, gpt: Any) -> None:
    guard = VocabGuard("hold", tokenizer=tokenizer, matrices=NAMED, log={"console": False})
    with pytest.raises(ConfigError, match="hold: attach got no optimizer"):
        guard.attach(gpt)
