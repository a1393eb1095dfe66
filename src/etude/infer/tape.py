"""Forwards of few rows as lists of kernel calls, made once for each number of rows and replayed: what CUDA graphs are on a GPU.

In decoding, Python takes as long as the products: some seven thousand function calls a token. What a forward calls and where
depends on the number of its rows alone, so it is written down once and run by one call of C."""

from collections import OrderedDict
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from etude.infer import kernels
from etude.infer.cache import Batch

MOST = 32  # rows; with more, Python is no longer what takes time
KEPT = 12  # tapes, the last ones that were used


class Tapes:
    """The tapes of one packed model and cache. A model whose forward needs more than our kernels has none."""

    def __init__(self, twin: Any, cache: Any):
        self.twin, self.cache = twin, cache
        self.made: OrderedDict[tuple[int, int], Tape | None] = OrderedDict()

    def through(self, x: Tensor, batch: Batch) -> Tensor:
        """x (1, N, D), what enters the first block -> final states (1, N, D), valid until the next call."""
        key = x.shape[1], kernels.threads()
        if x.shape[1] > MOST or (key in self.made and self.made[key] is None):
            return self.twin.through(x, batch.positions, None, self.cache)[0]
        if (tape := self.made.get(key)) is not None:
            self.made.move_to_end(key)
            return tape.play(x, batch)
        tape = Tape(self.twin, self.cache, x.clone(), batch)
        self.made[key] = tape if tape.whole else None
        if len(self.made) > KEPT:  # each holds all that a forward makes
            self.made.popitem(last=False)
        return tape.out


class Tape:
    """One forward. `whole`: there was nothing in it but our kernels and views of what they made."""

    def __init__(self, twin: Any, cache: Any, x: Tensor, batch: Batch):
        self.x, self.slots, self.turns = x, batch.slots, twin.turns
        for turn in self.turns:
            turn.look_up(batch.positions)  # once for all layers, and not one of the calls
        self.angles = [turn.last[1:] for turn in self.turns]
        with _Watch() as seen, kernels.Calls() as self.calls:
            self.out, _ = twin.through(x, batch.positions, None, cache)
        self.kept, self.whole = seen.made, not seen.other

    def play(self, x: Tensor, batch: Batch) -> Tensor:
        self.x.copy_(x)
        self.slots.copy_(batch.slots)
        for turn, rows in zip(self.turns, self.angles):
            turn.refill(rows, batch.positions[0])
        self.calls.replay(batch.plan)
        return self.out


class _Watch(TorchDispatchMode):
    """Keeps all tensors that are made, and says which operations did more than to make or to view one."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []
        self.other: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.made.append(found)
        if func._schema.is_mutable or not (func.is_view or "empty" in str(func) or _same_memory(args[0], found)):
            self.other.append(str(func))
        return found


def _same_memory(x: Any, y: Any) -> bool:
    both = isinstance(x, Tensor) and isinstance(y, Tensor)
    return both and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
