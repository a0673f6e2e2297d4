"""The ``vocabguard`` command: what the rooms below do, from a shell.

Exit codes are the same everywhere: 0 nothing found, 1 findings over the threshold, 2 bad input. Each command lives in a
module of its own and is imported only when it is called, so that ``--help`` answers at once.
"""

from vocabguard.cli.app import main

__all__ = ["main"]
