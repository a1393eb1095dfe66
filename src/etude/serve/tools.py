"""Calls of tools in a model's text, as Hermes and Qwen models write them:
<tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

import json
import re
from typing import Any, NamedTuple

from etude.errors import Refusal
from etude.text import chat
from etude.text.tokenizer import Tokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class Text(NamedTuple):
    text: str


class Call(NamedTuple):
    """A call begins."""

    number: int
    name: str


class Arguments(NamedTuple):
    """More of a call's arguments, as JSON."""

    number: int
    text: str


def check(tokenizer: Tokenizer) -> None:
    """Raises Refusal where the model's template does not tell it of tools, or not in the form that is read here."""
    if not chat.takes_tools(tokenizer) or OPEN not in chat.template(tokenizer):
        raise Refusal("this model's chat template does not support tools (Hermes' or Qwen's <tool_call> form)")


def guide(functions: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a reply that must be a call of one of `functions` (name, parameters): a schema for what stands in a <tool_call>."""
    kinds = [
        {
            "type": "object",
            "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for f in functions
    ]
    return {"json": kinds[0] if len(kinds) == 1 else {"anyOf": kinds}}


class Reader:
    """Tells calls from text while it comes. Text that may be the beginning of a call is held back; what turns out to be no
    call of a known tool is text. With `inside` the text begins behind a <tool_call> that stands in the prompt."""

    def __init__(self, names: set[str], inside: bool = False):
        self.names, self.held, self.calls = names, "", 0
        self.state = self._head if inside else self._text
        self.depth, self.quoted, self.escaped = 0, False, False

    def push(self, text: str, last: bool = False) -> list[Text | Call | Arguments]:
        """-> what is certain by now; with `last` everything."""
        self.held += text
        found: list[Text | Call | Arguments] = []
        while self.state(found, last):
            pass
        return found

    def _text(self, found: list, last: bool) -> bool:
        at = self.held.find(OPEN)
        if at >= 0:
            self._say(found, self.held[:at].rstrip())
            self.held, self.state = self.held[at + len(OPEN) :], self._head
            return True
        sure = self.held
        if not last:
            sure = sure[: len(sure) - next((n for n in range(len(OPEN), 0, -1) if sure.endswith(OPEN[:n])), 0)]
        if not last or self.calls:  # white space around calls is no content
            sure = sure.rstrip()
        self._say(found, sure)
        self.held = self.held[len(sure) :]
        return False

    def _head(self, found: list, last: bool) -> bool:
        if (head := HEAD.match(self.held)) and (name := _string(head[1])) in self.names:
            found.append(Call(self.calls, str(name)))
            self.held, self.state, self.depth = self.held[head.end() :], self._arguments, 0
            return True
        inside, end, rest = self.held.partition(CLOSE)
        if not end and not last:
            return False
        call = _parsed(inside)
        if call is not None and call[0] in self.names:
            found += [Call(self.calls, call[0]), Arguments(self.calls, call[1])]
            self.calls += 1
        else:
            self._say(found, OPEN + inside + end)
        self.held, self.state = rest, self._text
        return True

    def _arguments(self, found: list, last: bool) -> bool:
        end = next((i + 1 for i, c in enumerate(self.held) if self._closes(c)), None)
        if end is None and self.held:
            found.append(Arguments(self.calls, self.held))
            self.held = ""
        if end is None:
            return False
        found.append(Arguments(self.calls, self.held[:end]))
        self.calls += 1
        self.held, self.state = self.held[end:], self._close
        return True

    def _closes(self, c: str) -> bool:
        """Whether the arguments' object ends with this character."""
        if self.quoted:
            self.quoted = self.escaped or c != '"'
            self.escaped = c == "\\" and not self.escaped
        elif c == '"':
            self.quoted = True
        elif c in "{[":
            self.depth += 1
        elif c in "}]":
            self.depth -= 1
            return self.depth == 0
        return False

    def _close(self, found: list, last: bool) -> bool:
        _, end, rest = self.held.partition(CLOSE)
        if end:
            self.held, self.state = rest, self._text
        elif last:
            self.held = ""
        return bool(end)

    def _say(self, found: list, text: str) -> None:
        if text:
            found.append(Text(text))


def _string(text: str) -> str | None:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _parsed(text: str) -> tuple[str, str] | None:
    """-> (name, arguments as JSON) of a whole call, in any order of its keys."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _string(arguments)
    return (call["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
