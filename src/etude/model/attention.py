"""The attention kernel that every attention part calls: causal, within a window, within packed documents. Neither
documents nor windows (of rows longer than two of them) build a T x T mask. Shapes: B batch, T positions, H heads,
D channels."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries a block of windowed attention, at least
SHORT = 64  # tokens of a run up to which it is worth while to compute several at once


class Short(NamedTuple):
    """R runs of at most L tokens, which see at most K, trunk and own ones: where in the flattened batch their tokens (R, L)
    and what they see (R, K) lie, how far behind each token each position is (R, L, K), and which of the R L are real."""

    own: Tensor
    seen: Tensor
    behind: Tensor
    real: Tensor


class Documents:
    """Several documents in one row, one after another: a run of equal ids in doc_ids (B, T) is a document, one of
    negative ids padding.

    `branches` (B, T), or None for 0 everywhere: within a document, first a trunk of 0, then branches 1, 2, ..., each
    of which goes on from the trunk as if the others were not there.

    `positions` (B, T) count from each document's beginning, in a branch from the trunk's end. Padding behind a document
    attends to it, which nobody sees: so a padded row costs no more than a full one (where there are branches, to
    itself). Made once a forward, used by every layer."""

    def __init__(self, doc_ids: Tensor, branches: Tensor | None = None):
        self.doc_ids = doc_ids
        self.branches = branches if branches is not None and bool(branches.any()) else None
        self.begins = changes(doc_ids)  # a run, of padding too
        first = self.begins.clone()
        first[:, 1:] &= doc_ids[:, 1:] >= 0
        if self.branches is not None:
            self.document_begins, self.begins = self.begins, self.begins | changes(self.branches)
            first = self.begins
        T = doc_ids.shape[1]
        at = torch.arange(T, device=doc_ids.device).expand_as(doc_ids)
        self.starts = first.flatten().nonzero()[:, 0]
        self.positions = at - torch.where(first, at, 0).cummax(1).values
        if self.branches is not None:
            self.positions = self.positions + self.trunk_lengths[self.run_of].view_as(at)
        # Of padding 0, for there are tables that end.
        self.positions = torch.where(doc_ids >= 0, self.positions, 0)
        self.separately = _uncompiled() if "torch._dynamo" in sys.modules else _separately

    @functools.cached_property
    def run_of(self) -> Tensor:
        """The number of the run that each token belongs to, trunk and branches being runs of their own: (B T,)."""
        return self.begins.flatten().cumsum(0) - 1

    @functools.cached_property
    def run_lengths(self) -> Tensor:
        """Tokens of each run."""
        at = self.begins.flatten().nonzero()[:, 0]
        return F.pad(at, (0, 1), value=self.doc_ids.numel()).diff()

    @functools.cached_property
    def run_is_text(self) -> Tensor:
        """Which runs end a text: those that are neither padding nor the trunk of branches."""
        text = self.doc_ids[self.begins] >= 0
        return text if self.branches is None else text.index_fill(0, self.trunk_of[self.trunk_of >= 0], False)

    @functools.cached_property
    def trunk_of(self) -> Tensor:
        """The run that is each run's trunk, -1 where it has none. Of documents with branches."""
        assert self.branches is not None
        first = self.run_of[self.document_begins.flatten()]  # of each document
        first = first[self.document_begins.flatten().cumsum(0)[self.begins.flatten()] - 1]  # of each run's
        branch = self.branches[self.begins]
        return torch.where((branch > 0) & (branch[first] == 0), first, -1)

    @functools.cached_property
    def trunk_lengths(self) -> Tensor:
        """Of each run's trunk, 0 where it has none."""
        return torch.where(self.trunk_of >= 0, self.run_lengths[self.trunk_of], 0)

    def with_trunk(self, sums: Tensor) -> Tensor:
        """Sums over the tokens of each run (R, ...) -> with those of its trunk: over what a branch's reader has read."""
        if self.branches is None:
            return sums
        trunk = sums[self.trunk_of] * (self.trunk_of >= 0).view(-1, *[1] * (sums.dim() - 1))
        return sums + trunk

    @functools.cached_property
    def trunks(self) -> list[int]:
        """`trunk_of`, or without branches -1 of each document."""
        return [-1] * len(self.starts) if self.branches is None else self.trunk_of.tolist()

    @functools.cached_property
    def bounds(self) -> Tensor:
        """Where the documents begin in the flattened batch, and its end: (N + 1,) int32, as varlen kernels want it."""
        return F.pad(self.starts, (0, 1), value=self.doc_ids.numel()).to(torch.int32)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Of the documents, in order."""
        return (self.bounds[1:] - self.bounds[:-1]).tolist()

    @functools.cached_property
    def short(self) -> list["Short"]:
        """Runs that are short, by size; `long` has the others. Sizes are rounded up to powers of two, so that there are few
        and no more than half of each dimension is padding."""
        by_size: dict[tuple[int, int], list[int]] = {}
        lengths = self.lengths
        for run, (n, trunk) in enumerate(zip(lengths, self.trunks)):
            whole = n + (lengths[trunk] if trunk >= 0 else 0)
            if n <= SHORT and whole <= 4 * SHORT:
                by_size.setdefault((n.bit_length(), whole.bit_length()), []).append(run)
        self.long = sorted(set(range(len(lengths))) - {run for runs in by_size.values() for run in runs})
        return [self._short(runs) for runs in by_size.values()]

    def _short(self, runs: list[int]) -> "Short":
        starts, lengths, trunks = self.bounds.tolist(), self.lengths, self.trunks
        L = max(lengths[r] for r in runs)
        P = [lengths[trunks[r]] if trunks[r] >= 0 else 0 for r in runs]
        K = max(p + lengths[r] for p, r in zip(P, runs))
        device = self.doc_ids.device
        start, n, before, trunk = (
            torch.tensor(values)[:, None]
            for values in (
                [starts[r] for r in runs],
                [lengths[r] for r in runs],
                P,
                [starts[trunks[r]] if trunks[r] >= 0 else 0 for r in runs],
            )
        )
        i, j = torch.arange(L)[None], torch.arange(K)[None]
        i = i.minimum(n - 1)  # behind its end a run's last token stands again
        own = start + i
        seen = torch.where(j < before, trunk + j, start + (j - before).clamp(0).minimum(n - 1))
        behind = (before + i)[:, :, None] - j[:, None, :]
        real = (torch.arange(L) < n).flatten().nonzero()[:, 0]
        return Short(own.to(device), seen.to(device), behind.to(device), real.to(device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Causal attention within documents. q (B, H, T, D), k, v (B, H_kv, T, D) -> (B, H, T, D_v)."""
        B, _, T, _ = q.shape
        if len(self.starts) == B:  # one document a row
            return attend(q, k, v, scale=scale, window=window)
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (B*T, H, D)
        half = q.dtype in (torch.float16, torch.bfloat16)
        if q.is_cuda and half and self.branches is None and v.shape[-1] == q.shape[-1] and _varlen_can(window):
            y = _varlen(q, k, v, self.bounds, T, scale, window)
        else:
            y = self.separately(self, q, k, v, scale, window)
        return y.unflatten(0, (B, T)).transpose(1, 2)


