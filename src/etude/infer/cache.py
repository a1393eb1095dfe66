"""The paged key-value cache: what attention needs of earlier positions, in pages that sequences share.

A forward computes a `Batch`: chunks of several sequences, one after another in one row of N tokens, prompts and single new
tokens alike. Each layer stores its keys and values in the slots of those tokens (slot = page * page_size + offset) and
attends each chunk to its own sequence, in one of four ways that give the same numbers: see BACKENDS. Shapes: N tokens,
H heads, D channels, S slots, L positions."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etude.infer import kernels
from etude.infer.pages import Copy, PagePool, Table
from etude.model import attention

SHARED = 256  # positions that several single tokens have in common from which on they are attended to once


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
        width = max(len(c.table.pages) for c in self.chunks)
        tables = torch.zeros(len(self.chunks), width, dtype=torch.int32)
        for row, c in zip(tables, self.chunks):
            row[: len(c.table.pages)] = torch.tensor(c.table.pages, dtype=torch.int32).clamp_min(0)
        ends = torch.tensor([c.end for c in self.chunks], dtype=torch.int32)
        bounds = torch.tensor([0, *(b for _, b in self.bounds)], dtype=torch.int32)
        longest = max(c.length for c in self.chunks), max(c.end for c in self.chunks)
        return Paged(tables.to(self.device), ends.to(self.device), bounds.to(self.device), *longest)


class Paged(NamedTuple):
    """Chunks as a paged kernel wants them: page numbers (C, P), ends (C,) and bounds (C + 1,) of the chunks' rows, all
    int32, the longest chunk and sequence."""

    tables: Tensor
    ends: Tensor
    bounds: Tensor
    longest_chunk: int
    longest: int


class PagedCache:
    """Keys and values (S, H_kv, D) of each layer, in the model's dtype. `shapes` gives each layer's (key heads, key channels,
    value channels); without value channels the values are the keys' first ones (MLA)."""

    def __init__(
        self,
        shapes: list[tuple[int, int, int]],
        pool: PagePool,
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
    ):
        slots = pool.n_pages * pool.page_size
        new = functools.partial(torch.empty, dtype=dtype, device=device)  # the system gives memory as it is written
        self.layers = [
            _Layer(self, new(slots, heads, dk), new(slots, heads, dv) if dv else None) for heads, dk, dv in shapes
        ]
        self.page_size, self.backend = pool.page_size, BACKENDS[backend]
        self.batch: Batch

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


def varlen(
    layer: _Layer, q: Tensor, k: Tensor, v: Tensor | None, scale: float, window: int | None, batch: Any
) -> Tensor:
    """torch's paged flash kernel (CUDA, half precision): one call for all chunks, in static shapes, without a copy."""
    from torch.nn.attention.varlen import varlen_attn

    keys, values = (t.unflatten(0, (-1, layer.owner.page_size)) for t in layer.store(k, v, batch.slots))
    p: Paged = batch.paged
    y = varlen_attn(
        q,
        keys,
        values,
        p.bounds,
        None,
        p.longest_chunk,
        p.longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
        seqused_k=p.ends,
        block_table=p.tables,
    )
    assert isinstance(y, Tensor)
    return y


def varlen_works(shapes: list[tuple[int, int, int]], page_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel takes these shapes here and agrees with `gather` on random numbers: what it takes differs between
    GPUs and between versions of torch."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or any(dk != dv for _, dk, dv in shapes):
        return False
    pool = PagePool(4, page_size)
    table, _ = pool.open([])
    pool.grow(table, 3 * page_size)
    made = torch.Generator(device).manual_seed(0)
    for heads, width, _ in set(shapes):
        found = []
        for backend in ("varlen", "gather"):
            cache = PagedCache([(heads, width, width)], pool, dtype, device, backend)
            made.manual_seed(0)
            for start, length in ((0, 2 * page_size + 1), (2 * page_size + 1, 1)):
                cache.batch = Batch([Chunk(table, start, length)], pool, device)
                q, k, v = (
                    torch.randn(1, h, length, width, generator=made, device=device, dtype=dtype)
                    for h in (2 * heads, heads, heads)
                )
                try:
                    found.append(cache[0].attend(q, k, v, width**-0.5))
                except (RuntimeError, TypeError, ImportError):
                    return False
        if not all(torch.allclose(a, b, rtol=2e-2, atol=2e-2) for a, b in zip(found[:2], found[2:])):
            return False
    return True


BACKENDS: dict[str, Callable[..., Any]] = {"native": native, "views": views, "gather": gather, "varlen": varlen}


def choose_backend(
    asked: str, shapes: list[tuple[int, int, int]], page_size: int, dtype: torch.dtype, device: torch.device
) -> str:
    """The way that `asked` names; auto: the fastest that works here."""
    if asked != "auto":
        return asked
    if device.type == "cpu":
        return "native" if dtype in (torch.float32, torch.bfloat16) and kernels.available() else "views"
    return "varlen" if shapes and varlen_works(shapes, page_size, dtype, device) else "gather"
