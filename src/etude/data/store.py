"""Arrays on disk (token ids, masks, ends, bytes) behind one interface: each named by a key, in one or more segments.

An H5 file has a group for a key ("val", or "train/tokens": a group in a group) and in it a data set for each segment:
00000, 00001, ... Root attributes are JSON texts, but for `complete`, written last, and `sha256`, of the others. Data sets
carry the `sha256` of their elements. The arrays of files written here lie as plain bytes at one place each, so that they
can be memory-mapped.

libhdf5 (2.0) trusts what it reads: in files of its oldest format, which h5py still writes unless told otherwise, one
flipped bit in a thousand ended the process, and a tenth gave other elements without an error; texts of variable length
made it hang. So only files are read whose structure has checksums throughout: superblock 2, as written here, and 3 for
chunks (libver="latest"), without such texts. Random damage is then found before anything is done with it. A file made
to harm, with right checksums, can still crash libhdf5."""

import bisect
import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, overload

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5s, h5t, h5z

from etude.errors import Refusal, StorageFault

if TYPE_CHECKING:
    import torch

TYPES = {n: np.dtype(n).newbyteorder("<") for n in ("uint8", "bool", "uint16", "uint32", "int32", "int64", "float32")}
_NATIVE = [(dtype, h5t.py_create(dtype, logical=True)) for dtype in TYPES.values()]

MAX_OBJECTS = 100_000
MAX_ATTRIBUTES = 1 << 28  # bytes, all together
MAX_CHUNK = 1 << 26  # bytes
MAX_CHUNKS = 1_000_000  # of one data set: they are all looked at when a file is opened
# The best that gzip can do: a file whose data sets would be larger than this times what it stores is lying.
MAX_RATIO = 1032
FILTERS = {
    h5z.FILTER_DEFLATE: "gzip",
    h5z.FILTER_LZF: "lzf",
    h5z.FILTER_SHUFFLE: "shuffle",
    h5z.FILTER_FLETCHER32: "fletcher32",
}
# HDF5 does not cache a chunk that is larger than the cache, and would inflate it anew for every window read from it.
# So the cache holds the largest chunk there may be; and few data sets with a cache are open at a time.
CHUNK_CACHE = MAX_CHUNK
CHUNK_SLOTS = 10_007  # a prime: chunks whose numbers are equal modulo this push each other out
OPEN_CHUNKED = 8
BLOCK = 1 << 23  # bytes copied or hashed at a time
RESERVED = {"complete", "sha256"}

MEND = "bring a whole copy of it, or run the command that made it again"
RENEW = 'write it anew with etude.data.store.save_h5, or with h5py.File(..., libver="latest")'
SIGNATURE = b"\x89HDF\r\n\x1a\n"


# ---------------------------------------------------------------- reading


class Chunked:
    """One segment that lies in chunks, perhaps compressed: read by h5py into a new array."""

    def __init__(self, file: "_File", name: str, dtype: np.dtype, length: int):
        self.file, self.name, self.dtype, self.length = file, name, dtype, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, at: slice) -> np.ndarray:
        begin, end, _ = at.indices(self.length)
        out = np.empty(max(end - begin, 0), dtype=self.dtype)
        if len(out):
            self.file.read(self.name, begin, out)
        out.setflags(write=False)
        return out


Segment = np.ndarray | Chunked


class Store:
    """Arrays by key and segment. A kind of store says how it opens; it does so again in every process that uses it, so
    that it can be pickled and carried through a fork."""

    _opened: tuple[int, dict[str, list[Segment]]] | None = None

    def _open(self) -> dict[str, list[Segment]]:
        raise NotImplementedError

    def segments(self) -> dict[str, list[Segment]]:
        """Of each key the segments, which have a length, a dtype and slices that are read-only arrays."""
        opened, pid = self._opened, os.getpid()
        if opened is None or opened[0] != pid:
            self._opened = opened = (pid, self._open())
        return opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    @property
    def attributes(self) -> dict[str, Any]:
        return {}

    @property
    def keys(self) -> list[str]:
        return list(self.segments())

    def __getitem__(self, key: str) -> list[Segment]:
        """Raises ValueError for a key that is not there."""
        segments = self.segments()
        if key not in segments:
            raise ValueError(f"there is no key {key!r}; there are: {', '.join(map(repr, segments)) or 'none'}")
        return segments[key]

    def lengths(self, key: str) -> list[int]:
        """The number of elements of each segment."""
        return [len(s) for s in self[key]]

    @overload
    def fetch(self, key: str, segment: int, begin: int, end: int) -> np.ndarray: ...
    @overload
    def fetch(self, key: list[str], segment: int, begin: int, end: int) -> dict[str, np.ndarray]: ...
    def fetch(self, key: str | list[str], segment: int, begin: int, end: int) -> np.ndarray | dict[str, np.ndarray]:
        """Elements begin to end of a segment of one key, or of each of several, read-only. Raises ValueError for an
        unknown key, IndexError for a place that is not there."""
        if not isinstance(key, str):
            return {k: self.fetch(k, segment, begin, end) for k in key}
        segments = self[key]
        if not 0 <= segment < len(segments):
            raise IndexError(f"{key!r} has {len(segments)} segments and none with number {segment}")
        if not 0 <= begin <= end <= len(segments[segment]):
            raise IndexError(f"{key!r}, segment {segment}, has {len(segments[segment])} elements: no [{begin}, {end})")
        return segments[segment][begin:end]


