"""Text corpora: files -> a split by position -> token ids in memory-mapped files -> windows.

`prepare` reads, hashes and encodes once and leaves the ids in the cache, keyed by the data's and the tokenizer's
hashes; later starts only look at the files' sizes and times. It does not import torch: bad input is told at once."""

import dataclasses
import fcntl
import glob
import hashlib
import http.client
import json
import os
import shutil
import sysconfig
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from etude.errors import Refusal, StorageFault
from etude.text import tokenizer as tok

FORMAT = 1  # of the cache; another number makes everything anew
PIECE = 1 << 22  # characters that are encoded at once; longer documents are cut at a line's end


@dataclasses.dataclass(kw_only=True)
class TextData:
    """A corpus and how windows are cut from it; its subclasses say which files it is made of.

    `val_fraction` of the characters, the last ones, are the validation split. A sample is seq_len + 1 tokens: inputs
    and, shifted by one, targets. See conf/data for the other settings."""

    val_fraction: float
    seq_len: int
    order: Literal["random", "shuffle", "sequential"]
    stride: int | None
    drop_last: bool
    isolate_documents: bool
    workers: int
    prefetch: int

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise Refusal(f"data.val_fraction={self.val_fraction} should lie between 0 and 1")
        if self.seq_len < 1 or (self.stride is not None and self.stride < 1):
            raise Refusal(f"data.seq_len={self.seq_len} and data.stride={self.stride} should be at least 1")
        if self.workers < 0 or self.prefetch < 1:
            raise Refusal(
                f"data.workers={self.workers} should be 0 or more and data.prefetch={self.prefetch} at least 1"
            )

    @property
    def step_between(self) -> int:
        return self.stride or (1 if self.order == "random" else self.seq_len)

    def files(self, cache: Path) -> tuple[Path, list[str]]:
        """The folder of the corpus and its files' names in it, in order."""
        raise NotImplementedError


class Stdlib(TextData):
    """The installed Python's standard library, without tests, vendored packages and generated tables."""

    def files(self, cache: Path) -> tuple[Path, list[str]]:
        root = Path(sysconfig.get_path("stdlib"))
        left_out = {
            "test",
            "tests",
            "idle_test",
            "site-packages",
            "dist-packages",
            "_vendor",
            "_bundled",
            "__pycache__",
        }
        names = [
            p.relative_to(root).as_posix()
            for p in root.rglob("*.py")
            if not left_out & set(p.relative_to(root).parts)
            and not p.name.startswith("_sysconfigdata")
            and p.stat().st_size
        ]
        if not names:
            raise Refusal(f"no standard library source under {root}; use data=text data.path=<file, folder or glob>")
        return root, sorted(names)


@dataclasses.dataclass(kw_only=True)
class Shakespeare(TextData):
    """Tiny Shakespeare (Karpathy 2015). `path` null: downloaded once into the cache, its checksum verified."""

    path: str | None

    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

    def files(self, cache: Path) -> tuple[Path, list[str]]:
        if self.path is not None:
            return _one_file(self.path)
        target = cache / "downloads" / "tinyshakespeare.txt"
        if not target.exists():
            try:
                with urllib.request.urlopen(self.url, timeout=10) as response:
                    text = response.read()
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                raise Refusal(
                    f"could not download tiny Shakespeare ({getattr(error, 'reason', error)}): connect to the network, or give a copy "
                    f"with data.path=FILE (from {self.url})"
                ) from None
            if (got := hashlib.sha256(text).hexdigest()) != self.sha256:
                raise Refusal(
                    f"the download of tiny Shakespeare has sha256 {got} instead of {self.sha256}; give a good copy with data.path=FILE"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, text)
        return target.parent, [target.name]


@dataclasses.dataclass(kw_only=True)
class Text(TextData):
    """The user's text: a file, a folder (every file in it that is UTF-8 text, hidden ones left out) or a glob."""

    path: str

    def files(self, cache: Path) -> tuple[Path, list[str]]:
        path = Path(self.path).expanduser()
        if path.is_dir():
            found = [
                p
                for p in path.rglob("*")
                if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
            ]
            names = [p.relative_to(path).as_posix() for p in found if p.stat().st_size and _looks_like_text(p)]
            if not names:
                raise Refusal(f"data.path={self.path} is a folder without text files")
            return path, sorted(names)
        if glob.has_magic(self.path) and not path.exists():
            names = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
            if not names:
                raise Refusal(f"data.path={self.path} matches no file")
            return Path(), names
        return _one_file(self.path)


def _one_file(name: str) -> tuple[Path, list[str]]:
    path = Path(name).expanduser()
    if not path.exists():
        raise Refusal(f"data.path={name} does not exist (looked in {Path.cwd()}); give the path of a text file")
    if not path.is_file():
        raise Refusal(f"data.path={name} is not a file")
    if not path.stat().st_size:
        raise Refusal(f"data.path={name} is empty")
    return path.parent, [path.name]


def _looks_like_text(path: Path) -> bool:
    with path.open("rb") as f:
        return b"\0" not in f.read(4096)


