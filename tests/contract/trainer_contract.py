"""What the guard promises under every trainer, checked against plain loops over what was trained on."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import model_contract
import torch
from model_contract import YES
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from trainer_cases import Doc, Job, Trained, TrainerCase, kit, without_dropout

from vocabguard.config import ConfigError
from vocabguard.protect.collator import ECHO_KEY
from vocabguard.results import NotApplicable, RowDrift

WATCH: dict[str, Any] = {
    "log": {"console": False, "tensorboard": False},
    "on_error": "raise",
    "alerts": {},
    "untrained": {"enabled": False},
    "drift": {"every_n_steps": 1},
    "exposure": {"push_every_n_steps": 2},
    "probe": {"sample": 6, "contexts": {"one": {"text": "Repeat: {tokens}", "k": 1}}, "every_n_steps": 1},
}
QUIET = WATCH | {"probe": {"enabled": False}}
ECHO = QUIET | {"echo": {"enabled": True, "dose": 0.5, "list_tokens": 4}}
HOLD = QUIET | {"hold": {"enabled": True, "mode": "freeze"}}


class Trial:
    """The runs of a case, each made when it is first asked for."""

    def __init__(self, case: TrainerCase, folder: Path) -> None:
        self.case, self._folder = case, folder

    def run(self, name: str, options: dict[str, Any] | None, phase: str = "whole") -> Trained:
        """A run in a folder of its own."""
        return self.case.train(Job(self._folder / name, options, phase))

    @cached_property
    def watched(self) -> Trained:
        """The whole run under a watching guard."""
        return self.run("watched", WATCH)

    @cached_property
    def docs(self) -> list[Doc]:
        """All rows of the data, in order."""
        assert self.case.docs is not None
        return self.case.docs()

    def asked(self, trained: Trained) -> list[set[int]]:
        """Data targets of each step."""
        if self.case.ordered:
            size, shift = self.case.rows_a_step, int(self.case.shift)
            parts = [self.docs[start : start + size] for start in range(0, len(self.docs), size)]
            return [{label for _, labels in part for label in labels[shift:]} - {-100} for part in parts]
        return [set(batch["labels"][:, 1:].flatten().tolist()) - {-100} for batch in trained.tape.batches]


def untouched(trial: Trial) -> None:
    """Watching changes neither losses nor weights, by a bit."""
    bare, watched = trial.run("bare", None), trial.watched
    assert len(bare.losses) > 1
    assert bare.losses == watched.losses
    for name, value in bare.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name


def drift(trial: Trial) -> str:
    """Cosines of both matrices to the start."""
    trained, last = trial.watched, trial.watched.guard.last
    names = {"head": trial.case.head, "embedding": _embedding(trained)}
    for name, key in names.items():
        result = getattr(last, name)
        if key is None:
            assert isinstance(result, NotApplicable)
            continue
        assert isinstance(result, RowDrift)
        before, now = trained.base[key].double(), trained.model.state_dict()[key].double()
        used = before.norm(dim=1) > 0
        expected = cosine_similarity(before, now, dim=1)
        assert expected[used].min() < 0.999
        torch.testing.assert_close(result.cosine[used].double(), expected[used], atol=1e-6, rtol=0)
    return YES


def exposure(trial: Trial) -> str:
    """Data targets and inputs, counted over the data itself."""
    case, found = trial.case, trial.watched.guard.last.exposure
    if case.docs is None:
        assert isinstance(found, NotApplicable)
        return f"not applicable: {found.reason}"
    targets, inputs, last = [0] * kit.ROWS, [0] * kit.ROWS, [-1] * kit.ROWS
    for place, (ids, labels) in enumerate(trial.docs):
        for token in ids:
            inputs[token] += 1
        for label in labels[int(case.shift) :]:
            if label != -100:
                targets[label] += 1
                last[label] = 1 + place // case.rows_a_step
    assert found.data_target.tolist() == targets
    assert found.inputs.tolist() == inputs
    assert not found.echo_target.any()
    if case.ordered:
        assert found.last_target.tolist() == last
    return YES


def push_pull(trial: Trial) -> str:
    """Norms of the head's clipped row gradients, by whether the row was a target in the step."""
    case, trained = trial.case, trial.watched
    found = trained.guard.last.exposure
    if case.docs is None:
        return exposure(trial)
    sums = torch.zeros(3, kit.ROWS)  # pull, push, input only
    gradients, asked = trained.optimizer.gradients, trial.asked(trained)
    assert len(gradients) == len(asked) > 2
    every = case.batches_a_step
    for step, (gradient, targets) in enumerate(zip(gradients, asked, strict=True), start=1):
        assert 0 < gradient.norm() <= kit.CLIP * 1.001
        batches = trained.tape.batches[(step - 1) * every : step * every]
        seen = {token for batch in batches for token in batch["input_ids"][batch["attention_mask"] != 0].tolist()} \
            if case.tied else set()  # fmt: skip
        for token, norm in enumerate(gradient.norm(dim=1).tolist()):
            if token in targets:
                sums[0, token] += norm
            elif step % 2 == 0:
                sums[2 if token in seen else 1, token] += norm
    for name, expected in zip(("pull", "push", "input_only"), sums, strict=True):
        torch.testing.assert_close(getattr(found, name), expected, msg=name)
    assert found.pull.sum() > 0
    assert found.push.sum() > 0
    return YES