class Memory(Store):
    """The interface over arrays at hand. Raises ValueError for one that is not one-dimensional."""

    def __init__(self, arrays: Mapping[str, Sequence[np.ndarray]]):
        self.arrays = {key: [np.asarray(a) for a in several] for key, several in arrays.items()}
        for key, several in self.arrays.items():
            if wrong := [a.shape for a in several if a.ndim != 1]:
                raise ValueError(f"{key!r} has a segment of shape {wrong[0]}; segments have one dimension")

    def _open(self) -> dict[str, list[Segment]]:
        return {key: [_frozen(a) for a in several] for key, several in self.arrays.items()}


class Bin(Store):
    """Flat files of ids as nanoGPT writes them, one segment each, memory-mapped. Raises Refusal for one that is not."""

    def __init__(self, paths: Mapping[str, str | Path], dtype: str = "uint16"):
        if dtype not in ("uint16", "uint32"):
            raise Refusal(f"flat files of token ids have dtype uint16 or uint32, not {dtype}")
        self.paths = {key: Path(path).expanduser() for key, path in paths.items()}
        self.dtype = TYPES[dtype]
        for path in self.paths.values():
            size = _size(path)
            if not size or size % self.dtype.itemsize:
                raise Refusal(
                    f"{path} has {size} bytes, which is no whole number of {dtype} ids: bring a whole copy of it, or set the dtype with which it was written"
                )

    def _open(self) -> dict[str, list[Segment]]:
        found: dict[str, list[Segment]] = {}
        for key, path in self.paths.items():
            with _reading(path), path.open("rb") as file:
                found[key] = [np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=self.dtype)]
        return found


