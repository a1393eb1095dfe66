"""The chat page in a headless Chromium against a small server that streams, stalls, refuses and breaks on demand."""

import base64
import dataclasses
import hashlib
import itertools
import json
import os
import queue
import re
import select
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright drives the browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium or google-chrome on this machine")

HTML = (Path(__file__).resolve().parents[1] / "src" / "etude" / "serve" / "page.html").read_bytes()
MODEL = "SmolLM2-135M-Instruct"
LABELS = {"Top_p": "Top-p"}


def sha(tag: str) -> str:
    [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), HTML, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {sha('script')}; style-src {sha('style')}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)

# ---------------------------------------------------------------- the server


class Server(ThreadingHTTPServer):
    """Speaks the part of the protocol that the page uses. Each question is answered by the next of `answers`."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.connections: list[socket.socket] = []
        self.models = [MODEL]
        self.key = ""
        self.state = "ok"  # or loading, dead
        self.answers: deque[Callable[[Handler], None]] = deque()
        self.bodies: list[dict[str, Any]] = []  # of the questions, in order
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed before
                pass
        self.thread.join(5)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None: ...

    def whole(self, status: int, body: bytes | dict[str, Any], kind: str = "application/json", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refused(self, status: int, message: str, **headers: str) -> None:
        self.whole(status, {"error": {"message": message, "type": "x", "param": None, "code": None}}, **headers)

    def admitted(self) -> bool:
        if self.server.state != "ok":
            self.refused(503, f"the model is {self.server.state}")
        elif self.server.key and self.headers["authorization"] != f"Bearer {self.server.key}":
            self.refused(401, "this server needs its key")
        else:
            return True
        return False

    def do_GET(self) -> None:
        if self.path == "/":
            self.whole(200, HTML, "text/html; charset=utf-8", content_security_policy=POLICY)
        elif self.path == "/health":
            state = self.server.state
            self.whole(200 if state == "ok" else 503, {"status": state, "message": f"the model is {state}"})
        elif self.path == "/v1/models" and self.admitted():
            self.whole(200, {"object": "list", "data": [{"id": m, "object": "model"} for m in self.server.models]})
        elif self.path != "/v1/models":
            self.whole(404, b"", "text/plain")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.admitted():
            self.server.bodies.append(body)
            (self.server.answers.popleft() if self.server.answers else says("Fine."))(self)

    def stream(self) -> Callable[[bytes], None]:
        """Begins the answer; gives what writes one piece of it, and the end as b""."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        return lambda piece: self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece)) and None

    def gone(self) -> bool:
        ready = select.select([self.connection], [], [], 0)[0]
        return bool(ready) and self.connection.recv(1, socket.MSG_PEEK) == b""


def event(payload: dict[str, Any] | str) -> bytes:
    return f"data: {payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False)}\n\n".encode()


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return event({"id": "c", "object": "chat.completion.chunk", "choices": choices, "usage": None, **more})


def ending(prompt: int, completion: int, cached: int = 0, finish: str = "stop") -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    usage |= {"prompt_tokens_details": {"cached_tokens": cached}}
    return chunk(finish=finish) + event({"id": "c", "choices": [], "usage": usage}) + event("[DONE]")


