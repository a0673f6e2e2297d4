"""Counts and row gradients against plain loops over the same batches and autograd's own gradients."""

from __future__ import annotations

import dataclasses
import io
import math
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from vocabguard.measure import exposure as exposure_room
from vocabguard.measure.exposure import (
    ExposureCounter,
    count_targets,
    exposure_classes,
    gradient_norms,
    steps_since_target,
    summarise_exposure,
    targets_of,
)
from vocabguard.results import Exposure

V = 23
Batch = dict[str, list[list[int]]]


def random_batch(rng: Random, echo: str) -> Batch:
    """Ids partly outside the vocabulary, ignored labels, padding, and an echo mask per row or per position."""
    rows, width = rng.randint(1, 4), rng.randint(2, 7)
    grid = range(rows), range(width)
    whole_rows = [rng.randint(0, 1) for _ in grid[0]]
    return {
        "inputs": [[rng.randint(-2, V + 2) for _ in grid[1]] for _ in grid[0]],
        "labels": [[rng.choice([-100, -1, V, rng.randrange(V), rng.randrange(V)]) for _ in grid[1]] for _ in grid[0]],
        "attention": [[rng.randint(0, 1) for _ in grid[1]] for _ in grid[0]],
        "echo": [[r if echo == "rows" else rng.randint(0, 1) for _ in grid[1]] for r in whole_rows],
    }


def observe(counter: ExposureCounter, batch: Batch, shift: bool, echo: str) -> None:
    mask = torch.tensor(batch["echo"], dtype=torch.bool)
    counter.observe(
        torch.tensor(batch["inputs"]),
        torch.tensor(batch["labels"]),
        shift=shift,
        attention_mask=torch.tensor(batch["attention"]),
        echo_mask={"none": None, "rows": mask[:, 0], "positions": mask}[echo],
    )


class NaiveCounts:
    """The same bookkeeping, one token at a time."""

    def __init__(self) -> None:
        self.data: Counter[int] = Counter()
        self.echo: Counter[int] = Counter()
        self.inputs: Counter[int] = Counter()
        self.last: dict[int, int] = {}

    def observe(self, batch: Batch, shift: bool, echo: str, step: int) -> None:
        for b, labels in enumerate(batch["labels"]):
            for t, label in enumerate(labels):
                is_echo = echo != "none" and batch["echo"][b][t] == 1
                if (t > 0 or not shift) and 0 <= label < V:
                    (self.echo if is_echo else self.data)[label] += 1
                    self.last[label] = step
                token = batch["inputs"][b][t]
                if 0 <= token < V and batch["attention"][b][t] and not is_echo:
                    self.inputs[token] += 1


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("echo", ["none", "rows", "positions"])
def test_counts_equal_a_plain_loop(shift: bool, echo: str) -> None:
    rng, naive = Random(1), NaiveCounts()
    counter = ExposureCounter(V, "cpu", tied=False)
    for step in range(1, 9):
        for _ in range(rng.randint(1, 3)):  # micro-batches of one optimizer step
            batch = random_batch(rng, echo)
            observe(counter, batch, shift, echo)
            naive.observe(batch, shift, echo, step)
        counter.end_step(step)
    found = counter.exposure()
    assert found.data_target.tolist() == [naive.data[v] for v in range(V)]
    assert found.echo_target.tolist() == [naive.echo[v] for v in range(V)]
    assert found.inputs.tolist() == [naive.inputs[v] for v in range(V)]
    assert found.last_target.tolist() == [naive.last.get(v, -1) for v in range(V)]
    assert found.steps == 8
    assert steps_since_target(found).tolist() == [8 - naive.last[v] if v in naive.last else -1 for v in range(V)]


def test_inputs_may_be_missing_and_a_mask_of_another_shape_is_not_used() -> None:
    counter = ExposureCounter(V, "cpu", tied=False)
    ids = torch.tensor([[1, 2, 2]], dtype=torch.int32)
    counter.observe(None, ids, shift=True)
    assert counter.exposure().inputs.sum() == 0
    counter.observe(ids, ids, shift=True, attention_mask=torch.zeros(1, 1, 3, 3))
    assert counter.exposure().inputs.tolist()[:3] == [0, 1, 2]
    assert counter.exposure().data_target.tolist()[:3] == [0, 0, 4]


