"""From ids on disk to batches on the device."""

from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from etude.data.order import ResumableDistributedSampler
from etude.data.text import Prepared, TextData
from etude.errors import Refusal

Batch = dict[str, Tensor]


class Windows(Dataset):
    """Windows of seq_len + 1 ids, `stride` apart, over a memory map. A sample is read when it is asked for."""

    def __init__(self, prepared: Prepared, split: str, seq_len: int, stride: int, eos: int | None = None):
        self.prepared, self.split, self.seq_len, self.stride, self.eos = prepared, split, seq_len, stride, eos
        self.vocab_size: int = prepared.meta["vocab_size"]
        self.ids = prepared.ids(split)

    def __len__(self) -> int:
        return (len(self.ids) - self.seq_len - 1) // self.stride + 1

    def __getitems__(self, indices: list[int]) -> Batch:
        """-> tokens (B, T) and targets (B, T); with `eos` also doc_ids (B, T), which count the end tokens before."""
        T = self.seq_len
        rows = np.stack([self.ids[i * self.stride : i * self.stride + T + 1] for i in indices]).astype(np.int64)
        if rows.max() >= self.vocab_size:
            row = int((rows.max(1) >= self.vocab_size).argmax())
            raise Refusal(
                f"{self.prepared.folder / self.split}.bin, window {indices[row]}: token id {rows.max()} is outside the vocabulary of "
                f"{self.vocab_size}; the cache is damaged: delete {self.prepared.folder}"
            )
        tokens = torch.from_numpy(rows)
        return self._batch(tokens[:, :-1], tokens[:, 1:])

    def _batch(self, tokens: Tensor, targets: Tensor) -> Batch:
        batch = {"tokens": tokens, "targets": targets}
        if self.eos is not None:
            ended = batch["tokens"] == self.eos
            batch["doc_ids"] = ended.cumsum(1) - ended.long()
        return batch

    def cover(self, batch_size: int) -> Iterator[Batch]:
        """The whole split in order, each token but the first a target exactly once; the last window is padded with
        ignored targets (-100)."""
        T = self.seq_len
        n = len(self.ids) - 1
        starts = np.arange(0, n, T)
        for i in range(0, len(starts), batch_size):
            group = starts[i : i + batch_size]
            tokens = np.zeros((len(group), T), dtype=np.int64)
            targets = np.full((len(group), T), -100, dtype=np.int64)
            for row, target, start in zip(tokens, targets, group):
                piece = self.ids[start : start + T + 1]
                row[: len(piece) - 1] = piece[:-1]
                target[: len(piece) - 1] = piece[1:]
            yield self._batch(torch.from_numpy(tokens), torch.from_numpy(targets))


class Batches:
    """Micro-batches of the training split, step by step, for one rank; validation batches apart from them."""

    def __init__(self, data: TextData, prepared: Prepared, sampler_settings: dict, device: torch.device):
        self.data, self.prepared, self.device = data, prepared, device
        self.eos: int | None = prepared.meta["eos"] if data.isolate_documents else None
        self.train = Windows(prepared, "train", data.seq_len, data.step_between, self.eos)
        self.sampler = ResumableDistributedSampler(
            len(self.train), order=data.order, drop_last=data.drop_last, **sampler_settings
        )
        self.micro_batches = self.sampler.batch_size // self.sampler.world_size // self.sampler.micro_batch_size

    @property
    def epoch_samples(self) -> int:
        """Samples after which as many tokens were seen as the training split has."""
        return len(self.train.ids) // self.data.seq_len if self.data.order == "random" else self.sampler.epoch_size

    def steps(self, start: int, stop: int | None) -> Generator[list[Batch], None, None]:
        """The micro-batches of step `start`, of the next, ... on the device. Read ahead by the loader's workers."""
        self.sampler.step, self.sampler.stop = start, stop
        loader = DataLoader(
            self.train,
            batch_sampler=self.sampler,  # type: ignore[arg-type]
            num_workers=self.data.workers,
            prefetch_factor=self.data.prefetch if self.data.workers else None,
            collate_fn=_identity,  # type: ignore[arg-type]
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader would draw its own seed from the global generator
            multiprocessing_context="fork" if self.data.workers and self.device.type == "cpu" else None,
        )
        iterator = iter(loader)
        while batches := [self.to_device(b) for _, b in zip(range(self.micro_batches), iterator)]:
            yield batches

    def fixed(self, split: str, n_batches: int, batch_size: int) -> Iterator[Batch]:
        """The same `n_batches` windows spread evenly over a split, at every call: an estimate free of sampling noise
        between evaluations."""
        windows = Windows(self.prepared, split, self.data.seq_len, 1, self.eos)
        count = min(n_batches * batch_size, len(windows))
        at = np.linspace(0, len(windows) - 1, count).astype(np.int64)
        for i in range(0, count, batch_size):
            yield self.to_device(windows.__getitems__(at[i : i + batch_size].tolist()))

    def whole(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every token of a split as a target once."""
        for batch in Windows(self.prepared, split, self.data.seq_len, self.data.seq_len, self.eos).cover(batch_size):
            yield self.to_device(batch)

    def to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}


def _identity(batch: Batch) -> Batch:
    return batch
