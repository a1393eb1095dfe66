"""Anthropic's API: messages, with the same conversations, tools and engine as OpenAI's."""

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import from_json

from etude.infer.request import Piece, Request
from etude.infer.sampling import Sampling
from etude.serve import tools
from etude.serve.ask import Asked, budget
from etude.serve.errors import ApiError
from etude.serve.openai_schema import WHOLE, Answer, Name, Stops, Strict, Unsupported
from etude.serve.stream import Stream, sse
from etude.text import chat
from etude.text.tokenizer import Tokenizer

# ---------------------------------------------------------------- what is asked for


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: Any = None  # all prompts are cached
    citations: Unsupported = None


Texts = Annotated[list[TextBlock], Field(fail_fast=True)]


class ToolUse(Strict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Any = None
    caller: dict[str, Any] | None = None


class ToolResult(Strict):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Texts | None = None
    is_error: bool | None = None
    cache_control: Any = None


class SystemMessage(Strict):
    role: Literal["system"]
    content: str | Annotated[list[TextBlock], Field(min_length=1, fail_fast=True)]


UserBlock = Annotated[TextBlock | ToolResult, Field(discriminator="type")]


class UserMessage(Strict):
    role: Literal["user"]
    content: str | Annotated[list[UserBlock], Field(min_length=1, fail_fast=True)]


AssistantBlock = Annotated[TextBlock | ToolUse, Field(discriminator="type")]


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantBlock], Field(min_length=1, fail_fast=True)]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class Tool(Strict):
    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: Any = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Strict):
    type: Literal["disabled"]


class Metadata(Strict):
    user_id: str | None = None


class CountRequest(Strict):
    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    system: str | Texts | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: Any = None
    # With an effect that this server does not have.
    output_config: Unsupported = None
    context_management: Unsupported = None
    mcp_servers: Unsupported = None


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, Field(ge=1), WHOLE]
    stop_sequences: Stops | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0), WHOLE] | None = None
    # Without an effect on the answer.
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None
    container: Unsupported = None
    speed: Literal["standard"] | None = None


# ---------------------------------------------------------------- what is answered (for the schema)


class TextAnswer(Answer):
    type: Literal["text"]
    text: str
    citations: None


class ToolUseAnswer(Answer):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Answer):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextAnswer | ToolUseAnswer]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class CountAnswer(Answer):
    input_tokens: int


# ---------------------------------------------------------------- from what is asked to the engine's request


def asked(body: CountRequest, tokenizer: Tokenizer) -> Asked:
    """Raises ApiError for what does not go together."""
    messages: list[chat.Message] = []
    if body.system:
        messages.append({"role": "system", "content": _texts(body.system)})
    for message in body.messages:
        messages += _messages(message)
    last, prefill = messages[-1], ""
    if last["role"] == "assistant" and "tool_calls" not in last:  # the answer goes on with it
        prefill = messages.pop()["content"]
    found = Asked(tokenizer, messages)
    found.prefill = prefill
    functions = [
        {"name": t.name, **({"description": t.description} if t.description else {}), "parameters": t.input_schema}
        for t in body.tools or ()
    ]
    choice = body.tool_choice or ToolChoice(type="auto")
    if choice.type in ("any", "tool") and not functions:
        raise ApiError(400, "'tool_choice' is only allowed when 'tools' are given", "tool_choice")
    if (choice.type == "tool") != (choice.name is not None):
        raise ApiError(400, "'tool_choice.name' belongs to a 'tool_choice' of type 'tool'", "tool_choice.name")
    how = {"auto": "auto", "none": "none"}.get(choice.type, "required")
    found.with_tools(functions, how, choice.name, not choice.disable_parallel_tool_use)
    if prefill and found.forced:
        raise ApiError(
            400, "a 'tool_choice' that forces a tool cannot follow the beginning of an answer", "tool_choice"
        )
    return found


def _texts(content: str | list[Any] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(b.text for b in content if isinstance(b, TextBlock))


def _messages(message: SystemMessage | UserMessage | AssistantMessage) -> Iterator[chat.Message]:
    """One message as templates take them: of an assistant with its calls, of a user each result of a tool before the
    text."""
    blocks: list[Any] = [] if isinstance(message.content, str) else list(message.content)
    uses = [b for b in blocks if isinstance(b, ToolUse)]
    results = [b for b in blocks if isinstance(b, ToolResult)]
    for result in results:
        failed = "Error: " if result.is_error else ""
        yield {"role": "tool", "tool_call_id": result.tool_use_id, "content": failed + _texts(result.content)}
    text = _texts(message.content)
    if not results or text:
        calls = [{"id": u.id, "type": "function", "function": {"name": u.name, "arguments": u.input}} for u in uses]
        yield {"role": message.role, "content": text} | ({"tool_calls": calls} if calls else {})


def request(body: MessagesRequest, found: Asked, prompt: list[int], context: int) -> Request:
    drawn = Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or None,
        top_k=1 if body.top_p == 0 else body.top_k or None,
        seed=secrets.randbits(63),
    )
    return Request(
        prompt=prompt,
        sampling=drawn,
        max_tokens=budget(len(prompt), body.max_tokens, context, "max_tokens"),
        stop=tuple(body.stop_sequences or ()) + found.stop,
        stop_ids=found.end_ids(),
        guide=found.guide,
    )


