"""Hooks that stay with the object they are set on: copies of a model, as EMA callbacks make them, carry none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any


class OwnHook:
    """A hook for one module.

    A module is copied and pickled with its hooks, and a bound method would take the whole guard along: counts that go
    on in the copy, open files that cannot be pickled. What comes out of a copy instead does nothing, and needs no
    package to be loaded.

    Args:
        act: what is called, with the hook's arguments.

    Example:
        >>> import copy
        >>> hook = OwnHook(lambda module, args: "seen")
        >>> hook(None, ()), copy.deepcopy(hook)(None, ())
        ('seen', None)
    """

    def __init__(self, act: Callable[..., Any]) -> None:
        self._act = act

    def __call__(self, *arguments: Any) -> Any:
        """Act."""
        return self._act(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        # In the standard library, of the functions that take anything and return nothing.
        return getattr, (nullcontext(), "__exit__")
