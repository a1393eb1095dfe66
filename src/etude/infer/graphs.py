"""Decoding on a GPU by CUDA graphs: a step that computes one token of each sample is some thousand kernels, which Python
starts one by one more slowly than the GPU computes them; recorded once, they are started by one call.

A graph reads and writes at fixed addresses in fixed shapes: so there is one for each bucket of (rows, pages), powers of two,
recorded when it is first needed. Rows that the samples of a step leave over compute token 0 at position 0 into the page that
belongs to nobody. What is not CUDA's is in `Graphs`; it can be tested on any device with a `capture` that records otherwise.
Shapes: N rows, P pages, D channels."""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from etude.infer.cache import SPAN, Chunk, Decoding, padded
from etude.infer.pages import Table

FEWEST = 256  # positions of the shortest bucket
Replay = Callable[[], Tensor]  # computes again at the same addresses; what it gives is valid until the next one
Capture = Callable[[Callable[[], Tensor]], Replay]  # raises RuntimeError for what cannot be recorded


def on_cuda(device: torch.device) -> Capture:
    """CUDA graphs that share one pool of memory: no two of them run at once."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def capture(forward: Callable[[], Tensor]) -> Replay:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries set themselves up in the first calls, which no graph may hold
            for _ in range(2):
                forward()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of a server or a trainer may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                out = forward()
        except RuntimeError:
            # Until a recording ends well, torch's random numbers on this device take it for under way (torch < 2.13).
            with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
                torch.zeros(1, device=device)
            raise

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture


class Graphs:
    """The graphs of one packed model and cache: for at most `rows` samples with at most `pages` pages each. `start` gives
    the `capture` that makes them, anew for each set of weights. Where something cannot be recorded, or a graph does not
    compute what the model does, there is one warning, and none from then on."""

    def __init__(
        self, twin: Any, cache: Any, rows: int, pages: int, device: torch.device, start: Callable[[], Capture]
    ):
        pages = min(pages, SPAN // cache.page_size)
        self.cache, self.rows, self.pages, self.start = cache, rows, pages, start
        self.off: str | None = None  # why there are none
        self.replays = 0
        self._numbers = torch.zeros(3, rows, dtype=torch.int64)  # tokens, positions, slots
        self._tables = torch.full((rows, pages), cache.spare // cache.page_size, dtype=torch.int32)
        self._shown: list[tuple[Table | None, int, int]] = [(None, 0, 0)] * rows  # whose pages from .. to
        self.numbers, self.tables = self._numbers.to(device, copy=True), self._tables.to(device, copy=True)
        self.renew(twin)

    def renew(self, twin: Any) -> None:
        """The weights lie elsewhere now: what was recorded is worthless."""
        self.twin = twin
        self.made: dict[tuple[int, int], Replay] = {}
        self.capture = self.start()

    def states(self, ids: list[int], chunks: list[Chunk], eager: Callable[[], Tensor]) -> Tensor:
        """Final states (N, D) of the chunks' tokens, valid until the next call: by a graph where there can be one, else
        by `eager`."""
        bucket = None if self.off else self.bucket(chunks)
        if bucket is None:
            return eager()
        if bucket not in self.made:
            return self._first(bucket, ids, chunks, eager)
        self.fill(ids, chunks, bucket)
        self.replays += 1
        return self.made[bucket]()[: len(chunks)]

    def bucket(self, chunks: list[Chunk]) -> tuple[int, int] | None:
        """(rows, pages) of the smallest graph that has room; None where there is none to be."""
        if len(chunks) > self.rows or any(c.length != 1 for c in chunks):
            return None
        size = self.cache.page_size
        most = max(c.start // size + 1 for c in chunks)
        if most > self.pages:
            return None
        rows, pages = min(_power(len(chunks)), self.rows), min(_power(max(most, FEWEST // size)), self.pages)
        if self.cache.backend is padded and rows * pages * size > SPAN:
            return None
        return rows, pages

    def fill(self, ids: list[int], chunks: list[Chunk], bucket: tuple[int, int]) -> None:
        """Write what a graph reads. Rows behind the chunks' are the spare page's."""
        (rows, pages), n, size, spare = bucket, len(chunks), self.cache.page_size, self.cache.spare
        tokens, positions, slots = self._numbers.numpy()
        tokens[:n], tokens[n:] = ids, 0
        positions[:n], positions[n:] = [c.start for c in chunks], 0
        slots[:n], slots[n:] = [c.table.pages[c.start // size] * size + c.start % size for c in chunks], spare
        for i in range(rows):
            self._show(i, chunks[i].table if i < n else None)
        self.numbers.copy_(self._numbers)
        self.tables[:rows, :pages].copy_(self._tables[:rows, :pages])

    def _show(self, i: int, table: Table | None) -> None:
        """Let row i have a table's pages; in place of those behind a window, and of none, the spare one. What has not
        changed since the last step is left."""
        row, spare = self._tables.numpy()[i], self.cache.spare // self.cache.page_size
        before, begin, end = self._shown[i]
        if table is not before:
            row[:], begin, end = spare, 0, 0
        if table is not None:
            pages = table.pages[: len(row)]
            row[end : len(pages)] = pages[end:]
            end = len(pages)
            while begin < end and pages[begin] < 0:
                row[begin] = spare
                begin += 1
        self._shown[i] = table, begin, end

    def _first(
        self, bucket: tuple[int, int], ids: list[int], chunks: list[Chunk], eager: Callable[[], Tensor]
    ) -> Tensor:
        """Record a graph, on what only the spare page sees, replay it, and give what `eager` computes behind it: that
        writes all that a wrong graph may have written to these tokens' slots again."""
        forward = functools.partial(self._forward, *bucket)
        found = None
        try:
            self.fill([], [], bucket)
            if not self.made and (why := obstacle(forward, self.numbers.device)):
                self._give_up(f"the model's forward cannot be recorded ({why})")
            else:
                replay = self.capture(forward)
                self.fill(ids, chunks, bucket)
                found = replay()[: len(chunks)].clone()
        except RuntimeError as error:  # also no memory
            self._give_up(f"recording failed ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})")
        states = eager()
        if found is not None:
            off, most = distance(found, states), tolerance(states.dtype)
            if off <= most:
                self.made[bucket] = replay
            else:
                self._give_up(f"the graph of {bucket[0]} rows is {off:.2g} off, at most {most:.2g} is rounding")
        return states

    def _forward(self, rows: int, pages: int) -> Tensor:
        tokens, positions, slots = self.numbers[:, :rows]
        tables = self.tables[:rows, :pages]
        self.cache.batch = Decoding(slots, positions, tables, self.cache.page_size)
        # A new object each time: rope.py remembers angles by it, and those have to be computed in the graph.
        return self.twin.hidden(tokens[None], positions[None], None, self.cache)[0][0]

    def _give_up(self, why: str) -> None:
        self.off = why
        self.made.clear()
        warnings.warn(f"no CUDA graphs: {why}; decoding goes on without", RuntimeWarning, stacklevel=4)


