"""Watching changes nothing: losses and weights are bit-identical with and without a guard."""

from __future__ import annotations

from typing import Any

import pytest
import torch

# Each trainer's own words for the same.
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"hf": {}, "lightning": {}},
    "accumulation": {"hf": {"accumulation": 2}, "lightning": {"accumulation": 2}},
    "bf16": {"hf": {"bf16": True}, "lightning": {"precision": "bf16-mixed"}},
    "checkpointing": {"hf": {}, "lightning": {}},
    "workers": {"hf": {"dataloader_num_workers": 2}, "lightning": {"workers": 2}},
}


@pytest.mark.parametrize("way", WAYS)
def test_bit_identical(kit: Any, tokenizer: Any, tmp_path: Any, trainer_name: str, way: str) -> None:
    rows = kit.random_rows(24)

    def run(folder: str, *callbacks: Any) -> Any:
        # GPT-2 has dropout and the data is shuffled: any draw from a global generator would show.
        model: Any = kit.tiny_model("gpt2")
        if way == "checkpointing":
            # transformers has given it another name.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        return kit.RUNS[trainer_name](
            model, rows, tokenizer, tmp_path / folder, shuffle=True, callbacks=callbacks, **WAYS[way][trainer_name]
        )

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
