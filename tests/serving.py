"""What the server's tests share: an engine that says what it is told and fails where it is told, a real one on a tiny model,
a server in a thread, and a socket's view of it."""

import asyncio
import contextlib
import functools
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from conftest import varied_text
from test_model import made

from etude.errors import Refusal
from etude.infer.engine import InferenceEngine, Settings
from etude.infer.request import EngineDead, Piece, QueueFull, Request
from etude.infer.sampling import Token
from etude.infer.text import Said
from etude.serve.app import Server
from etude.serve.process import Process
from etude.text import tokenizer as tok
from etude.text.tokenizer import IM_END, IM_START

# As Hermes' and Qwen's: tools in the system's turn, calls in <tool_call>, results in <tool_response>.
TOOLS_TEMPLATE = (
    "{% if tools %}{{ '" + IM_START + "system\\n' }}{% for t in tools %}{{ (t | tojson) + '\\n' }}{% endfor %}{{ '" + IM_END + "\\n' }}{% endif %}"
    "{% for m in messages %}{{ '" + IM_START + "' + m.role + '\\n' }}"
    "{% if m.role == 'tool' %}{{ '<tool_response>' + m.content + '</tool_response>' }}{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '" + IM_END + "\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '" + IM_START + "assistant\\n' }}{% endif %}"
)  # fmt: skip
CONTEXT = 1024
NAME = "tiny"


@functools.cache
def tokenizer(tools: bool = True) -> tok.Tokenizer:
    text = varied_text(20_000) + '{"name": "get_weather", "arguments": {"city": "Paris"}}\n' * 20
    made = tok.bpe([text], [], vocab_size=400)
    made.template = TOOLS_TEMPLATE if tools else None
    return made


class Fake:
    """An engine of scripted text: `say(request, choice)` is a sample's. It fails where it is told: see the attributes."""

    def __init__(self, say: Callable[[Request, int], str] | str = "Hello there.", tools: bool = True):
        self.say = say if callable(say) else lambda request, choice: say
        self.tokenizer = tokenizer(tools)
        self.vocab_size, self.context = self.tokenizer.vocab_size, CONTEXT
        self.settings = SimpleNamespace(page_size=16, max_waiting=100)
        self.delay = 0.0  # seconds a token
        self.max_waiting = 1000
        self.at: dict[int, Callable[[], Any]] = {}  # before token number k: raises, or returns an error's text
        self.hangs_at: int | None = None  # tokens after which one request gets no more
        self.refuses: str | None = None  # in the request's first step
        self.fault: str | None = None
        self.running = self.aborted = self.finished = 0
        self.requests: list[Request] = []

    @property
    def alive(self) -> bool:
        return self.fault is None

    def start(self) -> None:
        pass

    def shutdown(self, timeout: float) -> None:
        pass

    def stats(self) -> dict[str, Any]:
        names = (
            "waiting pages_used pages_cached prefix_hit_tokens prefix_query_tokens preemptions steps last_step".split()
        )
        return dict.fromkeys(names, 0) | {"running": self.running, "pages": 64, "pages_free": 64}

    def admit(self, request: Request) -> None:
        if len(request.prompt) + request.max_tokens > self.context:
            raise Refusal("too long")

    async def generate_async(self, request: Request) -> AsyncIterator[Piece]:
        if self.fault is not None:
            raise EngineDead(self.fault)
        if self.running >= self.max_waiting:
            raise QueueFull("all places are taken")
        if self.refuses is not None:
            raise Refusal(self.refuses)
        self.requests.append(request)
        self.running += 1
        done = False
        try:
            rows = [self._sample(request, choice) for choice in range(request.n)]
            while rows:
                await asyncio.sleep(self.delay)
                for row in list(rows):
                    piece = next(row)
                    yield piece
                    if piece.finish is not None:
                        rows.remove(row)
                if self.hangs_at is not None:
                    self.hangs_at -= 1
                    if self.hangs_at < 0:
                        self.hangs_at = None
                        await asyncio.sleep(3600)
                if self.fault is not None:
                    raise EngineDead(self.fault)
            done = True
        finally:
            self.running -= 1
            self.finished += done
            self.aborted += not done

    def _sample(self, request: Request, choice: int) -> Iterator[Piece]:
        said = Said(self.tokenizer, request.stop)
        end = self.tokenizer.backend.token_to_id(IM_END)
        ids = [*self.tokenizer.encode(self.say(request, choice)), end]
        for i, id in enumerate(ids):
            error = self.at[i]() if i in self.at else None
            text = "" if id == end else said.push(id)
            stop = id if id == end else said.stopped
            finish = (
                "error" if error else "stop" if stop is not None else "length" if i + 1 == request.max_tokens else None
            )
            if finish is not None and said.stopped is None:
                text += said.flush()
            yield Piece("r", choice, text, (Token(id, -0.5, -0.5, ((id, -0.5),)),), finish, stop, error)


