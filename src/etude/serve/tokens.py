"""Tokens as bytes and text, and which of them belong to the text that was shown."""

import functools
from collections.abc import Iterable

from etude.errors import Refusal
from etude.infer import guide
from etude.infer.sampling import Token
from etude.text.tokenizer import Tokenizer


@functools.lru_cache(maxsize=4)
def vocabulary(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each token stands for, of a special one its name."""
    try:
        return guide.token_bytes(tokenizer)
    except Refusal:  # they depend on the tokens around it: what it is alone
        return [tokenizer.decode([i]).encode() for i in range(tokenizer.vocab_size)]


def token_bytes(tokenizer: Tokenizer, id: int) -> bytes:
    """None where the model's vocabulary is longer than the tokenizer's."""
    known = vocabulary(tokenizer)
    return known[id] if id < len(known) else b""


def token_text(data: bytes) -> str:
    """A token's bytes as text; where they are only a part of a character they are written out, as OpenAI does."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


class Aligner:
    """Gives tokens out with the text that they made: those of a stop text, or the token that ends a turn, never."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder()
        self.unseen = {i for i, t in added.items() if t.special}
        self.waiting: list[tuple[Token, int]] = []  # and where its bytes begin
        self.made = self.shown = 0  # bytes

    def push(self, text: str, tokens: Iterable[Token], finish: str | None, stop: str | int | None) -> list[Token]:
        for token in tokens:
            self.waiting.append((token, self.made))
            self.made += 0 if token.id in self.unseen else len(token_bytes(self.tokenizer, token.id))
        self.shown += len(text.encode())
        if finish is not None and isinstance(stop, int) and self.waiting:
            self.waiting.pop()
        if finish is not None and not isinstance(stop, str):
            ready = len(self.waiting)
        else:
            ready = sum(start < self.shown for _, start in self.waiting)
        out, self.waiting = [t for t, _ in self.waiting[:ready]], self.waiting[ready:]
        return out
