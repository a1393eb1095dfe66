"""What the server does with bad input, wrong keys, clients that go or dawdle, more than it can take, an engine that fails,
and its own end."""

import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import forked
import openai
import pytest
from conftest import ROOT
from running import environment
from serving import CONTEXT, NAME, Answer, Fake, Running, message, real, received, served
from test_model import made

from etude.errors import Refusal
from etude.serve import address, start
from etude.text import tokenizer as tok

HI: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"model": NAME, "messages": HI},
    TEXT: {"model": NAME, "prompt": "Hi"},
    MESSAGES: {"model": NAME, "messages": HI, "max_tokens": 5},
}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with served(Fake(), body_timeout=1.0, max_body_mb=0.25) as r:
        yield r


def error_of(answer: Answer, anthropic_shape: bool) -> dict[str, Any]:
    """The error's object; the body has the API's shape and nothing else."""
    body = answer.json
    if anthropic_shape:
        assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
        assert set(body["error"]) == {"type", "message"} and body["request_id"] == answer.headers["x-request-id"]
    else:
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and "\n" not in body["error"]["message"]
    return body["error"]


# ---------------------------------------------------------------- bad input

TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_CHAT: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "Hi", "color": 1}]}, "messages[0].color"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]}]}, "messages[0].tool_calls[0].function.arguments"),
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"n": 1.5}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"1": -101}}, "logit_bias.1"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"word": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": True}}, "stream_options.x"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object"}, "tools": [TOOL]}, "response_format"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "no good!"}}]}, "tools[0].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"best_of_all": 1}, "best_of_all"),
]  # fmt: skip
BAD_TEXT: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": ["a"] * 51, "n": 2}, "prompt"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": HI}, "messages"),
    ({"echo": "yes"}, "echo"),
]
BAD_MESSAGES: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": None}, None),
    ({"messages": []}, None),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, None),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, None),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]}, None),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]}, None),
    ({"max_tokens": None}, None),
    ({"max_tokens": 0}, None),
    ({"max_tokens": "5"}, None),
    ({"temperature": 1.1}, None),
    ({"top_p": 2}, None),
    ({"top_k": -1}, None),
    ({"stop_sequences": ["a", "b", "c", "d", "e"]}, None),
    ({"stop_sequences": "a"}, None),
    ({"system": [{"type": "image"}]}, None),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, None),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, None),
    ({"tool_choice": {"type": "any"}}, None),
    ({"tool_choice": {"type": "tool", "name": "g"}, "tools": [{"name": "f", "input_schema": {}}]}, None),
    ({"mcp_servers": []}, None),
    ({"what": 1}, None),
]
BAD = [
    (path, *case) for path, cases in ((CHAT, BAD_CHAT), (TEXT, BAD_TEXT), (MESSAGES, BAD_MESSAGES)) for case in cases
]


@pytest.mark.parametrize("path,change,param", BAD, ids=lambda v: json.dumps(v)[:60])
def test_bad_input_is_a_400_that_names_the_field(running: Running, path: str, change: dict, param: str | None) -> None:
    """Each row of the table, in the API's own shape."""
    answer = running.post(
        path, {k: v for k, v in (BASE[path] | change).items() if v is not None or k not in BASE[path]}
    )
    assert answer.status == 400, answer.body
    error = error_of(answer, path == MESSAGES)
    assert error["type"] == "invalid_request_error"
    if path != MESSAGES:
        assert error["param"] == param, error
    assert running.post(path, BASE[path]).status == 200  # the same without the change


BODIES = [b"", b"{", b"null", b"[]", b'"a"', b"3", b'{"model": NaN}', b"\xff\xfe", b'{"a":' * 5000, b"[" * 100_000, b'{"model": "\\ud800"}', b'{"n": 1e999}']  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda b: repr(b[:20]))
@pytest.mark.parametrize("path", [*BASE, "/tokenize", "/detokenize", "/v1/messages/count_tokens"])
def test_bodies_that_are_no_requests(running: Running, path: str, body: bytes) -> None:
    answer = running.post(path, body)
    assert answer.status == 400 and error_of(answer, path.startswith(MESSAGES))["type"] == "invalid_request_error"