def real(seed: int = 0, **settings: Any) -> InferenceEngine:
    """An engine on a model of random weights, whose text is mostly no text at all."""
    words = tokenizer()
    model = made("dense", "model.max_len=1024", vocab_size=words.vocab_size, seed=seed)
    chosen: dict[str, Any] = {"page_size": 16, "cache_mb": 1, "max_running": 8, "attention": "views"}
    return InferenceEngine(model, words, Settings(**(chosen | settings)), context=CONTEXT)


@contextlib.contextmanager
def served(engine: Any, drain_seconds: float = 5.0, **settings: Any) -> Iterator["Running"]:
    """A server on a free port of this machine, in a thread. Ends it."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(NAME, **({"access_log": False, "engine": engine} | settings))
    process = Process(server, drain_seconds)
    if engine is not None:
        engine.start()
    thread = threading.Thread(target=lambda: asyncio.run(process.serve([listener])))
    thread.start()
    while not process.started:
        time.sleep(0.005)
    running = Running(listener.getsockname()[1], server, process, thread)
    try:
        yield running
    finally:
        running.end()
        thread.join(20)
        listener.close()
        if server.engine is not None:
            server.engine.shutdown(5)
        assert not thread.is_alive()


class Running:
    """A server that runs, and requests as curl makes them."""

    def __init__(self, port: int, server: Server, process: Process, thread: threading.Thread):
        self.port, self.server, self.process, self.thread = port, server, process, thread
        self.url = f"http://127.0.0.1:{port}"

    def end(self) -> None:
        """What SIGTERM does."""
        with contextlib.suppress(RuntimeError):  # its loop is closed
            self.process.loop.call_soon_threadsafe(self.process.end)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> "Answer":
        """`body`: bytes as they are, anything else as JSON."""
        with self.connect() as s:
            s.sendall(message(method, path, body, **headers))
            return received(s)

    def post(self, path: str, body: Any, **headers: str) -> "Answer":
        return self.ask("POST", path, body, **headers)

    def settled(self, seconds: float = 3.0) -> dict[str, Any]:
        """The engine's numbers when nothing runs any more, or after so many seconds."""
        until = time.monotonic() + seconds
        while (s := self.server.engine.stats())["running"] + s["waiting"] and time.monotonic() < until:
            time.sleep(0.005)
        return s


class Answer:
    """A response: status, headers with names in small letters, body."""

    def __init__(self, data: bytes):
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        self.body = dechunked(body) if self.headers.get("transfer-encoding") == "chunked" else body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[tuple[str | None, Any]]:
        """(its name, its data) of each server-sent event, by the letter of how they are framed."""
        text = self.body.decode()
        assert text.endswith("\n\n")
        found = []
        for block in text[:-2].split("\n\n"):
            lines = block.split("\n")
            name = lines.pop(0).removeprefix("event: ") if lines[0].startswith("event: ") else None
            (data,) = lines
            assert data.startswith("data: ")
            found.append((name, data[6:] if data == "data: [DONE]" else json.loads(data[6:])))
        return found


def message(method: str, path: str, body: Any = None, **headers: str) -> bytes:
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Host": "127.0.0.1", "Connection": "close", "Content-Length": str(len(data))}
    given |= {k.replace("_", "-"): v for k, v in headers.items()}
    head = "".join(f"{k}: {v}\r\n" for k, v in given.items() if v)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def received(s: socket.socket) -> Answer:
    """What comes until the server closes the connection."""
    data = b""
    while chunk := s.recv(65536):
        data += chunk
    return Answer(data)


def dechunked(data: bytes) -> bytes:
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        n = int(size, 16)
        out, data = out + data[:n], data[n + 2 :]
    return out


@torch.inference_mode()
def scores(engine: InferenceEngine, ids: list[int]) -> torch.Tensor:
    """Log-probabilities (T, V) after each token, by the model's own forward."""
    return torch.log_softmax(engine.model(torch.tensor([ids]))[0].float(), -1)
