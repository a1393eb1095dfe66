"""From the engine's pieces to an HTTP response: several requests as one stream that ends when the client goes, and
server-sent events."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from etude.errors import EtudeError
from etude.infer.request import Piece, Request
from etude.serve.errors import BUG, ApiError, Gone, from_engine
from etude.serve.metrics import Record

PING = 10.0  # seconds without a piece after which the client hears that the server is still there
GRACE = 2.0  # seconds beyond its time-out that a request has to end by itself


class Stream:
    """The pieces of some requests as they come, in a context that aborts what still runs when it is left."""

    def __init__(
        self,
        engine: Any,
        requests: list[Request],
        receive: Receive,
        record: Record,
        open: set["Stream"],
        guided_by: str | None = None,
    ):
        """`open` holds all streams; `guided_by` names the field that the requests' guide is from."""
        self.engine, self.requests, self.receive, self.record, self.open = engine, requests, receive, record, open
        self.guided_by = guided_by
        self.unfinished = sum(r.n for r in requests)
        self.queue: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()
        timeout = max((r.timeout for r in requests if r.timeout is not None), default=None)
        self.deadline = None if timeout is None else time.monotonic() + timeout + GRACE
        self.tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Stream":
        try:
            for request in self.requests:
                self.engine.admit(request)
        except EtudeError as error:
            raise from_engine(error) from None
        self.tasks = [asyncio.create_task(self._pump(i, r)) for i, r in enumerate(self.requests)]
        self.tasks.append(asyncio.create_task(self._watch()))
        self.open.add(self)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.open.discard(self)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def fail(self, error: Exception) -> None:
        """Let the next `next` raise."""
        self.queue.put_nowait(error)

    async def next(self) -> list[tuple[int, Piece]]:
        """(number of its request, piece) of what came since the last call, at least one; none at all where nothing came for
        PING seconds. Raises ApiError, or Gone when the client went."""
        wait = PING if self.deadline is None else min(PING, self.deadline - time.monotonic())
        found = []
        try:
            if self.queue.empty():
                async with asyncio.timeout(wait):
                    found.append(await self.queue.get())
        except TimeoutError:
            if wait < PING:
                raise ApiError(504, "the request took longer than it may") from None
        while not self.queue.empty():
            found.append(self.queue.get_nowait())
        pieces = []
        for item in found:
            if isinstance(item, Exception):
                raise item
            pieces.append(item)
            self._check(item[1])
        self.record.grew([p for _, p in pieces])
        self.unfinished -= sum(p.finish is not None for _, p in pieces)
        return pieces

    def _check(self, piece: Piece) -> None:
        if piece.finish == "error":
            print(f"{self.record.id}: {piece.error}", file=sys.stderr, flush=True)
            raise ApiError(500, "the model failed on this request; the server's log says why")
        if piece.finish == "timeout":
            raise ApiError(504, "the request took longer than it may")
        if piece.finish == "abort":
            raise ApiError(503, "the request was aborted: the engine is shutting down")

    async def _pump(self, number: int, request: Request) -> None:
        try:
            async with contextlib.aclosing(self.engine.generate_async(request)) as pieces:
                async for piece in pieces:
                    self.queue.put_nowait((number, piece))
        except EtudeError as error:
            self.fail(from_engine(error, self.guided_by))  # what else may be refused was, by `admit`
        except Exception as error:
            self.fail(error)

    async def _watch(self) -> None:
        """The server framework tells a handler of a disconnect only where it asks."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.fail(Gone())


def sse(data: dict[str, Any] | str, event: str | None = None) -> bytes:
    """One event. Line separators that JSON leaves as they are would end it for clients that split at any of them."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for c in ("\x85", "\u2028", "\u2029"):
        text = text.replace(c, f"\\u{ord(c):04x}")
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {text}\n\n".encode()


class Events(Response):
    """Server-sent events, sent one by one. What `events` raises before the first one becomes an error's status, and what it
    raises later one more event, made by `failure`."""

    def __init__(self, events: AsyncIterator[bytes], failure: Callable[[ApiError], bytes], stream: Stream):
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        self.raw_headers = [(k, v) for k, v in self.raw_headers if k not in (b"content-length", b"content-type")]
        self.raw_headers.append((b"content-type", b"text/event-stream"))
        self.events, self.failure, self.stream = events, failure, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.stream, contextlib.aclosing(self.events):  # type: ignore[type-var]
            event: bytes | None = await anext(self.events)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                while event is not None:
                    await self._send(send, event, more=True)
                    event = await self._following()
                await self._send(send, b"", more=False)
            except (Gone, TimeoutError):
                self.stream.record.gone = True

    async def _send(self, send: Send, body: bytes, more: bool) -> None:
        """A client that reads nothing does not keep its connection for ever. Raises TimeoutError."""
        deadline = self.stream.deadline
        async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
            await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _following(self) -> bytes | None:
        """The next event, None behind the last."""
        try:
            return await anext(self.events, None)
        except Gone:
            raise
        except ApiError as error:
            self.stream.record.error = error.message
            return self.failure(error)
        except Exception as error:
            self.stream.record.bug(error)
            return self.failure(ApiError(500, BUG))
