"""The order of the data: a pure function of (seed, global sample number), the same for any number of ranks,
micro-batches and loader workers, and untouched by evaluation."""

import fractions
import functools
import heapq
import itertools
import math
from collections.abc import Iterator

import numpy as np


def mix(*keys: int | np.ndarray) -> np.ndarray:
    """64 well-mixed bits of the keys, elementwise: SplitMix64 (Steele et al. 2014) chained over them. -> uint64."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            z = state + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return state


class Order:
    """Which of `n` samples has a global number. "random" draws with replacement, "shuffle" is a new permutation each epoch,
    "sequential" is 0, 1, 2, ... An epoch has `epoch_size` samples: n, or the multiple of a batch below it; of random
    samples `random_epoch`, where n counts some data several times."""

    def __init__(self, n: int, *, seed: int, kind: str, drop_last: int = 1, random_epoch: int | None = None):
        self.n, self.seed, self.kind = n, seed, kind
        if kind == "random":
            self.epoch_size = n if random_epoch is None else random_epoch
        else:
            self.epoch_size = n - n % drop_last if n >= drop_last else n
        # A batch may hold the end of an epoch and the beginning of the next.
        self._permutation = functools.lru_cache(maxsize=2)(self._shuffled)

    def sample(self, numbers: np.ndarray) -> np.ndarray:
        """Global sample numbers -> sample indices below n."""
        if self.kind == "random":
            return (mix(self.seed, numbers) % np.uint64(self.n)).astype(np.int64)
        epochs, within = np.divmod(numbers, self.epoch_size)
        if self.kind == "sequential":
            return within
        return np.array([self._permutation(int(e))[i] for e, i in zip(epochs, within)], dtype=np.int64)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.n)

    def state(self) -> dict:
        return {"seed": self.seed, "n": self.n, "order": self.kind}


class Mixed:
    """Several orders dealt out in exact proportions: of the first N samples of all, source i has less than one sample more
    or fewer than N times its weight, whatever N is.

    Sample k of a source with weight w may come from number floor(k / w) on and must come before ceil((k + 1) / w); always
    taking, of those that may, the one that must come first keeps that promise (proportionate fairness, Baruah et al. 1996).
    Weights are fractions with a common denominator of at most PERIOD, to which others are rounded; one period is
    dealt once and repeated, so a number's source is looked up."""

    PERIOD = 1 << 18

    def __init__(self, orders: list[Order], weights: list[float]):
        self.orders = orders
        self.counts = proportions(weights, self.PERIOD)
        self.table = deal(self.counts)
        period = len(self.table)
        self.rank = np.empty(period, dtype=np.int64)  # how many of the same source stand before
        for i, count in enumerate(self.counts):
            self.rank[self.table == i] = np.arange(count)
        self.starts = np.cumsum([0, *(o.n for o in orders)])
        self.n = int(self.starts[-1])
        share = [c / period for c in self.counts]
        # An epoch is over when the source that lasts longest has been seen once.
        self.epoch_size = round(max(o.epoch_size / s for o, s in zip(orders, share)))

    def sample(self, numbers: np.ndarray) -> np.ndarray:
        """Global sample numbers -> indices into the sources laid end to end."""
        periods, within = np.divmod(numbers, len(self.table))
        source = self.table[within]
        out = np.empty(len(numbers), dtype=np.int64)
        for i, order in enumerate(self.orders):
            mine = source == i
            own = periods[mine] * self.counts[i] + self.rank[within[mine]]
            out[mine] = self.starts[i] + order.sample(own)
        return out

    def state(self) -> dict:
        states = [o.state() for o in self.orders]
        return {k: [s[k] for s in states] for k in states[0]} | {"counts": self.counts}


def proportions(weights: list[float], period: int) -> list[int]:
    """Weights -> the samples each source has of a common period: exact where a period of at most `period` does it, else
    rounded to one of `period` by largest remainders, each source keeping one at least."""
    exact = [fractions.Fraction(str(w)) for w in weights]
    shares = [w / sum(exact) for w in exact]
    least = math.lcm(*(s.denominator for s in shares))
    if least <= period:
        return [int(s * least) for s in shares]
    counts = [max(1, int(s * period)) for s in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * period)
    for i in itertools.islice(itertools.cycle(by_remainder), max(0, period - sum(counts))):
        counts[i] += 1
    return counts


def deal(counts: list[int]) -> np.ndarray:
    """The source of each place of one period, in which source i has counts[i] places."""
    period = sum(counts)
    table = np.empty(period, dtype=np.int64)
    waiting = [(0, i, 0) for i, c in enumerate(counts) if c]  # (from, source, sample of it)
    ready: list[tuple[int, int, int]] = []  # (until, source, sample)
    heapq.heapify(waiting)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, i, k = heapq.heappop(waiting)
            heapq.heappush(ready, (-((k + 1) * period // -counts[i]), i, k))
        _, table[place], k = heapq.heappop(ready)
        i = int(table[place])
        if k + 1 < counts[i]:
            heapq.heappush(waiting, ((k + 1) * period // counts[i], i, k + 1))
    return table


class ResumableDistributedSampler:
    """Yields, micro-batch by micro-batch, which samples this rank reads next; a torch BatchSampler in kind.

    A step takes the `batch_size` global sample numbers from step * batch_size on, whatever the ranks. They are cut
    into micro-batches of `micro_batch_size`, and rank r of W reads the r-th W-th of those. `order` maps a number to a
    sample. The state is the next step alone; `epoch` and `iter` (batches into it) are derived from it."""

    def __init__(
        self, order: Order | Mixed, *, batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ):
        self.order = order
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.step = 0
        self.stop: int | None = None

    @property
    def epoch(self) -> int:
        return self.step * self.batch_size // self.order.epoch_size

    @property
    def iter(self) -> int:
        return self.step * self.batch_size % self.order.epoch_size // self.batch_size

    def state_dict(self) -> dict:
        return {"step": self.step, "epoch": self.epoch, "iter": self.iter, **self.order.state()}

    def load_state_dict(self, state: dict) -> None:
        """Go on at the state's step. Raises ValueError if the state is of another order of samples."""
        for key, value in self.order.state().items():
            if state.get(key) != value:
                raise ValueError(f"the sampler's {key} was {state.get(key)} and is {value}")
        self.step = state["step"]

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """This rank's sample indices at `step`, one array a micro-batch."""
        per_rank = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * per_rank
        numbers = np.arange(first, first + per_rank)
        indices = self.order.sample(numbers)
        return [indices[i : i + self.micro_batch_size] for i in range(0, per_rank, self.micro_batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        step = self.step
        while self.stop is None or step < self.stop:
            for indices in self.micro_batches(step):
                yield indices.tolist()
            step += 1
