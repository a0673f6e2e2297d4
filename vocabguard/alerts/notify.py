"""Carries news of alerts to receivers beyond this machine, in a thread of its own: training never waits for them."""

from __future__ import annotations

import atexit
import http.client
import json
import logging
import queue
import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from email.message import Message
from typing import IO, Any, Protocol
from urllib import error, parse, request

from vocabguard.alerts.rules import LEVELS, AlertRule
from vocabguard.files import plain
from vocabguard.results import Transition

logger = logging.getLogger("vocabguard")
# The alerts' own: where the console view shows them, it keeps this one from printing them once more.
alerts_logger = logging.getLogger("vocabguard.alerts")

Wait = Callable[[float], bool]
"""Waits so many seconds, before another attempt; False says at once that there is to be none."""


class Receiver(Protocol):
    """Where news goes."""

    name: str

    def open(self) -> bool:
        """Whether there is anyone to receive now."""

    def send(self, change: Transition, wait: Wait) -> None:
        """Deliver, or raise whatever came of it."""


class Courier:
    """Hands transitions to receivers, in order, from a daemon thread that is started with the first one.

    Nothing here raises or waits but `close`. What cannot be delivered is told once a receiver, and counted in the end.

    Args:
        least_level: news of rules below it is not sent: ``info``, ``warning`` or ``critical``.
        waiting: transitions that may wait; what comes beyond is dropped.
        finish_seconds: how long `close` waits.
    """

    def __init__(
        self, receivers: Sequence[Receiver], *, least_level: str = "warning", waiting: int = 100,
        finish_seconds: float = 10,
    ) -> None:  # fmt: skip
        self._receivers = tuple(receivers)
        self._levels = LEVELS[LEVELS.index(least_level) :]
        self._most = waiting
        self._finish_seconds = finish_seconds
        self._queue: queue.SimpleQueue[Transition | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._told: set[str] = set()
        self._sent, self._lost, self._dropped = 0, 0, 0

    def send(self, change: Transition) -> None:
        """Take a transition along. Returns at once."""
        if change.level not in self._levels or not any(receiver.open() for receiver in self._receivers):
            return
        if self._queue.qsize() >= self._most:
            self._dropped += 1
            self._warn("full", "vocabguard: %d alerts wait to be sent; later ones are dropped", self._most)
            return
        self._queue.put(change)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="vocabguard-alerts", daemon=True)
            self._thread.start()
            # A script that dies of what an alert is about does not come to `close`.
            atexit.register(self.close)

    def close(self) -> None:
        """Deliver what waits, for so long as was said; what is not delivered then is told, and never will be."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        atexit.unregister(self.close)
        self._queue.put(None)
        thread.join(self._finish_seconds)
        self._given_up.set()
        # An attempt that is under way counts as failed.
        waiting = self._queue.qsize() if thread.is_alive() else 0
        if lost := self._lost + self._dropped + waiting:
            logger.warning("vocabguard: %d alert notifications failed, %d delivered", lost, self._sent)

    def _work(self) -> None:
        while (change := self._queue.get()) is not None and not self._given_up.is_set():
            for receiver in self._receivers:
                self._deliver(receiver, change)

    def _deliver(self, receiver: Receiver, change: Transition) -> None:
        try:
            if receiver.open():
                receiver.send(change, self._wait)
                self._sent += 1
        # Whatever a receiver or a library raises: nobody is there to catch it.
        except Exception as error:
            self._lost += 1
            failed = "vocabguard: alert %s could not be sent to the %s, training continues: %s: %s"
            self._warn(receiver.name, failed, change.rule, receiver.name, type(error).__name__, error)

    def _wait(self, seconds: float) -> bool:
        return not self._given_up.wait(seconds)

    def _warn(self, kind: str, message: str, *values: object) -> None:
        level = logging.DEBUG if kind in self._told else logging.WARNING
        self._told.add(kind)
        logger.log(level, message, *values)


_LONGEST_WAIT = 60.0
_DISCORD_MOST = 2000  # characters of a message
# Answers below 500 that another attempt may change.
_TRANSIENT = (408, 425, 429)
_TRACKER_LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}
# wandb takes titles of less than 64 characters.
_TITLE = 63


class Webhook:
    """Posts each transition as JSON: its fields, ``run``, an ``id`` that all attempts share, and all of it as ``text``.

    ``text`` is what Mattermost, Google Chat and others show; Slack and Discord get bodies of their own.

    Args:
        form: ``json``, ``slack``, ``discord``, or ``auto``, which goes by the address.
        timeout: seconds that connecting, and each answer, may take.
        retries: further attempts where nobody answers, or with 408, 425, 429 or 5xx.
        backoff: seconds before the first of them, doubled each time; a ``Retry-After`` may ask for more.
    """

    name = "webhook"

    def __init__(
        self, url: str, run: str, *, timeout: float = 5.0, retries: int = 4, backoff: float = 1.0, form: str = "auto"
    ) -> None:  # fmt: skip
        self._url, self._run = url, run
        self._form = form_of(url) if form == "auto" else form
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._opener = request.build_opener(_NoRedirect)

    def open(self) -> bool:
        """Always: whether anyone answers is seen when it is sent."""
        return True

    def send(self, change: Transition, wait: Wait) -> None:
        """Post, and try again; an OSError for the last failure, or an answer that another attempt would not change."""
        body = body_of(change, self._run, self._form)
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


def form_of(url: str) -> str:
    """The form of body that an address takes.

    >>> form_of("https://discord.com/api/webhooks/1/x"), form_of("https://hooks.slack.com/services/T/B/x")
    ('discord', 'slack')
    >>> form_of("https://chat.example.org/hooks/x")
    'json'
    """
    host = (parse.urlsplit(url).hostname or "").lower()
    if host in ("discord.com", "discordapp.com") or host.endswith((".discord.com", ".discordapp.com")):
        return "discord"
    return "slack" if host == "slack.com" or host.endswith(".slack.com") else "json"


def body_of(change: Transition, run: str, form: str) -> dict[str, Any]:
    """What is posted of a transition.

    Args:
        run: folder of the run.
        form: ``json``, ``slack`` or ``discord``.
    """
    text = full_text(change)
    if form == "json":
        return {"id": uuid.uuid4().hex, "run": run, **plain(change), "text": text}
    shown = f"{text}\n{run}" if run else text
    if form == "slack":
        # What would be a link, a mention or a channel in Slack's markup.
        return {"text": shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
    # Texts of tokens may read like mentions.
    return {"content": _cut(_discord_escaped(shown), _DISCORD_MOST), "allowed_mentions": {"parse": []}}


def _discord_escaped(text: str) -> str:
    return re.sub(r"([\\`*_~|])", r"\\\1", text)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


class _NoRedirect(request.HTTPRedirectHandler):
    """A redirected POST would become a GET without the news: better to be told."""

    def redirect_request(
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Follow nothing."""


