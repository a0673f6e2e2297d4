"""The logged keys that rules may be about, and the values that each can take."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping

from vocabguard.measure.confusion import LANGUAGES
from vocabguard.results import EXPOSURE_CLASSES

PREFIX = "vocabguard/"
FIRING = "alerts/firing"
STATES = "alerts/"
"""Before a rule's name: where the rule stands. Such keys are logged; rules are not about them."""
ANY = "*"
"""In the place of a part: each script group, or each language."""

_COSINE, _SHARE, _COUNT = (-1.0, 1.0), (0.0, 1.0), (0.0, math.inf)
_MATRICES = ("head", "embedding")
_OF_ROWS = {
    "cosine_mean": _COSINE,
    "cosine_min": _COSINE,
    "cosine_p01": _COSINE,
    "residual_p01": _COSINE,
    "below_0.95": _SHARE,
    "below_0.90": _SHARE,
    "nonfinite_rows": _COUNT,
    "zero_rows": _COUNT,
}
_OF_FORECAST = {"below_0.95": _SHARE, "rows": _COUNT}
_OF_ANSWERS = ("latin", "line_pass", "word_pass")
_SINGLE = {
    **{f"exposure/{name}": _SHARE for name in EXPOSURE_CLASSES},
    "exposure/push_share": _SHARE,
    "exposure/targets": _COUNT,
    "forecast/cosine_mean": _COSINE,
    "probe/retained": _SHARE,
    "probe/watch": _SHARE,
    "probe/probability_mean": _SHARE,
    **{f"confusion/{name}": _SHARE for name in ("foreign", "line_pass", "word_pass")},
    FIRING: _COUNT,
    "overhead": _SHARE,
    "loss/data": _COUNT,
    "loss/echo": _COUNT,
    "echo/dose": _COUNT,
    "echo/targets_per_live_token": _COUNT,
    "hold/share": _SHARE,
}


def short_key(metric: str) -> str:
    """A logged key without ``vocabguard/``."""
    return metric.removeprefix(PREFIX)


def metric_range(metric: str) -> tuple[float, float]:
    """The values that a logged key can take.

    ``<part>`` below is a script group (``ja``), an exposure class (``never``, ``1-4``, ``5-19``, ``20+``), or ``*`` for
    each script group; ``<language>`` is an ISO 639 code, or ``*`` for each language.

    | key | range |
    |---|---|
    | ``head/`` and ``embedding/`` ``cosine_mean``, ``cosine_min``, ``cosine_p01``, ``residual_p01`` | [-1, 1] |
    | ``head/`` and ``embedding/`` ``below_0.95``, ``below_0.90`` | [0, 1] |
    | ``head/`` and ``embedding/`` ``nonfinite_rows``, ``zero_rows`` | [0, inf) |
    | the same after ``head/<part>/`` and ``embedding/<part>/`` | the same |
    | ``forecast/below_0.95``, ``forecast/<part>/below_0.95`` | [0, 1] |
    | ``forecast/rows``, ``forecast/<part>/rows`` | [0, inf) |
    | ``forecast/cosine_mean`` | [-1, 1] |
    | ``exposure/`` ``never``, ``1-4``, ``5-19``, ``20+``, ``push_share`` | [0, 1] |
    | ``exposure/targets`` | [0, inf) |
    | ``probe/`` ``retained``, ``watch``, ``probability_mean``, ``<part>/retained`` | [0, 1] |
    | ``confusion/`` ``foreign``, ``line_pass``, ``word_pass``, ``<language>`` (at evaluations) | [0, 1] |
    | ``confusion/<language>/`` ``latin``, ``line_pass``, ``word_pass`` (at evaluations) | [0, 1] |
    | ``overhead``, ``hold/share`` | [0, 1] |
    | ``loss/data``, ``loss/echo``, ``echo/dose``, ``echo/targets_per_live_token`` | [0, inf) |
    | ``alerts/firing`` | [0, inf) |

    Args:
        metric: a logged key, with or without ``vocabguard/``. A part is not checked here, since the groups are the
            tokenizer's: see `require_parts`.

    Returns:
        Lowest and highest value; the highest is ``inf`` for counts.

    Raises:
        ValueError: for a key that is never logged, with the closest key that is.

    Example:
        >>> metric_range("head/ja/cosine_min")
        (-1.0, 1.0)
    """
    key = short_key(metric)
    if key in _SINGLE:
        return _SINGLE[key]
    owner, _, rest = key.partition("/")
    part, _, last = rest.rpartition("/")
    if "/" not in part and not rest.startswith("/"):
        if owner in _MATRICES and last in _OF_ROWS:
            return _OF_ROWS[last]
        if owner == "forecast" and last in _OF_FORECAST:
            return _OF_FORECAST[last]
        if owner == "probe" and last == "retained":
            return _SHARE
        if owner == "confusion" and ((not part and _is_language(last)) or (part and last in _OF_ANSWERS)):
            return _SHARE
    raise ValueError(f"metric is {metric!r}, which is never logged{_nearest(key, _known_keys(owner, part))}")


