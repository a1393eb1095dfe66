"""OpenAI's API: chat completions and completions, from what is asked to the engine's requests, and from its pieces to answers."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from etude.errors import Refusal
from etude.infer.engine import encode_prompt
from etude.infer.request import Piece, Request
from etude.infer.sampling import Sampling, Token
from etude.serve import tools
from etude.serve.ask import Asked, budget
from etude.serve.errors import ApiError, from_engine
from etude.serve.openai_schema import (
    AssistantMessage,
    ChatRequest,
    Common,
    CompletionRequest,
    JsonFormat,
    NamedTool,
    SchemaFormat,
    TextPart,
    ToolCall,
    ToolMessage,
)
from etude.serve.stream import Stream, sse
from etude.serve.tokens import Aligner, token_bytes, token_text
from etude.text import chat
from etude.text.tokenizer import Tokenizer

# ---------------------------------------------------------------- from what is asked to the engine's requests


def sampling(body: Common, vocab_size: int, logprobs: int | None) -> Sampling:
    """Raises ApiError for a logit_bias outside of the vocabulary."""
    bias = {}
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            message = f"Invalid value for 'logit_bias': {key[:20]!r} is no token id; they go from 0 to {vocab_size - 1}"
            raise ApiError(400, message, "logit_bias")
        bias[int(key)] = value
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=1 if body.top_p == 0 else body.top_k if body.top_k and body.top_k > 0 else None,  # 0, -1: all, as vLLM's
        top_p=body.top_p or None,
        min_p=body.min_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        logprobs=logprobs,
    )


def stops(body: Common) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def check_common(body: Common, max_n: int) -> None:
    if body.n is not None and body.n > max_n:
        raise ApiError(400, f"Invalid value for 'n': at most {max_n} on this server", "n")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "'stream_options' is only allowed when 'stream' is true", "stream_options")


def text_of(content: str | list[Any] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(p.text if isinstance(p, TextPart) else p.refusal for p in content)


def messages_of(messages: list[Any]) -> list[chat.Message]:
    """As templates take them. Raises ApiError."""
    found: list[chat.Message] = []
    for i, m in enumerate(messages):
        content = text_of(m.content)
        message: chat.Message = {"role": "system" if m.role == "developer" else m.role, "content": content}
        if isinstance(m, AssistantMessage):
            if m.content is None and not m.tool_calls:
                raise ApiError(400, f"Missing required parameter: 'messages[{i}].content'", f"messages[{i}].content")
            if m.tool_calls:
                message["tool_calls"] = [_call(c, f"messages[{i}].tool_calls[{j}]") for j, c in enumerate(m.tool_calls)]
        elif isinstance(m, ToolMessage):
            message["tool_call_id"] = m.tool_call_id
        if not isinstance(m, ToolMessage) and m.name is not None:
            message["name"] = m.name
        found.append(message)
    return found


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        at = f"{where}.function.arguments"
        raise ApiError(400, f"Invalid value for '{at}': it should be a JSON object", at)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def asked(body: ChatRequest, tokenizer: Tokenizer) -> Asked:
    """Raises ApiError for what does not go together."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "'top_logprobs' is only allowed when 'logprobs' is true", "top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "'max_tokens' and 'max_completion_tokens' say different things; give one", "max_tokens")
    found = Asked(tokenizer, messages_of(body.messages))
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    choice = "required" if isinstance(body.tool_choice, NamedTool) else body.tool_choice
    if choice not in (None, "none") and not body.tools:
        raise ApiError(400, "'tool_choice' is only allowed when 'tools' are given", "tool_choice")
    functions = [t.function.model_dump(exclude_none=True, exclude={"strict"}) for t in body.tools or ()]
    found.with_tools(functions, choice or "auto", named, body.parallel_tool_calls is not False)
    if isinstance(body.response_format, JsonFormat | SchemaFormat):
        if found.functions:
            raise ApiError(400, "'response_format' and 'tools' cannot be used together", "response_format")
        schema: Any = {"type": "object"}
        if isinstance(body.response_format, SchemaFormat):
            schema = body.response_format.json_schema.schema_ or schema
        found.guide, found.guided_by = {"json": schema}, "response_format"
    return found


