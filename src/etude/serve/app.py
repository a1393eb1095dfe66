"""The HTTP application: routes, keys, errors, and what every response has in common."""

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI
from fastapi import Request as Http
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from etude.errors import Refusal
from etude.infer.engine import encode_prompt
from etude.infer.request import Request
from etude.serve import anthropic, openai
from etude.serve.address import is_loopback
from etude.serve.ask import Asked
from etude.serve.errors import BUG, ApiError, Gone, from_engine, from_validation
from etude.serve.metrics import Metrics, Record
from etude.serve.openai_schema import Answer, ChatCompletion, ChatRequest, Completion, CompletionRequest, Strict
from etude.serve.openai_schema import Message as ChatMessage
from etude.serve.stream import Events, Stream
from etude.serve.tokens import vocabulary

PAGE = Path(__file__).with_name("page.html")
OPEN_PATHS = ("/", "/health")  # without a key: the page asks for it, and what starts servers has none
STEP_LIMIT = 60.0  # seconds without a step, with work to do, after which the server does not call itself healthy
M = TypeVar("M", bound=BaseModel)


@dataclasses.dataclass
class Server:
    """What the routes share. `engine` is None while the model loads."""

    name: str
    keys: list[str] = dataclasses.field(default_factory=list)
    engine: Any = None
    max_body_mb: float = 8.0
    body_timeout: float = 30.0
    request_timeout: float | None = 600.0
    max_n: int = 16
    access_log: bool = True
    draining: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    streams: set[Stream] = dataclasses.field(default_factory=set)  # that are being answered
    answering: int = 0  # requests that were let in before draining

    def __post_init__(self) -> None:
        self.metrics = Metrics(lambda: None if self.engine is None else self.engine.stats())

    @property
    def context(self) -> int:
        """The longest prompt and completion: what the model was made for, or what the cache has pages for."""
        stats = self.engine.stats()
        return min(self.engine.context, stats["pages"] * self.engine.settings.page_size)

    def status(self) -> tuple[str, str]:
        """-> (one word, what it means); "ok" where requests are taken."""
        if self.draining:
            return "draining", "the server is shutting down"
        if self.engine is None:
            return "loading", "the model is being loaded"
        if not self.engine.alive:
            return "dead", "the engine does not work any more; the server has to be started again"
        stats = self.engine.stats()
        if stats["last_step"] > STEP_LIMIT and stats["running"]:
            return "hanging", f"the engine has made no step for {stats['last_step']:.0f} s"
        return "ok", "ready"

    def ready(self) -> Any:
        """The engine. Raises ApiError where there is none to ask."""
        status, why = self.status()
        if status != "ok":
            code = "engine_dead" if status in ("dead", "hanging") else status
            raise ApiError(503, why, code=code, headers={"retry-after": "5"}, close=self.draining)
        return self.engine

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(404, f"there is no model {name[:100]!r} here, only {self.name!r}", "model")

    def stream(self, http: Http, requests: list[Request], guided_by: str | None = None) -> Stream:
        timed = [dataclasses.replace(r, timeout=self.request_timeout) for r in requests]
        record = http.scope["etude.record"]
        record.prompt_tokens = sum(len(r.prompt) for r in requests)
        return Stream(self.engine, timed, http.receive, record, self.streams, guided_by)

    async def read(self, http: Http) -> bytes:
        """The body. Raises ApiError where it is too large, or stops coming."""
        limit = int(self.max_body_mb * 2**20)
        found, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.body_timeout):
                async for chunk in http.stream():
                    size += len(chunk)
                    if size <= limit:
                        found += chunk
                    elif size > 8 * limit:  # some of the rest is read, so that the client comes to hear why
                        break
        except TimeoutError:
            raise ApiError(
                408, f"the request's body was not complete after {self.body_timeout:g} s", close=True
            ) from None
        except ClientDisconnect:
            raise Gone from None
        if size > limit:
            raise ApiError(
                413, f"the body is larger than the {self.max_body_mb:g} MB that this server takes", close=True
            )
        return bytes(found)

    async def parse(self, http: Http, kind: type[M]) -> M:
        body = await self.read(http)
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            raise from_validation(error, body) from None


# ---------------------------------------------------------------- what every response has in common


