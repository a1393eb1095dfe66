"""Text that must be JSON of a schema, match a regular expression or a grammar: which tokens may come next. The work is
llguidance's (https://github.com/guidance-ai/llguidance, MIT): on our tokenizers it compiles a schema of 2 kB in 1 ms and
makes a mask in 10 to 50 us, it needs no other package, and it ends what would take too long by its own limits."""

import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor

from etude.errors import Refusal
from etude.text.tokenizer import Tokenizer, _byte_alphabet

KINDS = ("json", "regex", "grammar", "choice")
# Between the parts of JSON: enough to indent it, not enough for a model to stay there for ever.
SPACE = r"[ \n\r\t]{0,20}"
# Per step at most some 20 ms and in all 100 MB, a fifth of the library's own; a first mask takes 60 ms at most.
LIMITS = {"initial_lexer_fuel": 200_000, "max_lexer_states": 50_000, "verbose_errors": False}
LONGEST = 1 << 20  # characters of a schema, a pattern or a grammar
TRIED = 16  # tokens that are tried when one is compiled: what explodes, or cannot be written, mostly does so early


class Guide:
    """What one sample may say, a sampling.Constraint. It can be built anew by pushing the same tokens into a fresh one.

    `finished`: nothing but an end token may come, or one came; the sample should be ended with finish "stop".
    `error`: why nothing may come at all: a limit was met on the way, or a token came that was not allowed."""

    def __init__(self, matcher: Any, size: int, vocab_size: int, end_ids: Iterable[int]):
        """A matcher of llguidance at its start, the sizes of the tokenizer's and the model's vocabulary."""
        self._matcher, self._size, self._vocab_size = matcher, size, vocab_size
        self._ends = sorted(i for i in end_ids if 0 <= i < vocab_size)
        self._ended = False
        self.error: str | None = None

    @property
    def finished(self) -> bool:
        return self._ended or (self.error is None and self._matcher.is_stopped())

    def mask(self) -> Tensor:
        """-> (vocab_size,) bool: tokens that may come next, nothing after an error. End tokens may come where the text is
        whole, and they never stand for their text."""
        mask = torch.zeros(self._vocab_size, dtype=torch.bool)
        bits, may_end = self._bits()
        n = min(self._size, self._vocab_size)
        mask[:n] = bits[:n]
        mask[self._ends] = may_end
        return mask

    def _bits(self) -> tuple[Tensor, bool]:
        """-> (tokens of the text that may come next, whether it may end here)."""
        if self._ended or self.error is not None:
            return torch.zeros(self._size, dtype=torch.bool), self._ended
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = torch.from_numpy(np.unpackbits(packed, count=self._size + 1, bitorder="little")).bool()
        self._see_error()  # in which case the mask says that it may end
        if self.error is not None:
            return torch.zeros(self._size, dtype=torch.bool), False
        return bits[:-1], bool(bits[-1])

    def push(self, token: int) -> None:
        if self._ended or self.error is not None:
            return
        if token in self._ends:
            self._ended = True
            return
        if token >= self._size or not self._matcher.consume_token(token):
            self._see_error()
            self.error = self.error or f"token {token} is not one that the guide allows"

    def _see_error(self) -> None:
        if self._matcher.is_error():
            self.error = _line(self._matcher.get_error())


def compile_guide(
    tokenizer: Tokenizer,
    spec: dict[str, Any],
    end_ids: Iterable[int] | None = None,
    vocab_size: int | None = None,
) -> Callable[[], Guide]:
    """-> a function that makes a fresh Guide, for a sample each. Cached by (tokenizer, spec).

    spec is one of {"json": a JSON schema, or true for any object}, {"regex": a pattern that the whole text matches},
    {"grammar": a grammar in llguidance's kind of Lark}, {"choice": [texts]}. `end_ids` are the tokens that end the text
    (None: the tokenizer's stop_ids); `vocab_size` is the model's where it has more tokens than the tokenizer. This may take
    as much as seconds for what is large: call it outside of the engine's thread. Raises Refusal for what is wrong in spec, or
    too large, or cannot be written with this vocabulary."""
    kind, text = _read(spec)
    ends = frozenset(tokenizer.stop_ids if end_ids is None else end_ids)
    start = _compiled(tokenizer, kind, text)
    size = tokenizer.vocab_size
    return lambda: Guide(start.deep_copy(), size, size if vocab_size is None else vocab_size, ends)


