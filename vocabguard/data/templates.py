"""Chat templates as programs: compiled as transformers compiles them, and so that they tell where each message is.

`Written` is what a template wrote; its regions and spans come from marks of a private plane that are taken out again.
"""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import regex
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vocabguard.data.roles import Turn

Span = tuple[int, int]
"""Characters from the first to before the second."""

OPEN, CLOSE, END = "\U0010f8f0", "\U0010f8f1", "\U0010f8f2"  # of a private plane: in no text that people write
_GENERATION = regex.compile(r"\{%-?\s*generation\s*-?%\}")
_OWN, _ROOM = 1 + secrets.randbelow(10**8), 10**7  # numbers that no data can hold
_MARK = regex.compile(f"{OPEN}{_OWN}([0-9]{{7}}){CLOSE}|{END}{_OWN}([0-9]{{7}}){CLOSE}")
_CAPTURES = (jinja2.nodes.AssignBlock, jinja2.nodes.FilterBlock, jinja2.nodes.Macro, jinja2.nodes.CallBlock)


@functools.lru_cache(maxsize=32)
def marks_answers(template: str) -> bool:
    """Whether a template says itself which text is the assistant's."""
    return _GENERATION.search(template) is not None


@dataclass
class Record:
    """What a template does while it is rendered.

    Attributes:
        spans: what is marked by ``{% generation %}``.
        length: characters written so far.
        times: what the template was told of the time, by the form it asked for.
    """

    pieces: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    length: int = 0
    times: dict[str, str] = field(default_factory=dict)


_RECORD: ContextVar[Record | None] = ContextVar("vocabguard_record", default=None)


@contextmanager
def _recorded() -> Iterator[Record]:
    record = Record()
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def render_recorded(template: jinja2.Template, data: Mapping[str, Any]) -> Record:
    """Render, and see what is marked.

    Raises:
        Exception: whatever the template raises.
    """
    with _recorded() as record:
        for piece in template.generate(data):
            record.pieces.append(piece)
            record.length += len(piece)
    return record


@dataclass(frozen=True)
class Written:
    """A rendering that shows its messages.

    Attributes:
        text: without the marks.
        regions: the characters that were written at each message, by its place; a message may have none, or several.
        whole: every message was seen to its end.
        times: as in `Record`.
    """

    text: str
    regions: dict[int, list[Span]]
    whole: bool
    times: Mapping[str, str]


def watch(template: jinja2.Template, data: Mapping[str, Any], turns: Sequence[Turn]) -> Written:
    """Render a template of `watched`, with the turns as ``messages``.

    Raises:
        Exception: whatever the template raises.
    """
    places = {id(turn): place for place, turn in enumerate(turns)}

    def place_of(turn: Any) -> int:
        place = places.get(id(turn))
        return -1 if place is None else _OWN * _ROOM + place

    with _recorded() as record:
        shown = template.render({**data, "messages": turns, "vocabguard_place": place_of})
    regions: dict[int, list[Span]] = {place: [] for place in range(len(turns))}
    pieces, length, at, opened = [], 0, 0, dict[int, int]()
    for mark in _MARK.finditer(shown):
        pieces.append(shown[at : mark.start()])
        length, at = length + len(pieces[-1]), mark.end()
        if mark[1] is not None:
            opened[int(mark[1])] = length
        elif (begin := opened.pop(int(mark[2]), length)) < length:
            regions[int(mark[2])].append((begin, length))
    pieces.append(shown[at:])
    text = "".join(pieces)
    # A loop that goes on before a message's end shows where it began only.
    begins = sorted([*opened.values(), *(span[0] for spans in regions.values() for span in spans), len(text)])
    for place, begin in opened.items():
        end = next((other for other in begins if other > begin), len(text))
        regions[place] += [(begin, end)] if end > begin else []
    return Written(text, regions, not opened, record.times)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` as transformers reads it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        text = caller()
        if (record := _RECORD.get()) is not None:
            record.spans.append((record.length, record.length + len(text)))
        return text


def chat_environment(finalize: Callable[[Any], Any] | None = None) -> ImmutableSandboxedEnvironment:
    """Jinja as transformers has it for chat templates."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], finalize=finalize
    )
    made.filters["tojson"] = _to_json
    named = {"raise_exception": _raise, "strftime_now": _now, "dict": _as_dict}
    made.globals.update(named)
    return made


@functools.lru_cache(maxsize=32)
def compiled(template: str) -> jinja2.Template:
    """The template as it is."""
    return chat_environment().from_string(template)


@functools.lru_cache(maxsize=32)
def watched(template: str) -> tuple[jinja2.Template, bool]:
    """The template, which also writes where each message of a loop begins and ends.

    Returns:
        The template; whether its loops write where all can see it: then what it writes without the marks is what it
        would write without being watched. What is written into a variable may be looked at, marks and all.
    """
    made = chat_environment()
    tree = made.parse(template)
    captured = any(list(node.find_all(jinja2.nodes.For)) for node in tree.find_all(_CAPTURES))
    return from_tree(made, marked_loops(tree)), not captured


def from_tree(made: jinja2.Environment, tree: jinja2.nodes.Template) -> jinja2.Template:
    """A template of a program that was changed."""
    return jinja2.Template.from_code(made, made.compile(tree), made.make_globals(None))


def marked_loops(tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """The program with loops that write marks around what they do at each message."""
    for number, loop in enumerate(list(tree.find_all(jinja2.nodes.For))):
        if isinstance(loop.target, jinja2.nodes.Name):
            loop.body = list(_with_marks(loop.body, loop.target.name, f"vocabguard_{number}"))
    return tree


def only_writes(tree: jinja2.nodes.Template) -> bool:
    """Whether nothing that a program writes is kept and looked at, and nothing in it is left to chance."""
    captures = [node for node in tree.find_all(_CAPTURES) if not _is_generation(node)]
    names = {node.name for node in tree.find_all(jinja2.nodes.Name)}
    filters = {node.name for node in tree.find_all(jinja2.nodes.Filter)}
    return not captures and "lipsum" not in names and "random" not in filters


def _is_generation(node: jinja2.nodes.Node) -> bool:
    return isinstance(node, jinja2.nodes.CallBlock) and isinstance(node.call.node, jinja2.nodes.ExtensionAttribute)


def _with_marks(body: list[jinja2.nodes.Node], item: str, name: str) -> Iterator[jinja2.nodes.Node]:
    from jinja2 import nodes

    asked = nodes.Call(nodes.Name("vocabguard_place", "load"), [nodes.Name(item, "load")], [], None, None)
    yield nodes.Assign(nodes.Name(name, "store"), asked)
    for sign, rest in ((OPEN, body), (END, [])):
        text = nodes.Concat([nodes.Const(sign), nodes.Name(name, "load"), nodes.Const(CLOSE)])
        is_message = nodes.Compare(nodes.Name(name, "load"), [nodes.Operand("gteq", nodes.Const(0))])
        yield nodes.Output([nodes.CondExpr(is_message, text, nodes.Const(""))])
        yield from rest


def _as_dict(*pairs: Any, **named: Any) -> dict[Any, Any]:
    return dict(*pairs, **named)  # a function has none of the attributes by which a template could break out


def _now(form: str) -> str:
    text = datetime.now().strftime(form)
    if (record := _RECORD.get()) is not None:
        record.times[form] = text
    return text


def same_time(times: Mapping[str, str]) -> bool:
    """Whether a template would be told the same of the time now."""
    return all(datetime.now().strftime(form) == text for form, text in times.items())


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
