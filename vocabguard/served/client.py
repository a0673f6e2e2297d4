"""Requests to a server of models: concurrent, patient with one that is busy, careful with a key."""

from __future__ import annotations

import http.client
import json
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib import error, parse, request

from vocabguard.files import one_line
from vocabguard.results import VocabGuardError
from vocabguard.served.modes import CONCURRENCY, TIMEOUT, TRIES

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers that another try may better."""

_LARGEST, _LONGEST_WAIT = 2**24, 60.0


class ServerError(VocabGuardError, ValueError):
    """A server that cannot be asked; the message names it without its key, in one line.

    Attributes:
        status: of its answer; None without an answer.
        after: seconds that it asks to wait for; None where it does not.
    """

    def __init__(self, message: str, status: int | None = None, after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.after = status, after


@dataclass(frozen=True)
class Server:
    """An address and how to ask there.

    Attributes:
        url: up to ``/v1``, without a name, a password or a query.
        model: the name that requests bear.
        key: sent as a bearer token to this host alone; never shown.
        timeout: seconds that an answer may take.
        tries: of each request.
        concurrency: requests at a time.
        pause: seconds before the second try; doubled before each further one.

    Raises:
        ServerError: for an address that is none, or that holds a secret.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = TIMEOUT
    tries: int = TRIES
    concurrency: int = CONCURRENCY
    pause: float = 1.0

    def __post_init__(self) -> None:
        try:
            parts = parse.urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError as failure:
            raise ServerError(f"--url {self.url!r}: is no address ({failure})") from failure
        if parts.scheme not in ("http", "https") or not host:
            raise ServerError(f"--url {self.url!r}: allowed: http://HOST/v1 or https://HOST/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            # Not shown: it may be a key.
            raise ServerError(
                f"--url of {host}: holds a name, a password or a query; allowed: an address alone, with the key in an "
                "environment variable (--key-env)"
            )
        if any(character.isspace() or not character.isprintable() for character in self.url + self.model):
            raise ServerError("--url or --model holds blanks or control characters; allowed: printable ones")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and self.key.strip()):
            raise ServerError("the key in the environment holds characters that no header takes")

    def post(self, path: str, body: Mapping[str, Any], stop: threading.Event | None = None) -> dict[str, Any]:
        """Send JSON, and give the JSON object of the answer; tries again where that may help.

        Args:
            path: below `url`, such as ``/completions``.
            stop: set where waiting for another try is to end.

        Raises:
            ServerError: if no try brought an answer; its `status` is the last one's, None without an answer.
        """
        last = ServerError(f"{self.url}: was not asked")
        for number in range(self.tries):
            try:
                return self._once(path, body)
            except ServerError as failure:
                last = failure
                if failure.status is not None and failure.status not in RETRIED:
                    raise
                if number + 1 == self.tries or not _slept(_pause(self.pause, number, failure.after), stop):
                    break
        raise last

    def _once(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        address = self.url.rstrip("/") + path
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "vocabguard"}
        asked = request.Request(address, json.dumps(body).encode(), headers, method="POST")
        if self.key is not None:
            # Beside the others, so that no redirect of the library carries it along.
            asked.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            with _opener().open(asked, timeout=self.timeout) as answer:
                return _object(answer.read(_LARGEST + 1), address)
        except error.HTTPError as failure:
            with failure:
                raise _refusal(failure, address) from None
        except (OSError, http.client.HTTPException, ValueError) as failure:
            if isinstance(failure, ServerError):
                raise
            reason = getattr(failure, "reason", failure)
            why = f"no answer within {self.timeout:g} s" if _timed_out(failure) else one_line(_as_error(reason), 120)
            raise ServerError(f"{address}: {why}") from None

    def map(
        self, work: Callable[[Any, threading.Event], Any], items: Sequence[Any], tell: Callable[[int, int], None]
    ) -> list[Any]:
        """Do work for each item in as many threads as `concurrency` says; results in order.

        Raises:
            ServerError: the first one of any, after which nothing more is asked.
        """
        stop, done = threading.Event(), 0
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="vocabguard") as pool:
            futures = [pool.submit(work, item, stop) for item in items]
            waiting = set(futures)
            try:
                while waiting:
                    finished, waiting = wait(waiting, timeout=1.0, return_when=FIRST_EXCEPTION)
                    for one in finished:
                        one.result()
                    done = len(futures) - len(waiting)
                    tell(done, len(futures))
            finally:
                stop.set()
                for one in waiting:
                    one.cancel()
        return [one.result() for one in futures]


class _NoRedirect(request.HTTPRedirectHandler):
    """Another host must get neither the texts nor the key."""

    def redirect_request(self, *_args: Any, **_options: Any) -> None:
        """None: what redirects is an error."""


def _opener() -> request.OpenerDirector:
    return request.build_opener(_NoRedirect)


def _object(content: bytes, address: str) -> dict[str, Any]:
    if len(content) > _LARGEST:
        raise ServerError(f"{address}: an answer of more than {_LARGEST:,} bytes")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as failure:
        raise ServerError(f"{address}: the answer is no JSON ({one_line(failure, 80)})") from None
    if not isinstance(found, dict):
        raise ServerError(f"{address}: the answer is a {type(found).__name__}; expected a JSON object", 200)
    return found


def _refusal(failure: error.HTTPError, address: str) -> ServerError:
    """What an answer with an error says; the server's own words, shortened, since they tell the most."""
    if 300 <= failure.code < 400:
        return ServerError(f"{address}: redirects elsewhere, which is not followed", failure.code)
    try:
        words = failure.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        words = ""
    hint = " (is the key in the environment right?)" if failure.code in (401, 403) else ""
    said = f"{address}: HTTP {failure.code}{hint}: {' '.join(words.split())[:160]}"
    return ServerError(said, failure.code, _retry_after(failure.headers.get("Retry-After")))


def _retry_after(told: str | None) -> float | None:
    """Seconds that a server asks to wait: a number, or a date."""
    if told is None:
        return None
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _pause(first: float, number: int, asked: float | None) -> float:
    """Seconds before another try; spread, so that those who wait do not all come at once."""
    if asked is not None and math.isfinite(asked):
        return min(asked, _LONGEST_WAIT)
    return float(min(_LONGEST_WAIT, first * 2.0**number) * (0.5 + random.random() / 2))


def _slept(seconds: float, stop: threading.Event | None) -> bool:
    """Wait; False where it is to end."""
    if stop is None:
        time.sleep(seconds)
        return True
    return not stop.wait(seconds)


def _timed_out(failure: BaseException) -> bool:
    return isinstance(failure, (TimeoutError, socket.timeout)) or isinstance(
        getattr(failure, "reason", None), (TimeoutError, socket.timeout)
    )


def _as_error(reason: object) -> BaseException:
    return reason if isinstance(reason, BaseException) else OSError(str(reason))