class TrackioAlerts:
    """`trackio.alert` of the run that the script has going, if it has imported trackio and has one."""

    name = "trackio run"

    def __init__(self) -> None:
        self._run: Any = None

    def open(self) -> bool:
        """Whether a run is active in the thread that asks, or was when the training thread asked."""
        context = getattr(sys.modules.get("trackio"), "context_vars", None)
        run = None if context is None else context.current_run.get()
        if hasattr(run, "alert"):  # not of older versions
            self._run = run
        return self._run is not None

    def send(self, change: Transition, wait: Wait) -> None:  # noqa: ARG002  the signature is the receivers'
        """Raise an alert; one that resolves is an ``INFO``."""
        levels = sys.modules["trackio"].AlertLevel
        level = "INFO" if change.state == "resolved" else _TRACKER_LEVELS[change.level]
        # By the run: trackio's own function looks for one in this thread, which has none.
        self._run.alert(f"vocabguard: {change.rule} {change.state}", full_text(change), getattr(levels, level))


class WandbAlerts:
    """`wandb.alert` of the run that the script has going, if it has imported wandb and has one."""

    name = "wandb run"

    def open(self) -> bool:
        """Whether a run is active."""
        return getattr(sys.modules.get("wandb"), "run", None) is not None

    def send(self, change: Transition, wait: Wait) -> None:  # noqa: ARG002  the signature is the receivers'
        """Raise an alert; one that resolves is an ``INFO``."""
        wandb: Any = sys.modules["wandb"]
        level = "INFO" if change.state == "resolved" else _TRACKER_LEVELS[change.level]
        # wandb drops alerts of one title that come within `wait_duration` seconds, for which 0 is its default.
        title = f"vocabguard: {change.rule} {change.state}"[:_TITLE]
        wandb.alert(title=title, text=full_text(change), level=level, wait_duration=1)


def full_text(change: Transition) -> str:
    """A transition's message and, below it, its story."""
    return "\n".join((change.message, *(change.story.lines if change.story is not None else ())))


_LOGGING_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}


def log_transition(transition: Transition) -> None:
    """Send a transition, with its story, to the logger ``vocabguard.alerts``, at its level; a resolved one at INFO."""
    resolved = transition.state == "resolved"
    alerts_logger.log(logging.INFO if resolved else _LOGGING_LEVELS[transition.level], "%s", full_text(transition))


def dispatch(rules: Iterable[AlertRule], transitions: Iterable[Transition]) -> None:
    """Run the actions of every transition's rule, in order.

    A callable that fails keeps no other action from running, of this or of another rule. Transitions of rules that are
    not among the given ones have no actions.

    Raises:
        ExceptionGroup: of all that the callables raised, each with a note that names the rule, after all have run.
    """
    by_name = {rule.name: rule for rule in rules}
    errors: list[Exception] = []
    for transition in transitions:
        if transition.rule in by_name:
            try:
                run_actions(by_name[transition.rule], transition)
            except ExceptionGroup as group:
                errors += group.exceptions
    if errors:
        raise ExceptionGroup("actions of alert rules failed", errors)


def run_actions(rule: AlertRule, transition: Transition) -> None:
    """Run the actions of one rule, in order; raises as `dispatch` does."""
    errors: list[Exception] = []
    for action in rule.actions:
        try:
            if action == "log":
                log_transition(transition)
            elif callable(action):
                action(transition)
        # Whatever a user's callable raises: it is handed on below.
        except Exception as error:
            error.add_note(f"raised by an action of alert rule {rule.name!r} at step {transition.step}")
            errors.append(error)
    if errors:
        raise ExceptionGroup(f"actions of alert rule {rule.name!r} failed", errors)


def transition_markdown(transition: Transition) -> str:
    r"""A transition as a short markdown text, for TensorBoard.

    A headline with level, state and step, the message, and its story as a list; nothing in it is read as markup.

    >>> transition_markdown(Transition("rule", "firing", "warning", "head/below_0.95", 0.02, 120, "my_rule: 0.02"))
    '**warning** firing at step 120\n\nmy\\_rule: 0.02'
    """
    again = " again" * transition.again
    headline = f"**{transition.level}** {transition.state}{again} at step {transition.step}"
    story = transition.story.lines if transition.story is not None else ()
    listed = "".join(f"\n- {_escape(line)}" for line in story)
    return f"{headline}\n\n{_escape(transition.message)}" + (f"\n{listed}" if listed else "")


def _escape(text: str) -> str:
    """Names are the user's own and may hold characters that markdown or HTML would read."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", text)
