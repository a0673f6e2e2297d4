"""Both trainers tell the same story of the same rows, seed and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

STEPS = 8


@pytest.mark.parametrize("accumulation", [1, 2])
def test_same_counts_and_cosines(kit: Any, tokenizer: Any, tmp_path: Path, accumulation: int) -> None:
    # Rows of one length: Lightning averages the losses of an accumulation, the other trainer averages over targets.
    rows = [
        {"input_ids": row["input_ids"][-4:], "labels": row["input_ids"][-4:]}
        for row in kit.random_rows(STEPS * kit.BATCH * accumulation)
    ]
    found = {}
    for name in ("hf", "lightning"):
        callback = kit.CALLBACKS[name](
            tokenizer=tokenizer,
            drift={"every_n_steps": 2},
            exposure={"push_every_n_steps": 2},
            probe={"sample": 16, "every_n_steps": 4},
            **kit.QUIET,
        )
        run = kit.RUNS[name](
            kit.tiny_model(), rows, tokenizer, tmp_path / name, steps=STEPS, accumulation=accumulation,
            callbacks=(callback,),
        )  # fmt: skip
        found[name] = (callback.guard, run)
    (hf, hf_run), (other, other_run) = found["hf"], found["lightning"]
    assert hf.last.step == STEPS
    kit.assert_same_findings(other.last, hf.last)
    assert torch.equal(other.last.classes, hf.last.classes)
    assert torch.equal(other.watch.preflight.data_target, hf.watch.preflight.data_target)
    assert other.last.scalars.keys() == hf.last.scalars.keys()
    for matrix in ("lm_head.weight", "model.embed_tokens.weight"):
        one, two = (run.model.state_dict()[matrix] for run in (hf_run, other_run))
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
        assert not torch.equal(one, hf_run.base[matrix])
    probes = [guard.last.probe for guard in (hf, other)]
    assert torch.equal(probes[0].ids, probes[1].ids)
    torch.testing.assert_close(probes[0].probability, probes[1].probability, atol=1e-6, rtol=1e-4)
    forecasts = [guard.last.forecast for guard in (hf, other)]
    for part in ("cosine", "chance"):
        one, two = (getattr(forecast, part) for forecast in forecasts)
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0, equal_nan=True)
