"""Hostile text in every string of a run folder and of a scan's summary: none of it becomes markup or a script."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import safetensors.torch
import test_browser
import torch
from parsed_page import Page
from safetensors import safe_open

from vocabguard.compare.summary import load_scan
from vocabguard.report.data import run_data, scan_data
from vocabguard.report.page import render, write_page
from vocabguard.runlog import RunLog

PAYLOADS = (
    "\"'><script>alert(1)</script><img src=x onerror=alert(1)>",
    "</script></style></title></svg><svg onload=alert(1)><iframe src=javascript:alert(1)>",
    "{{7*7}}{% raw %}{{ config }}<!--",
    "]]>&lt;script&gt;alert(1)&lt;/script&gt;&#60;img src=x&#62;",
    "javascript:alert(1)//\u202e\u2066\x00\udc80\ufeff\u2028",
)
JSON_LINES = ("checks.jsonl", "alerts.jsonl", "confusion.jsonl", "neighbors.jsonl", "head_or_body.jsonl")
Place = tuple[Any, ...]
REFUSED = (ValueError, LookupError, TypeError, AttributeError, jinja2.UndefinedError)
"""What an unknown name raises, which the command turns into one line."""


def strings(tree: Any, at: Place = ()) -> Iterator[Place]:
    """Places of texts, and of keys of objects: these end with ``key`` and the key."""
    if isinstance(tree, str):
        yield at
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield (*at, "key", key)
            yield from strings(value, (*at, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from strings(value, (*at, index))


def kind_of(place: Place) -> Place:
    """A place without the indices: the items of a list are of one kind."""
    return tuple("*" if isinstance(part, int) else part for part in place)


def put(tree: Any, at: Place, text: str) -> Any:
    """A copy of a tree with a text at a place, or in the place of a key."""
    if not at:
        return text
    if at[0] == "key" and isinstance(tree, dict) and len(at) == 2:
        return {text if key == at[1] else key: value for key, value in tree.items()}
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    copied[at[0]] = put(copied[at[0]], at[1:], text)
    return copied


class Source:
    """A run folder or a scan as one tree, written again with other texts."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path, self.target = path, target
        self.tree: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        if self.path.is_file():
            with safe_open(str(self.path), framework="pt") as file:
                return {name: json.loads(text) if name != "kind" else text for name, text in file.metadata().items()}
        found: dict[str, Any] = {"run.json": json.loads((self.path / "run.json").read_text(encoding="utf-8"))}
        for name in JSON_LINES:
            lines = (self.path / name).read_bytes().split(b"\n")  # a text may hold other ends of lines
            found[name] = [json.loads(line) for line in lines if line]
        texts = self.path / "texts.json"
        return found | ({"texts.json": json.loads(texts.read_text(encoding="utf-8"))} if texts.exists() else {})

    def places(self) -> list[Place]:
        """One place of each kind."""
        return list({kind_of(place): place for place in strings(self.tree) if len(place) > 2}.values())

    def page(self, tree: dict[str, Any]) -> str:
        """The page of a changed tree."""
        if self.path.is_file():
            vectors, _, _ = load_scan(self.path)
            metadata = {name: value if name == "kind" else json.dumps(value) for name, value in tree.items()}
            safetensors.torch.save_file(vectors, self.target, metadata=metadata)
            return render(scan_data(self.target))
        shutil.copytree(self.path, self.target, dirs_exist_ok=True)
        for name, content in tree.items():
            lines = content if name.endswith(".jsonl") else [content]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (self.target / name).write_text(text, encoding="utf-8")
        return render(run_data(RunLog.open(self.target)))


@pytest.fixture(params=["run", "scan"])
def source(request: pytest.FixtureRequest, make_run: Any, tmp_path: Path) -> Source:
    if request.param == "run":
        texts = [f"token {number}" for number in range(90)]
        run = make_run(echo=True, beside=True, told=True, end=40, texts=texts[:12])
        (run.folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        return Source(run.folder, tmp_path / "changed")
    rows = {"lm_head.weight": torch.randn(24, 8), "model.embed_tokens.weight": torch.randn(24, 8)}
    moved = {name: value + 0.4 * torch.randn(24, 8) for name, value in rows.items()}
    for name, tensors in {"base": rows, "tuned": moved}.items():
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    from vocabguard.compare.scan import scan
    from vocabguard.compare.summary import save_scan, summarise_scan
    from vocabguard.rows.checkpoints import open_checkpoint

    both = [open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    found = scan(*both)
    save_scan(found, tmp_path / "scan.safetensors", summarise_scan(found))
    return Source(tmp_path / "scan.safetensors", tmp_path / "changed.safetensors")


def assert_harmless(page: str) -> None:
    page.encode("utf-8")
    found = Page(page)
    tags = [tag for tag, _ in found.elements]
    assert tags.count("script") == tags.count("style") == 1
    assert not {"img", "iframe", "object", "embed", "base", "foreignobject"} & set(tags)
    names = {name for _, attributes in found.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")} | {"style"} & names
    links = {value for _, attributes in found.elements for name, value in attributes.items() if name in ("href", "src")}
    assert {link for link in links if not str(link).startswith("#")} <= {"data:,"}  # the icon that there is none
    for character in "\x00\u202e\u2066\ufeff":
        assert character not in page


def test_each_string_by_itself(source: Source) -> None:
    places, refused = source.places(), 0
    assert len(places) > (100 if source.path.is_dir() else 20)
    for number, place in enumerate(places):
        try:
            # All at once, each of them first at some places.
            page = source.page(put(source.tree, place, "".join((PAYLOADS * 2)[number % 5 : number % 5 + 5])))
        except REFUSED:
            refused += 1  # a name that something is looked up by, such as a column
            continue
        assert_harmless(page)
    assert refused < len(places) / 2


@pytest.mark.skipif(test_browser.CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")
def test_all_of_them_in_a_browser(source: Source, tmp_path: Path) -> None:
    """No message on the console means that the policy had nothing to refuse: nothing was tried."""
    tree, page, changed = source.tree, "", 0
    for place in source.places():
        every = [other for other in strings(source.tree) if kind_of(other) == kind_of(place) and "key" not in other]
        bent = tree
        for other in every:
            bent = put(bent, other, "".join(PAYLOADS))
        try:
            page, tree, changed = source.page(bent), bent, changed + len(every)
        except REFUSED:
            continue
    assert changed > (250 if source.path.is_dir() else 20)
    assert_harmless(page)
    document, console = test_browser.chromium(write_page(page, tmp_path / "page.html"), "--dump-dom")
    assert console == []
    assert not {"img", "iframe", "object", "embed"} & {tag for tag, _ in Page(document).elements}