def begun() -> bytes:
    choices = [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
    return event({"id": "c", "choices": choices, "usage": None})


def says(*pieces: str, finish: str = "stop") -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        write = handler.stream()
        write(begun() + b"".join(map(chunk, pieces)) + ending(20, len(pieces), finish=finish))
        write(b"")

    return answer


def refuses(status: int, message: str, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.refused(status, message, **headers)


def streams(*pieces: bytes, cut: bool = False) -> Callable[[Handler], None]:
    """The pieces, then the end, or the connection is lost."""

    def answer(handler: Handler) -> None:
        write = handler.stream()
        write(b"".join(pieces))
        if not cut:
            return write(b"")
        time.sleep(0.1)  # or the browser forgets the piece that it has not handed on yet
        handler.close_connection = True

    return answer


class Feed:
    """An answer that the test writes piece by piece."""

    def __init__(self) -> None:
        self.pieces: queue.Queue[bytes] = queue.Queue()
        self.asked = threading.Event()  # the question is there
        self.left = threading.Event()  # the browser has closed the connection

    def __call__(self, handler: Handler) -> None:
        self.asked.set()
        write = handler.stream()
        write(begun())
        while True:
            try:
                piece = self.pieces.get(timeout=0.02)
            except queue.Empty:
                if handler.gone():
                    self.left.set()
                    return
                continue
            write(piece)
            if not piece:
                return

    def say(self, *texts: str) -> None:
        for text in texts:
            self.pieces.put(chunk(text))

    def end(self, prompt: int = 20, completion: int = 1, **how: Any) -> None:
        self.pieces.put(ending(prompt, completion, **how))
        self.pieces.put(b"")


# ---------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    args = ["--no-proxy-server", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield found
        found.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


@dataclasses.dataclass
class Chat:
    """The page and what one does with it."""

    page: Any
    server: Server
    aborted: list[str] = dataclasses.field(default_factory=list)  # requests that did not reach their end

    def __post_init__(self) -> None:
        self.page.on("requestfailed", lambda request: self.aborted.append(request.url))

    def open(self) -> "Chat":
        self.page.goto(self.server.url)
        return self

    def ready(self) -> "Chat":
        self.open()
        expect(self.page).to_have_title(f"{MODEL} · Étude")
        return self

    @property
    def input(self) -> Any:
        return self.page.get_by_label("Message", exact=True)

    @property
    def answers(self) -> Any:
        return self.page.locator(".assistant .words")

    @property
    def notes(self) -> Any:
        return self.page.locator(".note:visible span")

    @property
    def facts(self) -> Any:
        return self.page.locator(".facts")

    @property
    def pace(self) -> Any:
        return self.page.locator("#pace")

    @property
    def status(self) -> Any:
        return self.page.get_by_role("status")

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def ask(self, text: str) -> None:
        """By the keyboard, and without a look at what comes."""
        self.input.fill(text)
        self.input.press("Enter")

    def hear(self, text: str, *answer: str) -> None:
        """Asks and waits until the answer is whole."""
        before = self.answers.count()
        if answer:
            self.server.answers.append(says(*answer))
        self.ask(text)
        expect(self.answers).to_have_count(before + 1)
        expect(self.button("Send")).to_be_visible()

    def put(self, **fields: str) -> None:
        for label, value in fields.items():
            self.page.get_by_label(LABELS.get(label, label.replace("_", " "))).fill(value)


def expect(what: Any) -> Any:
    return sync_api.expect(what)


@pytest.fixture
def tabs(browser: Any, server: Server) -> Iterator[Callable[..., Chat]]:
    """Opens tabs, of one browser profile unless they differ in more. At the end: no request left the server's own
    address, and the console shows no error but the browser's own lines about statuses and connections."""
    contexts: dict[str, Any] = {}
    trouble: list[str] = []
    hosts: set[str] = set()

    def tab(**how: Any) -> Chat:
        if str(how) not in contexts:
            contexts[str(how)] = made = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **how})
            made.set_default_timeout(5000)
            made.on("request", lambda request: hosts.add(request.url))
        page = contexts[str(how)].new_page()
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
        return Chat(page, server)

    yield tab
    for context in contexts.values():
        context.close()
    assert hosts and all(url.startswith((f"{server.url}/", "data:")) for url in hosts), hosts
    assert [t for t in trouble if not t.startswith("Failed to load resource:")] == []


@pytest.fixture
def chat(tabs: Callable[..., Chat]) -> Chat:
    return tabs()


# ---------------------------------------------------------------- answers


def test_an_answer_grows_while_it_comes(chat: Chat, server: Server) -> None:
    """Text is there before the end of the stream; counts are marked as estimates until the usage has come."""
    server.answers.append(feed := Feed())
    chat.ready()
    expect(chat.button("Send")).to_be_disabled()
    chat.input.type("Count")
    chat.button("Send").click()
    expect(chat.page.locator(".user .words")).to_have_text("Count")
    expect(chat.input).to_have_value("")
    expect(chat.page.locator(".wait")).to_be_visible()
    feed.say("one ")
    expect(chat.answers).to_have_text("one")
    expect(chat.pace).to_contain_text("≈ 1 token · first after ")
    expect(chat.page.locator(".wait")).to_have_count(0)
    feed.say("two", " three")
    expect(chat.answers).to_have_text("one two three")
    expect(chat.pace).to_contain_text("≈ 3 tokens · ≈ ")
    expect(chat.facts).to_have_text("")
    expect(chat.page.locator(".assistant")).to_have_attribute("aria-busy", "true")
    feed.end(prompt=31, completion=7, cached=16)
    expect(chat.facts).to_have_text(
        re.compile(r"^7\stokens · [\d.]+\stokens/s · first\safter\s[\d.]+\ss · prompt\s31\s\(16\scached\)$")
    )
    expect(chat.page.locator(".assistant")).to_have_attribute("aria-busy", "false")
    expect(chat.page.locator("#live")).to_have_text("one two three")
    chat.hear("Again")  # by the same connection: the first answer was read to its end
    assert chat.aborted == []
    assert server.bodies[0] == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Count"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_speed_and_time_to_the_first_token_are_the_clock_s(chat: Chat, server: Server) -> None:
    """Tokens after the first over the time between first and last text, by a clock that the test turns."""
    server.answers.append(feed := Feed())
    chat.page.clock.install()
    chat.page.add_init_script(
        "window.heard = 0; const read = ReadableStreamDefaultReader.prototype.read;"
        "ReadableStreamDefaultReader.prototype.read = function () {"
        "  return read.call(this).then((found) => { window.heard += 1; return found; }); };"
    )
    chat.ready()
    chat.page.clock.pause_at(time.time() + 3600)
    chat.ask("How fast?")
    for i in range(6):  # the first event has no text
        until = time.monotonic() + 5
        while chat.page.evaluate("window.heard") <= i and time.monotonic() < until:
            time.sleep(0.01)
        chat.page.clock.run_for(100 if i else 500)
        feed.say("word ") if i < 5 else feed.end(9, 21)
    expect(chat.facts).to_have_text("21 tokens · 50.0 tokens/s · first after 0.50 s · prompt 9")


