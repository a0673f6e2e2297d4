"""Both losses against loops over targets, and the gradient of a batch with echo rows against its definition."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerFast

from vocabguard.guard.batches import BatchContext, LossMeter, target_losses
from vocabguard.guard.failures import Faults
from vocabguard.protect.collator import ECHO_KEY, EchoCollator, RowMaker
from vocabguard.protect.feed import EchoFeed
from vocabguard.protect.rows import IGNORE, EchoPrompt

ROWS = 64


def random_batch(seed: int, lines: int, width: int) -> tuple[Tensor, Tensor]:
    """Logits and labels, a third of them left out."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, ROWS, (lines, width), generator=generator)
    labels[torch.rand(lines, width, generator=generator) < 0.33] = IGNORE
    return torch.randn(lines, width, ROWS, generator=generator), labels


def naive(logits: Tensor, labels: Tensor, shift: bool) -> list[tuple[int, int, float]]:
    """(line, place of the label, cross entropy) of every target."""
    found = []
    for line in range(len(labels)):
        for place in range(int(shift), labels.shape[1]):
            label = int(labels[line, place])
            if label != IGNORE:
                scores = logits[line, place - int(shift)].double()
                found.append((line, place, float(torch.logsumexp(scores, 0) - scores[label])))
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(2, 8), st.booleans(), st.booleans())
def test_sums_of_chosen_targets(seed: int, lines: int, width: int, shift: bool, by_position: bool) -> None:
    logits, labels = random_batch(seed, lines, width)
    shape = (lines, width) if by_position else (lines,)
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    total, count = target_losses(logits, labels, chosen, shift)
    wanted = [
        loss for line, place, loss in naive(logits, labels, shift)
        if bool(chosen[line, place] if by_position else chosen[line])
    ]  # fmt: skip
    assert int(count) == len(wanted)
    assert float(total) == pytest.approx(sum(wanted), rel=1e-5, abs=1e-6)


def means(batches: list[tuple[Tensor, Tensor, Tensor | None]], shift: bool) -> dict[str, float]:
    """What the meter should say after batches of logits, labels and echo rows."""
    sums: dict[str, list[float]] = {"loss/data": [], "loss/echo": []}
    for logits, labels, echo in batches:
        for line, place, loss in naive(logits, labels, shift):
            mark = False if echo is None else bool(echo[line] if echo.ndim == 1 else echo[line, place])
            sums["loss/echo" if mark else "loss/data"].append(loss)
    return {key: sum(losses) / len(losses) for key, losses in sums.items() if losses}


def some_batches() -> list[tuple[Tensor, Tensor, Tensor | None]]:
    found: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for seed, lines in enumerate([3, 5, 2, 4]):
        echo = None if seed == 2 else torch.arange(lines) >= 2
        found.append((*random_batch(seed, lines, 7), echo))
    return found


def mean_loss(logits: Tensor, labels: Tensor, shift: bool, divided_by: float | None = None) -> Tensor:
    losses = [loss for _, _, loss in naive(logits, labels, shift)]
    return torch.tensor(sum(losses) / (len(losses) if divided_by is None else divided_by))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("output", ["attributes", "mapping", "logits_only"])
def test_both_means_over_several_batches(shift: bool, output: str) -> None:
    meter, batches = LossMeter(shift), some_batches()
    for logits, labels, echo in batches:
        given: dict[str, Any] = {"logits": logits, "loss": mean_loss(logits, labels, shift)}
        if output == "logits_only":
            del given["loss"]
        meter.add(given if output == "mapping" else SimpleNamespace(**given), {}, labels, echo)
    assert meter.take() == pytest.approx(means(batches, shift), rel=1e-5)
    assert meter.take() == {}


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_an_accumulated_step_divides_by_the_targets_of_all_its_batches(kind: Any) -> None:
    meter, batches = LossMeter(True), some_batches()
    whole = sum(len(naive(logits, labels, True)) for logits, labels, _ in batches)
    for logits, labels, echo in batches:
        loss = mean_loss(logits, labels, True, divided_by=whole)
        meter.add({"loss": loss, "logits": logits}, {"num_items_in_batch": kind(whole)}, labels, echo)
    assert meter.take() == pytest.approx(means(batches, True), rel=1e-5)


def test_without_logits_only_batches_without_echo_count() -> None:
    meter, batches = LossMeter(True), some_batches()
    for logits, labels, echo in batches:
        meter.add({"loss": mean_loss(logits, labels, True)}, {}, labels, echo)
    assert meter.take() == pytest.approx(means(batches[2:3], True), rel=1e-5)


@pytest.mark.parametrize("output", [{}, {"logits": torch.zeros(3, 1, ROWS)}, torch.zeros(3)])
def test_what_gives_no_loss_counts_nothing(output: Any) -> None:
    meter = LossMeter(True)
    _, labels = random_batch(0, 3, 7)
    meter.add(output, {}, labels, None)
    meter.add(output, {}, labels, torch.tensor([False, False, True]))
    meter.add({"loss": torch.tensor(1.0)}, {}, None, None)
    assert meter.take() == {}


