"""HDF5 files of one-dimensional arrays: looked through before they are read, and written whole or not at all.

A file has a group for a key ("val", or "train/tokens": a group in a group) and in it a data set for each segment: 00000,
00001, ... Data sets carry the `sha256` of their elements. Root attributes are JSON texts, but for `complete`, written
last, and `sha256`, of the others. The arrays of files written here lie as plain bytes at one place each, so that they can
be memory-mapped.

libhdf5 (2.0) trusts what it reads. Of files in its oldest format, which h5py writes unless told otherwise, random damage
to the structure crashed the process in one case of a thousand and gave other elements without an error in one of ten;
texts of variable length made it hang. So only files are read whose structure has checksums throughout: superblock 2, as
written here, or 3 where there are chunks (libver="latest"), and no such texts. Of 12,500 files damaged at random none
then crashed or gave a wrong element. A file made to harm, with right checksums, can still crash libhdf5."""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import mmap
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5s, h5t, h5z

from etude.errors import Refusal, StorageFault

TYPES = {n: np.dtype(n).newbyteorder("<") for n in ("uint8", "bool", "uint16", "uint32", "int32", "int64", "float32")}
_NATIVE = [(dtype, h5t.py_create(dtype, logical=True)) for dtype in TYPES.values()]

MAX_OBJECTS = 100_000
MAX_ATTRIBUTES = 1 << 28  # bytes, all together
MAX_CHUNK = 1 << 26  # bytes
MAX_LZF_CHUNK = 1 << 22  # it can grow 88-fold when it is read
MAX_CHUNKS = 1_000_000  # of one data set: they are all looked at when a file is opened
MAX_RATIO = 1032  # the best that gzip can do: a data set that is larger than this times what is stored is none
# In the order in which h5py applies them; others would be loaded from the machine's folder of plug-ins.
FILTERS = {
    h5z.FILTER_SHUFFLE: "shuffle",
    h5z.FILTER_DEFLATE: "gzip",
    h5z.FILTER_LZF: "lzf",
    h5z.FILTER_FLETCHER32: "fletcher32",
}
# HDF5 does not cache a chunk that is larger than the cache, and would inflate it anew for every window read from it.
# So the cache holds the largest chunk there may be; and few data sets with a cache are open at a time.
CHUNK_CACHE = MAX_CHUNK
CHUNK_SLOTS = 10_007  # a prime: chunks whose numbers are equal modulo this push each other out
OPEN_CHUNKED = 8
BLOCK = 1 << 23  # bytes copied or hashed at a time

SIGNATURE = b"\x89HDF\r\n\x1a\n"
RESERVED = {"complete", "sha256"}
MEND = "bring a whole copy of it, or run the command that made it again"
RENEW = 'write it anew with etude.data.store.save_h5, or with h5py.File(..., libver="latest")'


@dataclasses.dataclass(frozen=True)
class Array:
    """One data set. `offset` is its first byte in the file, None where h5py must read it; then `chunk` is the number of
    elements of a chunk, 0 if there are none, and `gzip` the place of that filter, None without."""

    name: str
    dtype: np.dtype
    length: int
    offset: int | None
    chunk: int = 0
    gzip: int | None = None


class Chunked:
    """One segment that lies in chunks, perhaps compressed: a slice is read by h5py into a new array."""

    def __init__(self, file: "File", array: Array):
        self.file, self.array, self.dtype = file, array, array.dtype

    def __len__(self) -> int:
        return self.array.length

    def __getitem__(self, at: slice) -> np.ndarray:
        begin, end, _ = at.indices(self.array.length)
        out = np.empty(max(end - begin, 0), dtype=self.dtype)
        if len(out):
            self.file.read(self.array, begin, out)
        out.setflags(write=False)
        return out