def probe(trial: Trial) -> str:
    """What the model says at the end, asked for one token at a time."""
    trained = trial.watched
    found = SimpleNamespace(
        case=trial.case, watch=trained.guard.watch, guard=trained.guard, last=trained.guard.last, model=trained.model
    )
    return model_contract.probe(found)  # type: ignore[arg-type]


def echo(trial: Trial) -> str:
    """Echo rows beside the data: counted apart, and the gradient is that of all targets alike."""
    case = trial.case
    try:
        trained = trial.run("echo", ECHO)
    except ConfigError as error:
        return _refused(case, "echo", str(error))
    assert "echo" not in case.refuses
    replay, every = _Replay(case, trained), case.batches_a_step
    batches = trained.tape.batches
    per = len(trained.losses) // len(trained.optimizer.gradients)
    for step, gradient in enumerate(trained.optimizer.gradients):
        replay.step(batches[step * every : (step + 1) * every])
        naive = replay.optimizer.gradients[-1]
        assert (gradient - naive).norm() < 5e-3 * naive.norm()  # rounding, as AdamW amplifies it
        # Clipped, a gradient says nothing of what the loss was divided by.
        told = sum(trained.losses[step * per : (step + 1) * per]) / per
        assert min(abs(told / loss - 1) for loss in replay.loss) < 1e-3
    found, latest = trained.guard.last.exposure, trained.guard.latest
    assert found.echo_target.tolist() == replay.echoed.tolist()
    assert int(found.echo_target.sum()) > 10
    if len(trained.optimizer.gradients) * case.rows_a_step == len(trial.docs):
        assert found.data_target.tolist() == trial.watched.guard.last.exposure.data_target.tolist()
    for name, (total, count) in replay.losses.items():
        torch.testing.assert_close(latest[f"vocabguard/loss/{name}"], total / count, rtol=1e-4, atol=1e-5, msg=name)
    return YES