# ---------------------------------------------------------------- from the engine's pieces to answers


class Reply:
    """The answer as it grows: `push` takes a piece and returns events; `content` is all of them."""

    def __init__(self, model: str, prompt_tokens: int, found: Asked):
        self.model, self.prompt_tokens, self.reader = model, prompt_tokens, found.reader()
        self.inner_stop = found.stop  # not the client's own
        self.id = f"msg_{secrets.token_hex(12)}"
        self.content: list[dict[str, Any]] = []
        self.json = ""  # of the call that is being told
        self.open = False
        self.output_tokens = self.cached = 0
        self.stop_reason: str | None = None
        self.stop_sequence: str | None = None

    def usage(self) -> dict[str, int]:
        return {
            "input_tokens": self.prompt_tokens - self.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self.cached,
            "output_tokens": self.output_tokens,
        }

    def message(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": self.content,
            "stop_reason": self.stop_reason,
            "stop_sequence": self.stop_sequence,
            "usage": self.usage(),
        }

    def push(self, piece: Piece) -> Iterator[dict[str, Any]]:
        last = piece.finish is not None
        self.output_tokens += len(piece.tokens)
        if self.reader is None:
            events: list[Any] = [tools.Text(piece.text)] if piece.text else []
        else:
            events = self.reader.push(piece.text, last)
        for event in events:
            yield from self._event(event)
        if last:
            if not self.content:
                yield from self._event(tools.Text(""))
            yield from self._close()
            self._finish(piece)

    def _event(self, event: tools.Text | tools.Call | tools.Arguments) -> Iterator[dict[str, Any]]:
        if isinstance(event, tools.Call):
            yield from self._close()
            block = {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": event.name, "input": {}}
            yield self._start(block)
        elif isinstance(event, tools.Arguments):
            self.json += event.text
            yield self._delta({"type": "input_json_delta", "partial_json": event.text})
        else:
            if not self.open or self.content[-1]["type"] != "text":
                yield from self._close()
                yield self._start({"type": "text", "text": "", "citations": None})
            self.content[-1]["text"] += event.text
            if event.text:
                yield self._delta({"type": "text_delta", "text": event.text})

    def _start(self, block: dict[str, Any]) -> dict[str, Any]:
        self.content.append(block)
        self.open, self.json = True, ""
        return {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if not self.open:
            return
        if self.content[-1]["type"] == "tool_use":
            self.content[-1]["input"] = _input(self.json)
        self.open = False
        yield {"type": "content_block_stop", "index": len(self.content) - 1}

    def _finish(self, piece: Piece) -> None:
        called = any(b["type"] == "tool_use" for b in self.content)
        if piece.finish == "length":
            self.stop_reason = "max_tokens"
        elif isinstance(piece.stop, str) and piece.stop not in self.inner_stop:
            self.stop_reason, self.stop_sequence = "stop_sequence", piece.stop
        else:
            self.stop_reason = "tool_use" if called else "end_turn"


def _input(text: str) -> dict[str, Any]:
    """A call's arguments; of those that max_tokens cut, what is there, as Anthropic's client reads them."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = from_json(text, allow_partial=True)
        except ValueError:
            value = {}
    return value if isinstance(value, dict) else {}


STAGES = ("start", "delta", "stop")
# Of `events` and `failure`, as OpenAPI describes them.
EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {
            "enum": [*(f"message_{s}" for s in STAGES), *(f"content_block_{s}" for s in STAGES), "ping", "error"]
        },
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"type": "object", "required": ["type"]},
        },
    },
}


def event(data: dict[str, Any]) -> bytes:
    return sse(data, data["type"])


async def events(stream: Stream, reply: Reply) -> AsyncIterator[bytes]:
    pieces = await stream.next()
    while not pieces:
        yield event({"type": "ping"})
        pieces = await stream.next()
    reply.cached = pieces[0][1].cached_tokens
    yield event({"type": "message_start", "message": reply.message() | {"content": []}})
    pinged = False
    while True:
        if not pieces:
            yield event({"type": "ping"})
        for _, piece in pieces:
            for data in reply.push(piece):
                yield event(data)
                if not pinged:  # behind the first content_block_start, where Anthropic has it
                    pinged = True
                    yield event({"type": "ping"})
        if not stream.unfinished:
            break
        pieces = await stream.next()
    delta = {"stop_reason": reply.stop_reason, "stop_sequence": reply.stop_sequence}
    yield event({"type": "message_delta", "delta": delta, "usage": reply.usage()})
    yield event({"type": "message_stop"})


async def answer(stream: Stream, reply: Reply) -> dict[str, Any]:
    async with stream:
        while stream.unfinished:
            for _, piece in await stream.next():
                reply.cached = piece.cached_tokens
                for _ in reply.push(piece):
                    pass
    return reply.message()


def failure(error: ApiError, request_id: str) -> bytes:
    """What a stream ends with that could not be finished."""
    return event(error.body(anthropic=True, request_id=request_id))
