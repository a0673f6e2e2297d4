"""Watching changes nothing: losses and weights are bit-identical with and without a guard."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bit_identical(kit: Any, tokenizer: Any, tmp_path: Any, trainer_name: str, accumulation: int) -> None:
    rows = kit.random_rows(24)

    def run(folder: str, *callbacks: Any) -> Any:
        # GPT-2 has dropout and the data is shuffled: any draw from a global generator would show.
        return kit.RUNS[trainer_name](
            kit.tiny_model("gpt2"), rows, tokenizer, tmp_path / folder, accumulation=accumulation, shuffle=True,
            callbacks=callbacks,
        )  # fmt: skip

    callback = kit.CALLBACKS[trainer_name](
        tokenizer=tokenizer,
        drift={"every_n_steps": 1},
        exposure={"push_every_n_steps": 1},
        probe={"sample": 32, "every_n_steps": 2},
        **kit.QUIET,
    )
    bare, guarded = run("bare"), run("guarded", callback)
    assert callback.guard.last.step == 6
    assert callback.guard.watch.preflight.complete
    assert bare.losses == guarded.losses
    assert len(set(bare.losses)) > 1
    for name, value in bare.model.state_dict().items():
        assert torch.equal(value, guarded.model.state_dict()[name]), name
    assert bare.model.training == guarded.model.training
