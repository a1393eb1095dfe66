"""The paged key-value cache: what attention needs of earlier positions, in pages that sequences share.

A forward computes a `Batch`: chunks of several sequences, one after another in one row of N tokens, prompts and single new
tokens alike. Each layer stores its keys and values in the slots of those tokens (slot = page * page_size + offset) and
attends each chunk to its own sequence, in one of several ways that give the same numbers: see BACKENDS. Shapes: N tokens,
B sequences of which one token is computed, P pages, H heads, D channels, S slots, L positions."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etude.errors import Refusal
from etude.infer import kernels
from etude.infer.pages import Copy, PagePool, Table
from etude.model import attention

SHARED = 256  # positions that several single tokens have in common from which on they are attended to once
SPAN = 1 << 18  # positions, at most, that `padded` copies at a time


class Chunk(NamedTuple):
    """Positions start .. start + length - 1 of a sequence, which are computed in this forward."""

    table: Table
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class Batch:
    """The chunks of one forward, with what all layers need of them, each made once."""

    def __init__(self, chunks: list[Chunk], pool: PagePool, device: torch.device):
        self.chunks, self.pool, self.device = chunks, pool, device
        starts = np.array([c.start for c in chunks])
        lengths = np.array([c.length for c in chunks])
        first = lengths.cumsum() - lengths
        positions = np.arange(lengths.sum()) + (starts - first).repeat(lengths)
        size = pool.page_size
        if len(positions) == len(chunks):  # one token each
            pages = np.array([c.table.pages[c.start // size] for c in chunks])
        else:
            pages = np.concatenate(
                [np.array(c.table.pages)[positions[f : f + c.length] // size] for c, f in zip(chunks, first)]
            )
        self.positions = torch.from_numpy(positions)[None].to(device)
        self.slots = torch.from_numpy(pages * size + positions % size).to(device)
        self._runs: dict[tuple[int, int | None], list[tuple[int, int]]] = {}
        self.bounds = [(int(f), int(f + n)) for f, n in zip(first, lengths)]

    @functools.cached_property
    def plan(self) -> "kernels.Plan":
        width = max(len(c.table.pages) for c in self.chunks)
        tables = np.zeros((len(self.chunks), width), dtype=np.int32)
        for row, c in zip(tables, self.chunks):
            row[: len(c.table.pages)] = c.table.pages
        return kernels.Plan(self.pool.page_size, tables, [(i, c.start, c.length) for i, c in enumerate(self.chunks)])

    def runs(self, chunk: int, window: int | None) -> list[tuple[int, int]]:
        """Runs of adjacent slots with the positions that a chunk looks at."""
        if (found := self._runs.get((chunk, window))) is None:
            c = self.chunks[chunk]
            begin = 0 if window is None else max(0, c.start + 1 - window)
            found = self._runs[chunk, window] = self.pool.runs(c.table, begin, c.end - begin)
        return found

    @functools.cached_property
    def groups(self) -> list[tuple[int, list[int]]]:
        """(positions in common, chunks) of single tokens whose sequences begin with the same pages, long enough to be worth
        it; the others alone, with 0."""
        size, found = self.pool.page_size, []
        by_first: dict[int, list[int]] = {}
        for i, c in enumerate(self.chunks):
            if c.length == 1:
                by_first.setdefault(c.table.pages[0] if c.start >= SHARED else -1 - i, []).append(i)
        for members in by_first.values():
            tables = [self.chunks[i].table.pages for i in members]
            common = min(self.chunks[i].start for i in members) // size
            while common and any(t[:common] != tables[0][:common] for t in tables):
                common -= 1
            if len(members) > 1 and common * size >= SHARED:
                found.append((common * size, members))
            else:
                found += [(0, [i]) for i in members]
        return found

    @functools.cached_property
    def paged(self) -> "Paged":
        ends = torch.tensor([c.end for c in self.chunks], dtype=torch.int32)
        bounds = torch.tensor([0, *(b for _, b in self.bounds)], dtype=torch.int32)
        longest = max(c.length for c in self.chunks), max(c.end for c in self.chunks)
        return Paged(self._tables(self.chunks), ends.to(self.device), bounds.to(self.device), *longest)

    @functools.cached_property
    def decodings(self) -> list[tuple[Tensor, "Decoding"]]:
        """(rows, they) of the chunks of one token, those of similar length together, no more than SPAN positions each."""
        single = [i for i, c in enumerate(self.chunks) if c.length == 1]
        groups: list[list[int]] = []
        for i in sorted(single, key=lambda i: -self.chunks[i].start):
            longest = self.chunks[groups[-1][0]].end if groups else 0
            if not groups or 4 * self.chunks[i].end < longest or (len(groups[-1]) + 1) * longest > SPAN:
                groups.append([])
            groups[-1].append(i)
        found = []
        for members in groups:
            rows = torch.tensor([self.bounds[i][0] for i in members], device=self.device)
            tables = self._tables([self.chunks[i] for i in members])
            one = Decoding(self.slots[rows], self.positions[0, rows], tables, self.pool.page_size)
            found.append((rows, one))
        return found

    def _tables(self, chunks: list[Chunk]) -> Tensor:
        """Their pages (C, P) int32; in place of those behind a window the spare one."""
        tables = np.full((len(chunks), max(len(c.table.pages) for c in chunks)), self.pool.n_pages, dtype=np.int32)
        for row, c in zip(tables, chunks):
            row[: len(c.table.pages)] = c.table.pages
        tables[tables < 0] = self.pool.n_pages
        return torch.from_numpy(tables).to(self.device)


class Paged(NamedTuple):
    """Chunks as a paged kernel wants them: page numbers (C, P), ends (C,) and bounds (C + 1,) of the chunks' rows, all
    int32, the longest chunk and sequence."""

    tables: Tensor
    ends: Tensor
    bounds: Tensor
    longest_chunk: int
    longest: int


class Decoding:
    """The next token of each of B sequences, in shapes that do not depend on what is computed: slots and positions (B,)
    int64, page numbers (B, P) int32. Like a `Batch`, but for what concerns other chunks."""

    def __init__(self, slots: Tensor, positions: Tensor, tables: Tensor, page_size: int):
        self.slots, self.positions, self.tables, self.page_size = slots, positions, tables, page_size
        self._reach: dict[int | None, tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def paged(self) -> Paged:
        (n, pages), device = self.tables.shape, self.tables.device
        bounds = torch.arange(n + 1, dtype=torch.int32, device=device)
        return Paged(self.tables, (self.positions + 1).to(torch.int32), bounds, 1, pages * self.page_size)

    def reach(self, window: int | None, spare: int) -> tuple[Tensor, Tensor]:
        """Slots (B L,) of the first P pages' positions, slot `spare` in place of those that a token does not see, and
        which it does: (B, 1, 1, L)."""
        if (found := self._reach.get(window)) is None:
            size, device = self.page_size, self.slots.device
            slots = self.tables.long()[:, :, None] * size + torch.arange(size, device=device)
            behind = self.positions[:, None] - torch.arange(slots[0].numel(), device=device)
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            slots = slots.flatten(1).masked_fill(~seen, spare).flatten()
            found = self._reach[window] = slots, seen[:, None, None]
        return found


class PagedCache:
    """Keys and values (S, H_kv, D) of each layer, in the model's dtype. `shapes` gives each layer's (key heads, key channels,
    value channels); without value channels the values are the keys' first ones (MLA). Backends of STATIC shapes have one
    page more than the pool, which belongs to nobody: what fills up a shape may be read and written there."""

    def __init__(
        self,
        shapes: list[tuple[int, int, int]],
        pool: PagePool,
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
    ):
        self.spare = pool.n_pages * pool.page_size  # the first slot of the page that is nobody's
        slots = self.spare + (pool.page_size if backend in STATIC else 0)
        new = functools.partial(torch.empty, dtype=dtype, device=device)  # the system gives memory as it is written
        self.layers = [
            _Layer(self, new(slots, heads, dk), new(slots, heads, dv) if dv else None) for heads, dk, dv in shapes
        ]
        for layer in self.layers:
            for t in (layer.k, layer.v):
                if t is not None:
                    t[self.spare :] = 0  # a NaN there would count, though it is masked
        self.page_size, self.backend = pool.page_size, BACKENDS[backend]
        self.batch: Batch | Decoding

    def __getitem__(self, layer: int) -> "_Layer":
        return self.layers[layer]

    def copy(self, copy: Copy) -> None:
        """The first positions of one page into another, in every layer."""
        source, target = copy.source * self.page_size, copy.target * self.page_size
        for layer in self.layers:
            for t in (layer.k, layer.v):
                if t is not None:
                    t[target : target + copy.count] = t[source : source + copy.count]

    @staticmethod
    def bytes_per_token(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> int:
        return sum(heads * (dk + dv) for heads, dk, dv in shapes) * dtype.itemsize


class _Layer:
    def __init__(self, owner: PagedCache, k: Tensor, v: Tensor | None):
        self.owner, self.k, self.v = owner, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor | None, scale: float, window: int | None = None) -> Tensor:
        """Store k and v (1, H_kv, N, D) and let q (1, H, N, D) look at all that came before, or at the last `window`
        positions -> (1, H, N, D_v). v None: the values are the keys (all their channels)."""
        q, k = (t[0].transpose(0, 1).to(self.k.dtype) for t in (q, k))  # (N, H, D)
        v = None if v is None else v[0].transpose(0, 1).to(self.k.dtype)
        y = self.owner.backend(self, q, k, v, scale, window, self.owner.batch)
        return y.transpose(0, 1)[None]

    def store(self, k: Tensor, v: Tensor | None, slots: Tensor) -> tuple[Tensor, Tensor]:
        """-> the whole (S, H_kv, D) keys and values."""
        self.k.index_copy_(0, slots, k)
        if v is None or self.v is None:
            return self.k, self.k
        self.v.index_copy_(0, slots, v)
        return self.k, self.v


def native(
    layer: _Layer, q: Tensor, k: Tensor, v: Tensor | None, scale: float, window: int | None, batch: Batch
) -> Tensor:
    """One call of our own kernel, which reads pages where they lie: the fastest on CPU, and a row's bits depend on its own
    sequence alone."""
    width = (k if v is None else v).shape[-1]
    return kernels.attend(q, k, v, layer.k, layer.v, batch.slots, batch.plan, scale, window, width)


def views(
    layer: _Layer, q: Tensor, k: Tensor, v: Tensor | None, scale: float, window: int | None, batch: Batch
) -> Tensor:
    """torch's kernel once a sequence, on views of its runs of pages; what several single tokens have in common once for
    all of them, merged by the logarithm of the sums."""
    keys, values = layer.store(k, v, batch.slots)
    y = q.new_empty(*q.shape[:2], values.shape[-1])
    for i, c in enumerate(batch.chunks):
        if c.length > 1:
            a, b = batch.bounds[i]
            y[a:b] = _prompt(q[a:b], keys, values, scale, window, batch, i)
    for common, members in batch.groups:
        rows = torch.tensor([batch.bounds[i][0] for i in members], device=q.device)
        if common == 0 or window is not None:
            for i, row in zip(members, rows.tolist()):
                y[row] = _over_runs(q[row : row + 1], keys, values, batch.runs(i, window), scale)[0][0]
            continue
        table = batch.chunks[members[0]].table
        shared = _over_runs(q[rows], keys, values, batch.pool.runs(table, 0, common), scale)
        for j, (i, row) in enumerate(zip(members, rows.tolist())):
            c = batch.chunks[i]
            own = _over_runs(q[row : row + 1], keys, values, batch.pool.runs(c.table, common, c.end - common), scale)
            y[row] = _merge((shared[0][j : j + 1], shared[1][j : j + 1]), own)[0][0]
    return y


def _prompt(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, batch: Batch, i: int) -> Tensor:
    """A chunk of several tokens: q (n, H, D) -> (n, H, D_v)."""
    c, runs = batch.chunks[i], batch.runs(i, window)
    k, v = (_joined([t[s : s + n] for s, n in runs]).transpose(0, 1)[None] for t in (keys, values))
    q = q.transpose(0, 1)[None]
    if c.start == 0:
        return attention.attend(q, k, v, scale=scale, window=window)[0].transpose(0, 1)
    first = c.end - k.shape[2]  # the position of the first key
    at = torch.arange(c.start, c.end, device=q.device)[:, None] - torch.arange(first, c.end, device=q.device)
    mask = at >= 0 if window is None else (at >= 0) & (at < window)
    return attention.sdpa(q, k, v, mask, scale)[0].transpose(0, 1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _over_runs(
    q: Tensor, keys: Tensor, values: Tensor, runs: list[tuple[int, int]], scale: float
) -> tuple[Tensor, Tensor]:
    """q (n, H, D) over all positions of some runs -> (softmax-weighted values (n, H, D_v), log-sum-exps (n, H))."""
    found = None
    for slot, length in runs:
        one = _with_sums(q, keys[slot : slot + length], values[slot : slot + length], scale)
        found = one if found is None else _merge(found, one)
    assert found is not None
    return found


def _with_sums(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    heads, width = q.shape[1] // k.shape[1], v.shape[-1]
    if q.device.type == "cpu":
        # The kernel has no groups: the queries that share keys are so many more rows of one head.
        q = q.unflatten(1, (-1, heads)).transpose(1, 2).flatten(0, 1)  # (n heads, H_kv, D)
        if width < q.shape[-1]:
            v = F.pad(v, (0, q.shape[-1] - width))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        y, sums = torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        y = y[0, ..., :width].transpose(0, 1).unflatten(0, (-1, heads)).transpose(1, 2).flatten(1, 2)
        sums = sums.view(k.shape[1], -1).transpose(0, 1).unflatten(0, (-1, heads)).transpose(1, 2).flatten(1, 2)
        return y, sums
    k, v = (t.repeat_interleave(heads, 1).transpose(0, 1).float() for t in (k, v))
    scores = (q.transpose(0, 1).float() @ k.transpose(1, 2)) * scale
    sums = scores.logsumexp(-1)
    return ((scores - sums[..., None]).exp() @ v).transpose(0, 1).to(q.dtype), sums.transpose(0, 1)


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of positions, from that over each (Dao et al. 2022)."""
    total = torch.logaddexp(a[1], b[1])
    y = sum(y.float() * (s - total).exp()[..., None] for y, s in (a, b))
    assert isinstance(y, Tensor)
    return y.to(a[0].dtype), total


