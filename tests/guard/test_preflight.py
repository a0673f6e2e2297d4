"""Preflight counts what the data will ask for, and leaves the run as if it had not."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from vocabguard import ConfigError, VocabGuard
from vocabguard.data.counting import RowTally
from vocabguard.data.coverage import Coverage, CoverageSource
from vocabguard.guard.preflight import preflight
from vocabguard.results import NotApplicable, Preflight

OPTIONS: dict[str, Any] = {
    "rows": 64, "shift": True, "targets": None, "max_batches": 1000, "max_seconds": 60.0, "seed": 0
}  # fmt: skip


def examples(kit: Any, count: int = 4) -> list[dict[str, Tensor]]:
    return [{name: value[row] for name, value in batch.items()} for batch in kit.batches(count) for row in range(3)]


def naive(rows: list[dict[str, Tensor]]) -> list[int]:
    counts = [0] * 64
    for row in rows:
        for label in row["labels"].tolist()[1:]:
            if label != -100:
                counts[label] += 1
    return counts


@pytest.mark.parametrize("shuffle", [False, True])
def test_equals_naive_counts_over_the_whole_data(kit: Any, shuffle: bool) -> None:
    rows = examples(kit)
    found = preflight(DataLoader(rows, batch_size=5, shuffle=shuffle), **OPTIONS)
    assert found.data_target.tolist() == naive(rows)
    assert (found.batches, found.rows, found.complete) == (3, 12, True)


def test_unshifted_labels(kit: Any) -> None:
    rows = examples(kit)
    found = preflight(DataLoader(rows, batch_size=5), **OPTIONS | {"shift": False})
    first = sum(int(row["labels"][0]) != -100 for row in rows)
    assert first > 0
    assert int(found.data_target.sum()) == sum(naive(rows)) + first


@pytest.mark.parametrize("limit", [{"max_batches": 2}, {"max_seconds": 0.0}])
def test_a_limit_leaves_it_incomplete(kit: Any, limit: dict[str, Any]) -> None:
    found = preflight(DataLoader(examples(kit), batch_size=5), **OPTIONS | limit)
    batches = limit.get("max_batches", 1)
    assert (found.batches, found.rows, found.complete) == (batches, 5 * batches, False)
    assert 0 < int(found.data_target.sum()) < sum(naive(examples(kit)))


def test_the_sample_is_drawn_from_everywhere(kit: Any) -> None:
    """Sorted data would mislead if only its beginning were read."""
    rows = [{"input_ids": torch.full((4,), token), "labels": torch.full((4,), token)} for token in range(60)]
    found = preflight(DataLoader(rows, batch_size=5), **OPTIONS | {"max_batches": 4})
    assert (found.data_target > 0).sum() == 20
    assert found.data_target[40:].any()


@pytest.mark.parametrize("kind", ["batch sampler", "no batching"])
def test_other_ways_to_batch(kit: Any, kind: str) -> None:
    rows = examples(kit)
    if kind == "batch sampler":
        loader = DataLoader(rows, batch_sampler=BatchSampler(SequentialSampler(rows), 4, drop_last=False))
    else:
        loader = DataLoader(kit.batches(4), batch_size=None)
    found = preflight(loader, **OPTIONS)
    assert found.data_target.tolist() == naive(rows)
    assert found.complete


def test_the_loader_inside_an_accelerate_wrapper(kit: Any) -> None:
    from accelerate.data_loader import prepare_data_loader

    rows = examples(kit)
    found = preflight(prepare_data_loader(DataLoader(rows, batch_size=5)), **OPTIONS)
    assert found.data_target.tolist() == naive(rows)


class Drawing(Dataset[Any]):
    """Rows with noise from every kind of generator, its own among them."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows
        self.own = {"python": random.Random(1), "numpy": np.random.default_rng(1), "old": np.random.RandomState(1)}
        self.torch = torch.Generator().manual_seed(1)

    def __len__(self) -> int:
        return len(self.rows)

    def draws(self) -> list[float]:
        return [
            random.random(), float(np.random.rand()), float(torch.rand(())), self.own["python"].random(),
            float(self.own["numpy"].random()), float(self.own["old"].rand()),
            float(torch.rand((), generator=self.torch)),
        ]  # fmt: skip

    def __getitem__(self, index: int) -> Any:
        return self.rows[index] | {"noise": torch.tensor(self.draws())}