def test_the_context_is_kept(running: Running) -> None:
    """Prompt and max_tokens together, before anything is computed; the code is what clients look for."""
    for path, change in ((CHAT, {"max_tokens": CONTEXT}), (TEXT, {"max_tokens": CONTEXT}), (MESSAGES, {"max_tokens": CONTEXT}), (TEXT, {"prompt": "a b " * CONTEXT}), (CHAT, {"messages": [{"role": "user", "content": "a b " * CONTEXT}]})):  # fmt: skip
        answer = running.post(path, BASE[path] | change)
        error = error_of(answer, path == MESSAGES)
        assert answer.status == 400 and str(CONTEXT) in error["message"]
        assert path == MESSAGES or error["code"] == "context_length_exceeded"


def test_models_and_routes_that_are_not_there(running: Running) -> None:
    for path in BASE:
        answer = running.post(path, BASE[path] | {"model": "gpt-9"})
        error = error_of(answer, path == MESSAGES)
        assert answer.status == 404
        assert error["type"] == "not_found_error" if path == MESSAGES else error["code"] == "model_not_found"
    for method, path in (
        ("GET", "/v1/models/gpt-9"),
        ("POST", "/v1/embeddings"),
        ("GET", "/etc/passwd"),
        ("GET", "/%00"),
    ):
        answer = running.ask(method, path)
        assert answer.status == 404 and error_of(answer, False)["code"] == "model_not_found"
        answer = running.ask(method, path, Anthropic_Version="2023-06-01")
        assert answer.status == 404 and error_of(answer, True)["type"] == "not_found_error"
    assert error_of(running.ask("GET", "/v1/messages/batches"), True)["type"] == "not_found_error"


def test_wrong_methods(running: Running) -> None:
    for method, path in (("GET", CHAT), ("GET", MESSAGES), ("POST", "/health"), ("DELETE", "/v1/models")):
        answer = running.ask(method, path)
        assert answer.status == 405 and answer.headers["allow"] in ("POST", "GET")
        error_of(answer, path == MESSAGES)


def test_a_template_without_tools_says_so() -> None:
    with served(Fake(tools=False)) as r:
        answer = r.post(CHAT, BASE[CHAT] | {"tools": [TOOL]})
        assert answer.status == 400 and "does not support tools" in error_of(answer, False)["message"]
        assert error_of(answer, False)["param"] == "tools"
        answer = r.post(MESSAGES, BASE[MESSAGES] | {"tools": [{"name": "f", "input_schema": {}}]})
        assert answer.status == 400 and "does not support tools" in error_of(answer, True)["message"]
        answer = r.post(CHAT, BASE[CHAT] | {"messages": [*HI, {"role": "tool", "tool_call_id": "1", "content": "x"}]})
        assert answer.status == 400 and error_of(answer, False)["param"] == "messages"


def test_refusals_of_a_template_and_of_a_guide() -> None:
    """What only the model's parts can refuse is a 400 as well, on the real engine."""
    engine = real()
    engine.tokenizer = tok.bpe(["some words"], [], vocab_size=300)
    engine.tokenizer.template = "{{ raise_exception('only the user may speak') }}"
    with served(engine) as r:
        answer = r.post(CHAT, BASE[CHAT])
        assert answer.status == 400 and "only the user may speak" in error_of(answer, False)["message"]
    with served(real()) as r:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        for stream in (False, True):
            answer = r.post(CHAT, BASE[CHAT] | {"response_format": form, "stream": stream})
            assert answer.status == 400 and error_of(answer, False)["param"] == "response_format"
        assert r.post(CHAT, BASE[CHAT] | {"max_tokens": 2}).status == 200


# ---------------------------------------------------------------- bodies, keys, hosts