def gather(
    layer: _Layer, q: Tensor, k: Tensor, v: Tensor | None, scale: float, window: int | None, batch: Batch
) -> Tensor:
    """A copy of each sequence's keys and values, with a mask: the reference, on any device."""
    keys, values = layer.store(k, v, batch.slots)
    y = q.new_empty(*q.shape[:2], values.shape[-1])
    for i, (a, b) in enumerate(batch.bounds):
        slots = torch.from_numpy(np.concatenate([np.arange(s, s + n) for s, n in batch.runs(i, window)])).to(q.device)
        at = torch.arange(batch.chunks[i].end - len(slots), batch.chunks[i].end, device=q.device)
        ahead = at - batch.positions[0, a:b, None]
        mask = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
        past_k, past_v = (t.index_select(0, slots).transpose(0, 1)[None] for t in (keys, values))
        y[a:b] = attention.sdpa(q[a:b].transpose(0, 1)[None], past_k, past_v, mask, scale)[0].transpose(0, 1)
    return y


def padded(
    layer: _Layer, q: Tensor, k: Tensor, v: Tensor | None, scale: float, window: int | None, batch: Batch | Decoding
) -> Tensor:
    """Single tokens together: copies of their sequences, filled up to one length. Any device and dtype; shapes are static
    where every chunk is one token."""
    keys, values = layer.store(k, v, batch.slots)
    if isinstance(batch, Decoding):
        return _filled_up(q, keys, values, scale, window, batch, layer.owner.spare)
    y = q.new_empty(*q.shape[:2], values.shape[-1])
    for i, (a, b) in enumerate(batch.bounds):
        if b - a > 1:
            y[a:b] = _prompt(q[a:b], keys, values, scale, window, batch, i)
    for rows, decoding in batch.decodings:
        y[rows] = _filled_up(q[rows], keys, values, scale, window, decoding, layer.owner.spare)
    return y