RECUT = """
const fetched = window.fetch;
window.fetch = async (...asked) => {
  const response = await fetched(...asked);
  if (!response.headers.get("content-type").startsWith("text/event-stream")) return response;
  const bytes = new Uint8Array(await response.arrayBuffer());
  let at = 0;
  const body = new ReadableStream({pull(to) {
    if (at < bytes.length) to.enqueue(bytes.slice(at, at += window.cut)); else to.close();
  }});
  return new Response(body, {headers: response.headers});
};
"""


def test_events_cut_anywhere(chat: Chat, server: Server) -> None:
    """Every byte offset between and within characters, events and line ends of three kinds, with a mark at the start,
    comments, a second data line and fields that mean nothing here."""
    words = ["Grüße, ", "日本語 ", "👩‍👩‍👧 ", "\u2028", "end"]
    two_lines = b'data: {"choices":[{"delta":\ndata:{"content":"two "}}]}\n\n'
    before = b"\xef\xbb\xbf: hello\n\n" + begun() + two_lines + b"event: x\nid: 1\nretry: 5\n\n"
    sent = before + b"".join(map(chunk, words)) + ending(5, 6)
    chat.page.add_init_script(RECUT)
    chat.ready()
    for size, newline in itertools.product((1, 2, 3, 7), (b"\n", b"\r\n", b"\r")):
        chat.page.evaluate("(size) => { window.cut = size; }", size)
        server.answers.append(streams(sent.replace(b"\n", newline)))
        chat.hear("Hi")
        assert chat.answers.last.evaluate("node => node.textContent") == "two " + "".join(words), (size, newline)
        expect(chat.facts.last).to_contain_text("6 tokens")


def test_stop_keeps_what_came_and_closes_the_connection(chat: Chat, server: Server) -> None:
    """By the button and by Escape; the part is in the next question's history."""
    chat.ready()
    for stop in (lambda: chat.button("Stop").click(), lambda: chat.input.press("Escape")):
        server.answers.append(feed := Feed())
        chat.ask("Tell me all")
        feed.say("It began", " when")
        expect(chat.answers.last).to_have_text("It began when")
        chat.input.fill("a draft")
        chat.input.press("Enter")  # not while an answer comes
        stop()
        assert feed.left.wait(3)
        expect(chat.answers.last).to_have_text("It began when")
        expect(chat.facts.last).to_contain_text("stopped · ≈ 2 tokens")
        expect(chat.input).to_have_value("a draft")
        expect(chat.notes).to_have_count(0)
    chat.hear("And then?")
    assert [m["content"] for m in server.bodies[-1]["messages"]] == [*["Tell me all", "It began when"] * 2, "And then?"]
    assert len(server.bodies) == 3


def test_stop_before_the_first_word(chat: Chat, server: Server) -> None:
    """The question stays, is marked as not answered, and is not sent again with the next one."""
    server.answers.append(feed := Feed())
    chat.ready().ask("First")
    assert feed.asked.wait(3)
    chat.button("Stop").click()
    assert feed.left.wait(3)
    expect(chat.notes).to_have_text("Stopped before the first word.")
    chat.hear("Second")
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Second"}]
    expect(chat.page.locator(".left-out .words")).to_have_text("First")


# ---------------------------------------------------------------- errors

ERRORS: dict[str, tuple[Callable[[Handler], None] | None, str]] = {
    "400": (refuses(400, "max_tokens=9 should be\n at most 5"), "max_tokens=9 should be at most 5"),
    "429": (refuses(429, "The queue is full.", retry_after="7"), "The queue is full. Try again in 7 s."),
    "500 in HTML": (lambda h: h.whole(500, b"<h1>oops</h1>", "text/html"), "The server answered 500 Internal Server Error."),
    "no stream": (lambda h: h.whole(200, b"<p>hi", "text/html"), "The server answered with text/html instead of a stream"),
    "no connection": (None, "No connection to the server. Is it still running?"),
}  # fmt: skip
BREAKS: dict[str, tuple[Callable[[Handler], None] | None, str]] = {
    "error": (
        streams(begun(), chunk("Half"), event({"error": {"message": "the engine has stopped", "code": None}})),
        "the engine has stopped",
    ),
    "cut": (streams(begun(), chunk("Half"), cut=True), "The connection was lost in the middle of the answer."),
    "end": (streams(begun(), chunk("Half")), "The connection ended before the answer did."),
    "no JSON": (streams(begun(), chunk("Half"), b"data: {oops\n\n"), "The server sent what is not JSON: {oops"),
}


