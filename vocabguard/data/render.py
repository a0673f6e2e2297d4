"""Conversations as text by a chat template, and which characters the assistant's turns are.

Three rules, by what there is:

- `marked`: the template has ``{% generation %}`` blocks and says itself which text is the assistant's.
- `trl`: it has none, and TRL knows it: ``SFTTrainer(assistant_only_loss=True)`` swaps in a training template, which
  may also keep what the own one drops (the thoughts of earlier turns). The same is done here, by TRL's own function.
- `found`: neither. TRL refuses such a template; here the turns are found by rendering, and that is said.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args

import jinja2
import jinja2.ext
import jinja2.nodes
import regex
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template

from vocabguard.data.roles import ROLES, Turn, UnknownRoleError
from vocabguard.data.tables import DataError
from vocabguard.files import one_line

Span = tuple[int, int]
"""Characters from the first to before the second."""

Trainer = Literal["trl", "transformers"]
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)

Rule = Literal["marked", "trl", "found"]

_GENERATION = regex.compile(r"\{%-?\s*generation\s*-?%\}")
_OPEN, _CLOSE, _END = "\U0010f8f0", "\U0010f8f1", "\U0010f8f2"  # of a private plane: in no text that people write
_MARK = regex.compile(f"{_OPEN}([0-9]+){_CLOSE}|{_END}([0-9]+){_CLOSE}")
_ALIKE, _LOOK_AGAIN = 64, 97  # renderings that are compared with transformers' own, and every so many after them
_CONTENT = "0vocabguard0"  # that a template neither trims nor splits


@functools.lru_cache(maxsize=32)
def _marks(template: str) -> bool:
    return _GENERATION.search(template) is not None


@dataclass
class TurnTally:
    """How the assistant's turns were found.

    Attributes:
        exact: where the template does not mark them, by where each message of the loop begins and ends.
        by_text: the template has no such loop; the turn was found by its text and what follows it.
        missing: neither; the turn counts as no target.
        marked: conversations whose template marks the assistant's text.
        trl: conversations with TRL's training template.
        silent: turns that the data takes out of the loss, by ``weight: 0`` or ``train: false``.
        calls_lost: turns whose tool calls the template does not write.
    """

    exact: int = 0
    by_text: int = 0
    missing: int = 0
    marked: int = 0
    trl: int = 0
    silent: int = 0
    calls_lost: int = 0

    def add(self, **counts: int) -> None:
        """Count more, by the names of the attributes."""
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)


class ChatRenderer:
    """A tokenizer's chat template.

    Args:
        trainer: whose rules: ``trl`` takes TRL's training template where the own one does not mark the assistant and
            TRL is installed; ``transformers`` takes the tokenizer's own always.
    """

    def __init__(self, tokenizer: Any, trainer: Trainer = "trl") -> None:
        if trainer not in TRAINERS:
            raise ValueError(f"trainer is {trainer!r}; allowed: {', '.join(TRAINERS)}")
        self.tally = TurnTally()
        self._tokenizer, self._trainer = tokenizer, trainer
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._named: dict[tuple[str, str], bool] = {}
        self._headers: dict[str, str] = {}
        self._quick: dict[str, tuple[bool, int]] = {}

    def take_tally(self) -> TurnTally:
        """How turns were found since the last call."""
        taken, self.tally = self.tally, TurnTally()
        return taken

    @functools.cached_property
    def swapped(self) -> tuple[str | None, str]:
        """TRL's training template, or None and why there is none."""
        if self._trainer != "trl":
            return None, ""
        return training_template(self._tokenizer)

    def text(self, place: str, turns: Sequence[Turn], options: Mapping[str, Any], *, generate: bool = False) -> str:
        """The conversation as text, by the tokenizer's own template.

        Args:
            options: further arguments of the template.
            generate: end with what comes before an answer of the assistant.

        Raises:
            DataError: if there is no template, or it fails, or a role is not known.
        """
        return self._render(place, self._own(place, options), turns, options, generate, False)[0]

    def identity(self, swapped: bool) -> str:
        """SHA-256 of the tokenizer's templates, and of TRL's if it was `swapped` in."""
        parts = [getattr(self._tokenizer, "chat_template", None), self.swapped[0] if swapped else None]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def assistant_spans(self, place: str, turns: Sequence[Turn], options: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """The conversation as text, and where the assistant speaks, with what ends its turns; see the rules above.

        Turns with ``weight: 0`` or ``train: false`` are in no span.

        Raises:
            DataError: if there is no template, or it fails, or a role is not known.
        """
        template = own = self._own(place, options)
        if not _marks(own) and (swapped := self.swapped[0]) is not None:
            template = swapped
        silent = {i for i, turn in enumerate(turns) if turn["role"] == "assistant" and not is_trained(turn)}
        self.tally.add(silent=len(silent))
        if _marks(template):
            self.tally.add(**{"marked" if template is own else "trl": 1})
            text, spans = self._render(place, template, turns, options, False, True)
            self.tally.add(calls_lost=_calls_lost(turns, text))
            return text, self._without(place, template, text, spans, turns, options, silent) if silent else spans
        return self._found(place, template, turns, options, silent)

    def _without(
        self, place: str, template: str, text: str, spans: list[Span], turns: Sequence[Turn],
        options: Mapping[str, Any], silent: set[int],
    ) -> list[Span]:  # fmt: skip
        """The spans but those of the silent turns."""
        regions = self._regions(template, text, turns, options)
        if regions is None or not any(regions.values()):
            raise DataError(f"{place}: a turn has weight 0 or train false, and the chat template does not show where "
                            "it is; allowed: a template that loops over the messages")  # fmt: skip
        left_out = [region for turn in silent for region in regions[turn]]
        return [span for span in spans if not any(span[0] < end and begin < span[1] for begin, end in left_out)]

    def _found(
        self, place: str, template: str, turns: Sequence[Turn], options: Mapping[str, Any], silent: set[int]
    ) -> tuple[str, list[Span]]:
        """Where the template marks nothing: from the header, which a generation prompt shows, to the message's end."""
        whole = self._render(place, template, turns, options, False, False)[0]
        self.tally.add(calls_lost=_calls_lost(turns, whole))
        regions = self._regions(template, whole, turns, options)
        if regions is None or not any(regions.values()):
            return whole, self._by_prefixes(place, template, whole, turns, options, silent)
        header = self._header(template, options)
        spans: list[Span] = []
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant" and i not in silent:
                parts = regions[i]
                self.tally.add(**{"exact" if parts else "missing": 1})
                spans += [(begin + _shared(whole[begin:end], header), end) for begin, end in parts]
        return whole, spans

    def _header(self, template: str, options: Mapping[str, Any]) -> str:
        """What the template writes before an answer, whatever the answer: no target, since the trainer gives it."""
        key = template + json.dumps({k: v for k, v in options.items() if k != "tools"}, default=str, sort_keys=True)
        if key not in self._headers:
            self._headers[key] = self._new_header(template, options)
        return self._headers[key]

    def _new_header(self, template: str, options: Mapping[str, Any]) -> str:
        asked: list[Turn] = [{"role": "user", "content": _CONTENT}]
        said = [*asked, {"role": "assistant", "content": _CONTENT}]
        try:
            before = self._render("", template, asked, options, False, False)[0]
            prompted = self._render("", template, asked, options, True, False)[0]
            whole = self._render("", template, said, options, False, False)[0]
        except DataError:
            return ""
        if not prompted.startswith(before):
            return ""
        regions = self._regions(template, whole, said, options)
        begin, end = next(iter((regions or {}).get(1, [])), (0, 0))
        answer = whole[begin:end].partition(_CONTENT)[0]
        prompt = prompted[len(before) :]
        return answer[: _shared(answer, prompt)]

    def _regions(
        self, template: str, text: str, turns: Sequence[Turn], options: Mapping[str, Any]
    ) -> dict[int, list[Span]] | None:
        """The characters that the template writes while it is at each message; None where that cannot be seen."""
        plain = [_with_thoughts(turn) for turn in turns]
        places = {id(turn): place for place, turn in enumerate(plain)}
        always = {"messages": plain, "tools": None, "documents": None, "add_generation_prompt": False}
        data = {**always, **self._special, **options, "vocabguard_place": lambda turn: places.get(id(turn), -1)}
        try:
            shown = _watched(template).render(data)
        except Exception:  # a template that the other engine renders and this one does not
            return None
        regions: dict[int, list[Span]] = {place: [] for place in range(len(plain))}
        pieces, length, at, opened = [], 0, 0, dict[int, int]()
        for mark in _MARK.finditer(shown):
            pieces.append(shown[at : mark.start()])
            length, at = length + len(pieces[-1]), mark.end()
            if mark[1] is not None:
                opened[int(mark[1])] = length
            elif (begin := opened.pop(int(mark[2]), length)) < length:
                regions[int(mark[2])].append((begin, length))
        pieces.append(shown[at:])
        if "".join(pieces) != text:
            return None
        # A loop that goes on before a message's end shows where it began only.
        begins = sorted([*opened.values(), *(span[0] for spans in regions.values() for span in spans), len(text)])
        for place, begin in opened.items():
            end = next((other for other in begins if other > begin), len(text))
            regions[place] += [(begin, end)] if end > begin else []
        return regions

    def _by_prefixes(
        self, place: str, template: str, whole: str, turns: Sequence[Turn], options: Mapping[str, Any],
        silent: set[int],
    ) -> list[Span]:  # fmt: skip
        """Turns by what a rendering has more than the one of what comes before, or by their text."""
        spans: list[Span] = []
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant" and number not in silent:
                before = self._render(place, template, turns[:number], options, True, False)[0] if number else ""
                last = number == len(turns) - 1
                after = whole if last else self._render(place, template, turns[: number + 1], options, False, False)[0]
                begin = spans[-1][1] if spans else 0
                span = self._span(whole, before, after, turn, begin)
                spans += [span] if span else []
        return spans

    def _span(self, whole: str, before: str, after: str, turn: Turn, begin: int) -> Span | None:
        if before and after.startswith(before) and whole.startswith(after):
            self.tally.add(exact=1)
            return len(before), len(after)
        content = turn.get("content")
        text = content.strip() if isinstance(content, str) else ""
        at = whole.find(text, len(before) if before and whole.startswith(before) else begin) if text else -1
        if at < 0:
            self.tally.add(missing=1)
            return None
        self.tally.add(by_text=1)
        start = len(before) if before and whole.startswith(before) else at
        end, close = at + len(text), after[after.rfind(text) + len(text) :] if text in after else ""
        return start, end + len(close) * whole.startswith(close, end)

    def _own(self, place: str, options: Mapping[str, Any]) -> str:
        try:
            template = self._tokenizer.get_chat_template(None, options.get("tools"))
        except Exception as error:  # several, by what is missing
            raise DataError(f"{place}: messages need a chat template, and the tokenizer has none") from error
        if not isinstance(template, str) or not template:
            raise DataError(f"{place}: messages need a chat template, and the tokenizer's is empty")
        return template

    def _render(
        self, place: str, template: str, turns: Sequence[Turn], options: Mapping[str, Any], generate: bool, track: bool
    ) -> tuple[str, list[Span]]:
        for turn in turns:
            if not self._knows(template, turn["role"]):
                raise UnknownRoleError(f"{place}: the role {turn['role']!r} is not known; allowed: {', '.join(ROLES)}, "
                                       "and roles that the chat template names")  # fmt: skip
        quick, looked = self._quick.get(template, (True, 0))
        if quick and looked >= _ALIKE and looked % _LOOK_AGAIN:
            with suppress(Exception):  # the other engine says what is wrong
                found = self._rendered_quickly(template, turns, options, generate, track)
                self._quick[template] = True, looked + 1
                return found
        try:
            rendered: Any = render_jinja_template(
                conversations=[list(turns)],
                chat_template=template,
                return_assistant_tokens_mask=track,
                add_generation_prompt=generate,
                **{**self._special, **options},
            )
        except Exception as error:  # templates are programs of their own and raise what they like
            raise DataError(f"{place}: the chat template fails on roles {_roles(turns)}: {one_line(error)}") from error
        texts, spans = rendered
        known = str(texts[0]), [(int(begin), int(end)) for begin, end in spans[0]] if track else []
        if quick:
            try:
                quick = self._rendered_quickly(template, turns, options, generate, track) == known
            except Exception:  # a template that only the other engine renders
                quick = False
            self._quick[template] = quick, looked + 1
        return known

    def _rendered_quickly(
        self, template: str, turns: Sequence[Turn], options: Mapping[str, Any], generate: bool, track: bool
    ) -> tuple[str, list[Span]]:
        """As transformers renders, without its copies of the data: three times as fast."""
        always = {"messages": [_with_thoughts(turn) for turn in turns], "tools": None, "documents": None}
        data = {**always, "add_generation_prompt": generate, **self._special, **options}
        record = _Record()
        token = _RECORD.set(record)
        try:
            for piece in _compiled(template).generate(data):
                record.pieces.append(piece)
                record.length += len(piece)
        finally:
            _RECORD.reset(token)
        return "".join(record.pieces), record.spans if track else []

    def _knows(self, template: str, role: str) -> bool:
        if role in ROLES:
            return True
        if (template, role) not in self._named:
            self._named[template, role] = f"'{role}'" in template or f'"{role}"' in template
        return self._named[template, role]


def is_trained(turn: Turn) -> bool:
    """Whether a turn is in the loss: OpenAI's ``weight: 0`` and axolotl's ``train: false`` take it out.

    >>> is_trained({"role": "assistant", "content": "Hi", "weight": 0})
    False
    """
    return turn.get("train") is not False and turn.get("weight", 1) != 0


def _calls_lost(turns: Sequence[Turn], text: str) -> int:
    """Turns of which a called function is not named in the text."""
    calls = [turn["tool_calls"] for turn in turns if isinstance(turn.get("tool_calls"), list)]
    names = [[(call.get("function") or call).get("name") for call in of if isinstance(call, dict)] for of in calls]
    return sum(any(isinstance(name, str) and name not in text for name in of) for of in names)


def training_template(tokenizer: Any) -> tuple[str | None, str]:
    """The template that TRL's ``SFTTrainer(assistant_only_loss=True)`` uses in the place of the tokenizer's own.

    Returns:
        The template, or None and why there is none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a library's import
            from trl.chat_template_utils import get_training_chat_template
    except Exception as error:  # not installed, or for other versions than these
        return None, f"TRL is not there to ask ({one_line(error, 80)})"
    try:
        found = get_training_chat_template(tokenizer)
    except Exception:  # for a template of which it has no copy, and for those that fail on its own questions
        return None, "TRL has no training template for it and refuses assistant_only_loss=True"
    return found, "" if found else "TRL takes the template as it is"


@dataclass
class _Record:
    """What a template has written so far, and which of it is marked."""

    pieces: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    length: int = 0


_RECORD: ContextVar[_Record | None] = ContextVar("vocabguard_record", default=None)


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


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers has it for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    named = {"raise_exception": _raise, "strftime_now": _now, "dict": _as_dict}
    environment.globals.update(named)
    return environment


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.lru_cache(maxsize=32)
def _watched(template: str) -> jinja2.Template:
    """The template, which also writes where each message of a loop begins and ends."""
    environment = _environment()
    tree = environment.parse(template)
    for number, loop in enumerate(list(tree.find_all(jinja2.nodes.For))):
        if isinstance(loop.target, jinja2.nodes.Name):
            loop.body = list(_with_marks(loop.body, loop.target.name, f"vocabguard_{number}"))
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


def _as_dict(*pairs: Any, **named: Any) -> dict[Any, Any]:
    return dict(*pairs, **named)  # a function has none of the attributes by which a template could break out


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _with_marks(body: list[jinja2.nodes.Node], item: str, name: str) -> Iterator[jinja2.nodes.Node]:
    from jinja2 import nodes

    asked = nodes.Call(nodes.Name("vocabguard_place", "load"), [nodes.Name(item, "load")], [], None, None)
    yield nodes.Assign(nodes.Name(name, "store"), asked)
    for sign, rest in ((_OPEN, body), (_END, [])):
        text = nodes.Concat([nodes.Const(sign), nodes.Name(name, "load"), nodes.Const(_CLOSE)])
        is_message = nodes.Compare(nodes.Name(name, "load"), [nodes.Operand("gteq", nodes.Const(0))])
        yield nodes.Output([nodes.CondExpr(is_message, text, nodes.Const(""))])
        yield from rest


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _shared(text: str, other: str) -> int:
    """Characters that two texts have in common at their beginning."""
    length = min(len(text), len(other))
    return next((i for i in range(length) if text[i] != other[i]), length)


def _with_thoughts(turn: Turn) -> Turn:
    """A copy with the thoughts under all names that templates have for them, as transformers gives it."""
    names = ("reasoning_content", "thinking", "reasoning")
    thoughts = next((turn[name] for name in names if turn.get(name) is not None), None)
    return dict(turn) if thoughts is None else {"thinking": thoughts, **turn, "reasoning_content": thoughts}


def _roles(turns: Sequence[Turn]) -> str:
    roles = [str(turn["role"]) for turn in turns]
    return ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