def test_bodies_that_are_too_large(running: Running) -> None:
    """By their length, and counted where they have none; the client hears it although it is still sending."""
    large = BASE[CHAT] | {"messages": [{"role": "user", "content": "x" * 300_000}]}
    for path in (CHAT, MESSAGES):
        answer = running.post(path, large)
        error = error_of(answer, path == MESSAGES)
        assert answer.status == 413 and answer.headers["connection"] == "close"
        assert error["type"] == ("request_too_large" if path == MESSAGES else "invalid_request_error")
    with running.connect() as s:
        s.sendall(message("POST", CHAT, None, Content_Length="", Transfer_Encoding="chunked"))
        for _ in range(12):
            s.sendall(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
        s.sendall(b"0\r\n\r\n")
        assert received(s).status == 413
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as raised:
            client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x" * 10_000_000}])
    assert raised.value.status_code == 413


def test_a_chunked_body_is_read(running: Running) -> None:
    body = json.dumps(BASE[CHAT]).encode()
    with running.connect() as s:
        s.sendall(message("POST", CHAT, None, Content_Length="", Transfer_Encoding="chunked"))
        for i in range(0, len(body), 7):
            part = body[i : i + 7]
            s.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        s.sendall(b"0\r\n\r\n")
        assert received(s).status == 200


def test_half_a_body(running: Running) -> None:
    """One that stops coming is given up, one whose client goes is forgotten; others are served meanwhile."""
    with running.connect() as s:
        s.sendall(message("POST", CHAT, b'{"model"', Content_Length="500"))
        begun = time.monotonic()
        assert running.post(CHAT, BASE[CHAT]).status == 200
        answer = received(s)
        assert answer.status == 408 and 0.5 < time.monotonic() - begun < 5
        error_of(answer, False)
    for _ in range(5):
        with running.connect() as s:
            s.sendall(message("POST", CHAT, b'{"model"', Content_Length="500"))
    time.sleep(0.2)
    assert running.server.answering == 0


def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etude.serve.process.QUIET", 0.3)
    with served(Fake()) as r, r.connect() as silent, r.connect() as half:
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        assert silent.recv(10) == b"" == half.recv(10)


def test_keys() -> None:
    """Either of them in either header; what needs none is the page and what starts servers."""
    with served(Fake(), keys=["one-key", "schlüssel"]) as r:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "one-key"}, {"X_Api_Key": "one-ke"}, {"Authorization": "Basic one-key"}, {"Authorization": "Bearer "}):  # fmt: skip
            answer = r.post(CHAT, BASE[CHAT], **headers)
            assert answer.status == 401 and error_of(answer, False)["code"] == "invalid_api_key"
            answer = r.post(MESSAGES, BASE[MESSAGES], **headers)
            assert answer.status == 401 and error_of(answer, True)["type"] == "authentication_error"
        for path in ("/metrics", "/v1/models", "/openapi.json", "/nothing"):
            assert r.ask("GET", path).status == 401
        assert r.ask("GET", "/").status == r.ask("GET", "/health").status == 200
        assert r.ask("GET", "/health", Host="elsewhere.example").status == 200
        with openai.OpenAI(base_url=f"{r.url}/v1", api_key="one-key", max_retries=0) as client:
            assert client.models.list().data
        for how in ({"api_key": "one-key"}, {"auth_token": "one-key"}):
            with anthropic.Anthropic(base_url=r.url, max_retries=0, **how) as claude:
                assert claude.messages.create(model=NAME, max_tokens=3, messages=HI).content
        with openai.OpenAI(base_url=f"{r.url}/v1", api_key="bad", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()


def test_without_keys_only_this_machine_is_a_host(running: Running) -> None:
    """A page elsewhere whose name is made to point here gets nothing (DNS rebinding)."""
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "127.8.8.8"):
        assert running.ask("GET", "/v1/models", Host=host).status == 200
    for host in ("evil.example", "evil.example:8000", "10.0.0.1", "localhost.evil.example"):
        answer = running.ask("GET", "/v1/models", Host=host)
        assert answer.status == 403 and "localhost" in error_of(answer, False)["message"]


