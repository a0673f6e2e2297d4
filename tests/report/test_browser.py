"""The report page in headless Chromium: no console errors, sorts, searches, readable everywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from vocabguard.report.data import run_data
from vocabguard.report.page import render, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")

# What a reader does, in the page itself; the outcome is left in the document.
DRIVER = """
const lowest = document.querySelector(".which tbody tr");
const top_ = lowest ? Math.round(lowest.getBoundingClientRect().top + scrollY) : null;
const folded = [...document.querySelectorAll("details")].filter((fold) => !fold.open).length;
for (const fold of document.querySelectorAll("details")) fold.open = true;
const section = document.querySelector(".tokens"), tools = section.querySelector("form.tools");
const heads = [...section.querySelectorAll("thead th")];
const rows = () => [...section.querySelectorAll("tbody tr")].filter((row) => !row.hidden);
const place = heads.findIndex((head) => head.textContent.trim() === "id");
const ids = () => rows().map((row) => Number(row.cells[place].textContent));
const click = (name) => heads.find((head) => head.textContent.trim() === name).querySelector("button").click();
const pick = (name, value) => {
  tools.elements[name].value = value;
  tools.elements[name].dispatchEvent(new Event("input", {bubbles: true}));
};
const found = {top: top_, folded, first: ids(), sorts: {}, searches: {}};
for (const name of ["cosine", "cosine", "id", "token", "since target", "prob."]) {
  click(name);
  const head = heads.find((head) => head.hasAttribute("aria-sort"));
  found.sorts[`${name} ${head.getAttribute("aria-sort")}`] = ids();
}
click("id"); click("id");
if (heads[place].getAttribute("aria-sort") !== "ascending") click("id");
for (const text of ["<SCRIPT", "watched one", "udc80", "japanese", "no such token", ""]) {
  pick("text", text);
  found.searches[text] = ids();
}
pick("group", "thai"); found.thai = ids(); pick("group", "");
pick("state", "no"); found.unsaid = ids(); pick("state", "");
found.count = tools.querySelector("output").textContent;
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => numbers(colour).slice(0, 3).map((c) => c / 255)
  .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (element) => {
  for (let one = element; one; one = one.parentElement) {
    const colour = getComputedStyle(one).backgroundColor;
    if ((numbers(colour)[3] ?? 1) > 0) return colour;
  }
};
found.contrast = {};
for (const name of ["h1", ".sentence", ".where", ".badge", ".bad", ".note", "caption", "thead th", "figcaption",
    "summary", ".tools label", "td.lost", "footer p", ".tick", ".name", ".told .level", ".told .status", ".told .what",
    ".told dt", ".told dd", ".told bdi.token", ".told .note"]) {
  const one = document.querySelector(name), style = getComputedStyle(one);
  const ink = light(one instanceof SVGElement ? style.fill : style.color), paper = light(ground(one));
  found.contrast[name] = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}
