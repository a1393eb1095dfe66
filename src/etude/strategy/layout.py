"""How the sequences of a batch lie in memory: one a row, packed behind one another, or with their common prompt once.
Losses never see it: they `take` what they need of each learned token."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from etude.data.loader import IGNORED, PADDING, ROUND, Batch
from etude.data.pack import pack

Layout = Literal["rows", "packed", "shared"]


class Row(NamedTuple):
    """A sequence. Its ids but the last are inputs, each with the next one as target where that is learned."""

    ids: Tensor  # (n,) int64
    learned: Tensor  # (n,) bool; learned[0] is False: nothing predicts it


class Piece(NamedTuple):
    """A document as it lies in a row, n inputs long."""

    tokens: Tensor  # (n,)
    targets: Tensor  # (n,)
    branches: Tensor  # (n,)
    sequences: list[tuple[int, int, int]]  # (sequence, begin, end) of what is its own, in here


def rows_of(batch: Batch) -> list[Row]:
    """The sequences of a loader's batch, on the CPU: tokens, targets, and doc_ids where there are several a row or there
    is padding. Where the last target of a sequence is none, its last id is unknown, and 0 stands for it: no input sees it."""
    tokens, targets = batch["tokens"].cpu(), batch["targets"].cpu()
    doc_ids = batch["doc_ids"].cpu() if "doc_ids" in batch else torch.zeros_like(tokens)
    rows = []
    for ids, following, docs in zip(tokens, targets, doc_ids):
        lengths = torch.unique_consecutive(docs, return_counts=True)[1].tolist()
        for x, y, d in zip(ids.split(lengths), following.split(lengths), docs.split(lengths)):
            if d[0] >= 0:
                learned = torch.cat((torch.tensor([False]), y >= 0))
                rows.append(Row(torch.cat((x, y[-1:].clamp_min(0))), learned))
    return rows


def arrange(rows: list[Row], group: int, how: Layout, limit: int | None) -> Batch:
    """-> tokens, targets, doc_ids (B, T), for "shared" also branches (B, T), and slots (N, L), on the rows' device.

    rows: a sequence a row. packed: whole sequences behind one another, each a document by itself. shared: so lie `group`
    consecutive sequences, as one document, in which the beginning that they share and nothing of which is learned, but
    for its last token, stands once (the trunk), and then a branch for each of them: that last token, whose state scores
    what is learned first, and the rest. `branches` is 0 in a trunk and in a document without branches, k in the k-th
    branch. Groups that share no more than a token are not joined.

    T is a multiple of 32 but at most `limit`, or the longest document; None: as much as there is, which for packed and
    shared is one row. Positions begin anew in each document, so T may be more than a model's position_limit.
    slots: where in the flattened (B T) the target of the l-th learned token of sequence n lies, -1 behind its last."""
    device = rows[0].ids.device if rows else torch.device("cpu")
    rows = [Row(r.ids.cpu(), r.learned.cpu()) for r in rows]
    if len(rows) % group:
        raise ValueError(f"{len(rows)} sequences are no groups of {group}")
    if how == "shared":
        pieces = [p for i in range(0, len(rows), group) for p in branched(rows[i : i + group], i)]
    else:
        pieces = [whole(row, i) for i, row in enumerate(rows)]
    lengths = [len(p.tokens) for p in pieces]
    longest = max(lengths, default=0)
    room = max(longest, sum(lengths) if limit is None else limit)
    lines = [[i] for i in range(len(pieces))] if how == "rows" else packed(lengths, room)
    widest = max((sum(lengths[i] for i in line) for line in lines), default=0)
    T = max(-(-widest // ROUND) * ROUND, ROUND)
    if limit is not None:
        T = min(T, max(longest, limit))

    shape = max(1, len(lines)), T
    tokens, branches = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    targets, doc_ids = torch.full(shape, IGNORED), torch.full(shape, PADDING)
    found: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(rows)
    for b, line in enumerate(lines):
        at = 0
        for d, i in enumerate(line):
            piece, s = pieces[i], slice(at, at + lengths[i])
            tokens[b, s], targets[b, s], branches[b, s], doc_ids[b, s] = piece.tokens, piece.targets, piece.branches, d
            for n, begin, end in piece.sequences:
                found[n] = (piece.targets[begin:end] >= 0).nonzero()[:, 0] + (b * T + at + begin)
            at += lengths[i]
    slots = torch.full((len(rows), max(map(len, found), default=0)), -1)
    for row, places in zip(slots, found):
        row[: len(places)] = places
    made = {"tokens": tokens, "targets": targets, "doc_ids": doc_ids, "slots": slots}
    if how == "shared":
        made["branches"] = branches
    return {name: t.to(device) for name, t in made.items()}


def packed(lengths: list[int], room: int) -> list[list[int]]:
    """Which pieces share a row of `room`; those without a token are nowhere."""
    some = torch.tensor([i for i, n in enumerate(lengths) if n], dtype=torch.int64)
    if not len(some):
        return []
    items, ends = pack(torch.tensor(lengths)[some].numpy(), room)
    return [line.tolist() for line in some[torch.from_numpy(items)].tensor_split(torch.from_numpy(ends)[:-1])]


def whole(row: Row, n: int) -> Piece:
    """Sequence n as a document by itself."""
    tokens = row.ids[:-1]
    targets = torch.where(row.learned[1:], row.ids[1:], IGNORED)
    return Piece(tokens, targets, torch.zeros_like(tokens), [(n, 0, len(tokens))])


def branched(rows: list[Row], first: int) -> list[Piece]:
    """Sequences first, first + 1, ... as one document with branches, or each by itself where they share nothing."""
    pieces = [whole(row, first + g) for g, row in enumerate(rows)]
    trunk = shared(rows) - 1
    if trunk < 1 or len(rows) == 1:
        return pieces
    tokens, targets = [pieces[0].tokens[:trunk]], [pieces[0].targets[:trunk]]
    branches, sequences, at = [torch.zeros_like(tokens[0])], [], trunk
    for k, piece in enumerate(pieces, 1):
        tokens.append(piece.tokens[trunk:])
        targets.append(piece.targets[trunk:])
        branches.append(torch.full_like(tokens[-1], k))
        sequences.append((first + k - 1, at, at + len(tokens[-1])))
        at += len(tokens[-1])
    return [Piece(torch.cat(tokens), torch.cat(targets), torch.cat(branches), sequences)]


def shared(rows: list[Row]) -> int:
    """How many tokens these sequences begin with alike, none of them learned and each an input in all of them."""
    n = min(len(row.ids) for row in rows) - 1
    ids = torch.stack([row.ids[:n] for row in rows])
    differs = (ids != ids[0]).any(0) | torch.stack([row.learned[:n] for row in rows]).any(0)
    return int(differs.nonzero()[0]) if differs.any() else max(n, 0)


def take(x: Tensor, slots: Tensor) -> Tensor:
    """x (B, T) at slots (N, L) -> (N, L), 0 where there is none; differentiable."""
    return torch.where(slots >= 0, x.flatten()[slots.clamp_min(0)], 0)