def test_what_start_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in one line that says what to type."""
    monkeypatch.delenv("ETUDE_API_KEYS", raising=False)
    with pytest.raises(Refusal, match="can be reached from other machines, which needs a key"):
        address.bind("0.0.0.0", 0, [])
    address.bind("0.0.0.0", 0, ["k"]).close()
    address.bind("localhost", 0, []).close()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(Refusal, match="is taken; type port="):
        address.bind("127.0.0.1", taken.getsockname()[1], [])
    with pytest.raises(Refusal, match="host=no.such.host.invalid"):
        address.bind("no.such.host.invalid", 0, [])
    keys = tmp_path / "keys"
    keys.write_text("a\n\n b \n")
    monkeypatch.setenv("ETUDE_API_KEYS", "c, d,")
    assert start.read_keys({"keys": ["e"], "key_file": str(keys)}) == ["e", "c", "d", "a", "b"]
    with pytest.raises(Refusal, match="key_file=.*cannot be read"):
        start.read_keys({"keys": [], "key_file": str(tmp_path / "none")})
    for path, name in (("runs/x/artifacts/checkpoints/step_00000500", "x"), ("runs/x/", "x"), ("exports/y", "y"), ("/tmp/r/artifacts/export", "r")):  # fmt: skip
        assert start.name_of({"served_name": None, "ckpt": path}) == name
    assert start.name_of({"served_name": "mine", "ckpt": "runs/x"}) == "mine"


# ---------------------------------------------------------------- an engine that is not there, full, or fails


def test_loading() -> None:
    with served(None) as r:
        health = r.ask("GET", "/health")
        assert (health.status, health.json["status"]) == (503, "loading")
        for path in BASE:
            answer = r.post(path, BASE[path])
            assert answer.status == 503 and "loaded" in error_of(answer, path == MESSAGES)["message"]
        assert r.ask("GET", "/metrics").status == r.ask("GET", "/").status == 200
        r.server.engine = Fake()
        assert r.ask("GET", "/health").json["status"] == "ok" and r.post(CHAT, BASE[CHAT]).status == 200


def test_a_full_queue() -> None:
    fake = Fake()
    fake.max_waiting = 0
    with served(fake) as r:
        for stream in (False, True):
            answer = r.post(CHAT, BASE[CHAT] | {"stream": stream})
            assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
            assert error_of(answer, False)["code"] == "rate_limit_exceeded"
            answer = r.post(MESSAGES, BASE[MESSAGES] | {"stream": stream})
            assert answer.status == 529 and error_of(answer, True)["type"] == "overloaded_error"
            assert "retry-after" in answer.headers
        fake.max_waiting = 1  # of three prompts only one finds a place: none is answered, none is left behind
        assert r.post(TEXT, BASE[TEXT] | {"prompt": ["a", "b", "c"]}).status == 429
        assert r.settled()["running"] == 0


def test_a_bug_says_nothing_of_itself(capfd: pytest.CaptureFixture) -> None:
    """Before an answer, in it, and streamed: a generic text; the log has the rest, with the request's id."""

    def broken() -> None:
        raise RuntimeError("secret 42")

    fake = Fake()
    with served(fake) as r:
        fake.at = {0: broken}
        for path in BASE:
            for stream in (False, True):
                answer = r.post(path, BASE[path] | {"stream": stream}, X_Request_Id="the-one")
                assert answer.status == 500 and b"secret" not in answer.body
                assert error_of(answer, path == MESSAGES)["type"] == (
                    "api_error" if path == MESSAGES else "server_error"
                )
        fake.at = {2: broken}
        answer = r.post(CHAT, BASE[CHAT] | {"stream": True})
        assert answer.status == 200 and b"secret" not in answer.body and b"[DONE]" not in answer.body
        assert set(answer.events[-1][1]["error"]) == {"message", "type", "param", "code"}
        name, data = r.post(MESSAGES, BASE[MESSAGES] | {"stream": True}).events[-1]
        assert (name, data["type"], data["error"]["type"]) == ("error", "error", "api_error")
        fake.at = {}
        assert r.post(CHAT, BASE[CHAT]).status == 200
    logged = capfd.readouterr().err
    assert "the-one" in logged and "secret 42" in logged