class File:
    """An HDF5 file in the layout above, looked through without reading its arrays, and refused if anything in it is
    unusual: `arrays` by key, and `attributes`. Each Refusal names the file, the place and what is wrong there."""

    def __init__(self, path: Path):
        self.path = path
        if not size_of(path):
            raise Refusal(f"{path} is empty: {MEND}")
        self.superblock = _superblock(path)
        self.objects = 0
        self.open: collections.OrderedDict[str, h5py.Dataset] = collections.OrderedDict()
        self.inflated: dict[str, bytearray] = {}  # which chunks were found to be no larger than they should be
        with self.damage():
            self.h5 = h5py.File(path, "r", locking=False, rdcc_nbytes=CHUNK_CACHE, rdcc_nslots=CHUNK_SLOTS)
        try:
            with self.damage():
                self.fd: int = self.h5.id.get_vfd_handle()
                status = os.fstat(self.fd)
                self.size, self.seen = status.st_size, (status.st_size, status.st_mtime_ns)
                mark = self.attribute("/", "complete")
                if not (isinstance(mark, np.ndarray) and mark.shape == () and mark):
                    raise Refusal(f"{path} was not finished: run the command that made it again")
                self.arrays = self._look()
                self.attributes = self._attributes()
        except BaseException:
            with contextlib.suppress(Exception):
                self.h5.close()
            raise

    @contextlib.contextmanager
    def damage(self, name: str = "") -> Iterator[None]:
        """What h5py raises for a damaged file, which may be any exception, becomes a Refusal."""
        try:
            yield
        except Refusal:
            raise
        except Exception as error:
            why = " ".join(str(error).split())
            why = "it is cut short" if "truncated file" in why else f"it is damaged ({_short(why) or error!r})"
            raise self.refusal(name, why, MEND) from None

    def refusal(self, name: str, why: str, remedy: str = "write it anew with etude.data.store.save_h5") -> Refusal:
        where = f"{self.path}, {_short(ascii(name))}" if name else str(self.path)
        return Refusal(f"{where}: {why}; {remedy}")

    # -------- what is in it

    def _look(self) -> dict[str, list[Array]]:
        """Every data set, checked. Only hard links are followed, no deeper than two groups."""
        arrays: dict[str, list[Array]] = {}
        for key, group in self._children(self.h5.id, ""):
            if not isinstance(group, h5g.GroupID):
                raise self.refusal(key, "a data set lies outside a group: it belongs into that of its key")
            segments: list[Array] = []
            nested = 0
            for name, child in self._children(group, key):
                if isinstance(child, h5g.GroupID):
                    nested += 1
                    arrays[name] = []
                    for deep, segment in self._children(child, name):
                        arrays[name].append(self._array(deep, segment, f"{name}/{len(arrays[name]):05d}"))
                else:
                    segments.append(self._array(name, child, f"{key}/{len(segments):05d}"))
            if segments and nested:
                raise self.refusal(key, "it has both groups and data sets: the data sets need a key of their own")
            if not nested:
                arrays[key] = segments
        return arrays

    def _children(self, group: Any, name: str) -> Iterator[tuple[str, Any]]:
        """(name from the root, identifier) of each object in a group."""
        self.objects += group.get_num_objs()
        if self.objects > MAX_OBJECTS:
            raise self.refusal(name or "/", f"it has more than {MAX_OBJECTS:,} data sets and groups")
        links: list[tuple[bytes, int]] = []
        group.links.iterate(lambda link, info: links.append((link, info.type)), info=True)
        for link, kind in sorted(links):
            text = link.decode("utf-8", "surrogateescape")
            child = f"{name}/{text}" if name else text
            if kind != h5l.TYPE_HARD:
                raise self.refusal(child, "it is a link that leads elsewhere, perhaps to another file of this machine")
            if "/" in text or text in ("", "."):  # libhdf5 would take it for a path
                raise self.refusal(name or "/", f"it has a link named {_short(ascii(text))}")
            with self.damage(child):
                found = h5o.open(group, link)
                if not isinstance(found, (h5g.GroupID, h5d.DatasetID)):
                    raise self.refusal(child, "it is neither a group nor a data set")
                info = h5o.get_info(found)
                if info.rc != 1:
                    raise self.refusal(child, "several links lead to it")
                if info.hdr.version < 2:
                    raise self.refusal(child, "its structure has no checksums", RENEW)
            yield child, found

    def _array(self, name: str, dataset: Any, expected: str) -> Array:
        if not isinstance(dataset, h5d.DatasetID):
            raise self.refusal(name, "it is a group too deep: a key has one slash at most")
        if name != expected:
            raise self.refusal(name, f"{expected!r} was expected here: a segment is missing, or has another name")
        with self.damage(name):
            plan = dataset.get_create_plist()
            layout = plan.get_layout()
            # Before anything else is asked: the extent of a virtual data set is looked up in the files that it names.
            if layout == h5d.VIRTUAL:
                raise self.refusal(name, "it is a virtual data set, whose elements lie in other files")
            if plan.get_external_count():
                raise self.refusal(name, "its elements lie in another file")
            filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
            if unknown := [f for f in filters if f not in FILTERS]:
                known = ", ".join(FILTERS.values())
                raise self.refusal(name, f"it needs HDF5's filter number {unknown[0]}, which is none of {known}")
            if filters != [f for f in FILTERS if f in filters]:
                raise self.refusal(name, "it is filtered more than once, or in another order than h5py's")
            kind = dataset.get_type()
            dtype = next((d for d, native in _NATIVE if kind.equal(native)), None)
            if dtype is None:
                raise self.refusal(name, f"its elements are {_kind(kind)}, which is none of {', '.join(TYPES)}")
            space = dataset.get_space()
            if space.get_simple_extent_type() != h5s.SIMPLE or space.get_simple_extent_ndims() != 1:
                raise self.refusal(name, "it does not have one dimension")
            length = int(space.get_simple_extent_dims()[0])
            size = length * dtype.itemsize
            if not length:
                return Array(name, dtype, 0, 0)
            if layout == h5d.CHUNKED:
                chunk = int(plan.get_chunk()[0])
                most = MAX_LZF_CHUNK if h5z.FILTER_LZF in filters else MAX_CHUNK
                self._check_chunks(name, dataset, chunk * dtype.itemsize, most, size, bool(filters))
                gzip = filters.index(h5z.FILTER_DEFLATE) if h5z.FILTER_DEFLATE in filters else None
                return Array(name, dtype, length, None, chunk, gzip)
            offset = dataset.get_offset() if layout == h5d.CONTIGUOUS else None
            if dataset.get_storage_size() < size or (layout == h5d.CONTIGUOUS and offset is None):
                raise self.refusal(name, f"its {length:,} elements were never written", MEND)
            if offset is not None and offset + size > self.size:
                raise self.refusal(
                    name, f"its {length:,} elements would end beyond the file's {self.size:,} bytes", MEND
                )
            return Array(name, dtype, length, offset)

    def _check_chunks(self, name: str, dataset: Any, chunk: int, largest: int, size: int, filtered: bool) -> None:
        """That every chunk (of `chunk` bytes, `largest` at most) of `size` bytes is there, and can be what it says."""
        wanted = -(-size // chunk)
        if self.superblock < 3:
            raise self.refusal(name, "the list of its chunks has no checksums", RENEW)
        if chunk > largest:
            raise self.refusal(name, f"its chunks have {chunk:,} bytes and {largest:,} is the most")
        if wanted > MAX_CHUNKS:
            raise self.refusal(name, f"it has {wanted:,} chunks and {MAX_CHUNKS:,} is the most")
        if dataset.get_storage_size() * MAX_RATIO < size:
            raise self.refusal(name, f"its {size:,} bytes were never written: what is stored cannot be as many", MEND)
        # Where a filter cannot make a chunk smaller it makes it larger by a thousandth at most.
        least, most = (1, chunk + chunk // 1000 + 64) if filtered else (chunk, chunk)
        found = wrong = 0

        def look(info: Any) -> None:
            nonlocal found, wrong
            there = info.byte_offset is not None and info.byte_offset + info.size <= self.size
            found, wrong = found + 1, wrong + (not there or not least <= info.size <= most)

        dataset.chunk_iter(look)
        if wrong or found > wanted:
            raise self.refusal(name, f"{wrong or found - wanted:,} of its chunks cannot be true", MEND)
        if found < wanted:
            raise self.refusal(name, f"{wanted - found:,} of its {wanted:,} chunks were never written", MEND)

    # -------- attributes

    def attribute(self, name: str, attribute: str) -> bytes | np.ndarray | None:
        """An attribute of an object, text or numbers; None if there is none."""
        attributes = self.h5[name].attrs
        if attribute not in attributes:
            return None
        stored, where = attributes.get_id(attribute), f"{name}@{attribute}"
        kind = stored.get_type()
        if kind.get_class() not in (h5t.STRING, h5t.INTEGER, h5t.FLOAT, h5t.ENUM):
            raise self.refusal(where, "this attribute is neither text nor numbers")
        if kind.get_class() == h5t.STRING and kind.is_variable_str():
            raise self.refusal(where, "this text has no fixed length, and so no checksum: store a numpy.bytes_")
        if stored.get_storage_size() > MAX_ATTRIBUTES:
            raise self.refusal(where, f"it has more than {MAX_ATTRIBUTES:,} bytes")
        value = attributes[attribute]
        return bytes(value) if isinstance(value, bytes) else np.asarray(value)

    def _attributes(self) -> dict[str, Any]:
        """The root attributes but the two of the file itself."""
        found: dict[str, Any] = {}
        room = MAX_ATTRIBUTES
        for name in self.h5.attrs:
            room -= self.h5.attrs.get_id(name).get_storage_size()
            if room < 0:
                raise self.refusal("/", f"its attributes have more than {MAX_ATTRIBUTES:,} bytes")
            if name in RESERVED:
                continue
            value = self.attribute("/", name)
            try:
                found[name] = json.loads(value) if isinstance(value, bytes) else np.asarray(value).tolist()
            except ValueError:
                raise self.refusal(f"/@{name}", "this attribute is not JSON") from None
        if self.sha256("/") not in (None, attributes_sha256(found)):
            raise self.refusal("/", "its attributes have another sha256 than when they were written", MEND)
        return found

    def sha256(self, name: str) -> str | None:
        """The checksum that an object carries, None if it has none."""
        with self.damage(name):
            value = self.attribute(name, "sha256")
            return value.decode("ascii") if isinstance(value, bytes) else None

    # -------- elements

    def segments(self) -> dict[str, list[np.ndarray | Chunked]]:
        """Views of one memory map, and Chunked for what cannot be mapped."""
        with reading(self.path):
            whole = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
        return {
            key: [
                Chunked(self, a) if a.offset is None else np.frombuffer(whole, a.dtype, a.length, a.offset)
                for a in arrays
            ]
            for key, arrays in self.arrays.items()
        }

    def read(self, array: Array, begin: int, out: np.ndarray) -> None:
        """Elements of a data set that is not mapped, from `begin` on, into `out`."""
        with self.damage(array.name):
            if array.name not in self.open:
                if len(self.open) >= OPEN_CHUNKED:
                    self.open.popitem(last=False)
                self.open[array.name] = self.h5[array.name]
            self.open.move_to_end(array.name)
            if array.gzip is not None:
                self._inflate(array, range(begin // array.chunk, (begin + len(out) - 1) // array.chunk + 1))
            self.open[array.name].read_direct(out, np.s_[begin : begin + len(out)])

    def _inflate(self, array: Array, chunks: Iterable[int]) -> None:
        """Look at each chunk once before libhdf5 does: it would inflate a megabyte to a gigabyte, whatever a chunk's size.
        Raises Refusal for one that is too large."""
        seen = self.inflated.setdefault(array.name, bytearray(-(-array.length // array.chunk)))
        size = array.chunk * array.dtype.itemsize
        for i in chunks:
            if not seen[i]:
                left_out, stored = self.open[array.name].id.read_direct_chunk((i * array.chunk,))
                applied = not left_out >> (array.gzip or 0) & 1
                if applied and len(zlib.decompressobj().decompress(stored, size + 1)) > size:
                    raise self.refusal(array.name, f"chunk {i} is larger than it says", MEND)
                seen[i] = 1

    def blocks(self, array: Array) -> Iterator[np.ndarray]:
        """The elements of a data set piece by piece, read and not mapped; each is lost when the next is asked for."""
        if array.offset is not None:
            yield from _blocks(self.fd, self.path, array.dtype, array.offset, array.length)
            return
        buffer = np.empty(min(BLOCK // array.dtype.itemsize, array.length), dtype=array.dtype)
        for begin in range(0, array.length, len(buffer)):
            block = buffer[: array.length - begin]
            self.read(array, begin, block)
            yield block

    def verify(self) -> None:
        """Compare every data set with its checksum; the attributes were compared when the file was opened. Raises
        Refusal naming the first data set that is damaged or has none."""
        known = {n: self.sha256(n) for n in ("/", *(a.name for arrays in self.arrays.values() for a in arrays))}
        if lacking := [name for name, digest in known.items() if digest is None]:
            raise self.refusal(lacking[0], "it has no sha256 by which it could be verified")
        for array in (a for arrays in self.arrays.values() for a in arrays):
            digest = hashlib.sha256()
            for block in self.blocks(array):
                digest.update(block.data)
            if digest.hexdigest() != known[array.name]:
                raise self.refusal(array.name, "it is damaged: it has another sha256 than when it was written", MEND)


class _Sink(io.RawIOBase):
    """The file that h5py writes into. It never raises: a write that fails (disk full) leaves libhdf5 with a cache that it
    cannot flush, and closing such a file was seen to end the process with a segmentation fault. So what goes wrong is
    kept in `error` for the Writer to raise, and from then on nothing is written."""

    def __init__(self, fd: int):
        self.fd, self.at, self.size = fd, 0, 0
        self.error: BaseException | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, out: Any) -> int:
        n = 0
        try:
            n = os.preadv(self.fd, [out], self.at)
        except BaseException as error:
            self.error = self.error or error
        self.at += n
        return n

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        end = self.at + len(left)
        try:
            while self.error is None and left:
                left = left[os.pwrite(self.fd, left, end - len(left)) :]
        except BaseException as error:
            self.error = error
        n, self.at, self.size = end - self.at, end, max(self.size, end)
        return n

    def truncate(self, size: int | None = None) -> int:
        self.size = self.at if size is None else size
        try:
            if self.error is None:
                os.ftruncate(self.fd, self.size)
        except BaseException as error:
            self.error = error
        return self.size


class Writer:
    """Writes an H5 file, segment by segment. It lies under another name until `close`, or the end of the `with` block,
    has written everything to the disk; an exception removes it. Raises StorageFault if the disk does not take it,
    Refusal for what cannot be stored."""

    def __init__(self, path: str | Path, attributes: Mapping[str, Any] | None = None):
        self.path = Path(path).expanduser()
        self.temporary = self.path.with_name(f".{self.path.name}.writing")
        self.counts: dict[str, int] = {}  # segments by key
        self.outer: set[str] = set()  # groups that hold keys
        self.objects = self.bytes = 0
        self.h5: h5py.File | None = None
        texts = _texts(attributes or {})
        if self.path.is_dir():
            raise Refusal(f"{self.path} is a folder: give the path of a file")
        with self._faults():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = self._claim()
        self.sink = _Sink(self.fd)
        try:
            with self._writing():
                # Large arrays begin at multiples of 64 bytes. Small ones do not: the gaps would be searched for each.
                self.h5 = h5py.File(
                    self.sink, "w", libver=("v108", "v108"), alignment_threshold=4096, alignment_interval=64
                )
                for name, text in texts.items():
                    self.h5.attrs.create(name, np.bytes_(text.encode()))
                digest = attributes_sha256({name: json.loads(text) for name, text in texts.items()})
                self.h5.attrs.create("sha256", np.bytes_(digest.encode()))
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
                f"could not write {self.path}: {error.strerror or error} after {self.bytes:,} bytes of arrays; "
                "make room, or choose another place"
            ) from None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Around every use of h5py: the disk's error is raised instead of what h5py makes of it."""
        try:
            yield
        finally:
            if self.sink.error is not None:
                with self._faults():
                    raise self.sink.error

    def add(self, key: str, array: Any) -> None:
        """One more segment of `key`: an array or tensor of one dimension."""
        array = _numpy(key, array)
        step = BLOCK // array.dtype.itemsize
        self._append(key, array.dtype, len(array), (array[i : i + step] for i in range(0, len(array), step)))

    def add_file(self, key: str, file: str | Path, dtype: str, begin: int, count: int) -> None:
        """One more segment of `key`: `count` elements of a flat file, from number `begin` on, copied block by block."""
        kind, path = _dtype(key, np.dtype(dtype)), Path(file)
        if not 0 <= begin <= begin + count <= (there := size_of(path) // kind.itemsize):
            raise Refusal(f"{path} has {there} elements of {dtype}: no [{begin}, {begin + count})")
        with reading(path), path.open("rb", buffering=0) as source:
            blocks = _blocks(source.fileno(), path, kind, begin * kind.itemsize, count)
            self._append(key, kind, count, blocks)

    def empty(self, key: str) -> None:
        """A key without segments, so far. Raises ValueError for what cannot be a key."""
        if key in self.counts:
            return
        parts = key.split("/")
        if len(parts) > 2 or not all(p.strip(".") and p.isprintable() for p in parts):
            raise ValueError(f"{key!r} cannot be a key: it should be NAME or NAME/NAME, in printable characters")
        if key in self.outer or (len(parts) == 2 and parts[0] in self.counts):
            raise ValueError(f"{key!r} cannot be a key: data sets of one key would lie beside the groups of others")
        file = self._file()
        with self._writing():
            file.create_group(key)
        self.counts[key] = 0
        self.outer |= set(parts[:-1])
        self.objects += len(parts)

    def _file(self) -> h5py.File:
        if self.h5 is None:
            raise ValueError(f"{self.path} is closed")
        return self.h5

    def _append(self, key: str, dtype: np.dtype, length: int, blocks: Iterable[np.ndarray]) -> None:
        file = self._file()
        self.empty(key)
        self.objects += 1
        if self.objects > MAX_OBJECTS:
            raise Refusal(f"{self.path} would have more than {MAX_OBJECTS:,} data sets and groups: join some segments")
        digest, at = hashlib.sha256(), 0
        with self._writing():
            data = file.create_dataset(f"{key}/{self.counts[key]:05d}", (length,), dtype, fill_time="never")
        for block in blocks:
            with self._writing():
                data[at : at + len(block)] = block
            digest.update(block.data)
            at += len(block)
            self.bytes += block.nbytes
        with self._writing():
            data.attrs.create("sha256", np.bytes_(digest.hexdigest().encode()))
        self.counts[key] += 1

    def close(self) -> None:
        """Finish the file and give it its name."""
        if self.h5 is None:
            return
        try:
            with self._writing():
                self.h5.attrs["complete"] = True
                self.h5.close()
            with self._faults():
                os.fsync(self.fd)
                os.replace(self.temporary, self.path)
                _sync(self.path.parent)
        except BaseException:
            self.abort()
            raise
        self.h5 = None
        self.sink.error = OSError("closed")
        os.close(self.fd)

    def abort(self) -> None:
        """Leave nothing behind."""
        # What h5py still has to write is not needed; and it must never reach whatever file has this number next.
        self.sink.error = self.sink.error or OSError("given up")
        if self.h5 is not None:
            with contextlib.suppress(Exception):
                self.h5.close()
        self.h5 = None
        with contextlib.suppress(OSError):
            os.unlink(self.temporary)
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.close()
        elif self.h5 is not None:
            self.abort()


# ---------------------------------------------------------------- small things


def size_of(path: Path) -> int:
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
    with reading(path), path.open("rb") as file:
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
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFault(f"could not read {path}: {error.strerror or error}") from None


def _blocks(fd: int, path: Path, dtype: np.dtype, offset: int, count: int) -> Iterator[np.ndarray]:
    """`count` elements of an open file from byte `offset` on, piece by piece in one buffer."""
    buffer = np.empty(min(BLOCK // dtype.itemsize, count), dtype=dtype)
    for begin in range(0, count, max(len(buffer), 1)):
        block = buffer[: count - begin]
        left = memoryview(block.data).cast("B")
        with reading(path):
            while left:
                n = os.preadv(fd, [left], offset)
                if not n:
                    raise OSError("it has become shorter")
                left, offset = left[n:], offset + n
        yield block


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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


def attributes_sha256(attributes: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()


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
