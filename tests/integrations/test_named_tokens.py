"""What a run says of end tokens, added tokens and watched words before step 1, with the collators that people use."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DataCollatorForLanguageModeling
from typer.testing import CliRunner

from vocabguard import RunLog
from vocabguard.cli.app import build
from vocabguard.integrations.huggingface import VocabGuardCallback

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
END = 1


def notes_of(kit: Any, tokenizer: Any, folder: Path, *, model: Any = None, **options: Any) -> tuple[str, ...]:
    rows = [{"input_ids": [*row["input_ids"], END]} for row in kit.random_rows(12)]
    callback = VocabGuardCallback(
        tokenizer=tokenizer, **{"probe": {"enabled": False}, "drift": {"every_n_steps": 100}} | kit.QUIET | options
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    kit.run_hf(
        model or kit.tiny_model(), rows, tokenizer, folder, steps=1, callbacks=(callback,), collator=collator,
    )  # fmt: skip
    notes: tuple[str, ...] = callback.guard.watch.notes
    assert RunLog.open(callback.guard.run_dir)
    return notes


def test_padding_as_the_end_hides_it_in_the_commonest_collator(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    shared = copy.deepcopy(tokenizer)
    shared.pad_token = shared.eos_token
    [said] = [note for note in notes_of(kit, shared, tmp_path / "a") if note.startswith("End tokens")]
    assert "<|end|>" in said
    assert "never a target in all 3 batches (12 rows) of the training data: the model does not learn to stop" in said
    assert "tokenizer.pad_token = '<|pad|>'" in said
    own = [note for note in notes_of(kit, tokenizer, tmp_path / "b") if "does not learn to stop" in note]
    assert own == []


def test_every_end_of_the_generation_configuration_is_looked_at(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = kit.tiny_model()
    model.generation_config.eos_token_id = [END, 7]
    [said] = [note for note in notes_of(kit, tokenizer, tmp_path, model=model) if note.startswith("End tokens")]
    assert "<|fim|> is never a target" in said
    assert "answers end with <|end|> (12 times), and generation stops there" in said


def test_words_and_added_tokens(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<call>"])
    token = kit.random_rows(12)[0]["input_ids"][-1]
    notes = notes_of(kit, longer, tmp_path, probe={"enabled": False, "watch": [7000, token]})
    [added] = [note for note in notes if note.startswith("Added tokens")]
    assert added.startswith("Added tokens: 1 of 1 is never a target in all 3 batches")
    [words] = [note for note in notes if note.startswith("Watched words")]
    assert "1 of 2 is never a target in all 3 batches (12 rows) of the training data: " in words
    assert "(7000). Add examples whose answers contain them, or turn protection on" in words


def test_the_base_on_disk_says_what_was_added(kit: Any, tokenizer: Any, tmp_path: Path) -> None:
    from vocabguard.guard.named import base_rows

    model = kit.tiny_model()
    assert base_rows(model) is None
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.resize_token_embeddings(8300)
    assert base_rows(loaded) == kit.ROWS
    (tmp_path / "config.json").write_text("no JSON", encoding="utf-8")
    assert base_rows(loaded) is None


@pytest.mark.parametrize("pad", [False, True])
def test_coverage_says_it_too(tmp_path: Path, tokenizer: Any, pad: bool) -> None:
    shared = copy.deepcopy(tokenizer)
    if pad:
        shared.pad_token = shared.eos_token
    shared.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}', encoding="utf-8")
    said = [{"role": "user", "content": "Say the data"}, {"role": "assistant", "content": "the [red] the"}]
    (tmp_path / "data.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 3, encoding="utf-8")
    arguments = ["coverage", str(tmp_path / "base"), str(tmp_path / "data.jsonl"), "--watch", "red", "--watch", "data"]
    result = CliRunner().invoke(build(("coverage",)), arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(CliRunner().invoke(build(("coverage",)), [*arguments, "--json"]).stdout)
    assert all(one in result.stdout for one in told["named"])
    ends = [one for one in told["named"] if one.startswith("End tokens")]
    assert len(ends) == 1
    assert "<|fim|> is never a target in the data; answers end with <|end|> (3 times)" in ends[0]
    assert any(one.startswith("Watched words: 1 of 2 is never a target in the data: data.") for one in told["named"])
    assert any("<|end|> is the padding too" in one for one in told["named"]) == pad