class Outer:
    """Around the application: the request's id, keys, drain, the log's line, and bugs."""

    def __init__(self, app: ASGIApp, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else f"req_{secrets.token_hex(12)}"
        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
        record = scope["etude.record"] = Record(id, scope["method"], path, self.server.metrics)
        scope["etude.anthropic"] = (
            "anthropic-version" in headers or re.match(r"/v1/messages\b", scope["path"]) is not None
        )

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                named = [(b"x-request-id", id.encode())] + [(b"request-id", id.encode())] * scope["etude.anthropic"]
                closing = [(b"connection", b"close")] if self.server.draining else []
                old = [h for h in message.get("headers", []) if not closing or h[0] != b"connection"]
                message = {**message, "headers": [*old, *named, *closing]}
            await send(message)

        self.server.answering += 1
        try:
            try:
                self._admit(scope["path"], headers, scope["client"])
                await self.app(scope, receive, sending)
            except ApiError as error:
                await answer_error(scope, error)(scope, receive, sending)
        except asyncio.CancelledError:
            record.gone = True
            raise
        except Exception as error:  # the application has answered it
            record.bug(error)
        finally:
            self.server.answering -= 1
            route = getattr(scope.get("route"), "path", "none")
            record.close(route, self.server.access_log)

    def _admit(self, path: str, headers: Headers, client: Any) -> None:
        """Raises ApiError for a wrong key. Without keys only this machine is served: then a name that is not one of its own
        comes from a page elsewhere, whose name somebody pointed here."""
        if not self.server.keys:
            host = headers.get("host", "localhost")
            if not is_loopback(re.sub(r":\d*$", "", host).strip("[]")):
                raise ApiError(403, f"this server answers at localhost alone, not at {host[:100]!r}", code="wrong_host")
            return
        if path in OPEN_PATHS:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in self.server.keys]
        if not any(matches):
            raise ApiError(
                401, "the API key is wrong" if given else "an API key is needed: Authorization: Bearer <key>"
            )


def answer_error(scope: Scope, error: ApiError) -> Response:
    dialect: bool = scope["etude.anthropic"]
    body = error.body(dialect, scope["etude.record"].id)
    return JSONResponse(body, error.http_status(dialect), headers=error.headers)


async def _api_error(http: Http, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return answer_error(http.scope, error)


async def _http_error(http: Http, error: Exception) -> Response:
    """What the router says: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    what = f"{http.method} {http.url.path[:200]}"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return answer_error(
            http.scope, ApiError(405, f"{what} is not allowed, only {allowed}", headers={"allow": allowed})
        )
    return answer_error(http.scope, ApiError(404, f"there is no {what} here"))


async def _gone(http: Http, error: Exception) -> Response:
    http.scope["etude.record"].gone = True
    return Response(status_code=499)


async def _bug(http: Http, error: Exception) -> Response:
    return answer_error(http.scope, ApiError(500, BUG))


# ---------------------------------------------------------------- routes beside the two APIs'


class Health(Answer):
    status: Literal["ok", "loading", "draining", "dead", "hanging"]
    message: str
    model: str
    running: int | None = None
    waiting: int | None = None


class OpenAIModel(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class OpenAIModels(Answer):
    object: Literal["list"]
    data: list[OpenAIModel]


class AnthropicModel(Answer):
    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int
    max_tokens: int


class AnthropicModels(Answer):
    data: list[AnthropicModel]
    has_more: bool
    first_id: str
    last_id: str


class TokenizeRequest(Strict):
    """A text, or a conversation as the model sees it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None


class TokenizeAnswer(Answer):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]


class DetokenizeAnswer(Answer):
    prompt: str


class OpenAIErrorBody(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Answer):
    error: OpenAIErrorBody


class AnthropicErrorBody(Answer):
    type: str
    message: str


class AnthropicError(Answer):
    type: Literal["error"]
    error: AnthropicErrorBody
    request_id: str


BODIES: list[type[BaseModel]] = [
    ChatRequest,
    CompletionRequest,
    anthropic.MessagesRequest,
    anthropic.CountRequest,
    TokenizeRequest,
    DetokenizeRequest,
]
STATUSES = (400, 401, 403, 404, 405, 408, 413, 429, 500, 503, 504, 529)


def _describe(body: type[BaseModel] | None, *answers: type[BaseModel], event: dict | None = None, other: dict | None = None) -> dict[str, Any]:  # fmt: skip
    """What FastAPI is told of a route: it neither reads nor checks the body, but it describes it."""
    error: dict[str, Any] = {"model": AnthropicError | OpenAIError, "description": "an error"}
    good: dict[str, Any] = {"description": "the answer"}
    if answers:
        good["model"] = answers[0] if len(answers) == 1 else answers[0] | answers[1]
    if event is not None:
        good["content"] = {"text/event-stream": {"itemSchema": event}}
    extra: dict[str, Any] = {}
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return {"responses": {200: good} | {s: error for s in STATUSES} | (other or {}), "openapi_extra": extra}