def test_the_clients_hear_of_failures_in_a_stream() -> None:
    fake = Fake()
    fake.at = {2: lambda: "NaN"}
    with served(fake) as r:
        with openai.OpenAI(base_url=f"{r.url}/v1", api_key="x", max_retries=0) as gpt, pytest.raises(openai.APIError):
            list(gpt.chat.completions.create(model=NAME, messages=HI, stream=True))
        with anthropic.Anthropic(base_url=r.url, api_key="x", max_retries=0) as claude:
            with pytest.raises(anthropic.APIStatusError):
                list(claude.messages.create(model=NAME, messages=HI, max_tokens=9, stream=True))


def test_nan_in_one_row() -> None:
    """Only its request fails."""
    fake = Fake("a rather long text to say")
    fake.delay = 0.02
    with served(fake) as r, ThreadPoolExecutor(4) as pool:
        good = [pool.submit(r.post, CHAT, BASE[CHAT]) for _ in range(3)]
        time.sleep(0.05)
        fake.at = {0: lambda: "the model's logits are NaN"}
        assert r.post(CHAT, BASE[CHAT]).status == 500
        fake.at = {}
        assert [g.result().status for g in good] == [200] * 3


def test_a_crash_of_the_engine() -> None:
    """The real one: who waits hears it within a second, /health says so, and so do later requests."""
    engine = real()
    with served(engine, request_timeout=30) as r, ThreadPoolExecutor(6) as pool:
        asked = {"max_tokens": 900, "ignore_eos": True}
        waiting = [pool.submit(r.post, CHAT, BASE[CHAT] | asked | {"stream": i % 2 == 0}) for i in range(6)]
        while engine.stats()["running"] < 6:
            time.sleep(0.01)

        def crash(*_: Any) -> None:
            raise SystemExit  # quieter than others: no test should depend on a traceback

        engine.step = crash  # type: ignore[method-assign]
        begun = time.monotonic()
        answers = [w.result() for w in waiting]
        assert time.monotonic() - begun < 1.5
        assert {a.status for a in answers[1::2]} == {503} and all(b'"error"' in a.body for a in answers[::2])
        health = r.ask("GET", "/health")
        assert (health.status, health.json["status"]) == (503, "dead")
        answer = r.post(MESSAGES, BASE[MESSAGES])
        assert answer.status == 503 and error_of(answer, True)["type"] == "api_error"


def test_a_hang_of_the_engine() -> None:
    """A request ends at its time-out even where the engine does not end it; /health knows of engines without steps."""
    fake = Fake()
    with served(fake, request_timeout=0.2) as r:
        fake.hangs_at = 1
        begun = time.monotonic()
        answer = r.post(CHAT, BASE[CHAT])
        assert answer.status == 504 and time.monotonic() - begun < 15
        assert error_of(answer, False)["code"] == "timeout"
        fake.hangs_at = 1
        assert "error" in r.post(CHAT, BASE[CHAT] | {"stream": True}).events[-1][1]
        assert r.post(CHAT, BASE[CHAT]).status == 200 and fake.aborted == 2
        stats = fake.stats() | {"last_step": 1000.0, "running": 1}
        fake.stats = lambda: stats  # type: ignore[method-assign]
        assert r.ask("GET", "/health").json["status"] == "hanging"


def test_time_outs_of_the_engine() -> None:
    """The real one's: 504, and its pages are free."""
    with served(real(), request_timeout=0.3) as r:
        answer = r.post(CHAT, BASE[CHAT] | {"n": 8, "max_tokens": 1000, "ignore_eos": True})
        assert answer.status in (200, 504)  # 200 where a machine is that fast
        assert at_rest(r)


