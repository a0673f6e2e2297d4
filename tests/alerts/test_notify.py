"""News of alerts sent to real local receivers: good, faltering, hanging, gone."""

import contextvars
import json
import logging
import socket
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vocabguard.alerts.notify import Courier, TrackioAlerts, WandbAlerts, Webhook, body_of, full_text
from vocabguard.results import AlertStory, Transition

STORY = AlertStory(what="Rows turn away.", tokens=("語", "\udcff"), advice=("Echo.",))


def transition(step=120, level="warning", state="firing", value=0.034, rule="head_degraded"):
    return Transition(rule, state, level, "vocabguard/head/below_0.95", value, step, "It is bad.", 100, story=STORY)


def courier(url, **options):
    hook = {name: options.pop(name) for name in ("timeout", "retries", "backoff") if name in options}
    return Courier([Webhook(url, "run-7", **{"timeout": 2.0, "backoff": 0.01, **hook})], **options)


def bodies(server):
    return [json.loads(body) for _, body, _ in server.seen]


def test_what_is_posted(receiver):
    with receiver() as server:
        carrier = courier(server.url)
        carrier.send(transition(value=float("nan")))
        carrier.send(transition(140, state="resolved"))
        carrier.close()
        first, second = bodies(server)
        headers = server.seen[0][0]
    assert headers["Content-Type"] == "application/json"
    assert first["text"] == "It is bad.\nRows turn away.\nWorst: 語  \udcff\nTo do: Echo."
    assert (first["run"], first["rule"], first["state"], first["step"], first["since"], first["value"]) == (
        "run-7", "head_degraded", "firing", 120, 100, None,
    )  # fmt: skip
    assert first["story"]["tokens"] == ["語", "\udcff"]
    assert (second["state"], second["step"]) == ("resolved", 140)
    assert first["id"] != second["id"]


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_receiver_that_falters_gets_it_in_the_end(receiver, status, caplog):
    with receiver((status, {}, 0), (status, {}, 0), (204, {}, 0)) as server:
        carrier = courier(server.url, backoff=0.05)
        carrier.send(transition())
        carrier.close()
        found, times = bodies(server), [at for *_, at in server.seen]
    assert len(found) == 3
    assert len({one["id"] for one in found}) == 1
    assert times[1] - times[0] >= 0.05
    assert times[2] - times[1] >= 0.1
    assert caplog.records == []


def test_a_receiver_says_when_to_come_back(receiver):
    with receiver((503, {"Retry-After": "1"}, 0), (200, {}, 0)) as server:
        carrier = courier(server.url)
        carrier.send(transition())
        carrier.close()
        times = [at for *_, at in server.seen]
    assert len(times) == 2
    assert times[1] - times[0] >= 1.0


@pytest.mark.parametrize("answer", [(400, {}, 0), (404, {}, 0), (302, {"Location": "/elsewhere"}, 0)])
def test_what_is_refused_is_told_once_and_not_sent_again(receiver, answer, caplog):
    with receiver(answer) as server, caplog.at_level(logging.WARNING, "vocabguard"):
        carrier = courier(server.url)
        for step in (1, 2, 3):
            carrier.send(transition(step))
        carrier.close()
        assert [body["step"] for body in bodies(server)] == [1, 2, 3]
    first, last = (record.getMessage() for record in caplog.records)
    assert {record.name for record in caplog.records} == {"vocabguard"}, "not the alerts' own logger"
    assert "head_degraded could not be sent to the webhook, training continues" in first
    assert str(answer[0]) in first
    assert "secret" not in first
    assert last == "vocabguard: 3 alert notifications failed, 0 delivered"