def create_app(server: Server) -> ASGIApp:
    handlers: dict[Any, Callable] = {ApiError: _api_error, HTTPException: _http_error, Gone: _gone, Exception: _bug}
    app = FastAPI(title="Étude", docs_url=None, redoc_url=None, exception_handlers=handlers, redirect_slashes=False)
    app.openapi = lambda: _schema(app, server)  # type: ignore[method-assign]
    _add_openai(app, server)
    _add_anthropic(app, server)
    _add_models(app, server)
    _add_tokens(app, server)
    _add_operations(app, server)
    return Outer(app, server)


def _schema(app: FastAPI, server: Server) -> dict[str, Any]:
    """FastAPI's, with the bodies that it does not read, and with this server's model and context."""
    app.openapi_schema = None
    whole = FastAPI.openapi(app)
    _, bodies = models_json_schema([(b, "validation") for b in BODIES], ref_template="#/components/schemas/{model}")
    known = whole.setdefault("components", {}).setdefault("schemas", {})
    known |= bodies["$defs"]
    for body in BODIES:
        fields = known[body.__name__]["properties"]
        for kind in _kinds(fields["model"], "string"):
            kind["enum"] = [server.name]
        for name in {"max_tokens", "max_completion_tokens"} & fields.keys() if server.engine is not None else ():
            for kind in _kinds(fields[name], "integer"):
                kind["maximum"] = server.context
    return whole


def _kinds(field: dict[str, Any], type: str) -> list[dict[str, Any]]:
    return [kind for kind in field.get("anyOf", [field]) if kind.get("type") == type]