# ---------------------------------------------------------------- from files to ids


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Where the ids lie and what is known of them; small enough to hand to another process."""

    folder: Path
    meta: dict[str, Any]

    @property
    def tokenizer(self) -> tok.Tokenizer:
        return tok.load(self.folder)

    def ids(self, split: str) -> np.ndarray:
        """The memory-mapped ids of "train" or "val"."""
        return np.memmap(self.folder / f"{split}.bin", dtype=self.meta["dtype"], mode="r")


def prepare(
    data: TextData, make_tokenizer: Callable[..., tok.Tokenizer], tokenizer_key: str, cache_dir: str
) -> Prepared:
    """The corpus as ids, from the cache where it holds them. `make_tokenizer(train, corpus)` is called only when it does
    not; `tokenizer_key` must tell apart tokenizers that differ. Raises Refusal for unusable data, StorageFault for an
    unusable cache."""
    cache = Path(cache_dir).expanduser()
    root, names = data.files(cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two starts at once: the second waits and finds the work done
            prepared = _prepare(data, make_tokenizer, tokenizer_key, cache, root, names)
    except OSError as error:
        raise StorageFault(
            f"{error.filename or cache}: {error.strerror}; the cache's place is set with cache_dir=FOLDER"
        ) from None
    for split in ("train", "val"):
        if (n := prepared.meta[f"{split}_tokens"]) <= data.seq_len:
            raise Refusal(
                f"the {split} split has {n} tokens and a sample needs {data.seq_len + 1}: lower data.seq_len or bring more text"
            )
    if data.isolate_documents and prepared.meta["eos"] is None:
        raise Refusal(
            "data.isolate_documents=true needs a tokenizer with an end token: use tokenizer=bpe or tokenizer=byte"
        )
    return prepared


def _prepare(
    data: TextData,
    make_tokenizer: Callable[..., tok.Tokenizer],
    tokenizer_key: str,
    cache: Path,
    root: Path,
    names: list[str],
) -> Prepared:
    texts: list[str] | None = None
    stat_key = _hash([FORMAT, str(root.resolve()), [(n, *_stat(root / n)) for n in names]])
    known = cache / "fingerprints" / f"{stat_key}.txt"
    if known.exists():
        sha = known.read_text()
    else:
        texts = _read(root, names)
        sha = _hash([FORMAT, *zip(names, texts)])
        known.parent.mkdir(exist_ok=True)
        _write(known, sha.encode())
    folder = cache / "tokens" / _hash([FORMAT, sha, tokenizer_key, data.val_fraction])[:24]
    if not (folder / "meta.json").exists():
        texts = texts if texts is not None else _read(root, names)
        _encode(data, make_tokenizer, texts, sha, str(root), names, folder)
    return Prepared(folder, json.loads((folder / "meta.json").read_text()))


def _encode(
    data: TextData,
    make_tokenizer: Callable[..., tok.Tokenizer],
    texts: list[str],
    sha: str,
    source: str,
    names: list[str],
    folder: Path,
) -> None:
    train, val = _split(texts, data.val_fraction)
    tokenizer = make_tokenizer(train, texts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    building = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        meta: dict[str, Any] = {
            "source": source,
            "files": len(names),
            "sha256": sha,
            "tokenizer_sha256": tokenizer.sha256(),
            "dtype": dtype,
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
            "val_fraction": data.val_fraction,
        }
        for split, documents in (("train", train), ("val", val)):
            meta[f"{split}_tokens"] = _write_ids(tokenizer, documents, building / f"{split}.bin", dtype)
            meta[f"{split}_bytes"] = sum(len(t.encode()) for t in documents)
        ids = {s: np.fromfile(building / f"{s}.bin", dtype=dtype) for s in ("train", "val")}
        meta["bigram_loss"] = bigram_loss(ids["train"], ids["val"], tokenizer.vocab_size)
        for name, text in tokenizer.files().items():
            (building / name).write_text(text, encoding="utf-8")
        (building / "meta.json").write_text(json.dumps(meta, indent=1))
        os.rename(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_ids(tokenizer: tok.Tokenizer, documents: list[str], path: Path, dtype: str) -> int:
    """Documents' ids one after another, an end token behind each where there are several; -> how many."""
    between = (
        np.array([tokenizer.eos], dtype=dtype)
        if tokenizer.eos is not None and len(documents) > 1
        else np.empty(0, dtype=dtype)
    )
    total = 0
    with path.open("wb") as out:
        for document in documents:
            tokenizer.check(document, "the corpus")
            for ids in tokenizer.encode_many(_pieces(document)):
                ids.astype(dtype).tofile(out)
                total += len(ids)
            between.tofile(out)
            total += len(between)
    return total


def _pieces(text: str) -> list[str]:
    """Parts of at most about PIECE characters that end with a line where possible: one call's memory stays bounded."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        end = text.rfind("\n", start + 1, start + PIECE) + 1 or start + PIECE
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _split(texts: Sequence[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """The first and the last characters of the corpus, cut at one position: nanoGPT's split for a single text."""
    cut = int(sum(map(len, texts)) * (1 - val_fraction))
    train, val = [], []
    for text in texts:
        train.append(text[: max(cut, 0)])
        val.append(text[max(cut, 0) :])
        cut -= len(text)
    return [t for t in train if t], [t for t in val if t]


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


def _read(root: Path, names: list[str]) -> list[str]:
    texts = []
    for name in names:
        raw = (root / name).read_bytes()
        try:
            texts.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise Refusal(
                f"{root / name} is not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}; convert it or leave it out"
            ) from None
    return texts


def _stat(path: Path) -> tuple[int, int, int]:
    s = path.stat()
    return s.st_size, s.st_mtime_ns, s.st_ino


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
