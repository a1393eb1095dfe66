"""From ids on disk to batches on the device.

A data set is a list of samples: `len`, `__getitems__(indices) -> Batch`, `fixed(n)` samples spread evenly for estimates,
and `whole()`, samples in which every target stands once."""

import json
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from etude.data.base import Data
from etude.data.mixture import Mixture
from etude.data.order import Mixed, Order, ResumableDistributedSampler, mix
from etude.data.pack import pack
from etude.data.prepare import Prepared
from etude.data.store import Flat
from etude.errors import Refusal

Batch = dict[str, Any]  # tensors by name; of prompts also `fields`, a list of objects
IGNORED = -100  # a target that is none
PADDING = -1  # the document id of what only fills a row
ROUND = 32  # padded rows have a multiple of so many tokens: every new shape costs a compilation on CPU


class Windows(Dataset):
    """Windows of seq_len + 1 ids, `stride` apart, over documents laid end to end."""

    def __init__(self, prepared: Prepared, split: str, seq_len: int, stride: int, eos: int | None = None):
        self.prepared, self.split, self.seq_len, self.stride, self.eos = prepared, split, seq_len, stride, eos
        self.vocab_size: int = prepared.meta["vocab_size"]
        self.ids = prepared.ids(split)
        self.tokens_per_sample = float(seq_len)
        self.dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        return (len(self.ids) - self.seq_len - 1) // self.stride + 1

    @property
    def epoch_samples(self) -> int:
        """Samples of which as many tokens are seen as the split has, where they are drawn at random."""
        return len(self.ids) // self.seq_len

    def __getitems__(self, indices: list[int]) -> Batch:
        """-> tokens (B, T) and targets (B, T); with `eos` also doc_ids (B, T), which count the end tokens before."""
        starts = np.asarray(indices, dtype=np.int64) * self.stride
        rows = self.ids.read_many(starts, self.seq_len + 1).astype(np.int64)
        check_ids(rows, self.vocab_size, self.prepared, f"{self.split} window {indices}")
        tokens = torch.from_numpy(rows)
        return self._batch(tokens[:, :-1], tokens[:, 1:])

    def prompts(self, n: int) -> list[list[int]]:
        """Of text, none suggests itself."""
        return []

    def _batch(self, tokens: Tensor, targets: Tensor) -> Batch:
        batch = {"tokens": tokens, "targets": targets}
        if self.eos is not None:
            ended = batch["tokens"] == self.eos
            batch["doc_ids"] = ended.cumsum(1) - ended.long()
        return batch

    def fixed(self, count: int, batch_size: int) -> Iterator[Batch]:
        """`count` windows spread evenly over the split, wherever they begin."""
        every = Windows(self.prepared, self.split, self.seq_len, 1, self.eos)
        at = np.linspace(0, len(every) - 1, min(count, len(every))).astype(np.int64)
        for i in range(0, len(at), batch_size):
            yield every.__getitems__(at[i : i + batch_size].tolist())

    def whole(self, batch_size: int) -> Iterator[Batch]:
        """The whole split in order, each token but the first a target exactly once; the last window is padded with
        ignored targets."""
        T = self.seq_len
        n = len(self.ids) - 1
        starts = np.arange(0, n, T)
        for i in range(0, len(starts), batch_size):
            group = starts[i : i + batch_size]
            tokens = np.zeros((len(group), T), dtype=np.int64)
            targets = np.full((len(group), T), IGNORED, dtype=np.int64)
            for row, target, start in zip(tokens, targets, group):
                piece = self.ids.read(int(start), int(min(start + T, n)) + 1)
                row[: len(piece) - 1] = piece[:-1]
                target[: len(piece) - 1] = piece[1:]
            for ids in (tokens, targets):
                check_ids(ids, self.vocab_size, self.prepared, f"{self.split} windows from token {group[0]}")
            yield self._batch(torch.from_numpy(tokens), torch.from_numpy(targets))


