"""The probe against one prompt at a time, and what it must leave alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from vocabguard.config import GuardConfig
from vocabguard.measure import probe as probe_room
from vocabguard.measure.contexts import asked_in, choose_asks, choose_contexts
from vocabguard.measure.probe import PromptContext, ask_words, probe, probe_applicable
from vocabguard.measure.retention import retained, said, said_instead, summarise_probe
from vocabguard.measure.sampling import sample_weights, stratified_sample
from vocabguard.protect.prompts import render_pool

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
V = 61
CONTEXTS = (
    PromptContext("list", (1, 2, 3), (4,), 5),
    PromptContext("one", (7,), (8, 9), 1),
    PromptContext("bare", (), (), 3),
    PromptContext("again", (1,), (5,), 4, between=((2, 3), (6,))),
    PromptContext("pairs", (1,), (9,), 4, between=((2, 3),), shots=2),
)


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=64, pad_token_id=0, **sizes, **settings))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)  # else the model says the same everywhere
    return model


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=2))


class BareLanguageModel(nn.Module):
    """A causal model of one's own, which knows neither ``logits_to_keep`` nor ``use_cache``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.mixer, self.head = nn.Embedding(V, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, V)

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.head(self.mixer(self.embedding(input_ids))[0])
        return type("Output", (), {"logits": logits})()


