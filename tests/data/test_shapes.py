"""What is filled into a shape is what the template writes; a template that looks at contents has no shape."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random
from typing import Any

import pytest

from vocabguard.data import shapes
from vocabguard.data.encode import TargetEncoder
from vocabguard.data.readers import Chat
from vocabguard.data.render import ChatRenderer
from vocabguard.data.shapes import find_shape
from vocabguard.data.templates import compiled, marks_answers, render_recorded

SAID = ("", " ", "Hi.", "  two \n", "100 % of %s and %(x)d", "{{ x }}{% y %}", "<think>\nhm\n</think>\n\nA", "naïve",
        "<|end|><|user|>", "\U0010f8f00a\U0010f8f1", "[INST] x [/INST]", '{"name": "f"}', "\tx\u3000")  # fmt: skip
ROLES = (("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 3, ("user",),
         ("user", "assistant", "assistant"), ("user", "assistant", "tool", "assistant"))  # fmt: skip
DATA = {"tools": None, "documents": None, "add_generation_prompt": False, "bos_token": "<s>", "eos_token": "</s>"}


def trl_templates() -> list[Path]:
    trl = pytest.importorskip("trl.chat_template_utils")
    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


def test_every_template_of_trl_writes_what_its_shape_says() -> None:
    rng, shaped = Random(0), 0
    for path in trl_templates():
        template = path.read_text(encoding="utf-8")
        for roles in ROLES:
            shape = find_shape(template, roles, DATA, rule="marked", header="")
            for _ in range(6 if shape else 0):
                turns = [{"role": role, "content": rng.choice(SAID)} for role in roles]
                record = render_recorded(compiled(template), {**DATA, "messages": turns})
                assert shape is not None
                assert shape.fill(turns) == ("".join(record.pieces), record.spans), (path.name, turns)
                shaped += 1
    assert shaped > 200, "too few of the templates have shapes for this to say anything"


LOOKS = {
    "whether it is empty": "{% if m.content %}{{ m.content }}{% endif %}",
    "for a word": "{% if '<think>' in m.content %}x{% endif %}{{ m.content }}",
    "whether it is in a text": "{% if m.content in 'abc' %}x{% endif %}{{ m.content }}",
    "whether it is in a list": "{% if m.content in ['abc'] %}x{% endif %}{{ m.content }}",
    "how long it is": "{% if m.content | length > 3 %}x{% endif %}{{ m.content }}",
    "for its end": "{% if m.content.endswith('x') %}x{% endif %}{{ m.content }}",
    "in parts": "{{ m.content.split('x')[-1] }}",
    "by slices": "{{ m.content[:2] }}",
    "as JSON": "{{ m.content | tojson }}",
    "as a number": "{{ m.content | int }}",
    "letter by letter": "{% for c in m.content %}{{ c }}{% endfor %}",
    "upper": "{{ m.content | upper }}",
    "replaced": "{{ m.content | replace('a', 'b') }}",
    "whether it is the first's": "{% if m.content == messages[0].content %}x{% endif %}{{ m.content }}",
    "whether it is the first": "{% if not loop.first and m == messages[0] %}x{% endif %}{{ m.content }}",
    "as a default": "{{ m.content or 'none' }}",
    "twice stripped": "{{ (m.content + ' x').strip() }}",
    "a variable": "{% set x %}{{ m.content }}{% endset %}{{ x | trim }}",
    "a macro": "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(m.content) }}",
    "all messages": "{{ messages }}",
    "an attribute": "{% if m.content.text is defined %}x{% endif %}{{ m.content }}",
    "chance": "{{ ['a', 'b'] | random }}{{ m.content }}",
    "formatted": "{{ '%s' % m.content }}",
    "as a key": "{{ {'a': 'b'}[m.content] }}{{ m.content }}",
}


@pytest.mark.parametrize("how", LOOKS)
def test_a_template_that_looks_has_no_shape(how: str) -> None:
    template = "{% for m in messages %}" + LOOKS[how] + "{% endfor %}"
    for rule in ("marked", ""):
        assert find_shape(template, ("user", "assistant", "user"), DATA, rule=rule, header="") is None


WRITES = {
    "added": "{{ '<' + m.role + '>' + m.content + '</s>' }}",
    "joined": "{{ '<' ~ m.role ~ loop.index ~ '>' ~ m.content ~ eos_token }}",
    "stripped": "{{ m.content | trim }}{{ m['content'].strip() }}{{ m.content.lstrip() }}|{{ m.content.rstrip() }}",
    "of a kind": "{% if m.content is string %}{{ m.content }}{% elif m.content is iterable %}x{% endif %}",
    "kept": "{% set x = m.content | trim %}{% if loop.first %}{% set x = 'a: ' + x %}{% endif %}{{ x }}",
    "percent": "100 % {{ m.content }} %s",
    "marked": "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endif %}",
    "last": "{% if loop.last %}{{ messages[-1]['content'] }}{% else %}{{ m.content }}{% endif %}",
}


@pytest.mark.parametrize("how", WRITES)
def test_what_only_writes_has_a_shape(how: str) -> None:
    template = "{% for m in messages %}" + WRITES[how] + "{% endfor %}"
    roles = ("user", "assistant", "user", "assistant")
    shape = find_shape(template, roles, DATA, rule="marked", header="")
    assert shape is not None
    for seed in range(20):
        turns = [{"role": role, "content": Random(seed + place).choice(SAID)} for place, role in enumerate(roles)]
        record = render_recorded(compiled(template), {**DATA, "messages": turns})
        assert shape.fill(turns) == ("".join(record.pieces), record.spans)


def test_a_shape_of_another_day_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    shape = find_shape(template, ("user",), DATA, rule="marked", header="")
    assert shape is not None
    assert shape.times.keys() == {"%Y"}
    turns = [{"role": "user", "content": "x"}]
    assert shape.fill(turns) is not None
    monkeypatch.setattr(shapes, "same_time", lambda times: False)
    assert shape.fill(turns) is None


UNMARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}",
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% if loop.last %}<|end|>{% endif %}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% continue %}{% endif %}{{ m.content }}|"
    "{% endfor %}",
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{% if add_generation_prompt %}"
    "<|assistant|>{% endif %}",
    "{% for m in messages %}<|{{ m.role }}|>{% if '<think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}",
    "{% set x %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% endset %}{{ x | trim }}",
)


@pytest.mark.parametrize("template", [*UNMARKED, None])
def test_rows_by_shape_are_those_found_one_by_one(
    tokenizer: Any, template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids, targets and tallies of many conversations, with shapes and without, by either way of one rendering."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = template or own.chat_template
    assert marks_answers(own.chat_template) is (template is None)
    rng = Random(5)
    said = [
        Chat("", [{"role": role, "content": rng.choice(SAID)} for role in rng.choice(ROLES[:5])]) for _ in range(400)
    ]
    found = []
    for learns in (True, False):
        if not learns:
            monkeypatch.setattr(ChatRenderer, "_learn", lambda *_: None)
            monkeypatch.setattr(ChatRenderer, "_trusted", lambda *_: None)
        encoder = TargetEncoder(own, trainer="transformers")
        rows = [(row.ids.tolist(), row.target.tolist()) for row in encoder.encode(said)]
        found.append((rows, encoder.renderer.take_tally()))
    assert found[0] == found[1]