@pytest.mark.parametrize("kind", [*ERRORS, *BREAKS])
def test_an_error_is_one_line_and_a_second_try_works(chat: Chat, server: Server, kind: str) -> None:
    """What was typed meanwhile is not lost, the part that came stays, and the page goes on."""
    answer, line = {**ERRORS, **BREAKS}[kind]
    chat.ready()
    if answer:
        server.answers.append(answer)
    else:
        chat.page.route("**/chat/completions", lambda route: route.abort("connectionrefused"), times=1)
    chat.ask("Question")
    chat.input.fill("typed meanwhile")
    expect(chat.notes).to_contain_text(line)
    expect(chat.answers).to_have_text("Half" if kind in BREAKS else "")
    expect(chat.page.locator("#live")).to_contain_text(line)
    expect(chat.input).to_have_value("typed meanwhile")
    expect(chat.button("Take back")).to_be_visible(visible=kind not in BREAKS)
    server.answers.append(says("Here", " it is"))
    chat.button("Try again").click()
    expect(chat.answers).to_have_text("Here it is")
    expect(chat.notes).to_have_count(0)
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Question"}]
    expect(chat.input).to_have_value("typed meanwhile")


def test_take_back(chat: Chat, server: Server) -> None:
    """A question that was refused can be changed; what was typed meanwhile stays behind it."""
    chat.ready().hear("Hello", "Hi")
    server.answers.append(refuses(400, "too long"))
    chat.ask("A long question")
    expect(chat.notes).to_have_text("too long")
    chat.input.fill("and more")
    chat.button("Take back").click()
    expect(chat.input).to_have_value("A long question\nand more")
    expect(chat.page.locator(".turn")).to_have_count(2)
    chat.input.press("Enter")
    expect(chat.answers).to_have_count(2)
    assert [m["content"] for m in server.bodies[-1]["messages"]] == ["Hello", "Hi", "A long question\nand more"]


def test_the_server_goes_and_comes_back(chat: Chat, server: Server) -> None:
    """Without a reload: the page says that it is gone, and notices when it is back."""
    chat.ready().hear("Hello", "Hi")
    server.stop()
    chat.ask("Still there?")
    expect(chat.notes).to_have_text("No connection to the server. Is it still running?")
    expect(chat.status).to_contain_text("Trying again")
    again = Server(server.server_address[1])
    try:
        expect(chat.status).to_contain_text("Enter sends")
        chat.button("Try again").click()
        expect(chat.answers.last).to_have_text("Fine.")
    finally:
        again.stop()


def test_a_key_is_asked_for_after_401_only(chat: Chat, server: Server) -> None:
    """A wrong one is refused, a right one is sent with all requests, survives a reload, and lies in no lasting store."""
    chat.ready()
    field = chat.page.get_by_label("API key")
    expect(field).to_be_hidden()
    server.key = "sk-right"
    chat.ask("Secret question")
    expect(chat.notes).to_have_text("this server needs its key")
    for key in ("sk-wrong", "schlüssel", "sk-right"):
        expect(field).to_be_visible()
        field.fill(key)
        field.press("Enter")
        if key == "sk-wrong":
            expect(chat.page.get_by_text("The server refused this API key.")).to_be_visible()
        if key == "schlüssel":
            expect(chat.page.get_by_text("That cannot be an API key")).to_be_visible()
            field = chat.page.locator("#key-text")
    expect(chat.answers).to_have_text("Fine.")
    expect(field).to_be_hidden()
    assert [m["content"] for m in server.bodies[-1]["messages"]] == ["Secret question"]
    chat.page.reload()
    chat.hear("Again")
    assert "sk-right" not in chat.page.evaluate("JSON.stringify(localStorage)")
    chat.button("Forget the API key").click()
    chat.page.reload()
    expect(field).to_be_visible()


def test_a_loading_server_is_waited_for(chat: Chat, server: Server) -> None:
    """What is sent meanwhile is answered when it is ready; nothing is lost."""
    server.state = "loading"
    chat.open()
    expect(chat.status).to_have_text("The server is not ready: the model is loading")
    chat.ask("Early question")
    expect(chat.page.locator(".wait")).to_be_visible()
    server.state = "ok"
    expect(chat.answers).to_have_text("Fine.")
    expect(chat.status).to_contain_text("Enter sends")
    server.state = "loading"  # and once more, with the models known
    chat.ask("Later question")
    expect(chat.status).to_have_text("The server is not ready: the model is loading")
    expect(chat.notes).to_have_count(0)
    server.state = "ok"
    expect(chat.answers.last).to_have_text("Fine.")
    assert len(server.bodies) == 2
    server.state = "dead"  # nothing to wait for
    chat.ask("Last question")
    expect(chat.notes).to_have_text("the model is dead")
    expect(chat.status).to_have_text("the model is dead Trying again …")


def test_503_of_a_healthy_server_is_an_error_after_a_few_tries(chat: Chat, server: Server) -> None:
    """No request is repeated for ever."""
    chat.page.clock.install()
    server.answers.extend([refuses(503, "shutting down")] * 9)
    chat.ready().ask("Hello")
    for tries in (2, 3, 4):
        while len(server.bodies) < tries:
            chat.page.clock.run_for(1000)
    expect(chat.notes).to_have_text("shutting down")
    chat.page.clock.run_for(20_000)
    assert len(server.bodies) == 4


# ---------------------------------------------------------------- text

EVIL = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script><b>&lt;bold&gt;</b> [x](javascript:hacked=3)'
)