class Adapted(nn.Module):
    """A wrapper that passes keywords on, as PEFT's do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_base_model(self) -> nn.Module:
        return self.inner

    def forward(self, **options: Any) -> Any:
        assert options["logits_to_keep"] < 24  # the inner model's signature was asked
        return self.inner(**options)


SIZES = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "pad_token_id": 0}
MODELS = {"llama": llama, "gpt2": gpt2, "own": BareLanguageModel, "adapted": lambda: Adapted(llama())}


def lists_asked(model: nn.Module, ids: Tensor, context: PromptContext, seed: int) -> list[list[list[int]]]:
    """Read from the prompts that reach the model: of each list the examples before it, and the list."""
    seen, begin, k = list[list[list[int]]](), len(context.before), min(context.k, len(ids))

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for row in kwargs["input_ids"].tolist():
            assert tuple(row[:begin]) == context.before
            if context.shots is not None:
                line = 2 + len(context.after) + len(context.between[0])
                tokens = row[begin::line]
                seen.append([tokens[: context.shots], tokens[context.shots :]])
                assert row == prompt_of(context, *seen[-1], k - 1)
            else:
                seen.append([[], row[begin : begin + k]])
                assert row == prompt_of(context, [], seen[-1][1], k - 1)

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    probe(model, ids, [context], seed=seed, batch_tokens=10_000)
    hook.remove()
    return seen


def prompt_of(context: PromptContext, examples: list[int], one: list[int], place: int) -> list[int]:
    """The prompt that asks for the token at a place of a list, written out."""
    found = [*context.before]
    if context.shots is not None:
        for token in [*examples, *one[:place]]:
            found += [token, *context.after, token, *context.between[0]]
        return [*found, one[place], *context.after]
    for between in context.between:
        found += [*one, *between]
    return [*found, *one, *context.after, *one[:place]]


@torch.no_grad()
def naive(model: nn.Module, asked: list[list[list[int]]], context: PromptContext) -> dict[int, tuple[float, int, int]]:
    """Probability, rank and best token of each id at its first occurrence, one whole prompt and one place at a time."""
    found: dict[int, tuple[float, int, int]] = {}
    for examples, one in asked:
        for place, id_ in enumerate(one):
            prompt = prompt_of(context, examples, one, place)
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
            rank = sum(1 for other in logits.tolist() if other > logits[id_].item())
            found.setdefault(id_, (logits.softmax(0)[id_].item(), rank, int(logits.argmax())))
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_answers_equal_one_prompt_at_a_time(kind: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_room, "_LOGITS_IN_FLOAT", 4 * V)
    model = MODELS[kind]().eval()
    ids = torch.randperm(V)[:23]  # no multiple of any k, in no order
    result = probe(model, ids, CONTEXTS, seed=3, batch_tokens=batch_tokens)
    assert result.contexts == ("list", "one", "bare", "again", "pairs")
    for column, context in enumerate(CONTEXTS):
        expected = naive(getattr(model, "inner", model), lists_asked(model, ids, context, seed=3), context)
        wanted = [expected[int(id_)] for id_ in ids]
        torch.testing.assert_close(result.probability[:, column], torch.tensor([w[0] for w in wanted]))
        assert result.rank[:, column].tolist() == [w[1] for w in wanted]
        assert result.instead[:, column].tolist() == [w[2] for w in wanted]
        assert result.emitted[:, column].tolist() == [w[2] == id_ for w, id_ in zip(wanted, ids.tolist(), strict=True)]
    assert len(set(result.instead.flatten().tolist())) > 2  # a model that says one thing would prove nothing


@pytest.mark.parametrize(("count", "k"), [(23, 5), (20, 5), (3, 5), (1, 1), (7, 1)])
def test_every_id_is_asked_once_and_lists_hold_no_id_twice(count: int, k: int) -> None:
    ids, context = torch.arange(10, 10 + count), PromptContext("x", (1,), (2,), k)
    asked = [one for _, one in lists_asked(llama(), ids, context, seed=0)]
    flat = [id_ for one in asked for id_ in one]
    assert sorted(flat[:count]) == ids.tolist()
    assert all(len(set(one)) == len(one) == min(k, count) for one in asked)
    assert 0 <= len(flat) - count < k
    assert [one for _, one in lists_asked(llama(), ids, context, seed=0)] == asked
    if count > 5:
        others = (
            lists_asked(llama(), ids, context, seed=1),
            lists_asked(llama(), ids, replace(context, name="y"), seed=0),
        )
        assert all([one for _, one in other] != asked for other in others)


def test_nothing_to_ask_and_no_way_to_ask() -> None:
    result = probe(llama(), torch.tensor([], dtype=torch.int64), CONTEXTS, seed=0, batch_tokens=64)
    assert result.emitted.shape == result.probability.shape == (0, 5)
    assert said_instead(result).shape == (0,)
    assert summarise_probe(result, result, {}) == {"asked": 0.0, "known": 0.0}
    with pytest.raises(ValueError, match="contexts is empty"):
        probe(llama(), torch.tensor([1]), [], seed=0, batch_tokens=64)


def test_a_prompt_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"probe\.contexts\.long: a prompt has 65 tokens; the model takes at most 64"):
        probe(llama(), torch.arange(30), [PromptContext("long", (1,) * 6, (), 30)], seed=0, batch_tokens=64)


def test_a_broken_model_says_nothing() -> None:
    model = llama()
    model.lm_head.weight.data.fill_(torch.nan)
    result = probe(model, torch.arange(8), CONTEXTS, seed=0, batch_tokens=64)
    assert not result.emitted.any()
    assert (result.probability == 0).all()
    assert (result.rank == V).all()


def test_everything_is_left_as_it_was() -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    weights = [p.detach().clone() for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]

    inference = []

    def draw(_: nn.Module, __: Any, output: Any) -> None:
        torch.rand(3)  # a model that uses the global generator even in evaluation mode
        inference.append(output.logits.is_inference())  # what a model caches then would not serve training

    hook = model.register_forward_hook(draw)
    with torch.autocast("cpu", torch.bfloat16):
        probe(model, torch.arange(20), CONTEXTS, seed=0, batch_tokens=64)
        assert torch.is_autocast_enabled("cpu")
    first = probe(model, torch.arange(20), CONTEXTS, seed=0, batch_tokens=64)
    hook.remove()
    assert [module.training for module in model.modules()] == modes
    second = probe(model.eval(), torch.arange(20), CONTEXTS, seed=0, batch_tokens=64)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # type: ignore[index]
    for parameter, gradient, weight in zip(model.parameters(), gradients, weights, strict=True):
        assert torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]
        assert torch.equal(parameter, weight)
    assert torch.is_grad_enabled()
    assert not second.probability.requires_grad
    assert not any(inference)
    torch.testing.assert_close(first.probability, second.probability)  # no dropout in either


def test_modes_return_when_the_model_fails() -> None:
    model = llama().train()
    model.lm_head.eval()
    with pytest.raises(IndexError):
        probe(model, torch.tensor([V + 5]), CONTEXTS, seed=0, batch_tokens=64)
    assert model.training
    assert not model.lm_head.training


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_not_compiled_again(in_place: bool) -> None:
    torch._dynamo.reset()
    model, counter = llama().train(), CompileCounter()
    expected = probe(model, torch.arange(20), CONTEXTS, seed=0, batch_tokens=64)
    compiled = model if in_place else torch.compile(model, backend=counter)
    if in_place:
        model.compile(backend=counter)
    batch = torch.arange(12)[None]
    compiled(input_ids=batch, labels=batch)
    graphs = counter.frame_count
    result = probe(compiled, torch.arange(20), CONTEXTS, seed=0, batch_tokens=64)  # type: ignore[arg-type]
    compiled(input_ids=batch, labels=batch)
    assert counter.frame_count == graphs > 0
    torch.testing.assert_close(result.probability, expected.probability)


def test_the_base_says_what_it_learned() -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(ASSETS), AutoModelForCausalLM.from_pretrained(ASSETS)
    never = json.loads((ASSETS / "base.json").read_text(encoding="utf-8"))["never_trained"]
    ids = torch.tensor(sorted(set(range(300, 8160, 31)) - set(never)))
    pool = render_pool(tokenizer, GuardConfig().probe.contexts)
    contexts = choose_asks(model, pool, ids[::5], 4, seed=1, batch_tokens=4096).contexts
    assert len(contexts) == 4
    result = probe(model, ids, contexts, seed=0, batch_tokens=4096)
    assert said(result).float().mean() > 0.92
    model.lm_head.weight.data[ids[:40]] = 0  # rows that no longer answer
    now = probe(model, ids, contexts, seed=0, batch_tokens=4096)
    zeroed = torch.arange(len(ids)) < 40
    assert retained(result, now, zeroed) == 0
    assert retained(result, now, ~zeroed) > 0.95


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (llama, None),
        (gpt2, None),
        (BareLanguageModel, None),
        (lambda: Adapted(llama()), None),
        (lambda: Adapted(LlamaModel(LlamaConfig(intermediate_size=8, **SIZES))), "no output matrix"),
        (lambda: torch.compile(llama(), backend="eager"), None),
        (lambda: T5ForConditionalGeneration(T5Config(d_model=8, num_heads=1, **SIZES)), "encoder-decoder"),
        (lambda: BertForMaskedLM(BertConfig(intermediate_size=8, **SIZES)), "ForMaskedLM"),
        (
            lambda: LlamaForSequenceClassification(LlamaConfig(intermediate_size=8, **SIZES)),
            "ForSequenceClassification",
        ),
        (lambda: LlamaModel(LlamaConfig(intermediate_size=8, **SIZES)), "no output matrix"),
        (lambda: nn.Linear(2, 2), "does not take input_ids"),
    ],
)
def test_who_can_be_asked(build: Any, reason: str | None) -> None:
    found = probe_applicable(build())
    assert (found is None) if reason is None else (found is not None and reason in found.reason)


@pytest.mark.parametrize("size", [0, 1, 7, 40, 151, 800, 5000])
def test_sample_gives_strata_their_share_and_small_ones_a_floor(size: int) -> None:
    generator = torch.Generator().manual_seed(4)
    strata = torch.tensor([0] * 700 + [1] * 200 + [3] * 90 + [4] * 9 + [9] * 1)[
        torch.randperm(1000, generator=generator)
    ]
    eligible = (torch.rand(1000, generator=generator) < 0.9) & (strata != 3) | (strata == 9)
    sample = stratified_sample(strata, eligible, size, seed=1)
    ids = sample.tolist()
    assert len(ids) == min(size, int(eligible.sum()))
    assert all(a < b for a, b in pairwise(ids))
    assert all(eligible[id_] for id_ in ids)
    sizes, drawn = Counter(strata[eligible].tolist()), Counter(strata[sample].tolist())
    for label, available in sizes.items():
        floor = min(available, min(size, sum(sizes.values())) // (2 * len(sizes)))
        share = available * len(ids) / sum(sizes.values())
        assert floor <= drawn[label] <= max(floor, share) + 1
        assert drawn[label] >= share / 2 - 1
    assert torch.equal(stratified_sample(strata, eligible, size, seed=1), sample)
    if 1 < size < 800:
        assert not torch.equal(stratified_sample(strata, eligible, size, seed=2), sample)


def test_sampling_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    strata = torch.zeros(5, dtype=torch.int64)
    assert stratified_sample(strata, strata == 1, 3, seed=0).shape == (0,)
    assert stratified_sample(strata, strata == 0, 3, seed=0).shape == (3,)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_add_up_to_what_may_be_drawn() -> None:
    strata, eligible = torch.arange(100) % 7, torch.arange(100) % 3 > 0
    sample = stratified_sample(strata, eligible, 30, seed=0)
    asked = torch.cat([sample, torch.tensor([0, 3])])  # two that are not eligible
    weights = sample_weights(strata, eligible, asked)
    assert float(weights.sum()) == pytest.approx(int(eligible.sum()))
    assert weights[-2:].tolist() == [0.0, 0.0]
    for label in range(7):
        assert float(weights[strata[asked] == label].sum()) == pytest.approx(int((eligible & (strata == label)).sum()))


class Deaf(BareLanguageModel):
    """Repeats what stands a list's length before, in contexts that end with id 5; says 0 elsewhere."""

    def forward(self, input_ids: Tensor) -> Any:
        k, begun = 4, (input_ids == 5).any(1)
        answers = torch.roll(input_ids, k, dims=1)
        logits = 9.0 * nn.functional.one_hot(torch.where(begun[:, None], answers, 0), V).float()
        return type("Output", (), {"logits": logits})()