def _filled_up(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, batch: Decoding, spare: int
) -> Tensor:
    """q (B, H, D) -> (B, H, D_v)."""
    slots, seen = batch.reach(window, spare)
    k = keys.index_select(0, slots).unflatten(0, (len(q), -1)).transpose(1, 2)
    v = k if values is keys else values.index_select(0, slots).unflatten(0, (len(q), -1)).transpose(1, 2)
    q = q.unflatten(1, (k.shape[1], -1))  # queries that share keys are rows of one head, (B, H_kv, H / H_kv, D)
    return attention.sdpa(q, k, v, seen, scale).flatten(1, 2)


def varlen(
    layer: _Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    window: int | None,
    batch: Batch | Decoding,
    **options: Any,
) -> Tensor:
    """torch's paged flash kernel (CUDA, half precision): one call for all chunks, without a copy. Every keyword is one
    that the result depends on, so a version of torch that lacks one has to raise, which `agrees` sees."""
    from torch.nn.attention.varlen import varlen_attn

    keys, values = (t.unflatten(0, (-1, layer.owner.page_size)) for t in layer.store(k, v, batch.slots))
    p: Paged = batch.paged
    y = varlen_attn(
        q,
        keys,
        values,
        p.bounds,
        None,  # where keys begin: the tables say so
        p.longest_chunk,
        p.longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
        seqused_k=p.ends,
        block_table=p.tables,
        **options,
    )
    assert isinstance(y, Tensor)
    return y


