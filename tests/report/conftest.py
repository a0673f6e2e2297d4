"""Run folders made by hand for the report page, with tokens that try to break out of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from vocabguard.results import (
    AlertStory,
    CheckResult,
    EchoReport,
    Exposure,
    Forecast,
    NotApplicable,
    ProbeResult,
    RowDrift,
    TokenReport,
    Transition,
    Watch,
    WatchedMatrix,
)
from vocabguard.runlog import RunLog, RunWriter, row_vectors

sys.path.append(str(Path(__file__).parent))
collect_ignore = ["parsed_page.py"]
NAMES = ("latin", "ja", "thai")
ROWS = 90
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "{{7*7}}",
    "{% raw %}",
    "\u202eevil\u2066",
    "\udc80",
    "\0",
    '" onmouseover="alert(1)',
    "&lt;b&gt;",
    "<!--",
    "]]>",
    "\u2028\n\r",
)


def _drift(cosine: np.ndarray) -> RowDrift:
    values, flags = torch.from_numpy(cosine.astype(np.float32)), torch.zeros(len(cosine), dtype=torch.bool)
    return RowDrift(values, values, 1 - values, torch.ones(len(cosine)), values.isnan(), flags)


def _scalars(cosine: np.ndarray, live: np.ndarray, group: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """What a check would log of these rows, by plain loops over the parts."""
    parts = {"": live} | {f"{name}/": live & (group == place) for place, name in enumerate(NAMES)}
    parts |= {f"{name}/": live & (classes == place) for place, name in enumerate(("never", "1-4", "5-19", "20+"))}
    found: dict[str, float] = {}
    for name, mask in parts.items():
        values = [value for value in cosine[mask] if not math.isnan(value)]
        if values:
            found[f"head/{name}cosine_mean"] = sum(values) / len(values)
            found[f"head/{name}cosine_min"] = min(values)
            found[f"head/{name}below_0.95"] = sum(value < 0.95 for value in values) / len(values)
            found[f"head/{name}below_0.90"] = sum(value < 0.90 for value in values) / len(values)
    found["exposure/never"] = float((classes[live] == 0).mean())
    return found


def _forecast(step: int, end: int, now: dict[str, float]) -> tuple[Forecast, dict[str, float]]:
    """A forecast, and what a check would log of it: more for later groups, less from check to check, true when over."""
    nothing = torch.zeros(ROWS)
    shares = {"below_0.95": 0.5 - step / 100}
    shares |= {f"{name}/below_0.95": (place + 2) / 5 - step / 100 for place, name in enumerate(NAMES)}
    if step == end:
        shares = {key: now[f"head/{key}"] for key in shares}
    return Forecast(step, end, *[nothing] * 4), {f"forecast/{key}": share for key, share in shares.items()}


def tell(texts: Sequence[str]) -> AlertStory:
    """A story that says the texts, whatever they are, in each of its fields."""
    said = [f"{name} {texts[place % len(texts)]}" for place, name in enumerate(("what", "where", "since", "outlook"))]
    return AlertStory(said[0], said[1], 12, 0.4, tuple(texts[:5]), said[2], said[3], (texts[0], texts[1]))


def note_beside(writer: RunWriter, texts: Sequence[str]) -> None:
    """Answers at steps 10 and 20, neighbours of the first two texts, and where tokens were lost."""
    for step, foreign in ((10, 0.25), (20, 0.5)):
        shares = {"ja": foreign, "ko": 0.0, "ja/line_pass": 0.75, "foreign": foreign / 2, "line_pass": 0.75}
        into = {"ja": {"cyrillic": round(4 * foreign)}}
        writer.note("confusion", step, {"answers": {"ja": 4, "ko": 4}, "shares": shares, "into": into})
        near = [
            {"id": i, "text": text, "group": NAMES[i % 3], "cosine": 0.5, "intruder": step == 20}
            for i, text in enumerate(texts)
        ]
        for token, text in enumerate(texts[:2]):
            line = {"matrix": "head", "id": token, "text": text, "group": NAMES[0], "overlap": [0.5, math.nan][token]}
            writer.note("neighbors", step, {**line, "then": near[:2] if not token else [], "now": near})
    counts = {"forgotten": 12, "head": 9, "input": 0, "body": 3}
    writer.note("head_or_body", 20, {**counts, "ids": [], "with_head": [], "with_rows": []})


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunLog]:
    """Writes a run of 90 rows (30 a group, the last 3 not live) and opens it.

    Tokens 0 to 11 are hostile and the worst; the probe asks for the first 40 and misses the first `missed`.
    `told` gives the alert a story of `texts`; `end` is the last step that is planned, and lets each check forecast.
    """

    def make(
        name: str = "run",
        worst: float = 0.5,
        missed: int = 12,
        echo: bool = False,
        rows: bool = True,
        beside: bool = False,
        texts: Sequence[str] = HOSTILE,
        told: bool = False,
        end: int | None = None,
    ) -> RunLog:
        group = np.repeat(np.arange(3, dtype=np.uint8), 30)
        live = np.arange(ROWS) < ROWS - 3
        targets = np.arange(ROWS) // 4
        classes = np.digitize(targets, (1, 5, 20)).astype(np.uint8)
        cosine = np.linspace(worst, 1.0, ROWS)
        cosine[-4] = np.nan
        counts = torch.from_numpy(targets)
        zeros = torch.zeros(ROWS)
        exposure = Exposure(counts, counts, counts, counts - 1, zeros, zeros, zeros, 0, 0.5, 20)
        ids = torch.arange(40)
        said = (ids >= missed)[:, None].expand(40, 2).contiguous()
        instead = torch.where(said, ids[:, None], torch.tensor([[1, 1]]))
        probe = ProbeResult(("a", "b"), ids, said, torch.linspace(0, 1, 80).view(40, 2), instead, instead)
        watch = Watch(
            WatchedMatrix("head", ROWS, 4, "bfloat16", False, False, "a <b>copy</b>"),
            NotApplicable("it is frozen"), None, NotApplicable("off"), int(live.sum()), 2, "x", ("<i>note</i>",),
        )  # fmt: skip
        writer = RunWriter(tmp_path / name)
        writer.start({"seed": 3, "run": {"name": f"<b>{name}</b>"}}, watch, NAMES)
        alert = Transition(
            "bad", "firing", "critical", "vocabguard/head/below_0.95", 0.4, 20, "<u>lost</u>: 語.",
            since=10 if told else None, story=tell(texts) if told else None,
        )  # fmt: skip
        for step in (0, 10, 20):
            now = 1 - (1 - cosine) * step / 20
            scalars = _scalars(now, live, group, classes)
            scalars |= {"probe/retained": (40 - missed * step // 20) / 40, "probe/latin/retained": 0.5} if step else {}
            scalars |= {"echo/dose": step / 100, "loss/echo": 2.0, "echo/copies": 0.125} if echo else {}
            forecast, shares = (None, {}) if end is None else _forecast(step, end, scalars)
            scalars |= shares
            result = CheckResult(
                forecast=forecast or NotApplicable("no <i>schedule</i> is known"), step=step,
                head=_drift(now), embedding=NotApplicable("it is frozen"), exposure=exposure,
                classes=torch.from_numpy(classes), probe=probe if step != 10 else None,
                scalars={f"vocabguard/{key}": value for key, value in scalars.items()},
                transitions=(alert,) if step == 20 else (), firing=("bad",) if step == 20 else (),
                worst=tuple(
                    TokenReport(i, text, NAMES[0], "never", float(now[i]), math.nan, 0, 0, None, 0.1, "x")
                    for i, text in enumerate(HOSTILE)
                ),
                watched=(TokenReport(70, "watched one", NAMES[2], "5-19", 0.9, math.nan, 17, 17, 3, None, None),),
                echo=EchoReport(None, True, 1234, {"latin": 1000, "ja": 0}, {"never": 234}, 0.5) if echo else None,
            )  # fmt: skip
            writer.check(result)
        if beside:
            note_beside(writer, texts)
        if rows:
            writer.rows(20, row_vectors(result, torch.from_numpy(group), torch.from_numpy(live)))
        return RunLog.open(tmp_path / name)

    return make
