"""A compiled model under the guard: no graph break and no recompile more than without it, and the same losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vocabguard import VocabGuard

STEPS = 8


def run(kit: Any, *, guarded: bool) -> tuple[list[float], int, dict[str, int], Any]:
    """Losses, frames compiled, graph breaks, and the guard."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    model = kit.llama()
    compiled = torch.compile(model, backend=counter)
    optimizer = kit.sgd(model)
    guard = VocabGuard(drift={"every_n_steps": 2}, exposure={"push_every_n_steps": 2}, **kit.QUIET) if guarded else None
    losses = []
    if guard is not None:
        guard.attach(compiled, optimizer, total_steps=STEPS)
    for step, batch in enumerate(kit.batches(STEPS), start=1):
        loss = compiled(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if guard is not None:
            guard.step(step)
    return losses, counter.frame_count, dict(torch._dynamo.utils.counters["graph_break"]), guard


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lru_cache.*")
def test_no_break_no_recompile_and_the_same_losses(kit: Any) -> None:
    bare, frames, breaks, _ = run(kit, guarded=False)
    losses, frames_guarded, breaks_guarded, guard = run(kit, guarded=True)
    assert frames > 0
    assert frames_guarded == frames
    assert breaks_guarded == breaks
    assert losses == pytest.approx(bare, abs=1e-6)
    assert guard.last.step == STEPS
    expected = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in kit.batches(STEPS))
    assert int(guard.last.exposure.data_target.sum()) == expected
