"""What is asked of the engine, and what it answers."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from etude.errors import EtudeError, Refusal
from etude.infer.sampling import Constraint, Sampling, Token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Samples of one prompt (ids). Raises Refusal for values out of range."""

    prompt: list[int]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    n: int = 1  # samples
    max_tokens: int = 16  # new ones, a sample
    stop: tuple[str, ...] = ()  # texts that end a sample; no part of one is ever shown
    stop_ids: frozenset[int] = frozenset()  # tokens that end it, beside the tokenizer's
    ignore_stop_ids: bool = False  # only stop texts and max_tokens end it
    guide: dict[str, Any] | None = None  # {"json": schema}, {"regex": pattern}, {"grammar": text}: see guide.py
    allowed: Callable[[], Constraint] | None = None  # a rule of your own, made anew for each sample, instead of a guide
    prompt_logprobs: bool = False  # of each token of the prompt, with as many of the likeliest as sampling.logprobs
    priority: int = 0  # lower ones first
    timeout: float | None = None  # seconds from its arrival on

    def __post_init__(self) -> None:
        if not self.prompt:
            raise Refusal("the prompt has no tokens; give at least one")
        for name in ("n", "max_tokens"):
            if getattr(self, name) < 1:
                raise Refusal(f"{name}={getattr(self, name)} should be at least 1")
        if self.guide is not None and self.allowed is not None:
            raise Refusal("guide and allowed both say which tokens may come; give one of them")
        if self.timeout is not None and not self.timeout > 0:
            raise Refusal(f"timeout={self.timeout} should be above 0 seconds")


class Piece(NamedTuple):
    """What one sample grew in one step of the engine."""

    request: str
    choice: int
    text: str = ""  # new and certain: no half of a character, nothing that could become a stop text
    tokens: tuple[Token, ...] = ()  # new ones, a stop token among them
    finish: str | None = None  # stop, length, abort, timeout, error
    stop: str | int | None = None  # the text or token that ended it
    error: str | None = None  # with finish="error"
    cached_tokens: int = 0  # of the prompt, that were not computed again
    prompt_tokens: tuple[Token, ...] = ()  # once, with prompt_logprobs: the first has none
    version: int = 0  # of the weights


@dataclasses.dataclass
class Completion:
    """A finished sample."""

    prompt: list[int]
    choice: int
    text: str
    tokens: list[Token]
    finish: str
    stop: str | int | None
    error: str | None
    cached_tokens: int
    prompt_tokens: list[Token]
    version: int

    @property
    def ids(self) -> list[int]:
        return [t.id for t in self.tokens]


class QueueFull(EtudeError):
    """Too many requests wait; try again later."""


class EngineDead(EtudeError):
    """The engine's thread has ended; the message says why."""