def chat_request(body: ChatRequest, found: Asked, prompt: list[int], vocab_size: int, context: int) -> Request:
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Request(
        prompt=prompt,
        sampling=sampling(body, vocab_size, logprobs),
        n=body.n or 1,
        max_tokens=budget(len(prompt), wanted, context, "messages"),
        stop=stops(body) + found.stop,
        stop_ids=frozenset() if body.ignore_eos else found.end_ids(),
        ignore_stop_ids=bool(body.ignore_eos),
        guide=found.guide,
    )


def prompts(body: CompletionRequest, tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """The ids of each prompt. Raises ApiError."""
    given: list[Any] = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt
    found = []
    for prompt in given:
        if isinstance(prompt, str):
            try:
                found.append(encode_prompt(tokenizer, prompt))
            except Refusal as error:
                raise from_engine(error, "prompt") from None
        else:
            if max(prompt) >= vocab_size:
                message = (
                    f"Invalid value for 'prompt': {max(prompt)} is no token id; they go from 0 to {vocab_size - 1}"
                )
                raise ApiError(400, message, "prompt")
            found.append(prompt)
    return found


def echoes(body: CompletionRequest, found: list[list[int]], tokenizer: Tokenizer) -> list[str | None]:
    """What the choices of each prompt begin with."""
    if not body.echo:
        return [None] * len(found)
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    texts = [p for p in given if isinstance(p, str)]
    return [*texts] or [tokenizer.decode(ids) for ids in found]


def completion_requests(
    body: CompletionRequest, found: list[list[int]], vocab_size: int, context: int
) -> list[Request]:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "Invalid value for 'best_of': this server only takes that of 'n'", "best_of")
    wanted = 16 if body.max_tokens is None else body.max_tokens
    if wanted == 0 and not body.echo:
        raise ApiError(400, "Invalid value for 'max_tokens': 0 is only allowed when 'echo' is true", "max_tokens")
    drawn = sampling(body, vocab_size, body.logprobs)
    return [
        Request(
            prompt=prompt,
            sampling=drawn,
            n=body.n or 1,
            max_tokens=budget(len(prompt), max(1, wanted), context, "prompt"),
            stop=stops(body),
            ignore_stop_ids=bool(body.ignore_eos),
            prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        )
        for prompt in found
    ]


# ---------------------------------------------------------------- from the engine's pieces to answers


class Totals:
    """usage"""

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.cached: dict[int, int] = {}  # by request: the samples of one share their prompt

    def add(self, number: int, piece: Piece) -> None:
        self.completion_tokens += len(piece.tokens)
        self.cached.setdefault(number, piece.cached_tokens)

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


class Head:
    """What every chunk of an answer begins with."""

    def __init__(self, kind: str, object: str, model: str):
        self.fields = {"id": f"{kind}-{secrets.token_hex(12)}", "object": object, "created": int(time.time())}
        self.fields["model"] = model

    def chunk(self, choices: list[dict[str, Any]], usage: bool) -> bytes:
        return sse(self.fields | {"choices": choices} | ({"usage": None} if usage else {}))