def changes(ids: Tensor) -> Tensor:
    """Where a run of equal ids (B, T) begins."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return begins


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal softmax attention. q (B, H, T, D), k (B, H_kv, T, D), v (B, H_kv, T, D_v) -> (B, H, T, D_v).

    A query sees the last `window` positions, itself among them (None: all), and only its own document's. `scale`
    defaults to 1/sqrt(D)."""
    if documents is not None:
        return documents.attend(q, k, v, scale, window)
    if window is not None and window < q.shape[2]:
        return _local(q, k, v, scale, window)
    return sdpa(q, k, v, None, scale)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention over all of k. mask broadcastable to (B, H, T, T_k) with True where a query may look; None means
    causal, with T_k = T."""
    attend = functools.partial(
        F.scaled_dot_product_attention, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    if q.device.type != "cpu":
        return attend(q, k, v, attn_mask=mask)
    width = v.shape[-1]
    if (
        width < q.shape[-1]
    ):  # the CPU flash kernel wants equal widths; the plain one it falls back to takes twice as long
        v = F.pad(v, (0, q.shape[-1] - width))
    if q.dtype == torch.bfloat16 and q.shape[-2] <= 512:
        # The CPU flash kernel multiplies blocks so small that entering the bf16 library costs more than it saves:
        # its backward pass is up to 4 times faster in fp32 at this length.
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)[..., :width]
    return attend(q, k, v, attn_mask=mask)[..., :width]


def _local(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    """Each block of queries against its own and the preceding block of keys: T x 2 block scores instead of T x T."""
    T = q.shape[2]
    size = max(window, BLOCK)
    if T <= 2 * size:  # too few blocks to save anything
        at = torch.arange(T, device=q.device)
        behind = at[:, None] - at
        return sdpa(q, k, v, (behind >= 0) & (behind < window), scale)
    n = -(-T // size)
    q, k, v = (F.pad(t, (0, 0, 0, n * size - T)).unflatten(2, (n, size)).transpose(1, 2) for t in (q, k, v))
    k2, v2 = (torch.cat((t[:, :-1], t[:, 1:]), 3) for t in (k, v))  # (B, n-1, H_kv, 2 size, D)
    behind = torch.arange(size, device=q.device)[:, None] + size - torch.arange(2 * size, device=q.device)
    mask = (behind >= 0) & (behind < window)
    first = sdpa(q[:, 0], k[:, 0], v[:, 0], mask[:, size:], scale)
    rest = sdpa(q[:, 1:].flatten(0, 1), k2.flatten(0, 1), v2.flatten(0, 1), mask, scale).unflatten(0, (-1, n - 1))
    y = torch.cat((first[:, None], rest), 1)  # (B, n, H, size, D)
    return y.transpose(1, 2).flatten(2, 3)[:, :, :T]


def _separately(
    documents: Documents, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """One call a document, or a trunk or branch, short ones of which go together: q (B*T, H, D), k, v (B*T, H_kv, D) ->
    (B*T, H, D_v)."""
    if documents.branches is not None and documents.short:
        return _together(documents, q, k, v, scale, window)
    return torch.cat(_one_by_one(documents, range(len(documents.lengths)), q, k, v, scale, window))


def _one_by_one(
    documents: Documents,
    runs: Iterable[int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
) -> list[Tensor]:
    """(L, H, D_v) of each of some runs."""
    # split, unlike slicing, goes back through one concatenation
    each = [[t.transpose(0, 1)[None] for t in qkv] for qkv in zip(*(t.split(documents.lengths) for t in (q, k, v)))]
    ys = []
    for run in runs:
        (q, k, v), trunk = each[run], documents.trunks[run]
        if trunk < 0:
            y = attend(q, k, v, scale=scale, window=window)
        else:
            y = _branch(each[trunk], q, k, v, scale, window)
        ys.append(y[0].transpose(0, 1))
    return ys


def _together(documents: Documents, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    """As `_separately`, with one call for all short runs of about one size: of many answers of a few tokens each, the calls
    would take longer than their products."""
    if (
        q.device.type == "cpu"
    ):  # the kernel's own type at this size (see sdpa); a trunk's gradients are summed in it too
        dtype, (q, k, v) = q.dtype, (t.float() for t in (q, k, v))
    else:
        dtype = q.dtype
    parts, places = [], []
    with torch.autocast(q.device.type, enabled=False):
        for short in documents.short:
            here, seen = (
                t.index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)
                for t, at in ((q, short.own), (k, short.seen))
            )
            values = v.index_select(0, short.seen.flatten()).unflatten(0, short.seen.shape).transpose(1, 2)
            mask = short.behind >= 0 if window is None else (short.behind >= 0) & (short.behind < window)
            if q.device.type != "cpu":
                seen, values = (t.repeat_interleave(here.shape[1] // t.shape[1], 1) for t in (seen, values))
            y = sdpa(here, seen, values, mask[:, None], scale).transpose(1, 2)
            parts.append(y.flatten(0, 1).index_select(0, short.real))
            places.append(short.own.flatten().index_select(0, short.real))
        if documents.long:
            starts = documents.bounds.tolist()
            parts += _one_by_one(documents, documents.long, q, k, v, scale, window)
            places += [torch.arange(starts[i], starts[i + 1], device=q.device) for i in documents.long]
    return torch.cat(parts).index_select(0, torch.cat(places).argsort()).to(dtype)


@functools.cache
def _uncompiled() -> Callable[..., Tensor]:
    """`_separately` for compiled blocks: torch.compile would unroll its loop, anew for each batch."""
    return torch.compiler.disable(_separately)


def _branch(trunk: list[Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    """What a branch of L tokens sees behind the q, k, v of its trunk of P: q (1, H, L, D) -> (1, H, L, D_v). No more than
    L x (P + L) scores."""
    P, L = trunk[1].shape[2], q.shape[2]
    n = P if window is None else min(P, window - 1)  # of the trunk's last positions that are seen
    before = [t[:, :, P - n :] for t in trunk]
    k, v = torch.cat((before[1], k), 2), torch.cat((before[2], v), 2)
    if window is not None and n + L > 2 * max(window, BLOCK):  # in blocks, with those queries once more
        return _local(torch.cat((before[0], q), 2), k, v, scale, window)[:, :, n:]
    behind = torch.arange(L, device=q.device)[:, None] + n - torch.arange(n + L, device=q.device)
    mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    if q.device.type != "cpu":  # where grouped heads and a mask together have the slowest kernel
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return sdpa(q, k, v, mask, scale)


@functools.cache
def _varlen_keywords() -> frozenset[str]:
    """What torch's kernel accepts: torch 2.11 and 2.13 differ."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_can(window: int | None) -> bool:
    """Whether torch's kernel can be told what is wanted: a scale, and to be causal."""
    accepted = _varlen_keywords()
    return "scale" in accepted and ("window_size" in accepted or (window is None and "is_causal" in accepted))


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """torch's variable-length flash kernel (CUDA, half precision): q (B*T, H, D) -> like q."""
    from torch.nn.attention.varlen import varlen_attn

    heads, accepted = q.shape[1] // k.shape[1], _varlen_keywords()
    if heads > 1 and "enable_gqa" not in accepted:
        k, v = (t.repeat_interleave(heads, 1) for t in (k, v))
    options: dict[str, Any] = {
        "scale": scale,
        "enable_gqa": heads > 1,
        "window_size": (-1 if window is None else window - 1, 0),
        "is_causal": True,
    }
    options = {n: o for n, o in options.items() if n in accepted}
    y = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    assert isinstance(y, Tensor)  # a pair only where the log-sum-exp is asked for
    return y
