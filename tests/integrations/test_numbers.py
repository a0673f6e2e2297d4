"""What the guard reports of a real run equals what plain loops over the same run give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

STEPS = 6


def batches_of_steps(rows: list[dict[str, list[int]]], batch: int, accumulation: int) -> list[list[dict[str, Any]]]:
    """The rows that each optimizer step sees, in order."""
    size = batch * accumulation
    return [rows[start : start + size] for start in range(0, STEPS * size, size)]


def naive_counts(steps: list[list[dict[str, Any]]], rows: int) -> tuple[list[int], list[int], list[int]]:
    """Data targets, inputs and the last step as a target, by plain loops; the model predicts the next token."""
    targets, inputs, last = [0] * rows, [0] * rows, [-1] * rows
    for number, examples in enumerate(steps, start=1):
        for example in examples:
            for token in example["input_ids"]:
                inputs[token] += 1
            for label in example["labels"][1:]:
                if label != -100:
                    targets[label] += 1
                    last[label] = number
    return targets, inputs, last


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_cosines_pull_and_push(
    kit: Any, tokenizer: Any, tmp_path: Any, trainer_name: str, accumulation: int, tied: bool
) -> None:
    rows = kit.random_rows(STEPS * kit.BATCH * accumulation)
    callback = kit.CALLBACKS[trainer_name](
        tokenizer=tokenizer,
        drift={"every_n_steps": 2},
        exposure={"push_every_n_steps": 2},
        probe={"sample": 8},
        **kit.QUIET,
    )
    run = kit.RUNS[trainer_name](
        kit.tiny_model(tied=tied), rows, tokenizer, tmp_path, steps=STEPS, accumulation=accumulation,
        callbacks=(callback,),
    )  # fmt: skip
    found = callback.guard.last
    assert found.step == STEPS
    steps = batches_of_steps(rows, kit.BATCH, accumulation)
    targets, inputs, last = naive_counts(steps, kit.ROWS)
    assert found.exposure.data_target.tolist() == targets
    assert found.exposure.inputs.tolist() == inputs
    assert found.exposure.last_target.tolist() == last
    assert not found.exposure.echo_target.any()

    for name, key in (("head", "lm_head.weight"), ("embedding", "model.embed_tokens.weight")):
        before, now = run.base[key].double(), run.model.state_dict()[key].double()
        cosine = torch.nn.functional.cosine_similarity(before, now, dim=1)
        drift = getattr(found, name)
        zero = (before.norm(dim=1) == 0) | (now.norm(dim=1) == 0)  # the padding token's input row
        assert torch.equal(drift.zero, zero)
        assert drift.cosine[zero].isnan().all()
        torch.testing.assert_close(drift.cosine[~zero].double(), cosine[~zero], atol=1e-6, rtol=0)
        torch.testing.assert_close(drift.l2.double(), (now - before).norm(dim=1), atol=1e-6, rtol=1e-5)
        live = callback.guard.table.live
        never = live & (torch.tensor(targets) == 0)
        shift = (now - before)[never].mean(dim=0)
        residual = torch.nn.functional.cosine_similarity(before, now - shift, dim=1)
        torch.testing.assert_close(drift.residual[~zero].double(), residual[~zero], atol=1e-6, rtol=0)

    pull, push, input_only = (torch.zeros(kit.ROWS) for _ in range(3))
    for number, (examples, gradient) in enumerate(zip(steps, run.optimizer.gradients, strict=True), start=1):
        assert gradient.norm() <= kit.CLIP * 1.001
        asked = {label for example in examples for label in example["labels"][1:] if label != -100}
        seen = {token for example in examples for token in example["input_ids"]}
        for token, norm in enumerate(gradient.norm(dim=1).tolist()):
            if token in asked:
                pull[token] += norm
            elif number % 2 == 0:
                (input_only if tied and token in seen else push)[token] += norm
    torch.testing.assert_close(found.exposure.pull, pull)
    torch.testing.assert_close(found.exposure.push, push)
    torch.testing.assert_close(found.exposure.input_only, input_only)
    assert found.exposure.push_samples == STEPS // 2
    assert found.exposure.pull.sum() > 0
    assert found.exposure.push.sum() > 0
