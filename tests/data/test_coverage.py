from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import processors

from vocabguard.data.counting import CHUNK
from vocabguard.data.coverage import (
    Coverage,
    at_risk,
    coverage_totals,
    group_rows,
    load_coverage,
    measure_coverage,
)
from vocabguard.data.encode import TargetEncoder
from vocabguard.data.readers import Chat, Completion, DataError, Example, Text, read_examples
from vocabguard.data.tables import RowShard
from vocabguard.vocabulary.table import build_table

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
WORDS = ["Hello", "there", "データ", "保存", "данные", "안녕", "👍🏽", "naïve", "x = 1;", "<|end|>", "  ", "\n", "ok."]
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As some reasoning models do: only the last answer keeps its thoughts.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}<think>thoughts</think>{% endif %}{{ m.content | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def table(tokenizer: Any) -> Any:
    return build_table(tokenizer, len(tokenizer))


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def phrase(rng: Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))


def turns(rng: Random, exchanges: int) -> list[dict[str, str]]:
    said = [{"role": "system", "content": phrase(rng)}] if rng.random() < 0.5 else []
    for _ in range(exchanges):
        said += [{"role": "user", "content": phrase(rng)}, {"role": "assistant", "content": phrase(rng)}]
    return said


def chats(count: int, seed: int = 0) -> list[Example]:
    rng = Random(seed)
    return [Chat(f"chat {i}", turns(rng, rng.randint(1, 3))) for i in range(count)]


def completions(count: int, seed: int = 1) -> list[Example]:
    rng = Random(seed)
    texts: list[Example] = [Completion(f"c {i}", phrase(rng), phrase(rng)) for i in range(count)]
    return texts + [Completion(f"d {i}", turns(rng, 1)[:-1], turns(rng, 1)[-1:]) for i in range(count)]


def texts(count: int, seed: int = 2) -> list[Example]:
    rng = Random(seed)
    return [Text(f"t {i}", phrase(rng)) for i in range(count)]


def naive_marked(tokenizer: Any, example: Chat) -> tuple[list[int], list[int]]:
    """Piece by piece, as the test's template says it: role, then content and end where the assistant speaks."""
    ids, target = [], []
    for turn in example.turns:
        own = turn["role"] == "assistant"
        head = tokenizer.encode(f"<|{turn['role']}|>", add_special_tokens=False)
        body = tokenizer.encode(turn["content"] + "<|end|>", add_special_tokens=False)
        ids += head + body
        target += [0] * len(head) + [int(own)] * len(body)
    return ids, target


def naive_counts(rows: list[tuple[list[int], list[int]]], size: int, longest: int | None = None) -> tuple[Any, Any]:
    data_target, inputs = [0] * size, [0] * size
    for ids, target in rows:
        for place, (token, asked) in enumerate(zip(ids, target, strict=True)):
            if longest is not None and place >= longest:
                break
            inputs[token] += 1
            data_target[token] += asked if place > 0 else 0
    return data_target, inputs


def count(examples: list[Example], tokenizer: Any, table: Any, **options: Any) -> Coverage:
    return measure_coverage(examples, tokenizer, table, **options)


@pytest.mark.parametrize("longest", [None, 9])
@pytest.mark.parametrize("template", [None, PLAIN], ids=["marked", "unmarked"])
def test_chats_equal_a_naive_count(tokenizer: Any, table: Any, template: str | None, longest: int | None) -> None:
    own = tokenizer if template is None else with_template(tokenizer, template)
    examples = chats(CHUNK + 40)
    expected = naive_counts([naive_marked(tokenizer, chat) for chat in examples], len(table), longest)
    found = count(examples, own, table, max_length=longest)
    assert found.data_target.tolist() == expected[0]
    assert found.inputs.tolist() == expected[1]
    assert found.tally.rows == len(examples)
    assert found.tally.turns_exact == (0 if template is None else sum(len(c.turns) // 2 for c in examples))
    assert (found.tally.turns_by_text, found.tally.turns_missing) == (0, 0)


def test_chats_equal_the_mask_of_transformers(tokenizer: Any, table: Any) -> None:
    rows = []
    examples = [chat for chat in chats(60, seed=5) if all("👍" not in turn["content"] for turn in chat.turns)]
    for chat in examples:
        made = tokenizer.apply_chat_template(chat.turns, return_dict=True, return_assistant_tokens_mask=True)
        rows.append((made["input_ids"], made["assistant_masks"]))
    found = count(examples, tokenizer, table)
    assert (found.data_target.tolist(), found.inputs.tolist()) == naive_counts(rows, len(table))


def test_loss_on_everything_and_on_the_last_turn(tokenizer: Any, table: Any) -> None:
    examples = chats(40)
    every = [(ids, [1] * len(ids)) for ids, _ in (naive_marked(tokenizer, chat) for chat in examples)]
    assert count(examples, tokenizer, table, loss="all").data_target.tolist() == naive_counts(every, len(table))[0]
    last = []
    for chat in examples:
        ids, _ = naive_marked(tokenizer, chat)
        answer = tokenizer.encode(chat.turns[-1]["content"] + "<|end|>", add_special_tokens=False)
        last.append((ids, [0] * (len(ids) - len(answer)) + [1] * len(answer)))
    found = count(examples, tokenizer, table, loss="completion")
    assert (found.data_target.tolist(), found.inputs.tolist()) == naive_counts(last, len(table))


def test_completions_equal_a_naive_count(tokenizer: Any, table: Any) -> None:
    """The completion begins where the ids of the prompt alone and of the whole part, as TRL has it."""
    rows, examples = [], completions(60)
    for example in examples:
        if isinstance(example.prompt, str):
            whole = example.prompt + example.completion
            ids = tokenizer.encode(whole if whole.endswith("<|end|>") else whole + "<|end|>")
            prompt = tokenizer.encode(example.prompt)
        else:
            ids = tokenizer.apply_chat_template(example.prompt + example.completion, return_dict=False)
            prompt = tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, return_dict=False)
        same = 0
        while same < len(prompt) and same < len(ids) and prompt[same] == ids[same]:
            same += 1
        rows.append((ids, [0] * same + [1] * (len(ids) - same)))
    found = count(examples, tokenizer, table)
    assert (found.data_target.tolist(), found.inputs.tolist()) == naive_counts(rows, len(table))
    every = [(ids, [1] * len(ids)) for ids, _ in rows]
    assert count(examples, tokenizer, table, loss="all").data_target.tolist() == naive_counts(every, len(table))[0]


def test_a_merge_over_the_prompts_end_belongs_to_the_completion(tokenizer: Any) -> None:
    assert len(tokenizer.encode(" the")) == 1, "the test needs a word that is one token"
    row = TargetEncoder(tokenizer).encode([Completion("here", "ok. t", "he ok.")])[0]
    said = [token for token, asked in zip(row.ids, row.target, strict=True) if asked]
    assert tokenizer.decode(said) == " the ok.<|end|>"


@pytest.mark.parametrize("eos", [True, False])
def test_texts_equal_a_naive_count(tokenizer: Any, table: Any, eos: bool) -> None:
    rows, examples = [], texts(80)
    for example in examples:
        text = example.text if not eos or example.text.endswith("<|end|>") else example.text + "<|end|>"
        ids = tokenizer(text)["input_ids"]
        rows.append((ids, [1] * len(ids)))
    found = count(examples, tokenizer, table, eos=eos)
    assert (found.data_target.tolist(), found.inputs.tolist()) == naive_counts(rows, len(table))


def test_the_tokenizers_own_special_tokens_frame_texts_but_no_chats(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    begin = own.convert_tokens_to_ids("<|user|>")
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", begin)]
    )
    text, chat = TargetEncoder(own).encode([Text("t", "Hello"), *chats(1)])
    assert text.ids[0] == begin
    assert not text.target[0]
    assert text.target[1:].all()
    assert chat.ids.tolist() == naive_marked(tokenizer, chats(1)[0])[0]


def test_saved_truncation_and_padding_are_not_used(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.enable_truncation(3)
    own.backend_tokenizer.enable_padding(length=50)
    rows = TargetEncoder(own).encode(chats(3))
    assert [row.ids.tolist() for row in rows] == [naive_marked(tokenizer, chat)[0] for chat in chats(3)]


def test_a_template_that_rewrites_earlier_turns(tokenizer: Any) -> None:
    """Earlier answers lose their thoughts, so the renderings are no prefixes; each turn is found all the same."""
    own = with_template(tokenizer, FORGETFUL)
    encoder = TargetEncoder(own)
    said = [("user", "Hello ok."), ("assistant", "ok."), ("user", "ok."), ("assistant", " Hello ")]
    row = encoder.encode([Chat("here", [{"role": role, "content": text} for role, text in said])])[0]
    targets = tokenizer.decode([i for i, asked in zip(row.ids, row.target, strict=True) if asked])
    assert targets == "ok.<|end|><think>thoughts</think>Hello<|end|>"
    assert (encoder.renderer.tally.exact, encoder.renderer.tally.by_text) == (2, 0)


def test_a_template_without_a_loop_has_its_turns_found_by_text(tokenizer: Any) -> None:
    own = with_template(tokenizer, "{{ messages | length }}{{ messages | map(attribute='content') | join('<|end|>') }}")
    encoder = TargetEncoder(own)
    said = [("user", "Hello ok."), ("assistant", "there"), ("user", "ok."), ("assistant", "fine")]
    row = encoder.encode([Chat("here", [{"role": role, "content": text} for role, text in said])])[0]
    assert tokenizer.decode([i for i, asked in zip(row.ids, row.target, strict=True) if asked]) == "therefine"
    assert (encoder.renderer.tally.exact, encoder.renderer.tally.by_text) == (0, 2)


def test_a_turn_that_the_template_drops_counts_as_missing(tokenizer: Any, table: Any) -> None:
    own = with_template(tokenizer, "{{ messages | length }}")
    found = count([Chat("here", turns(Random(0), 1))], own, table)
    assert found.tally.turns_missing == 1
    assert (int(found.data_target.sum()), found.tally.without_targets) == (0, 1)


class Slow:
    """A tokenizer without offsets: the fast one, asked a text at a time."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast, self.eos_token, self.special_tokens_map = fast, fast.eos_token, fast.special_tokens_map

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.fast.encode(text, add_special_tokens=add_special_tokens)

    def get_chat_template(self, template: str | None = None, tools: Any = None) -> str:
        return self.fast.get_chat_template(template, tools)


def test_a_slow_tokenizer_gives_the_same(tokenizer: Any) -> None:
    examples = [*chats(20), *completions(10), *texts(10)]
    fast, slow = TargetEncoder(tokenizer).encode(examples), TargetEncoder(Slow(tokenizer)).encode(examples)
    assert [(row.ids.tolist(), row.target.tolist()) for row in fast] == [
        (row.ids.tolist(), row.target.tolist()) for row in slow
    ]


def test_tools_and_template_arguments_reach_the_template(tokenizer: Any) -> None:
    own = with_template(tokenizer, "{{ tools[0].name }} {{ mode }} " + PLAIN)
    row = TargetEncoder(own, loss="all").encode([
        Chat("here", turns(Random(0), 1), {"tools": [{"name": "search"}], "mode": "quick"})
    ])[0]  # fmt: skip
    assert tokenizer.decode(row.ids).startswith("search quick <|")


def test_epochs_multiply_and_rows_are_padded(tokenizer: Any, table: Any) -> None:
    once, thrice = (count(chats(20), tokenizer, table, epochs=epochs) for epochs in (1, 3))
    assert torch.equal(thrice.data_target, 3 * once.data_target)
    assert torch.equal(thrice.inputs, 3 * once.inputs)
    assert thrice.tally == once.tally
    assert once.targets_for(len(table) + 5)[-5:].tolist() == [0] * 5
    with pytest.raises(ValueError, match="the matrix has 3 rows"):
        once.targets_for(3)


def test_file_round_trip(tokenizer: Any, table: Any, tmp_path: Path) -> None:
    found = count([*chats(20), *texts(5)], tokenizer, table, name="mine", files=["a", "b"], max_length=12)
    found.save(tmp_path / "c.safetensors")
    again = load_coverage(tmp_path / "c.safetensors")
    for name in ("data_target", "inputs", "group", "live"):
        assert torch.equal(getattr(found, name), getattr(again, name))
    assert (again.tally, again.source) == (found.tally, found.source)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_report_equals_plain_loops(tokenizer: Any, table: Any) -> None:
    found = count(chats(300), tokenizer, table)
    target, inputs = found.data_target.tolist(), found.inputs.tolist()
    live = [i for i in range(len(table)) if table.live[i]]
    classes = Counter(
        (table.group_of(i), "never" if not (n := target[i]) else "1-4" if n < 5 else "5-19" if n < 20 else "20+")
        for i in live
    )
    rows = {row.group: row for row in group_rows(found)}
    for group in {table.group_of(i) for i in live}:
        assert rows[group].classes == tuple(classes[group, name] for name in ("never", "1-4", "5-19", "20+"))
    assert rows["all"].live == len(live)
    never = sum(target[i] == 0 for i in live)
    assert coverage_totals(found)["classes"]["never"] == never
    assert found.never_share == pytest.approx(never / len(live))
    expected = sorted((i for i in live if target[i] < 5), key=lambda i: (target[i], -inputs[i], i))
    assert at_risk(found, 50) == expected[:50]


def test_refusals(tokenizer: Any, table: Any) -> None:
    with pytest.raises(ValueError, match="no rows in the data"):
        count([], tokenizer, table)
    for options in ({"loss": "half"}, {"max_length": 0}, {"epochs": 0}, {"workers": 0}):
        with pytest.raises(ValueError, match="allowed"):
            count(chats(1), tokenizer, table, **options)
    with pytest.raises(DataError, match=r"lone, row 7.*refuses"):
        count([*texts(3), Text("lone, row 7", "\ud800")], tokenizer, table)
    with pytest.raises(DataError, match="no assistant's turn"):
        count([Chat("here", [{"role": "user", "content": "a"}])], tokenizer, table, loss="completion")
    strict = (
        "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}{% endfor %}"
    )
    said = [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]
    with pytest.raises(DataError, match=r"here: .*fails on roles user, robot: no robots"):
        count([Chat("here", said)], with_template(tokenizer, strict), table)
    with pytest.raises(DataError, match="here: messages need a chat template"):
        count([Chat("here", turns(Random(0), 1))], with_template(tokenizer, ""), table)


def test_damaged_files_are_refused(tokenizer: Any, table: Any, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    count(texts(2), tokenizer, table).save(good)
    content = good.read_bytes()
    for name, bad in {"cut": content[:-9], "empty": b"", "text": b"no tensors at all", "head": content[:40]}.items():
        (tmp_path / name).write_bytes(bad)
    for name in ("cut", "empty", "text", "head", "missing"):
        with pytest.raises(ValueError, match=f"{name}: is no coverage file"):
            load_coverage(tmp_path / name)
    with pytest.raises(ValueError, match="is no coverage file"):
        load_coverage(ASSETS / "model.safetensors")
    newer = content.replace(json.dumps('"schema": 1')[1:-1].encode(), json.dumps('"schema": 9')[1:-1].encode())
    (tmp_path / "newer").write_bytes(newer)
    with pytest.raises(ValueError, match="reads schema 1"):
        load_coverage(tmp_path / "newer")


@pytest.mark.slow
def test_processes_give_the_same(tokenizer: Any, table: Any) -> None:
    examples = [*chats(2 * CHUNK + 7), *texts(50)]
    alone, together = (count(examples, tokenizer, table, workers=workers) for workers in (1, 2))
    assert torch.equal(alone.data_target, together.data_target)
    assert torch.equal(alone.inputs, together.inputs)
    assert alone.tally == together.tally
    with pytest.raises(DataError, match="lone"):
        count([Text("lone", "\ud800"), *examples], tokenizer, table, workers=2)


def as_rows(examples: list[Example]) -> list[dict[str, Any]]:
    kinds: dict[type, tuple[tuple[str, str], ...]] = {
        Chat: (("messages", "turns"),),
        Completion: (("prompt", "prompt"), ("completion", "completion")),
        Text: (("text", "text"),),
    }
    return [{column: getattr(e, name) for column, name in kinds[type(e)]} for e in examples]


TRAINED: dict[str, tuple[list[Example], dict[str, Any], dict[str, Any]]] = {
    "chats": (chats(80), {"assistant_only_loss": True}, {}),
    "whole chats": (chats(80), {}, {"loss": "all"}),
    "cut chats": (chats(80), {"assistant_only_loss": True, "max_length": 9}, {"max_length": 9}),
    "texts": (texts(80), {}, {}),
    "completions as text": (completions(60)[:60], {}, {}),
    "completions as turns": (completions(60)[60:], {}, {}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", TRAINED)
def test_equals_what_a_real_trainer_prepares(case: str, tokenizer: Any, table: Any, tmp_path: Path) -> None:
    """Labels of TRL's ``SFTTrainer``, counted in a plain loop."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import LlamaConfig, LlamaForCausalLM

    examples, theirs, ours = TRAINED[case]
    tiny = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                       num_attention_heads=1, pad_token_id=0)  # fmt: skip
    options = {"max_length": None, "report_to": "none", "use_cpu": True, "bf16": False, **theirs}
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(tiny),
        args=trl.SFTConfig(output_dir=str(tmp_path), **options),
        train_dataset=datasets.Dataset.from_list(as_rows(examples)),
        processing_class=copy.deepcopy(tokenizer),
    )
    rows = [(row["input_ids"], [int(x != -100) for x in row["labels"]]) for row in trainer.train_dataset]
    expected = naive_counts(rows, len(table))
    found = count(examples, tokenizer, table, **ours)
    assert sum(expected[0]) > 0
    assert found.data_target.tolist() == expected[0]
    # The trainer drops rows that truncation leaves without a target; here they are counted apart.
    if case != "cut chats":
        assert found.inputs.tolist() == expected[1]
    assert found.tally.rows - found.tally.without_targets == len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["1/1", "2/2"])
