"""What is installed: this package's name and version, packages that a part of it needs, and another one of its name.

Only the standard library is imported here: ``import vocabguard`` and ``vocabguard --help`` begin with it.
"""

from __future__ import annotations

import warnings
from importlib import metadata

VERSION = "0.1.0"

DISTRIBUTION = "vocabulary-guard"
"""Name of this package for pip. On the public index ``vocabguard`` is another author's, with a module of that name."""

_MODULE = "vocabguard"
_OURS = "token forgetting"  # a keyword of this package, also of versions that were installed as `vocabguard`


def missing(package: str, needed_for: str) -> str:
    """The message for a package that cannot be imported.

    >>> print(missing("lightning", "vocabguard.integrations.lightning"))
    vocabguard.integrations.lightning needs lightning, which is not installed: pip install lightning
    """
    return f"{needed_for} needs {package}, which is not installed: pip install {package}"


def other_owner() -> str | None:
    """Another author's package that is installed under the module's name, in words; None where there is none."""
    try:
        found = metadata.distribution(_MODULE)
    except metadata.PackageNotFoundError:
        return None
    if _OURS in (found.metadata["Keywords"] or ""):
        return None
    return f"{_MODULE} {found.version}"


def warn_of_other_owner() -> None:
    """Warn once where another package of the module's name is installed: the two overwrite each other's files."""
    other = other_owner()
    if other is not None:
        warnings.warn(
            f"Another package named {other} is installed here. It has the same module name as {DISTRIBUTION}, and the "
            f"two overwrite each other's files. Remove both (pip uninstall {_MODULE} {DISTRIBUTION}), then install "
            'this one again from its clone: pip install -e "."',
            stacklevel=3,
        )