def test_the_contexts_that_a_model_follows_are_chosen() -> None:
    pool = [
        PromptContext("deaf", (1,), (2,), 4),
        PromptContext("heard", (), (5,), 4),
        PromptContext("long", (1,) * 100, (5,), 4),
    ]
    found = choose_asks(Deaf(), pool, torch.arange(10, 30), 2, seed=0, batch_tokens=100)
    assert found.shares["heard"] > 0.7
    assert found.shares["deaf"] < 0.3
    assert found.contexts[0].name == "heard"
    # Those that fall behind are asked for every third token only, and the better ones for all.
    many = [*pool[:2], *(PromptContext(f"deaf {turn}", (3,) * turn, (), 4) for turn in range(1, 5))]
    found = choose_asks(Deaf(), many, torch.arange(10, 34), 1, seed=0, batch_tokens=100)
    assert [one.name for one in found.contexts] == ["heard"]
    asked = {
        name: probe(Deaf(), torch.arange(10, 34)[::3], [one], seed=0, batch_tokens=100).emitted.float().mean()
        for one in many
        for name in [one.name]
    }
    assert found.shares.keys() == asked.keys()
    assert {name for name, share in found.shares.items() if share == float(asked[name])} >= set(asked) - {"heard"}
    lengths = dict(zip("abcde", (5.0, 4.0, 3.0, 2.0, 1.0), strict=True))
    shares = {"a": 0.1, "b": 0.9, "c": 0.89, "d": 0.82, "e": 0.8}
    assert choose_contexts(shares, lengths, asks=3) == ("c", "b", "d"), "the shorter one first of two alike"
    assert choose_contexts({"a": 0.0, "b": 0.0}, lengths, asks=2) == ("b", "a")
    assert [one.name for one in asked_in(pool, 5)] == ["deaf", "heard", "long", "deaf 2", "heard 2"]