class Documents(Dataset):
    """Rows of whole documents, none of which sees another, padded where they do not fill a row.

    A piece is what stands between `begin` and `end` in the split's tokens: a document, or a part of an overlong one. Its
    ids but the last are inputs, each with the next one as target, where that is one. A sample is a row, but for pairs (two)
    and groups (as many as there are completions); a row has one piece, or with `packed` as many as best-fit decreasing puts
    together."""

    def __init__(self, prepared: Prepared, split: str, data: Data):
        self.prepared, self.split, self.seq_len = prepared, split, data.seq_len
        self.kind: str = prepared.meta["kind"]
        self.compares = self.kind in ("pairs", "groups")  # documents of a sample stand or fall together
        self.ids = prepared.ids(split)
        masked = self.kind in ("chats", "pairs", "labelled", "groups")
        self.masks = Flat(prepared.store, f"{split}/targets") if masked else None
        self.fields = (
            [Flat(prepared.store, f"{split}/{n}") for n in ("fields", "fields_ends")] if self.kind == "prompts" else []
        )
        self.labels = Flat(prepared.store, f"{split}/labels")[:] > 0 if self.kind == "labelled" else None
        self.filler: int = prepared.meta["eos"] or 0  # what padding holds; no one attends to it, and it is no target
        self.fixed_width = data.layout == "packed"
        self.dropped: Counter[str] = Counter()
        ends = np.asarray(Flat(prepared.store, f"{split}/ends")[:])
        begins = np.concatenate([[0], ends[:-1]])
        self.rewards, owner = self._groups(len(ends))
        self.row_of, self.begin, self.end = self._pieces(begins, ends, owner, data.overlong)
        inputs = self.end - self.begin - (self.kind != "prompts")
        if data.layout == "packed":
            self.items, self.row_ends = pack(inputs, self.seq_len)
        else:
            self.items, self.row_ends = np.arange(len(inputs)), np.arange(1, len(inputs) + 1)
        if self.compares:
            _, first = np.unique(owner[self.row_of], return_index=True)
            self.starts = np.append(first, len(self.row_of))
        else:
            self.starts = np.arange(len(self.row_ends) + 1)
        if not len(self):
            raise Refusal(
                f"no usable row is left in the {split} split of {prepared.meta['source']}{tell(self.dropped)}; raise data.seq_len or set data.overlong"
            )
        self.tokens_per_sample = float(inputs.sum() / len(self))
        self.efficiency = float(inputs.sum() / (len(self.row_ends) * self.seq_len))

    def _groups(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """-> (reward of each of n documents, which groups alone have; the sample that each belongs to)."""
        if self.kind != "groups":
            return np.empty(0, dtype=np.float32), np.arange(n) // (2 if self.kind == "pairs" else 1)
        rewards, ends = (
            np.asarray(Flat(self.prepared.store, f"{self.split}/{k}")[:]) for k in ("rewards", "groups_ends")
        )
        if not len(rewards) == n == ends[-1]:
            raise Refusal(
                f"{self.prepared.meta['source']}: the groups of the {self.split} split are damaged: make them again"
            )
        return rewards, np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))

    def _pieces(
        self, begin: np.ndarray, end: np.ndarray, owner: np.ndarray, overlong: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> (document, begin, end) of each piece that fits and has a target. `owner` is each document's sample."""
        room = self.seq_len + (self.kind != "prompts")  # the last id is no input
        row = np.arange(len(begin))
        long = end - begin > room
        if long.any():
            if overlong == "error":
                i = int(long.argmax())
                raise Refusal(
                    f"document {owner[i] + 1} of the {self.split} split has {end[i] - begin[i]} tokens and data.seq_len={self.seq_len}: raise it, or set data.overlong to right, left or drop"
                )
            if overlong == "split" and self.kind not in ("text", "chats"):
                raise Refusal(f"{self.kind} cannot be split: set data.overlong to right, left or drop")
            if overlong == "split":
                self.dropped["overlong, split"] += int(long.sum())
                counts = np.maximum(1, -(-(end - begin - 1) // self.seq_len))
                row = np.repeat(row, counts)
                nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
                begin = begin[row] + nth * self.seq_len
                end = np.minimum(begin + room, end[row])
                owner = np.arange(len(begin))
            elif overlong == "drop":
                self.dropped["overlong"] += int(_any(owner, long).sum())
            elif overlong == "right":
                self.dropped["overlong, cut on the right"] += int(long.sum())
                end = np.minimum(end, begin + room)
            else:
                self.dropped["overlong, cut on the left"] += int(long.sum())
                begin = np.maximum(begin, end - room)
        keep = np.ones(len(begin), dtype=bool)
        if overlong == "drop":
            keep &= ~_any(owner, long)[owner]
        if self.kind != "prompts":
            hopeless = _any(owner, self._targets(begin, end) == 0) & _any(owner, keep)
            self.dropped["no target"] += int(hopeless.sum())
            keep &= ~hopeless[owner]
        self.dropped = +self.dropped
        return row[keep], begin[keep], end[keep]

    def _targets(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """How many targets each piece has: what its first id is, is not predicted."""
        if self.masks is None:
            return np.maximum(end - begin - 1, 0)
        # Pieces follow each other in the file, so counting from each beginning to the next bounds the memory.
        counts = np.empty(len(begin), dtype=np.int64)
        for i in range(0, len(begin), 65536):
            some, ends = np.minimum(begin[i : i + 65536] + 1, end[i : i + 65536]), end[i : i + 65536]
            low = int(some.min())
            total = np.zeros(int(ends.max()) - low + 1, dtype=np.int64)
            np.cumsum(self.masks.read(low, int(ends.max())), out=total[1:])
            counts[i : i + 65536] = total[ends - low] - total[some - low]
        return counts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def epoch_samples(self) -> int:
        return len(self)

    def rows(self, sample: int) -> list[list[int]]:
        """The pieces in each of a sample's rows."""
        numbers = range(self.starts[sample], self.starts[sample + 1])
        return [self.items[self.row_ends[i - 1] if i else 0 : self.row_ends[i]].tolist() for i in numbers]

    def __getitems__(self, indices: list[int]) -> Batch:
        """-> tokens, targets, doc_ids (rows, T); rows is B, or 2B for pairs: chosen, rejected, chosen, ... doc_ids count the
        documents of a row, -1 is padding. Of prompts: tokens, doc_ids, and `fields`, a row's other keys. Of groups a row is
        a completion, and there are group (rows,) int64, its group's number in the batch, and rewards (rows,) float32, NaN
        where there is none. Of labelled answers: labels (rows,) bool, whether each is good."""
        whole = self.kind == "prompts"
        samples = [self.rows(i) for i in indices]
        rows = [row for sample in samples for row in sample]
        owner = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
        widths = [sum(int(self.end[p] - self.begin[p]) - (not whole) for p in row) for row in rows]
        T = self.seq_len if self.fixed_width else min(-(-max(widths) // ROUND) * ROUND, self.seq_len)
        tokens = np.full((len(rows), T), self.filler, dtype=np.int64)
        targets = np.full((len(rows), T), IGNORED, dtype=np.int64)
        doc_ids = np.full((len(rows), T), PADDING, dtype=np.int64)
        for r, row in enumerate(rows):
            at = 0
            for d, p in enumerate(row):
                begin, end = int(self.begin[p]), int(self.end[p])
                ids = self.ids.read(begin, end)
                n = len(ids) - (not whole)
                tokens[r, at : at + n] = ids[:n]
                doc_ids[r, at : at + n] = d
                if not whole:
                    following = ids[1:].astype(np.int64)
                    if self.masks is not None:
                        following[self.masks.read(begin + 1, end) == 0] = IGNORED
                    targets[r, at : at + n] = following
                at += n
        for ids in (tokens, targets):
            check_ids(ids, self.prepared.meta["vocab_size"], self.prepared, f"{self.split} sample {indices}", owner)
        batch: Batch = {"tokens": torch.from_numpy(tokens), "doc_ids": torch.from_numpy(doc_ids)}
        if whole:
            return batch | {"fields": [self.fields_of(self.rows(i)[0][0]) for i in indices]}
        batch["targets"] = torch.from_numpy(targets)
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[self.row_of[[row[0] for row in rows]]])
        if self.kind == "groups":
            batch["group"] = torch.from_numpy(owner)
            batch["rewards"] = torch.from_numpy(self.rewards[self.row_of[[row[0] for row in rows]]])
        return batch

    def spread(self) -> str:
        """How many completions groups have, and in how many of them none is better than another; how many labelled answers
        are good."""
        if self.labels is not None:
            good = int(self.labels[self.row_of].sum())
            return f": {good:,} desirable, {len(self) - good:,} undesirable"
        if self.kind != "groups":
            return ""
        sizes, each = np.diff(self.starts), np.split(self.rewards[self.row_of], self.starts[1:-1])
        silent = sum(len(np.unique(r[~np.isnan(r)])) < 2 for r in each)
        line = f" of {sizes.min()} to {sizes.max()} completions"
        return line + (f", {silent:,} without signal (rewards all alike)" if silent else "")

    def fields_of(self, piece: int) -> dict[str, Any]:
        document = int(self.row_of[piece])
        values, ends = self.fields
        begin = int(ends.read(document - 1, document)[0]) if document else 0
        return json.loads(bytes(values.read(begin, int(ends.read(document, document + 1)[0]))))

    def prompts(self, n: int) -> list[list[int]]:
        """The ids before the first target of the first n documents, where there are any."""
        found = []
        first = self.starts[:-1] if self.compares else np.arange(len(self.begin))
        for begin, end in zip(self.begin[first[:n]], self.end[first[:n]]):
            until = int(end)
            if self.masks is not None:
                until = int(begin) + int(self.masks.read(int(begin), int(end)).argmax())
            if self.kind != "text" and until > begin:
                found.append(self.ids.read(int(begin), until).tolist())
        return found

    def fixed(self, count: int, batch_size: int) -> Iterator[Batch]:
        """`count` samples spread evenly."""
        at = np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64)
        for i in range(0, len(at), batch_size):
            yield self.__getitems__(at[i : i + batch_size].tolist())

    def whole(self, batch_size: int) -> Iterator[Batch]:
        """All samples in order."""
        for i in range(0, len(self), batch_size):
            yield self.__getitems__(list(range(i, min(i + batch_size, len(self)))))


def _any(owner: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """Which samples own something that is marked."""
    return np.bincount(owner, weights=marked) > 0


class Chain(Dataset):
    """The sources of a mixture end to end; a batch may hold samples of several."""

    def __init__(self, sets: list[Windows | Documents], shares: list[float]):
        self.sets, self.shares = sets, np.array(shares) / sum(shares)
        self.starts = np.cumsum([0, *map(len, sets)])
        self.tokens_per_sample = float(sum(s * w for s, w in zip((d.tokens_per_sample for d in sets), self.shares)))
        self.dropped = sum((d.dropped for d in sets), Counter[str]())

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitems__(self, indices: list[int]) -> Batch:
        which = np.searchsorted(self.starts, indices, side="right") - 1
        groups, order = [], []
        for s in np.unique(which):
            at = np.flatnonzero(which == s)
            groups.append(self.sets[s].__getitems__([int(indices[i] - self.starts[s]) for i in at]))
            order.append(at)
        return merge(groups, order)

    def prompts(self, n: int) -> list[list[int]]:
        return [ids for data in self.sets for ids in data.prompts(1)]

    def fixed(self, count: int, batch_size: int) -> Iterator[Batch]:
        """Each source's share of `count` samples."""
        for data, share in zip(self.sets, self.shares):
            yield from data.fixed(max(1, round(count * share)), batch_size)

    def whole(self, batch_size: int) -> Iterator[Batch]:
        for data in self.sets:
            yield from data.whole(batch_size)


class Told(Dataset):
    """A data set whose refusals are returned: raised in a loader's worker they would arrive as a traceback."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> Batch | Refusal:
        try:
            return self.data.__getitems__(indices)
        except Refusal as refusal:
            return refusal


def merge(groups: list[Batch], places: list[np.ndarray]) -> Batch:
    """One batch of several, sample i of group g at places[g][i], all padded to the widest. Where only some say where their
    documents are, the others' rows are one document each."""
    if len(groups) == 1:
        return groups[0]
    n, T = sum(map(len, places)), max(g["tokens"].shape[1] for g in groups)
    sizes = np.zeros(n, dtype=np.int64)  # rows of each sample
    for group, at in zip(groups, places):
        sizes[at] = np.bincount(group["group"]) if "group" in group else len(group["tokens"]) // len(at)
    starts = np.cumsum(sizes) - sizes
    names = {k for g in groups for k in g}
    filling = {"tokens": 0, "targets": IGNORED, "doc_ids": PADDING}
    out: Batch = {k: torch.full((int(sizes.sum()), T), v) for k, v in filling.items() if k in names}
    out |= {"fields": [{}] * n} if "fields" in names else {}
    if "labels" in names:
        out["labels"] = torch.zeros(n, dtype=torch.bool)
    if "group" in names:
        out["group"] = torch.from_numpy(np.repeat(np.arange(n), sizes))
        out["rewards"] = torch.zeros(int(sizes.sum()))
    for group, at in zip(groups, places):
        rows = torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i] + sizes[i]) for i in at]))
        if "doc_ids" in names and "doc_ids" not in group:
            group = group | {"doc_ids": torch.zeros_like(group["tokens"])}
        for name, value in group.items():
            if name == "fields":
                for i, fields in zip(at, value):
                    out["fields"][i] = fields
            elif name in ("rewards", "labels"):
                out[name][rows] = value
            elif name != "group":
                out[name][rows, : value.shape[1]] = value
    return out


