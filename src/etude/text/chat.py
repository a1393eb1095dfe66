"""Chats as text: a tokenizer's Jinja template, rendered in a sandbox as transformers renders it, and what of the text
the assistant said."""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from etude.errors import Refusal
from etude.text.tokenizer import IM_END, IM_START, Tokenizer

# role: system, user or assistant, and content. Of an assistant that called tools also tool_calls, as OpenAI's, but with
# arguments as objects; their results have role tool.
Message = dict[str, Any]

# ChatML, for tokenizers that have its tokens and no template of their own: those trained here.
CHATML = (
    "{% for message in messages %}{{ '"
    + IM_START
    + "' + message['role'] + '\\n' + message['content'] + '"
    + IM_END
    + "' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + IM_START + "assistant\\n' }}{% endif %}"
)

# Marks in a rendered text that are taken out again: code points that Unicode keeps free of characters for ever.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
UNSEEN = (
    "the chat template does not show what the assistant said: put {% generation %} and {% endgeneration %} around it in the "
    "chat_template of tokenizer_config.json, or train on whole chats with data.train_on=all"
)
GROWN = 64  # turns, the last ones, that are found by rendering up to each: all of them would take the square of their number


def template(tokenizer: Tokenizer) -> str:
    """The tokenizer's own template, else ChatML. Raises Refusal where it has neither."""
    if tokenizer.template is not None:
        return tokenizer.template
    if tokenizer.backend.token_to_id(IM_START) is None:
        raise Refusal(
            "this tokenizer has no chat template and no ChatML tokens: leave out chat=true, or train with tokenizer=bpe"
        )
    return CHATML


def render(
    tokenizer: Tokenizer, messages: list[Message], reply: bool = True, tools: list[dict[str, Any]] | None = None
) -> str:
    """The text of a conversation, special tokens written out; with `reply` up to where the assistant's answer begins.
    `tools` are what the assistant may call, as OpenAI's. Raises Refusal with what the template objects to, or what is
    wrong with it, also where it has no place for tools."""
    if (tools or any("tool_calls" in m or m["role"] == "tool" for m in messages)) and not takes_tools(tokenizer):
        raise Refusal("this model's chat template has no place for tools: leave out tools, tool_calls and role tool")
    return _render(tokenizer, messages, reply, marked=False, tools=tools)


def takes_tools(tokenizer: Tokenizer) -> bool:
    """Whether the template asks for `tools`."""
    return _takes_tools(template(tokenizer))


@functools.lru_cache(maxsize=16)
def _takes_tools(source: str) -> bool:
    from jinja2 import TemplateError, meta

    try:
        return "tools" in meta.find_undeclared_variables(_environment(False).parse(source))
    except TemplateError:  # which render will tell
        return False


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    reply: bool,
    marked: bool,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    special = {name: tokenizer.token(i) for name, i in names.items() if i is not None}
    source = template(tokenizer)
    try:
        compiled = _compiled(source, marked)
        return compiled.render(messages=messages, tools=tools, documents=None, add_generation_prompt=reply, **special)
    except Exception as error:  # a template is somebody's program: it may fail in any way
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise Refusal(f"the chat template refuses: {why}") from None


def end_of_turn(tokenizer: Tokenizer) -> set[int]:
    """The special token that the template puts behind an answer, where it puts one there."""
    try:
        _, stop, special = _behind(tokenizer)
    except Refusal:
        return set()
    first = re.match(special, stop.lstrip())
    id = tokenizer.backend.token_to_id(first.group()) if first else None
    return set() if id is None else {id}


# ---------------------------------------------------------------- what the assistant said


def spans(
    tokenizer: Tokenizer, messages: list[Message], last_only: bool, first: int = 0
) -> tuple[str, list[tuple[int, int]]]:
    """-> (the text of a conversation, the ranges of its characters that the assistant said, in order).

    Only turns from messages[first] on count, with `last_only` only the last of them. A range has what the template makes
    the assistant say beside the content, as an empty thought, and the token that ends the turn, but not the white space
    behind it. What {% generation %} marks in the template is taken as it is. Text of a special token in a message is
    encoded as that token, as transformers does it; it does not move a range. Raises Refusal where the template refuses, or
    rewrites what was said beyond recognition."""
    text = render(tokenizer, messages, reply=False)
    said = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    said = said[-1:] if last_only else said
    if not said:
        return text, []
    _behind(tokenizer)
    if (marked := _marked(tokenizer, messages, text, said)) is not None:
        return text, marked
    found = {i: r for i in said[-GROWN:] if (r := _grown(tokenizer, messages, i, text)) is not None}
    if missing := [i for i in said if i not in found]:
        found |= _kept(tokenizer, messages, missing, text)
    return text, [found[i] for i in said]