class ChatSample:
    """One choice of a chat: what a piece adds to it, as deltas; `message` is all of them."""

    def __init__(self, tokenizer: Tokenizer, reader: tools.Reader | None, logprobs: bool):
        self.tokenizer, self.reader = tokenizer, reader
        self.aligner = Aligner(tokenizer) if logprobs else None
        self.content = ""
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish: str | None = None

    def push(self, piece: Piece) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """-> (delta, log-probabilities of the tokens that come with it)."""
        last = piece.finish is not None
        text = piece.text
        probs: list[dict[str, Any]] = []
        if self.aligner is not None:
            tokens = self.aligner.push(text, piece.tokens, piece.finish, piece.stop)
            probs = [self._logprob(t) for t in tokens]
            self.logprobs += probs
        events = [tools.Text(text)] if text else []
        if self.reader is not None:
            events = self.reader.push(text, last)  # type: ignore[assignment]
        for event in events:
            yield self._delta(event), probs
            probs = []
        if probs:
            yield {"content": ""}, probs
        if last:
            self.finish = "tool_calls" if self.calls and piece.finish == "stop" else piece.finish

    def _delta(self, event: tools.Text | tools.Call | tools.Arguments) -> dict[str, Any]:
        if isinstance(event, tools.Text):
            self.content += event.text
            return {"content": event.text}
        if isinstance(event, tools.Call):
            function = {"name": event.name, "arguments": ""}
            self.calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
            return {"tool_calls": [{"index": event.number, **self.calls[-1], "function": dict(function)}]}
        self.calls[event.number]["function"]["arguments"] += event.text
        return {"tool_calls": [{"index": event.number, "function": {"arguments": event.text}}]}

    def _logprob(self, token: Token) -> dict[str, Any]:
        def one(id: int, logprob: float) -> dict[str, Any]:
            data = token_bytes(self.tokenizer, id)
            return {"token": token_text(data), "logprob": finite(logprob), "bytes": list(data)}

        return one(token.id, token.logprob or 0.0) | {"top_logprobs": [one(*pair) for pair in token.top]}

    def choice(self, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.calls:
            message |= {"content": self.content or None, "tool_calls": self.calls}
        probs = None if self.aligner is None else {"content": self.logprobs, "refusal": None}
        return {"index": index, "message": message, "logprobs": probs, "finish_reason": self.finish}


def finite(logprob: float) -> float:
    """JSON has no -inf, which a token of probability 0 has; as OpenAI's -9999."""
    return max(logprob, -9999.0)


# Of `chat_events`, `completion_events` and `failure`, as OpenAPI describes them.
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "a chunk or an error, in JSON; at the end [DONE]"}},
}


async def chat_events(stream: Stream, samples: list[ChatSample], totals: Totals, model: str, usage: bool) -> AsyncIterator[bytes]:  # fmt: skip
    head = Head("chatcmpl", "chat.completion.chunk", model)

    def chunk(index: int, delta: dict[str, Any], probs: list | None = None, finish: str | None = None) -> bytes:
        logprobs = {"content": probs, "refusal": None} if probs else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return head.chunk([choice], usage)

    pieces = await stream.next()
    for index in range(len(samples)):
        yield chunk(index, {"role": "assistant", "content": ""})
    while True:
        if not pieces:
            yield b": still there\n\n"
        for number, piece in pieces:
            totals.add(number, piece)
            for delta, probs in samples[piece.choice].push(piece):
                yield chunk(piece.choice, delta, probs)
            if piece.finish is not None:
                yield chunk(piece.choice, {}, finish=samples[piece.choice].finish)
        if not stream.unfinished:
            break
        pieces = await stream.next()
    if usage:
        yield sse(head.fields | {"choices": [], "usage": totals.usage()})
    yield sse("[DONE]")


async def chat_answer(stream: Stream, samples: list[ChatSample], totals: Totals, model: str) -> dict[str, Any]:
    async with stream:
        while stream.unfinished:
            for number, piece in await stream.next():
                totals.add(number, piece)
                for _ in samples[piece.choice].push(piece):
                    pass
    choices = [s.choice(i) for i, s in enumerate(samples)]
    return Head("chatcmpl", "chat.completion", model).fields | {"choices": choices, "usage": totals.usage()}