class H5(Store):
    """An HDF5 file in the layout above. It is checked when it is first read from, without reading its arrays. Raises
    Refusal for anything unusual: what reads files of others' is not to be led to other files, nor into huge memory."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self._attributes: dict[str, Any] = {}
        self._seen: tuple[int, int] | None = None  # size and time of change when it was first opened

    def _open(self) -> dict[str, list[Segment]]:
        file = _File(self.path)
        if self._seen is not None and self._seen != file.seen:
            raise Refusal(f"{self.path} is another file than when it was opened first: start again")
        self._attributes, self._seen = file.attributes, file.seen
        return file.segments()

    @property
    def attributes(self) -> dict[str, Any]:
        """The root attributes."""
        self.segments()
        return self._attributes


@dataclasses.dataclass(frozen=True)
class _Array:
    """One data set. `offset` is its first byte in the file, None where h5py must read it."""

    name: str
    dtype: np.dtype
    length: int
    offset: int | None


class _File:
    """An HDF5 file that was looked through. Raises Refusal naming the file, the place and what is wrong there."""

    def __init__(self, path: Path):
        self.path = path
        if not _size(path):
            raise Refusal(f"{path} is empty: {MEND}")
        self.superblock = _superblock(path)
        with self.damage():
            self.h5 = h5py.File(path, "r", locking=False, rdcc_nbytes=CHUNK_CACHE, rdcc_nslots=CHUNK_SLOTS)
            self.fd: int = self.h5.id.get_vfd_handle()
            status = os.fstat(self.fd)
            self.size, self.seen = status.st_size, (status.st_size, status.st_mtime_ns)
            mark = self._attribute("/", "complete")
            if not (isinstance(mark, np.ndarray) and mark.shape == () and mark):
                raise Refusal(f"{path} was not finished: run the command that made it again")
            self.arrays = self._look()
            self.attributes = self._attributes()
        self.open: collections.OrderedDict[str, h5py.Dataset] = collections.OrderedDict()

    @contextlib.contextmanager
    def damage(self, name: str = "") -> Iterator[None]:
        """What h5py raises for a damaged file becomes a Refusal: it may be any kind of exception."""
        where = f"{self.path}, {name!r}," if name else f"{self.path}"
        try:
            yield
        except Refusal:
            raise
        except Exception as error:
            why = " ".join(str(error).split())
            if "truncated file" in why:
                raise Refusal(f"{where} is cut short: {MEND}") from None
            raise Refusal(f"{where} is damaged ({_short(why) or type(error).__name__}): {MEND}") from None

    def _refuse(self, name: str, why: str, remedy: str = "write it anew with etude.data.store.save_h5") -> Refusal:
        return Refusal(f"{self.path}, {_short(ascii(name))}: {why}; {remedy}")

    # -------- what is in it

    def _look(self) -> dict[str, list[_Array]]:
        """Every data set, checked. Only what hangs on hard links is followed, and no deeper than two groups."""
        self.objects = 0
        arrays: dict[str, list[_Array]] = {}
        for key, group in self._children(self.h5.id, ""):
            if not isinstance(group, h5g.GroupID):
                raise self._refuse(key, "a data set lies outside a group: data sets lie in the group of their key")
            children = list(self._children(group, key))
            if any(isinstance(child, h5g.GroupID) for _, child in children):
                for name, child in children:
                    if not isinstance(child, h5g.GroupID):
                        raise self._refuse(name, "a data set lies beside groups: it needs a key of its own")
                    arrays[name] = self._segments(name, list(self._children(child, name)))
            else:
                arrays[key] = self._segments(key, children)
        return arrays

    def _children(self, group: Any, name: str) -> Iterator[tuple[str, Any]]:
        """(name from the root, identifier) of each object in a group. One at a time is open."""
        self.objects += group.get_num_objs()
        if self.objects > MAX_OBJECTS:
            raise self._refuse(name or "/", f"it has more than {MAX_OBJECTS:,} data sets and groups")
        links: list[tuple[bytes, int]] = []
        group.links.iterate(lambda link, info: links.append((link, info.type)), info=True)
        for link, kind in sorted(links):
            child = f"{name}/{_decoded(link)}".lstrip("/")
            if kind != h5l.TYPE_HARD:
                raise self._refuse(child, "it is a link that leads elsewhere, perhaps to another file of this machine")
            with self.damage(child):
                found = h5o.open(group, link)
                if not isinstance(found, (h5g.GroupID, h5d.DatasetID)):
                    raise self._refuse(child, "it is neither a group nor a data set")
                info = h5o.get_info(found)
                if info.rc != 1:
                    raise self._refuse(child, "several links lead to it")
                if info.hdr.version < 2:
                    raise self._refuse(child, "its structure has no checksums", RENEW)
            yield child, found

    def _segments(self, key: str, children: list[tuple[str, Any]]) -> list[_Array]:
        arrays = []
        for i, (name, child) in enumerate(children):
            if name != f"{key}/{i:05d}":
                raise self._refuse(
                    name, f"data set {i:05d} was expected here: a segment is missing or has another name"
                )
            if not isinstance(child, h5d.DatasetID):
                raise self._refuse(name, "groups lie too deep: a key has one slash at most")
            with self.damage(name):
                arrays.append(self._array(name, child))
        return arrays

    def _array(self, name: str, dataset: Any) -> _Array:
        plan = dataset.get_create_plist()
        layout = plan.get_layout()
        # Before anything else is asked: the extent of a virtual data set is looked up in the files that it names.
        if layout == h5d.VIRTUAL:
            raise self._refuse(name, "it is a virtual data set, whose elements lie in other files")
        if plan.get_external_count():
            raise self._refuse(name, "its elements lie in another file")
        filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
        if unknown := [f for f in filters if f not in FILTERS]:
            raise self._refuse(name, f"it needs HDF5's filter {unknown[0]}; {', '.join(FILTERS.values())} can be read")
        if len(set(filters)) < len(filters):
            raise self._refuse(name, "it is compressed more than once")
        kind = dataset.get_type()
        dtype = next((d for d, native in _NATIVE if kind.equal(native)), None)
        if dtype is None:
            raise self._refuse(name, f"its elements are {_kind(kind)}; {', '.join(TYPES)} can be read")
        space = dataset.get_space()
        if space.get_simple_extent_type() != h5s.SIMPLE or space.get_simple_extent_ndims() != 1:
            raise self._refuse(name, "it does not have one dimension")
        length = int(space.get_simple_extent_dims()[0])
        size = length * dtype.itemsize
        if not length:
            return _Array(name, dtype, 0, 0)
        if layout == h5d.CHUNKED:
            self._check_chunks(name, dataset, plan.get_chunk()[0], size, bool(filters))
            return _Array(name, dtype, length, None)
        if dataset.get_storage_size() < size or (layout == h5d.CONTIGUOUS and dataset.get_offset() is None):
            raise self._refuse(name, f"the {size:,} bytes of its {length:,} elements were never written", MEND)
        if layout != h5d.CONTIGUOUS:
            return _Array(name, dtype, length, None)
        offset = int(dataset.get_offset())
        if offset + size > self.size:
            raise self._refuse(name, f"its {length:,} elements would end beyond the file's {self.size:,} bytes", MEND)
        return _Array(name, dtype, length, offset)

    def _check_chunks(self, name: str, dataset: Any, chunk: int, size: int, filtered: bool) -> None:
        """Every chunk is there, and can be what it says."""
        if self.superblock < 3:
            raise self._refuse(name, "the list of its chunks has no checksums", RENEW)
        chunk_size = chunk * dataset.dtype.itemsize
        wanted = -(-size // chunk_size)
        if chunk_size > MAX_CHUNK:
            raise self._refuse(name, f"its chunks have {chunk_size:,} bytes and {MAX_CHUNK:,} is the most")
        if dataset.get_storage_size() * MAX_RATIO < size:
            raise self._refuse(
                name, f"what is stored of it cannot be {size:,} bytes: it was never written, or is not true", MEND
            )
        if wanted > MAX_CHUNKS:
            raise self._refuse(name, f"it has {wanted:,} chunks and {MAX_CHUNKS:,} is the most")
        # A filter that cannot make a chunk smaller makes it larger by a thousandth at most, or leaves it as it is.
        most = chunk_size + chunk_size // 1000 + 64 if filtered else chunk_size
        found, wrong = 0, 0

        def look(info: Any) -> None:
            nonlocal found, wrong
            found += 1
            wrong += info.size > most or (not filtered and info.size < chunk_size)
            wrong += info.byte_offset is None or info.byte_offset + info.size > self.size

        dataset.chunk_iter(look)
        if wrong or found > wanted:
            raise self._refuse(name, f"{wrong or found - wanted:,} of its chunks cannot be true", MEND)
        if found < wanted:
            raise self._refuse(name, f"{wanted - found:,} of its {wanted:,} chunks were never written", MEND)

    # -------- attributes

    def _attribute(self, name: str, attribute: str) -> bytes | np.ndarray | None:
        """An attribute of an object: text or numbers, None if there is none."""
        attributes = self.h5[name].attrs
        if attribute not in attributes:
            return None
        stored = attributes.get_id(attribute)
        kind = stored.get_type()
        if kind.get_class() == h5t.STRING and kind.is_variable_str():
            raise self._refuse(f"{name}@{attribute}", "this text has no fixed length, and so no checksum")
        if kind.get_class() not in (h5t.STRING, h5t.INTEGER, h5t.FLOAT, h5t.ENUM):
            raise self._refuse(f"{name}@{attribute}", "this attribute is neither text nor numbers")
        if stored.get_storage_size() > MAX_ATTRIBUTES:
            raise self._refuse(f"{name}@{attribute}", f"it has more than {MAX_ATTRIBUTES:,} bytes")
        value = attributes[attribute]
        return bytes(value) if isinstance(value, bytes) else np.asarray(value)

    def _attributes(self) -> dict[str, Any]:
        """The root attributes but the two of the file itself. Raises Refusal if their checksum says that they changed."""
        found: dict[str, Any] = {}
        room = MAX_ATTRIBUTES
        for name in self.h5.attrs:
            room -= self.h5.attrs.get_id(name).get_storage_size()
            if room < 0:
                raise self._refuse("/", f"its attributes have more than {MAX_ATTRIBUTES:,} bytes")
            if name in RESERVED:
                continue
            value = self._attribute("/", name)
            found[name] = (
                json.loads(value) if isinstance(value, bytes) else value.tolist() if value is not None else None
            )
        known = self.sha256("/")
        if known is not None and known != _attributes_sha256(found):
            raise self._refuse("/", "its attributes have another sha256 than when they were written", MEND)
        return found

    def sha256(self, name: str) -> str | None:
        """The attribute sha256 of an object, None if it has none."""
        value = self._attribute(name, "sha256")
        return value.decode("ascii") if isinstance(value, bytes) else None

    # -------- elements

    def segments(self) -> dict[str, list[Segment]]:
        """Views of one memory map, and Chunked for what cannot be mapped."""
        with _reading(self.path):
            whole = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
        found: dict[str, list[Segment]] = {}
        for key, arrays in self.arrays.items():
            found[key] = [
                Chunked(self, a.name, a.dtype, a.length)
                if a.offset is None
                else np.frombuffer(whole, dtype=a.dtype, count=a.length, offset=a.offset)
                for a in arrays
            ]
        return found

    def read(self, name: str, begin: int, out: np.ndarray) -> None:
        """Elements from `begin` on of a data set that is not mapped, into `out`."""
        with self.damage(name):
            if name not in self.open:
                if len(self.open) >= OPEN_CHUNKED:
                    self.open.popitem(last=False)
                self.open[name] = self.h5[name]
            self.open.move_to_end(name)
            self.open[name].read_direct(out, np.s_[begin : begin + len(out)])

    def blocks(self, array: _Array) -> Iterator[np.ndarray]:
        """The elements of a data set piece by piece, read and not mapped. A piece is lost when the next one is asked for."""
        buffer = np.empty(min(BLOCK // array.dtype.itemsize, array.length), dtype=array.dtype)
        for begin in range(0, array.length, max(len(buffer), 1)):
            block = buffer[: array.length - begin]
            if array.offset is None:
                self.read(array.name, begin, block)
            else:
                with _reading(self.path):
                    _read_at(self.fd, block, array.offset + begin * array.dtype.itemsize)
            yield block


def verify(path: str | Path) -> None:
    """Compare every data set, and the attributes, with their checksums. Raises Refusal naming the first that is damaged
    or has none."""
    file = _File(Path(path).expanduser())
    if file.sha256("/") is None:
        raise file._refuse("/", "it has no sha256 by which its attributes could be verified")
    for array in (a for arrays in file.arrays.values() for a in arrays):
        with file.damage(array.name):
            known = file.sha256(array.name)
        if known is None:
            raise file._refuse(array.name, "it has no sha256 by which it could be verified")
        digest = hashlib.sha256()
        for block in file.blocks(array):
            digest.update(block.data)
        if digest.hexdigest() != known:
            raise file._refuse(array.name, "it is damaged: it has another sha256 than when it was written", MEND)


def load_h5(path: str | Path, share_memory: bool = False) -> "dict[str, list[torch.Tensor]]":
    """Every segment as a tensor of its own; with `share_memory` in shared memory, so that the loader's workers and other
    processes that are handed the tensors have no copies. Raises Refusal."""
    import torch

    file = _File(Path(path).expanduser())
    total = sum(a.length * a.dtype.itemsize for arrays in file.arrays.values() for a in arrays)
    _check_room(total, Path("/dev/shm") if share_memory else None, file.path)
    found: dict[str, list[torch.Tensor]] = {}
    for key, arrays in file.arrays.items():
        found[key] = []
        for array in arrays:
            tensor = torch.empty(array.length, dtype=getattr(torch, array.dtype.name))
            if share_memory:
                tensor.share_memory_()
            out, at = tensor.numpy(), 0
            for block in file.blocks(array):
                out[at : at + len(block)] = block
                at += len(block)
            found[key].append(tensor)
    return found


class Flat:
    """All segments of a key as one array. Raises ValueError for a key with none, or with several types."""

    def __init__(self, store: Store, key: str):
        self.store, self.key = store, key
        segments = store[key]
        if len(dtypes := {s.dtype for s in segments}) != 1:
            raise ValueError(
                f"{key!r} has segments of {len(dtypes)} types: {', '.join(sorted(map(str, dtypes))) or 'it is empty'}"
            )
        self.dtype = dtypes.pop()
        self._cached: tuple[int, list[Segment]] | None = None
        lengths = [n for n in store.lengths(key) if n]
        self._starts = [0, *np.cumsum(lengths, dtype=np.int64).tolist()][: max(len(lengths), 1)]
        self._length = sum(lengths)

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": None}

    def _segments(self) -> list[Segment]:
        """Those with elements, of this process; one if there are none."""
        pid = os.getpid()
        if self._cached is None or self._cached[0] != pid:
            segments = self.store[self.key]
            self._cached = (pid, [s for s in segments if len(s)] or segments[:1])
        return self._cached[1]

    def read(self, begin: int, end: int) -> np.ndarray:
        """Elements begin to end, read-only: a view where they lie in one mapped segment. Raises IndexError."""
        if not 0 <= begin <= end <= self._length:
            raise IndexError(f"{self.key!r} has {self._length} elements: no [{begin}, {end})")
        segments = self._segments()
        if len(segments) == 1:
            return segments[0][begin:end]
        first = bisect.bisect_right(self._starts, begin) - 1
        start = self._starts[first]
        if end - start <= len(segments[first]):
            return segments[first][begin - start : end - start]
        pieces = []
        for segment, start in zip(segments[first:], self._starts[first:]):
            if start >= end:
                break
            pieces.append(segment[max(begin - start, 0) : end - start])
        return _frozen(np.concatenate(pieces))

    def __getitem__(self, at: slice) -> np.ndarray:
        if not isinstance(at, slice) or at.step not in (None, 1):
            raise TypeError(f"{self.key!r} is read by slices [begin:end], not by {at!r}")
        begin, end, _ = at.indices(self._length)
        return self.read(begin, max(begin, end))

    def read_many(self, begins: np.ndarray | Sequence[int], length: int) -> np.ndarray:
        """begins (n,) -> the windows of `length` elements from each on, (n, length), a copy. Raises IndexError."""
        at = np.asarray(begins, dtype=np.int64)
        if not at.size:
            return np.empty((0, length), dtype=self.dtype)
        low, high = int(at.min()), int(at.max())
        if not 0 <= low <= high + length <= self._length or length < 0:
            raise IndexError(f"{self.key!r} has {self._length} elements: no windows of {length} from {low} to {high}")
        segments = self._segments()
        if len(segments) == 1 and isinstance(whole := segments[0], np.ndarray):
            # One indexing of overlapping rows, instead of a slice and a copy for each window.
            rows = np.ndarray((self._length - length + 1, length), self.dtype, whole, 0, (self.dtype.itemsize,) * 2)
            return rows[at]
        out = np.empty((len(at), length), dtype=self.dtype)
        for row, begin in zip(out, at.tolist()):
            i = bisect.bisect_right(self._starts, begin) - 1
            start = begin - self._starts[i]
            piece = segments[i][start : start + length]
            row[:] = piece if len(piece) == length else self.read(begin, begin + length)
        return out


# ---------------------------------------------------------------- writing


class _Sink:
    """The file that h5py writes into. It never raises: a write that fails (disk full) leaves libhdf5 2.0 with a cache
    that it cannot flush, and it was seen to end the process with a segmentation fault when it was to close the file. So
    what goes wrong is kept in `error` for the Writer to raise, and nothing more is written."""

    def __init__(self, fd: int):
        self.fd, self.at, self.size = fd, 0, 0
        self.error: BaseException | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, n: int) -> bytes:
        data = bytearray(n)
        return bytes(data[: self.readinto(data)])

    def readinto(self, out: Any) -> int:
        try:
            n = os.preadv(self.fd, [out], self.at)
        except BaseException as error:
            self.error, n = self.error or error, 0
        self.at += n
        return n

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        n = len(left)
        try:
            while self.error is None and left:
                written = os.pwrite(self.fd, left, self.at + n - len(left))
                left = left[written:]
        except BaseException as error:
            self.error = error
        self.at += n
        self.size = max(self.size, self.at)
        return n

    def truncate(self, size: int) -> int:
        try:
            if self.error is None:
                os.ftruncate(self.fd, size)
        except BaseException as error:
            self.error = error
        self.size = size
        return size

    def flush(self) -> None:
        pass


class Writer:
    """Writes an H5 file, segment by segment. It lies under another name until `close`, or the end of the `with` block,
    has written everything to the disk; an exception removes it. Raises StorageFault if the disk does not take it."""

    def __init__(self, path: str | Path, attributes: Mapping[str, Any] | None = None):
        self.path = Path(path).expanduser()
        self.temporary = self.path.with_name(f".{self.path.name}.writing")
        texts = _texts(attributes or {})
        self.counts: dict[str, int] = {}
        self.bytes = 0
        with self._faults():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = self._claim()
        self.sink = _Sink(self.fd)
        try:
            # Objects at multiples of 64 bytes, so that elements in the memory map are aligned.
            self.h5: h5py.File | None = h5py.File(
                self.sink, "w", libver=("v108", "v108"), alignment_threshold=1, alignment_interval=64
            )
            for name, text in texts.items():
                self.h5.attrs.create(name, np.bytes_(text.encode()))
            digest = _attributes_sha256({name: json.loads(text) for name, text in texts.items()})
            self.h5.attrs.create("sha256", np.bytes_(digest.encode()))
            self._check()
        except BaseException:
            self.abort()
            raise

    def _claim(self) -> int:
        """The temporary file, locked. What a killed process left is taken over."""
        while True:
            fd = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.exists(self.temporary) and os.path.samestat(os.fstat(fd), os.stat(self.temporary)):
                    os.ftruncate(fd, 0)
                    return fd
            except BlockingIOError:
                os.close(fd)
                raise Refusal(f"{self.path} is being written by another process: wait for it to end") from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # the one who held it has just published it

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageFault(
                f"could not write {self.path}: {error.strerror or error} after {self.bytes:,} bytes of arrays; make room, or choose another place"
            ) from None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[h5py.File]:
        """Around every use of h5py: the disk's error is raised instead of what h5py makes of it."""
        assert self.h5 is not None, "the file is closed"
        try:
            yield self.h5
        finally:
            if self.sink.error is not None:
                with self._faults():
                    raise self.sink.error

    def add(self, key: str, array: Any) -> None:
        """One more segment of `key`: an array or tensor of one dimension. Raises Refusal for what cannot be stored."""
        array = _numpy(key, array)
        step = max(BLOCK // array.dtype.itemsize, 1)
        self._append(key, array.dtype, len(array), (array[i : i + step] for i in range(0, len(array), step)))

    def add_file(self, key: str, file: str | Path, dtype: str, begin: int, count: int) -> None:
        """One more segment of `key`: `count` elements of a flat file, from number `begin` on, copied block by block.
        Raises Refusal if the file has not so many."""
        kind = _dtype(key, np.dtype(dtype))
        path = Path(file)
        if not 0 <= begin <= begin + count <= _size(path) // kind.itemsize:
            raise Refusal(
                f"{path} has {_size(path) // kind.itemsize} elements of {dtype}: no [{begin}, {begin + count})"
            )

        def blocks(source: IO[bytes]) -> Iterator[np.ndarray]:
            buffer = np.empty(min(BLOCK // kind.itemsize, count), dtype=kind)
            for at in range(0, count, max(len(buffer), 1)):
                block = buffer[: count - at]
                with _reading(path):
                    _read_at(source.fileno(), block, (begin + at) * kind.itemsize)
                yield block

        with _reading(path), path.open("rb", buffering=0) as source:
            self._append(key, kind, count, blocks(source))

    def empty(self, key: str) -> None:
        """A key that may have no segments. Raises ValueError for a name that cannot be one."""
        if key in self.counts:
            return
        parts = key.split("/")
        if len(parts) > 2 or not all(p.strip(".") and p.isprintable() for p in parts):
            raise ValueError(f"{key!r} cannot be a key: it should be NAME or NAME/NAME, in printable characters")
        if any(k.startswith(f"{key}/") or key.startswith(f"{k}/") for k in self.counts):
            raise ValueError(
                f"{key!r} cannot be a key beside {', '.join(map(repr, self.counts))}: one would lie in the other"
            )
        assert self.h5 is not None
        self.h5.create_group(key)
        self.counts[key] = 0
        self._check()

    def _append(self, key: str, dtype: np.dtype, length: int, blocks: Iterable[np.ndarray]) -> None:
        self.empty(key)
        assert self.h5 is not None
        if sum(self.counts.values()) + 2 * len(self.counts) >= MAX_OBJECTS:
            raise Refusal(f"{self.path} would have more than {MAX_OBJECTS:,} data sets and groups: join some segments")
        name = f"{key}/{self.counts[key]:05d}"
        data = self.h5.create_dataset(name, (length,), dtype, fill_time="never")
        digest, at = hashlib.sha256(), 0
        for block in blocks:
            data[at : at + len(block)] = block
            self._check()
            digest.update(block.data)
            at += len(block)
            self.bytes += block.nbytes
        data.attrs.create("sha256", np.bytes_(digest.hexdigest().encode()))
        self._check()
        self.counts[key] += 1

    def close(self) -> None:
        """Finish the file and give it its name."""
        if self.h5 is None:
            return
        try:
            self.h5.attrs["complete"] = True
            self.h5.close()
            self._check()
            with self._faults():
                os.fsync(self.fd)
                os.replace(self.temporary, self.path)
                _sync(self.path.parent)
        except BaseException:
            self.abort()
            raise
        self.h5 = None
        os.close(self.fd)

    def abort(self) -> None:
        """Leave nothing behind."""
        if self.fd < 0:
            return
        self.sink.error = self.sink.error or OSError("given up")  # whatever h5py still has to write is not needed
        if getattr(self, "h5", None) is not None:
            with contextlib.suppress(Exception):
                self.h5.close()  # type: ignore[union-attr]
        self.h5 = None
        with contextlib.suppress(OSError):
            os.unlink(self.temporary)
        os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def save_h5(path: str | Path, arrays: Mapping[str, Sequence[Any]], attributes: Mapping[str, Any] | None = None) -> None:
    """Write {key: [array or tensor, ...]} as an H5 file, whole or not at all. `attributes` are JSON values. Raises
    Refusal for what cannot be stored, StorageFault if the disk does not take it."""
    with Writer(path, attributes) as out:
        for key, several in arrays.items():
            out.empty(key)
            for array in several:
                out.add(key, array)


# ---------------------------------------------------------------- small things


def _size(path: Path) -> int:
    """Bytes of a regular file. Raises Refusal if it is none, StorageFault if it cannot be looked at."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise Refusal(f"there is no file {path}: make it with python prepare.py, or give another path") from None
    except OSError as error:
        raise StorageFault(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise Refusal(f"{path} is {what}: give the path of a file")
    return status.st_size


def _superblock(path: Path) -> int:
    """The version of a file's superblock, which lies at byte 0, 512, 1024, 2048, ... Raises Refusal if there is none, or
    one without a checksum."""
    with _reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for at in (0, *(512 << i for i in range(48))):
            file.seek(min(at, size))
            if file.read(len(SIGNATURE)) == SIGNATURE:
                version = (file.read(1) or b"\xff")[0]
                if version < 2:
                    raise Refusal(f"{path} is of HDF5's oldest format, whose structure has no checksums: {RENEW}")
                return version
    raise Refusal(f"{path} is not an HDF5 file: data are made with python prepare.py")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFault(f"could not read {path}: {error.strerror or error}") from None


def _read_at(fd: int, out: np.ndarray, offset: int) -> None:
    """Fill `out` from a file. Raises OSError if it ends before."""
    left = memoryview(out.data).cast("B")
    while left:
        n = os.preadv(fd, [left], offset)
        if not n:
            raise OSError("it has become shorter")
        left, offset = left[n:], offset + n


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _frozen(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.setflags(write=False)
    return view


def _dtype(key: str, dtype: np.dtype) -> np.dtype:
    if dtype.name not in TYPES:
        raise Refusal(
            f"{key!r} has elements of type {dtype.name}, which is not stored: convert it to one of {', '.join(TYPES)}"
        )
    return TYPES[dtype.name]


def _numpy(key: str, array: Any) -> np.ndarray:
    """An array or a torch tensor (known by its methods: torch is not imported) as an array that can be stored."""
    if hasattr(array, "detach"):
        try:
            array = array.detach().cpu().numpy()
        except TypeError:
            raise Refusal(
                f"{key!r} has elements of type {array.dtype}, which numpy lacks: convert it with .float()"
            ) from None
    array = np.asarray(array)
    if array.ndim != 1:
        raise Refusal(f"{key!r} has a segment of shape {array.shape}: segments have one dimension, so flatten it")
    return np.ascontiguousarray(array, dtype=_dtype(key, array.dtype))


def _texts(attributes: Mapping[str, Any]) -> dict[str, str]:
    """Attributes as JSON. Raises ValueError for a name that is taken and for what JSON does not have."""
    texts = {}
    for name, value in attributes.items():
        if name in RESERVED or not name or not name.isprintable():
            raise ValueError(
                f"{name!r} cannot be an attribute's name: {', '.join(sorted(RESERVED))} are the file's own"
            )
        try:
            texts[name] = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"attribute {name!r} cannot be written as JSON: {error}") from None
    if (size := sum(map(len, texts.values()))) > MAX_ATTRIBUTES:
        raise ValueError(f"the attributes have {size:,} bytes and {MAX_ATTRIBUTES:,} is the most")
    return texts


def _attributes_sha256(attributes: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()


def _check_room(size: int, folder: Path | None, path: Path) -> None:
    """Raises Refusal if a folder in memory has no room: writing there then would end the process with SIGBUS."""
    if folder is None or not folder.exists():
        return
    room = os.statvfs(folder)
    if size > (free := room.f_bavail * room.f_frsize):
        raise Refusal(
            f"{path} takes {size:,} bytes of shared memory and {folder} has {free:,}: leave out share_memory (an H5 store is shared through the system's cache anyway)"
        )


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."


def _kind(kind: Any) -> str:
    """A type of HDF5 in words."""
    names = {
        h5t.INTEGER: "integers",
        h5t.FLOAT: "floats",
        h5t.STRING: "texts",
        h5t.COMPOUND: "records",
        h5t.ENUM: "an enumeration",
    }
    name = names.get(kind.get_class(), "of a kind of its own")
    if kind.get_class() not in (h5t.INTEGER, h5t.FLOAT):
        return name
    order = "big-endian " if kind.get_order() == h5t.ORDER_BE else ""
    sign = "unsigned " if kind.get_class() == h5t.INTEGER and kind.get_sign() == h5t.SGN_NONE else ""
    return f"{order}{sign}{name} of {8 * kind.get_size()} bits"