class Stateful:
    """A collator that counts its calls and draws from its own generator."""

    def __init__(self, **parts: Any) -> None:
        self.calls = 0
        self.rng = random.Random(2)
        self.parts = parts

    def __call__(self, rows: list[Any]) -> Any:
        self.calls += 1
        return torch.utils.data.default_collate(rows) | {"draw": self.rng.random(), "call": self.calls}

    collate = __call__


def read(loader: Any) -> list[Any]:
    return [{name: torch.as_tensor(value).tolist() for name, value in batch.items()} for batch in loader]


def make(collate: Any, kit: Any) -> DataLoader[Any]:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    return DataLoader(Drawing(examples(kit)), batch_size=5, shuffle=True, collate_fn=collate)


@pytest.mark.parametrize("kind", ["object", "partial", "bound method"])
def test_the_run_is_left_untouched(kit: Any, kind: str) -> None:
    """Every batch, its order and every draw are what they would have been."""

    def collator() -> Any:
        stateful = Stateful()
        return {"object": stateful, "partial": functools.partial(stateful), "bound method": stateful.collate}[kind]

    bare = read(make(collator(), kit))
    loader = make(collator(), kit)
    found = preflight(loader, **OPTIONS)
    after = read(loader)
    if kind == "bound method":
        # Its owner may be anything, so it is used as it is: only its generators are put back.
        assert [batch.pop("call") for batch in after] == [4, 5, 6]
        assert [batch.pop("call") for batch in bare] == [1, 2, 3]
    assert after == bare
    assert found.complete


