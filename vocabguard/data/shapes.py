"""Conversations of one shape, rendered once.

Most chat templates put what is said where it belongs and never look at it: whether a text is empty, long or holds some
word changes nothing that they write around it. Such a template writes the same around every conversation with the same
roles, so that it is run once, with holes where the contents go, and what it wrote is filled from then on.

That it does not look is no guess: a hole is no text. It can be written, added to texts and stripped; whatever else a
template does with it ends the rendering, and the conversations of that shape are rendered one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
import regex
from jinja2.visitor import NodeTransformer

from vocabguard.data.roles import Turn
from vocabguard.data.templates import (
    CLOSE,
    OPEN,
    Span,
    Written,
    chat_environment,
    from_tree,
    marked_loops,
    only_writes,
    render_recorded,
    same_time,
    watch,
)

_HOLE = regex.compile(f"{OPEN}([0-9]+)([a-z]){CLOSE}")
_STRIPS = {"s": str.strip, "l": str.lstrip, "r": str.rstrip}
_AS_IT_IS = "a"


class LookedAtError(BaseException):
    """A template looks at a content; of no kind that Jinja's filters and tests pass over."""


class Hole:
    """Where contents go, with texts between them: (message, what is stripped), or a text."""

    __slots__ = ("_parts",)

    def __init__(self, *parts: tuple[int, str] | str) -> None:
        self._parts = parts

    def __add__(self, other: object) -> Hole:
        return Hole(*self._parts, *_parts_of(other))

    def __radd__(self, other: object) -> Hole:
        return Hole(*_parts_of(other), *self._parts)

    def strip(self) -> Hole:
        """Without space around."""
        return self._stripped("s")

    def lstrip(self) -> Hole:
        """Without space before."""
        return self._stripped("l")

    def rstrip(self) -> Hole:
        """Without space after."""
        return self._stripped("r")

    def written(self) -> str:
        """What stands for it in a rendering."""
        return "".join(part if isinstance(part, str) else f"{OPEN}{part[0]}{part[1]}{CLOSE}" for part in self._parts)

    def _stripped(self, how: str) -> Hole:
        if len(self._parts) != 1 or isinstance(part := self._parts[0], str) or part[1] not in (_AS_IT_IS, how):
            raise LookedAtError
        return Hole((part[0], how))

    def _looked_at(self, *_: object) -> NoReturn:
        raise LookedAtError

    __str__ = __repr__ = __format__ = __bool__ = __len__ = __iter__ = __contains__ = __hash__ = _looked_at
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __getitem__ = __mul__ = __rmul__ = __mod__ = _looked_at
    __int__ = __float__ = __index__ = __trunc__ = __round__ = __abs__ = __neg__ = __getattr__ = _looked_at


def _parts_of(value: object) -> tuple[tuple[int, str] | str, ...]:
    if isinstance(value, Hole):
        return value._parts
    if not isinstance(value, str):
        raise LookedAtError
    return (str(value),)


Edge = tuple[int, int]
"""A place in what a shape writes: after so many of its contents and so many characters of its own."""


@dataclass(frozen=True, eq=False)
class Shape:
    """What a template writes around the contents of conversations with the same roles.

    Attributes:
        form: the text, for ``%``.
        holes: whose content is put in, and what is stripped of it.
        edges: spans of targets.
        rule: by which rule of `render` targets are found; empty where they are what is written at a message.
        found: assistant turns with targets, for that rule.
        missing: those without.
        times: what the template was told of the time.
    """

    form: str
    holes: tuple[tuple[int, str], ...]
    edges: tuple[tuple[Edge, Edge], ...]
    rule: str
    found: int
    missing: int
    times: Mapping[str, str]

    def fill(self, turns: Sequence[Turn]) -> tuple[str, list[Span]] | None:
        """A conversation as text, and its targets; None if the template would be told another time by now."""
        if self.times and not same_time(self.times):
            return None
        contents = tuple([_put(turns[message]["content"], how) for message, how in self.holes])
        if not self.edges:
            return self.form % contents, []
        before = [0, *accumulate(map(len, contents))]
        return self.form % contents, [(before[i] + a, before[j] + b) for (i, a), (j, b) in self.edges]


def shape_key(turns: Sequence[Turn]) -> tuple[str, ...] | None:
    """The roles of a conversation of texts alone; None of others."""
    roles = []
    for turn in turns:
        if len(turn) != 2 or type(turn.get("content")) is not str:
            return None
        roles.append(turn["role"])
    return tuple(roles)