def check_ids(ids: np.ndarray, vocab_size: int, prepared: Prepared, what: str, owner: np.ndarray | None = None) -> None:
    """Raises Refusal for an id that there is not; `owner` are the rows' samples, where those are not one each."""
    if ids.max() >= vocab_size:
        row = int((ids.max(1) >= vocab_size).argmax())
        row = row if owner is None else int(owner[row])
        raise Refusal(
            f"{prepared.meta['source']}, row {row} of {what}: token id {ids.max()} is outside the vocabulary of {vocab_size}; "
            "the ids are damaged, or the tokenizer is not the one that made them"
        )


def tell(dropped: Counter[str]) -> str:
    return f" ({', '.join(f'{n:,} {why}' for why, n in dropped.items())})" if dropped else ""


def data_set(data: Data, prepared: Prepared, split: str) -> Windows | Documents:
    """The samples of one source's split."""
    data.check_prepared(prepared)
    if data.layout == "windows":
        eos = prepared.meta["eos"] if data.isolate_documents else None
        return Windows(prepared, split, data.seq_len, data.step_between, eos)
    return Documents(prepared, split, data)


class Batches:
    """Micro-batches of the training split, step by step, for one rank; validation batches apart from them."""

    def __init__(
        self, data: Data | Mixture, prepared: list[Prepared], sampler: dict[str, int], seed: int, device: torch.device
    ):
        self.data, self.prepared, self.device = data, prepared, device
        self.sets: dict[str, Windows | Documents | Chain] = {}
        parts = list(data.parts().values())
        for split in ("train", "val"):
            sets = [data_set(part, p, split) for part, p in zip(parts, prepared)]
            self.sets[split] = Chain(sets, data.shares(prepared)) if isinstance(data, Mixture) else sets[0]
            if split == "train":
                self.train_sets = sets
                self.order = self._order(sets, parts, seed, sampler["batch_size"])
        self.train = self.sets["train"]
        self.sampler = ResumableDistributedSampler(self.order, **sampler)
        self.micro_batches = self.sampler.batch_size // self.sampler.world_size // self.sampler.micro_batch_size

    def _order(self, sets: list[Any], parts: list[Any], seed: int, batch_size: int) -> Order | Mixed:
        if not isinstance(self.data, Mixture):
            drop, once = batch_size if self.data.drop_last else 1, sets[0].epoch_samples
            return Order(len(sets[0]), seed=seed, kind=self.data.order, drop_last=drop, random_epoch=once)
        seeds = [int(mix(seed, i)[0] >> np.uint64(1)) for i in range(len(sets))]
        orders = [
            Order(len(s), seed=k, kind=p.order, random_epoch=s.epoch_samples) for s, p, k in zip(sets, parts, seeds)
        ]
        return Mixed(orders, self.data.shares(self.prepared))

    @property
    def epoch_samples(self) -> int:
        """Samples after which as many tokens were seen as the training split has."""
        return self.order.epoch_size

    @property
    def tokens_per_sample(self) -> float:
        """Inputs in a sample, on average, without padding."""
        return self.train.tokens_per_sample

    def accounts(self) -> list[str]:
        """What became of the rows: how many there are, how full samples are, what was left out or cut."""
        lines = []
        for name, part, p, data in zip(self.data.parts(), self.data.parts().values(), self.prepared, self.train_sets):
            if isinstance(data, Windows) and not p.meta["dropped"]:
                continue
            line = f"{len(data):,} samples" + (f" of {name}" if name else "")
            if isinstance(data, Documents):
                line = f"{len(data if data.compares else data.row_of):,} rows in {line}{data.spread()}"
                line += f", {data.efficiency:.1%} full" if part.layout == "packed" else ""
            line += "".join(f"; {n:,} left out: {why}" for why, n in p.meta["dropped"].items())
            lines.append(line + "".join(f"; {n:,} {why}" for why, n in data.dropped.items()))
        return lines

    def steps(self, start: int, stop: int | None) -> Generator[list[Batch], None, None]:
        """The micro-batches of step `start`, of the next, ... on the device. Read ahead by the loader's workers."""
        self.sampler.step, self.sampler.stop = start, stop
        loader = DataLoader(
            Told(self.train),
            batch_sampler=self.sampler,  # type: ignore[arg-type]
            num_workers=self.data.workers,
            prefetch_factor=self.data.prefetch if self.data.workers else None,
            collate_fn=_identity,  # type: ignore[arg-type]
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader would draw its own seed from the global generator
            multiprocessing_context="fork" if self.data.workers and self.device.type == "cpu" else None,
        )
        iterator = iter(loader)
        while batches := [b for _, b in zip(range(self.micro_batches), iterator)]:
            if refused := [b for b in batches if isinstance(b, Refusal)]:
                raise refused[0]
            yield [self.to_device(b) for b in batches]

    def fixed(self, split: str, n_batches: int, batch_size: int) -> Iterator[Batch]:
        """The same `n_batches` batches at every call: an estimate free of sampling noise between evaluations."""
        yield from map(self.to_device, self.sets[split].fixed(n_batches * batch_size, batch_size))

    def whole(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every target of a split once."""
        yield from map(self.to_device, self.sets[split].whole(batch_size))

    def to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _identity(batch: Batch) -> Batch:
    return batch