def _read(spec: dict[str, Any]) -> tuple[str, str]:
    """-> (kind, its text). Raises Refusal."""
    if not isinstance(spec, dict) or len(spec) != 1 or (kind := next(iter(spec))) not in KINDS:
        raise Refusal(f"a guide is one of {', '.join(f'{{{k!r}: ...}}' for k in KINDS)}, not {str(spec)[:100]}")
    value = spec[kind]
    if kind == "json":
        if value is not True and not isinstance(value, dict):
            raise Refusal('{"json": ...} should be a JSON schema (an object), or true for any JSON object')
        try:
            text = json.dumps({"type": "object"} if value is True else value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise Refusal(f"the JSON schema is not JSON: {_line(str(error))}") from None
    elif kind == "choice":
        if not isinstance(value, list | tuple) or not value or not all(isinstance(t, str) and t for t in value):
            raise Refusal('{"choice": ...} should be a list of texts, none of them empty')
        text = "|".join("".join(f"\\x{{{ord(c):x}}}" for c in t) for t in value)
    elif not isinstance(value, str) or not value:
        raise Refusal(f'{{"{kind}": ...}} should be a text that is not empty')
    else:
        text = value
    if len(text) > LONGEST:
        raise Refusal(f"the guide has {len(text)} characters; {LONGEST} are the most")
    return kind, text


@functools.lru_cache(maxsize=64)
def _compiled(tokenizer: Tokenizer, kind: str, text: str) -> Any:
    """-> the matcher at its start, with what its first mask needs already made."""
    llguidance = _llguidance()
    Matcher = llguidance.LLMatcher
    words, tokens = _words(tokenizer)
    try:
        if kind == "json":
            grammar = Matcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": SPACE})
        elif kind == "grammar":
            grammar = Matcher.grammar_from_lark(text)
        else:
            grammar = Matcher.grammar_from_regex(text)
        start = Matcher(words, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
    except Exception as error:  # the library raises several kinds
        raise Refusal(f"the guide's {kind} is refused: {_line(str(error))}") from None
    if start.is_error():
        raise Refusal(f"the guide's {kind} is refused: {_line(start.get_error())}")
    _try(start, kind, tokens)
    return start


def _try(start: Any, kind: str, tokens: list[bytes]) -> None:
    """Say something that is allowed, up to TRIED tokens. Raises Refusal where that fails."""
    said = b""
    guide = Guide(start.deep_copy(), len(tokens), len(tokens), ())
    start.compute_bitmask()  # kept for all the copies
    for _ in range(TRIED):
        bits, may_end = guide._bits()
        if guide.error is None and not bits.any() and may_end:
            return
        if guide.error is None and bits.any():
            token = int(bits.to(torch.uint8).argmax())
            guide.push(token)
            if guide.error is None:
                said += tokens[token]
                continue
        text = said.decode(errors="replace")
        why = guide.error or "this tokenizer has no token for what must come next"
        raise Refusal(f"the guide's {kind} is refused: {why}" + (f" after {text!r}" if text else ""))


def _line(text: str) -> str:
    """A message of the library as one short line."""
    if "forced bytes" in text:  # the text can go on in one way only, and the vocabulary does not have that
        return "this tokenizer has no token for what must come next"
    if text.startswith("NoExtension"):
        return "no text of this tokenizer's tokens satisfies it"
    return " ".join(text.split("<state>")[0].replace("<non-verbose/>", "").split())[:300] or "no reason given"


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise Refusal("guided output needs llguidance: pip install llguidance") from None
    return llguidance


# ---------------------------------------------------------------- the vocabulary


@functools.lru_cache(maxsize=4)
def _words(tokenizer: Tokenizer) -> tuple[Any, list[bytes]]:
    """-> (the tokenizer as llguidance has it, whose end token is one beyond the vocabulary; token_bytes)."""
    llguidance = _llguidance()
    tokens = token_bytes(tokenizer)
    added = tokenizer.backend.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    special |= {i for i, text in enumerate(tokens) if not text}
    unknown = getattr(tokenizer.backend.model, "unk_token", None)
    if unknown is not None and (i := tokenizer.backend.token_to_id(unknown)) is not None:
        special.add(i)  # it stands for any text
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Words(tokenizer, tokens, sorted(special)))), tokens


