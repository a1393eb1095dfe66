"""A reference that is read from disk: log-probabilities computed once, before the first step, instead of a second model in
memory.

<cache_dir>/reference/<key>.safetensors holds what one model gave in one precision, whatever data it was asked about:
`key` covers all that a log-probability depends on but the sequence, and a sequence's own digest covers the rest. So
nothing in there can be out of date. Runs add to it what it lacks."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor, nn

from etude.errors import Refusal, StorageFault
from etude.model import weights
from etude.model.head import Scores
from etude.parallel import World

FORMAT = 1  # another one where what is stored, or how a model computes it, has changed
SAVE_EVERY = 120.0  # seconds between files of an unfinished pass
TELL_EVERY = 10.0  # and between lines


class Cached:
    """To be called like the model that it stands for."""

    def __init__(self, path: Path):
        self.path = path
        self.logprob = np.empty(0, dtype=np.float32)  # of the learned tokens of all sequences, one after another
        self.places: dict[bytes, tuple[int, int]] = {}  # where a sequence's begin and end, by its digest

    def __call__(
        self, tokens: Tensor, targets: Tensor, doc_ids: Tensor | None = None, branches: Tensor | None = None
    ) -> tuple[Scores, None]:
        """-> Scores (B, T) of which `logprob` is known, and the rest NaN. Raises Refusal for a sequence that is not there."""
        logprob = np.zeros(tokens.numel(), dtype=np.float32)
        for digest, at in sequences(tokens, targets, doc_ids, branches):
            if digest not in self.places:
                raise Refusal(
                    f"{self.path} lacks a sequence of this batch: the data is not what it was at the start of the run; start anew, or set reference=copy"
                )
            begin, end = self.places[digest]
            logprob[at] = self.logprob[begin:end]
        found = torch.from_numpy(logprob).view(tokens.shape).to(tokens.device)
        unknown = found.new_full((), float("nan")).expand_as(found)
        return Scores(found, *(unknown for _ in Scores._fields[1:])), None


def sequences(
    tokens: Tensor, targets: Tensor, doc_ids: Tensor | None, branches: Tensor | None
) -> Iterator[tuple[bytes, np.ndarray]]:
    """(digest, where in the flattened (B, T) its targets lie) of each sequence with a target, in any layout. The digest is
    of the ids that are the model's input and of the targets, which say what is learned."""
    T = tokens.shape[1]
    x, y = tokens.cpu().numpy(), targets.cpu().numpy()
    documents = np.zeros_like(x) if doc_ids is None else doc_ids.cpu().numpy()
    branch = np.zeros_like(x) if branches is None else branches.cpu().numpy()
    for r in range(len(x)):
        edges = [0, *(np.flatnonzero(np.diff(documents[r])) + 1).tolist(), T]
        for begin, end in pairwise(edges):
            if documents[r, begin] < 0:
                continue
            which = branch[r, begin:end]
            last = int(which.max())
            for k in range(1, last + 1) if last else (0,):
                at = begin + np.flatnonzero((which == 0) | (which == k))  # its trunk and itself
                ids, wanted = x[r, at], y[r, at]
                if (wanted >= 0).any():
                    content = ids.astype("<i8").tobytes() + wanted.astype("<i8").tobytes()
                    yield hashlib.blake2b(content, digest_size=16).digest(), r * T + at[wanted >= 0]


def key(model: nn.Module, precision: str) -> str:
    """Of all that makes a model's log-probabilities: its settings, every parameter's name, dtype and bytes, and the
    precision of its products."""
    node = json.dumps(getattr(model, "node", None), sort_keys=True, default=str)
    digest = hashlib.sha256(f"{FORMAT} {precision} {node}".encode())
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def precompute(
    model: nn.Module,
    datasets: Iterable[Any],
    *,
    batch_size: int,
    precision: str,
    cache_dir: str | Path,
    world: World,
    say: Callable[[str], None],
) -> Cached:
    """The reference that `model` is at this moment, with every sequence of the loader's data sets. To be called by all
    ranks: rank 0 computes what the file lacks, `batch_size` samples a forward, and keeps what is done if it is stopped."""
    path = Path(cache_dir).expanduser() / "reference" / f"{key(model, precision)}.safetensors"
    if world.rank == 0:
        cached = read(path, say)
        fill(cached, model, list(datasets), batch_size, precision, world, say)
        world.broadcast(False)
        return cached
    while world.broadcast(None):  # rank 0 is at work: no collective waits longer than the group's timeout
        pass
    return read(path, say)


