"""The process that serves: it listens while the model loads, and when it is told to end, it lets requests finish."""

import asyncio
import logging
import os
import socket
import threading
import time
from types import FrameType
from typing import Any, NoReturn

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from etude.serve.address import url_of
from etude.serve.app import Server, create_app
from etude.serve.errors import ApiError

LAST = 2  # seconds that connections have to close when nothing runs any more
QUIET = 30.0  # seconds in which a new connection has to send the head of a request


class Protocol(H11Protocol):
    """HTTP whose clients do not keep connections on which they send no request, or half the head of one."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.quiet = self.loop.call_later(QUIET, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None:
            self.quiet.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self.quiet.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.cycle is None:
            self.transport.close()


class Process(uvicorn.Server):
    """uvicorn with our way to end. SIGTERM or Ctrl-C: new requests are answered with 503, running ones have
    `drain_seconds`, then they are aborted. A second signal: at once."""

    def __init__(self, server: Server, drain_seconds: float):
        config = uvicorn.Config(
            create_app(server),
            http=Protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="critical",  # the application logs itself
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=LAST,
        )
        super().__init__(config)
        self.server, self.drain_seconds = server, drain_seconds
        self.loop: asyncio.AbstractEventLoop | None = None
        self.signalled = False
        self.ending: asyncio.Task[None] | None = None
        self.failed: BaseException | None = None  # what loading raised

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.signalled or self.loop is None:
            leave()
        self.signalled = True
        self.loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """Begin to drain. To be called in the event loop."""
        if not self.server.draining:
            self.server.draining = True
            self.ending = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        until = time.monotonic() + self.drain_seconds
        while self.server.answering and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for stream in list(self.server.streams):
            stream.fail(
                ApiError(503, "the server was shut down before the request was done", code="draining", close=True)
            )
        self.should_exit = True


def listen(cfg: dict, name: str, keys: list[str], template: str | None, listener: socket.socket) -> int:
    """-> exit code. Raises what loading the model raised."""
    limits = {k: cfg[k] for k in ("max_body_mb", "body_timeout", "request_timeout", "max_n", "access_log")}
    server = Server(name, keys, **limits)
    process = Process(server, cfg["drain_seconds"])
    threading.Thread(target=_load, args=(cfg, template, process, listener), name="etude-load", daemon=True).start()
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each client that goes in the middle of an answer
    asyncio.run(process.serve(sockets=[listener]))
    if process.failed is not None:
        raise process.failed
    if server.engine is None:  # still loading
        leave()
    server.engine.shutdown(5.0)
    return 0


def leave() -> NoReturn:
    """End the process now, without waiting for threads that nobody can end."""
    os._exit(0)


def _load(cfg: dict, template: str | None, process: Process, listener: socket.socket) -> None:
    server, begun, url = process.server, time.monotonic(), url_of(listener)
    try:
        engine = load_engine(cfg, template)
        engine.start()
        server.engine = engine
    except BaseException as error:
        process.failed, process.should_exit = error, True
        return
    seconds = time.monotonic() - begun
    print(f"{server.name} is ready at {url} (context {server.context} tokens, loaded in {seconds:.1f} s)", flush=True)


def load_engine(cfg: dict, template: str | None) -> Any:
    from etude.infer.load import load
    from etude.parallel import cores, pick_device, settle
    from etude.serve.tokens import vocabulary
    from etude.text import chat

    settle(cfg["threads"] or cores())
    engine = load(cfg["ckpt"], pick_device(cfg["device"]), cfg["dtype"], cfg["trusted"], cfg["engine"], context=0)
    if template is not None:
        engine.tokenizer.template = template
        chat.render(engine.tokenizer, [{"role": "user", "content": "a"}])  # refused now rather than at each request
    vocabulary(engine.tokenizer)  # takes a moment
    return engine
