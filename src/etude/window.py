"""What a step trains on. For most strategies that is the loader's batches as they come. One that draws with the model takes
a window of steps: the prompts of `steps_per_rollout` steps are drawn together, with one set of weights, and each of them
is learnt from `iterations` times."""

import contextlib
import hashlib
import math
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from etude.data.loader import Batch, Batches
from etude.errors import Refusal
from etude.parallel import World


def key(seed: int, purpose: str, *where: int) -> int:
    """A 63-bit seed for one purpose at one place: what is drawn there depends on nothing that was drawn before."""
    digest = hashlib.blake2b(repr((seed, purpose, where)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Window:
    """The batches of the steps that share a rollout. It is saved with a checkpoint in its middle, because the weights that
    it was drawn with are gone; one at its beginning is drawn again, the same to the bit."""

    def __init__(self, strategy: Any, batches: Batches, world: World, seed: int, autocast: Any):
        self.strategy, self.batches, self.world, self.seed, self.autocast = strategy, batches, world, seed, autocast
        self.n_data: int = getattr(strategy, "steps_per_rollout", 1)  # steps of the loader
        self.iterations: int = getattr(strategy, "iterations", 1)
        self.length = self.n_data * self.iterations
        self.number = -1  # of the window that is held
        self.held: list[list[Batch]] = []  # micro-batches of each of its loader's steps

    @contextlib.contextmanager
    def reading(self, step: int, limit: int | None) -> Iterator[None]:
        """From `step` on, up to `limit`; read ahead by the loader."""
        stop = None if limit is None else math.ceil(limit / self.length) * self.n_data
        self.stream: Generator[list[Batch], None, None]
        with contextlib.closing(self.batches.steps(self.data_step(step), stop)) as self.stream:
            yield

    def data_step(self, step: int) -> int:
        """The loader's step that is read next, when `step` is next."""
        number, at = divmod(step, self.length)
        return (number + (at > 0)) * self.n_data

    def source(self, step: int) -> int:
        """The loader's step whose samples `step` trains on."""
        number, at = divmod(step, self.length)
        return number * self.n_data + at % self.n_data

    def collected(self, model: nn.Module, step: int) -> list[Batch]:
        """This rank's micro-batches of a step; a new window is drawn with the model as it is."""
        number, at = divmod(step, self.length)
        if number != self.number:
            read = [next(self.stream, []) for _ in range(self.n_data)]
            flat = [batch for batches in read for batch in batches]
            seeds = [
                key(self.seed, "collect", number * self.n_data + i, self.world.rank * len(batches) + j)
                for i, batches in enumerate(read)
                for j in range(len(batches))
            ]
            with self.autocast:
                made = iter(self.strategy.collect(model, flat, seeds, self.world))
            self.held = [[next(made) for _ in batches] for batches in read]
            self.number = number
        return self.held[at % self.n_data]

    # ------------------------------------------------------------ in a checkpoint

    def files(self, step: int) -> dict[str, Any]:
        """What a checkpoint before `step` holds of the window, {} at its beginning. To be called by all ranks: rank 0
        gets what all of them hold."""
        if step % self.length == 0:
            return {}
        ranks = self.world.gather([[_plain(b) for b in batches] for batches in self.held])
        tensors: dict[str, Tensor] = {}
        rest = []
        for r, steps in enumerate(ranks):
            for i, batches in enumerate(steps):
                for j, (named, other) in enumerate(batches):
                    tensors |= {f"{r}.{i}.{j}.{name}": t for name, t in named.items()}
                    rest.append([r, i, j, other])
        return {"rollout.safetensors": tensors, "rollout.json": {"ranks": len(ranks), "batches": rest}}

    def restore(self, step: int, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Take what `files` gave. The ranks' micro-batches are dealt out anew where their number has changed. Raises
        Refusal where they cannot be."""
        named: dict[tuple[int, int, int], Batch] = {(r, i, j): dict(other) for r, i, j, other in rest["batches"]}
        for path, t in tensors.items():
            *place, name = path.split(".", 3)
            r, i, j = map(int, place)
            batch = named[r, i, j]
            if name.startswith("metrics."):
                _, which, name = name.split(".", 2)
                batch.setdefault("metrics", {}).setdefault(name, [t, t])[int(which)] = t
            else:
                batch[name] = t.to(self.batches.device)
        for batch in named.values():
            batch["metrics"] = {n: (s, c) for n, (s, c) in batch.get("metrics", {}).items()}
        self.number = step // self.length
        for i in range(self.n_data):
            every = [named[place] for place in sorted(named) if place[1] == i]
            if len(every) % self.world.size:
                left = self.length - step % self.length
                raise Refusal(
                    f"the rollout in this checkpoint has {len(every)} micro-batches, which do not divide over {self.world.size} processes; go on with {rest['ranks']} for {left} steps first"
                )
            share = len(every) // self.world.size
            self.held.append(every[self.world.rank * share : (self.world.rank + 1) * share])


def _plain(batch: Batch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A collected batch as named tensors and what else there is, which is JSON."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in batch.items() if isinstance(t, Tensor)}
    for name, pair in batch.get("metrics", {}).items():
        for i, value in enumerate(pair):
            tensors[f"metrics.{i}.{name}"] = torch.as_tensor(value).detach().cpu().clone()
    return tensors, {n: v for n, v in batch.items() if n != "metrics" and not isinstance(v, Tensor)}
