"""A conversation as the engine takes it."""

from typing import Any

from etude.errors import Refusal
from etude.serve import tools
from etude.serve.errors import ApiError, from_engine
from etude.text import chat
from etude.text.tokenizer import Tokenizer


def budget(prompt: int, wanted: int | None, context: int, param: str) -> int:
    """Tokens that may be generated. Raises ApiError where they are more than the context has room for."""
    if prompt + (1 if wanted is None else wanted) > context:
        asked = "" if wanted is None else f" and {wanted} in the completion"
        message = f"This model's context is {context} tokens; {prompt} in the prompt{asked} are more"
        raise ApiError(400, message, param, "context_length_exceeded")
    return context - prompt if wanted is None else wanted


class Asked:
    """A chat request as the engine takes it: a prompt (text), what guides the reply, and how it is read."""

    def __init__(self, tokenizer: Tokenizer, messages: list[chat.Message], param: str = "messages"):
        self.tokenizer, self.messages, self.param = tokenizer, messages, param
        self.functions: list[dict[str, Any]] = []
        self.guide: dict[str, Any] | None = None
        self.guided_by: str | None = None
        self.forced = False
        self.stop: tuple[str, ...] = ()
        self.prefill = ""  # what the answer begins with

    def with_tools(self, functions: list[dict[str, Any]], choice: str, named: str | None, parallel: bool) -> None:
        """`choice`: none, auto or required. Raises ApiError."""
        if choice == "none" or not functions:
            return
        try:
            tools.check(self.tokenizer)
        except Refusal as error:
            raise ApiError(400, str(error), "tools") from None
        self.functions = functions
        if choice == "required":
            allowed = [f for f in functions if named in (None, f["name"])]
            if not allowed:
                raise ApiError(400, f"Invalid value for 'tool_choice': there is no tool {named!r}", "tool_choice")
            self.guide, self.guided_by, self.forced = tools.guide(allowed), "tools", True
        elif not parallel:
            self.stop = (tools.CLOSE,)

    def reader(self) -> "tools.Reader | None":
        return tools.Reader({f["name"] for f in self.functions}, self.forced) if self.functions else None

    def prompt(self) -> list[int]:
        """Its ids; takes long for a long one, and touches nothing else. Raises ApiError."""
        described = [{"type": "function", "function": f} for f in self.functions]
        try:
            chat.template(self.tokenizer)
        except Refusal:
            message = "this model's tokenizer has no chat template: use /v1/completions, or start the server with chat_template="
            raise ApiError(400, message, self.param) from None
        try:
            text = chat.render(self.tokenizer, self.messages, tools=described or None) + self.prefill
            return self.tokenizer.encode(text + (tools.OPEN + "\n" if self.forced else ""))
        except Refusal as error:
            raise from_engine(error, self.param) from None

    def end_ids(self) -> frozenset[int]:
        return frozenset(chat.end_of_turn(self.tokenizer))