# ---------------------------------------------------------------- clients that go, or dawdle


def at_rest(r: Running) -> bool:
    s = r.settled(5)
    return s["pages_free"] + s["pages_cached"] == s["pages"] and s["pages_used"] == s["running"] == s["waiting"] == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", list(BASE))
def test_a_client_that_goes_frees_its_pages(path: str, stream: bool) -> None:
    """Within two steps, streamed or not, while it runs and while it waits."""
    engine = real(max_running=1)
    with served(engine) as r:
        body = BASE[path] | {"max_tokens": 900, "stream": stream}
        step = engine.step
        engine.step = lambda: (time.sleep(0.03), step())[1]  # type: ignore[method-assign]
        if path == MESSAGES:  # which cannot forbid a model to end
            engine._ends = lambda request: frozenset()  # type: ignore[method-assign]
        else:
            body["ignore_eos"] = True
        with r.connect() as first, r.connect() as second:
            first.sendall(message("POST", path, body))
            while not engine.stats()["running"]:
                time.sleep(0.002)
            second.sendall(message("POST", path, body))
            while not engine.stats()["waiting"]:
                time.sleep(0.002)
            second.close()
            until = time.monotonic() + 2
            while engine.stats()["waiting"] and time.monotonic() < until:
                time.sleep(0.002)
            assert engine.stats()["waiting"] == 0 and engine.stats()["running"] == 1
            before = engine.stats()["steps"]
            first.close()
            assert at_rest(r)
            assert engine.stats()["finished"].get("abort", 0) == 2
            assert engine.stats()["steps"] - before <= 3


def test_slow_readers_block_nobody() -> None:
    """A client that reads a byte now and then gets all of it, others are served at once."""
    fake = Fake("word " * 60)
    with served(fake) as r, r.connect() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.sendall(message("POST", CHAT, BASE[CHAT] | {"stream": True}))
        data, took = b"", []
        for _ in range(8):
            data += slow.recv(1)
            begun = time.monotonic()
            assert r.post(CHAT, BASE[CHAT]).status == 200
            took.append(time.monotonic() - begun)
        assert statistics.median(took) < 1  # one alone may have waited for the machine
        while part := slow.recv(4096):
            data += part
        assert Answer(data).events[-1] == (None, "[DONE]")


def test_a_client_that_reads_nothing_is_given_up() -> None:
    fake = Fake("word " * 300)
    fake.context = 10**6
    fake.at = {}
    with served(fake, request_timeout=0.5) as r:
        sockets = [r.connect() for _ in range(3)]
        for s in sockets:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            s.sendall(message("POST", CHAT, BASE[CHAT] | {"stream": True, "n": 16}))
        until = time.monotonic() + 8
        while r.server.answering and time.monotonic() < until:
            time.sleep(0.05)
        assert r.server.answering == 0 and fake.running == 0
        for s in sockets:
            s.close()


def test_an_overload() -> None:
    """Ten times what runs and waits at once: answers or 429, nothing else, and in the end all pages are there."""
    engine = real(max_running=4, max_waiting=4)
    with served(engine) as r, ThreadPoolExecutor(80) as pool:
        body = BASE[TEXT] | {"max_tokens": 20, "ignore_eos": True}
        answers = list(pool.map(lambda i: r.post(TEXT, body | {"stream": i % 2 == 0, "seed": i}), range(80)))
        found = [a.status for a in answers]
        assert set(found) == {200, 429} and found.count(200) >= 8
        for answer in answers:
            if answer.status == 429:
                assert error_of(answer, False)["code"] == "rate_limit_exceeded"
            elif answer.headers["content-type"] == "text/event-stream":
                assert answer.events[-1] == (None, "[DONE]")
            else:
                assert answer.json["usage"]["completion_tokens"] == 20
        assert at_rest(r) and r.ask("GET", "/health").status == 200