def test_the_hook_follows_training_only() -> None:
    class Model(nn.Module):
        def forward(self, logits: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": logits, "loss": mean_loss(logits, batches[0][1], True)}

    batches = some_batches()
    logits, labels, echo = batches[0]
    meter, model, context = LossMeter(True), Model(), BatchContext()
    context.arrive({"labels": labels}, echo)
    handle = meter.hook(model, context, Faults("raise"))
    model.eval()
    model(logits, labels=labels)
    assert meter.take() == {}
    model.train()
    for known in ({"labels": labels}, {}):
        model(logits, **known)
        assert meter.take() == pytest.approx(means(batches[:1], True), rel=1e-5)
    handle.remove()
    model(logits, labels=labels)
    assert meter.take() == {}


# -- a real model with real batches ----------------------------------------------------------------------------------

IDS = [[20 + (7 * line + at) % 40 for at in range(size)] for line, size in enumerate([18, 25, 21])]


def features() -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": [IGNORE] * 6 + ids[6:]} for ids in IDS]


def with_echo(inner: Any) -> Any:
    maker = RowMaker([EchoPrompt((3, 4), (5,), (6,))], list_tokens=6, fill=0.4, seed=0)
    return EchoCollator(inner, EchoFeed(ROWS), maker).with_echo(features(), list(range(8, 20)), 0)


def padder(side: str) -> DataCollatorForSeq2Seq:
    core = Tokenizer(WordLevel({"w": 0, "<pad>": 1}, unk_token="w"))
    return DataCollatorForSeq2Seq(PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", padding_side=side))


def rows_alone(batch: Any) -> list[tuple[list[int], list[int], bool]]:
    """Ids, labels and echo mark of each row of a padded batch, without its padding."""
    found = []
    for ids, labels, mask, echo in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], batch[ECHO_KEY], strict=True
    ):
        found.append((ids[mask == 1].tolist(), labels[mask == 1].tolist(), bool(echo)))
    return found


def reference(model: Any, rows: list[tuple[list[int], list[int], bool]]) -> tuple[Tensor, dict[str, float]]:
    """Sum of cross entropies over the number of targets, one row after another; and the means apart."""
    losses: dict[bool, list[Tensor]] = {False: [], True: []}
    for ids, labels, echo in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        for place in range(1, len(ids)):
            if labels[place] != IGNORE:
                losses[echo].append(-logits[place - 1].log_softmax(0)[labels[place]])
    whole = torch.stack(losses[False] + losses[True])
    apart = {"loss/data": losses[False], "loss/echo": losses[True]}
    return whole.mean(), {key: torch.stack(found).mean().item() for key, found in apart.items()}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def metered(model: Any, batch: Any, **options: Any) -> tuple[Any, dict[str, float]]:
    given = {key: value for key, value in batch.items() if key != ECHO_KEY}
    meter = LossMeter(True)
    output = model(**given, **options)
    meter.add(output, options, batch["labels"], batch[ECHO_KEY])
    return output, meter.take()


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_is_that_of_all_targets_alike(kit: Any, side: str, tied: bool) -> None:
    model, batch = kit.llama(tied=tied), with_echo(padder(side))
    rows = rows_alone(batch)
    assert [echo for *_, echo in rows] == [False] * 3 + [True] * 2
    assert [(ids, labels) for ids, labels, _ in rows[:3]] == [(x["input_ids"], x["labels"]) for x in features()]
    output, apart = metered(model, batch)
    found = gradients(model, output.loss)
    loss, wanted_apart = reference(model, rows)
    assert_close(found, gradients(model, loss))
    assert apart == pytest.approx(wanted_apart, rel=1e-4)


def test_the_gradient_of_two_accumulated_batches(kit: Any) -> None:
    """Divided by the targets of both, as a trainer does that counts them before the forward passes."""
    model, batches = kit.llama(), [with_echo(padder("right")), padder("right")(features()[:2])]
    batches[1][ECHO_KEY] = torch.zeros(2, dtype=torch.bool)
    count = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
    outputs = [metered(model, batch, num_items_in_batch=torch.tensor(count)) for batch in batches]
    found = gradients(model, outputs[0][0].loss + outputs[1][0].loss)
    rows = [row for batch in batches for row in rows_alone(batch)]
    assert_close(found, gradients(model, reference(model, rows)[0]))
    for batch, (_, apart) in zip(batches, outputs, strict=True):
        wanted = reference(model, rows_alone(batch))[1] if bool(batch[ECHO_KEY].any()) else None
        assert wanted is None or apart == pytest.approx(wanted, rel=1e-4)
    assert set(outputs[1][1]) == {"loss/data"}


def test_losses_of_rows_joined_into_one(kit: Any) -> None:
    """Attention over joined rows is the model's business; of its logits, each part has to be counted right."""
    model, batch = kit.llama(rows=ROWS), with_echo(DataCollatorWithFlattening(return_position_ids=False))
    output, apart = metered(model, batch)
    assert apart == pytest.approx(means([(output.logits.detach(), batch["labels"], batch[ECHO_KEY])], True), rel=1e-4)
    assert not math.isclose(apart["loss/data"], apart["loss/echo"], rel_tol=1e-6)
