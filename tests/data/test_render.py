"""Roles, weights and tool calls: whose words are targets, and that it is said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from vocabguard.data.coverage import measure_coverage
from vocabguard.data.encode import TargetEncoder
from vocabguard.data.readers import Chat, DataError, read_examples
from vocabguard.data.render import ChatRenderer
from vocabguard.data.roles import UnknownRoleError
from vocabguard.vocabulary.table import build_table

MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<|tool_call|>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def said(tokenizer: Any, turns: list[dict[str, Any]], **options: Any) -> str:
    """The targets of one conversation, as text."""
    (row,) = TargetEncoder(tokenizer, **options).encode([Chat("here", turns)])
    return str(tokenizer.decode([i for i, asked in zip(row.ids, row.target, strict=True) if asked]))


def chat(*texts: str, **last: Any) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)
    ]
    return [*turns[:-1], {**turns[-1], **last}]


@pytest.mark.parametrize("template", [MARKED, PLAIN])
@pytest.mark.parametrize("key", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_turns_out_of_the_loss(tokenizer: Any, template: str, key: dict[str, Any]) -> None:
    turns = [*chat("q1", "zebra", **key), *chat("q2", "lion", weight=1, train=True)]
    own = with_template(tokenizer, template)
    assert said(own, turns) == "lion<|end|>"
    renderer = ChatRenderer(own)
    renderer.assistant_spans("here", turns, {})
    assert renderer.take_tally().silent == 1


def test_silence_without_a_place_is_refused(tokenizer: Any) -> None:
    """No loop shows whose words a marked span has."""
    own = with_template(tokenizer, "{% generation %}{{ messages[1].content }}{% endgeneration %}")
    with pytest.raises(DataError, match="weight 0 or train false"):
        said(own, chat("q", "a", weight=0))


@pytest.mark.parametrize("cut", ["", "{% if m.role == 'user' %}{{ m.content }}<|end|>{% continue %}{% endif %}"])
def test_tool_calls_and_equal_answers_where_nothing_is_marked(tokenizer: Any, cut: str) -> None:
    own = with_template(tokenizer, PLAIN.replace("%}<|{{ m.role }}|>", f"%}}<|{{{{ m.role }}}}|>{cut}", 1))
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
    turns = [
        *chat("ok", "ok"),
        *chat("ok", "", tool_calls=[call]),
        {"role": "tool", "content": "ok"},
        *chat("ok", "ok"),
    ]
    assert said(own, turns, trainer="transformers") == 'ok<|end|><|tool_call|>look{"at": "x"}<|end|>ok<|end|>'


def test_a_template_that_begins_an_answer_with_thoughts(tokenizer: Any) -> None:
    """The prompt's opening is no target, and what an answer shares with it by chance is."""
    own = with_template(tokenizer, PLAIN.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif"))
    assert said(own, chat("q", "<three>"), trainer="transformers") == "<three><|end|>"


def test_template_whose_copies_of_messages_hide_them(tokenizer: Any) -> None:
    """Where the loop is over texts, a turn is what the rendering has more than that of what comes before."""
    texts = "{% for t in messages | map(attribute='content') %}<|user|>{{ t }}<|end|>{% endfor %}"
    own = with_template(tokenizer, texts)
    assert said(own, chat("quick", "brown"), trainer="transformers") == "<|user|>brown<|end|>"


def test_unknown_roles_are_listed_with_counts(tokenizer: Any, tmp_path: Path) -> None:
    names = ("gpt", "oracle", "oracle", "sage")
    rows = [[{"from": "human", "value": "q"}, {"from": name, "value": "a"}] for name in names]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows), encoding="utf-8")
    own, table = with_template(tokenizer, MARKED), build_table(tokenizer, len(tokenizer))
    with pytest.raises(DataError, match=r"line 2: the role 'oracle'.*'oracle' \(2 turns\), 'sage' \(1 turns\); say"):
        measure_coverage(read_examples([path]), own, table)
    mapped = read_examples([path], roles={"oracle": "assistant", "sage": "user"})
    found = measure_coverage(mapped, own, table)
    assert int(found.data_target.sum()) == 6
    assert "role 'oracle' read as 'assistant' in 2 turns" in found.source.notes


def test_a_role_that_the_template_names_is_known(tokenizer: Any) -> None:
    oracle = "{% for m in messages %}{% if m.role == 'oracle' %}{{ m.content }}{% endif %}{% endfor %}"
    own = with_template(tokenizer, oracle)
    assert ChatRenderer(own).text("here", [{"role": "oracle", "content": "x"}], {}) == "x"
    with pytest.raises(UnknownRoleError, match="'sage' is not known"):
        ChatRenderer(own).text("here", [{"role": "sage", "content": "x"}], {})


def test_sharegpt_calls_and_system(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "News?"},
            {"from": "function_call", "value": '{"name": "news", "arguments": {"of": "NO"}}'},
            {"from": "observation", "value": "[]"},
            {"from": "function_call", "value": "not JSON"},
        ],
        "system": "Be brief.",
    }
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    examples = read_examples([path])
    (found,) = examples
    assert isinstance(found, Chat)
    call = {"type": "function", "function": {"name": "news", "arguments": {"of": "NO"}}}
    assert found.turns == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "News?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "[]"},
        {"role": "assistant", "content": "not JSON"},
    ]
    assert dict(examples.notes) == {"column 'system' read as the first message": 1}


def test_the_row_that_is_shown(tokenizer: Any) -> None:
    """Together the pieces are the row, and the marked ones its targets."""
    table = build_table(tokenizer, len(tokenizer))
    turns = chat("Hello", "there ok.")
    found = measure_coverage([Chat("a", chat("only a question")), Chat("b", turns)], tokenizer, table)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert "".join(text for text, _ in found.source.example) == whole
    assert [text for text, asked in found.source.example if asked] == ["there ok.<|end|>"]
