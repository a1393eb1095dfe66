"""What went wrong with a request, in the words of either API."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from etude.errors import EtudeError, Refusal
from etude.infer.request import EngineDead, QueueFull

# Status -> OpenAI's type, Anthropic's type.
TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("invalid_request_error", "authentication_error"),
    403: ("invalid_request_error", "permission_error"),
    404: ("invalid_request_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "overloaded_error"),
    500: ("server_error", "api_error"),
    503: ("server_error", "api_error"),
    504: ("server_error", "timeout_error"),
}
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded", 504: "timeout"}
RETRY = 1  # seconds that a client is told to wait where the queue is full
BUG = "the server failed on this request; its log says why"


class ApiError(Exception):
    """An answer that is an error. `param` names the field, `code` is OpenAI's; `close` ends the connection as well."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        close: bool = False,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status)
        self.headers = (headers or {}) | ({"connection": "close"} if close else {})

    def body(self, anthropic: bool, request_id: str) -> dict[str, Any]:
        openai_type, anthropic_type = TYPES[self.status]
        if anthropic:
            error = {"type": anthropic_type, "message": self.message}
            return {"type": "error", "error": error, "request_id": request_id}
        return {"error": {"message": self.message, "type": openai_type, "param": self.param, "code": self.code}}

    def http_status(self, anthropic: bool) -> int:
        return 529 if anthropic and self.status == 429 else self.status


class Gone(Exception):
    """The client has closed the connection: nobody reads an answer any more."""


def from_engine(error: EtudeError, param: str | None = None) -> ApiError:
    """What the engine, the tokenizer or a template raised."""
    if isinstance(error, QueueFull):
        return ApiError(429, f"too many requests wait already: {error}", headers={"retry-after": str(RETRY)})
    if isinstance(error, EngineDead):
        return ApiError(
            503, "the engine does not work any more; the server has to be started again", code="engine_dead"
        )
    if isinstance(error, Refusal):
        return ApiError(400, str(error), param)
    raise error


def from_validation(error: ValidationError, body: bytes) -> ApiError:
    """The error that lies deepest: of a value that may be of several kinds, the one that was meant."""
    errors = error.errors(include_url=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {errors[0]['msg'].removeprefix('Invalid JSON: ')}")
    data = json.loads(body)
    paths = [list(_path(e["loc"], _absent(e), data)) for e in errors]
    at = max(range(len(errors)), key=lambda i: (len(paths[i]), -i))
    found, name = errors[at], _written(paths[at])
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {name}", name)
    if found["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{name}'", name)
    if not name:
        return ApiError(400, f"the body is not an object with the request's fields: {found['msg']}")
    return ApiError(400, f"Invalid value for '{name}': {found['msg']}", name)


def _absent(error: Any) -> str | None:
    """The field that is missing, or by which kinds are told apart."""
    if error["type"] == "missing":
        return str(error["loc"][-1])
    return error["ctx"]["discriminator"].strip("'") if error["type"].startswith("union_tag") else None


def _path(loc: tuple[int | str, ...], absent: str | None, data: Any) -> Iterator[int | str]:
    """The parts of `loc` that lead into the body; pydantic puts the names of the kinds that it tried between them."""
    for part in loc:
        if isinstance(data, dict) and part in data or isinstance(data, list) and isinstance(part, int):
            data = data[part]  # type: ignore[index]
            yield part
    if absent is not None:
        yield absent


def _written(path: list[int | str]) -> str:
    """messages[0].content"""
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return text.removeprefix(".")
