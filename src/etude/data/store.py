"""Arrays on disk (token ids, masks, ends, bytes) behind one interface: each named by a key, in one or more segments."""

import bisect
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from etude.data import hdf5
from etude.data.hdf5 import TYPES, Chunked, Writer, reading, size_of
from etude.errors import Refusal

if TYPE_CHECKING:
    import torch

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
        return {key: [_frozen(np.ascontiguousarray(a)) for a in several] for key, several in self.arrays.items()}


class Bin(Store):
    """Flat files of ids as nanoGPT writes them, one segment each, memory-mapped. Raises Refusal for one that is not."""

    def __init__(self, paths: Mapping[str, str | Path], dtype: str = "uint16"):
        if dtype not in ("uint16", "uint32"):
            raise Refusal(f"flat files of token ids have dtype uint16 or uint32, not {dtype}")
        self.paths = {key: Path(path).expanduser() for key, path in paths.items()}
        self.dtype = TYPES[dtype]
        for path in self.paths.values():
            size = size_of(path)
            if not size or size % self.dtype.itemsize:
                raise Refusal(
                    f"{path} has {size} bytes, which is no whole number of {dtype} ids: bring a whole copy of it, or set "
                    "the dtype with which it was written"
                )

    def _open(self) -> dict[str, list[Segment]]:
        found: dict[str, list[Segment]] = {}
        for key, path in self.paths.items():
            with reading(path), path.open("rb") as file:
                found[key] = [np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=self.dtype)]
        return found


class H5(Store):
    """An HDF5 file in the layout of etude.data.hdf5, memory-mapped where it is not in chunks. It is looked through when it
    is first read from. Raises Refusal for anything unusual: the file of somebody else is not to lead to other files, nor
    into memory that is not there."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self._attributes: dict[str, Any] = {}
        self._seen: tuple[int, int] | None = None  # size and time of change when it was first opened

    def _open(self) -> dict[str, list[Segment]]:
        file = hdf5.File(self.path)
        if self._seen is not None and self._seen != file.seen:
            raise Refusal(f"{self.path} is another file than when it was opened first: start again")
        self._attributes, self._seen = file.attributes, file.seen
        return file.segments()

    @property
    def attributes(self) -> dict[str, Any]:
        """The root attributes."""
        self.segments()
        return self._attributes


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


def save_h5(path: str | Path, arrays: Mapping[str, Sequence[Any]], attributes: Mapping[str, Any] | None = None) -> None:
    """Write {key: [array or tensor, ...]} as an H5 file, whole or not at all. `attributes` are JSON values. Raises
    Refusal for what cannot be stored, StorageFault if the disk does not take it."""
    with Writer(path, attributes) as out:
        for key, several in arrays.items():
            out.empty(key)
            for array in several:
                out.add(key, array)


def load_h5(path: str | Path, share_memory: bool = False) -> "dict[str, list[torch.Tensor]]":
    """Every segment as a tensor of its own; with `share_memory` in shared memory, so that the loader's workers and other
    processes that are handed the tensors have no copies. Raises Refusal."""
    import torch

    file = hdf5.File(Path(path).expanduser())
    if share_memory:
        _check_room(file)
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


def verify(path: str | Path) -> None:
    """Compare every data set of an H5 file, and its attributes, with their checksums. Raises Refusal naming the first
    that is damaged or has none."""
    hdf5.File(Path(path).expanduser()).verify()


def _check_room(file: hdf5.File, folder: Path = Path("/dev/shm")) -> None:
    """Raises Refusal if shared memory has no room: writing there then would end the process with SIGBUS."""
    if not folder.exists():
        return
    status = os.statvfs(folder)
    size = sum(a.length * a.dtype.itemsize for arrays in file.arrays.values() for a in arrays)
    if size > (free := status.f_bavail * status.f_frsize):
        raise Refusal(
            f"{file.path} takes {size:,} bytes of shared memory and {folder} has {free:,}: leave out share_memory "
            "(processes that read it as an H5 store share the system's cache)"
        )


def _frozen(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.setflags(write=False)
    return view
