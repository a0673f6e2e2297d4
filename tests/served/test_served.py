"""Served models: what is found through a server, and what its faults come to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_server import Stub, serving

from vocabguard.served import asking
from vocabguard.served.asking import _compared, _forced, ask_words_of, mode_of
from vocabguard.served.client import Server, ServerError
from vocabguard.served.words import words_of_texts

KEY = "sk-very-secret-4711"
WORDS = ["river", "stone", "cloud", "東京", "мир", "grün", "a-b", "x_1"]


def quick(url: str, **options: Any) -> Server:
    return Server(url, "m", **{"pause": 0.01, "timeout": 5.0} | options)


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["echo", "chat", "text"])
def test_mute_words_are_found(mode: Any) -> None:
    with serving(Stub(mute={"stone", "мир"}, serves={mode})) as stub:
        server = quick(stub.url)
        assert mode_of(server) == mode
        found = ask_words_of(server, WORDS, mode=mode, asks=3, seed=0, tell=lambda *_: None)
    assert found.right == [[word not in stub.mute] * 3 for word in WORDS]
    if mode == "echo":
        assert found.probability is not None
        assert found.probability[1] < 0.01
        assert found.probability[0] > 0.9
    assert found.instead[1] == ["nothing"] * 3
    assert found.instead[0] == []


def test_a_left_out_line_does_not_shift_the_others() -> None:
    class Skipping(Stub):
        def say(self, words: list[str]) -> list[str]:
            return ["Sure! Here it is:", *(word for word in words if word not in self.mute), "Done."]

    with serving(Skipping(mute={"stone"}, serves={"chat"})) as stub:
        found = ask_words_of(quick(stub.url), WORDS, mode="chat", asks=1, seed=0, tell=lambda *_: None)
    assert found.right == [[word != "stone"] for word in WORDS]


def test_log_probabilities_that_do_not_fit_the_prompt_are_not_believed() -> None:
    prompt = "a\n\na\n\na"
    choice = Stub().echoed(prompt)
    assert _forced(prompt, ["a"], choice) is not None
    for change in (
        {"tokens": ["b"] * len(choice["logprobs"]["tokens"])}, {"top_logprobs": None}, {"token_logprobs": []},
        {"tokens": None},
    ):  # fmt: skip
        assert _forced(prompt, ["a"], {"logprobs": choice["logprobs"] | change}) is None
    without = {key: value for key, value in choice["logprobs"].items() if key != "text_offset"}
    assert _forced(prompt, ["a"], {"logprobs": without}) is not None
    begun = {"tokens": "<s>", "token_logprobs": None, "top_logprobs": None}
    first = {name: [mark, *choice["logprobs"][name]] for name, mark in begun.items()}
    assert _forced(prompt, ["a"], {"logprobs": first}) is not None


@pytest.mark.parametrize("mode", ["echo", "chat"])
def test_the_command(mode: str, tmp_path: Path, run: Callable[..., int], capsys: Any) -> None:
    (tmp_path / "words.txt").write_text("мир\nBrücke\n", encoding="utf-8")
    line = ("--sample", "120", "--asks", "4", "--watch", tmp_path / "words.txt", "--json")
    with serving(Stub(serves={mode})) as base:
        pool = words_of_texts(["мир Brücke"])
        assert run("probe", "--url", base.url, "--model", "m", *line, "--out", tmp_path / "base.json") == 0
        alone = json.loads(capsys.readouterr().out)
        assert alone["verdict"]["level"] == "unknown"
        assert alone["numbers"]["repeated"] == 1
        words = json.loads((tmp_path / "base.json").read_text(encoding="utf-8"))["words"]
        # The stub's tokens are letters: a word with marks is several of them.
        mute = {*(word for word in words[:120:3] if word.isalnum()), pool[0]}
        with serving(Stub(mute=mute, serves={mode})) as tuned:
            assert run("probe", "--url", tuned.url, "--model", "m", "--base-url", base.url, *line) == 1
            told = json.loads(capsys.readouterr().out)
            lost = len([word for word in words[:120] if word in mute])
            assert run("probe", "--url", tuned.url, "--model", "m", tmp_path / "base.json", "--json") == 1
            again = json.loads(capsys.readouterr().out)
    assert told["asked"]["by"] == mode
    assert told["lost_count"] == again["lost_count"] == lost  # of the sample; watched words have a list of their own
    assert told["numbers"]["lost"] == again["numbers"]["lost"] == pytest.approx(lost / 120, abs=0.15)
    assert 1 - told["numbers"]["retained_high"] < told["numbers"]["lost"] < 1 - told["numbers"]["retained_low"]
    assert {word["text"]: word["lost"] for word in told["words"]} == {"мир": True, "Brücke": False}
    assert "words that the base repeats" in told["verdict"]["sentence"]
    assert "token" not in told["verdict"]["sentence"]
    assert any("single tokens" in one for one in told["verdict"]["not_measured"])


def test_an_untouched_copy_is_fine(run: Callable[..., int], capsys: Any) -> None:
    with serving(Stub()) as stub:
        line = ("probe", "--url", stub.url, "--model", "tuned", "--base-model", "base", "--sample", "60", "--json")
        assert run(*line) == 0
        assert {body["model"] for _, _, body in stub.seen} == {"tuned", "base"}
    assert json.loads(capsys.readouterr().out)["verdict"]["level"] == "fine"


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [429, 500, 503, "hang up", "no json", (429, {"Retry-After": "0"})])
def test_what_passes_is_tried_again(fault: Any) -> None:
    with serving(Stub(faults=[fault, fault])) as stub:
        found = quick(stub.url).post("/completions", {"prompt": "a\n\na", "echo": True})
    assert found["choices"]
    assert len(stub.seen) == 3


def test_retry_after_is_kept() -> None:
    with serving(Stub(faults=[(429, {"Retry-After": "0.4"})])) as stub:
        began = time.monotonic()
        quick(stub.url).post("/completions", {"prompt": "a\n\na"})
    assert 0.4 <= time.monotonic() - began < 3


@pytest.mark.parametrize(("fault", "times"), [(400, 1), (401, 1), (404, 1), (503, 3), ("hang up", 3), ("slow", 3)])
def test_what_stays_is_one_line(fault: Any, times: int) -> None:
    with serving(Stub(faults=[fault] * 9)) as stub, pytest.raises(ServerError) as failure:
        quick(stub.url, tries=3, timeout=0.2, key=KEY).post("/completions", {"prompt": "a"})
    assert len(stub.seen) == times
    said = str(failure.value)
    assert "\n" not in said
    assert KEY not in said
    assert stub.url in said


def test_no_redirect_is_followed() -> None:
    with serving(Stub()) as other, serving(Stub(faults=[(307, {"Location": other.url + "/completions"})])) as stub:
        server = quick(stub.url, key=KEY)
        with pytest.raises(ServerError, match="redirects elsewhere, which is not followed"):
            server.post("/completions", {"prompt": "a"})
    assert other.seen == []


@pytest.mark.parametrize(
    "url",
    ["", "ftp://a/v1", "http://", "http://u:p@host/v1", "http://host/v1?key=1", "http://ho st/v1", "http://h:99999/v1",
     "http://[::1/v1", "file:///etc/passwd"],
)  # fmt: skip
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(ServerError) as failure:
        Server(url, "m")
    assert "u:p" not in str(failure.value)
    assert "key=1" not in str(failure.value)


def test_the_key_is_sent_and_never_shown(
    tmp_path: Path, run: Callable[..., int], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(Stub(mute={"river"})) as stub, serving(Stub()) as base:
        line = ("--url", stub.url, "--model", "m", "--key-env", "MY_KEY", "--sample", "20", "--asks", "2")
        run("probe", *line, "--out", tmp_path / "a.json", "--base-url", base.url)
        said = capsys.readouterr()
        assert {headers.get("Authorization") for _, headers, _ in stub.seen} == {f"Bearer {KEY}"}
        # Another host has a key of its own, or none.
        assert {headers.get("Authorization") for _, headers, _ in base.seen} == {None}
        stub.faults = [401]
        assert run("probe", *line) == 2
        refused = capsys.readouterr().err
    assert "is the key in the environment right?" in refused
    for text in (
        said.out,
        said.err,
        refused,
        (tmp_path / "a.json").read_text(encoding="utf-8"),
        repr(Server(stub.url, "m", KEY)),
    ):
        assert KEY not in text
    assert stub.url not in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_requests_at_a_time() -> None:
    stub = Stub(serves={"chat"})
    stub.delay = 0.05
    with serving(stub):
        ask_words_of(quick(stub.url, concurrency=3), WORDS * 6, mode="chat", asks=2, seed=0, tell=lambda *_: None)
    assert stub.most_at_once == 3


def test_a_fault_ends_all_soon() -> None:
    stub = Stub(serves={"chat"}, faults=[403])
    stub.delay = 0.05
    many = [f"w{number}" for number in range(800)]
    with serving(stub), pytest.raises(ServerError, match="403"):
        ask_words_of(quick(stub.url, concurrency=2), many, mode="chat", asks=4, seed=0, tell=lambda *_: None)
    assert len(stub.seen) < 100


@pytest.mark.parametrize(
    "answer",
    [{}, {"choices": []}, {"choices": [None]}, {"choices": [{"message": None}]},
     {"choices": [{"message": {"content": 3}}]},
     {"choices": [{"message": {"content": [{"text": "river"}]}}]}, {"error": {"message": "x\ny"}}, {"choices": "no"}],
)  # fmt: skip
def test_odd_answers(answer: Any, run: Callable[..., int], capsys: Any) -> None:
    class Odd(Stub):
        def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
            return 200, answer

    with serving(Odd()) as stub:
        code = run("probe", "--url", stub.url, "--model", "m", "--sample", "8", "--asks", "1", "--tries", "1")
    said = capsys.readouterr()
    assert code in (0, 2)
    assert "Traceback" not in said.err
    if code == 2:
        assert len(said.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("--url", "http://127.0.0.1:9/v1"), "--url takes --model NAME"),
        (("--model", "m"), "allowed: a MODEL, or --url"),
        ((), "allowed: a MODEL, or --url"),
        (("--url", "http://127.0.0.1:9/v1", "--model", "m", "--tries", "1"), "127.0.0.1:9"),
        (("--url", "http://127.0.0.1:9/v1", "--model", "m", "--ask-by", "x"), "--ask-by is 'x'; allowed: echo"),
        (("--url", "http://127.0.0.1:9/v1", "--model", "m", "none.json", "--tries", "1"), "none.json: is no JSON"),
        (("--url", "http://127.0.0.1:9/v1", "--model", "m", "--concurrency", "9999"), "--concurrency is 9999"),
        (("--url", "http://u:p@h/v1", "--model", "m"), "holds a name, a password or a query"),
    ],
)
def test_bad_options(line: tuple[str, ...], said: str, run: Callable[..., int], capsys: Any) -> None:
    assert run("probe", *line) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.strip().splitlines()) == 1
    assert said in told.err


@pytest.mark.parametrize(
    "answer",
    ["river\nstone\ncloud", "river stone cloud", "1. river\n2. stone\n3. cloud", 'Here: "river", stone, cloud.'],
)
def test_a_list_is_read_in_whatever_layout(answer: str) -> None:
    assert [one.right for one in _compared(["river", "stone", "cloud"], answer)] == [True] * 3
    [first, second, third] = _compared(["river", "stone", "cloud"], answer.replace("stone", "bread"))
    assert (first.right, second.right, third.right) == (True, False, True)
    assert second.instead == "bread"


def test_words_that_are_left_out_shift_no_others() -> None:
    assert [one.right for one in _compared(["a1", "river", "C++", "cloud"], "a1\nC++\ncloud")] == [
        True,
        False,
        True,
        True,
    ]
    assert [one.right for one in _compared(["river"], "")] == [False]


@pytest.mark.parametrize(("chat", "text", "expected"), [(3, 8, "text"), (8, 0, "chat"), (4, 4, "chat"), (0, 0, "chat")])
def test_the_way_that_the_model_follows_is_taken(
    chat: int, text: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base model answers no request, and a chat model continues no list."""

    def answer(_server: Any, mode: str, words: Any, *_: Any) -> Any:
        right = {"chat": chat, "text": text}.get(mode)
        return None if right is None else [asking._Answer(place < right, 0.0, None) for place in range(len(words))]

    monkeypatch.setattr(asking, "_answer_of", answer)
    server = Server("http://127.0.0.1:1/v1", "m")
    assert asking.mode_of(server) == expected
    assert asking.mode_of(server, "text") == "text"