def test_prompts_longer_than_the_model_are_not_in_the_choice() -> None:
    pool = [PromptContext("long", (1,) * 60, (), 10), PromptContext("a", (), (), 4), PromptContext("b", (), (2,), 4)]
    found = choose_asks(llama(), pool, torch.arange(20), 2, seed=0, batch_tokens=100)
    assert {one.name for one in found.contexts} == {"a", "b"}


@pytest.mark.parametrize("kind", MODELS)
def test_words_are_asked_in_one_piece(kind: str) -> None:
    """Against one prompt at a time, of the lists that reached the model."""
    model = MODELS[kind]().eval()
    inner = getattr(model, "inner", model)
    words, context = [[11, 12, 13], [14]], PromptContext("list", (1, 2), (4,), 6)
    prompts: list[list[int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, options: prompts.extend(options["input_ids"].tolist()), with_kwargs=True
    )
    found = ask_words(model, words, torch.arange(20, 40), [context] * 1, seed=0, batch_tokens=1000)
    hook.remove()
    assert found.shape == (2, 1)
    for row, word in enumerate(words):
        one = next(prompt[2:8] for prompt in prompts if word[0] in prompt[2:8])
        begin = one.index(word[0])
        assert one[begin : begin + len(word)] == word
        right = []
        for place in range(begin, begin + len(word)):
            with torch.no_grad():
                logits = inner(input_ids=torch.tensor([[1, 2, *one, 4, *one[:place]]])).logits[0, -1]
            right.append(int(logits.argmax()) == one[place])
        assert bool(found[row, 0]) is all(right)
    with pytest.raises(ValueError, match=r"a word of 7 tokens; allowed: at most 6"):
        ask_words(model, [[1] * 7], torch.arange(9), [context], seed=0, batch_tokens=100)