def find_shape(template: str, roles: Sequence[str], data: Mapping[str, Any], *, rule: str, header: str) -> Shape | None:
    """What the template writes around the contents.

    Args:
        data: what it is told beside the messages.
        rule: see `Shape`; with one, the targets are what the template marks.
        header: what it writes before an answer, whatever the answer, which is no target.

    Returns:
        The shape; None if the contents may change what is written, or which of it is a target.
    """
    turns: list[Turn] = [{"role": role, "content": Hole((place, _AS_IT_IS))} for place, role in enumerate(roles)]
    if OPEN in template or any(OPEN in str(value) for value in (*data.values(), header, *roles)):
        return None
    try:
        program = _holed(template, not rule)
        if program is None:
            return None
        if rule:
            record = render_recorded(program, {**data, "messages": turns})
            return _shape("".join(record.pieces), record.spans, rule, 0, 0, record.times)
        written = watch(program, data, turns)
    except (LookedAtError, Exception):  # it is rendered otherwise, and then it is said what is wrong
        return None
    return _shown_shape(written, roles, header)


def _shown_shape(written: Written, roles: Sequence[str], header: str) -> Shape | None:
    """With what is written at the assistant's messages as targets."""
    regions = {place: written.regions[place] for place, role in enumerate(roles) if role == "assistant"}
    targets = [_after_header(written.text, span, header) for of in regions.values() for span in of]
    spans = [span for span in targets if span is not None]
    if not written.whole or not any(written.regions.values()) or len(spans) < len(targets):
        return None
    found = sum(bool(of) for of in regions.values())
    return _shape(written.text, spans, "", found, len(regions) - found, written.times)


def _after_header(text: str, span: Span, header: str) -> Span | None:
    """The span without what it shares with the header; None if contents could change how much that is."""
    begin, end = span
    if not _HOLE.sub("", text[begin:end]):
        return None  # an empty content would leave nothing of it
    own, hole, _ = text[begin:end].partition(OPEN)
    shared = next((i for i, pair in enumerate(zip(own, header, strict=False)) if pair[0] != pair[1]), None)
    if shared is None and len(own) < len(header) and hole:
        return None  # a content might go on as the header does
    return begin + (min(len(own), len(header)) if shared is None else shared), end


def _shape(text: str, spans: Sequence[Span], rule: str, found: int, missing: int, times: Mapping[str, str]) -> Shape:
    pieces, holes, begins = [], [], []
    at = 0
    for hole in _HOLE.finditer(text):
        pieces.append(text[at : hole.start()])
        holes.append((int(hole[1]), hole[2]))
        begins.append((hole.start(), at := hole.end()))
    pieces.append(text[at:])

    def edge(place: int) -> Edge:
        passed = [hole for hole in begins if hole[1] <= place]
        return len(passed), place - sum(end - begin for begin, end in passed)

    form = "%s".join(piece.replace("%", "%%") for piece in pieces)
    return Shape(form, tuple(holes), tuple((edge(a), edge(b)) for a, b in spans), rule, found, missing, times)


def _put(content: str, how: str) -> str:
    return content if how == _AS_IT_IS else _STRIPS[how](content)


def _written(value: Any) -> Any:
    return value.written() if isinstance(value, Hole) else value


def _joined(*values: Any) -> Any:
    if not any(isinstance(value, Hole) for value in values):
        return "".join(map(str, values))
    parts = (value if isinstance(value, Hole) else Hole(str(value)) for value in values)
    return functools.reduce(Hole.__add__, parts)


class _Joins(NodeTransformer):
    """``~`` as a function, which takes holes."""

    def visit_Concat(self, node: jinja2.nodes.Concat, *args: Any, **named: Any) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node, *args, **named)
        function = jinja2.nodes.Name("vocabguard_joined", "load")
        return jinja2.nodes.Call(function, node.nodes, [], None, None).set_lineno(node.lineno)


@functools.lru_cache(maxsize=32)
def _holed(template: str, shown: bool) -> jinja2.Template | None:
    """The template, which takes holes; with marks around messages where they are to be `shown`."""
    made = chat_environment(_written)
    made.globals["vocabguard_joined"] = _joined
    tests = made.tests
    texts: Any = {name: functools.partial(_is_text, tests[name]) for name in ("string", "sequence", "iterable")}
    tests.update(texts)
    made.filters.update(trim=functools.partial(_trimmed, made.filters["trim"]))
    tree = made.parse(template)
    if not only_writes(tree):
        return None
    tree = _Joins().visit(tree)
    return from_tree(made, marked_loops(tree) if shown else tree)


def _is_text(usual: Any, value: Any) -> Any:
    return True if isinstance(value, Hole) else usual(value)


def _trimmed(usual: Any, value: Any, *more: Any, **named: Any) -> Any:
    return value.strip(*more, **named) if isinstance(value, Hole) else usual(value, *more, **named)