def _add_openai(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions", **_describe(ChatRequest, ChatCompletion, event=openai.EVENT))
    async def chat_completions(http: Http) -> Response:
        engine = server.ready()
        body = await server.parse(http, ChatRequest)
        server.check_model(body.model)
        openai.check_common(body, server.max_n)
        found = openai.asked(body, engine.tokenizer)
        prompt = await asyncio.to_thread(found.prompt)
        request = openai.chat_request(body, found, prompt, engine.vocab_size, server.context)
        stream = server.stream(http, [request], found.guided_by)
        samples = [openai.ChatSample(engine.tokenizer, found.reader(), bool(body.logprobs)) for _ in range(request.n)]
        totals = openai.Totals(len(prompt))
        if not body.stream:
            return JSONResponse(await openai.chat_answer(stream, samples, totals, server.name))
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return Events(openai.chat_events(stream, samples, totals, server.name, usage), openai.failure, stream)

    @app.post("/v1/completions", **_describe(CompletionRequest, Completion, event=openai.EVENT))
    async def completions(http: Http) -> Response:
        engine = server.ready()
        body = await server.parse(http, CompletionRequest)
        server.check_model(body.model)
        openai.check_common(body, server.max_n)
        found = await asyncio.to_thread(openai.prompts, body, engine.tokenizer, engine.vocab_size)
        requests = openai.completion_requests(body, found, engine.vocab_size, server.context)
        if sum(r.n for r in requests) > engine.settings.max_waiting:
            raise ApiError(
                400, f"more prompts and choices than the {engine.settings.max_waiting} that may wait", "prompt"
            )
        stream = server.stream(http, requests)
        n = body.n or 1
        samples = [
            openai.TextSample(engine.tokenizer, echo, body.logprobs is not None, body.max_tokens == 0)
            for echo in openai.echoes(body, found, engine.tokenizer)
            for _ in range(n)
        ]
        totals = openai.Totals(sum(map(len, found)))
        if not body.stream:
            return JSONResponse(await openai.completion_answer(stream, samples, n, totals, server.name))
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return Events(openai.completion_events(stream, samples, n, totals, server.name, usage), openai.failure, stream)


def _add_anthropic(app: FastAPI, server: Server) -> None:
    @app.post("/v1/messages", **_describe(anthropic.MessagesRequest, anthropic.MessageAnswer, event=anthropic.EVENT))
    async def messages(http: Http) -> Response:
        engine = server.ready()
        body = await server.parse(http, anthropic.MessagesRequest)
        server.check_model(body.model)
        found = anthropic.asked(body, engine.tokenizer)
        prompt = await asyncio.to_thread(found.prompt)
        stream = server.stream(http, [anthropic.request(body, found, prompt, server.context)], found.guided_by)
        reply = anthropic.Reply(server.name, len(prompt), found)
        if not body.stream:
            return JSONResponse(await anthropic.answer(stream, reply))
        id = http.scope["etude.record"].id
        return Events(anthropic.events(stream, reply), lambda error: anthropic.failure(error, id), stream)

    @app.post("/v1/messages/count_tokens", **_describe(anthropic.CountRequest, anthropic.CountAnswer))
    async def count_tokens(http: Http) -> Response:
        engine = server.ready()
        body = await server.parse(http, anthropic.CountRequest)
        server.check_model(body.model)
        found = anthropic.asked(body, engine.tokenizer)
        return JSONResponse({"input_tokens": len(await asyncio.to_thread(found.prompt))})


def _add_models(app: FastAPI, server: Server) -> None:
    def described(http: Http) -> dict[str, Any]:
        engine = server.ready()
        if not http.scope["etude.anthropic"]:
            fields = {"id": server.name, "object": "model", "created": server.created, "owned_by": "etude"}
            return fields | {"max_model_len": server.context}
        made = datetime.fromtimestamp(server.created, UTC).isoformat().replace("+00:00", "Z")
        fields = {"type": "model", "id": server.name, "display_name": server.name, "created_at": made}
        return fields | {"lifecycle": "active", "max_input_tokens": engine.context, "max_tokens": server.context}

    @app.get("/v1/models", **_describe(None, OpenAIModels, AnthropicModels))
    async def models(http: Http) -> Response:
        found = [described(http)]
        if http.scope["etude.anthropic"]:
            ends = {"has_more": False, "first_id": server.name, "last_id": server.name}
            return JSONResponse({"data": found} | ends)
        return JSONResponse({"object": "list", "data": found})

    @app.get("/v1/models/{id:path}", **_describe(None, OpenAIModel, AnthropicModel))
    async def model(http: Http, id: str) -> Response:
        server.ready()
        server.check_model(id)
        return JSONResponse(described(http))


def _add_tokens(app: FastAPI, server: Server) -> None:
    @app.post("/tokenize", **_describe(TokenizeRequest, TokenizeAnswer))
    async def tokenize(http: Http) -> Response:
        engine = server.ready()
        body = await server.parse(http, TokenizeRequest)
        if body.model is not None:
            server.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either 'prompt' or 'messages'", "prompt")
        if body.prompt is not None:
            try:
                ids = await asyncio.to_thread(encode_prompt, engine.tokenizer, body.prompt)
            except Refusal as error:
                raise from_engine(error, "prompt") from None
        else:
            asked = Asked(engine.tokenizer, openai.messages_of(body.messages or []))
            ids = await asyncio.to_thread(asked.prompt)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": server.context})

    @app.post("/detokenize", **_describe(DetokenizeRequest, DetokenizeAnswer))
    async def detokenize(http: Http) -> Response:
        engine = server.ready()
        body = await server.parse(http, DetokenizeRequest)
        if body.model is not None:
            server.check_model(body.model)
        size = len(vocabulary(engine.tokenizer))
        if body.tokens and max(body.tokens) >= size:
            raise ApiError(400, f"{max(body.tokens)} is no token id; they go from 0 to {size - 1}", "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(engine.tokenizer.decode, body.tokens)})


def _add_operations(app: FastAPI, server: Server) -> None:
    page = PAGE.read_text(encoding="utf-8")
    policy = _policy(page)
    not_ready = {503: {"model": Health, "description": "not ready, or not any more"}}

    @app.get("/health", **_describe(None, Health, other=not_ready))
    async def health() -> Response:
        status, message = server.status()
        found: dict[str, Any] = {"status": status, "message": message, "model": server.name}
        if status == "ok":
            stats = server.engine.stats()
            found |= {"running": stats["running"], "waiting": stats["waiting"]}
        return JSONResponse(found, 200 if status == "ok" else 503)

    text = {200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, **_describe(None, other=text))
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    html = {200: {"description": "the chat page", "content": {"text/html": {"schema": {"type": "string"}}}}}

    @app.get("/", response_class=HTMLResponse, **_describe(None, other=html))
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=policy)


def _policy(page: str) -> dict[str, str]:
    """Nothing but the page's own script and styles runs, and it talks to this server alone."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
        return " ".join(f"'sha256-{d}'" for d in digests)

    rules = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "content-security-policy": rules,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
