"""The inference engine: many requests at once on one model, in the caller's thread (`generate`, `step`) or in its own
(`start`, `generate_async`). Shapes: N tokens of a step, B samples that get their next token, D channels, V tokens."""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from etude.errors import Refusal
from etude.infer import graphs, kernels
from etude.infer.cache import STATIC, Batch, Chunk, PagedCache, choose_backend
from etude.infer.guide import compile_guide
from etude.infer.pack import pack
from etude.infer.pages import PagePool
from etude.infer.request import Completion, EngineDead, Piece, QueueFull, Request
from etude.infer.sampling import Chooser, Constraint, Token, choose, score
from etude.infer.scheduler import Sample, Scheduler
from etude.infer.tape import Tapes
from etude.infer.text import Said
from etude.text.tokenizer import Tokenizer

MOST_POSITIONS = 1 << 22  # of a cache: a tiny model's would take longer to make than to use
HANG = 60.0  # seconds without a step, with work to do, after which the engine counts as dead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """conf/engine/default.yaml says what each does."""

    page_size: int = 32
    cache_mb: int = 1024
    step_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 256
    prefix_cache: bool = True
    attention: Literal["auto", "native", "views", "gather", "padded", "varlen"] = "auto"
    cuda_graphs: bool = True
    deterministic: bool = False
    quant: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        self.check(self.page_size, self.cache_mb, self.step_tokens, self.max_running, self.max_waiting)

    @staticmethod
    def check(page_size: int, cache_mb: int, step_tokens: int, max_running: int, max_waiting: int) -> None:
        """Raises ValueError for settings out of range; config.py runs it before torch is imported."""
        if page_size not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"engine.page_size={page_size} should be a power of two up to 256")
        sizes = {"cache_mb": cache_mb, "step_tokens": step_tokens, "max_running": max_running}
        for name, value in (sizes | {"max_waiting": max_waiting}).items():
            if value < 1:
                raise ValueError(f"engine.{name}={value} should be at least 1")


