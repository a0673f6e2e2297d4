"""The reference text's numbers: against cross entropy token by token, and what damage of each kind does to them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reading
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from vocabguard.measure import reference
from vocabguard.measure.exposure import exposure_classes
from vocabguard.measure.reference import Windows, cut_windows, paired_rise, summarise_reference, token_nll
from vocabguard.results import EXPOSURE_CLASSES

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
ROWS = 37


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": ROWS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def windows() -> Windows:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, ROWS, (length,), generator=generator).tolist() for length in (5, 47, 2, 33, 64, 12)]
    return cut_windows(texts, window=40, max_tokens=1000, prefix=[1])


# -- windows -----------------------------------------------------------------------------------------------------------


def test_every_token_of_a_text_is_a_target_once() -> None:
    texts = [list(range(3, 3 + length)) for length in (1, 9, 10, 11, 30)]
    windows = cut_windows(texts, window=11, max_tokens=1000, prefix=[1])
    assert windows.targets[windows.measured].tolist() == [token for text in texts for token in text]
    assert windows.lengths.max() == 11
    assert (windows.ids[:, 0] == 1).all()


def test_without_a_prefix_the_first_token_of_a_window_is_no_target() -> None:
    windows = cut_windows([[7, 8, 9, 10, 11], [12]], window=2, max_tokens=1000)
    assert windows.ids.tolist() == [[7, 8], [9, 10]]
    assert windows.targets.tolist() == [[8], [10]]


def test_of_too_much_text_windows_come_from_all_of_it() -> None:
    texts = [[token] * 10 for token in range(100)]
    windows = cut_windows(texts, window=10, max_tokens=180)
    assert windows.measured.sum() == 180
    assert windows.ids[:, 0].tolist() == list(range(0, 100, 5))


@pytest.mark.parametrize("most", [1, 2, 7, 50, 333, 2000])
def test_no_more_is_read_than_asked_for(most: int) -> None:
    generator = torch.Generator().manual_seed(most)
    lengths = torch.randint(2, 90, (40,), generator=generator).tolist()
    for prefix in ([], [1]):
        windows = cut_windows([[5] * length for length in lengths], window=32, max_tokens=most, prefix=prefix)
        assert 0 < windows.measured.sum() <= most
        assert windows.measured.sum() >= min(most, sum(lengths)) - 3 * 32


def test_windows_without_room_or_target_are_refused() -> None:
    with pytest.raises(ValueError, match="window is 2; allowed: at least 3"):
        cut_windows([[5, 6]], window=2, max_tokens=9, prefix=[1, 2])
    with pytest.raises(ValueError, match="hold no target; allowed: texts of two tokens or more"):
        cut_windows([[5], []], window=8, max_tokens=9)


# -- likelihoods -------------------------------------------------------------------------------------------------------


def naive_nll(model: Any, windows: Windows) -> Tensor:
    """One window and one target at a time."""
    found = torch.full(windows.targets.shape, math.nan)
    for row, length in enumerate(windows.lengths.tolist()):
        ids = windows.ids[row, :length]
        for place in range(1, length):
            logits = model(input_ids=ids[None, :place]).logits[0, -1]
            found[row, place - 1] = nn.functional.cross_entropy(logits, ids[place])
    return found


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_likelihoods_are_those_of_a_plain_loop(model: Any, windows: Windows, batch_tokens: int) -> None:
    with torch.no_grad():
        expected = naive_nll(model.eval(), windows)
    found = token_nll(model, windows, batch_tokens=batch_tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5, equal_nan=True)


def test_logits_are_made_for_a_few_places_at_a_time(
    model: Any, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = token_nll(model, windows, batch_tokens=4096)
    sizes = []
    original = model.forward
    monkeypatch.setattr(reference, "_LOGITS_AT_ONCE", ROWS * 64)
    monkeypatch.setattr(reference, "_LOGITS_IN_FLOAT", ROWS * 7)
    monkeypatch.setattr(model, "forward", lambda input_ids, **rest: sizes.append(input_ids.numel()) or original(
        input_ids=input_ids, **rest))  # fmt: skip
    torch.testing.assert_close(token_nll(model, windows, batch_tokens=4096), whole, equal_nan=True)
    assert max(sizes) <= 64


def test_reading_disturbs_nothing(model: Any, windows: Windows) -> None:
    model.train()
    state = torch.get_rng_state()
    first = token_nll(model, windows, batch_tokens=64)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(token_nll(model, windows, batch_tokens=64).nan_to_num(), first.nan_to_num())


def test_a_window_longer_than_the_model_takes_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="a window has 65 tokens; the model takes at most 64"):
        token_nll(model, cut_windows([[3] * 65], window=65, max_tokens=99), batch_tokens=64)


# -- rises and intervals -----------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_residuals_summed_by_window() -> None:
    generator = torch.Generator().manual_seed(3)
    rise, chosen = torch.randn(30, 8, generator=generator), torch.rand(30, 8, generator=generator) < 0.4
    found = paired_rise(rise, chosen, z=1.0)
    values = [[float(rise[row, place]) for place in range(8) if chosen[row, place]] for row in range(30)]
    total = sum(map(len, values))
    mean = sum(map(sum, values)) / total
    clusters = [row for row in values if row]
    square = sum(sum(value - mean for value in row) ** 2 for row in clusters) * len(clusters) / (len(clusters) - 1)
    assert found.mean == pytest.approx(mean)
    assert (found.high - found.low) / 2 == pytest.approx(math.sqrt(square) / total, rel=0.05), (
        "Student's t: a bit wider"
    )
    assert (found.high - found.low) / 2 > math.sqrt(square) / total


def test_intervals_hold_the_truth_where_tokens_of_a_window_move_together() -> None:
    """Of 400 samples of 12 windows of 20 targets with a shift each: how many intervals miss."""
    generator = torch.Generator().manual_seed(0)
    missed = naive = 0
    for _ in range(400):
        rise = torch.randn(12, 1, generator=generator) + torch.randn(12, 20, generator=generator)
        kind = torch.rand(12, 20, generator=generator) < 0.5
        found = paired_rise(rise, torch.ones_like(kind), z=1.96)
        missed += not found.low <= 0 <= found.high
        naive += abs(found.mean) > 1.96 * float(rise.std()) / math.sqrt(rise.numel())
        apart = paired_rise(rise, kind, ~kind, z=1.96)
        missed += not apart.low <= 0 <= apart.high
    assert missed / 800 < 0.07
    assert naive / 400 > 0.3, "without windows most of that would be missed"


def test_one_window_says_nothing() -> None:
    found = paired_rise(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2).bool(), z=1.0)
    assert (found.mean, found.low, found.high) == (1.5, -math.inf, math.inf)


def parts_of(counts: Tensor) -> dict[str, Tensor]:
    classes = exposure_classes(counts)
    return {name: classes == index for index, name in enumerate(EXPOSURE_CLASSES)}


def test_rare_against_frequent_and_what_is_not_measured(windows: Windows) -> None:
    counts = torch.zeros(ROWS, dtype=torch.int64)
    counts[12:20], counts[20:24], counts[24:] = 2, 10, 50
    base = torch.where(windows.measured, 1.0, math.nan)
    now = base.clone()
    now[windows.targets < 20] += 0.75
    now[windows.targets >= 20] += 0.25
    found = summarise_reference(windows, base, now, parts_of(counts), z=2.0, least=20)
    assert found["rare_rise"] == pytest.approx(0.5)
    assert found["rare_rise_low"] == pytest.approx(0.5), "no spread, no width"
    assert found["never/nll_rise"] == pytest.approx(0.75)
    assert found["20+/nll_rise"] == pytest.approx(0.25)
    measured = windows.targets[windows.measured]
    assert found["5-19/targets"] == ((measured >= 20) & (measured < 24)).sum() < 20
    assert (found["rare/targets"], found["frequent/targets"]) == ((measured < 20).sum(), (measured >= 20).sum())
    assert not [key for key in found if key.startswith("5-19/nll")]
    assert found["nll"] == pytest.approx(float(now[windows.measured].mean()))
    assert "rare_rise" not in summarise_reference(windows, base, now, parts_of(counts), z=2.0, least=100)


def test_of_what_the_base_did_not_predict_nothing_is_lost(windows: Windows) -> None:
    counts = torch.zeros(ROWS, dtype=torch.int64)
    counts[20:] = 50
    base = torch.where(windows.measured, 1.0, math.nan)
    base[:, ::2] += 4
    now = base + 0.5 * (windows.targets < 20) * (base > 3) + 0.1 * (windows.targets < 20)
    found = summarise_reference(windows, base, now, parts_of(counts), z=2.0, least=20)
    assert found["rare_rise"] == pytest.approx(0.1, abs=1e-6)
    assert found["never/nll_rise"] > 0.2
    assert found["rare/targets"] < found["never/targets"]


def test_a_model_of_nans_is_not_measured(windows: Windows) -> None:
    base = torch.where(windows.measured, 1.0, math.nan)
    found = summarise_reference(windows, base, torch.full_like(base, math.nan), {}, z=2.0, least=1)
    assert found == {"targets": 0.0}


def test_readings_of_other_windows_are_refused(windows: Windows) -> None:
    with pytest.raises(ValueError, match="have the shapes"):
        summarise_reference(windows, torch.ones(2, 2), torch.ones(2, 2), {}, z=2.0)


# -- what damage does to it --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tokenizer: Any) -> Any:
    """The example's base model, texts that it repeats, and its reading; tokens of the English ones count as seen."""
    loaded = AutoModelForCausalLM.from_pretrained(ASSETS).float().eval()
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in reading.repeated(tokenizer)]
    windows = cut_windows(texts, window=128, max_tokens=8000)
    english = torch.tensor([token for ids in reading.paragraphs(tokenizer)[: reading.ENGLISH] for token in ids])
    counts = torch.bincount(english, minlength=8192) * 20
    return SimpleNamespace(
        model=loaded, windows=windows, parts=parts_of(counts), nll=token_nll(loaded, windows, batch_tokens=1024)
    )