class TinyModel(nn.Module):
    """An embedding, a nonlinearity and a head, tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, 5), nn.Linear(5, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.embedding(inputs)))[:, :-1]
        return nn.functional.cross_entropy(logits.reshape(-1, V), labels[:, 1:].reshape(-1))


@pytest.mark.parametrize("tied", [True, False])
def test_pull_and_push_equal_row_norms_of_autograd(tied: bool) -> None:
    torch.manual_seed(0)
    model, counter = TinyModel(tied), ExposureCounter(V, "cpu", tied=tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pull, push, input_only = ([0.0] * V for _ in range(3))
    share, sampled = math.nan, 0
    for step in range(1, 7):
        targets, read = set(), set()
        for micro in range(2):
            inputs = torch.randint(0, V, (2, 4))
            labels = inputs.masked_fill(torch.rand(2, 4) < 0.5, -100)
            labels[0, 1] = inputs[0, 1]
            echo = (
                torch.tensor([True, False]) if micro else None
            )  # echo rows are targets and inputs of the gradient too
            counter.observe(inputs, labels, shift=True, echo_mask=echo)
            (model.loss(inputs, labels) / 2).backward()
            targets |= {int(x) for x in labels[:, 1:].flatten() if x >= 0}
            read |= {int(x) for x in inputs.flatten()}
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        gradient = model.head.weight.grad
        assert gradient is not None
        norms = [math.sqrt(sum(float(x) ** 2 for x in row)) for row in gradient.double()]
        counter.observe_gradient(gradient, sample_push=step % 2 == 0)
        for v in range(V):
            if v in targets:
                pull[v] += norms[v]
            elif step % 2 == 0:
                (input_only if tied and v in read else push)[v] += norms[v]
        if step % 2 == 0:
            share = sum(norms[v] for v in range(V) if v not in targets) / sum(norms)
            sampled += 1
        optimizer.step()
        optimizer.zero_grad()
        counter.end_step(step)
    found = counter.exposure()
    for name, expected in {"pull": pull, "push": push, "input_only": input_only}.items():
        torch.testing.assert_close(getattr(found, name), torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert found.push_share == pytest.approx(share, rel=1e-5)
    assert found.push_samples == sampled == 3
    assert bool(found.input_only.any()) is tied
    assert found.push.any()
    assert found.pull.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_row_norms_in_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposure_room, "_NORM_ELEMENTS", 40)  # 4 rows a chunk, the last one short
    matrix = torch.randn(27, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix[5, 3], matrix[6, 3] = torch.nan, torch.inf
    expected = torch.stack([row.double().square().sum().sqrt().float() for row in matrix])
    expected[5:7] = 0
    torch.testing.assert_close(gradient_norms(matrix), expected)
    picked = torch.tensor([26, 0, 9, 9, 5])
    torch.testing.assert_close(gradient_norms(matrix, picked), expected[picked])
    assert gradient_norms(matrix, torch.tensor([], dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("sample_push", [True, False])
def test_a_sparse_gradient_counts_as_its_dense_form(sample_push: bool) -> None:
    indices, values = torch.tensor([[3, 7, 3]]), torch.randn(3, 4)
    gradient = torch.sparse_coo_tensor(indices, values, (V, 4), check_invariants=True)  # row 3 twice
    found = []
    for form in (gradient, gradient.to_dense()):
        counter = ExposureCounter(V, "cpu", tied=True)
        counter.observe(torch.tensor([[7, 1]]), torch.tensor([[0, 3]]), shift=True)
        counter.observe_gradient(form, sample_push)
        found.append(counter.exposure())
    assert found[0].pull[3] > 0
    assert bool(found[0].input_only[7] > 0) is sample_push
    for name in ("pull", "push", "input_only"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name))


def test_gradient_faults() -> None:
    counter = ExposureCounter(V, "cpu", tied=False)
    with pytest.raises(ValueError, match=r"\(22, 4\); expected \(23, D\)"):
        counter.observe_gradient(torch.zeros(V - 1, 4), sample_push=True)
    counter.observe_gradient(torch.zeros(V, 4), sample_push=True)
    assert math.isnan(counter.exposure().push_share)
    counter.observe_gradient(torch.full((V, 4), torch.nan), sample_push=True)
    assert not counter.exposure().push.any()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph_without_recompiles(backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter, expected = (ExposureCounter(V, "cpu", tied=False) for _ in range(2))
    model, compiled = TinyModel(False), CompileCounterWithBackend(backend)

    @torch.compile(backend=compiled, fullgraph=True)
    def step(inputs: Tensor, labels: Tensor, echo: Tensor, attention: Tensor) -> Tensor:
        counter.observe(inputs, labels, shift=True, attention_mask=attention, echo_mask=echo)
        return model.loss(inputs, labels)

    for number in range(1, 6):
        inputs, labels = torch.randint(0, V, (3, 6)), torch.randint(-2, V + 2, (3, 6))
        labels[labels < 0] = labels[labels >= V] = -100
        echo, attention = torch.rand(3) < 0.5, (torch.rand(3, 6) < 0.7).long()
        step(inputs, labels, echo, attention).backward()
        expected.observe(inputs, labels, shift=True, attention_mask=attention, echo_mask=echo)
        for one in (counter, expected):
            one.observe_gradient(model.head.weight.grad, sample_push=True)  # type: ignore[arg-type]
            one.end_step(number)
    assert (compiled.frame_count, len(torch._dynamo.utils.counters["graph_break"])) == (1, 0)
    for name, value in counter.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name])
    assert counter.exposure().data_target.any()


def test_state_survives_a_checkpoint(tmp_path: Path) -> None:
    rng = Random(3)
    straight, before, after = (ExposureCounter(V, "cpu", tied=True) for _ in range(3))
    gradients = [torch.randn(V, 4, generator=torch.Generator().manual_seed(i)) for i in range(6)]

    def run(counter: ExposureCounter, batches: list[Batch], first: int) -> None:
        for step, batch in enumerate(batches, start=first):
            observe(counter, batch, True, "rows")
            counter.observe_gradient(gradients[step - 1], sample_push=True)
            counter.end_step(step)

    batches = [random_batch(rng, "rows") for _ in range(6)]
    run(straight, batches, 1)
    run(before, batches[:3], 1)
    save_file({k: v for k, v in before.state_dict().items() if isinstance(v, Tensor)}, tmp_path / "x.safetensors")
    stream = io.BytesIO()
    torch.save(before.state_dict(), stream)
    stream.seek(0)
    storage = after.pull.data_ptr()
    after.load_state_dict(torch.load(stream, weights_only=True))
    assert after.pull.data_ptr() == storage
    run(after, batches[3:], 4)
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="23 rows; expected 24"):
        ExposureCounter(V + 1, "cpu", tied=True).load_state_dict(straight.state_dict())


@pytest.mark.parametrize("rows", [V + 4, V - 4])
def test_resize_keeps_what_is_known(rows: int) -> None:
    counter, rng = ExposureCounter(V, "cpu", tied=False), Random(5)
    for step in (1, 2):
        observe(counter, random_batch(rng, "rows"), False, "rows")
        counter.observe_gradient(torch.ones(V, 2), sample_push=True)
        counter.end_step(step)
    old = counter.exposure()
    counter.resize(rows)
    new, kept = counter.exposure(), min(rows, V)
    for field in dataclasses.fields(Exposure):
        was, now = getattr(old, field.name), getattr(new, field.name)
        if isinstance(was, Tensor):
            assert now.shape == (rows,)
            torch.testing.assert_close(now[:kept], was[:kept])
            assert (now[kept:] == (-1 if field.name == "last_target" else 0)).all()
        else:
            assert now == was
    assert not counter.targets_now().any()
    counter.observe(None, torch.tensor([[rows - 1]]), shift=False)
    assert counter.targets_now().nonzero().tolist() == [[rows - 1]]


def test_what_exposure_gives_is_a_copy() -> None:
    counter = ExposureCounter(V, "cpu", tied=False)
    first = counter.exposure()
    counter.observe(None, torch.tensor([[1]]), shift=False)
    counter.end_step(1)
    assert not first.data_target.any()
    assert (first.last_target == -1).all()


@pytest.mark.parametrize("shift", [True, False])
def test_count_targets_equals_a_plain_count(shift: bool) -> None:
    labels = torch.tensor(random_batch(Random(7), "none")["labels"])
    wanted = Counter(int(x) for row in labels for x in row[1 if shift else 0 :])
    assert count_targets(labels, shift, V).tolist() == [wanted[v] for v in range(V)]
    assert targets_of(labels, shift).shape[1] == labels.shape[1] - shift


def test_summary_is_over_live_tokens() -> None:
    counter = ExposureCounter(8, "cpu", tied=False)
    counter.observe(None, torch.tensor([[0] * 1 + [1] * 4 + [2] * 5 + [3] * 19 + [4] * 20 + [7] * 3]), shift=False)
    exposure, live = counter.exposure(), torch.tensor([1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    classes = exposure_classes(exposure.data_target)
    assert classes.dtype == torch.uint8
    expected = {"never": 1 / 6, "1-4": 2 / 6, "5-19": 2 / 6, "20+": 1 / 6}
    assert summarise_exposure(exposure, classes, live) == pytest.approx(expected)
    gradient = torch.zeros(8, 2)
    gradient[4], gradient[5] = 3.0, 1.0  # token 5 alone was no target
    counter.observe_gradient(gradient, sample_push=True)
    summary = summarise_exposure(counter.exposure(), classes, torch.zeros_like(live))
    assert summary == pytest.approx({"never": 0, "1-4": 0, "5-19": 0, "20+": 0, "push_share": 0.25})
