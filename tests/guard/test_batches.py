"""Batches on their way into the model, and gradients as the optimizer used them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from vocabguard import VocabGuard
from vocabguard.config import ConfigError
from vocabguard.guard.batches import BatchContext, labels_of
from vocabguard.measure.exposure import ExposureCounter
from vocabguard.protect.collator import ECHO_KEY
from vocabguard.rows.models import predicts_next


def attached(kit: Any, model: nn.Module, optimizer: Any = None, **options: Any) -> VocabGuard:
    attach = {"hook_model": options.pop("hook_model", True)}
    guard = VocabGuard(**kit.QUIET | {"exposure": {"push_every_n_steps": 2}} | options)
    guard.attach(model, optimizer, **attach)
    return guard


def test_what_shifts_its_labels(kit: Any) -> None:
    small: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    masked = BertForMaskedLM(BertConfig(**small, intermediate_size=8))
    seq2seq = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))
    assert predicts_next(kit.llama())
    assert predicts_next(kit.Plain())
    assert not predicts_next(masked)
    assert not predicts_next(seq2seq)
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 4]])}
    guard = attached(kit, masked.train())
    masked(**batch)
    guard.step(1)
    assert guard.check().exposure.data_target.nonzero().flatten().tolist() == [2, 4]


@pytest.mark.parametrize(("shift", "expected"), [(None, [3]), (True, [3]), (False, [2, 3])])
def test_the_shift_can_be_told(kit: Any, shift: bool | None, expected: list[int]) -> None:
    guard = attached(kit, kit.llama(), exposure={"shift_labels": shift})
    guard.observe(None, torch.tensor([[2, 3, -100]]))
    guard.step(1)
    assert guard.check().exposure.data_target.nonzero().flatten().tolist() == expected


def test_only_training_passes_are_counted(kit: Any) -> None:
    model, batch = kit.llama(), kit.batches(1)[0]
    guard = attached(kit, model)
    model.eval()(**batch)
    assert not guard._observer.counter.targets_now().any()
    model.train()(input_ids=batch["input_ids"])
    assert not guard._observer.counter.targets_now().any(), "a pass without labels asks for nothing"
    model(**batch)
    assert guard._observer.counter.targets_now().any()


def test_accumulation_counts_every_batch_and_one_gradient(kit: Any) -> None:
    model, data = kit.llama(), kit.batches(6)
    optimizer = kit.sgd(model)
    guard = attached(kit, model, optimizer)
    pulls = torch.zeros(kit.ROWS)
    for step in range(1, 4):
        asked: set[int] = set()
        for batch in data[2 * step - 2 : 2 * step]:
            model(**batch).loss.backward()
            asked |= set(batch["labels"][:, 1:].flatten().tolist()) - {-100}
        optimizer.step()
        for token in asked:
            pulls[token] += model.lm_head.weight.grad[token].norm()
        guard.step(step)
        optimizer.zero_grad()
    found = guard.check().exposure
    assert found.data_target.tolist() == kit.naive_counts(data)["data_target"]
    torch.testing.assert_close(found.pull, pulls)
    assert (found.steps, found.push_samples) == (3, 1)


def test_inputs_given_by_position(kit: Any) -> None:
    class Own(kit.Plain):  # type: ignore[name-defined, misc]
        def forward(self, ids: Any, labels: Any = None) -> Any:
            return super().forward(ids)

    model = Own()
    guard = attached(kit, model.train(), matrices=kit.PLAIN)
    model(torch.tensor([[1, 2, 2]]), labels=torch.tensor([[1, 2, 2]]))
    guard.step(1)
    found = guard.check().exposure
    assert (found.inputs[2], found.data_target[2], found.data_target[1]) == (2, 2, 0)


def test_everything_given_by_position_or_as_one_batch(kit: Any) -> None:
    data = kit.batches(3)
    model = kit.llama()
    guard = attached(kit, model.train())
    for step, batch in enumerate(data, start=1):
        ids, labels, mask = (batch[name] for name in ("input_ids", "labels", "attention_mask"))
        if step == 2:
            model(ids, mask, labels=labels)
        else:
            model(ids, mask, None, None, None, labels)
        guard.step(step)
    expected = kit.naive_counts(data)
    found = guard.check().exposure
    assert found.data_target.tolist() == expected["data_target"]
    assert found.inputs.tolist() == expected["inputs"], "the mask is told by position, too"

    class Batched(kit.Plain):  # type: ignore[name-defined, misc]
        def forward(self, batch: Any) -> Any:
            return super().forward(batch["input_ids"])

    model = Batched()
    guard = attached(kit, model.train(), matrices=kit.PLAIN)
    for step, batch in enumerate(data, start=1):
        model(batch)
        guard.step(step)
    assert guard.check().exposure.data_target.tolist() == expected["data_target"]


def test_what_takes_labels_as_they_are(kit: Any) -> None:
    small: dict[str, Any] = {"vocab_size": 16, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    config = BartConfig(**small, **heads)
    assert predicts_next(BartForCausalLM(config)) is False
    assert predicts_next(BartForSequenceClassification(config)) is None


def test_labels_that_are_no_tokens_are_not_counted(kit: Any) -> None:
    model = LlamaForSequenceClassification(kit.llama().config).train()
    guard = attached(kit, model)
    model.config.pad_token_id = 0
    model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 9]]), labels=torch.tensor([0, 1]))
    guard.step(1)
    reason = "LlamaForSequenceClassification has no output rows over the vocabulary: its labels are no tokens"
    assert guard.check().exposure.reason == reason
    assert guard.watch.preflight.reason
    with pytest.raises(ConfigError, match=f"hold: {reason}"):
        attached(kit, model, hold={"enabled": True})
    # Whoever tells targets apart is believed.
    told = attached(kit, model, hook_model=False, targets=lambda batch: (None, batch["y"]))
    told.observe_batch({"y": torch.tensor([[7, 8, -100]])})
    told.step(1)
    assert told.check().exposure.data_target.nonzero().flatten().tolist() == [7, 8]


def test_several_optimizers_one_holds_the_head(kit: Any) -> None:
    model, batch = kit.llama(), kit.batches(1)[0]
    head = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    body = torch.optim.SGD(model.model.parameters(), lr=0.1)
    guard = attached(kit, model, [body, head])
    model(**batch).loss.backward()
    body.step()
    assert guard._observer.counter.pull.sum() == 0
    head.step()
    assert guard._observer.counter.pull.sum() > 0
    assert (len(body._optimizer_step_post_hooks), len(head._optimizer_step_post_hooks)) == (0, 1)
    guard.finish()
    assert len(head._optimizer_step_post_hooks) == 0


def test_an_optimizer_inside_a_wrapper(kit: Any) -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

    model = kit.llama()
    inner = kit.sgd(model)
    attached(kit, model, Wrapper(inner))
    assert len(inner._optimizer_step_post_hooks) == 1


def test_counting_can_be_off(kit: Any) -> None:
    model, data = kit.llama(), kit.batches(2)
    optimizer = kit.sgd(model)
    guard = attached(kit, model, optimizer, exposure={"enabled": False})
    assert kit.hooks_on(model, optimizer) == 0
    kit.loop(guard, model, optimizer, data)
    guard.observe(None, data[0]["labels"])
    guard.observe_batch(data[0])
    guard.finish()
    assert "off" in guard.last.exposure.reason
    assert not [key for key in guard.latest if "exposure" in key or "never" in key]
    assert guard.last.worst[0].exposure_class == "unknown"
    assert guard.latest["vocabguard/head/cosine_min"] < 1


def test_batches_with_labels_are_counted_without_a_hook(kit: Any) -> None:
    model, data = kit.llama(), kit.batches(2)
    guard = attached(kit, model, hook_model=False)
    for step, batch in enumerate(data, start=1):
        guard.observe_batch(batch)
        model.train()(**batch)
        guard.step(step)
    found = guard.check().exposure
    assert found.data_target.tolist() == kit.naive_counts(data)["data_target"]
    assert found.inputs.tolist() == kit.naive_counts(data)["inputs"]


def test_batches_without_labels_are_counted_in_the_forward_pass(kit: Any) -> None:
    model, data = kit.llama(), kit.batches(3)
    guard = attached(kit, model, hook_model=False)
    for step, batch in enumerate(data, start=1):
        guard.observe_batch({"text": "of which the module makes a batch"})
        model.train()(**batch)
        guard.step(step)
    assert guard.check().exposure.data_target.tolist() == kit.naive_counts(data)["data_target"]


def test_an_extractor_tells_aligned_targets(kit: Any) -> None:
    guard = attached(kit, kit.llama(), hook_model=False, targets=lambda batch: (None, batch["y"]))
    guard.observe_batch({"y": torch.tensor([[7, 8, -100]])})
    guard.step(1)
    assert guard.check().exposure.data_target.nonzero().flatten().tolist() == [7, 8]


def test_labels_of() -> None:
    labels = torch.tensor([[1]])
    assert labels_of([labels], None) is None
    assert labels_of({"labels": "text"}, None) is None
    assert labels_of({"labels": labels, "input_ids": "text"}, None) == (None, labels, False)
    assert labels_of(3, lambda batch: (None, labels)) == (None, labels, True)


def test_silence_is_told_once(kit: Any, caplog: Any) -> None:
    model = kit.Plain()
    guard = VocabGuard(matrices=kit.PLAIN, drift={"every_n_steps": 1}, **kit.QUIET)
    guard.attach(model)
    assert not caplog.records
    for step in (1, 2, 3):
        guard.step(step)
    assert len(caplog.records) == 1
    assert "no_targets (warning): exposure/targets stays at 0, since step 1." in caplog.records[0].getMessage()


def test_an_optimizer_with_copies_of_its_own(kit: Any, caplog: Any) -> None:
    """As DeepSpeed's: gradients and put-back rows would never be seen."""
    model = kit.llama()
    optimizer = torch.optim.SGD([parameter.detach().clone() for parameter in model.parameters()], lr=0.1)
    guard = VocabGuard(**kit.QUIET)
    guard.attach(model, optimizer, total_steps=2)
    kit.loop(guard, model, optimizer, kit.batches(2))
    assert "pull and push are not applicable: no optimizer has the output matrix" in caplog.text
    guard.finish()
    exposure = guard.last.exposure
    assert exposure.data_target.sum() > 0
    for name in ("pull", "push", "input_only"):
        assert bool(getattr(exposure, name).isnan().all()), name
    with pytest.raises(ConfigError, match=r"hold: no optimizer has the output matrix .* allowed: an optimizer over"):
        VocabGuard(hold={"enabled": True}, **kit.QUIET).attach(model, optimizer, total_steps=2)
    assert len(model._forward_pre_hooks) == 0