class TextSample:
    """One choice of a completion. `echo` is what it begins with, `prompt` its ids; with `nothing` that is all."""

    def __init__(self, tokenizer: Tokenizer, echo: str | None, logprobs: bool, nothing: bool):
        self.tokenizer, self.echo, self.with_logprobs, self.nothing = tokenizer, echo, logprobs, nothing
        self.aligner = Aligner(tokenizer) if logprobs else None
        self.begun, self.offset, self.cut = False, 0, b""
        self.text = ""
        self.logprobs: dict[str, list[Any]] = {
            k: [] for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        self.finish: str | None = None

    def push(self, piece: Piece) -> tuple[str, dict[str, list[Any]] | None]:
        """-> (new text, log-probabilities of the tokens that come with it)."""
        text, tokens = "", []
        if self.echo is not None and not self.begun:
            text, tokens = self.echo, list(piece.prompt_tokens)
        self.begun = True
        drawn = self.aligner.push(piece.text, piece.tokens, piece.finish, piece.stop) if self.aligner else []
        if not self.nothing:
            text, tokens = text + piece.text, tokens + drawn
        self.text += text
        self.finish = ("length" if self.nothing else piece.finish) if piece.finish is not None else None
        if self.aligner is None:
            return text, None
        probs: dict[str, list[Any]] = {k: [] for k in self.logprobs}
        for token in tokens:
            self._add(probs, token)
        for k, values in probs.items():
            self.logprobs[k] += values
        return text, probs

    def _add(self, probs: dict[str, list[Any]], token: Token) -> None:
        data = token_bytes(self.tokenizer, token.id)
        probs["tokens"].append(token_text(data))
        probs["text_offset"].append(self.offset)
        self.cut += data
        shown = self.cut.decode(errors="ignore")
        self.offset += len(shown)
        self.cut = self.cut[len(shown.encode()) :]  # bytes of a character that the next token may complete
        if token.logprob is None:  # the first of a prompt
            probs["token_logprobs"].append(None)
            probs["top_logprobs"].append(None)
            return
        top: dict[str, float] = {}
        for id, logprob in (*token.top, (token.id, token.logprob)):
            name = token_text(token_bytes(self.tokenizer, id))
            top[name] = max(finite(logprob), top.get(name, -9999.0))
        probs["token_logprobs"].append(finite(token.logprob))
        probs["top_logprobs"].append(top)

    def choice(self, index: int) -> dict[str, Any]:
        probs = self.logprobs if self.aligner is not None else None
        return {"index": index, "text": self.text, "logprobs": probs, "finish_reason": self.finish}


async def completion_events(stream: Stream, samples: list[TextSample], n: int, totals: Totals, model: str, usage: bool) -> AsyncIterator[bytes]:  # fmt: skip
    head = Head("cmpl", "text_completion", model)
    while stream.unfinished:
        pieces = await stream.next()
        if not pieces:
            yield b": still there\n\n"
        for number, piece in pieces:
            index = number * n + piece.choice
            sample = samples[index]
            _count(totals, number, piece, sample)
            text, probs = sample.push(piece)
            if text or (probs and probs["tokens"]) or sample.finish:
                choice = {"index": index, "text": text, "logprobs": probs, "finish_reason": sample.finish}
                yield head.chunk([choice], usage)
    if usage:
        yield sse(head.fields | {"choices": [], "usage": totals.usage()})
    yield sse("[DONE]")


async def completion_answer(stream: Stream, samples: list[TextSample], n: int, totals: Totals, model: str) -> dict[str, Any]:  # fmt: skip
    async with stream:
        while stream.unfinished:
            for number, piece in await stream.next():
                sample = samples[number * n + piece.choice]
                _count(totals, number, piece, sample)
                sample.push(piece)
    choices = [s.choice(i) for i, s in enumerate(samples)]
    return Head("cmpl", "text_completion", model).fields | {"choices": choices, "usage": totals.usage()}


def _count(totals: Totals, number: int, piece: Piece, sample: TextSample) -> None:
    totals.add(number, piece._replace(tokens=()) if sample.nothing else piece)


def failure(error: ApiError) -> bytes:
    """What a stream ends with that could not be finished."""
    return sse(error.body(anthropic=False, request_id=""))