def _marked(tokenizer: Tokenizer, messages: list[Message], text: str, said: list[int]) -> list[tuple[int, int]] | None:
    """What {% generation %} encloses; None where the template has none, or the marks would change the text."""
    if not GENERATION.search(template(tokenizer)):
        return None
    shown, found = _enclosed(_render(tokenizer, messages, False, marked=True))
    if shown != text:
        return None
    before = sum(m["role"] == "assistant" for m in messages[: said[0]])
    if before and len(found) != sum(m["role"] == "assistant" for m in messages):  # not one a turn
        asked = len(commonprefix([text, render(tokenizer, messages[: said[0]], reply=True)]))
        before = sum(b <= asked for _, b in found)
    return found[before:]


def _enclosed(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """-> (the text without its marks, the ranges in it that they enclosed)."""
    pieces = re.split(f"[{OPEN}{CLOSE}]", marked)
    ends = list(itertools.accumulate(map(len, pieces)))
    return "".join(pieces), [(a, b) for a, b in zip(ends[:-1:2], ends[1::2]) if a < b]


def _grown(tokenizer: Tokenizer, messages: list[Message], i: int, text: str) -> tuple[int, int] | None:
    """Where message i stands in a text that only grows with each message: from where an answer would begin up to the end
    of its turn. None where the template rewrites earlier turns, or says more when it asks for an answer."""
    try:
        before = render(tokenizer, messages[:i], reply=True)
        after = text if i + 1 == len(messages) else render(tokenizer, messages[: i + 1], reply=False)
    except Refusal:
        return None
    behind, stop, _ = _behind(tokenizer)
    start, end = len(before), len(after) - len(behind) + len(stop)
    grows = text.startswith(after) and after.startswith(before) and after.endswith(behind)
    return (start, end) if grows and start < end else None


def _kept(tokenizer: Tokenizer, messages: list[Message], said: list[int], text: str) -> dict[int, tuple[int, int]]:
    """Where the contents of messages `said` stand, as they are, stripped, or without their beginning (a thought that the
    template leaves out of earlier turns), each with the token that ends the turn: found with marks in their place, and
    held against the text. Raises Refusal where that does not give the text."""
    n = next(n for n in itertools.count(1) if OPEN * n not in text)
    marks = {i: f"{OPEN * n}{i}{CLOSE}" for i in said}
    bare = [m | {"content": marks[i]} if i in marks else m for i, m in enumerate(messages)]
    skeleton = render(tokenizer, bare, reply=False)
    _, stop, special = _behind(tokenizer)
    pieces = re.split(f"({OPEN * n}[0-9]+{CLOSE})", skeleton)
    found: dict[int, tuple[int, int]] = {}
    at = len(pieces[0])
    if pieces[1::2] == list(marks.values()) and text.startswith(pieces[0]):
        for i, piece in zip(marks, pieces[2::2]):
            end = _end(text, at, messages[i]["content"], piece, last=2 * len(found) + 3 == len(pieces))
            if end is None:
                break
            other = re.match(special, piece) if stop else None  # gpt-oss ends its last turn with another token
            found[i] = at, end + len(stop if piece.startswith(stop) else other.group() if other else "")
            at = end + len(piece)
    if len(found) < len(marks):
        raise Refusal(UNSEEN)
    return found


def _end(text: str, at: int, content: str, piece: str, last: bool) -> int | None:
    """Where the content that begins at text[at] ends, and `piece` follows."""
    longest = at + len(content)
    end = len(text) - len(piece) if last else text.find(piece, at, longest + len(piece))
    while at <= end <= longest:
        kept = text[at:end].strip()
        if text.startswith(piece, end) and kept and content.strip().endswith(kept):
            return end
        end = -1 if last else text.find(piece, end + 1, longest + len(piece))
    return None


@functools.lru_cache(maxsize=8)
def _behind(tokenizer: Tokenizer) -> tuple[str, str, str]:
    """-> (what the template writes behind a last answer; its beginning up to the special tokens that end the turn, "" where
    there is none; a pattern of any special token). Raises Refusal where the template leaves the answer out, as those do
    that want a list of parts."""
    special = [t.content for t in tokenizer.backend.get_added_tokens_decoder().values() if t.special]
    special += [t for i in tokenizer.stop_ids if (t := tokenizer.token(i))]
    either = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)"
    mark = f"{OPEN}{CLOSE}"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        _, shown, behind = render(tokenizer, talk, reply=False).rpartition(mark)
    except Refusal:
        return "", "", either
    if not shown:
        raise Refusal(UNSEEN)
    stop = re.match(rf"\s*({either})+", behind)
    return behind, stop.group() if stop else "", either


@functools.lru_cache(maxsize=16)
def _compiled(source: str, marked: bool) -> Any:
    """The template; `marked`: with OPEN and CLOSE around what {% generation %} encloses."""
    return _environment(marked).from_string(source)


def _environment(marked: bool) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what an assistant said, for training."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)
            around = [nodes.Output([nodes.TemplateData(c)], lineno=line) for c in (OPEN, CLOSE)]
            return [around[0], body, around[1]] if marked else body

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