def test_processes_that_read_for_themselves_give_the_same(
    tokenizer: Any, table: Any, tmp_path: Path, shard: str
) -> None:
    """Of every kind of file, with equal words for what was read; unknown roles are counted over all rows."""
    datasets = pytest.importorskip("datasets")
    index, of = map(int, shard.split("/"))
    said = as_rows(chats(150))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")
    (tmp_path / "b.txt").write_text("one line\n\nanother line\nand one more\n", encoding="utf-8")
    datasets.Dataset.from_list([{"input_ids": [5, 6, 7 + place % 9]} for place in range(900)]).to_parquet(
        tmp_path / "c.parquet", batch_size=100
    )
    (tmp_path / "d.jsonl").write_text("", encoding="utf-8")
    files = [tmp_path / name for name in ("a.jsonl", "b.txt", "c.parquet", "d.jsonl")]
    rows: dict[int, int] = {}
    found = []
    for workers in (1, 2):
        examples = read_examples(files, shard=RowShard(index, of), blocks=True)
        told: list[int] = []
        found.append(measure_coverage(examples, tokenizer, table, workers=workers, progress=told.append))
        rows[workers] = sum(told)
    alone, together = found
    assert torch.equal(alone.data_target, together.data_target)
    assert torch.equal(alone.inputs, together.inputs)
    assert alone.tally == together.tally
    assert rows[1] == rows[2] == alone.tally.rows
    # Each process says on how many of its own texts it compared the faster tokenizer.
    assert len(alone.source.notes) == len(together.source.notes)
    assert replace(alone.source, notes=()) == replace(together.source, notes=())


@pytest.mark.slow
def test_unknown_roles_are_all_told_by_several_processes_too(tokenizer: Any, table: Any, tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": "q"}, {"role": name, "content": "a"}] for name in ("sage", "oracle", "sage")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"'sage' \(2 turns\), 'oracle' \(1 turns\)"):
        measure_coverage(read_examples([path]), tokenizer, table, workers=2)