def test_text_is_text(chat: Chat, server: Server) -> None:
    """Markup in a question, an answer, code, its language, an error, the models' names and what a reload restores."""
    server.models = [EVIL, "other"]
    source = f"{EVIL}\n\n`{EVIL.replace('`', '')}`\n\n```{EVIL}\n{EVIL}\n```\n"
    chat.open()
    expect(chat.page).to_have_title(f"{EVIL} · Étude")
    chat.hear(EVIL, *source)
    server.answers.append(refuses(400, EVIL))
    chat.ask("more")
    expect(chat.notes).to_have_text(EVIL)
    for _ in range(2):
        expect(chat.page.locator(".user .words").first).to_have_text(EVIL)
        expect(chat.answers.first.locator("p").first).to_have_text(EVIL)
        expect(chat.answers.first.locator("p code")).to_have_text(EVIL)
        expect(chat.answers.first.locator("pre")).to_have_text(EVIL)
        expect(chat.answers.first.locator(".bar span")).to_have_text(EVIL)
        assert chat.page.locator("#turns :is(img, script, b, a)").count() == 0
        assert chat.page.evaluate("window.hacked") is None
        chat.page.reload()


MARKED = """First `a < b` and ``` in a line, `open
  indented *stars* stay

second paragraph


```python
def f(x):
\tif x:

\t\treturn "`"
```
- item
  ````
  ```
  inner
  ```
  ````
last ```py"""


def test_code_is_set_as_code(chat: Chat, server: Server) -> None:
    """Fenced and inline; and text that came in any pieces looks as it does after a reload."""
    chat.ready()
    for size in (1, 3, len(MARKED)):
        chat.hear("Code?", *(MARKED[i : i + size] for i in range(0, len(MARKED), size)))
    shown = [node.evaluate("n => n.outerHTML") for node in chat.answers.all()]
    chat.page.reload()
    shown += [node.evaluate("n => n.outerHTML") for node in chat.answers.all()]
    assert len(shown) == 6 and len(set(shown)) == 1
    first = chat.answers.first
    assert [n.text_content() for n in first.locator("pre code").all()] == [
        'def f(x):\n\tif x:\n\n\t\treturn "`"',
        "```\ninner\n```",
    ]
    assert [n.text_content() for n in first.locator(".bar span").all()] == ["python", "code"]
    assert [n.text_content() for n in first.locator("p code").all()] == ["a < b"]
    assert [n.text_content() for n in first.locator("p").all()] == [
        "First a < b and ``` in a line, `open\n  indented *stars* stay",
        "second paragraph",
        "- item",
        "last ```py",
    ]


def test_a_fence_in_the_making_does_not_flicker(chat: Chat, server: Server) -> None:
    """A half fence is not shown as text, neither at the start nor at the end of the code."""
    server.answers.append(feed := Feed())
    chat.ready().ask("Code?")
    feed.say("Look:\n``")
    expect(chat.answers).to_have_text("Look:")
    feed.say("`p", "y\nx = 1\n``")
    expect(chat.answers.locator("code")).to_have_text("x = 1")
    expect(chat.answers.locator(".bar span")).to_have_text("py")
    feed.say("`\nDone `")
    expect(chat.answers.locator("p")).to_have_text(["Look:", "Done `"])
    assert chat.answers.locator("code").text_content() == "x = 1"
    feed.end()
    expect(chat.button("Send")).to_be_visible()


def test_copying(tabs: Callable[..., Chat]) -> None:
    """The answer as the model wrote it, and the code alone; without the clipboard's permission too."""
    chat = tabs(permissions=["clipboard-read"]).ready()
    chat.hear("Code?", "Run `this`:\n\n```sh\nls -l\n```")
    read = "navigator.clipboard.readText()"
    chat.button("Copy").click()
    expect(chat.button("Copied")).to_be_visible()
    assert chat.page.evaluate(read) == "Run `this`:\n\n```sh\nls -l\n```"
    chat.page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    chat.page.get_by_label("Copy this code").click()
    expect(chat.page.locator(".bar button")).to_have_text("Copied")
    assert chat.page.evaluate(read) == "ls -l"


# ---------------------------------------------------------------- settings


def test_settings_are_in_the_request(chat: Chat, server: Server) -> None:
    """Each as its own type; an empty one is not sent; all of them survive a reload."""
    chat.ready()
    chat.put(System_prompt="You are brief.\nVery.", Temperature="0.7", Top_p="0.9", Max_tokens="64", Seed="-5")
    chat.put(Stop_texts="###\n\\n\\nQ:\nback\\\\n\n  two spaces")
    for _ in range(2):
        chat.hear("Hi", "Yes")
        body = server.bodies[-1]
        assert {k: body[k] for k in ("temperature", "top_p", "max_tokens", "seed", "stop")} == {
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 64,
            "seed": -5,
            "stop": ["###", "\n\nQ:", "back\\n", "  two spaces"],
        }
        assert isinstance(body["max_tokens"], int) and isinstance(body["seed"], int)
        assert body["messages"][0] == {"role": "system", "content": "You are brief.\nVery."}
        assert [m["role"] for m in body["messages"]].count("system") == 1
        chat.page.reload()
    chat.put(Temperature="0")
    chat.hear("Greedy?", "Yes")
    assert server.bodies[-1]["temperature"] == 0
    chat.button("Back to the defaults").click()
    chat.hear("Plain?", "Yes")
    assert set(server.bodies[-1]) == {"model", "messages", "stream", "stream_options"}
    assert server.bodies[-1]["messages"][0]["role"] == "user"