class _Replay:
    """The same training by plain loops: one row at a time, each target alike."""

    def __init__(self, case: TrainerCase, trained: Trained) -> None:
        self.case = case
        self.model = without_dropout(kit.tiny_model("llama" if case.shift else "t5"))
        self.optimizer = kit.RecordingAdamW(self.model)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / 100)
        self._scheduled = type(trained.optimizer.param_groups[0].get("initial_lr")) is float
        self.echoed = torch.zeros(kit.ROWS, dtype=torch.int64)
        self.loss: tuple[float, ...] = ()
        self.losses: dict[str, tuple[float, int]] = {}

    def step(self, batches: list[dict[str, Tensor]]) -> None:
        """One optimizer step over the batches that the model saw."""
        parts: list[tuple[Tensor, int]] = []
        others: list[int] = []
        told = {"data": [0.0, 0], "echo": [0.0, 0]}
        for batch in batches:
            total, count, labelled = torch.zeros(()), 0, 0
            for ids, labels, is_echo in rows_of(batch, self.case):
                loss, asked = self._loss(ids, labels)
                total, count = total + loss, count + len(asked)
                labelled += int((labels != -100).sum())
                kind = told["echo" if is_echo else "data"]
                kind[0] += loss.item()
                kind[1] += len(asked)
                if is_echo:
                    self.echoed += torch.bincount(asked, minlength=kit.ROWS)
                    said = ids.tolist()
                    assert all(said.count(token) >= (2 if self.case.shift else 1) for token in asked.tolist())
            parts.append((total, count))
            others.append(labelled)
        if self.case.per_batch:
            loss = torch.stack([total / count for total, count in parts]).mean()
        else:
            loss = torch.stack([total for total, _ in parts]).sum() / sum(count for _, count in parts)
        # Older trainers divide by a label at the first place too, which is no target.
        self.loss = loss.item(), sum(total.item() for total, _ in parts) / sum(others)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), kit.CLIP)
        self.optimizer.step()
        if self._scheduled:
            self._schedule.step()
        self.optimizer.zero_grad()
        self.losses = {name: (total, count) for name, (total, count) in told.items() if count}

    def _loss(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross entropies of one row, and its targets."""
        if self.case.shift:
            logits, targets = self.model(input_ids=ids[None]).logits[0, :-1], labels[1:]
        else:
            logits, targets = self.model(input_ids=ids[None], labels=labels[None]).logits[0], labels
        keep = targets != -100
        return cross_entropy(logits[keep], targets[keep], reduction="sum"), targets[keep]


def rows_of(batch: dict[str, Tensor], case: TrainerCase) -> list[tuple[Tensor, Tensor, bool]]:
    """(ids, labels, whether it is an echo row) of each row of a batch, without padding, joined rows cut apart.

    Where the echo mask is out of the batch before the model sees it, echo rows are those below the data's.
    """
    size = case.rows_a_step // case.batches_a_step
    ids, labels, positions = batch["input_ids"], batch["labels"], batch.get("position_ids")
    echo = batch.get(ECHO_KEY)
    found = []
    if "attention_mask" not in batch:
        assert positions is not None
        starts = [*(positions[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        for begin, end in pairwise(starts):
            is_echo = echo is not None and bool(echo[0, begin])
            found.append((ids[0, begin:end], labels[0, begin:end], is_echo))
        return found
    for place, mask in enumerate(batch["attention_mask"].bool()):
        asked = labels[place][mask] if case.shift else labels[place][labels[place] != -100]
        found.append((ids[place][mask], asked, place >= size if echo is None else bool(echo[place])))
    return found


def hold(trial: Trial) -> str:
    """Rows that the data never asks for are the base's, bit by bit; the others have moved."""
    case = trial.case
    try:
        trained = trial.run("hold", HOLD)
    except ConfigError as error:
        return _refused(case, "hold", str(error))
    assert "hold" not in case.refuses
    assert case.head is not None
    found = trained.guard.last.exposure
    before, now = trained.base[case.head], trained.model.state_dict()[case.head]
    free = found.data_target > 0
    free |= (found.inputs > 0) if case.tied else False
    assert torch.equal(before[~free], now[~free])
    assert bool((before[free] != now[free]).any(dim=1).all())
    assert 0.5 < trained.guard.latest["vocabguard/hold/share"] < 1
    watched = trial.watched.model.state_dict()[case.head]
    assert not torch.equal(before[~free], watched[~free]), "without hold they do move"
    return YES


def resume(trial: Trial) -> str:
    """A run in two parts ends as the whole one."""
    if not trial.case.resumes:
        return "not run"
    whole = trial.watched
    trial.run("parts", WATCH, "first")
    second = trial.run("parts", WATCH, "second")
    one, other = second.guard.last, whole.guard.last
    assert one.step == other.step
    for name in ("data_target", "inputs", "last_target", "pull", "push", "input_only"):
        assert torch.equal(getattr(one.exposure, name), getattr(other.exposure, name)), name
    for name in ("cosine", "l2"):
        assert torch.equal(getattr(one.head, name), getattr(other.head, name)), name
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    return YES


CHECKS: dict[str, Callable[[Trial], str]] = {
    "drift": drift, "exposure": exposure, "push/pull": push_pull, "probe": probe, "echo": echo, "hold": hold,
    "resume": resume,
}  # fmt: skip


def outcomes(case: TrainerCase, folder: Path) -> dict[str, str]:
    """Run a case and check every column.

    Returns:
        For each of `CHECKS` ``yes``, ``not applicable: <reason>`` or ``not run``.

    Raises:
        AssertionError: where the guard breaks its promise.
        MissingError: where a library is missing.
    """
    trial = Trial(case, folder)
    untouched(trial)
    return {name: check(trial) for name, check in CHECKS.items()}


def expected_columns(case: TrainerCase) -> set[str]:
    """Columns that must be ``yes``."""
    wanted = {"drift"} | ({"exposure", "push/pull"} if case.docs is not None else set())
    wanted |= ({"probe"} if case.probed else set()) | ({"resume"} if case.resumes else set())
    return wanted | ({"echo", "hold"} - set(case.refuses))


def _refused(case: TrainerCase, column: str, said: str) -> str:
    assert column in case.refuses, said
    assert re.search(case.refuses[column], said), said
    return f"not applicable: {said}"


def _embedding(trained: Trained) -> str:
    """Name of the input embedding's parameter."""
    return "shared.weight" if "shared.weight" in trained.base else "model.embed_tokens.weight"
