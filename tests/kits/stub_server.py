"""A server of the interface of OpenAI on this machine, whose model repeats what it heard, but for some words."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_TOKENS = re.compile(r"\w+|\s|[^\w\s]")


class Stub:
    """What the server does, and what it has seen.

    Args:
        mute: words that its model says otherwise.
        serves: ways of asking that it knows: ``echo``, ``chat``, ``text``.
        faults: what it does instead of answering, in turn, before it answers: a status, ``(status, headers)``,
            ``"hang up"``, ``"no json"``, ``"slow"``.
    """

    def __init__(
        self, mute: Collection[str] = (), serves: Collection[str] = ("echo", "chat", "text"), faults: Any = ()
    ) -> None:
        self.mute, self.serves, self.faults = set(mute), set(serves), list(faults)
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.at_once = self.most_at_once = 0
        self.delay = 0.0
        self.url = ""
        self.lock = threading.Lock()

    def say(self, words: list[str]) -> list[str]:
        return ["nothing" if word in self.mute else word for word in words]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/chat/completions" and "chat" in self.serves:
            asked = body["messages"][0]["content"].split("\n", 1)[1].split("\n")
            return 200, {"choices": [{"message": {"role": "assistant", "content": "\n".join(self.say(asked))}}]}
        if path == "/v1/completions" and body.get("echo"):
            return (
                (200, {"choices": [self.echoed(body["prompt"])]}) if "echo" in self.serves else (400, {"error": "no"})
            )
        if path == "/v1/completions" and "text" in self.serves:
            asked = body["prompt"].split("\n\n")[0].split("\n")
            return 200, {"choices": [{"text": "\n".join(self.say(asked)) + "\n\nand on it goes"}]}
        return 404, {"error": {"message": "not found"}}

    def echoed(self, prompt: str) -> dict[str, Any]:
        found = list(_TOKENS.finditer(prompt))
        own: list[float | None] = [None, *(-5.0 if one[0] in self.mute else -0.01 for one in found[1:])]
        tops = [None if mine is None else {"nothing": -0.1} if mine < -1 else {one[0]: mine}
                for one, mine in zip(found, own, strict=True)]  # fmt: skip
        return {"text": prompt, "logprobs": {
            "tokens": [one[0] for one in found], "token_logprobs": own, "top_logprobs": tops,
            "text_offset": [one.start() for one in found],
        }}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        stub: Stub = self.server.stub  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            stub.seen.append((self.path, dict(self.headers), body))
            stub.at_once += 1
            stub.most_at_once = max(stub.most_at_once, stub.at_once)
            fault = stub.faults.pop(0) if stub.faults else None
        time.sleep(stub.delay)
        with stub.lock:  # before the answer, which brings the next request
            stub.at_once -= 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who waited too long has gone
            self.reply(stub, body, fault)

    def reply(self, stub: Stub, body: dict[str, Any], fault: Any) -> None:
        if fault == "hang up":
            self.connection.close()
            return
        if fault == "slow":
            time.sleep(1.0)
        status, headers = fault if isinstance(fault, tuple) else (fault if isinstance(fault, int) else 200, {})
        found: Any = {"error": "a fault"}
        if status == 200:
            status, found = stub.answer(self.path, body)
        content = b"{no json" if fault == "no json" else json.dumps(found).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """The stub at its `url`."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads, server.stub = True, stub
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