WRONG = [
    ("Temperature", "2.5", "From 0 to 2."),
    ("Temperature", "1e", "Not a number."),
    ("Top-p", "-0.1", "From 0 to 1."),
    ("Max tokens", "0", "At least 1."),
    ("Max tokens", "1.5", "A whole number."),
    ("Seed", "12345678901234567890", "A whole number."),
    ("Stop texts", "a\nb\nc\nd\ne", "Four stop texts at most."),
]


def test_a_setting_out_of_range_is_not_sent(chat: Chat, server: Server) -> None:
    """Nor dropped in silence: the field says why, also where its panel was closed, and the message stays."""
    chat.ready()
    for label, value, line in WRONG:
        field = chat.page.get_by_label(label)
        field.click()
        chat.page.keyboard.insert_text(value)
        chat.button("Close settings").click()
        chat.ask("Hi")
        expect(chat.page.locator(".wrong:visible")).to_have_text(line)
        expect(field).to_be_focused()
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(chat.input).to_have_value("Hi")
        field.fill("")
        expect(chat.page.locator(".wrong:visible")).to_have_count(0)
    assert server.bodies == []
    chat.hear("Hi")
    assert len(server.bodies) == 1


def test_several_models(chat: Chat, server: Server) -> None:
    """The chosen one is asked, is named at its answers, and stays chosen until the server no longer has it."""
    server.models = ["small", "large"]
    chat.open()
    choice = chat.page.get_by_label("Model", exact=True)
    choice.select_option("large")
    chat.hear("Hi", "Yes")
    chat.page.reload()
    expect(choice).to_have_value("large")
    expect(chat.facts).to_contain_text("large")
    chat.hear("Hi", "Yes")
    assert [b["model"] for b in server.bodies] == ["large", "large"]
    server.models = ["tiny"]
    chat.page.reload()
    expect(chat.page.locator("#model-name")).to_have_text("tiny")
    chat.hear("Hi", "Yes")
    assert server.bodies[-1]["model"] == "tiny"


# ---------------------------------------------------------------- the conversation


def test_regenerate(chat: Chat, server: Server) -> None:
    """Asks the same again; the old answer gives way to the first new word and comes back if there is none."""
    chat.ready().hear("One", "Uno")
    chat.hear("Two", "Dos")
    expect(chat.button("Regenerate")).to_have_count(1)
    server.answers.append(refuses(429, "busy"))
    chat.button("Regenerate").click()
    expect(chat.notes).to_have_text("busy")
    expect(chat.answers).to_have_text(["Uno", "Dos"])
    server.answers.append(feed := Feed())
    chat.button("Try again").click()
    assert feed.asked.wait(3)
    chat.button("Stop").click()
    expect(chat.answers).to_have_text(["Uno", "Dos"])
    server.answers.append(says("Due"))
    chat.button("Regenerate").click()
    expect(chat.answers).to_have_text(["Uno", "Due"])
    assert [m["content"] for m in server.bodies[-1]["messages"]] == ["One", "Uno", "Two"]
    chat.hear("Three")
    assert [m["content"] for m in server.bodies[-1]["messages"]] == ["One", "Uno", "Two", "Due", "Three"]


def test_a_reload_keeps_the_conversation(chat: Chat, server: Server) -> None:
    """Also what had come of an answer, which says that it was cut, and an old answer that was to be replaced."""
    chat.ready().hear("One", "Uno", "!")
    facts = chat.facts.inner_text()
    chat.page.reload()
    expect(chat.answers).to_have_text("Uno!")
    expect(chat.facts).to_have_text(facts)
    server.answers.append(feed := Feed())
    chat.button("Regenerate").click()
    assert feed.asked.wait(3)
    chat.page.reload()
    expect(chat.answers).to_have_text("Uno!")
    server.answers.append(feed := Feed())
    chat.ask("Two")
    feed.say("Do")
    expect(chat.answers.last).to_have_text("Do")
    chat.page.reload()
    expect(chat.answers).to_have_text(["Uno!", "Do"])
    expect(chat.notes).to_have_text("The page was closed before the answer ended.")
    chat.hear("Three")
    assert [m["content"] for m in server.bodies[-1]["messages"]] == ["One", "Uno!", "Two", "Do", "Three"]


def test_two_tabs_keep_their_own(tabs: Callable[..., Chat]) -> None:
    """A reload of one does not bring the other's conversation; a new tab begins with what was said last."""
    one, two = tabs().ready(), tabs().ready()
    one.hear("One", "Uno")
    two.hear("Two", "Dos")
    one.page.reload()
    expect(one.answers).to_have_text("Uno")
    two.page.close()
    three = tabs().ready()
    expect(three.answers).to_have_text(re.compile("Dos|Uno"))