def test_clients_that_go_at_random_moments() -> None:
    """A third of 150 requests of all kinds is cut somewhere; the others are whole, and in the end all pages are there."""
    engine = real(max_waiting=200)
    rng = random.Random(0)
    plans = [
        (rng.choice(list(BASE)), rng.random() < 0.5, rng.random() * 0.4 if rng.random() < 0.33 else None)
        for _ in range(150)
    ]

    def one(plan: tuple[str, bool, float | None]) -> bool:
        path, stream, cut = plan
        body = BASE[path] | {"max_tokens": 30, "stream": stream, "top_k": 50}
        with r.connect() as s:
            s.sendall(message("POST", path, body))
            if cut is not None:
                time.sleep(cut)
                return True
            answer = received(s)
            return answer.status == 200 and (
                not stream or answer.events[-1][0] == "message_stop" or answer.events[-1][1] == "[DONE]"
            )

    with served(engine) as r, ThreadPoolExecutor(24) as pool:
        assert all(pool.map(one, plans))
        assert at_rest(r) and r.server.answering == 0 and not r.server.streams


# ---------------------------------------------------------------- the end


def test_draining_lets_requests_finish() -> None:
    """What runs is finished, what comes is told so on a connection that ends."""
    fake = Fake("word " * 30)
    fake.delay = 0.02
    with served(fake) as r, ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(r.post, CHAT, BASE[CHAT] | {"stream": s}) for s in (True, False)]
        while fake.running < 2:
            time.sleep(0.005)
        r.end()
        time.sleep(0.05)
        for path in BASE:
            answer = r.post(path, BASE[path], Connection="keep-alive")
            assert answer.status == 503 and answer.headers["connection"] == "close"
            error_of(answer, path == MESSAGES)
        health = r.ask("GET", "/health", Connection="keep-alive")
        assert (health.status, health.json["status"]) == (503, "draining")
        answers = [run.result() for run in runs]
        assert answers[0].events[-1] == (None, "[DONE]") and answers[1].status == 200
        r.thread.join(5)
        assert not r.thread.is_alive() and fake.finished == 2


