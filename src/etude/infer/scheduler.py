"""Which samples are computed in the next step, and how much of each: continuous batching (Yu et al. 2022) over a pool of
pages (Kwon et al. 2023), prompts in chunks (Agrawal et al. 2023)."""

import bisect
import time
from typing import NamedTuple

from etude.infer.cache import Chunk
from etude.infer.pages import Copy, PagePool, Table
from etude.infer.request import Request
from etude.infer.sampling import Chooser, Token
from etude.infer.text import Said


class Sample:
    """One sample of a request, in the making. `computed` of its `ids` are in the pages of `table`; with `whole` there are no
    pages, and the whole context is computed anew for each token."""

    def __init__(self, request: Request, name: str, choice: int, order: int, chooser: Chooser, said: Said, whole: bool):
        self.request, self.name, self.choice, self.chooser, self.said = request, name, choice, chooser, said
        self.ids = list(request.prompt)
        self.order = (request.priority, order, choice)
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout
        self.table: Table | None = None
        self.computed = 0
        self.whole = whole
        self.cached_tokens: int | None = None  # of the prompt; None before its first step
        self.prompt_tokens: list[Token] = []  # with prompt_logprobs

    @property
    def n_out(self) -> int:
        return len(self.ids) - len(self.request.prompt)


class Step(NamedTuple):
    """What one forward computes: chunks of samples, and samples whose whole context is computed."""

    chunks: list[tuple[Sample, Chunk]]
    copies: list[Copy]
    wholes: list[Sample]


class Scheduler:
    """Running samples first: those that need one token, then prompts; then the queue in order of priority and arrival, as
    long as a sample's prompt has room. Where pages run out, the last in order gives its own back and is computed again
    later: no sample is lost, and none changes by it."""

    def __init__(self, pool: PagePool, step_tokens: int, max_running: int):
        self.pool, self.step_tokens, self.max_running = pool, step_tokens, max_running
        self.waiting: list[Sample] = []
        self.running: list[Sample] = []
        self.preemptions = 0
        self._short: tuple[Sample | None, int] = (None, 0)  # who found too few pages, and how many there were

    def add(self, sample: Sample) -> None:
        bisect.insort(self.waiting, sample, key=lambda s: s.order)

    def next(self) -> Step:
        """The next step; pages are given, and contents of a partly shared page are to be copied first."""
        budget = self.step_tokens
        step = Step([], [], [])
        preempted = self.preemptions
        for s in sorted(self.running, key=lambda s: (len(s.ids) - s.computed > 1, s.order)):
            if s not in self.running or budget <= 0:  # preempted by one before it
                continue
            if s.whole:
                step.wholes.append(s)
                budget -= len(s.ids)
            elif self._room(s, wanted := min(len(s.ids) - s.computed, budget), step):
                budget -= wanted
            if self.preemptions != preempted:  # what was to be computed of others is not
                preempted = self.preemptions
                budget = self.step_tokens - sum(c.length for _, c in step.chunks) - sum(len(w.ids) for w in step.wholes)
        for s in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_running or self.preemptions != preempted:
                break
            if self._waits_for_sibling(s):
                continue
            if s.whole:
                step.wholes.append(s)
                budget -= len(s.ids)
            elif (n := self._admit(s, budget, step)) is not None:
                budget -= n
            else:
                break
            if s.cached_tokens is None:
                s.cached_tokens = s.computed
            self.waiting.remove(s)
            bisect.insort(self.running, s, key=lambda s: s.order)
        return step

    def _room(self, s: Sample, n: int, step: Step) -> bool:
        """Schedule n tokens of a running sample, at the cost of those behind it in order where pages are short."""
        assert s.table is not None
        while not self.pool.grow(s.table, s.computed + n):
            victim = next(r for r in reversed(self.running) if r.table is not None)
            step.chunks[:] = [pair for pair in step.chunks if pair[0] is not victim]
            self.preempt(victim)
            if victim is s:
                return False
        step.chunks.append((s, Chunk(s.table, s.computed, n)))
        return True

    def _waits_for_sibling(self, s: Sample) -> bool:
        """Whether another sample of the same prompt is computing it at this moment: its pages will be shared."""
        first = next((r for r in self.running if r.name == s.name), None) if s.choice else None
        return first is not None and self.pool.prefix_cache and first.computed < len(s.request.prompt) - 1

    def _admit(self, s: Sample, budget: int, step: Step) -> int | None:
        """Schedule the beginning of a waiting sample; -> its tokens in this step, None where pages are short."""
        if self._short[0] is s and self.pool.room <= self._short[1] and self.running:
            return None  # nothing has changed since it was tried
        table, copy = self.pool.open([] if s.request.prompt_logprobs else s.ids)
        n = min(len(s.ids) - table.tokens, budget)
        if not self.pool.grow(table, len(s.ids), hint=len(s.request.prompt) + s.request.max_tokens):
            if copy is not None:
                self.pool.copied(copy)
            whole = table.tokens // self.pool.page_size * self.pool.page_size
            self.pool.release(table, s.ids, whole)
            self._short = s, self.pool.room
            return None
        s.table, s.computed = table, table.tokens
        if copy is not None:
            step.copies.append(copy)
        step.chunks.append((s, Chunk(table, s.computed, n)))
        return n

    def computed(self, s: Sample, chunk: Chunk, window: int | None) -> None:
        """A chunk's keys and values are in its pages now."""
        s.computed = chunk.end
        self.pool.commit(chunk.table, s.ids, s.computed)
        if window is not None:
            self.pool.trim(chunk.table, s.computed + 1 - window)

    def preempt(self, s: Sample) -> None:
        """Back into the queue, to be computed again from its first token on, or from what is still cached of it."""
        self.preemptions += 1
        self.remove(s)
        self.add(s)

    def remove(self, s: Sample) -> None:
        """Take a sample out and give its pages back."""
        if s in self.waiting:
            self.waiting.remove(s)
        if s in self.running:
            self.running.remove(s)
        self.forget(s)

    def forget(self, s: Sample) -> None:
        """Give its pages back."""
        if s.table is not None:
            self.pool.release(s.table, s.ids, s.computed)
        s.table, s.computed = None, 0