def test_labels_that_are_shifted_already(kit: Any) -> None:
    """Adapters of sequence and context parallelism hand on `shift_labels`, with `labels` beside them or without."""
    ids = torch.tensor([[5, 6, 7, 8]])
    shifted = torch.tensor([[6, 7, -100, 9]])
    for batch in (
        {"input_ids": ids, "shift_labels": shifted},
        {"input_ids": ids, "labels": ids, "shift_labels": shifted},
    ):
        model = kit.llama().train()
        guard = attached(kit, model)
        model(**batch)
        guard.step(1)
        found = guard.check().exposure
        assert found.data_target.nonzero().flatten().tolist() == [6, 7, 9]
        assert found.inputs.nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_the_echo_mask_of_labels_that_are_shifted_already() -> None:
    """A mask of tokens is one place behind labels that are one place ahead; the inputs keep theirs."""
    context, counter = BatchContext(), ExposureCounter(rows=10, device="cpu", tied=False)
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[False, False, True, True]])
    context.take_out(nn.Linear(1, 1), (), {ECHO_KEY: mask})
    assert context.read({"input_ids": ids, "shift_labels": torch.tensor([[2, 3, 4, -100]])})
    assert context.aligned is not None
    counter.observe(
        context.inputs, context.aligned, shift=False, echo_mask=context.echo, echo_inputs=context.echo_inputs
    )
    found = counter.exposure()
    assert found.data_target.nonzero().flatten().tolist() == [2]
    assert found.echo_target.nonzero().flatten().tolist() == [3, 4]
    assert found.inputs.nonzero().flatten().tolist() == [1, 2]


def test_nothing_is_held_while_nothing_was_counted(kit: Any) -> None:
    """A guard that sees no targets would take every row for one that the data never asks for."""
    model = kit.llama().train()
    optimizer = kit.sgd(model)
    guard = attached(kit, model, optimizer, hold={"enabled": True, "mode": "freeze"})
    for step, batch in enumerate(kit.batches(3), start=1):
        before = model.lm_head.weight.detach().clone()
        blind = step < 3
        found = model(input_ids=batch["input_ids"]) if blind else model(**batch)
        loss = found.logits.square().mean() if blind else found.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        guard.step(step)
        still = (model.lm_head.weight == before).all(dim=1)
        assert not bool(still.any()) if blind else bool(still.any()) and not bool(still.all())