BACKENDS: dict[str, Callable[..., Any]] = {
    "native": native,
    "views": views,
    "gather": gather,
    "padded": padded,
    "varlen": varlen,
    "varlen_unsplit": functools.partial(varlen, num_splits=1),  # right where what splits sequences is not, see `agrees`
}
STATIC = ("varlen", "varlen_unsplit", "padded")  # shapes of single tokens do not depend on lengths, the best first


def choose_backend(
    asked: str, shapes: list[tuple[int, int, int]], page_size: int, dtype: torch.dtype, device: torch.device
) -> str:
    """The way that `asked` names; auto: the fastest that works here. Raises Refusal for a varlen that does not."""
    if asked == "auto" and device.type == "cpu":
        return "native" if dtype in (torch.float32, torch.bfloat16) and kernels.available() else "views"
    if asked not in ("auto", "varlen"):
        return asked
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        for name in ("varlen", "varlen_unsplit"):
            if agrees(name, shapes, page_size, dtype, device):
                return name
    if asked == "varlen":
        raise Refusal(
            f"engine.attention=varlen: torch {torch.__version__} has no paged kernel for {str(dtype)[6:]} on {device.type} "
            f"with pages of {page_size} that computes what it should; type auto, or engine.page_size=256"
        )
    return "padded"


