"""Which of the logged keys are shown first: in trackers, and under TensorBoard's own heading."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence

_PREFIX = "vocabguard/"
_DETAIL = "vocabguard-detail"


class ChosenKeys:
    """The keys that the setting ``log.keys`` names.

    Args:
        patterns: keys with or without ``vocabguard/``, in which ``*`` stands for any characters; ``all`` for every key.

    Example:
        >>> chosen = ChosenKeys(["head/*/below_0.95", "vocabguard/overhead"])
        >>> "vocabguard/head/ja/below_0.95" in chosen, "vocabguard/head/below_0.95" in chosen
        (True, False)
        >>> chosen.tag("vocabguard/head/below_0.95"), chosen.tag("vocabguard/alerts/at_risk")
        ('vocabguard-detail/head/below_0.95', 'vocabguard-detail-alerts/at_risk')
    """

    def __init__(self, patterns: str | Sequence[str]) -> None:
        given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        whole = ("*" if one == "all" else one.removeprefix(_PREFIX) for one in given)
        # Names of rules and groups may hold what else would be a set of characters.
        self._match = re.compile("|".join(fnmatch.translate(one.replace("[", "[[]")) for one in whole) or r"(?!)").match

    def __contains__(self, key: str) -> bool:
        return self._match(key.removeprefix(_PREFIX)) is not None

    def of(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """The chosen keys of a check that have a value."""
        return {key: value for key, value in scalars.items() if key in self and math.isfinite(value)}

    def tag(self, key: str) -> str:
        """Where TensorBoard shows a key: the chosen ones first, then the others, and where each rule stands last."""
        if key in self:
            return key
        short = key.removeprefix(_PREFIX)
        return f"{_DETAIL}-{short}" if short.startswith("alerts/") else f"{_DETAIL}/{short}"