class InferenceEngine:
    """Requests in, pieces of text out. `context` is the longest prompt and completion together (None: what the model has
    positions for; then a model with learned ones goes on with its last so many tokens, computed anew for each).

    The engine computes with a packed twin of `model` (pack.py) in the dtype of its parameters: after an update of the
    weights, `refresh`. Raises Refusal for settings that this machine or model cannot have."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        settings: Settings | None = None,
        context: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings or Settings()
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, dtype or parameter.dtype
        self.threads = torch.get_num_threads()  # on CPU
        self.limit: int | None = model.position_limit
        self.context, self.crops = context or self.limit, context is None
        self.vocab_size: int = model.vocab_size
        self.cached = all(hasattr(a, "cache_shape") for a in model.attentions())
        shapes = [a.cache_shape() for a in model.attentions()] if self.cached else []
        size = self.settings.page_size
        self.backend = choose_backend(self.settings.attention, shapes, size, self.dtype, self.device)
        self.native = self.device.type == "cpu" and self.backend == "native"
        self._check_settings()
        self.pool = PagePool(self._pages(shapes), size, self.settings.prefix_cache)
        self.cache = PagedCache(shapes, self.pool, self.dtype, self.device, self.backend)
        windows: list[int | None] = [getattr(a, "window", None) for a in model.attentions()]
        self.window = None if None in windows else max(w for w in windows if w is not None)
        self.scheduler = Scheduler(self.pool, self.settings.step_tokens, self.settings.max_running)
        self.version = 0
        self.graphs: graphs.Graphs | None = None
        self._pack()
        if self.settings.cuda_graphs and self.device.type == "cuda" and self.cached and self.backend in STATIC:
            self.graphs = self._graphs(functools.partial(graphs.on_cuda, self.device))
        self._names, self._order = itertools.count(), itertools.count()
        self._counts: collections.Counter[str] = collections.Counter()
        self._others: list[Piece] = []  # of requests that were added by hand while `run` was at work
        self._worker: Worker | None = None
        self.last_step = time.monotonic()

    def _pages(self, shapes: list[tuple[int, int, int]]) -> int:
        """As many as engine.cache_mb holds, but no more than could be of use."""
        if not self.cached:
            return 1
        size = self.settings.page_size
        n_pages = self.settings.cache_mb * 2**20 // (PagedCache.bytes_per_token(shapes, self.dtype) * size)
        if self.context is not None:  # more than all that may run at once, and as much of what was there before
            n_pages = min(n_pages, self.settings.max_running * -(-self.context // size) * 2)
        return max(1, min(n_pages, MOST_POSITIONS // size))

    def _check_settings(self) -> None:
        asked = self.settings
        if self.backend == "native" and not (self.device.type == "cpu" and kernels.available()):
            raise Refusal(f"engine.attention=native runs on CPU with a C compiler ({kernels.why_not()}); type auto")
        if asked.quant is not None and not self.native:
            raise Refusal(f"engine.quant={asked.quant} runs on CPU with a C compiler ({kernels.why_not()})")
        if asked.deterministic and not self.native:
            raise Refusal(
                f"engine.deterministic=true needs our kernels, which run on CPU with a C compiler ({kernels.why_not()})"
            )

    # ------------------------------------------------------------ weights

    def refresh(self) -> None:
        """The model's weights have changed: take the new ones. What runs is computed again with them, what was cached is
        forgotten. To be called where `step` is."""
        for sample in list(self.scheduler.running):
            self.scheduler.preempt(sample)
        self.pool.forget()
        self.version += 1
        self._pack()

    def _pack(self) -> None:
        with torch.inference_mode():
            self.twin = pack(self.model, self.dtype, self.settings.quant, self.native)
        self.tapes = Tapes(self.twin, self.cache) if self.native and self.cached else None
        if self.graphs is not None:
            self.graphs.renew(self.twin)

    def _graphs(self, start: Callable[[], graphs.Capture]) -> graphs.Graphs:
        """For all that may run at once."""
        rows, pages = min(self.settings.max_running, self.settings.step_tokens), self.pool.n_pages
        if self.context is not None:
            pages = min(pages, -(-self.context // self.pool.page_size))
        return graphs.Graphs(self.twin, self.cache, rows, pages, self.device, start)

    @torch.no_grad()
    def score(self, tokens: Tensor | list[int], doc_ids: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, T - 1) of tokens (B, T) or one list, each after those before it: by the model itself, as a
        training step computes them, bit for bit."""
        ids = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)
        ids = ids[None] if ids.ndim == 1 else ids
        training = self.model.training
        self.model.eval()
        try:
            docs = None if doc_ids is None else doc_ids[:, :-1]
            return self.model(ids[:, :-1], targets=ids[:, 1:], doc_ids=docs)[0].logprob
        finally:
            self.model.train(training)

    # ------------------------------------------------------------ requests

    def admit(self, request: Request) -> None:
        """Raises Refusal for a request that can never be served."""
        longest, limit = len(request.prompt) + request.max_tokens, self.context
        if limit is not None and longest > limit and not self.crops:
            raise Refusal(
                f"the prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens} are more than the context of {limit} tokens"
            )
        if not all(0 <= i < self.vocab_size for i in request.prompt):
            raise Refusal(f"the prompt has token ids outside of 0..{self.vocab_size - 1}")
        held = longest if limit is None else min(longest, limit)
        if self.cached and not self.pool.fits(held):
            raise Refusal(
                f"{held} tokens need more than the {self.pool.n_pages} pages of {self.pool.page_size} positions that there are; raise engine.cache_mb"
            )

    def samples(self, request: Request) -> list[Sample]:
        """A request's samples, to be handed to `add`. Touches no state: may be called in any thread. Raises Refusal."""
        self.admit(request)
        make: Callable[[], Constraint] | None = request.allowed
        if request.guide is not None:
            make = compile_guide(self.tokenizer, request.guide, self._ends(request), self.vocab_size)
        name, order = f"r{next(self._names)}", next(self._order)
        return [
            Sample(
                request,
                name,
                choice,
                order,
                Chooser(request.sampling, choice, request.prompt, self.vocab_size, make and make()),
                Said(self.tokenizer, request.stop),
                whole=not self.cached or (self.limit is not None and len(request.prompt) > self.limit),
            )
            for choice in range(request.n)
        ]

    def _ends(self, request: Request) -> frozenset[int]:
        return request.stop_ids | (frozenset() if request.ignore_stop_ids else frozenset(self.tokenizer.stop_ids))

    def add_request(self, request: Request) -> str:
        """Queue a request; -> its name, which its pieces carry. Raises Refusal, QueueFull."""
        samples = self.samples(request)
        if len(self.scheduler.waiting) + len(samples) > max(self.settings.max_waiting, len(samples)):
            raise QueueFull(f"{len(self.scheduler.waiting)} samples wait already (engine.max_waiting)")
        for sample in samples:
            self.scheduler.add(sample)
        return samples[0].name

    def abort(self, name: str) -> list[Piece]:
        """End a request at once; its pages are free. -> the last piece of each of its samples, none of an unknown name."""
        unfinished = (*self.scheduler.waiting, *self.scheduler.running)
        return [self._end(s, "abort") for s in unfinished if s.name == name]

    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    # ------------------------------------------------------------ a step

    def step(self) -> list[Piece]:
        """Compute one batch; -> what samples grew by it, also those that ran out of time."""
        others, self._others = self._others, []
        return others + self._step()

    @torch.inference_mode()
    def _step(self) -> list[Piece]:
        with kernels.alone(self.threads) if self.native else contextlib.nullcontext():
            return self._compute()

    def _compute(self) -> list[Piece]:
        now = time.monotonic()
        late = [s for s in (*self.scheduler.waiting, *self.scheduler.running) if s.deadline and s.deadline < now]
        pieces = [self._end(s, "timeout") for s in late]
        step = self.scheduler.next()
        with torch.autocast(self.device.type, enabled=False):
            for copy in step.copies:
                self.cache.copy(copy)
                self.pool.copied(copy)
            ready, states = [], []
            if step.chunks:
                x = self._chunks(step.chunks)
                at = 0
                last = []
                for s, chunk in step.chunks:
                    at += chunk.length
                    if s.request.prompt_logprobs:
                        self._prompt_logprobs(s, chunk.start, x[at - chunk.length : at])
                    self.scheduler.computed(s, chunk, self.window)
                    if s.computed == len(s.ids):
                        ready.append(s)
                        last.append(at - 1)
                if ready:
                    states.append(x if len(last) == len(x) else x[last])
            if step.wholes:
                ready += step.wholes
                states.append(self._whole(step.wholes))
            if ready:
                logits = self.twin.logits(states[0] if len(states) == 1 else torch.cat(states))
                pieces += [self._grow(s, t) for s, t in zip(ready, choose(logits, [s.chooser for s in ready]))]
        self._counts["steps"] += 1
        self.last_step = time.monotonic()
        self._counts["computed_tokens"] += sum(c.length for _, c in step.chunks)
        return pieces

    def _chunks(self, chunks: list) -> Tensor:
        """States (N, D) of all tokens of the chunks."""
        ids = [i for s, c in chunks for i in s.ids[c.start : c.end]]
        only = [c for _, c in chunks]
        eager = functools.partial(self._forward, ids, only)
        return eager() if self.graphs is None else self.graphs.states(ids, only, eager)

    def _forward(self, ids: list[int], chunks: list[Chunk]) -> Tensor:
        self.cache.batch = batch = Batch(chunks, self.pool, self.device)
        tokens = torch.tensor([ids], device=self.device)
        if self.tapes is not None:
            return self.tapes.through(self.twin.embedded(tokens, batch.positions), batch)[0]
        return self.twin.hidden(tokens, batch.positions, None, self.cache)[0][0]

    def _whole(self, samples: list[Sample]) -> Tensor:
        """States (B, D) at the ends of whole contexts, or of their last `limit` tokens. Shorter rows are filled up on the
        right, where causal attention never looks from inside the row."""
        contexts = [s.ids[-self.limit :] if self.limit else s.ids for s in samples]
        width = max(map(len, contexts))
        tokens = torch.tensor([c + [0] * (width - len(c)) for c in contexts], device=self.device)
        x, _ = self.twin.hidden(tokens, None, None, None)
        return x[torch.arange(len(contexts)), torch.tensor([len(c) - 1 for c in contexts])]

    def _prompt_logprobs(self, s: Sample, start: int, x: Tensor) -> None:
        """Of the prompt's tokens that follow those of a chunk; the logits of few at a time."""
        prompt = s.request.prompt
        if not s.prompt_tokens:
            s.prompt_tokens.append(Token(prompt[0]))
        first = len(s.prompt_tokens) - 1  # its state tells the next one
        for at in range(first, min(start + len(x), len(prompt) - 1), 64):
            rows = x[at - start : min(at - start + 64, len(prompt) - 1 - start)]
            wanted = prompt[at + 1 : at + 1 + len(rows)]
            s.prompt_tokens += score(self.twin.logits(rows), wanted, s.request.sampling.logprobs or 0)

    def _grow(self, s: Sample, token: Token | None) -> Piece:
        """Give a sample its next token and see whether it ends."""
        if token is None:
            self.pool.forget()  # what made the NaN may be in the cache
            return self._end(s, "error", error=s.chooser.error)
        s.ids.append(token.id)
        s.chooser.push(token.id)
        self._counts["generated_tokens"] += 1
        first = s.n_out == 1
        if first:
            self._counts["prompt_tokens"] += len(s.request.prompt)
        finish: str | None = None
        stop: str | int | None = None
        if token.id in self._ends(s.request):
            finish, stop, text = "stop", token.id, ""
        else:
            text = s.said.push(token.id)
            if s.said.stopped is not None:
                finish, stop = "stop", s.said.stopped
        if finish is None and getattr(s.chooser.allowed, "finished", False):
            finish = "stop"  # the text is whole; there may be no token that could say so
        if finish is None and (s.n_out >= s.request.max_tokens or (len(s.ids) == self.context and not self.crops)):
            finish = "length"
        told = tuple(s.prompt_tokens) if first and s.request.prompt_logprobs else ()
        if finish is not None:
            return self._end(s, finish, text, (token,), stop, told)
        if not s.whole and self.limit is not None and len(s.ids) > self.limit:
            self.scheduler.forget(s)
            s.whole = True
        cached = s.cached_tokens or 0
        return Piece(s.name, s.choice, text, (token,), cached_tokens=cached, prompt_tokens=told, version=self.version)

    def _end(
        self,
        s: Sample,
        finish: str,
        text: str = "",
        tokens: tuple[Token, ...] = (),
        stop: str | int | None = None,
        told: tuple[Token, ...] = (),
        error: str | None = None,
    ) -> Piece:
        self.scheduler.remove(s)
        self._counts[f"finished_{finish}"] += 1
        text += s.said.flush()
        return Piece(s.name, s.choice, text, tokens, finish, stop, error, s.cached_tokens or 0, told, self.version)

    # ------------------------------------------------------------ in the caller's thread

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """(number of its request, finished sample), in the order in which samples finish. Requests are taken as there is
        room for them."""
        for number, request, pieces in self._pieces(requests):
            if pieces[-1].finish is not None:
                yield number, joined(request, pieces)

    def _pieces(self, requests: Iterable[Request]) -> Iterator[tuple[int, Request, list[Piece]]]:
        """(number of a request, it, all pieces of one of its samples so far), at each new piece."""
        numbered = enumerate(requests)
        taken: dict[str, tuple[int, Request, list[list[Piece]]]] = {}
        more = True
        try:
            while more or taken:
                while more and len(self.scheduler.waiting) < self.settings.max_running:
                    if (following := next(numbered, None)) is None:
                        more = False
                    else:
                        samples = self.samples(following[1])
                        for sample in samples:
                            self.scheduler.add(sample)
                        taken[samples[0].name] = (*following, [[] for _ in samples])
                for piece in self._step() if taken else ():
                    if piece.request not in taken:
                        self._others.append(piece)
                    else:
                        number, request, lists = taken[piece.request]
                        lists[piece.choice].append(piece)
                        yield number, request, lists[piece.choice]
                        if all(p and p[-1].finish for p in lists):
                            del taken[piece.request]
        finally:
            for name in taken:
                self.abort(name)

    def generate(self, prompts: Sequence[str | list[int] | Request], **options: Any) -> list[Completion]:
        """The samples of each prompt (a text, ids or a whole request), prompt 0's first. `options` are Request's."""
        requests = [self.request(p, **options) for p in prompts]
        made = sorted(self.run(requests), key=lambda pair: (pair[0], pair[1].choice))
        return [completion for _, completion in made]

    def stream(self, prompt: str | list[int] | Request, **options: Any) -> Iterator[Piece]:
        """The pieces of one prompt's samples as they come."""
        for _, _, pieces in self._pieces([self.request(prompt, **options)]):
            yield pieces[-1]

    def request(self, prompt: str | list[int] | Request, **options: Any) -> Request:
        if isinstance(prompt, Request):
            return prompt
        return Request(prompt=encode_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else prompt, **options)

    # ------------------------------------------------------------ in its own thread

    def start(self) -> None:
        """Begin the engine's own thread. From now on it alone touches the engine's state: use `generate_async`."""
        if self._worker is None:
            self._worker = Worker(self)

    @property
    def alive(self) -> bool:
        """Whether the thread runs and makes steps while there is work."""
        return self._worker is not None and self._worker.fault() is None

    async def generate_async(self, request: Request) -> AsyncGenerator[Piece, None]:
        """The pieces of a request's samples as they come; closing the iterator aborts it. Raises Refusal, QueueFull,
        EngineDead, also in the middle."""
        if self._worker is None:
            raise EngineDead("the engine has not been started")
        stream = self._worker.stream(request)
        async with contextlib.aclosing(stream):
            async for piece in stream:
                yield piece

    def stats(self) -> dict[str, Any]:
        """Counts and gauges, readable from any thread."""
        counts = dict(self._counts)
        pages = self.pool.stats()
        return {k: counts.get(k, 0) for k in ("steps", "computed_tokens", "prompt_tokens", "generated_tokens")} | {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "preemptions": self.scheduler.preemptions,
            "version": self.version,
            "last_step": time.monotonic() - self.last_step,
            "finished": {k.removeprefix("finished_"): n for k, n in counts.items() if k.startswith("finished_")},
            "pages": pages["pages"],
            **{f"pages_{k}": pages[k] for k in ("free", "cached", "used")},
            "prefix_hit_tokens": pages["hit_tokens"],
            "prefix_query_tokens": pages["queried_tokens"],
            "evictions": pages["evictions"],
        }

    def shutdown(self, timeout: float = 10.0) -> None:
        """End the thread; what still runs is aborted."""
        if self._worker is not None:
            self._worker.stop(timeout)


