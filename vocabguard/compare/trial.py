"""Tokenizers from disk are tried before they are believed: settings may be of any type, templates any code."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vocabguard.files import require_regular

_SECONDS, _BYTES = 20, 2**30
_TRIAL = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
_TOO_LARGE = 3


def require_readable(folder: Path) -> None:
    """Refuse a folder in which a library would wait for ever.

    Raises:
        OSError: for a FIFO or a device among its files.
    """
    for item in folder.iterdir() if folder.is_dir() else ():
        if not item.is_dir() and not (item.is_symlink() and not item.exists()):
            require_regular(item)


def try_tokenizer(tokenizer: Any) -> None:
    """Use a tokenizer once, and render a short conversation with its template.

    Raises:
        ValueError: for a vocabulary that is none, or a template that takes too long or too much memory for that.
        Exception: whatever a tokenizer of damaged settings raises.
    """
    vocabulary = tokenizer.get_vocab()
    if not all(isinstance(piece, str) and isinstance(token, int) and token >= 0 for piece, token in vocabulary.items()):
        raise ValueError("its vocabulary is no mapping of texts to ids")
    found = tokenizer("one 2", add_special_tokens=True, verbose=False)["input_ids"]
    tokenizer.decode(found)
    tokenizer.convert_ids_to_tokens([*found, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder])
    if tokenizer.chat_template is not None:
        _try_apart(lambda: tokenizer.apply_chat_template(_TRIAL, tokenize=False))


def _try_apart(work: Callable[[], object]) -> None:
    """Do work once in a process of its own, with an end to its time and memory; what else it raises is no matter here.

    A number to a large power, which is computed while a template is compiled, stops for no signal of the process's own.

    Raises:
        ValueError: if it took too long, or too much memory.
    """
    if not hasattr(os, "fork"):
        return
    with warnings.catch_warnings():
        # Threads of libraries are idle here, and the child uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _in_child(work)
    ends = time.monotonic() + _SECONDS
    while (done := os.wait4(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > ends:
            os.kill(child, 9)
            done = os.wait4(child, 0)
            break
        time.sleep(0.002)
    _, status, usage = done
    if os.WIFEXITED(status):
        if os.WEXITSTATUS(status) == _TOO_LARGE:
            raise ValueError(f"its chat template takes more than {_BYTES / 2**30:g} GiB for two short messages")
    elif usage.ru_utime + usage.ru_stime > 1:  # a child that only waited says nothing of the template
        raise ValueError(f"its chat template takes more than {_SECONDS} s for two short messages")


def _in_child(work: Callable[[], object]) -> None:
    code = 0
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _BYTES, used + _BYTES))
        work()
    except MemoryError:
        code = _TOO_LARGE
    except BaseException:
        pass
    finally:
        os._exit(code)
