"""From sources to one HDF5 file of token ids, in two passes over the files, each of which can be killed and gone on with.

The first reads and checks every row, and keeps a hash and a length of each document: they decide which documents are
validation and which stand there twice. Then a tokenizer is made, of training text alone. The second pass encodes. What
worker processes return is written in the order of the files, so the result is the same for any number of them, and only
a few units of about 2 MB are in memory at once (and 21 bytes a document)."""

import collections
import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from etude.data import store
from etude.data.encode import encode, words
from etude.data.formats import BadRow, Example, normalise, parse
from etude.data.source import Entry, Place, Source, Unit, cut, kind_of, units
from etude.errors import Refusal, StorageFault
from etude.text import tokenizer as tok

FORMAT = 2  # of the file; another number makes everything anew
COMMIT_SECONDS = 2.0
SEGMENT = 1 << 26  # elements
DROP, TRAIN, VAL, CUT = 0, 1, 2, 3  # what becomes of an entry
SPLITS = {TRAIN: "train", VAL: "val"}
BASELINE = 5_000_000  # training tokens that the bigram model counts at most

Make = Callable[[Iterable[str], Iterable[str]], tok.Tokenizer]
Arrays = dict[str, list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Where the ids lie and what is known of them; small enough to hand to another process."""

    store: Any  # of etude.data.store
    meta: dict[str, Any]
    files: dict[str, str]  # the tokenizer's

    @property
    def tokenizer(self) -> tok.Tokenizer:
        return tok.from_files(self.files)

    def ids(self, split: str) -> store.Flat:
        """The token ids of "train" or "val"."""
        return store.Flat(self.store, f"{split}/tokens")


def open_prepared(path: Path) -> Prepared:
    """A file made by `prepare`. Raises Refusal if it is anything else."""
    h5 = store.H5(path)
    meta = h5.attributes.get("etude")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise Refusal(f"{path} was not made by this version's prepare.py: make it again with python prepare.py")
    wanted = {f"{split}/{part}" for split in SPLITS.values() for part in parts(meta["kind"])}
    if missing := sorted(wanted - set(h5.keys)):
        raise Refusal(f"{path} lacks {', '.join(missing)}: make it again with python prepare.py")
    texts = {k.partition("/")[2]: bytes(store.Flat(h5, k)[:]).decode() for k in h5.keys if k.startswith("tokenizer/")}
    return Prepared(h5, meta, texts)


def parts(kind: str) -> dict[str, str]:
    """The arrays of a split by name, with their types ("ids": as wide as the vocabulary needs). `ends` are the places in
    `tokens` where documents end; `targets` marks the tokens to be predicted; `fields` are a row's other keys as JSON."""
    more = {"text": {}, "chats": {"targets": "uint8"}, "pairs": {"targets": "uint8"}}
    return {"tokens": "ids", "ends": "int64"} | more.get(kind, {"fields": "uint8", "fields_ends": "int64"})


# ---------------------------------------------------------------- what workers do


def scan_unit(source: Source, unit: Unit) -> list[tuple[bytes, int] | BadRow]:
    """(hash, characters) of each entry, or what is wrong with it."""
    found: list[tuple[bytes, int] | BadRow] = []
    for entry in unit.entries:
        try:
            if entry.row == 0:
                found.append((text_hash([entry.content]), len(entry.content)))
                continue
            texts = list(words(example := example_of(source, entry.content)))
            if source.kind == "text":
                found.append((text_hash(cut(texts[0])), len(texts[0])))
            else:
                whole = json.dumps([example.prompt, example.answers, example.fields], sort_keys=True)
                found.append((text_hash([whole]), sum(map(len, texts))))
        except BadRow as error:
            found.append(error)
    return found


def without_data(text: str) -> str:
    """A hint for train.py as one for prepare.py, whose settings are no part of a data node."""
    return re.sub(r" strategy=\w+|data\.", "", text).replace("data=", "kind=")


def text_hash(pieces: Iterable[str], before: bytes = b"") -> bytes:
    """Of a text, from its pieces' hashes: the same whether a file gives it in pieces or a row whole."""
    for piece in pieces:
        before = chained(before, hashlib.blake2b(piece.encode(), digest_size=16).digest())
    return before


def chained(before: bytes, digest: bytes) -> bytes:
    return hashlib.blake2b(before + digest, digest_size=16).digest() if before else digest


def example_of(source: Source, content: Any) -> Example:
    """The example that a row is. Raises BadRow."""
    if isinstance(content, BadRow):
        raise content
    row = parse(content) if isinstance(content, bytes) else content
    return normalise(row, source.kind, source.format, dict(source.rename))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to become of a unit's entries: DROP, TRAIN, VAL, or CUT, where a text's first `cut` characters are the last
    of training and the rest is validation. `begins`: which of them begin a document."""

    fate: np.ndarray
    begins: np.ndarray
    cut: int
    ends: tuple[bool, bool]  # whether an end token stands behind each document of (train, val)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> tok.Tokenizer:
    return tok.load(folder)


def encode_unit(source: Source, folder: Path, unit: Unit, plan: Plan) -> tuple[Arrays, list[tuple[int, BadRow]]]:
    """-> the arrays of `parts` by "<split>/<name>", with lengths instead of ends and "<split>/bytes" of text; and
    (entry, what is wrong with it). `folder` has the tokenizer's files."""
    tokenizer = _tokenizer(folder)
    out: Arrays = collections.defaultdict(list)
    bad: list[tuple[int, BadRow]] = []
    if source.kind == "text":
        _encode_texts(source, tokenizer, unit, plan, out, bad)
        return out, bad
    at = np.flatnonzero(plan.fate != DROP)
    examples = [example_of(source, unit.entries[i].content) for i in at]
    for i, example, documents in zip(at, examples, encode(examples, tokenizer, source.kind, source.train_on)):
        if isinstance(documents, BadRow):
            bad.append((int(i), documents))
            continue
        split = SPLITS[plan.fate[i]]
        out[f"{split}/characters"].append(np.array([sum(map(len, words(example)))]))
        for document in documents:
            out[f"{split}/tokens"].append(document.ids)
            out[f"{split}/ends"].append(np.array([len(document.ids)]))
            if source.kind != "prompts":
                out[f"{split}/targets"].append(document.targets.astype(np.uint8))
        if source.kind == "prompts":
            fields = np.frombuffer(json.dumps(example.fields, ensure_ascii=False).encode(), dtype=np.uint8)
            out[f"{split}/fields"].append(fields)
            out[f"{split}/fields_ends"].append(np.array([len(fields)]))
    return out, bad


def _encode_texts(
    source: Source, tokenizer: tok.Tokenizer, unit: Unit, plan: Plan, out: Arrays, bad: list[tuple[int, BadRow]]
) -> None:
    pieces: list[tuple[int, str, bool]] = []
    for i, (entry, fate) in enumerate(zip(unit.entries, plan.fate)):
        if fate == DROP:
            continue
        text = entry.content if entry.row == 0 else str(example_of(source, entry.content).answers[0])
        try:
            tokenizer.check(text, "the text")
        except Refusal as error:
            bad.append((i, BadRow(str(error))))
            if plan.begins[i] and entry.final:
                continue
            text = ""  # the document goes on, or ends here, without it
        sides = [(TRAIN, text[: plan.cut], True), (VAL, text[plan.cut :], entry.final)]
        for side, part, final in sides if fate == CUT else [(fate, text, entry.final)]:
            *first, last = cut(part)
            pieces += [*((side, piece, False) for piece in first), (side, last, final)]
    end = np.array([] if tokenizer.eos is None else [tokenizer.eos], dtype=np.uint32)
    for (fate, text, final), ids in zip(pieces, tokenizer.encode_many([text for _, text, _ in pieces])):
        split = SPLITS[fate]
        out[f"{split}/bytes"].append(np.array([len(text.encode())]))
        out[f"{split}/characters"].append(np.array([len(text)]))
        if final and plan.ends[fate - TRAIN]:
            ids = np.concatenate([ids, end])
        out[f"{split}/tokens"].append(ids)
        # A piece that does not end its document has a negative length: the next one goes on.
        out[f"{split}/ends"].append(np.array([len(ids) if final else -len(ids) - 1]))


# ---------------------------------------------------------------- the two passes


class Workers:
    """A function over units: here with 0 or 1 processes, else in that many, a few units ahead and in order."""

    def __init__(self, processes: int):
        self.processes = processes
        self.pool: concurrent.futures.ProcessPoolExecutor | None = None
        self.calls = 0

    def __enter__(self) -> "Workers":
        if self.processes > 1:
            self.pool = concurrent.futures.ProcessPoolExecutor(
                self.processes, multiprocessing.get_context("spawn"), initializer=_settle, initargs=(os.getpid(),)
            )
        return self

    def __exit__(self, *_: Any) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[..., Any], calls: Iterable[tuple[Unit, tuple]]) -> Iterator[tuple[Unit, Any]]:
        """(unit, function(*arguments)) for each (unit, arguments)."""
        if self.pool is None:
            for unit, arguments in calls:
                yield unit, function(*arguments)
            return
        ahead: collections.deque = collections.deque()
        try:
            for unit, arguments in calls:
                ahead.append((unit, self._submit(function, *arguments)))
                if len(ahead) > self.processes + 2:
                    first, future = ahead.popleft()
                    yield first, future.result()
            for unit, future in ahead:
                yield unit, future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise StorageFault(
                "a worker process was killed, perhaps for its memory: the same command goes on; with processes=1 it takes least"
            ) from None

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future:
        assert self.pool is not None
        self.calls += 1
        if self.calls > self.processes:
            return self.pool.submit(function, *arguments)
        # Each of the first calls starts a process. It inherits what is blocked here until it ignores it for good: a
        # Ctrl-C in this moment would else end the worker and not this process. The tracker's start would unblock it.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self.pool.submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _settle(parent: int) -> None:
    """One thread a process; Ctrl-C is the parent's to handle; and without the parent there is nothing to do."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Journal:
    """Flat files that grow and are cut back to what was last committed when the work is taken up again."""

    def __init__(self, folder: Path, key: str):
        self.folder, self.path = folder, folder / "state.json"
        self.state: dict[str, Any] = {"key": key, "stage": "scan", "place": None, "sizes": {}, "counts": {}}
        if (old := self._read()).get("key") == key:
            self.state = old
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.out: dict[str, Any] = {}
        self.committed = time.monotonic()

    def _read(self) -> dict[str, Any]:
        """What was committed; nothing where a power cut left no whole file."""
        try:
            state = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def place(self) -> Place:
        return Place(**(self.state["place"] or {}))

    @property
    def counts(self) -> dict[str, Any]:
        return self.state["counts"]

    def append(self, name: str, array: np.ndarray) -> None:
        if name not in self.out:
            path = self.folder / name
            path.touch()
            os.truncate(path, self.state["sizes"].get(name, 0))
            self.out[name] = path.open("ab")
        self.out[name].write(array.tobytes())

    def commit(self, then: Place | None, stage: str | None = None) -> None:
        """Now and then (always with a new stage): what was written counts, and reading goes on at `then`."""
        if stage is None and time.monotonic() - self.committed < COMMIT_SECONDS:
            return
        for f in self.out.values():
            f.flush()
            os.fsync(f.fileno())
        self.state["sizes"] |= {name: f.tell() for name, f in self.out.items()}
        self.state["place"] = None if then is None else dataclasses.asdict(then)
        self.state["stage"] = stage or self.state["stage"]
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.state))
        os.replace(temporary, self.path)
        self.committed = time.monotonic()

    def read(self, name: str, dtype: str, shape: tuple[int, ...] = (-1,)) -> np.ndarray:
        """A committed file as a memory map; empty where nothing was appended."""
        size = self.state["sizes"].get(name, 0)
        if not size:
            return np.zeros(0, dtype=dtype).reshape(0, *shape[1:])
        return np.memmap(self.folder / name, dtype=dtype, mode="r", shape=(size // np.dtype(dtype).itemsize,)).reshape(
            shape
        )

    def restart(self, stage: str, keep: tuple[str, ...]) -> None:
        """Begin a stage anew with only the files named."""
        self.state["sizes"] = {name: n for name, n in self.state["sizes"].items() if name in keep}
        self.commit(None, stage)

    def close(self) -> None:
        for f in self.out.values():
            f.close()
        self.out = {}


class Preparation:
    """One source on its way to one file. `tell(what, done, total)` hears how far a pass is: bytes of the first (`total`
    None where the files do not say), characters of the second. `tokenizer_key` tells apart tokenizers that differ."""

    def __init__(
        self,
        source: Source,
        target: Path,
        workers: Workers,
        tokenizer_key: str | None,
        tell: Callable[[str, int, int | None], None] = lambda *_: None,
    ):
        self.source, self.target, self.workers, self.tell = source, target, workers, tell
        self.stats = [_stat(source.root / n) for n in source.names]
        stats = [(n, *stat) for n, stat in zip(source.names, self.stats)]
        plain = all(kind_of(source.root / n) != "parquet" and not n.endswith((".gz", ".zst")) for n in source.names)
        self.bytes = sum(s[1] for s in stats) if plain else None
        key = _hash([FORMAT, source.settings(), str(source.root.resolve()), stats, tokenizer_key])
        self.journal = Journal(target.with_name(f".{target.name}.building"), key)
        self.counts = self.journal.counts
        self.tokenizer_key = tokenizer_key

    # ------------------------------------------------------------ first pass

    def scan(self) -> None:
        """Raises Refusal at the first bad row, unless they are to be skipped."""
        journal, source, counts = self.journal, self.source, self.counts
        if journal.state["stage"] == "scan":
            if not counts:
                counts |= {"dropped": {}, "read": 0, "chain": ""}
            calls = ((u, (source, u)) for u in units(source, journal.place))
            for unit, found in self.workers.map(scan_unit, calls):
                self._record(unit, found)
                counts["read"] += unit.size
                journal.commit(unit.then)
                self.tell("reading", counts["read"], self.bytes)
            counts["sha256"] = [file_hash(source.root / n) for n in source.names]
            journal.commit(None, "scanned")
        self._plan()

    def _record(self, unit: Unit, found: list[tuple[bytes, int] | BadRow]) -> None:
        """Keep the hash of each document (of its pieces' hashes where it has several) and the length of each entry."""
        chain = bytes.fromhex(self.counts["chain"])
        characters, final, digests = [], [], b""
        for entry, result in zip(unit.entries, found):
            final.append(entry.final)
            if isinstance(result, BadRow):
                self._bad(entry, result, self.counts["dropped"])
                characters.append(-1)
                continue
            characters.append(result[1])
            chain = chained(chain, result[0])
            if entry.final:
                digests, chain = digests + chain, b""
        self.counts["chain"] = chain.hex()
        self.journal.append("characters", np.array(characters, dtype=np.int32))
        self.journal.append("final", np.array(final, dtype=np.bool_))
        self.journal.append("digests", np.frombuffer(digests, dtype=np.uint8))

    def _bad(self, entry: Entry, error: BadRow, counts: dict[str, int]) -> None:
        if self.source.on_error == "raise":
            key = self.source.key
            why = str(error) if key else without_data(str(error))
            raise Refusal(f"{self.source.where(entry)}: {why}; {key}on_error=skip leaves such rows out and counts them")
        counts[error.reason] = counts.get(error.reason, 0) + 1

    def _plan(self) -> None:
        """What becomes of every entry (`fate`), from the hashes and lengths of all; `document` is each entry's."""
        source, journal = self.source, self.journal
        self.characters = np.asarray(journal.read("characters", "int32"))
        final = np.asarray(journal.read("final", "bool"))
        digests = np.asarray(journal.read("digests", "uint8", (-1, 16))).view(">u8").astype(np.uint64)
        if not len(digests):
            raise Refusal(f"{self.named()} has no usable row{self._dropped()}")
        good = self.characters >= 0
        ends = final & good
        self.document = np.minimum(np.cumsum(ends) - ends, len(digests) - 1)
        self.begins = np.concatenate([[True], final[:-1]])
        order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal ones the first in the files comes first
        again = np.zeros(len(digests), dtype=bool)
        again[order[1:]] = (digests[order[1:]] == digests[order[:-1]]).all(1)
        self.counts["duplicates"] = int(again.sum())
        kept = good & ~(again[self.document] & (source.duplicates == "drop"))
        self.cut: tuple[int, int] | None = None  # (entry, characters of it that are training)
        if source.split == "hash":
            validation = digests[:, 0] < np.uint64(source.val_fraction * 2.0**64)
            self.fate = np.where(validation, VAL, TRAIN).astype(np.uint8)[self.document]
        else:
            until = np.cumsum(np.where(kept, self.characters, 0), dtype=np.int64)
            place = int(int(until[-1]) * (1 - source.val_fraction))
            self.fate = np.where(until <= place, TRAIN, VAL).astype(np.uint8)
            at = int(np.searchsorted(until, place))
            within = place - int(until[at - 1] if at else 0)
            # Also behind the last character of a piece whose document goes on: it ends there for training.
            if source.kind == "text" and within and (within < self.characters[at] or not final[at]):
                self.cut, self.fate[at] = (at, within), CUT
        self.fate[~kept] = DROP
        counts = [len(np.unique(self.document[(self.fate == s) | (self.fate == CUT)])) for s in SPLITS]
        if not all(counts):
            empty = " and the ".join(s for s, c in zip(SPLITS.values(), counts) if not c)
            n, key = len(digests), source.key
            raise Refusal(
                f"{self.named()}: none of {n} document{'s' * (n > 1)} falls into the {empty} split{self._dropped()}; "
                f"change {key}val_fraction{f' or set {key}split=position' if source.split == 'hash' else ''}, or bring more documents"
            )
        # nanoGPT's layout for one text: nothing stands behind it. Documents have an end token behind each.
        alone = source.split == "position" and source.kind == "text"
        self.ends = (not alone or counts[0] > 1, not alone or counts[1] > 1)

    def named(self) -> str:
        names = self.source.names
        return str(self.source.root / names[0]) if len(names) == 1 else f"{self.source.root} ({len(names)} files)"

    def _dropped(self) -> str:
        dropped = self.dropped
        return (
            f" ({sum(dropped.values())} dropped: {', '.join(f'{n} {r}' for r, n in dropped.items())})"
            if dropped
            else ""
        )

    @property
    def dropped(self) -> dict[str, int]:
        """Rows left out because something is wrong with them, by reason."""
        return dict(collections.Counter(self.counts["dropped"]) + collections.Counter(self.counts.get("unusable", {})))

    def characters_of(self, split: str) -> int:
        code = next(c for c, s in SPLITS.items() if s == split)
        total = int(self.characters[self.fate == code].sum(dtype=np.int64))
        if self.cut is not None:
            at, within = self.cut
            total += within if code == TRAIN else int(self.characters[at]) - within
        return total

    @property
    def tokenizer(self) -> tok.Tokenizer | None:
        """The one that was made before the work was interrupted."""
        name = self.counts.get("tokenizer")
        return tok.load(self.journal.folder / name) if name else None

    def texts(self, split: str | None) -> Iterator[str]:
        """What a tokenizer is trained on: the texts of one split, or of all."""
        first = 0
        for unit in units(self.source):
            for i, entry in enumerate(unit.entries, first):
                fate = self.fate[i]
                if fate == DROP or (split is not None and SPLITS.get(fate, split) != split):
                    continue
                pieces = words(example_of(self.source, entry.content)) if entry.row else [entry.content]
                if fate == CUT and split is not None:
                    assert self.cut is not None
                    side = slice(self.cut[1]) if split == "train" else slice(self.cut[1], None)
                    pieces = [text[side] for text in pieces]
                yield from pieces
            first += len(unit.entries)

    # ------------------------------------------------------------ second pass

    def encode(self, tokenizer: tok.Tokenizer) -> None:
        """Up to the finished file."""
        journal, counts = self.journal, self.counts
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        folder = journal.folder / f"tokenizer_{tokenizer.sha256()[:16]}"
        folder.mkdir(exist_ok=True)
        for name, text in tokenizer.files().items():
            write(folder / name, text.encode())
        if counts.get("tokenizer") != folder.name:
            counts |= {"tokenizer": folder.name, "entry": 0, "characters": 0, "unusable": {}, "totals": {}}
            journal.restart("encode", keep=("characters", "final", "digests"))
        if journal.state["stage"] == "encode":
            total = int(self.characters[self.fate != DROP].sum(dtype=np.int64))
            for unit, (arrays, bad) in self.workers.map(encode_unit, self._calls(folder)):
                for i, error in bad:
                    self._bad(unit.entries[i], error, counts["unusable"])
                for name, pieces in arrays.items():
                    self._keep(name, np.concatenate(pieces), dtype)
                here = slice(counts["entry"], counts["entry"] + len(unit.entries))
                counts["entry"] = here.stop
                counts["characters"] += int(self.characters[here][self.fate[here] != DROP].sum(dtype=np.int64))
                journal.commit(unit.then)
                self.tell("encoding", counts["characters"], total)
            journal.commit(None, "encoded")
        journal.close()
        self._finish(tokenizer, dtype)

    def _calls(self, folder: Path) -> Iterator[tuple[Unit, tuple]]:
        first = self.counts["entry"]
        for unit in units(self.source, self.journal.place):
            here = slice(first, first + len(unit.entries))
            if here.stop > len(self.fate):
                raise self._changed()
            fate = self.fate[here]
            within = self.cut[1] if self.cut is not None and CUT in fate else 0
            yield unit, (self.source, folder, unit, Plan(fate, self.begins[here], within, self.ends))
            first = here.stop
        if first != len(self.fate) or self.stats != [_stat(self.source.root / n) for n in self.source.names]:
            raise self._changed()

    def _changed(self) -> Refusal:
        return Refusal(f"{self.named()} changed while it was read: start again")

    def _keep(self, name: str, array: np.ndarray, dtype: str) -> None:
        """Append what a unit gave. Lengths become ends, counted from the split's start; one of -n - 1 is of a document
        that goes on."""
        totals = self.counts["totals"]
        if name.endswith(("bytes", "characters")):
            totals[name] = totals.get(name, 0) + int(array.sum())
            return
        if name.endswith("ends"):
            closed = array >= 0
            ends = totals.get(name, 0) + np.cumsum(np.where(closed, array, -array - 1), dtype=np.int64)
            totals[name], array = int(ends[-1]), ends[closed]
        self.journal.append(name.replace("/", "."), array.astype(dtype) if name.endswith("tokens") else array)

    def _finish(self, tokenizer: tok.Tokenizer, dtype: str) -> None:
        journal = self.journal
        types = {name: dtype if t == "ids" else t for name, t in parts(self.source.kind).items()}
        tokens = {s: journal.read(f"{s}.tokens", dtype) for s in SPLITS.values()}
        if empty := [s for s in tokens if not len(tokens[s])]:
            raise Refusal(f"{self.named()}: the {empty[0]} split has no tokens{self._dropped()}")
        with store.Writer(self.target, {"etude": self._meta(tokenizer, tokens)}) as out:
            for split in tokens:
                for name, t in types.items():
                    n = len(journal.read(f"{split}.{name}", t))
                    for begin in range(0, n, SEGMENT):
                        file = journal.folder / f"{split}.{name}"
                        out.add_file(f"{split}/{name}", file, t, begin, min(SEGMENT, n - begin))
            for name, text in tokenizer.files().items():
                out.add(f"tokenizer/{name}", np.frombuffer(text.encode(), dtype=np.uint8))
        shutil.rmtree(journal.folder)

    def _meta(self, tokenizer: tok.Tokenizer, tokens: dict[str, np.ndarray]) -> dict[str, Any]:
        source, hashes = self.source, self.counts["sha256"]
        files = [{"name": n, "bytes": _stat(source.root / n)[0], "sha256": h} for n, h in zip(source.names, hashes)]
        meta: dict[str, Any] = {
            "format": FORMAT,
            "kind": source.kind,
            "source": str(source.root),
            "files": len(source.names),
            "sha256": _hash([[f["name"], f["sha256"]] for f in files]),
            "settings": source.settings(),
            "tokenizer_sha256": tokenizer.sha256(),
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
            "duplicates": self.counts["duplicates"],
            "dropped": self.dropped,
            "tokenizer_key": self.tokenizer_key,
            "sources": files,
        }
        for split in SPLITS.values():
            lengths = np.diff(self.journal.read(f"{split}.ends", "int64"), prepend=0)
            meta |= {
                f"{split}_tokens": len(tokens[split]),
                f"{split}_documents": len(lengths),
                f"{split}_characters": self.counts["totals"][f"{split}/characters"],
                f"{split}_lengths": {str(q): int(np.percentile(lengths, q)) for q in (0, 5, 50, 95, 100)},
            }
            if source.kind == "text":
                meta[f"{split}_bytes"] = self.counts["totals"][f"{split}/bytes"]
        if source.kind == "text":
            meta |= baseline(tokens["train"][:BASELINE], tokens["val"][: BASELINE // 10], tokenizer.vocab_size)
        return meta


def baseline(train: np.ndarray, val: np.ndarray, vocab_size: int) -> dict[str, float]:
    """{"bigram_loss": ...} where there is a pair of tokens in both."""
    loss = bigram_loss(np.asarray(train), np.asarray(val), vocab_size)
    return {"bigram_loss": loss} if np.isfinite(loss) else {}


def bigram_loss(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Nats a token of `val` under a bigram model of `train`, which backs off to the unigram model with the weight of one
    observation: what a model that looks one token back can do. NaN where there is no pair of tokens."""
    if len(train) < 2 or len(val) < 2:
        return float("nan")
    unigram = (np.bincount(train, minlength=vocab_size) + 1.0) / (len(train) + vocab_size)
    pair = lambda ids: ids[:-1].astype(np.int64) * vocab_size + ids[1:]  # noqa: E731
    keys, counts = np.unique(pair(train), return_counts=True)
    wanted = pair(val)
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    seen = np.where(keys[at] == wanted, counts[at], 0)
    before = np.bincount(train[:-1], minlength=vocab_size)[val[:-1]]
    return float(-np.log((seen + unigram[val[1:]]) / (before + 1.0)).mean())


# ---------------------------------------------------------------- the cache


def prepare(data: Any, maker: Any, cache_dir: str) -> list[Prepared]:
    """The documents of a data node's parts as ids, from the cache where it holds them. Raises Refusal for unusable data,
    StorageFault for an unusable cache."""
    cache = Path(cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two starts at once: the second waits and finds the work done
            return data.prepare(maker, cache)
    except OSError as error:
        raise StorageFault(
            f"{error.filename or cache}: {error.strerror or error}; the cache's place is set with cache_dir=FOLDER"
        ) from None


def cached(sources: list[Source], make: Make, tokenizer_key: str, cache: Path) -> list[Prepared]:
    """The sources' files in the cache, made by one tokenizer that is trained on all of them."""
    hashes = [known_hash(source, cache) for source in sources]
    every = _hash([FORMAT, tokenizer_key, [(h, s.settings()) for h, s in zip(hashes, sources)]])
    targets = [cache / "tokens" / f"{_hash([every, i])[:24]}.h5" for i in range(len(sources))]
    if not all(t.exists() for t in targets):
        (cache / "tokens").mkdir(parents=True, exist_ok=True)
        with Workers(1) as workers, contextlib.ExitStack() as stack:
            whole = [Preparation(s, t, workers, tokenizer_key) for s, t in zip(sources, targets)]
            for preparation in whole:
                stack.callback(preparation.journal.close)
            for preparation in whole:
                preparation.scan()
            tokenizer = make(Texts(whole, "train"), Texts(whole, None))
            for preparation in whole:
                preparation.encode(tokenizer)
    return [open_prepared(t) for t in targets]


class Texts:
    """The texts of preparations, read anew by each iteration."""

    def __init__(self, whole: list[Preparation], split: str | None):
        self.whole, self.split = whole, split

    def __iter__(self) -> Iterator[str]:
        for preparation in self.whole:
            yield from preparation.texts(self.split)


def together(parts: dict[str, Prepared]) -> dict[str, Any]:
    """What is known of the parts of a mixture as one; of a single part, its own."""
    metas = {name: p.meta for name, p in parts.items()}
    first = next(iter(metas.values()))
    if len(metas) == 1:
        return first
    kinds = {m["kind"] for m in metas.values()}
    keys = ("tokenizer_sha256", "vocab_size", "eos")
    whole = {k: first[k] for k in keys} | {"kind": kinds.pop() if len(kinds) == 1 else "text", "parts": metas}
    whole["source"] = ", ".join(f"{name} ({m['source']})" for name, m in metas.items())
    whole["sha256"] = _hash([[name, m["sha256"]] for name, m in metas.items()])
    for key in ("files", "train_tokens", "val_tokens", "train_bytes", "val_bytes"):
        if all(key in m for m in metas.values()):
            whole[key] = sum(m[key] for m in metas.values())
    return whole


def known_hash(source: Source, cache: Path) -> str:
    """content_hash, remembered as long as the files' sizes and times stay."""
    stats = [(n, *_stat(source.root / n)) for n in source.names]
    known = cache / "fingerprints" / f"{_hash([FORMAT, str(source.root.resolve()), stats])}.txt"
    if not known.exists():
        known.parent.mkdir(parents=True, exist_ok=True)
        write(known, content_hash(source).encode())
    return known.read_text()


def content_hash(source: Source) -> str:
    """Of the files' names and bytes."""
    return _hash([[n, file_hash(source.root / n)] for n in source.names])


def file_hash(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _stat(path: Path) -> tuple[int, int, int]:
    s = path.stat()
    return s.st_size, s.st_mtime_ns, s.st_ino


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=list).encode()).hexdigest()


def write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
