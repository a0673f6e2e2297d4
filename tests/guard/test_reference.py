"""The reference text in a run: where it comes from, what is logged, what alarms, how it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import reading
import torch

from vocabguard import ConfigError, VocabGuard
from vocabguard.config import ReferenceConfig, load_config
from vocabguard.guard.reference import Reader, choose_reader, reference_texts, windows_of

READS = {
    "probe": {"enabled": False, "every_n_steps": 1},
    "drift": {"every_n_steps": 1},
    "preflight": {"enabled": False},
}
SMALL = {"enabled": True, "max_tokens": 3000, "least_targets": 50}
"""Of the shipped text the embedded base predicts next to nothing."""


@pytest.fixture(scope="session")
def english(tokenizer: Any) -> list[list[int]]:
    """The English paragraphs, as training data."""
    return reading.paragraphs(tokenizer)[: reading.ENGLISH]


def base_model(kit: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(kit.ASSETS).float()


def reference_of(guard: Any) -> dict[str, float]:
    start = "vocabguard/reference/"
    return {key.removeprefix(start): value for key, value in guard.last.scalars.items() if key.startswith(start)}


# -- texts -----------------------------------------------------------------------------------------------------------


def test_the_shipped_text_is_packaged_and_of_many_scripts(tokenizer: Any) -> None:
    texts = reference_texts(ReferenceConfig())
    whole = "\n".join(texts)
    for mark in (
        "ß",
        "é",
        "ł",
        "ğ",
        "ế",
        "я",
        "ї",
        "λ",
        "ع",
        "ש",
        "ह",
        "ร",
        "の",
        "한",
        "春",
        "def ",
        "<td>",
        "SELECT",
        "\\begin",
    ):
        assert mark in whole, mark
    assert len(texts) == len(set(texts)) == 55
    ids = [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]
    assert len(ids) > 5000
    assert tokenizer.unk_token_id not in ids
    assert '"reference.txt"' in (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")


def test_texts_of_ones_own(tmp_path: Path) -> None:
    plain, lines = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_text("One line,\nand another.\n\n \nA second text.\n", encoding="utf-8")
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b", "c\n\nd")), encoding="utf-8")
    assert reference_texts(ReferenceConfig(texts=str(plain))) == ("One line,\nand another.", "A second text.")
    assert reference_texts(ReferenceConfig(texts=str(lines))) == ("a b", "c\n\nd")
    assert reference_texts(ReferenceConfig(texts=["a", "  ", "b"])) == ("a", "b")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("none.txt", "is 'none.txt'; allowed: a file of texts, a list of texts, or null"),
        ([], r"is \[\] and holds no text; allowed: one text or more"),
        ([1], r"is \[1\]; allowed: a file, a list of texts, or null"),
        (3, "is 3; allowed: a file, a list of texts, or null"),
        (["a"], "the texts hold no target; allowed: texts of two tokens or more"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(kit: Any, tokenizer: Any, texts: Any, said: str) -> None:
    guard = VocabGuard(tokenizer=tokenizer, reference={"enabled": True, "texts": texts}, **READS, **kit.QUIET)
    with pytest.raises(ConfigError, match=f"^reference.texts:? {said}"):
        guard.attach(kit.llama(kit.TOKENIZER_ROWS))


def test_a_broken_file_is_refused_with_its_line(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a b"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^reference.texts: .*texts.jsonl.*2"):
        reference_texts(ReferenceConfig(texts=str(file)))


def test_windows_are_no_longer_than_the_model_takes(kit: Any, tokenizer: Any) -> None:
    model = kit.llama(kit.TOKENIZER_ROWS)
    windows = windows_of(model, tokenizer, ["word " * 200], ReferenceConfig())
    assert windows.ids.shape[1] == model.config.max_position_embeddings == 64


def test_sequences_begin_as_the_tokenizer_begins_them(kit: Any, tokenizer: Any) -> None:
    class Beginning:
        bos_token_id = 1

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1] * add_special_tokens + [5, 6, 7]

    assert windows_of(kit.llama(), Beginning(), ["x"], ReferenceConfig()).ids.tolist() == [[1, 5, 6, 7]]


# -- a run -----------------------------------------------------------------------------------------------------------


def attached(kit: Any, tokenizer: Any, model: Any, steps: int = 1, **rest: Any) -> Any:
    """A guard that reads what the embedded base can repeat."""
    texts = {"texts": reading.repeated(tokenizer), "max_tokens": 8000}
    guard = VocabGuard(tokenizer=tokenizer, reference=SMALL | texts, **READS, **kit.QUIET)
    guard.attach(model, total_steps=steps, **rest)
    return guard


def count(guard: Any, rows: list[list[int]], times: int = 20) -> None:
    """Show the guard training batches, so that English tokens have been targets."""
    for row in rows:
        ids = torch.tensor([row]).repeat(times, 1)
        guard.observe(ids, ids)


def test_an_unchanged_model_rises_by_nothing_and_alarms_nobody(kit: Any, tokenizer: Any, english: Any) -> None:
    guard = attached(kit, tokenizer, base_model(kit))
    at_base = reference_of(guard)
    assert at_base.keys() == {"nll", "targets"}
    count(guard, english)
    guard.step(1)
    found = reference_of(guard)
    assert {value for key, value in found.items() if "rise" in key} == {0.0}
    assert found["nll"] == at_base["nll"]
    assert {"rare_rise", "rare_rise_low", "never/nll_rise", "20+/nll_rise_high", "latin/nll_rise"} <= found.keys()
    assert (
        found["never/targets"] + found["1-4/targets"] + found["5-19/targets"] + found["20+/targets"] == found["targets"]
    )
    assert "rare_loss" not in guard.last.firing


def test_noise_in_the_weights_alarms_nobody(kit: Any, tokenizer: Any, english: Any) -> None:
    """Of three looks at weights that differ by a thousandth, as by another rounding: no alert."""
    model = base_model(kit)
    guard = attached(kit, tokenizer, model, steps=9)
    count(guard, english)
    base = kit.copy_of(model)
    for step in range(1, 4):
        torch.manual_seed(step)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(base[name] * (1 + 1e-3 * torch.randn_like(parameter)))
        guard.step(step)
        assert abs(reference_of(guard)["rare_rise"]) < 0.02
        assert "rare_loss" not in guard.last.firing


def test_rare_tokens_that_are_lost_alarm_with_numbers(kit: Any, tokenizer: Any, english: Any, tmp_path: Path) -> None:
    model = base_model(kit)
    guard = attached(kit, tokenizer, model, run_dir=tmp_path)
    count(guard, english)
    rare = guard.last.exposure.data_target == 0
    seen = torch.tensor(sorted({token for row in english for token in row}))
    rare[seen] = False
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[rare] = rows[rare].roll(1, 0)
    guard.step(1)
    found = reference_of(guard)
    assert found["rare_rise_low"] > guard.config.alerts["rare_loss"].threshold
    assert "rare_loss" in guard.last.firing
    [told] = [change for change in guard.last.transitions if change.rule == "rare_loss"]
    assert f"{found['rare_rise_low']:.2f} to {found['rare_rise_high']:.2f}" in told.story.what
    assert f"{found['rare/targets']:,.0f} and {found['frequent/targets']:,.0f} targets" in told.story.what
    assert any("protect" in line for line in told.story.advice)
    log = guard.finish()
    assert log.scalar("reference/nll")[0] == [0, 1]
    assert log.scalar("reference/rare_rise")[0] == [1]


def test_a_damaged_body_is_seen_where_no_row_moves(kit: Any, tokenizer: Any) -> None:
    model = base_model(kit)
    guard = attached(kit, tokenizer, model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    guard.step(1)
    assert guard.last.scalars["vocabguard/head/below_0.95"] == 0.0
    assert reference_of(guard)["nll_rise_low"] > 0.1


def test_a_resumed_run_is_held_against_the_same_base(kit: Any, tokenizer: Any, english: Any, tmp_path: Path) -> None:
    def damage(model: Any, step: int) -> None:
        with torch.no_grad():
            model.get_output_embeddings().weight[4000 + 100 * step :] *= 0.7

    model = base_model(kit)
    whole = attached(kit, tokenizer, model, steps=3, run_dir=tmp_path / "run")
    count(whole, english)
    for step in (1, 2):
        damage(model, step)
        whole.step(step)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = VocabGuard(
        tokenizer=tokenizer,
        reference={"enabled": True, "texts": ["Other texts now."] * 9, "least_targets": 50},
        **READS,
        **kit.QUIET,
    )
    damage(model, 3)
    whole.step(3)
    whole.finish(check=False)
    resumed.attach(model, total_steps=3, resumed=saved, run_dir=tmp_path / "run")
    resumed.step(3)
    assert reference_of(resumed) == reference_of(whole)
    assert reference_of(whole)["nll_rise"] > 0


def test_a_state_without_a_reading_begins_here_and_says_so(
    kit: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = kit.llama(kit.TOKENIZER_ROWS)
    before = VocabGuard(tokenizer=tokenizer, reference={"enabled": False}, **READS, **kit.QUIET)
    before.attach(model, total_steps=2, run_dir=tmp_path)
    before.step(1)
    assert not [key for key in before.last.scalars if "reference" in key]
    saved = before.state_dict()
    del saved["reference"]
    guard = attached(kit, tokenizer, model, steps=2, resumed=saved, run_dir=tmp_path)
    assert "measured against this checkpoint" in caplog.text
    guard.step(2)
    assert reference_of(guard).keys() == {"nll", "targets"}


@pytest.mark.parametrize(
    ("enabled", "probed", "reads"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_it_is_read_where_the_probe_is_on(kit: Any, tokenizer: Any, enabled: Any, probed: bool, reads: bool) -> None:
    guard = VocabGuard(
        tokenizer=tokenizer, reference={"enabled": enabled, "max_tokens": 99},
        probe={"enabled": probed, "sample": 8, "contexts": {"list": {"k": 4}}}, **kit.QUIET,
    )  # fmt: skip
    guard.attach(kit.llama(kit.TOKENIZER_ROWS))
    assert bool(reference_of(guard)) == reads


def test_what_cannot_be_read_is_left_out(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    for texts, said in ((None, False), (["One text."], True)):
        guard = VocabGuard(reference={"enabled": True, "texts": texts}, **READS, **kit.QUIET)
        guard.attach(kit.llama())
        assert reference_of(guard) == {}
        assert ("reference.texts are not read: the reference text needs a tokenizer" in caplog.text) == said


def test_the_watch_list_is_a_part(kit: Any, tokenizer: Any) -> None:
    model = base_model(kit)
    guard = VocabGuard(
        tokenizer=tokenizer,
        reference={"texts": ["You know what you did when you said you would."] * 6, "least_targets": 6},
        probe={"sample": 8, "watch": [" you"], "contexts": {"list": {"k": 4}}}, drift={"every_n_steps": 1}, **kit.QUIET,
    )  # fmt: skip
    guard.attach(model, total_steps=1)
    [token] = tokenizer.encode(" you", add_special_tokens=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[token] = 0
    guard.step(1)
    found = reference_of(guard)
    assert found["watch/targets"] == 18
    # Nothing but this row has changed, so the other targets' likelihoods hardly do.
    assert abs(found["watch/nll_rise"]) > 2 * abs(found["nll_rise"])
    assert found["watch/nll_rise_low"] <= found["watch/nll_rise"] <= found["watch/nll_rise_high"]


def test_keys_of_a_reading_stay_until_the_next(kit: Any, tokenizer: Any) -> None:
    model = kit.llama(kit.TOKENIZER_ROWS)
    guard = VocabGuard(
        tokenizer=tokenizer, reference=SMALL, drift={"every_n_steps": 1},
        probe={"enabled": False, "every_n_steps": 2}, **kit.QUIET,
    )  # fmt: skip
    guard.attach(model, total_steps=9)
    nll = guard.latest["vocabguard/reference/nll"]
    guard.step(1)
    assert reference_of(guard) == {}
    assert guard.latest["vocabguard/reference/nll"] == nll
    assert not math.isnan(nll)
    guard.step(2)
    assert "nll_rise" in reference_of(guard)


def test_in_a_short_run_less_is_read(kit: Any, tokenizer: Any) -> None:
    model, config = kit.llama(kit.TOKENIZER_ROWS), load_config()
    none = torch.empty(0, dtype=torch.int64)
    read = {}
    for to_train in (1e3, 1e12, float("nan")):
        reader = choose_reader(model, config, tokenizer, none, to_train)
        assert isinstance(reader, Reader)
        read[str(to_train)] = int((reader.windows.lengths - 1).sum())
    assert 2500 < read["1000.0"] <= 3072 + 64 < 3500 < read["1000000000000.0"] == read["nan"] <= 4096 + 64
