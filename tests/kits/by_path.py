"""Files that are no part of a package, loaded as modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def module_of(path: Path, name: str | None = None) -> ModuleType:
    """The module that a file makes, anew at each call.

    Args:
        name: it goes by; the file's own if not given.
    """
    spec = importlib.util.spec_from_file_location(name or path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
