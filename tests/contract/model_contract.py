"""What the guard promises for every model, checked against plain loops: drift, counts, row gradients, the probe."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from model_cases import ROWS, Batch, Case, frozen
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vocabguard import VocabGuard
from vocabguard.results import CheckResult, Exposure, NotApplicable, RowDrift, Watch, WatchedMatrix
from vocabguard.rows.models import core_of

COLUMNS = ("drift", "exposure", "push/pull", "probe")
YES = "yes"
OPTIONS: dict[str, Any] = {
    "log": {"console": False, "tensorboard": False},
    "on_error": "raise",
    "untrained": {"enabled": False},
    "drift": {"every_n_steps": 1000},
    "exposure": {"push_every_n_steps": 1},
    "probe": {"sample": 6, "contexts": {"one": {"text": "Repeat: {tokens}", "k": 1}}, "batch_tokens": 512},
}
STEPS = 3


@dataclass
class Found:
    """A short run under a guard, and the same numbers kept by plain loops.

    Attributes:
        case: what was run.
        model: after the run.
        guard: that watched it.
        watch: what it said before the first step.
        base: rows before, by name.
        shifts: whether a label at the first place is ignored by the model's own loss; None where it has none.
        counts: (2, V) int64, inputs and targets.
        gradients: (3, V) float64: pull, push, input only.
    """

    case: Case
    model: Any
    guard: VocabGuard
    watch: Watch
    base: dict[str, Tensor | None]
    shifts: bool | None
    counts: Tensor
    gradients: Tensor

    @property
    def last(self) -> CheckResult:
        """The last check."""
        assert self.guard.last is not None
        return self.guard.last


def text_batches(count: int, seed: int = 0) -> list[Batch]:
    """Two rows of eight tokens a batch, the second padded; beginnings are no targets."""
    rng = Random(seed)
    batches = []
    for _ in range(count):
        ids = torch.tensor([[int(rng.paretovariate(0.7)) % 60 + 300 for _ in range(8)] for _ in range(2)])
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[0, : rng.randint(5, 6)] = -100
        labels[1, 6:], mask[1, 6:] = -100, 0
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return batches


def loss_of(model: Any, batch: Batch) -> Tensor:
    """The model's loss; without one, a number that every output takes part in."""
    output = model(**batch)
    loss = getattr(output, "loss", None)
    return output.last_hidden_state.square().mean() if loss is None else loss


def shifts_labels(model: Any, batch: Batch) -> bool | None:
    """Whether the model's own loss leaves out a label at the first place; None where labels are no tokens."""
    if "labels" not in batch or batch["labels"].ndim != 2 or int(batch["labels"].max()) < 2:
        return None
    labels = torch.full_like(batch["labels"], -100)
    labels[:, 0] = 300
    with torch.no_grad():
        loss = float(loss_of(model, batch | {"labels": labels}))
    return loss == 0 or math.isnan(loss)


def naive_step(case: Case, model: Any, batch: Batch, shifts: bool | None, found: tuple[Tensor, Tensor]) -> None:
    """Count one batch and its gradient by plain loops; one matrix at both ends has input gradients apart."""
    counts, gradients = found
    targets, inputs = set(), set()
    labels = batch.get("labels")
    for line in range(len(batch["input_ids"])):
        for place, token in enumerate(batch["input_ids"][line].tolist()):
            if batch["attention_mask"][line, place]:
                counts[0, token] += 1
                inputs.add(token)
            if shifts is not None and labels is not None and not (shifts and place == 0):
                label = int(labels[line, place])
                if label != -100:
                    counts[1, label] += 1
                    targets.add(label)
    if case.head is None or not case.pulled:
        return
    norms = case.parameter(model, case.head).grad.double().norm(dim=1)
    kinds = torch.ones(ROWS, dtype=torch.int64)
    kinds[list(inputs)] = 2 if case.tied else 1
    kinds[list(targets)] = 0
    gradients[kinds, torch.arange(ROWS)] += norms