class _Words:
    """What llguidance.TokenizerWrapper asks for. Calling it encodes a text that a guide leaves no choice about."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int]):
        self.eos_token_id, self.bos_token_id = len(tokens), None
        self.special_token_ids = [*special, len(tokens)]
        self.tokens = [t or b"<empty>" for t in tokens] + [b"<end>"]
        self._ids: dict[bytes, int] = {}
        for i in sorted(set(range(len(tokens))) - set(special), reverse=True):
            self._ids[tokens[i]] = i  # the lowest of equal ones
        self._longest = max(map(len, self._ids), default=0)
        self._backend = Backend.from_str(tokenizer.to_json())
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()

    def __call__(self, text: str | bytes) -> list[int]:
        """Never raises: the library takes that for its own bug. A text that the tokenizer would change, as by a space in
        front, is cut into the longest tokens instead, as far as there are any."""
        data = text.encode() if isinstance(text, str) else text
        try:
            ids = self._backend.encode(data.decode(), add_special_tokens=False).ids
            if b"".join(self.tokens[i] for i in ids) == data and not set(ids) & set(self.special_token_ids):
                return ids
        except Exception:  # not UTF-8, or a character that the vocabulary does not have: cut it instead
            pass
        ids, at = [], 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            end = next((e for e in ends if data[at:e] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[data[at:end]])
            at = end
        return ids


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each token adds to a text, b"" for ids without one. Raises Refusal where they depend on the tokens
    around it."""
    state = json.loads(tokenizer.to_json())["decoder"]
    steps = _flat(state)
    kinds = {s["type"] for s in steps}
    if not kinds or (strange := kinds - {"ByteLevel", "Fuse", "ByteFallback", "Replace", "Strip", "Metaspace"}):
        why = f"its decoder is {', '.join(sorted(strange))}" if kinds else "it has no decoder"
        raise Refusal(
            f"this tokenizer's tokens have no fixed text ({why}): guided output needs a BPE, byte or char tokenizer"
        )
    alphabet = {c: bytes([i]) for i, c in enumerate(_byte_alphabet())} if "ByteLevel" in kinds else None
    added = tokenizer.backend.get_added_tokens_decoder()
    found = []
    for i in range(tokenizer.vocab_size):
        token = added[i].content if i in added else tokenizer.token(i) or ""
        found.append(token.encode() if i in added else _bytes(token, steps, alphabet))
    return found


def _flat(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return [s for d in decoder["decoders"] for s in _flat(d)] if decoder["type"] == "Sequence" else [decoder]


def _bytes(token: str, steps: list[dict[str, Any]], alphabet: dict[str, bytes] | None) -> bytes:
    for s in steps:
        if s["type"] == "Replace" and "String" in s["pattern"]:
            token = token.replace(s["pattern"]["String"], s["content"])
        elif s["type"] == "Metaspace":
            token = token.replace(s["replacement"], " ")
        elif s["type"] == "ByteFallback" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
    if alphabet is None:
        return token.encode()
    return b"".join(alphabet.get(c) or c.encode() for c in token)