def agrees(
    backend: str, shapes: list[tuple[int, int, int]], page_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a backend takes these shapes here and computes what `gather` does, to 2 %. What a kernel takes, and gets
    right, differs between GPUs and between versions of torch: https://github.com/pytorch/pytorch/issues/194167 says of
    2.12 that with sequences long enough to be split, no row behind the first is written."""
    for shape in set(shapes):
        expected = _trial("gather", shape, page_size, dtype, device)
        for as_graphs in (False, True) if backend in STATIC else (False,):
            try:
                found = _trial(backend, shape, page_size, dtype, device, as_graphs)
            except (RuntimeError, TypeError, ValueError, AttributeError, ImportError):
                return False
            if not all(torch.allclose(a, b, rtol=2e-2, atol=2e-2) for a, b in zip(found, expected, strict=True)):
                return False  # so does NaN
    return True


@torch.inference_mode()
def _trial(
    backend: str,
    shape: tuple[int, int, int],
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    as_graphs: bool = False,
) -> list[Tensor]:
    """What a backend makes of random numbers: prompts and single tokens of three sequences, too long for one block of a
    kernel, with and without a window, where all else in the cache is NaN. `as_graphs`: single tokens in static shapes."""
    heads, width, own_values = shape
    lengths = [[1024 + page_size // 2, 700, 0], [1, 5, 3], [1, 1, 1]]
    pool = PagePool(3 * (1100 // page_size + 2), page_size)
    tables = [pool.open([])[0] for _ in range(3)]
    for i, length in ((1, 1), (0, 1100), (1, 1100), (2, 5)):  # neither in order nor adjacent
        pool.grow(tables[i], length)
    cache = PagedCache([shape], pool, dtype, device, backend)
    for t in (cache[0].k, cache[0].v):
        if t is not None:
            t[: cache.spare] = torch.nan
    made, starts, found = torch.Generator(device).manual_seed(0), [0, 0, 0], []
    for step in lengths:
        chunks = [Chunk(t, start, n) for t, start, n in zip(tables, starts, step) if n]
        starts = [start + n for start, n in zip(starts, step)]
        q, k, v = (
            torch.randn(1, h, sum(step), width, generator=made, device=device, dtype=dtype)
            for h in (2 * heads, heads, heads)
        )
        batch = cache.batch = Batch(chunks, pool, device)
        if as_graphs and len(chunks) == sum(step):
            slots, positions = (
                F.pad(t, (0, 2), value=x) for t, x in ((batch.slots, cache.spare), (batch.positions[0], 0))
            )
            pages = F.pad(batch.paged.tables, (0, 3, 0, 2), value=pool.n_pages)
            cache.batch = Decoding(slots, positions, pages, page_size)
            q, k, v = (F.pad(t, (0, 0, 0, 2)) for t in (q, k, v))
        for window in (None, page_size + 3):
            y = cache[0].attend(q, k, v if own_values else None, width**-0.5, window)
            found.append(y[:, :, : sum(step)])
    return found