def test_draining_ends() -> None:
    """What does not finish in time is aborted, and told so."""
    fake = Fake("word " * 100)
    fake.delay = 0.1
    with served(fake, drain_seconds=0.3) as r, ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(r.post, CHAT, BASE[CHAT] | {"stream": s}) for s in (True, False)]
        while fake.running < 2:
            time.sleep(0.005)
        begun = time.monotonic()
        r.end()
        answers = [run.result() for run in runs]
        assert "error" in answers[0].events[-1][1] and answers[1].status == 503
        r.thread.join(5)
        assert not r.thread.is_alive() and time.monotonic() - begun < 4 and fake.aborted == 2


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as serve.py finds it."""
    from serving import tokenizer

    folder = tmp_path_factory.mktemp("models") / NAME
    words = tokenizer()
    made("dense", "model.max_len=1024", vocab_size=words.vocab_size).save_pretrained(folder, words)
    return folder


SETTINGS = ["port=0", "engine.cache_mb=1", "engine.attention=views", "threads=1"]


def test_serve_from_its_start_to_sigterm(export: Path) -> None:
    """One line with the address; a log without texts and keys; SIGTERM under load lets it finish and exits with 0."""
    process = subprocess.Popen(
        [sys.executable, "serve.py", *SETTINGS, f"ckpt={export}"],
        cwd=ROOT,
        env=environment(ETUDE_API_KEYS="the-secret-key"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(f"{NAME} is ready at http://127.0.0.1:") and "the-secret-key" not in line
    r = Running(int(line.split("127.0.0.1:")[1].split()[0]), None, None, None)  # type: ignore[arg-type]
    key = {"Authorization": "Bearer the-secret-key"}
    body = {"model": NAME, "messages": [{"role": "user", "content": "unheard-of"}], "ignore_eos": True}
    assert r.post(CHAT, body | {"max_tokens": 5}, **key).status == 200
    assert r.post(CHAT, body | {"max_tokens": 5}, Authorization="Bearer another-key").status == 401
    with r.connect() as s:
        s.sendall(message("POST", CHAT, body | {"max_tokens": 300, "stream": True}, **key))
        first = s.recv(100)
        process.send_signal(signal.SIGTERM)
        rest = b""
        while part := s.recv(65536):
            rest += part
        assert Answer(first + rest).events[-1] == (None, "[DONE]")
    out, log = process.communicate(timeout=20)
    assert process.returncode == 0 and out == ""
    lines = log.splitlines()
    assert len(lines) == 3 and all(part in lines[0] for part in ("POST", CHAT, " 200 ", "+5", "first=0.", "req_"))
    assert " 401 " in lines[1] and "+300" in lines[2]
    assert not any(word in log for word in ("unheard", "the-secret-key", "another-key"))


def test_a_second_signal_ends_at_once(export: Path) -> None:
    process = forked.Forked(["serve.py", *SETTINGS, f"ckpt={export}", "drain_seconds=60"], ROOT, environment())
    line = process.readline()
    r = Running(int(line.split("127.0.0.1:")[1].split()[0]), None, None, None)  # type: ignore[arg-type]
    with r.connect() as s:
        s.sendall(message("POST", CHAT, BASE[CHAT] | {"max_tokens": 900, "ignore_eos": True, "n": 16}))
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)  # and not the 60 seconds of a drain
    assert process.returncode == 0


def test_serve_says_in_a_line_what_is_wrong(export: Path) -> None:
    """Exit code 2, before anything heavy where it can be."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {
            f"port={port}": f"error: port={port} on host=127.0.0.1 is taken; type port=<another>, or port=0 for any",
            "host=0.0.0.0": "error: host=0.0.0.0 can be reached from other machines, which needs a key: set ETUDE_API_KEYS=<key>, or type key_file=<file>",
            "ckpt=no/such/run": "error: ckpt=no/such/run does not exist",
            "engine.page_size=3": "error: engine.page_size=3 should be a power of two up to 256",
        }
        for case, expected in cases.items():
            done = forked.run(["serve.py", *SETTINGS, f"ckpt={export}", case], ROOT, environment())
            assert (done.returncode, done.stdout) == (2, ""), (case, done.stderr)
            assert done.stderr.strip() == expected, case


# ---------------------------------------------------------------- anything at all


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Running]:
    with served(Fake(), max_n=3) as r:
        yield r


def test_the_schema_tells_the_truth(fuzzed: Running) -> None:
    """schemathesis: requests that the schema allows and ones that it does not. No 5xx; every answer is of a status and of a
    shape that the schema names; what the schema forbids is refused."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    answered: set[tuple[str, int, str]] = set()

    def streaming(case: Any) -> Any:
        if isinstance(case.body, dict):
            case.body["stream"] = True
        return case

    def tried(
        operation: Any, mode: GenerationMode, count: int, change: Callable[[Any], Any] = lambda case: case
    ) -> None:
        more = [negative_data_rejection] if mode == GenerationMode.NEGATIVE else []

        @given(case=operation.as_strategy(generation_mode=mode).map(change))
        @settings(max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
        def one(case: Any) -> None:
            response = case.call(timeout=10)
            answered.add((operation.path, response.status_code, response.headers["content-type"][0]))
            case.validate_response(response, checks=checks + more)

        one()

    streams = {"/v1/chat/completions", "/v1/completions", "/v1/messages"}
    for operation in schema.get_all_operations():
        tried(operation.ok(), GenerationMode.POSITIVE, 40)
        if operation.ok().path in streams:
            tried(operation.ok(), GenerationMode.POSITIVE, 20, streaming)
        if operation.ok().body:
            tried(operation.ok(), GenerationMode.NEGATIVE, 12)
    paths = {operation.ok().path for operation in schema.get_all_operations()}
    assert {path for path, status, _ in answered if status == 200} == paths - {"/v1/models/{id}"}
    assert {path for path, status, kind in answered if (status, kind) == (200, "text/event-stream")} == streams
    assert not any(status >= 500 for _, status, _ in answered)
