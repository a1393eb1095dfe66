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
    Raises Refusal with what the template objects to, if it does."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    special = {name: tokenizer.token(i) or "" for name, i in names.items()}
    try:
        compiled = environment.from_string(template(tokenizer))
        return compiled.render(messages=messages, add_generation_prompt=reply, **special)
    except TemplateError as error:
        raise Refusal(f"the chat template refuses: {error}") from None


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