def test_nobody_listens(caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        carrier = courier(url, retries=2)
        began = time.perf_counter()
        carrier.send(transition())
        assert time.perf_counter() - began < 0.05
        carrier.close()
    assert "refused" in caplog.records[0].getMessage()


def test_a_hanging_receiver_holds_up_nobody(receiver, caplog):
    with receiver((200, {}, 60)) as server:
        carrier = courier(server.url, timeout=0.2, retries=1, waiting=5, finish_seconds=0.6)
        began = time.perf_counter()
        for step in range(20):
            carrier.send(transition(step))
        assert time.perf_counter() - began < 0.1
        carrier.close()
        assert time.perf_counter() - began < 2.0
        said = [record.getMessage() for record in caplog.records]
        assert sum("5 alerts wait to be sent; later ones are dropped" in one for one in said) == 1
        assert "20 alert notifications failed, 0 delivered" in said[-1]
        carrier.send(transition())


def test_the_end_does_not_wait_for_long_pauses(receiver):
    with receiver((503, {"Retry-After": "60"}, 0)) as server:
        carrier = courier(server.url, finish_seconds=0.3)
        carrier.send(transition())
        began = time.perf_counter()
        carrier.close()
        assert time.perf_counter() - began < 1.5


def test_a_script_that_dies_still_tells(receiver):
    with receiver() as server:
        code = (
            "from vocabguard.alerts.notify import Courier; from vocabguard.alerts.notify import Webhook; "
            "from vocabguard.results import Transition; "
            "change = Transition('r', 'firing', 'critical', 'm', 1.0, 3, 'NaN.'); "
            f"Courier([Webhook({server.url!r}, 'run')]).send(change); "
            "raise SystemExit(3)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 3
        assert [body["step"] for body in bodies(server)] == [3]


def test_levels_and_threads(receiver):
    with receiver() as server:
        carrier = courier(server.url, least_level="critical")
        carrier.send(transition(1))
        assert carrier._thread is None
        carrier.send(transition(2, level="critical"))
        carrier.close()
        carrier.close()
        assert [body["step"] for body in bodies(server)] == [2]


def test_one_broken_receiver_does_not_keep_another_from_it(receiver, caplog):
    class Broken:
        name = "broken"

        def open(self):
            return True

        def send(self, change, wait):
            raise KeyError("no")

    with receiver() as server:
        carrier = Courier([Broken(), Webhook(server.url, "run")])
        carrier.send(transition())
        carrier.close()
        assert len(server.seen) == 1
    assert "1 alert notifications failed, 1 delivered" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    ("level", "state", "expected"),
    [("info", "firing", "INFO"), ("warning", "firing", "WARN"), ("critical", "firing", "ERROR"),
     ("critical", "resolved", "INFO")],
)  # fmt: skip
def test_wandb_is_alerted_only_while_a_run_is_active(monkeypatch, level, state, expected):
    """A stand-in with the signature of `wandb.alert`; `test_wandb_itself` takes the library where it is installed."""
    seen = []

    def alert(title, text, level=None, wait_duration=None):
        seen.append((title, text, level))

    fake = SimpleNamespace(run=None, alert=alert)
    carrier = Courier([WandbAlerts()], least_level="info")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    carrier.send(transition())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    carrier.send(transition())
    assert carrier._thread is None
    fake.run = object()
    change = transition(level=level, state=state, rule="r" * 100)
    carrier.send(change)
    carrier.close()
    [(title, text, told)] = seen
    assert (text, told) == (full_text(change), expected)
    assert title.startswith("vocabguard: rrr")
    assert len(title) < 64


def test_slack_and_discord_get_what_they_take():
    change = replace(transition(), message="lost <!channel> @everyone *now*")
    slack, discord = (body_of(change, "runs/a", form) for form in ("slack", "discord"))
    assert slack == {"text": f"{full_text(change)}\nruns/a".replace("<", "&lt;").replace(">", "&gt;")}
    assert set(discord) == {"content", "allowed_mentions"}
    assert discord["allowed_mentions"] == {"parse": []}
    assert r"@everyone \*now\*" in discord["content"]
    assert len(body_of(replace(change, message="x" * 5000), "", "discord")["content"]) == 2000
    plain = body_of(change, "runs/a", "json")
    assert {"id", "run", "rule", "step", "text"} <= set(plain)


def test_a_webhook_posts_the_form_that_was_asked_for(receiver):
    with receiver() as server:
        carrier = Courier([Webhook(server.url, "run", timeout=2.0, form="discord")])
        carrier.send(transition())
        carrier.close()
        assert [set(body) for body in bodies(server)] == [{"content", "allowed_mentions"}]


def test_trackio_is_alerted_by_the_run_of_the_training_thread(monkeypatch):
    """A stand-in with the signature of trackio 0.43: its current run is a context variable, unset in other threads."""
    seen = []
    current = contextvars.ContextVar("current_run", default=None)
    levels = SimpleNamespace(INFO="info", WARN="warn", ERROR="error")
    run = SimpleNamespace(alert=lambda title, text=None, level="warn", step=None: seen.append((title, text, level)))
    carrier = Courier([TrackioAlerts()], least_level="info")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    carrier.send(transition())
    module = SimpleNamespace(context_vars=SimpleNamespace(current_run=current), AlertLevel=levels)
    monkeypatch.setitem(sys.modules, "trackio", module)
    carrier.send(transition())
    assert carrier._thread is None, "no run is going"
    current.set(run)
    change = transition(level="critical")
    carrier.send(change)
    carrier.close()
    assert seen == [(f"vocabguard: {change.rule} firing", full_text(change), "error")]
    old = Courier([TrackioAlerts()])
    current.set(SimpleNamespace())  # a version without alerts
    old.send(change)
    assert old._thread is None


def test_an_extra_brings_wandb():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["wandb"] == ["wandb>=0.18"]  # the oldest that `test_wandb_itself` ran with


def test_wandb_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    code = (
        "import wandb\n"
        "from vocabguard.alerts.notify import Courier\n"
        "from vocabguard.alerts.notify import WandbAlerts\n"
        "from vocabguard.results import Transition\n"
        "run = wandb.init(mode='offline', dir='.', project='p')\n"
        "carrier = Courier([WandbAlerts()])\n"
        "for step in (3, 4):\n"
        "    carrier.send(Transition('rule', 'firing', 'critical', 'm', 1.0, step, f'NaN in step {step}.'))\n"
        "carrier.close()\n"
        "assert carrier._sent == 2\n"
        "run.finish()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)
    [file] = tmp_path.rglob("run-*.wandb")
    written = file.read_bytes()
    assert b"NaN in step 3." in written
    assert b"vocabguard: rule firing" in written