def after(base: Any, *, z: float = 2.24) -> dict[str, float]:
    now = token_nll(base.model, base.windows, batch_tokens=1024)
    return summarise_reference(base.windows, base.nll, now, base.parts, z=z)


@pytest.fixture
def damaged(base: Any) -> Any:
    """The base, to be changed; put back afterwards."""
    state = {name: value.clone() for name, value in base.model.state_dict().items()}
    yield base
    base.model.load_state_dict(state)


def test_an_unchanged_model_has_not_risen_at_all(base: Any) -> None:
    found = after(base)
    assert found["rare/targets"] > 400
    assert found["frequent/targets"] > 200
    rises = {key: value for key, value in found.items() if "rise" in key}
    assert len(rises) >= 12
    assert set(rises.values()) == {0.0}
    assert found["never/targets"] > 500
    assert found["20+/targets"] > 500


@torch.no_grad()
def test_a_damaged_mlp_is_seen_though_no_row_has_moved(damaged: Any) -> None:
    damaged.model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    found = after(damaged)
    assert found["nll_rise_low"] > 0.1
    assert found["never/nll_rise_low"] > 0.1


@torch.no_grad()
def test_damaged_input_rows_of_rare_tokens_are_seen(damaged: Any) -> None:
    rare = damaged.parts["never"]
    rows = damaged.model.get_input_embeddings().weight
    rows[rare] = rows[rare][torch.randperm(int(rare.sum()), generator=torch.Generator().manual_seed(0))]
    found = after(damaged)
    assert found["nll_rise_low"] > 0.1
    assert found["never/nll_rise_low"] > 0.1