found.ground = light(getComputedStyle(document.body).backgroundColor);
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.spilt = [...document.querySelectorAll(".told, .told *")].filter((one) =>
  one.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length;
const bars = [...document.querySelectorAll("rect.span")].map((bar) => getComputedStyle(bar).fill);
found.bars = bars.map((fill) => light(fill)).map((ink) => {
  const paper = light(ground(document.querySelector("rect.span")));
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
});
const shown = [...document.querySelectorAll("tr:not([hidden])")];
found.displays = [...new Set(shown.map((row) => getComputedStyle(row).display))];
found.inner = window.innerWidth;
found.alerted = document.querySelectorAll("img, iframe").length;
const out = document.createElement("pre");
out.id = "outcome";
out.textContent = JSON.stringify(found);
document.body.append(out);
if (parent !== window) parent.postMessage(out.textContent, "*");
"""

# Chromium's own windows are no narrower than 500: a phone's width needs a frame.
PHONE = """<!DOCTYPE html><meta charset="utf-8"><title>phone</title>
<script>addEventListener("message", (event) => {
  const out = document.createElement("pre");
  out.id = "outcome";
  out.textContent = event.data;
  document.body.append(out);
});</script>
<body><iframe src="page.html" width="390" height="800" frameborder="0"></iframe></body>
"""


def chromium(page: Path, *flags: str) -> tuple[str, list[str]]:
    """Standard output, and what the page wrote to its console (errors and refusals of the policy too)."""
    profile = page.with_suffix(".profile")
    command = [str(CHROMIUM), *FLAGS, *flags, f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, check=False, capture_output=True, timeout=60, encoding="utf-8", errors="replace")
    shutil.rmtree(profile, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def driven(page: str, folder: Path, *flags: str, phone: bool = False) -> dict[str, Any]:
    """What the driver found in a copy of the page whose policy lets the driver run too."""
    digest = base64.b64encode(hashlib.sha256(DRIVER.encode()).digest()).decode()
    copy = page.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    write_page(copy.replace("</body>", f"<script>{DRIVER}</script></body>"), folder / "page.html")
    (folder / "phone.html").write_text(PHONE, encoding="utf-8")
    document, console = chromium(folder / ("phone.html" if phone else "page.html"), "--dump-dom", *flags)
    assert console == []
    outcome = re.search(r'<pre id="outcome">(.*?)</pre>', document, re.DOTALL)
    assert outcome, "the driver did not finish"
    found: dict[str, Any] = json.loads(unescape(outcome[1]))
    return found


@pytest.fixture
def data(make_run):
    texts = ["<script>alert(1)</script>", "long" * 100, *(f"<b>{place}</b>" for place in range(10))]
    return run_data(make_run(echo=True, beside=True, told=True, end=40, texts=texts))


def test_the_page_loads_without_a_word_on_the_console(data, make_run, tmp_path):
    second = run_data(make_run("b", worst=0.9))
    for name, page in (("one", render(data)), ("two", render(data, second))):
        document, console = chromium(write_page(page, tmp_path / f"{name}.html"), "--dump-dom")
        assert console == []
        assert "of 87 shown" in document or "of 86 shown" in document


def test_a_console_error_would_be_seen(data, tmp_path):
    page = render(data)
    broken = page.replace("</body>", "<script>alert(1)</script><img src=x></body>")
    _, console = chromium(write_page(broken, tmp_path / "broken.html"), "--dump-dom")
    assert any("Content Security Policy" in line for line in console)


def test_sorts_and_searches(data, tmp_path):
    found = driven(render(data), tmp_path)
    lines = [line.report for line in data.tokens]
    assert found["first"] == [report.id for report in lines]
    by_cosine = [report.id for report in sorted(lines, key=lambda report: report.cosine)]
    assert found["sorts"]["cosine ascending"] == by_cosine
    assert found["sorts"]["cosine descending"] == by_cosine[::-1]
    assert found["sorts"]["id ascending"] == sorted(report.id for report in lines)
    since = {report.id: report.steps_since_target for report in lines}
    known = [one for one in found["sorts"]["since target ascending"] if since[one] is not None]
    assert [since[one] for one in known] == sorted(since[one] for one in known)
    never = [one for one in since if since[one] is None]
    assert sorted(found["sorts"]["since target ascending"][len(known) :]) == sorted(never) == [0, 1, 2, 3]
    assert set(found["sorts"]["prob. ascending"][40:]) == {report.id for report in lines if report.probability is None}
    assert found["searches"]["<SCRIPT"] == [0]
    assert found["searches"]["watched one"] == [70]
    assert found["searches"]["udc80"] == [5]
    assert found["searches"]["japanese"] == list(range(30, 60))
    assert found["searches"]["no such token"] == []
    assert len(found["searches"][""]) == len(lines)
    assert found["thai"] == list(range(60, 86))
    assert found["unsaid"] == list(range(12))
    assert found["count"] == f"{len(lines)} of {len(lines)} shown"
    assert found["alerted"] == 0


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize(("phone", "screens"), [(False, 1), (True, 2)], ids=["desktop", "phone"])
def test_lost_tokens_are_on_the_first_screen_of_a_desktop_and_the_second_of_a_phone(
    data, make_run, tmp_path, phone, screens, runs
):
    page = render(data) if runs == 1 else render(data, run_data(make_run("b", worst=0.9)))
    found = driven(page, tmp_path, "--window-size=1280,800", phone=phone)
    assert 0 < found["top"] < 800 * screens
    assert found["folded"] >= 6
    assert found["displays"] == ["table-row"]
    assert found["wide"] == 0


@pytest.mark.parametrize(("flags", "dark"), [((), False), ((DARK,), True)], ids=["light", "dark"])
def test_readable_in_light_and_dark_and_on_a_phone(data, tmp_path, flags, dark):
    picture = tmp_path / "page.png"
    found = driven(render(data), tmp_path, f"--screenshot={picture}", "--virtual-time-budget=5000", *flags, phone=True)
    assert (found["ground"] < 0.1) == dark
    assert {name: ratio for name, ratio in found["contrast"].items() if ratio < 4.5} == {}
    assert len(found["bars"]) == 2  # pending, then firing
    assert min(found["bars"]) >= 3
    assert found["spilt"] == 0
    assert found["inner"] == 390
    assert found["wide"] == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
