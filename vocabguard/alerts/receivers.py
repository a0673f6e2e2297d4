"""Receivers of news about alerts: a webhook, and Weights & Biases."""

from __future__ import annotations

import http.client
import json
import sys
import uuid
from email.message import Message
from typing import IO, Any
from urllib import error, request

from vocabguard.alerts.courier import Wait
from vocabguard.jsonlines import plain
from vocabguard.transitions import Transition

_LONGEST_WAIT = 60.0
_TRANSIENT = (408, 425, 429)
_WANDB_LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}
_TITLE = 63


class Webhook:
    """Posts each transition as JSON: its fields, ``run``, an ``id`` that all attempts share, and all of it as ``text``.

    ``text`` is what Slack, Mattermost, Google Chat and others show.

    Args:
        url: http or https.
        run: what the run is called.
        timeout: seconds that connecting, and each answer, may take.
        retries: further attempts where nobody answers, or with 408, 425, 429 or 5xx.
        backoff: seconds before the first of them, doubled each time; a ``Retry-After`` may ask for more.
    """

    name = "webhook"

    def __init__(self, url: str, run: str, *, timeout: float = 5.0, retries: int = 4, backoff: float = 1.0) -> None:
        self._url, self._run = url, run
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._opener = request.build_opener(_NoRedirect)

    def open(self) -> bool:
        """Always: whether anyone answers is seen when it is sent."""
        return True

    def send(self, change: Transition, wait: Wait) -> None:
        """Post, and try again.

        Raises:
            OSError: for the last attempt's failure, or an answer that another attempt would not change.
        """
        body = {"id": uuid.uuid4().hex, "run": self._run, **plain(change), "text": full_text(change)}
        # A lone surrogate in a token's text is no UTF-8; as an escape, JSON can hold it.
        content = json.dumps(body, allow_nan=False).encode("ascii")
        for attempt in range(self._retries + 1):
            try:
                return self._post(content)
            except (OSError, http.client.HTTPException) as failure:
                seconds = self._pause(failure, attempt)
                if seconds is None or attempt == self._retries or not wait(seconds):
                    # The address may be a secret, which those of http.client show.
                    shown = failure if isinstance(failure, OSError) else type(failure).__name__
                    raise ConnectionError(str(shown)) from None
        raise AssertionError

    def _post(self, content: bytes) -> None:
        headers = {"Content-Type": "application/json", "User-Agent": "vocabguard"}
        asked = request.Request(self._url, content, headers, method="POST")
        with self._opener.open(asked, timeout=self._timeout):
            pass

    def _pause(self, failure: Exception, attempt: int) -> float | None:
        """Seconds until another attempt; None where there is no point in one."""
        seconds = self._backoff * 2.0**attempt
        if isinstance(failure, error.HTTPError):
            failure.close()
            if failure.code < 500 and failure.code not in _TRANSIENT:
                return None
            asked = failure.headers.get("Retry-After", "")
            seconds = max(seconds, float(asked) if asked.isdecimal() else 0.0)
        return min(seconds, _LONGEST_WAIT)


class _NoRedirect(request.HTTPRedirectHandler):
    """A redirected POST would become a GET without the news: better to be told."""

    def redirect_request(
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Follow nothing."""


class WandbAlerts:
    """`wandb.alert` of the run that the script has going, if it has imported wandb and has one."""

    name = "wandb run"

    def open(self) -> bool:
        """Whether a run is active."""
        return getattr(sys.modules.get("wandb"), "run", None) is not None

    def send(self, change: Transition, wait: Wait) -> None:  # noqa: ARG002  the signature is the receivers'
        """Raise an alert; one that resolves is an ``INFO``."""
        wandb: Any = sys.modules["wandb"]
        level = "INFO" if change.state == "resolved" else _WANDB_LEVELS[change.level]
        # wandb drops alerts of one title that come within `wait_duration` seconds, for which 0 is its default.
        wandb.alert(
            title=f"vocabguard: {change.rule} {change.state}"[:_TITLE],
            text=full_text(change),
            level=level,
            wait_duration=1,
        )


def full_text(change: Transition) -> str:
    """A transition's message and, below it, its story."""
    return "\n".join((change.message, *(change.story.lines if change.story is not None else ())))
