"""What all rooms' tests share: how they are spread over processes, the tokenizer, processes that train together."""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

HERE = Path(__file__).parent
sys.path.append(str(HERE / "kits"))
collect_ignore = ["processes", "kits", "rehearsals"]  # scripts and helpers, no tests

# Before torch is imported, for the workers and what they start too: tiny models are slower on several threads, and
# several processes that each take all cores are slowest.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# -- how tests are spread over processes -----------------------------------------------------------------------------

SEVERAL_PROCESSES = (
    "tests/integrations/test_killed.py",
    "tests/integrations/test_faults_two_processes.py",
    "tests/integrations/test_alerts_two_processes.py",
    "tests/integrations/test_protection_two_processes.py",
    "tests/guard/test_engines.py",
    "tests/guard/test_strategies.py",
    "tests/guard/test_messages.py",
    "tests/guard/test_spread.py",
    "tests/guard/test_probe.py",
    "tests/test_collective.py",
)
"""Files whose tests start processes that train together: one worker runs them all, so that they never compete."""

BY_TEST = ("tests/test_examples.py",)
"""Files whose tests share nothing and take minutes each: any worker takes any of them."""

LONGEST = (
    *SEVERAL_PROCESSES,
    "tests/test_examples.py::test_the_main_example",
    "tests/compare/test_repair.py",
    "tests/test_examples.py",
    "tests/integrations/test_protection_resume.py",
    "tests/contract",
    "tests/integrations",
)
"""What takes longest begins first, so that no worker is left alone with it in the end."""

EXAMPLES_NEED = {"token_languages.py": "lingua"}
"""Modules whose examples need a package of an extra."""


class ByFile(LoadFileScheduling):
    """Gives each file to one worker, which keeps its fixtures, and all of `SEVERAL_PROCESSES` to the same.

    Groups (``--dist loadgroup``) would do it too, but their names become part of each test's id: ``--lf`` and a copied
    id would find nothing.
    """

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "processes" if file in SEVERAL_PROCESSES else nodeid if file in BY_TEST else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A single file is run in this process: what starts a worker takes longer than it saves."""
    files = {argument.split("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In workers, what takes longest first; all else keeps its order. Examples that lack an extra are skipped."""
    for item in items:
        package = EXAMPLES_NEED.get(item.path.name) if isinstance(item, pytest.DoctestItem) else None
        if package is not None and find_spec(package) is None:
            item.add_marker(pytest.mark.skip(reason=f"needs {package}"))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: next((n for n, name in enumerate(LONGEST) if item.nodeid.startswith(name)), 99))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Spare garbage collection what imports have made: trainers collect when they start, a third of a second each."""
    gc.collect()
    gc.freeze()


# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The example's tokenizer: 8,160 tokens for 8,192 rows."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(HERE.parent / "examples" / "assets")


@pytest.fixture(scope="session")
def shared_tables() -> Iterator[None]:
    """From here on a guard's table is built once for each tokenizer: it is never changed, and takes as long as a run.

    A tokenizer that has got new tokens since gets a new table.
    """
    from vocabguard.guard import watched

    build = watched.build_table

    @functools.cache
    def built(tokenizer: Any, rows: int, _length: int) -> Any:
        return build(tokenizer, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watched, "build_table", lambda tokenizer, rows: built(tokenizer, rows, len(tokenizer)))
        yield


@pytest.fixture(scope="session")
def together() -> Callable[..., list[str]]:
    """Runs a script in processes of its own; see `ranks.run_together`."""
    from ranks import run_together

    return run_together


class Answering(BaseHTTPRequestHandler):
    """Keeps what is posted, and answers as the server was told to."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.seen.append((dict(self.headers), body, time.monotonic()))
        status, headers, seconds = server.answers[min(len(server.seen), len(server.answers)) - 1]
        server.release.wait(seconds)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def listening(*answers: tuple[int, dict[str, str], float]) -> Iterator[Any]:
    """A real server at ``url`` that keeps ``(headers, body, time)`` in ``seen``.

    Args:
        *answers: in turn, the last one for all that follow: status, headers, seconds before it answers.
    """
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.seen, server.answers, server.release = [], answers or ((200, {}, 0),), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/hook/secret"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command line in this process and gives its exit code."""
    from vocabguard.cli import main

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["vocabguard", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    return call


@pytest.fixture(scope="session")
def receiver() -> Callable[..., AbstractContextManager[Any]]:
    """A receiver of webhooks; see `listening`."""
    return listening
