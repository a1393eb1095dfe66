"""From sources to one HDF5 file of token ids, in two passes over the files, each of which can be killed and gone on with.

The first reads and checks every row, and keeps a hash and a length of each document: they decide which documents are
validation and which stand there twice. Then a tokenizer is made, of training text alone. The second pass encodes. What
worker processes return is written in the order of the files, so the result is the same for any number of them, and only
a few units of about 2 MB are in memory at once (and 21 bytes a document)."""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from etude.data import store
from etude.data.encode import words
from etude.data.formats import BadRow
from etude.data.journal import Journal, Workers
from etude.data.source import Entry, Source, Unit, kind_of, units
from etude.data.work import (
    CUT,
    DROP,
    SPLITS,
    TRAIN,
    VAL,
    Plan,
    chained,
    encode_unit,
    example_of,
    parts,
    scan_unit,
    without_data,
)
from etude.errors import Refusal, StorageFault
from etude.text import tokenizer as tok

FORMAT = 2  # of the file; another number makes everything anew
SEGMENT = 1 << 26  # elements
BASELINE = 5_000_000  # training tokens that the bigram model counts at most

Make = Callable[[Iterable[str], Iterable[str]], tok.Tokenizer]


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


# ---------------------------------------------------------------- the two passes


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
        if source.split != "position":
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
                f"change {key}val_fraction{f' or set {key}split=position' if source.split != 'position' else ''}, or bring more documents"
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