class Uncopyable(nn.Module):
    """A model that takes offence at being copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the model was copied")


@pytest.mark.parametrize("kind", ["attribute", "nested", "partial", "module itself"])
def test_models_and_tokenizers_are_not_copied(kit: Any, tokenizer: Any, kind: str, monkeypatch: Any) -> None:
    def refuse(self: Any, memo: Any) -> Any:
        raise AssertionError("the tokenizer was copied")

    monkeypatch.setattr(type(tokenizer), "__deepcopy__", refuse, raising=False)
    with pytest.raises(AssertionError, match="tokenizer was copied"):
        copy.deepcopy(tokenizer)
    parts = Stateful(model=Uncopyable(), tokenizer=tokenizer)
    collate: Any = {
        "attribute": parts,
        "nested": Stateful(inner=parts, wrapped=[parts]),
        "partial": functools.partial(
            lambda rows, model, tokenizer: parts(rows), model=Uncopyable(), tokenizer=tokenizer
        ),
        "module itself": type("Collator", (Uncopyable,), {"forward": lambda self, rows: parts(rows)})(),
    }[kind]
    found = preflight(DataLoader(examples(kit), batch_size=5, collate_fn=collate), **OPTIONS)
    assert found.data_target.tolist() == naive(examples(kit))


def test_an_extractor_gives_aligned_targets(kit: Any) -> None:
    rows = [(torch.tensor([1, 2, 3]), torch.tensor([2, 3, -100])) for _ in range(6)]
    found = preflight(DataLoader(rows, batch_size=4), **OPTIONS | {"targets": lambda batch: (batch[0], batch[1])})
    assert found.data_target[:5].tolist() == [0, 0, 6, 6, 0]


class Stream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Any:
        while True:
            self.given += 1
            yield {"labels": torch.tensor([1, 2])}


def test_iterable_data_is_left_alone() -> None:
    stream = Stream()
    found = preflight(DataLoader(stream, batch_size=2), **OPTIONS)
    assert isinstance(found, NotApplicable)
    assert "iterable" in found.reason
    assert stream.given == 0


def test_what_is_no_dataloader(kit: Any) -> None:
    found = preflight(iter(kit.batches(2)), **OPTIONS)
    assert isinstance(found, NotApplicable)
    assert "DataLoader" in found.reason
    assert "list_iterator" in found.reason


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_missing_labels_are_refused_before_step_1(kit: Any, on_error: str) -> None:
    rows = [{"input_ids": torch.tensor([1, 2]), "attention_mask": torch.tensor([1, 1])} for _ in range(4)]
    model = kit.llama()
    optimizer = kit.sgd(model)
    guard = VocabGuard(on_error=on_error, log={"console": False})
    with pytest.raises(ConfigError, match=r"no labels.*\['attention_mask', 'input_ids'\].*targets="):
        guard.attach(model, optimizer, dataloader=DataLoader(rows, batch_size=2))
    assert kit.hooks_on(model, optimizer) == 0


def test_missing_labels_name_the_type_of_other_batches() -> None:
    with pytest.raises(ConfigError, match="holds list"):
        preflight(DataLoader([(torch.tensor([1]), torch.tensor([2]))]), **OPTIONS)


def test_it_reaches_the_watch(kit: Any) -> None:
    loader = DataLoader(examples(kit), batch_size=5)
    watch = VocabGuard(**kit.QUIET).attach(kit.llama(), dataloader=loader)
    assert isinstance(watch.preflight, Preflight)
    assert watch.preflight.data_target.tolist() == naive(examples(kit))
    off = VocabGuard(preflight={"enabled": False}, **kit.QUIET).attach(kit.llama(), dataloader=loader)
    assert "off" in off.preflight.reason
    none = VocabGuard(**kit.QUIET).attach(kit.llama())
    assert "dataloader" in none.preflight.reason


def coverage(counts: Tensor, rows: int = 12) -> Coverage:
    """What ``vocabguard coverage`` would have counted."""
    source = CoverageSource("toy", "", ("data.jsonl",), "assistant", False, None, 1, ("other",))
    size = len(counts)
    group, live = torch.zeros(size, dtype=torch.uint8), torch.ones(size, dtype=torch.bool)
    return Coverage(counts, counts.clone(), group, live, RowTally(rows=rows), source)


def test_counts_taken_beforehand_replace_the_sample(kit: Any, tmp_path: Any) -> None:
    path, counts = tmp_path / "counts.safetensors", torch.arange(60)
    coverage(counts).save(path)
    guard = VocabGuard(exposure={"prior": str(path)}, preflight={"enabled": False}, **kit.QUIET)
    model = kit.llama()
    # No dataloader is needed: the data was counted before.
    watch = guard.attach(model, kit.sgd(model), run_dir=tmp_path / "run")
    assert isinstance(watch.preflight, Preflight)
    assert watch.preflight.data_target.tolist() == [*range(60), 0, 0, 0, 0]
    assert (watch.preflight.rows, watch.preflight.complete) == (12, True)
    guard.finish()


@pytest.mark.parametrize("kind", ["missing", "no coverage", "too large"])
def test_a_prior_that_does_not_fit_is_refused(kit: Any, tmp_path: Any, kind: str) -> None:
    path = tmp_path / "counts.safetensors"
    if kind == "no coverage":
        path.write_bytes(b"not a tensor in sight")
    if kind == "too large":
        coverage(torch.arange(65)).save(path)
    guard = VocabGuard(exposure={"prior": str(path)}, **kit.QUIET)
    model = kit.llama()
    with pytest.raises(ConfigError, match=r"exposure\.prior"):
        guard.attach(model, kit.sgd(model), run_dir=tmp_path / "run")
    assert kit.hooks_on(model, kit.sgd(model)) == 0
