"""Where transitions go: the standard logger, a user's callables, text for TensorBoard."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from vocabguard.alerts.receivers import full_text
from vocabguard.alerts.rules import AlertRule
from vocabguard.transitions import Transition

logger = logging.getLogger("vocabguard.alerts")

_LOGGING_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}


def log_transition(transition: Transition) -> None:
    """Send a transition, with its story, to the logger ``vocabguard.alerts``, at its level; a resolved one at INFO.

    Args:
        transition: what changed.
    """
    resolved = transition.state == "resolved"
    logger.log(logging.INFO if resolved else _LOGGING_LEVELS[transition.level], "%s", full_text(transition))


def dispatch(rules: Iterable[AlertRule], transitions: Iterable[Transition]) -> None:
    """Run the actions of every transition's rule, in order.

    A callable that fails keeps no other action from running, of this or of another rule.

    Args:
        rules: the machine's rules; transitions of rules that are not among them have no actions.
        transitions: what changed at this check.

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
    """Run the actions of one rule, in order; one that fails keeps no other from running.

    Args:
        rule: whose actions.
        transition: what changed.

    Raises:
        ExceptionGroup: of all that the callables raised, each with a note that names the rule, after all have run.
    """
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
    """A transition as a short markdown text, for TensorBoard.

    Args:
        transition: what changed.

    Returns:
        A headline with level, state and step, the message, and its story as a list; nothing in it is read as markup.
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