class Worker:
    """The engine's thread. Others hand it commands; it hands pieces to the event loops that wait for them."""

    def __init__(self, engine: InferenceEngine):
        self.engine = engine
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.listeners: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Piece]]] = {}
        self.submitted, self.lock = 0, threading.Lock()  # samples in the inbox
        self.stopping, self.crash = False, ""
        engine.last_step = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="etude-engine", daemon=True)
        self.thread.start()

    def fault(self) -> str | None:
        """Why nothing will come any more; None while all is well."""
        if self.crash or not self.thread.is_alive():
            return self.crash or "the engine has been shut down"
        quiet = time.monotonic() - self.engine.last_step
        return f"the engine has made no step for {quiet:.0f} s" if quiet > HANG and self.engine.has_work() else None

    async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        if (fault := self.fault()) is not None or self.stopping:
            raise EngineDead(fault or "the engine is being shut down")
        # A grammar may take long to compile: that is nobody's business but this request's.
        make = self.engine.samples
        samples = make(request) if request.guide is None else await asyncio.to_thread(make, request)
        with self.lock:
            waiting = self.submitted + len(self.engine.scheduler.waiting)
            if waiting and waiting + len(samples) > self.engine.settings.max_waiting:
                raise QueueFull(f"{waiting} samples wait already")
            self.submitted += len(samples)
        name = samples[0].name
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.listeners[name] = asyncio.get_running_loop(), pieces
        unfinished = len(samples)
        try:
            self.inbox.put(lambda: self._add(samples))
            while unfinished:
                try:
                    piece = await asyncio.wait_for(pieces.get(), 0.5)
                except TimeoutError:
                    if (fault := self.fault()) is not None:
                        raise EngineDead(fault) from None
                    continue
                unfinished -= piece.finish is not None
                yield piece
        finally:
            del self.listeners[name]
            if unfinished:
                self.inbox.put(lambda: self._abort(name))

    def _add(self, samples: list[Sample]) -> None:
        for sample in samples:
            self.engine.scheduler.add(sample)
        with self.lock:
            self.submitted -= len(samples)
        self.engine.last_step = max(self.engine.last_step, time.monotonic())

    def _abort(self, name: str) -> None:
        self.engine.abort(name)

    def _run(self) -> None:
        try:
            while not self.stopping:
                with contextlib.suppress(queue.Empty):
                    self.inbox.get(timeout=None if not self.engine.has_work() else 0.0)()
                    while True:
                        self.inbox.get_nowait()()
                if self.engine.has_work() and not self.stopping:
                    self._deliver(self.engine.step())
        except BaseException as error:
            self.crash = f"the engine's thread ended: {type(error).__name__}: {error}"
            traceback.print_exc()
        finally:
            for name in {s.name for s in (*self.engine.scheduler.waiting, *self.engine.scheduler.running)}:
                with contextlib.suppress(Exception):
                    self.engine.abort(name)

    def _deliver(self, pieces: list[Piece]) -> None:
        """One wake-up of each event loop a step, however many pieces there are."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Piece], Piece]]] = {}
        for piece in pieces:
            if (listener := self.listeners.get(piece.request)) is not None:
                by_loop.setdefault(listener[0], []).append((listener[1], piece))
        for loop, found in by_loop.items():
            with contextlib.suppress(RuntimeError):  # a loop that was closed meanwhile
                loop.call_soon_threadsafe(_put, found)

    def stop(self, timeout: float) -> None:
        def stop() -> None:
            self.stopping = True

        self.inbox.put(stop)
        self.thread.join(timeout)


def _put(found: list[tuple[asyncio.Queue[Piece], Piece]]) -> None:
    for pieces, piece in found:
        pieces.put_nowait(piece)


def joined(request: Request, pieces: list[Piece]) -> Completion:
    """All pieces of one sample."""
    last = pieces[-1]
    return Completion(
        prompt=request.prompt,
        choice=last.choice,
        text="".join(p.text for p in pieces),
        tokens=[t for p in pieces for t in p.tokens],
        finish=last.finish or "",
        stop=last.stop,
        error=last.error,
        cached_tokens=last.cached_tokens,
        prompt_tokens=[t for p in pieces for t in p.prompt_tokens],
        version=last.version,
    )


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt, with what the tokenizer puts before a text; an empty one becomes the token that documents begin
    after (else a line's end, else 0)."""
    if ids := tokenizer.encode(prompt, begin=True):
        return ids
    if tokenizer.eos is not None:
        return [tokenizer.eos]
    newline = tokenizer.backend.token_to_id("\n")
    return [newline if newline is not None else 0]