def test_new_chat_and_back(chat: Chat, server: Server) -> None:
    """In the middle of an answer too; nothing is lost by a wrong click."""
    server.answers.append(feed := Feed())
    chat.ready().ask("One")
    feed.say("Un")
    expect(chat.answers).to_have_text("Un")
    chat.button("New chat").click()
    assert feed.left.wait(3)
    expect(chat.page.locator(".turn")).to_have_count(0)
    expect(chat.page.get_by_role("heading", name=MODEL)).to_be_visible()
    chat.page.reload()
    chat.button("Back to the last conversation").click()
    expect(chat.answers).to_have_text("Un")
    chat.button("New chat").click()
    chat.hear("Two", "Dos")
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Two"}]


KEPT = ["null", "[1]", '"text"', '{"turns":[{"role":"assistant","text":"x"}]}', "{", '{"turns":[{"role":"user","text":"q"},{"role":"assistant","text":"a","first":"x","usage":7,"error":[1]}],"previous":3,"seed":{}}']  # fmt: skip


def test_nonsense_in_the_store(chat: Chat) -> None:
    """What another page of the same host and port, or another version, has left there does not break this one."""
    chat.ready()
    for kept in KEPT:
        chat.page.evaluate("(kept) => { window.kept = kept; }", kept)
        chat.page.evaluate(
            "addEventListener('pagehide', () => { sessionStorage.clear();"
            "for (const k of ['chat', 'settings', 'key']) localStorage.setItem('etude.' + k, window.kept); })"
        )
        chat.page.reload()
        chat.hear("Hello", "Hi")
        expect(chat.answers.last).to_have_text("Hi")


def test_a_closed_store(chat: Chat) -> None:
    """Where a browser blocks all site data the chat works, and says what a reload would do."""
    chat.page.add_init_script(
        "for (const s of ['localStorage', 'sessionStorage'])"
        "Object.defineProperty(window, s, {get() { throw new DOMException('no'); }})"
    )
    chat.ready().hear("Hello", "Hi")
    expect(chat.answers).to_have_text("Hi")
    expect(chat.status).to_contain_text("a reload would lose it")


def long_chat(n: int) -> str:
    said = ({"role": "user", "text": f"Question {i}"} if i % 2 == 0 else
            {"role": "assistant", "text": f"Answer {i}.\n\n```py\nx = {i}\n```\n" + "Words of it. " * 40, "finish": "stop"}
            for i in range(n))  # fmt: skip
    return json.dumps({"turns": list(said)})


def test_two_hundred_messages(chat: Chat, server: Server) -> None:
    """Open at once, at the end; an answer of 2,000 pieces is painted as it comes; the reader who scrolls up stays
    there, and who goes back to the end follows again."""
    chat.page.add_init_script(f"sessionStorage['etude.chat'] ??= {json.dumps(long_chat(200))}")
    chat.ready()
    expect(chat.page.locator(".turn")).to_have_count(200)
    assert chat.page.evaluate("performance.getEntriesByType('navigation')[0].domComplete") < 3000
    log = chat.page.locator("#log")
    room = "n => n.scrollHeight - n.scrollTop - n.clientHeight"
    assert log.evaluate(room) < 2
    server.answers.append(feed := Feed())
    chat.ask("Go on")
    feed.say(*["word "] * 2000)
    expect(chat.pace).to_contain_text("≈ 2000 tokens")
    assert len(server.bodies[-1]["messages"]) == 201
    assert log.evaluate(room) < 2
    down = chat.button("To the end of the conversation")
    expect(down).to_be_hidden()
    log.hover()
    chat.page.mouse.wheel(0, -900)
    expect(down).to_be_visible()
    top = log.evaluate("n => n.scrollTop")
    feed.say(*["more "] * 500)
    expect(chat.pace).to_contain_text("≈ 2500 tokens")
    assert log.evaluate("n => n.scrollTop") == top and log.evaluate(room) > 500
    down.click()
    expect(down).to_be_hidden()
    feed.say(*["end "] * 500)
    expect(chat.pace).to_contain_text("≈ 3000 tokens")
    assert log.evaluate(room) < 2
    feed.end()
    expect(chat.button("Send")).to_be_visible()


# ---------------------------------------------------------------- hands, eyes and ears


