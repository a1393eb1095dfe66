"""The order of the data: a pure function of (seed, global sample number), the same for any number of ranks,
micro-batches and loader workers, and untouched by evaluation."""

import functools
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


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


class ResumableDistributedSampler:
    """Yields, micro-batch by micro-batch, which of `n` samples this rank reads next; a torch BatchSampler in kind.

    A step takes the `batch_size` global sample numbers from step * batch_size on, whatever the ranks. They are cut
    into micro-batches of `micro_batch_size`, and rank r of W reads the r-th W-th of those. `order` maps a number to a
    sample: "random" draws with replacement, "shuffle" is a new permutation each epoch, "sequential" is 0, 1, 2, ...
    `drop_last` leaves out an epoch's last samples that fill no batch. The state is the next step alone; `epoch` and
    `iter` (batches into it) are derived from it."""

    def __init__(
        self,
        n: int,
        *,
        seed: int,
        order: str,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        drop_last: bool,
    ):
        self.n, self.seed, self.order = n, seed, order
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.epoch_size = n - n % batch_size if drop_last and order != "random" and n >= batch_size else n
        self.step = 0
        self.stop: int | None = None

    @property
    def epoch(self) -> int:
        return self.step * self.batch_size // self.epoch_size

    @property
    def iter(self) -> int:
        return self.step * self.batch_size % self.epoch_size // self.batch_size

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "iter": self.iter,
            "seed": self.seed,
            "n": self.n,
            "order": self.order,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on at the state's step. Raises ValueError if the state is of another order of samples."""
        for key in ("seed", "n", "order"):
            if state[key] != getattr(self, key):
                raise ValueError(f"the sampler's {key} was {state[key]} and is {getattr(self, key)}")
        self.step = state["step"]

    def sample(self, numbers: np.ndarray) -> np.ndarray:
        """Global sample numbers -> sample indices below n."""
        if self.order == "random":
            return (mix(self.seed, numbers) % np.uint64(self.n)).astype(np.int64)
        epochs, within = np.divmod(numbers, self.epoch_size)
        if self.order == "sequential":
            return within
        return np.array([_permutation(self.n, self.seed, int(e))[i] for e, i in zip(epochs, within)])

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """This rank's sample indices at `step`, one array a micro-batch."""
        per_rank = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * per_rank
        numbers = np.arange(first, first + per_rank)
        return [self.sample(numbers[i : i + self.micro_batch_size]) for i in range(0, per_rank, self.micro_batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        step = self.step
        while self.stop is None or step < self.stop:
            for indices in self.micro_batches(step):
                yield indices.tolist()
            step += 1
