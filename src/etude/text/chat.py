"""Chats as text: a tokenizer's Jinja template, rendered in a sandbox as transformers renders it."""

import datetime
import json
from typing import Any

from etude.errors import Refusal
from etude.text.tokenizer import IM_END, IM_START, Tokenizer

Message = dict[str, str]  # role: system, user or assistant; content

# ChatML, for tokenizers that have its tokens and no template of their own: those trained here.
CHATML = (
    "{% for message in messages %}{{ '"
    + IM_START
    + "' + message['role'] + '\\n' + message['content'] + '"
    + IM_END
    + "' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + IM_START + "assistant\\n' }}{% endif %}"
)


def template(tokenizer: Tokenizer) -> str:
    """The tokenizer's own template, else ChatML. Raises Refusal where it has neither."""
    if tokenizer.template is not None:
        return tokenizer.template
    if tokenizer.backend.token_to_id(IM_START) is None:
        raise Refusal(
            "this tokenizer has no chat template and no ChatML tokens: leave out chat=true, or train with tokenizer=bpe"
        )
    return CHATML


def render(tokenizer: Tokenizer, messages: list[Message], reply: bool = True) -> str:
    """The text of a conversation, special tokens written out; with `reply` up to where the assistant's answer begins.
    Raises Refusal with what the template objects to, or what is wrong with it."""
    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    special = {name: tokenizer.token(i) for name, i in names.items() if i is not None}
    source = template(tokenizer)
    try:
        compiled = _environment().from_string(source)
        return compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=reply, **special)
    except Exception as error:  # a template is somebody's program: it may fail in any way
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise Refusal(f"the chat template refuses: {why}") from None


def end_of_turn(tokenizer: Tokenizer) -> set[int]:
    """The special token that the template puts behind an answer, where it puts one there."""
    mark = "\u2042"  # three asterisks: nothing that a template writes by itself
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        ids = tokenizer.encode(render(tokenizer, talk, reply=False).rpartition(mark)[2])
    except Refusal:
        return set()
    special = {i for i, t in tokenizer.backend.get_added_tokens_decoder().items() if t.special}
    return set(ids[:1]) & special


def _environment() -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what an assistant said, for training: here its content is all that counts."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

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
