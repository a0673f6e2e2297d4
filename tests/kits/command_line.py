"""The command line, run in this process."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

from vocabguard.cli import main


def called(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code of a command, and what it printed with ``--json``; nothing where it printed nothing."""
    out, before = io.StringIO(), sys.argv
    sys.argv = ["vocabguard", *map(str, arguments), "--json"]
    code = 0
    try:
        with contextlib.redirect_stdout(out):
            main()
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        sys.argv = before
    told: dict[str, Any] = json.loads(out.getvalue() or "{}")
    return code, told