def _power(n: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << (n - 1).bit_length()


def tolerance(dtype: torch.dtype) -> float:
    """How far the states of a row may be from those of the same row in another batch, relative to their norm: eight
    roundings of `dtype`, 6 % in bf16."""
    return max(8 * torch.finfo(dtype).eps, 1e-4)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest relative distance of two rows (N, D), of those that are expected to be finite."""
    found, expected = found.double(), expected.double()
    finite = expected.isfinite().all(-1)
    off = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return float(off[finite].nan_to_num(torch.inf).max()) if finite.any() else 0.0


def obstacle(forward: Callable[[], Tensor], device: torch.device) -> str | None:
    """What in a forward no graph can hold: that Python reads what the device computed, as for shapes that depend on it
    (as most ways to compute experts do), or that devices exchange tensors. Runs it once."""
    with _Watch(device) as seen:
        forward()
    return seen.found


class _Watch(TorchDispatchMode):
    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.found is None and (self._reads(func, args) or self._elsewhere((args, kwargs, result))):
            self.found = str(func)
        return result

    def _reads(self, func: Any, args: Any) -> bool:
        if "index" in func.name() and len(args) > 1 and isinstance(args[1], (list, tuple)):
            return any(
                isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
            )  # else it is static
        return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags

    def _elsewhere(self, values: Any) -> bool:
        """Numbers (0-d) may be on the CPU."""
        if isinstance(values, Tensor):
            return values.device.type != self.device.type and values.ndim > 0
        if isinstance(values, dict):
            values = values.values()
        elif not isinstance(values, (list, tuple)):
            return False
        return any(self._elsewhere(v) for v in values)