def fill(
    cached: Cached,
    model: nn.Module,
    datasets: list[Any],
    batch_size: int,
    precision: str,
    world: World,
    say: Callable[[str], None],
) -> None:
    """Compute and write what is missing.

    A batch of which some is missing goes through the model as a whole, and what is known stays: so the rounding of a
    number does not depend on where an earlier pass was stopped."""
    total, done, size = sum(map(len, datasets)), 0, len(cached.logprob)
    news: list[np.ndarray] = []
    told = saved = time.monotonic()
    training = model.training
    model.eval()
    try:
        for batch in (b for data in datasets for b in data.whole(batch_size)):
            found = list(sequences(batch["tokens"], batch["targets"], batch.get("doc_ids"), None))
            if any(digest not in cached.places for digest, _ in found):
                logprob = computed(model, batch, precision, world.device)
                for digest, at in found:
                    if digest not in cached.places:
                        cached.places[digest] = size, size + len(at)
                        news.append(logprob[at])
                        size += len(at)
            done += batch_size
            now = time.monotonic()
            if now - told > TELL_EVERY:
                told = now
                say(f"log-probabilities of the reference: {min(done, total):,} of {total:,} samples")
                world.broadcast(True)
            if news and now - saved > SAVE_EVERY:
                add(cached, news)
                news, saved = [], now
    finally:
        model.train(training)
    if news:
        add(cached, news)


def add(cached: Cached, news: list[np.ndarray]) -> None:
    """Put the log-probabilities of the latest sequences behind the others, and all of them on disk."""
    cached.logprob = np.concatenate([cached.logprob, *news])
    write(cached)


@torch.no_grad()
def computed(model: nn.Module, batch: dict[str, Tensor], precision: str, device: torch.device) -> np.ndarray:
    """Log-probabilities (B T,) of a loader's batch."""
    tensors = {name: batch[name].to(device) for name in ("tokens", "targets", "doc_ids") if name in batch}
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        scores, _ = model(tensors.pop("tokens"), **tensors)
    return scores.logprob.flatten().float().cpu().numpy()


def write(cached: Cached) -> None:
    """Whole or not at all. Raises StorageFault."""
    digests = np.frombuffer(b"".join(cached.places), dtype=np.uint8).reshape(-1, 16)
    places = np.array(list(cached.places.values()), dtype=np.int64).reshape(-1, 2)
    content: dict[str, np.ndarray] = {"digests": digests, "places": places, "logprob": cached.logprob}
    tensors = {name: torch.from_numpy(a.copy()) for name, a in (content | {"sha256": checksum(content)}).items()}
    temporary = cached.path.with_name(f".{cached.path.name}.{os.getpid()}")
    try:
        cached.path.parent.mkdir(parents=True, exist_ok=True)
        weights.write(tensors, temporary)
        os.replace(temporary, cached.path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageFault(f"{cached.path} could not be written: {error}; set cache_dir=<a folder with room>") from None


def read(path: Path, say: Callable[[str], None]) -> Cached:
    """What is there; nothing, with one warning, where a file is damaged."""
    cached = Cached(path)
    if not path.exists():
        return cached
    try:
        content = load_file(path)
        if not np.array_equal(content.pop("sha256"), checksum(content)):
            raise ValueError("its checksum is wrong")
        digests, places = content["digests"].tobytes(), content["places"].tolist()
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        say(f"warning: {path} is damaged and is made again: {error}")
        return cached
    cached.places = {digests[16 * i : 16 * i + 16]: (begin, end) for i, (begin, end) in enumerate(places)}
    cached.logprob = content["logprob"]
    return cached


def checksum(content: dict[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256()
    for name in sorted(content):
        digest.update(f"{name} {content[name].dtype} {content[name].shape}".encode())
        digest.update(np.ascontiguousarray(content[name]).tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint8)