def test_the_keyboard_alone(chat: Chat, server: Server) -> None:
    """Enter sends, Shift+Enter makes a line, Enter within an input method's word does neither; every control is
    reached by Tab, shows its focus and has a name."""
    chat.ready()
    expect(chat.input).to_be_focused()
    chat.input.type("one")
    chat.input.press("Shift+Enter")
    chat.input.type("two")
    chat.input.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True})
    assert server.bodies == []
    assert chat.input.evaluate("n => n.scrollHeight <= n.clientHeight + 1")  # it has grown
    chat.input.press("Enter")
    expect(chat.answers).to_have_text("Fine.")
    assert server.bodies[0]["messages"][0]["content"] == "one\ntwo"
    expect(chat.input).to_be_focused()
    chat.input.type("x")
    seen = set()
    look = """() => { const n = document.activeElement, s = getComputedStyle(n);
      return [n.id || n.textContent, n.ariaLabel || n.labels?.[0]?.textContent || n.textContent.trim(),
              s.outlineStyle !== 'none' || n.id === 'text']; }"""
    for _ in range(30):
        chat.page.keyboard.press("Tab")
        what, name, visible = chat.page.evaluate(look)
        if what and chat.page.evaluate("document.activeElement !== document.body"):
            assert name and visible, what
            seen.add(what)
    numbers = {"temperature", "top_p", "max_tokens", "seed"}
    assert (
        seen
        == {"new", "open", "log", "Copy", "Regenerate", "text", "send", "close", "system", "stop-texts", "reset"}
        | numbers
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_jumps(tabs: Callable[..., Chat], server: Server, width: int) -> None:
    """No layout shift (as the browser itself counts it) from the load to the end of an answer."""
    chat = tabs(viewport={"width": width, "height": 844})
    chat.page.add_init_script(
        "window.shifts = []; new PerformanceObserver((l) => { for (const e of l.getEntries()) window.shifts.push("
        "[e.value, ...e.sources.map((s) => s.node?.id || s.node?.className)]); }).observe({type: 'layout-shift', buffered: true})"
    )
    server.answers.append(feed := Feed())
    chat.ready().ask("Tell me")
    for i in range(30):
        feed.say(f"Sentence {i} of a long answer, ", "which goes on.\n\n" if i % 3 == 2 else "and on. ")
        chat.page.wait_for_timeout(20)
    feed.end()
    expect(chat.button("Send")).to_be_visible()
    chat.page.wait_for_timeout(100)
    shifts = chat.page.evaluate("window.shifts")
    assert sum(s[0] for s in shifts) < 0.02, shifts


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_every_width(tabs: Callable[..., Chat], server: Server, width: int) -> None:
    """No sideways scrolling whatever the model writes; each control lies in the window and can be clicked; on a phone
    the settings are closed at first and cover the chat when opened."""
    chat = tabs(viewport={"width": width, "height": 844}, has_touch=width < 800, is_mobile=width < 800)
    server.models = [MODEL + "-with-a-very-long-name-" * 5]
    chat.open()
    chat.hear("x" * 300, "y" * 500, "\n\n```\n" + "z" * 500 + "\n```\n", "`" + "w" * 300 + "`")
    server.answers.append(refuses(400, "e" * 300))
    chat.ask("more")
    expect(chat.notes).to_be_visible()
    panel = chat.page.get_by_role("dialog", name="Settings")
    wide = "[document.documentElement, document.getElementById('log'), ...document.querySelectorAll('dialog')].map((n) => n.scrollWidth - n.clientWidth)"
    assert max(chat.page.evaluate(wide)) <= 0
    assert chat.page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    names = ["New chat", "Settings", "Try again", "Take back"]
    if width < 900:
        expect(panel).to_be_hidden()
    for name in names:
        box = chat.button(name).bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 844
        assert box["height"] >= (40 if width < 600 else 28)
        chat.button(name).click(trial=True)
    if width < 900:
        chat.button("Settings").click()
        expect(panel).to_be_visible()
        assert max(chat.page.evaluate(wide)) <= 0
    chat.put(Temperature="0.5", Stop_texts="###")
    chat.button("Back to the defaults").click(trial=True)
    if width < 900:
        chat.page.keyboard.press("Escape")
        expect(panel).to_be_hidden()
        expect(chat.button("Settings")).to_have_attribute("aria-expanded", "false")
    chat.hear("Hi", "Yes")
    assert server.bodies[-1]["temperature"] == 0.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(tabs: Callable[..., Chat], scheme: str) -> None:
    """Text 4.5 to 1 on all that lies under it (WCAG 2.2, 1.4.3), in both schemes, which differ."""
    chat = tabs(color_scheme=scheme).ready()
    names = ["paper", "raised", "tint", "bad-tint", "ink", "soft", "accent", "on-accent", "bad"]
    values = chat.page.evaluate(
        "(names) => names.map((n) => getComputedStyle(document.documentElement).getPropertyValue('--' + n))", names
    )
    color = {n: [int(v.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)] for n, v in zip(names, values, strict=True)}

    def light(name: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[name]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [(t, g) for t in ("ink", "soft") for g in ("paper", "raised", "tint")]
    pairs += [("bad", "paper"), ("bad", "raised"), ("bad", "bad-tint"), ("on-accent", "accent")]
    for pair in pairs:
        low, high = sorted(map(light, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
    assert (light("ink") > light("paper")) == (scheme == "dark")


def test_the_page_is_whole() -> None:
    """One file: nothing is loaded from elsewhere, no handler in an attribute, no markup from strings."""
    text = HTML.decode()
    assert not re.findall(r"""(?:src|href)=["']?(?!data:)[^"'#]""", text)
    assert not re.findall(r"""<[^>]*\s(?:on\w+|style)=""", text)
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|@import|url\(", text
    )
    assert {u for u in re.findall(r"https?://[^\s'\"<>)]+", text)} <= {"http://www.w3.org/2000/svg"}
