from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoTokenizer

from vocabguard.offline.coverage_render import ChatRenderer, TurnTally
from vocabguard.offline.coverage_shapes import learn_shape, shape_of

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
LOOP = "{% for m in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES = {
    "marked": None,
    "plain": LOOP + "<|{{ m.role }}|>{{ m.content }}<|end|>" + END,
    "trimmed": "<s>" + LOOP + "[{{ m.role }}] {{ m.content | trim }}\n" + END,
    "half trimmed": LOOP + "<|{{ m.role }}|>{{ m.content.lstrip() }} <|end|>" + END,
    "last one thinks": LOOP + "<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think>so</think>{% endif %}"
    "{{ m.content | trim }}<|end|>" + END,
    "looks at what is said": LOOP + "<|{{ m.role }}|>{% if 'ok' in m.content %}good: {% endif %}{{ m.content }}<|end|>"
    + END,
    "upper case": LOOP + "<|{{ m.role }}|>{{ m.content | upper }}<|end|>" + END,
    "says it twice": LOOP + "<|{{ m.role }}|>{{ m.content }}{{ m.content }}<|end|>" + END,
    "turned around": "{% for m in messages | reverse %}<|{{ m.role }}|>{{ m.content }}<|end|>" + END,
    "counts": "{{ messages | length }}",
}  # fmt: skip
WORDS = ["Hello", "ok", "<|end|>", "<|assistant|>", " ", "\n", "a", "<think>so</think>", "データ", "\t x"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSETS)


def with_template(tokenizer: Any, template: str | None) -> Any:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template or tokenizer.chat_template
    return own


def conversation(rng: Random) -> list[dict[str, str]]:
    def says(role: str) -> dict[str, str]:
        return {"role": role, "content": "".join(rng.choices(WORDS, k=rng.randint(0, 5)))}

    said = [says("system")] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        said += [says("user"), says("assistant")]
    return said


@pytest.mark.parametrize("name", TEMPLATES)
def test_spans_are_those_found_the_long_way(tokenizer: Any, name: str) -> None:
    rng, own = Random(0), with_template(tokenizer, TEMPLATES[name])
    quick = ChatRenderer(own)
    for number in range(150):
        turns = conversation(rng)
        slow = ChatRenderer(own)  # it has met no conversation yet, so it knows no shape
        quick.tally = TurnTally()
        expected, found = slow.assistant_spans("here", turns, {}), quick.assistant_spans("here", turns, {})
        if slow.tally.by_text:  # a text that is in the template too is taken for the turn by the long way only
            assert found[0] == expected[0]
            continue
        assert found == expected, (number, turns)
        assert quick.tally == slow.tally


@pytest.mark.parametrize("name", ["plain", "trimmed", "half trimmed"])
def test_conversations_of_a_known_shape_are_rendered_once(tokenizer: Any, name: str) -> None:
    quick = ChatRenderer(with_template(tokenizer, TEMPLATES[name]))
    rendered, count = quick.text, [0]

    def counting(*args: Any, **options: Any) -> str:
        count[0] += 1
        return rendered(*args, **options)

    quick.text = counting  # type: ignore[method-assign]
    for number in range(52):
        quick.assistant_spans("here", [{"role": r, "content": f"{number}."} for r in ("user", "assistant") * 4], {})
    # Eight renderings for the first one and for learning, one for each of the others.
    assert count[0] == 8 + 8 + 51


def test_a_template_that_refuses_our_words(tokenizer: Any) -> None:
    picky = LOOP + "{% if 'vocabguard' in m.content %}{{ raise_exception('no') }}{% endif %}{{ m.content }}|" + END
    quick = ChatRenderer(with_template(tokenizer, picky))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert [quick.assistant_spans("here", turns, {})[1] for _ in range(3)] == [[(2, 4)]] * 3


def test_conversations_of_more_than_texts_have_no_shape() -> None:
    user = {"role": "user", "content": "a"}
    assert shape_of([user, {"role": "assistant", "content": "b"}]) == ("user", "assistant")
    for other in ({"content": " "}, {"content": [{"type": "text", "text": "b"}]}, {"content": "b", "tool_calls": []}):
        assert shape_of([user, {"role": "assistant", **other}]) is None


def test_words_in_another_order_make_no_shape() -> None:
    def find(turns: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        return "".join(turn["content"] for turn in reversed(turns)), []

    assert learn_shape(["user", "assistant"], find) is None