def part_of(metric: str) -> str | None:
    """The script group, exposure class or language that a key is about, or ``*``; None where it is about the whole."""
    key = short_key(metric)
    if key in _SINGLE:
        return None
    pieces = key.split("/")
    if pieces[0] == "confusion":
        return pieces[1]
    return pieces[1] if len(pieces) == 3 else None


def values_by_part(metric: str, scalars: Mapping[str, float]) -> dict[str, float]:
    """What was logged of each script group, or language, under a key with ``*``.

    Args:
        metric: a key with ``*`` in the place of its part.
        scalars: logged keys and values, without ``vocabguard/``.

    Returns:
        Part -> value. Exposure classes are none: their rows would count twice.

    Example:
        >>> values_by_part("head/*/below_0.95", {"head/ja/below_0.95": 0.2, "head/below_0.95": 0.1})
        {'ja': 0.2}
    """
    before, _, after = short_key(metric).partition(ANY)
    languages = before == "confusion/"
    found = {}
    for key, value in scalars.items():
        if len(key) > len(before) + len(after) and key.startswith(before) and key.endswith(after):
            part = key[len(before) : len(key) - len(after)]
            if "/" not in part and (part in LANGUAGES if languages else part not in EXPOSURE_CLASSES):
                found[part] = value
    return found


def require_part(metric: str, groups: Iterable[str], languages: Collection[str]) -> None:
    """Refuse a key about a script group that the tokenizer does not have, or a language that is not asked in.

    Args:
        metric: a logged key.
        groups: names of the tokenizer's script groups.
        languages: ISO 639 codes that are asked in at evaluations; empty where nothing is asked.

    Raises:
        ValueError: naming the metric and the parts that exist.
    """
    key, part = short_key(metric), part_of(metric)
    if key.startswith("confusion/") and not languages:
        raise ValueError(f"metric is {metric!r}, and no questions are asked; allowed with it: confusion.enabled: true")
    if part is None or part == ANY:
        return
    parts = (*languages,) if key.startswith("confusion/") else (*groups, *EXPOSURE_CLASSES)
    if part not in parts:
        raise ValueError(f"metric is {metric!r}; no part {part!r}{_nearest(part, parts)}")


def _is_language(name: str) -> bool:
    return name == ANY or name in LANGUAGES


def _known_keys(owner: str, part: str) -> list[str]:
    """All keys, those with parts for one part only; languages only where the key is about them."""
    inner = f"{part}/" if part else ""
    keys = [f"{matrix}/{inner}{last}" for matrix in _MATRICES for last in _OF_ROWS]
    keys += [f"forecast/{inner}{last}" for last in _OF_FORECAST]
    if owner == "confusion":
        keys += [f"confusion/{inner}{last}" for last in (_OF_ANSWERS if part else LANGUAGES)]
    if part:
        keys += [f"probe/{part}/retained", *_known_keys("", "")]
        return keys
    return [*keys, *_SINGLE]


def _nearest(text: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    close = difflib.get_close_matches(text, allowed, n=1)
    return (f"; did you mean {close[0]!r}?" if close else ".") + f" Allowed: {', '.join(allowed)}"
