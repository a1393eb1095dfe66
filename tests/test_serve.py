"""The server as the official clients see it: each line of the two protocols, on a real engine with a tiny model, and on one
whose text is given where the text matters."""

import base64
import hashlib
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from serving import CONTEXT, NAME, Fake, Running, real, scores, served, tokenizer

from etude.serve import tools
from etude.text import chat

HELLO = [{"role": "user", "content": "Say hello."}]
WEATHER = {"name": "get_weather", "description": "of a city", "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False}}  # fmt: skip
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]
CLAUDE_TOOLS: list[Any] = [{"name": "get_weather", "description": "of a city", "input_schema": WEATHER["parameters"]}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    with served(real()) as running:
        yield running


@pytest.fixture(scope="module")
def gpt(tiny: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(tiny: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=tiny.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def said() -> Iterator[tuple[Fake, Running, openai.OpenAI, anthropic.Anthropic]]:
    """An engine whose `say` the test sets, and clients of its server."""
    fake = Fake()
    with (
        served(fake) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as gpt,
        anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0) as claude,
    ):
        yield fake, running, gpt, claude


def lines(answer: Any) -> list[dict[str, Any]]:
    """The chunks of a stream with [DONE] behind them."""
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.events[-1] == (None, "[DONE]")
    return [data for _, data in answer.events[:-1]]


# ---------------------------------------------------------------- OpenAI: chat completions


def test_a_streamed_chat_is_the_chat_that_is_not_streamed(gpt: openai.OpenAI) -> None:
    """Same seed: text, finish, log-probabilities and usage of every choice, put together from the deltas."""
    asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "n": 3, "seed": 5, "max_tokens": 40, "logprobs": True, "top_logprobs": 2}  # fmt: skip
    whole = gpt.chat.completions.create(**asked)
    chunks = list(gpt.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert [c.index for c in whole.choices] == [0, 1, 2] and len({c.message.content for c in whole.choices}) == 3
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk" and whole.object == "chat.completion"
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
        assert mine[-1].delta.model_dump(exclude_unset=True) == {} and mine[-1].finish_reason == choice.finish_reason
        assert all(c.finish_reason is None for c in mine[:-1])
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        probs = [p for c in mine if c.logprobs for p in c.logprobs.content or ()]
        assert [p.bytes for p in probs] == [p.bytes for p in choice.logprobs.content] and choice.message.refusal is None
        # The second time the prompt is cached: the same but for the last bits.
        assert [p.logprob for p in probs] == pytest.approx([p.logprob for p in choice.logprobs.content], abs=1e-3)
        assert all(len(p.top_logprobs) == 2 for p in probs)
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_the_framing_of_a_stream(tiny: Running) -> None:
    """To the byte: an empty line behind each event, [DONE] at the end, usage null before the last chunk, or nowhere."""
    body = {"model": NAME, "messages": HELLO, "max_tokens": 3, "seed": 1, "stream": True}
    chunks = lines(tiny.post("/v1/chat/completions", body | {"stream_options": {"include_usage": True}}))
    assert [c["usage"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    chunks = lines(tiny.post("/v1/chat/completions", body))
    assert not any("usage" in c for c in chunks)
    assert chunks[0]["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]  # fmt: skip
    assert chunks[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]


def test_length_counts_tokens_and_not_chunks(gpt: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        got = gpt.chat.completions.create(model=NAME, messages=HELLO, seed=2, extra_body={name: 7, "ignore_eos": True})
        assert (got.choices[0].finish_reason, got.usage.completion_tokens) == ("length", 7)
    prompt = len(tokenizer().encode(chat.render(tokenizer(), HELLO)))
    assert got.usage.prompt_tokens == prompt
    got = gpt.chat.completions.create(model=NAME, messages=HELLO, extra_body={"ignore_eos": True, "seed": 2.0})
    assert got.usage.total_tokens == CONTEXT  # without a limit: all that the context has room for


def test_log_probabilities_of_a_chat(tiny: Running, gpt: openai.OpenAI) -> None:
    """Against the model's own forward; their bytes make the text."""
    got = gpt.chat.completions.create(
        model=NAME, messages=HELLO, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3
    )
    content = got.choices[0].logprobs.content
    text = b"".join(bytes(t.bytes) for t in content)
    assert text.decode(errors="replace").startswith(got.choices[0].message.content)
    words = tiny.server.engine.tokenizer
    ids = words.encode(chat.render(words, HELLO))
    vocabulary = {bytes(b): i for i, b in reversed(list(enumerate(map(list, tools_bytes()))))}
    for token in content:
        expected = scores(tiny.server.engine, ids)[-1]
        id = int(expected.argmax())
        assert vocabulary[bytes(token.bytes)] == id and token.top_logprobs[0].bytes == token.bytes
        assert token.logprob == pytest.approx(float(expected[id]), abs=1e-4)
        assert [t.logprob for t in token.top_logprobs] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
        ids.append(id)


def tools_bytes() -> list[bytes]:
    from etude.infer.guide import token_bytes

    return token_bytes(tokenizer())


def test_no_half_of_a_character_is_shown(gpt: openai.OpenAI) -> None:
    """Random bytes, streamed: what is shown is text, also at the end."""
    bias = {str(i): 8 for i, b in enumerate(tools_bytes()) if len(b) == 1 and b[0] >= 0xC2}
    kept = {str(i): 8 for i, b in enumerate(tools_bytes()) if len(b) == 1 and 0x80 <= b[0] < 0xC0}
    asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "logit_bias": bias | kept, "max_tokens": 60, "n": 4}
    streamed = gpt.chat.completions.create(**asked, seed=1, stream=True)
    texts = [c.choices[0].delta.content or "" for c in streamed]
    assert any(not t.isascii() for t in texts)
    whole = gpt.chat.completions.create(**asked, seed=1)
    assert sorted("".join(texts)) == sorted("".join(c.message.content for c in whole.choices))
    assert not any(c.message.content.endswith("\ufffd") for c in whole.choices)


def test_a_character_of_several_tokens_comes_whole(said: Any) -> None:
    fake, _, gpt, _ = said
    fake.say = lambda request, choice: "naïve 日本 🙂!"
    got = list(gpt.chat.completions.create(model=NAME, messages=HELLO, stream=True))
    texts = [c.choices[0].delta.content or "" for c in got]
    assert "".join(texts) == "naïve 日本 🙂!" and not any("\ufffd" in t for t in texts)
    whole = gpt.chat.completions.create(model=NAME, messages=HELLO, logprobs=True)
    assert b"".join(bytes(t.bytes) for t in whole.choices[0].logprobs.content).decode() == "naïve 日本 🙂!"
    assert any(t.token.startswith("bytes:\\x") for t in whole.choices[0].logprobs.content)


@pytest.mark.parametrize("stop", [" stop", [" stop", "zzz"], ["top here"]], ids=str)
def test_stop_texts_are_never_shown(said: Any, stop: Any) -> None:
    """Not even their first half; what looked like one is shown in the end; the tokens of a stop text have no
    log-probabilities."""
    fake, _, gpt, _ = said
    fake.say = lambda request, choice: "go on, sto go on stop here"
    first = stop if isinstance(stop, str) else stop[0]
    expected = "go on, sto go on stop here".partition(first)[0]
    asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "stop": stop, "logprobs": True}
    got = gpt.chat.completions.create(**asked).choices[0]
    assert (got.message.content, got.finish_reason) == (expected, "stop")
    shown = b"".join(bytes(t.bytes) for t in got.logprobs.content).decode()
    assert shown.startswith(expected) and len(shown) < len(expected) + 6
    texts = [c.choices[0].delta.content or "" for c in gpt.chat.completions.create(**asked, stream=True)]
    assert "".join(texts) == expected
    fake.say = lambda request, choice: "no more sto"
    assert gpt.chat.completions.create(**asked).choices[0].message.content == "no more sto"


def test_what_is_asked_reaches_the_engine(said: Any) -> None:
    """Every parameter of sampling, under its name."""
    fake, running, gpt, _ = said
    extra = {"top_k": 7, "min_p": 0.05, "repetition_penalty": 1.2}
    gpt.chat.completions.create(model=NAME, messages=HELLO, temperature=0.3, top_p=0.9, presence_penalty=0.1, frequency_penalty=-0.2, logit_bias={"5": -100, "6": 3}, seed=11, n=2, stop="x", max_tokens=9, extra_body=extra)  # fmt: skip
    request = fake.requests[-1]
    s = request.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty) == (0.3, 0.9, 7, 0.05, 1.2)
    assert (s.presence_penalty, s.frequency_penalty, s.logit_bias, s.seed) == (0.1, -0.2, {5: -100, 6: 3}, 11)
    assert (request.n, request.stop, request.max_tokens, s.logprobs) == (2, ("x",), 9, None)
    assert fake.tokenizer.backend.token_to_id("<|im▁end|>") in request.stop_ids
    gpt.chat.completions.create(model=NAME, messages=HELLO)
    assert fake.requests[-1].sampling.temperature == 1.0 and fake.requests[-1].timeout == running.server.request_timeout
    gpt.completions.create(model=NAME, prompt="a")
    assert fake.requests[-1].max_tokens == 16 and not fake.requests[-1].stop_ids
    gpt.chat.completions.create(model=NAME, messages=HELLO)
    assert fake.requests[-1].sampling.seed != fake.requests[0].sampling.seed  # another answer each time


def test_messages_in_all_their_forms(said: Any) -> None:
    """Parts are their texts, a developer is the system, null fields that clients send back are nothing."""
    fake, _, gpt, _ = said

    def prompt(*messages: Any, **more: Any) -> str:
        gpt.chat.completions.create(model=NAME, messages=messages, **more)
        return fake.tokenizer.decode(fake.requests[-1].prompt)

    plain = prompt({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\nthere"})
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    assert prompt({"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}) == plain
    answer = gpt.chat.completions.create(model=NAME, messages=HELLO).choices[0].message
    again = prompt(
        *HELLO, answer.model_dump(), {"role": "user", "content": "again"}, user="me", metadata={"a": "b"}, store=False
    )
    assert "Hello there." in again and again.endswith("assistant\n")


def test_seeds(gpt: openai.OpenAI) -> None:
    def text(**how: Any) -> str:
        return gpt.chat.completions.create(model=NAME, messages=HELLO, max_tokens=20, **how).choices[0].message.content

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text() != text()
    assert text(temperature=0, seed=1) == text(temperature=0, seed=2) == text(top_p=0)


def test_cached_tokens_are_told(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """The second time the prompt's whole pages are found, in both APIs."""
    messages: list[Any] = [{"role": "user", "content": "A rather long message. " * 6}]
    first = gpt.chat.completions.create(model=NAME, messages=messages, max_tokens=1).usage
    second = gpt.chat.completions.create(model=NAME, messages=messages, max_tokens=1).usage
    assert first.prompt_tokens_details.cached_tokens < 16  # the template's beginning
    assert second.prompt_tokens - 17 < second.prompt_tokens_details.cached_tokens < second.prompt_tokens
    third = claude.messages.create(model=NAME, messages=messages, max_tokens=1).usage
    assert third.cache_read_input_tokens == second.prompt_tokens_details.cached_tokens
    assert third.input_tokens + third.cache_read_input_tokens == second.prompt_tokens


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_json(gpt: openai.OpenAI, kind: str) -> None:
    """Of a model that knows no JSON; the text ends where the JSON does, or where the budget does."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}, "warm": {"type": "boolean"}}, "required": ["city", "warm"], "additionalProperties": False}  # fmt: skip
    form: Any = {"type": kind} | ({"json_schema": {"name": "x", "schema": schema, "strict": True}} if kind == "json_schema" else {})  # fmt: skip
    for seed in range(3):
        got = gpt.chat.completions.create(model=NAME, messages=HELLO, response_format=form, seed=seed, max_tokens=400)
        if kind == "json_schema" or got.choices[0].finish_reason == "stop":
            value = json.loads(got.choices[0].message.content)
            assert isinstance(value, dict) and got.choices[0].finish_reason == "stop"
        if kind == "json_schema":
            assert value["city"] in ("Paris", "Rome") and isinstance(value["warm"], bool)
    plain = gpt.chat.completions.create(model=NAME, messages=HELLO, response_format={"type": "text"}, max_tokens=2)
    assert plain.usage.completion_tokens == 2


def test_the_clients_own_helpers(said: Any) -> None:
    """openai's and anthropic's stream(), which check each event themselves."""
    fake, _, gpt, claude = said
    fake.say = lambda request, choice: "one two three four five six seven eight nine ten"
    with gpt.chat.completions.stream(model=NAME, messages=HELLO, seed=1, tools=TOOLS) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop" and final.choices[0].message.content == fake.say(None, 0)
    with claude.messages.stream(model=NAME, messages=[{"role": "user", "content": "Hi"}], max_tokens=9) as events:
        text = "".join(events.text_stream)
        message = events.get_final_message()
    assert message.content[0].text == text and message.usage.output_tokens == 9 and message.stop_reason == "max_tokens"


# ---------------------------------------------------------------- tools


def test_tools_in_a_chat(said: Any) -> None:
    """Text, then calls, streamed and not; the calls' results go back in the template's form."""
    fake, _, gpt, _ = said
    fake.say = lambda request, choice: f"Let me see.\n{CALL}\n{CALL.replace('Paris', 'Rome')}\n"
    asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "tools": TOOLS}
    choice = gpt.chat.completions.create(**asked).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    calls = choice.message.tool_calls
    assert [json.loads(c.function.arguments)["city"] for c in calls] == ["Paris", "Rome"]
    assert len({c.id for c in calls}) == 2 and all(c.type == "function" for c in calls)
    assert '"description": "of a city"' in fake.tokenizer.decode(fake.requests[-1].prompt)

    chunks = [c.choices[0] for c in gpt.chat.completions.create(**asked, stream=True)]
    assert "".join(c.delta.content or "" for c in chunks) == "Let me see." and chunks[-1].finish_reason == "tool_calls"
    deltas = [d for c in chunks for d in c.delta.tool_calls or ()]
    for i, call in enumerate(calls):
        mine = [d for d in deltas if d.index == i]
        assert mine[0].id and mine[0].function.name == "get_weather" and not any(d.id for d in mine[1:])
        assert "".join(d.function.arguments for d in mine) == call.function.arguments

    results = [{"role": "tool", "tool_call_id": c.id, "content": "12 degrees"} for c in calls]
    fake.say = lambda request, choice: "Cold."
    again = gpt.chat.completions.create(
        model=NAME, messages=[*HELLO, choice.message.model_dump(), *results], tools=TOOLS
    )
    prompt = fake.tokenizer.decode(fake.requests[-1].prompt)
    assert prompt.count("<tool_response>12 degrees</tool_response>") == 2 and '{"city": "Paris"}' in prompt
    assert (again.choices[0].message.content, again.choices[0].finish_reason) == ("Cold.", "stop")


def test_what_is_no_call_is_text(said: Any) -> None:
    """Of an unknown tool, broken, without tools or with tool_choice none."""
    fake, _, gpt, _ = said
    for text, how in ((CALL.replace("get_weather", "other"), {"tools": TOOLS}), ("<tool_call>oh</tool_call>", {"tools": TOOLS}), (CALL, {"tools": TOOLS, "tool_choice": "none"}), (CALL, {})):  # fmt: skip
        fake.say = lambda request, choice, text=text: text
        got = gpt.chat.completions.create(model=NAME, messages=HELLO, **how).choices[0]
        assert (got.message.content, got.message.tool_calls, got.finish_reason) == (text, None, "stop")


def test_one_call_at_a_time(said: Any) -> None:
    fake, _, gpt, claude = said
    fake.say = lambda request, choice: CALL + CALL
    got = gpt.chat.completions.create(model=NAME, messages=HELLO, tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert len(got.message.tool_calls) == 1 and got.finish_reason == "tool_calls"
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    message = claude.messages.create(model=NAME, messages=HELLO, max_tokens=200, tools=CLAUDE_TOOLS, tool_choice=choice)
    assert [b.type for b in message.content] == ["tool_use"] and message.stop_reason == "tool_use"


def test_a_call_that_must_come(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """Of a model that knows nothing of tools: required and named, in both APIs."""
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        got = gpt.chat.completions.create(model=NAME, messages=HELLO, tools=TOOLS, tool_choice=choice, seed=1).choices[
            0
        ]
        assert got.finish_reason == "tool_calls" and got.message.content is None
        assert json.loads(got.message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")
    other: Any = [*CLAUDE_TOOLS, {"name": "other", "input_schema": {"type": "object"}}]
    message = claude.messages.create(model=NAME, messages=HELLO, max_tokens=200, tools=other, tool_choice={"type": "tool", "name": "get_weather"})  # fmt: skip
    assert message.stop_reason == "tool_use" and message.content[0].input["city"] in ("Paris", "Rome")


def test_tools_in_messages(said: Any) -> None:
    """Anthropic's events of a text and two calls, what its client makes of them, and results on their way back."""
    fake, running, _, claude = said
    fake.say = lambda request, choice: f"Let me see.\n{CALL}\n{CALL.replace('Paris', 'Rome')}\n"
    asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": 200, "tools": CLAUDE_TOOLS}
    whole = claude.messages.create(**asked)
    assert [b.type for b in whole.content] == ["text", "tool_use", "tool_use"] and whole.stop_reason == "tool_use"
    assert [b.input for b in whole.content[1:]] == [{"city": "Paris"}, {"city": "Rome"}]
    with claude.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert [(b.type, getattr(b, "input", None), getattr(b, "text", None)) for b in final.content] == [
        (b.type, getattr(b, "input", None), getattr(b, "text", None)) for b in whole.content
    ]
    names = [n for n, _ in running.post("/v1/messages", asked | {"stream": True}).events if n != "content_block_delta"]
    assert names == ["message_start", "content_block_start", "ping", "content_block_stop", *["content_block_start", "content_block_stop"] * 2, "message_delta", "message_stop"]  # fmt: skip
    results: Any = [{"type": "tool_result", "tool_use_id": b.id, "content": [{"type": "text", "text": "12"}]} for b in whole.content[1:]]  # fmt: skip
    back: Any = [*HELLO, {"role": "assistant", "content": [b.model_dump(exclude_none=True) for b in whole.content]}]
    claude.messages.create(
        **asked | {"messages": [*back, {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]}]}
    )
    prompt = fake.tokenizer.decode(fake.requests[-1].prompt)
    assert (
        prompt.count("<tool_response>12</tool_response>") == 2 and prompt.count("<tool_call>") == 2 and "So?" in prompt
    )


def test_arguments_that_the_budget_cuts(said: Any) -> None:
    """What is there of them, as Anthropic's client reads a stream that ends in them."""
    fake, _, _, claude = said
    fake.say = lambda request, choice: '<tool_call>{"name": "get_weather", "arguments": {"a": 1, "city": "Par'
    n = len(fake.tokenizer.encode(fake.say(None, 0)))
    asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": n, "tools": CLAUDE_TOOLS}
    got = claude.messages.create(**asked)
    assert (got.stop_reason, got.content[0].input["a"]) == ("max_tokens", 1)
    with claude.messages.stream(**asked) as stream:
        assert stream.get_final_message().content[0].input["a"] == 1


TEXTS = [
    f"a {CALL} b\n{CALL}",
    'x<tool_call>{"arguments": {"s": "a \\"}</tool_call>\\" }"}, "name": "f"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"s": "} \\\\", "t": [{"u": "</tool_call>"}]}}\n</tool_call>tail ',
    '<tool_call>{"name": "f"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
    "<tool_call>{]</tool_call> and <tool_cal <tool_call",
    '  <tool_call>{"name": "f", "arguments": {"a": [1, {"b": 2}]}}',
    "no call <b>at all</b>  \n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_calls_are_read_alike_in_any_pieces(text: str) -> None:
    """The same text, calls and arguments, however the text comes; no part of a call is shown as text before."""

    def read(pieces: list[str]) -> tuple[str, list[list[str]]]:
        reader = tools.Reader({"f", "get_weather"})
        shown, calls = "", []
        for i, piece in enumerate(pieces):
            for event in reader.push(piece, last=i + 1 == len(pieces)):
                if isinstance(event, tools.Text):
                    shown += event.text
                elif isinstance(event, tools.Call):
                    assert event.number == len(calls)
                    calls.append([event.name, ""])
                else:
                    calls[event.number][1] += event.text
        return shown, calls

    expected = read([text])
    assert read(list(text)) == expected
    rng = random.Random(0)
    for _ in range(50):
        cuts = sorted(rng.sample(range(len(text)), rng.randint(0, 5)))
        assert read([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]) == expected
    for name, arguments in expected[1]:
        assert name in ("f", "get_weather") and isinstance(json.loads(arguments), dict)


def test_what_is_read_of_calls() -> None:
    """Spelled out once, so that the test above cannot agree with itself alone."""
    reader = tools.Reader({"f"})
    events = reader.push(TEXTS[2], last=True)
    assert events == [tools.Call(0, "f"), tools.Arguments(0, '{"s": "} \\\\", "t": [{"u": "</tool_call>"}]}'), tools.Text("tail")]  # fmt: skip
    assert tools.Reader({"f"}).push(TEXTS[5], last=True) == [tools.Text("<tool_call>{]</tool_call>"), tools.Text(" and <tool_cal <tool_call")]  # fmt: skip
    assert tools.Reader({"g"}).push("<tool_call>{]", last=True) == [tools.Text("<tool_call>{]")]


# ---------------------------------------------------------------- OpenAI: completions, models


def test_prompts_in_all_their_forms(gpt: openai.OpenAI) -> None:
    """A text, texts, ids, lists of ids, with the choice's index = prompt * n + j, and what each says alone."""
    a, b = tokenizer().encode("one two"), tokenizer().encode("def three")

    def texts(prompt: Any, **more: Any) -> list[str]:
        got = gpt.completions.create(model=NAME, prompt=prompt, temperature=0.7, seed=9, **more)
        assert got.object == "text_completion" and [c.index for c in got.choices] == list(range(len(got.choices)))
        return [c.text for c in got.choices]

    alone = texts("one two", n=2) + texts("def three", n=2)
    assert texts(["one two", "def three"], n=2) == texts([a, b], n=2) == alone
    assert texts(a, n=2) == alone[:2] and len(set(alone)) == 4
    streamed = gpt.completions.create(model=NAME, prompt=[a, b], n=2, temperature=0.7, seed=9, stream=True)
    parts: dict[int, str] = {}
    for chunk in streamed:
        parts[chunk.choices[0].index] = parts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert [parts[i] for i in range(4)] == alone


def test_echo_with_log_probabilities(tiny: Running, gpt: openai.OpenAI) -> None:
    """The prompt's tokens first, the first with null, the others as the model's own forward has them."""
    text = "one two three"
    ids = tokenizer().encode(text)
    asked: dict[str, Any] = {"model": NAME, "prompt": text, "temperature": 0, "max_tokens": 4, "logprobs": 2}
    for how in ({"echo": True}, {"echo": True, "max_tokens": 0}, {}):
        got = gpt.completions.create(**asked | how)
        choice, n = got.choices[0], how.get("max_tokens", 4)
        assert got.usage.completion_tokens == n and got.usage.prompt_tokens == len(ids)
        assert choice.text.startswith(text) == bool(how) and choice.finish_reason == "length"
        probs = choice.logprobs
        assert len(probs.tokens) == len(probs.token_logprobs) == len(probs.top_logprobs) == len(probs.text_offset)
        assert len(probs.tokens) == n + (len(ids) if how else 0)
        if not how:
            continue
        assert probs.token_logprobs[0] is None and probs.top_logprobs[0] is None
        expected = scores(tiny.server.engine, ids)
        for i, id in enumerate(ids[1:], 1):
            assert probs.token_logprobs[i] == pytest.approx(float(expected[i - 1, id]), abs=1e-4)
            assert max(probs.top_logprobs[i].values()) == pytest.approx(float(expected[i - 1].max()), abs=1e-4)
        assert "".join(probs.tokens[: len(ids)]) == text
        assert [text[o:].startswith(t) for o, t in zip(probs.text_offset, probs.tokens[: len(ids)])] == [True] * len(
            ids
        )
    streamed = list(gpt.completions.create(**asked, echo=True, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == gpt.completions.create(**asked, echo=True).choices[0].text
    whole = gpt.completions.create(**asked, echo=True).choices[0].logprobs
    assert [t for c in streamed for t in c.choices[0].logprobs.tokens] == whole.tokens


def test_models(gpt: openai.OpenAI, claude: anthropic.Anthropic, tiny: Running) -> None:
    assert [m.id for m in gpt.models.list()] == [NAME] == [m.id for m in claude.models.list()]
    assert gpt.models.retrieve(NAME).object == "model" and claude.models.retrieve(NAME).type == "model"
    with pytest.raises(openai.NotFoundError) as theirs:
        gpt.models.retrieve("other")
    assert theirs.value.code == "model_not_found"
    with pytest.raises(anthropic.NotFoundError) as ours:
        claude.models.retrieve("other")
    assert ours.value.body["error"]["type"] == "not_found_error"


# ---------------------------------------------------------------- Anthropic: messages


def test_the_order_of_events(tiny: Running, claude: anthropic.Anthropic) -> None:
    """To the letter, and the same text as without a stream."""
    body = {"model": NAME, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = claude.messages.create(model=NAME, messages=HELLO, max_tokens=12, extra_body={"temperature": 0})
    answer = tiny.post("/v1/messages", body | {"stream": True}, anthropic_version="2023-06-01")
    names = [name for name, _ in answer.events]
    assert all(name == data["type"] for name, data in answer.events)
    deltas = names.count("content_block_delta")
    assert names == ["message_start", "content_block_start", "ping", *["content_block_delta"] * deltas, "content_block_stop", "message_delta", "message_stop"]  # fmt: skip
    data = [d for _, d in answer.events]
    start = data[0]["message"]
    assert (start["content"], start["stop_reason"], start["role"], start["usage"]["output_tokens"]) == ([], None, "assistant", 0)  # fmt: skip
    assert start["usage"]["input_tokens"] + start["usage"]["cache_read_input_tokens"] == whole.usage.input_tokens + whole.usage.cache_read_input_tokens  # fmt: skip
    text = "".join(d["delta"]["text"] for d in data if d["type"] == "content_block_delta")
    assert text == whole.content[0].text and whole.usage.output_tokens == 12
    assert data[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None} and data[-2]["usage"]["output_tokens"] == 12  # fmt: skip
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


def test_stop_reasons(said: Any) -> None:
    fake, _, _, claude = said
    fake.say = lambda request, choice: "one two three"
    asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": 50}
    got = claude.messages.create(**asked)
    assert (got.stop_reason, got.stop_sequence, got.content[0].text) == ("end_turn", None, "one two three")
    got = claude.messages.create(**asked, stop_sequences=["zz", " three"])
    assert (got.stop_reason, got.stop_sequence, got.content[0].text) == ("stop_sequence", " three", "one two")
    fake.say = lambda request, choice: ""
    got = claude.messages.create(**asked)
    assert (got.stop_reason, got.content[0].text) == ("end_turn", "")


def test_what_messages_become(said: Any) -> None:
    """System as a text or as blocks, all of them; blocks of text; an answer that goes on with its beginning."""
    fake, _, _, claude = said

    def prompt(**asked: Any) -> str:
        claude.messages.create(**{"model": NAME, "max_tokens": 5, "messages": HELLO} | asked)
        count = claude.messages.count_tokens(**{"model": NAME, "messages": HELLO} | {k: v for k, v in asked.items() if k in ("messages", "system")})  # fmt: skip
        assert count.input_tokens == len(fake.requests[-1].prompt)
        return fake.tokenizer.decode(fake.requests[-1].prompt)

    blocks = [
        {"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Two."},
    ]
    assert prompt(system=blocks) == prompt(system="One.\nTwo.") != prompt()
    assert "One.\nTwo." in prompt(system=blocks)
    assert prompt(messages=[{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]) == prompt()
    assert prompt(messages=[*HELLO, {"role": "assistant", "content": "Hel"}]) == prompt() + "Hel"
    how = {"temperature": 0.5, "top_p": 0.8, "top_k": 4}  # which this client no longer names itself
    claude.messages.create(model=NAME, max_tokens=5, messages=HELLO, metadata={"user_id": "x"}, extra_body=how)
    s = fake.requests[-1].sampling
    assert (s.temperature, s.top_p, s.top_k) == (0.5, 0.8, 4)


# ---------------------------------------------------------------- beside the two APIs


def test_tokens_there_and_back(tiny: Running) -> None:
    got = tiny.post("/tokenize", {"prompt": "def one 日"}).json
    assert got["tokens"] == tokenizer().encode("def one 日") and got["count"] == len(got["tokens"])
    assert tiny.post("/detokenize", {"tokens": got["tokens"]}).json == {"prompt": "def one 日"}
    got = tiny.post("/tokenize", {"messages": HELLO, "model": NAME}).json
    assert got["tokens"] == tokenizer().encode(chat.render(tokenizer(), HELLO)) and got["max_model_len"] == CONTEXT
    for body in ({}, {"prompt": "a", "messages": HELLO}):
        assert tiny.post("/tokenize", body).json["error"]["param"] == "prompt"
    assert tiny.post("/detokenize", {"tokens": [10**6]}).json["error"]["param"] == "tokens"


def test_health_and_metrics(tiny: Running, gpt: openai.OpenAI) -> None:
    """Tokens of requests show in the metrics, in Prometheus' format as its own parser reads it."""
    from prometheus_client.parser import text_string_to_metric_families

    def read() -> dict[str, float]:
        answer = tiny.ask("GET", "/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        families = text_string_to_metric_families(answer.body.decode())
        return {" ".join([s.name, *sorted(s.labels.values())]): s.value for f in families for s in f.samples}

    health = tiny.ask("GET", "/health")
    assert (health.status, health.json["status"], health.json["model"]) == (200, "ok", NAME)
    before = read()
    got = gpt.completions.create(model=NAME, prompt="one two", max_tokens=8, n=2, seed=1).usage
    after = read()
    changed = {k: after[k] - before.get(k, 0) for k in after}
    assert changed["etude_prompt_tokens_total"] == got.prompt_tokens
    assert changed["etude_completion_tokens_total"] == got.completion_tokens
    assert changed["etude_time_to_first_token_seconds_count"] == 1
    assert changed["etude_inter_token_seconds_count"] == got.completion_tokens - 2
    assert changed["etude_requests_total /v1/completions 200"] == 1
    assert after["etude_pages_free"] + after["etude_pages_cached"] == after["etude_pages"]
    assert after["etude_queue"] == after["etude_running"] == after["etude_pages_used"] == 0
    assert after["etude_prefix_query_tokens_total"] > 0


def test_the_page_and_its_policy(tiny: Running) -> None:
    """Only the scripts and styles that the page has may run, and only this server may be asked."""
    answer = tiny.ask("GET", "/")
    policy = answer.headers["content-security-policy"]
    assert answer.status == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    rules = dict(r.strip().split(" ", 1) for r in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'" and "unsafe" not in policy
    for tag in ("script", "style"):
        texts = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", answer.body.decode(), re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
        assert texts and rules[f"{tag}-src"].split() == [f"'sha256-{d}'" for d in digests]


def test_request_ids(tiny: Running) -> None:
    """The client's own, where it is one, on answers and errors alike."""
    assert tiny.ask("GET", "/health", X_Request_Id="mine-1").headers["x-request-id"] == "mine-1"
    assert tiny.ask("GET", "/nothing", X_Request_Id="mine-2").headers["x-request-id"] == "mine-2"
    made = [tiny.ask("GET", "/health", X_Request_Id="no good!").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and all(m.startswith("req_") for m in made)
    error = tiny.post("/v1/messages", {}, X_Request_Id="mine-3").json
    assert error["request_id"] == "mine-3"
