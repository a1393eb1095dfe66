"""Token by token: a batch of prompts of any lengths, left-aligned, through one model."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from etude.errors import Refusal
from etude.infer.cache import KVCache
from etude.infer.sampling import Sampling, draw, penalize
from etude.model.transformer import Transformer
from etude.text.tokenizer import Streamer, Tokenizer


@dataclasses.dataclass
class Row:
    """One sample in the making. `finish` is None while it goes on, then "stop" (end token or stop string) or "length"."""

    prompt: list[int]
    choice: int = 0
    out: list[int] = dataclasses.field(default_factory=list)
    finish: str | None = None

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.out


@torch.inference_mode()
def decode(
    model: Transformer,
    rows: list[Row],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: set[int],
    use_cache: bool = True,
    on_crop: Callable[[int], None] = lambda limit: None,
) -> Iterator[list[Row]]:
    """Give every unfinished row one more token, yield those rows, and again until all are finished. The caller may set
    a row's `finish` in between.

    A model with a `position_limit` sees the last so many tokens; beyond it every position shifts with each token, so
    nothing can be cached and the window is computed anew (`on_crop(limit)` is called once when that begins)."""
    if use_cache and not can_cache(model):
        raise Refusal("this model's attention does not say what it would cache; type cache=false")
    device = next(model.parameters()).device
    limit = model.position_limit
    longest = max(len(r.prompt) for r in rows)
    fits = limit is None or longest <= limit
    cache = (
        _new_cache(model, len(rows), min(longest + max_tokens, limit or longest + max_tokens))
        if use_cache and fits
        else None
    )
    seen = _seen(model, rows, device) if sampling.repetition_penalty != 1.0 else None
    cropped = False
    for _ in range(max_tokens):
        if all(r.finish for r in rows):
            return
        longest = max(len(r.prompt) + len(r.out) for r in rows)
        if limit is not None and longest > limit:
            cache = None
            if not cropped:
                cropped = True
                on_crop(limit)
        logits = _whole(model, rows, limit, device) if cache is None else _next(model, rows, cache, device)
        if seen is not None:
            logits = penalize(logits, seen, sampling.repetition_penalty)
        tokens = draw(logits, sampling, [r.choice for r in rows], [len(r.out) for r in rows])
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        grown = []
        for row, token in zip(rows, tokens.tolist()):
            if row.finish is None:  # a finished row stays in the batch, writing one place of its cache again and again
                row.out.append(token)
                grown.append(row)
        for row in grown:
            row.finish = "stop" if row.out[-1] in stop_ids else "length" if len(row.out) >= max_tokens else None
        yield grown


def can_cache(model: Transformer) -> bool:
    """Whether every attention of the model can keep what it computed."""
    return all(hasattr(a, "cache_shape") for a in model.attentions())


def _new_cache(model: Transformer, batch: int, capacity: int) -> KVCache:
    p = next(model.parameters())
    return KVCache([a.cache_shape() for a in model.attentions()], batch, capacity, p.dtype, p.device)


def _seen(model: Transformer, rows: list[Row], device: torch.device) -> Tensor:
    seen = torch.zeros(len(rows), model.vocab_size, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        seen[i, torch.tensor(row.ids, dtype=torch.int64, device=device)] = True
    return seen


def _next(model: Transformer, rows: list[Row], cache: KVCache, device: torch.device) -> Tensor:
    """Logits (B, V) after the tokens that are not in the cache yet: all prompts, later the one new token of each."""
    if rows[0].out:
        tokens = torch.tensor([[r.out[-1]] for r in rows], device=device)
        x, _ = model.hidden(tokens, cache.positions(1), None, cache)
        x = x[:, 0]
    else:
        x = _ends(model, [r.prompt for r in rows], cache, device)
    cache.extend([len(r.prompt) + len(r.out) for r in rows])
    return model.logits(x)


def _whole(model: Transformer, rows: list[Row], limit: int | None, device: torch.device) -> Tensor:
    """Logits (B, V) from the whole context of each row, or its last `limit` tokens."""
    return model.logits(_ends(model, [r.ids[-limit:] if limit else r.ids for r in rows], None, device))


def _ends(model: Transformer, contexts: list[list[int]], cache: KVCache | None, device: torch.device) -> Tensor:
    """States (B, D) at the last token of each context. Shorter rows are filled up on the right, where causal attention
    never looks from inside the row."""
    width = max(map(len, contexts))
    tokens = torch.tensor([c + [0] * (width - len(c)) for c in contexts], device=device)
    x, _ = model.hidden(tokens, None, None, cache)
    return x[torch.arange(len(contexts), device=device), torch.tensor([len(c) - 1 for c in contexts], device=device)]


class TextRow:
    """A Row with its text: what may be shown by now, cut at stop strings.

    `push` takes what the row grew and returns new text; text that could be the beginning of a stop string is held back
    until that is decided, so that no part of one is ever shown."""

    def __init__(self, row: Row, tokenizer: Tokenizer, stop: list[str]):
        self.row, self.stop = row, [s for s in stop if s]
        self.streamer = Streamer(tokenizer)
        self.text, self.shown = "", 0

    def push(self, stop_ids: set[int]) -> str:
        if not (self.row.finish == "stop" and self.row.out[-1] in stop_ids):
            self.text += self.streamer.push(self.row.out[-1])
        if self.row.finish is not None:
            self.text += self.streamer.flush()
        found = [i for s in self.stop if (i := self.text.find(s)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.row.finish = "stop"
        held = 0 if self.row.finish is not None else max((_overlap(self.text, s) for s in self.stop), default=0)
        new = self.text[self.shown : len(self.text) - held]
        self.shown += len(new)
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    sampling: Sampling,
    max_tokens: int,
    stop: list[str] | None = None,
    n: int = 1,
    batch_size: int = 16,
    use_cache: bool = True,
    on_text: Callable[[int, str], None] = lambda i, text: None,
    on_crop: Callable[[int], None] = lambda limit: None,
    end_ids: set[int] = frozenset(),  # type: ignore[assignment]
) -> list[TextRow]:
    """n samples of each prompt (its ids), in order: prompt 0's first. `on_text(i, new)` is called as sample i's text comes. A
    sample ends with one of the tokenizer's stop_ids or of `end_ids`."""
    stop_ids = tokenizer.stop_ids | end_ids
    rows = [Row(list(p), choice) for p in prompts for choice in range(n)]
    texts = [TextRow(row, tokenizer, stop or []) for row in rows]
    for start in range(0, len(rows), batch_size):
        batch = texts[start : start + batch_size]
        index = {id(t.row): i for i, t in enumerate(batch, start)}
        for grown in decode(model, [t.row for t in batch], sampling, max_tokens, stop_ids, use_cache, on_crop):
            for row in grown:
                i = index[id(row)]
                if new := texts[i].push(stop_ids):
                    on_text(i, new)
    return texts


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt, with what the tokenizer puts before a text; an empty one becomes the token that documents begin
    after (else a line's end, else 0)."""
    if ids := tokenizer.encode(prompt, begin=True):
        return ids
    if tokenizer.eos is not None:
        return [tokenizer.eos]
    newline = tokenizer.backend.token_to_id("\n")
    return [newline if newline is not None else 0]
