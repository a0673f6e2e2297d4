"""Conversations as text, and where in it the assistant speaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex
from transformers.utils.chat_template_utils import render_jinja_template

from vocabguard.offline.coverage_examples import Turn
from vocabguard.offline.coverage_shapes import Shape, Span, learn_shape, shape_of
from vocabguard.offline.readers import DataError

_GENERATION = regex.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class TurnTally:
    """How the assistant's turns were found where the template does not mark them.

    Attributes:
        exact: the renderings with and without the turn differ by it alone.
        by_text: the template is not prefix-preserving here; the turn was found by its text and what follows it.
        missing: neither; the turn counts as no target.
    """

    exact: int = 0
    by_text: int = 0
    missing: int = 0

    def __add__(self, other: TurnTally) -> TurnTally:
        return TurnTally(self.exact + other.exact, self.by_text + other.by_text, self.missing + other.missing)


class ChatRenderer:
    """A tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tally = TurnTally()
        self._tokenizer = tokenizer
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._shapes: dict[tuple[str, ...], tuple[Shape | None, TurnTally]] = {}
        self._met: set[tuple[str, ...]] = set()

    def text(self, place: str, turns: Sequence[Turn], options: Mapping[str, Any], *, generate: bool = False) -> str:
        """The conversation as text.

        Args:
            place: where it was read, for messages.
            turns: its messages.
            options: further arguments of the template.
            generate: end with what comes before an answer of the assistant.

        Raises:
            DataError: if there is no template, or it fails.
        """
        return self._render(place, turns, options, generate, False)[0]

    def assistant_spans(self, place: str, turns: Sequence[Turn], options: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """The conversation as text, and where the assistant speaks, with what ends its turns.

        A template with ``{% generation %}`` tells itself. Otherwise a turn is what the rendering up to it has more than
        the rendering of what comes before, with the generation prompt. Where these are no prefixes of the whole (some
        templates drop the reasoning of earlier turns), the turn's text is looked for, and its end as it would be alone.

        Raises:
            DataError: if there is no template, or it fails.
        """
        shape, turned = self._shape(place, turns, options)
        if shape is not None:
            whole = self.text(place, turns, options)
            spans = shape.spans_in(whole, turns)
            if spans is not None:
                self.tally += turned
                return whole, spans
        return self._found_spans(place, turns, options)

    def _shape(self, place: str, turns: Sequence[Turn], options: Mapping[str, Any]) -> tuple[Shape | None, TurnTally]:
        """The shape of such conversations and how its turns were found; from the second of them on, if it has one."""
        roles = None if options else shape_of(turns)
        if roles is None or roles not in self._met:
            self._met |= {roles} if roles else set()
            return None, TurnTally()
        if roles not in self._shapes:
            before, self.tally = self.tally, TurnTally()
            try:
                shape = learn_shape(roles, lambda own: self._found_spans(place, own, {}))
            except DataError:  # our words may be none that the template takes
                shape = None
            self._shapes[roles] = (None if self.tally.missing else shape), self.tally
            self.tally = before
        return self._shapes[roles]

    def _found_spans(self, place: str, turns: Sequence[Turn], options: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """`assistant_spans`, by a rendering for each turn where the template does not mark them."""
        if _GENERATION.search(self._template(place, options)):
            return self._render(place, turns, options, False, True)
        whole = self.text(place, turns, options)
        spans: list[Span] = []
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = self.text(place, turns[:number], options, generate=True) if number else ""
                last = number == len(turns) - 1
                after = whole if last else self.text(place, turns[: number + 1], options)
                begin = spans[-1][1] if spans else 0
                span = self._span(whole, before, after, turn, begin)
                spans += [span] if span else []
        return whole, spans

    def _span(self, whole: str, before: str, after: str, turn: Turn, begin: int) -> Span | None:
        if before and after.startswith(before) and whole.startswith(after):
            self.tally.exact += 1
            return len(before), len(after)
        content = turn.get("content")
        text = content.strip() if isinstance(content, str) else ""
        at = whole.find(text, len(before) if before and whole.startswith(before) else begin) if text else -1
        if at < 0:
            self.tally.missing += 1
            return None
        self.tally.by_text += 1
        start = len(before) if before and whole.startswith(before) else at
        end, close = at + len(text), after[after.rfind(text) + len(text) :] if text in after else ""
        return start, end + len(close) * whole.startswith(close, end)

    def _template(self, place: str, options: Mapping[str, Any]) -> str:
        try:
            template = self._tokenizer.get_chat_template(None, options.get("tools"))
        except Exception as error:  # several, by what is missing
            raise DataError(f"{place}: messages need a chat template, and the tokenizer has none") from error
        if not isinstance(template, str) or not template:
            raise DataError(f"{place}: messages need a chat template, and the tokenizer's is empty")
        return template

    def _render(
        self, place: str, turns: Sequence[Turn], options: Mapping[str, Any], generate: bool, track: bool
    ) -> tuple[str, list[Span]]:
        template = self._template(place, options)
        try:
            rendered: Any = render_jinja_template(
                conversations=[list(turns)],
                chat_template=template,
                return_assistant_tokens_mask=track,
                add_generation_prompt=generate,
                **{**self._special, **options},
            )
        except Exception as error:  # templates are programs of their own and raise what they like
            told = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise DataError(f"{place}: the chat template fails on roles {_roles(turns)}: {told}") from error
        texts, spans = rendered
        return str(texts[0]), [(int(begin), int(end)) for begin, end in spans[0]] if track else []


def _roles(turns: Sequence[Turn]) -> str:
    roles = [str(turn["role"]) for turn in turns]
    return ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
