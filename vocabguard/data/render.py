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
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transformers.utils.chat_template_utils import render_jinja_template

from vocabguard.data.roles import ROLES, Turn, UnknownRoleError
from vocabguard.data.shapes import Shape, find_shape, shape_key
from vocabguard.data.tables import DataError
from vocabguard.data.templates import Span, Written, compiled, marks_answers, render_recorded, watch, watched
from vocabguard.files import one_line

Trainer = Literal["trl", "transformers"]
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)

_Key = tuple[str, str, tuple[str, ...]]  # a template, what is asked of it, and the roles of a conversation
_ALWAYS: dict[str, Any] = {"tools": None, "documents": None}  # that transformers tells every template

_ALIKE, _LOOK_AGAIN = 64, 97  # renderings that are compared with transformers' own, and every so many after them
_MOST_SHAPES = 4096
_CONTENT = "0vocabguard0"  # that a template neither trims nor splits


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
        self._headers: dict[tuple[str, str], str] = {}
        self._quick: dict[str, tuple[bool, int]] = {}
        # None is a shape that was seen once, False one whose contents change what is written.
        self._shapes: dict[_Key, Shape | bool | None] = {}
        self._filled: list[Shape] = []

    def take_tally(self) -> TurnTally:
        """How turns were found since the last call."""
        for shape, times in Counter(self._filled).items():
            counts = {shape.rule: times} if shape.rule else {"exact": shape.found * times}
            self.tally.add(missing=shape.missing * times, **counts)
        self._filled.clear()
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
        template = self._own(place, options)
        key = _key(template, "prompt" if generate else "text", turns, options)
        if key is not None and (filled := self._fill(key, turns)) is not None:
            return filled[1]
        text = self._render(place, template, turns, options, generate, False)[0]
        if key is not None:
            self._learn(key, turns, (text, []), "")
        return text

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
        if not marks_answers(own) and (swapped := self.swapped[0]) is not None:
            template = swapped
        key = _key(template, "answers", turns, options)
        if key is not None and (filled := self._fill(key, turns)) is not None:
            self._filled.append(filled[0])
            return filled[1:]
        rule = ("marked" if template is own else "trl") if marks_answers(template) else ""
        result = self._one_by_one(place, template, turns, options, rule)
        if key is not None:
            self._learn(key, turns, result, rule)
        return result

    def _one_by_one(
        self, place: str, template: str, turns: Sequence[Turn], options: Mapping[str, Any], rule: str
    ) -> tuple[str, list[Span]]:
        silent = {i for i, turn in enumerate(turns) if turn["role"] == "assistant" and not is_trained(turn)}
        self.tally.add(silent=len(silent))
        if not rule:
            return self._found(place, template, turns, options, silent)
        self.tally.add(**{rule: 1})
        text, spans = self._render(place, template, turns, options, False, True)
        self.tally.add(calls_lost=_calls_lost(turns, text))
        return text, self._without(place, template, text, spans, turns, options, silent) if silent else spans

    def _fill(self, key: _Key, turns: Sequence[Turn]) -> tuple[Shape, str, list[Span]] | None:
        """A conversation by its shape, where that is known."""
        shape, template = self._shapes.get(key), key[0]
        if not isinstance(shape, Shape) or (looked := self._trusted(template)) is None:
            return None
        if (filled := shape.fill(turns)) is None:
            del self._shapes[key]
            return None
        self._quick[template] = True, looked + 1
        return shape, *filled

    def _learn(self, key: _Key, turns: Sequence[Turn], result: tuple[str, list[Span]], rule: str) -> None:
        """What a conversation tells of its shape, once it was rendered alone."""
        known = self._shapes.get(key, True)
        if known is True:  # never seen: most shapes of long conversations come once
            if len(self._shapes) < _MOST_SHAPES:
                self._shapes[key] = None
            return
        if known is None and self._quick[key[0]][0]:
            template, kind, roles = key
            data = {**_ALWAYS, "add_generation_prompt": kind == "prompt", **self._special}
            header = "" if rule or kind != "answers" else self._header(template, {})
            known = find_shape(template, roles, data, rule=rule if kind == "answers" else "text", header=header)
        if not isinstance(known, Shape) or known.fill(turns) != result:
            known = False
        self._shapes[key] = known

    def _trusted(self, template: str) -> int | None:
        """Renderings so far of a template that need not be compared with transformers' now; None if this one is to."""
        quick, looked = self._quick.get(template, (True, 0))
        return looked if quick and looked >= _ALIKE and looked % _LOOK_AGAIN else None

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
        whole, regions = self._shown(place, template, turns, options)
        self.tally.add(calls_lost=_calls_lost(turns, whole))
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
        others = {k: v for k, v in options.items() if k != "tools"}
        key = template, json.dumps(others, default=str, sort_keys=True) if others else ""
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

    def _shown(
        self, place: str, template: str, turns: Sequence[Turn], options: Mapping[str, Any]
    ) -> tuple[str, dict[int, list[Span]] | None]:
        """The conversation as text, and its regions; rendered once where that is enough."""
        looked = self._trusted(template)
        written = None if looked is None else self._watched(template, turns, options, alone=True)
        if written is not None and looked is not None and all(self._knows(template, turn["role"]) for turn in turns):
            self._quick[template] = True, looked + 1
            return written.text, written.regions
        whole = self._render(place, template, turns, options, False, False)[0]
        return whole, self._regions(template, whole, turns, options)

    def _regions(
        self, template: str, text: str, turns: Sequence[Turn], options: Mapping[str, Any]
    ) -> dict[int, list[Span]] | None:
        """The characters that the template writes while it is at each message; None where that cannot be seen."""
        written = self._watched(template, turns, options)
        return written.regions if written is not None and written.text == text else None

    def _watched(
        self, template: str, turns: Sequence[Turn], options: Mapping[str, Any], alone: bool = False
    ) -> Written | None:
        """The rendering that shows the messages; with `alone` only where it is the text for sure."""
        data = {**_ALWAYS, "add_generation_prompt": False, **self._special, **options}
        try:
            program, is_text = watched(template)
            return watch(program, data, [_with_thoughts(turn) for turn in turns]) if is_text or not alone else None
        except Exception:  # a template that the other engine renders and this one does not
            return None

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
        template = getattr(self._tokenizer, "chat_template", None)
        if isinstance(template, str) and template:
            return template
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
        if self._trusted(template) is not None:
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
        told = {"messages": [_with_thoughts(turn) for turn in turns], "add_generation_prompt": generate}
        record = render_recorded(compiled(template), {**_ALWAYS, **told, **self._special, **options})
        return "".join(record.pieces), record.spans if track else []

    def _knows(self, template: str, role: str) -> bool:
        if role in ROLES:
            return True
        if (template, role) not in self._named:
            self._named[template, role] = f"'{role}'" in template or f'"{role}"' in template
        return self._named[template, role]


def _key(template: str, kind: str, turns: Sequence[Turn], options: Mapping[str, Any]) -> _Key | None:
    roles = None if options else shape_key(turns)
    return None if roles is None else (template, kind, roles)


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