def run(case: Case, tokenizer: Any, steps: int = STEPS) -> Found:
    """A few optimizer steps in a hand-written loop under a guard."""
    model = frozen(case.build())
    data = [case.batch(batch) for batch in text_batches(steps)]
    shifts = shifts_labels(model.eval(), data[0])
    base = {name: case.rows_of(model, name) for name in ("head", "embedding")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    guard = VocabGuard(tokenizer=tokenizer, **OPTIONS)
    watch = guard.attach(model, optimizer, total_steps=steps)
    assert watch is not None
    counts, gradients = torch.zeros(2, ROWS, dtype=torch.int64), torch.zeros(3, ROWS, dtype=torch.float64)
    model.train()
    for step, batch in enumerate(data, start=1):
        torch.manual_seed(step)  # some models drop out by functions, which no module's rate switches off
        loss_of(model, batch).backward()
        optimizer.step()
        naive_step(case, model, batch, shifts, (counts, gradients))
        guard.step(step)
        optimizer.zero_grad()
    guard.finish()
    return Found(case, model, guard, watch, base, shifts, counts, gradients)


# -- what must hold --------------------------------------------------------------------------------------------------


def drift(found: Found) -> str:
    """Cosines to the start, or in words why there are none."""
    case, reasons = found.case, []
    ends = {"head": found.watch.head, "embedding": found.watch.embedding}
    followed = tuple(name for name, watched in ends.items() if isinstance(watched, WatchedMatrix))
    assert followed == case.moves, f"{followed} followed"
    for name, watched in ends.items():
        result, base = getattr(found.last, name), found.base[name]
        if isinstance(watched, NotApplicable):
            assert isinstance(result, NotApplicable)
            assert base is None or torch.equal(base, case.rows_of(found.model, name)), f"the {name} rows did move"
            assert len(watched.reason) > 20
            reasons.append(watched.reason)
            continue
        assert isinstance(watched, WatchedMatrix)
        assert isinstance(result, RowDrift)
        now = case.rows_of(found.model, name)
        assert base is not None, f"no {name} was expected"
        assert (watched.rows, watched.width) == tuple(base.shape)
        assert watched.tied is case.tied, f"tied is {watched.tied}"
        assert watched.bias is (case.bias and name == "head"), f"bias is {watched.bias}"
        expected = cosine_similarity(base.double(), now.double(), dim=1)
        assert (expected < 0.9999).sum() > 3, "no row has moved, so nothing was tried"
        rows = base.norm(dim=1) > 0
        torch.testing.assert_close(result.cosine[rows].double(), expected[rows], atol=2e-6, rtol=0)
    return YES if len(reasons) < 2 else f"not applicable: {reasons[0]}"


def exposure(found: Found) -> str:
    """Inputs and data targets, counted as the model's own loss takes labels."""
    case, result = found.case, found.last.exposure
    assert found.shifts is case.shift, f"the loss shifts: {found.shifts}"
    if isinstance(result, NotApplicable):
        assert case.shift is None
        return f"not applicable: {result.reason}"
    assert isinstance(result, Exposure)
    if case.shift is None or found.shifts is None:
        assert not result.data_target.any()
        return "not applicable: the model has no loss, so it gets no labels"
    assert torch.equal(result.data_target, found.counts[1]), "targets"
    assert torch.equal(result.inputs, found.counts[0]), "inputs"
    assert int(result.data_target.sum()) > 0
    assert result.steps == STEPS
    return YES


def push_pull(found: Found) -> str:
    """Norms of the head's row gradients, by what the row was in the step."""
    result = found.last.exposure
    if not found.case.pulled:
        if isinstance(result, Exposure):
            assert result.pull.isnan().all()
            assert result.push_samples == 0
            assert "vocabguard/exposure/push_share" not in found.guard.latest
        head = found.watch.head
        return f"not applicable: {head.reason if isinstance(head, NotApplicable) else _note(found)}"
    assert isinstance(result, Exposure)
    assert result.push_samples == STEPS
    for name, expected in zip(("pull", "push", "input_only"), found.gradients, strict=True):
        torch.testing.assert_close(getattr(result, name).double(), expected, atol=1e-6, rtol=1e-4, msg=name)
    assert float(result.pull.sum()) > 0
    return YES


@torch.no_grad()
def probe(found: Found) -> str:
    """What the model says at the end, asked for one token at a time."""
    if not found.case.probed:
        assert found.watch.probe is not None
        return f"not applicable: {found.watch.probe.reason}"
    assert found.watch.probe is None, found.watch.probe
    checker, result = found.guard._checker, found.last.probe
    assert checker is not None
    assert checker.prober is not None
    assert result is not None
    place = result.contexts.index("one")
    context = checker.prober.contexts[place]
    found.model.eval()
    for row, token in enumerate(result.ids.tolist()):
        prompt = torch.tensor([[*context.before, token, *context.after]])
        share = found.model(input_ids=prompt).logits[0, -1].double().softmax(0)
        assert abs(float(share[token]) - float(result.probability[row, place])) < 1e-5 + 1e-3 * float(share[token])
        assert bool(result.emitted[row, place]) == (int(share.argmax()) == token)
    return YES


CHECKS: dict[str, Callable[[Found], str]] = dict(zip(COLUMNS, (drift, exposure, push_pull, probe), strict=True))


def outcomes(case: Case, tokenizer: Any) -> dict[str, str]:
    """Run a case and check every column.

    Returns:
        For each of `COLUMNS` ``yes`` or ``not applicable: <reason>``; in reasons the class is "the model".

    Raises:
        AssertionError: where the guard breaks its promise.
        MissingError: where the installed library lacks the model.
    """
    return checked(run(case, tokenizer))


def checked(found: Found) -> dict[str, str]:
    """The same for a run that is done."""
    case = found.case
    if case.said is not None:
        assert re.search(case.said, " ".join(found.watch.notes)), found.watch.notes
    own_name = type(core_of(found.model)).__name__
    return {name: check(found).replace(own_name, "the model") for name, check in CHECKS.items()}


def expected_columns(case: Case) -> set[str]:
    """Columns that must be ``yes``."""
    wanted = {"drift"} if case.moves else set()
    wanted |= {"exposure"} if case.shift is not None else set()
    wanted |= {"push/pull"} if case.pulled else set()
    return wanted | ({"probe"} if case.probed else set())


def _note(found: Found) -> str:
    """The guard's note on gradients."""
    return next((note for note in found.watch.notes if "pull and push" in note), "")