@torch.no_grad()
def test_damaged_output_rows_of_rare_tokens_are_seen(damaged: Any) -> None:
    rare = damaged.parts["never"]
    damaged.model.get_output_embeddings().weight[rare] = 0
    found = after(damaged)
    assert found["rare_rise_low"] > 0.1


def test_an_adapter_on_a_frozen_head_that_loses_tokens_is_seen(damaged: Any) -> None:
    """LoRA-like: only a low-rank change of the last layer learns to say nothing but the English tokens."""
    model, frequent = damaged.model, damaged.parts["20+"]
    layer, head = model.model.layers[-1].mlp.down_proj, model.get_output_embeddings().weight.clone()
    torch.manual_seed(0)
    left, right = torch.zeros(layer.out_features, 4), torch.randn(4, layer.in_features) * 0.05
    left.requires_grad_()
    optimizer = torch.optim.Adam([left], lr=0.05)
    ids = damaged.windows.ids[:6, :64]
    kept = layer.weight.detach().clone()
    for _ in range(8):
        logits = torch.func.functional_call(
            model, {"model.layers.1.mlp.down_proj.weight": kept + left @ right}, kwargs={"input_ids": ids}
        ).logits
        loss = logits.logsumexp(-1) - logits[..., frequent].logsumexp(-1)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        layer.weight.copy_(kept + left @ right)
    found = after(damaged)
    assert torch.equal(model.get_output_embeddings().weight, head), "no row has moved"
    assert found["rare_rise_low"] > 0.1
