"""Arrays on disk: what is written comes back, in every process; what is damaged, unfinished or meant to harm is refused
in one line."""

import itertools
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from h5py import h5d, h5p, h5s, h5t

from etude.data import hdf5
from etude.data.store import H5, Bin, Flat, Memory, Store, Writer, load_h5, save_h5, verify
from etude.errors import Refusal, StorageFault

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 65536, 10_000).astype(np.uint16)
ALL = {name: RNG.integers(0, 2 if name == "bool" else 100, 1000).astype(name) for name in hdf5.TYPES}
LATEST: dict[str, Any] = {"libver": "latest"}


def python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A process of its own: it may crash, and have limits."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, **options)


def one_line(caught: Any, *words: object) -> None:
    text = str(caught.value)
    assert "\n" not in text and text.isprintable() and len(text) < 700
    assert all(str(w) in text for w in words), text


# ---------------------------------------------------------------- what is written comes back


def test_round_trip(tmp_path: Path) -> None:
    """Every type, several segments and none, nested keys; and h5py alone reads the same."""
    arrays = {f"types/{n}": [a, a[:0], a[::3]] for n, a in ALL.items()} | {"flat": [IDS], "none": []}
    save_h5(path := tmp_path / "a.h5", arrays)
    verify(path)
    s = H5(path)
    assert s.keys == sorted(arrays) and s.attributes == {}
    with h5py.File(path) as f:
        for key, several in arrays.items():
            assert s.lengths(key) == [len(a) for a in several]
            assert list(f[key]) == [f"{i:05d}" for i in range(len(several))]
            for i, a in enumerate(several):
                got = s.fetch(key, i, 0, len(a))
                assert got.dtype == a.dtype and np.array_equal(got, a) and not got.flags.writeable
                assert np.array_equal(f[f"{key}/{i:05d}"], a)
    assert s["flat"][0].flags.aligned and not s["flat"][0].flags.owndata, "a view of the map"


def test_the_same_arrays_make_the_same_bytes(tmp_path: Path) -> None:
    """No times or addresses of memory get into a file: its hash says whether the data are the same."""
    for name in "ab":
        save_h5(tmp_path / name, {"x/y": [IDS, IDS[:3]]}, {"a": 1, "b": "x" * 100_000})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_attributes(tmp_path: Path) -> None:
    """JSON values, larger than HDF5's 64 KiB too, and more than lie in a header."""
    attributes: dict[str, Any] = {f"n{i}": i for i in range(40)}
    attributes |= {"text": "é\n\u2028\x00 ' \" 日本", "big": {"x": ["ab" * 100_000, None, True, 1.5e-9]}, "empty": ""}
    attributes |= {"number text": "42", "huge": 2**70}
    save_h5(tmp_path / "a", {"k": [IDS]}, attributes)
    assert H5(tmp_path / "a").attributes == attributes
    for bad in ({"x": float("nan")}, {"x": object()}, {"complete": 1}, {"sha256": ""}, {"": 1}, {"a\nb": 1}):
        with pytest.raises(ValueError, match="attribute"):
            save_h5(tmp_path / "b", {}, bad)
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_tensors(tmp_path: Path) -> None:
    """save_h5 takes them, load_h5 makes them again: the seeds' serialization."""
    tensors = {n: [torch.from_numpy(a.copy()), torch.from_numpy(a[:7].copy())] for n, a in ALL.items()}
    save_h5(tmp_path / "a", tensors | {"none": []})
    for share in (False, True):
        back = load_h5(tmp_path / "a", share_memory=share)
        assert back.keys() == tensors.keys() | {"none"}
        for n, several in tensors.items():
            for a, b in zip(several, back[n], strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b) and b.is_shared() == share
    save_h5(tmp_path / "b", {"g": [torch.ones(3, requires_grad=True)]})
    assert load_h5(tmp_path / "b")["g"][0].tolist() == [1, 1, 1]


def _set_first(tensor: torch.Tensor) -> None:
    tensor[0] = 12345


def test_shared_memory_is_shared(tmp_path: Path) -> None:
    """What one process writes into a loaded tensor another one sees: there is one copy."""
    save_h5(tmp_path / "a", {"k": [IDS]})
    tensor = load_h5(tmp_path / "a", share_memory=True)["k"][0]
    child = torch.multiprocessing.get_context("fork").Process(target=_set_first, args=(tensor,))
    child.start()
    child.join()
    assert tensor[0] == 12345


def test_no_room_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is written there: the system would end the process with SIGBUS."""
    save_h5(tmp_path / "a", {"k": [IDS]})
    full = os.statvfs_result((4096, 4096, 10, 4, 4, 0, 0, 0, 0, 255, 0))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(Refusal) as caught:
        load_h5(tmp_path / "a", share_memory=True)
    one_line(caught, tmp_path / "a", "20,000 bytes", "16,384", "leave out share_memory")


@pytest.mark.parametrize(
    "array, why",
    [
        (torch.ones(3, dtype=torch.bfloat16), "bfloat16"),
        (np.ones((2, 2), np.int32), r"\(2, 2\)"),
        (np.ones(3), "float64"),
        (np.array(["a"]), "str"),
        (np.int64(3), r"\(\)"),
    ],
)
def test_what_cannot_be_stored(array: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=why) as caught:
        save_h5(tmp_path / "a", {"the key": [array]})
    one_line(caught, "the key")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "keys", [["a/b/c"], [""], ["/a"], ["a/"], ["."], ["a/.."], ["a\n"], ["a", "a/b"], ["a/b", "a"]]
)
def test_keys_that_cannot_be(keys: list[str], tmp_path: Path) -> None:
    """A key that could not be read back, or lies in another one."""
    with pytest.raises(ValueError, match="cannot be a key"):
        save_h5(tmp_path / "a", {k: [IDS] for k in keys})


def test_foreign_byte_order(tmp_path: Path) -> None:
    """Arrays of the other byte order are turned, and not taken for numbers that they are not."""
    save_h5(tmp_path / "a", {"k": [IDS.astype(">u2")]})
    assert np.array_equal(H5(tmp_path / "a").fetch("k", 0, 0, len(IDS)), IDS)


# ---------------------------------------------------------------- reading


def test_misuse_of_fetch(tmp_path: Path) -> None:
    s = Memory({"a": [IDS[:10], IDS[:3]], "b": [IDS[:10] > 5]})
    both = s.fetch(["a", "b"], 0, 2, 5)
    assert np.array_equal(both["a"], IDS[2:5]) and both["b"].dtype == bool
    with pytest.raises(ValueError, match="no key 'c'; there are: 'a', 'b'"):
        s.fetch("c", 0, 0, 1)
    for segment, begin, end in ((2, 0, 1), (-1, 0, 1), (0, 0, 11), (0, -1, 3), (0, 4, 3), (1, 3, 4)):
        with pytest.raises(IndexError, match="'a'"):
            s.fetch("a", segment, begin, end)
    with pytest.raises(ValueError, match="read-only"):
        s.fetch("a", 0, 0, 3)[0] = 1
    with pytest.raises(ValueError, match="one dimension"):
        Memory({"a": [np.ones((2, 2))]})


SEGMENTS = [IDS[:1], IDS[1:1], IDS[1:4000], IDS[4000:4003], IDS[4003:], IDS[:0]]


def _in_memory(folder: Path) -> Store:
    return Memory({"k": SEGMENTS})


def _strided(folder: Path) -> Store:
    return Memory({"k": [np.repeat(IDS, 2)[::2]]})


def _mapped(folder: Path) -> Store:
    save_h5(folder / "a.h5", {"k": SEGMENTS})
    return H5(folder / "a.h5")


def _one_segment(folder: Path) -> Store:
    save_h5(folder / "a.h5", {"k": [IDS]})
    return H5(folder / "a.h5")


def _gzip(folder: Path) -> Store:
    kinds = [{"compression": "gzip"}, {"compression": "lzf", "shuffle": True}, {"fletcher32": True}, {}]
    with h5py.File(folder / "a.h5", "w", **LATEST) as f:
        for i, (a, kind) in enumerate(zip(SEGMENTS, itertools.cycle(kinds))):
            f.create_dataset(f"k/{i:05d}", data=a, chunks=(97,), maxshape=(None,), **kind)
        f.attrs["complete"] = True
    return H5(folder / "a.h5")


def _user_block(folder: Path) -> Store:
    with h5py.File(folder / "a.h5", "w", userblock_size=1024, **LATEST) as f:
        f["k/00000"] = IDS
        f.attrs["complete"] = True
    return H5(folder / "a.h5")


def _bin(folder: Path) -> Store:
    IDS.tofile(folder / "k.bin")
    return Bin({"k": folder / "k.bin"}, "uint16")


STORES = [_in_memory, _strided, _mapped, _one_segment, _gzip, _user_block, _bin]


@pytest.fixture(params=STORES)
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return request.param(tmp_path)


def test_flat(any_store: Store) -> None:
    """All segments as one array, on random ranges as of the concatenated one, whatever lies below."""
    flat, rng = Flat(any_store, "k"), random.Random(0)
    assert len(flat) == len(IDS) and flat.dtype == np.uint16
    assert np.array_equal(flat[:], IDS) and np.array_equal(flat[-10:-2], IDS[-10:-2]) and len(flat[7:3]) == 0
    for _ in range(100):
        begin, end = sorted((rng.randrange(len(IDS) + 1), rng.randrange(len(IDS) + 1)))
        end = rng.choice([end, min(begin + 5, len(IDS))])
        got = flat.read(begin, end)
        assert np.array_equal(got, IDS[begin:end]) and not got.flags.writeable
    for length in (0, 1, 5, 200, 6001, len(IDS)):
        begins = RNG.integers(0, len(IDS) - length + 1, 20)
        expected = np.stack([IDS[b : b + length] for b in begins])
        for given in (begins, begins.tolist(), begins.astype(np.uint32)):
            got = flat.read_many(given, length)
            assert got.dtype == np.uint16 and got.flags.writeable and np.array_equal(got, expected)
    assert flat.read_many([], 4).shape == (0, 4)
    for begins, length in (([-1], 2), ([0, len(IDS) - 3], 4), ([0], len(IDS) + 1), ([5], -1)):
        with pytest.raises(IndexError, match="10000 elements"):
            flat.read_many(begins, length)
    for at in ((-1, 2), (3, 2), (0, len(IDS) + 1)):
        with pytest.raises(IndexError, match="10000 elements"):
            flat.read(*at)
    with pytest.raises(TypeError, match="slices"):
        flat[::2]


def test_flat_of_little() -> None:
    """Of nothing, of no segment, and of segments whose types differ."""
    empty = Flat(Memory({"k": [IDS[:0], IDS[:0]]}), "k")
    assert len(empty) == 0 and len(empty[:]) == 0 and empty.read_many([0], 0).shape == (1, 0)
    with pytest.raises(IndexError):
        empty.read_many([0], 1)
    with pytest.raises(ValueError, match="empty"):
        Flat(Memory({"k": []}), "k")
    with pytest.raises(ValueError, match="2 types: int64, uint16"):
        Flat(Memory({"k": [IDS, IDS.astype(np.int64)]}), "k")


def _sums(pair: tuple[Store, Flat]) -> tuple[int, int, int]:
    s, flat = pair
    return int(sum(s.fetch("k", i, 0, n).sum() for i, n in enumerate(s.lengths("k")))), int(flat[:].sum()), os.getpid()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(method: str, tmp_path: Path) -> None:
    """A store that was opened and read here gives the same in workers, both at once, and here afterwards."""
    stores = []
    for make in (_mapped, _gzip, _bin, _in_memory):
        (folder := tmp_path / make.__name__).mkdir()
        s = make(folder)
        stores.append((s, Flat(s, "k")))
    right = (IDS.sum(), IDS.sum())
    assert all(_sums(pair)[:2] == right for pair in stores)
    with multiprocessing.get_context(method).Pool(2) as pool:
        there = pool.map(_sums, stores * 4, chunksize=1)
    assert {t[:2] for t in there} == {right} and os.getpid() not in {t[2] for t in there}
    assert all(_sums(pickle.loads(pickle.dumps(pair))) == _sums(pair) for pair in stores)


def test_inherited_by_fork(tmp_path: Path) -> None:
    """A forked process opens the file anew: h5py's handle is its parent's, and reads through it were seen to go wrong."""
    s = _gzip(tmp_path)
    flat = Flat(s, "k")
    flat.read(0, 500)
    for _ in range(3):
        if not (child := os.fork()):
            ok = all(np.array_equal(flat.read(b, b + 50), IDS[b : b + 50]) for b in range(0, 9000, 31))
            os._exit(0 if ok and s._opened is not None and s._opened[0] == os.getpid() else 1)
        assert all(np.array_equal(flat.read(b, b + 50), IDS[b : b + 50]) for b in range(0, 9000, 31))
        assert os.waitpid(child, 0)[1] == 0


def test_another_file_in_its_place(tmp_path: Path) -> None:
    """A worker that opens later must not train on other data than its parent."""
    s = _one_segment(tmp_path)
    assert s.keys == ["k"]
    save_h5(tmp_path / "a.h5", {"k": [IDS[::-1]]})
    os.utime(tmp_path / "a.h5", (1, 1))
    assert np.array_equal(s.fetch("k", 0, 0, 9), IDS[:9]), "what is open stays open"
    with pytest.raises(Refusal, match="another file"):
        assert pickle.loads(pickle.dumps(s)).keys


def test_many_compressed_segments(tmp_path: Path) -> None:
    """More than are open at a time, in random order; the caches of those open stay few."""
    with h5py.File(tmp_path / "a.h5", "w", **LATEST) as f:
        for i in range(20):
            f.create_dataset(f"k/{i:05d}", data=IDS[i * 500 : (i + 1) * 500], chunks=(100,), compression="gzip")
        f.attrs["complete"] = True
    file = hdf5.File(tmp_path / "a.h5")
    segments = file.segments()["k"]
    for i in random.Random(0).choices(range(20), k=100):
        assert np.array_equal(segments[i][10:480], IDS[i * 500 + 10 : i * 500 + 480])
        assert len(file.open) <= hdf5.OPEN_CHUNKED


def test_others_attributes(tmp_path: Path) -> None:
    """Numbers and JSON in a file made by hand with h5py."""
    with h5py.File(tmp_path / "a.h5", "w", **LATEST) as f:
        f["k/00000"] = IDS
        f.attrs.update({"complete": 1, "n": 3, "x": np.arange(3.0), "t": np.bytes_('{"a": [1]}')})
    assert H5(tmp_path / "a.h5").attributes == {"n": 3, "x": [0, 1, 2], "t": {"a": [1]}}


def test_bin_refuses(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.bin").touch()
    for name, dtype, why in (
        ("odd.bin", "uint16", "3 bytes"),
        ("empty.bin", "uint16", "0 bytes"),
        ("none.bin", "uint16", "no file"),
        ("", "uint16", "a folder"),
        ("odd.bin", "int8", "not int8"),
    ):
        with pytest.raises(Refusal) as caught:
            Bin({"k": tmp_path / name}, dtype)
        one_line(caught, why)


# ---------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with two keys, three data sets and attributes both small and large."""
    path = tmp_path_factory.mktemp("sound") / "sound.h5"
    arrays = {"train/tokens": [IDS[:3000], IDS[:7]], "train/mask": [IDS[:3000] > 9], "val": [IDS[:50].astype(np.int64)]}
    save_h5(path, arrays, {"etude": {"a": [1, 2]}, "large": "abcdefgh" * 10_000})
    return path


def everything(path: Path) -> dict[str, Any]:
    s = H5(path)
    return s.attributes | {k: [s.fetch(k, i, 0, n).tobytes() for i, n in enumerate(s.lengths(k))] for k in s.keys}


def ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Of each data set the bytes where its elements lie."""
    arrays = (a for several in hdf5.File(path).arrays.values() for a in several)
    return {a.name: (a.offset, a.offset + a.length * a.dtype.itemsize) for a in arrays if a.offset is not None}


def test_cut_short(sound: Path, tmp_path: Path) -> None:
    """A copy that was interrupted, wherever."""
    data, path = sound.read_bytes(), tmp_path / "a.h5"
    for n in sorted({0, 1, 7, 8, 9, 40, 48, *range(100, len(data), 3001), len(data) - 1}):
        path.write_bytes(data[:n])
        with pytest.raises(Refusal) as caught:
            H5(path).keys  # noqa: B018
        one_line(caught, path, "bring a whole copy" if n >= 48 or n == 0 else "")


def test_a_flipped_bit_in_the_elements(sound: Path, tmp_path: Path) -> None:
    """verify names the data set. Everything else is as it was."""
    data, path = bytearray(sound.read_bytes()), tmp_path / "a.h5"
    verify(sound)
    for name, (begin, end) in ranges(sound).items():
        for at in (begin, (begin + end) // 2, end - 1):
            data[at] ^= 16
            path.write_bytes(data)
            data[at] ^= 16
            with pytest.raises(Refusal) as caught:
                verify(path)
            one_line(caught, path, repr(name), "sha256")


FLIP = """
import random, sys
from pathlib import Path
from test_store import everything, ranges
from etude.errors import Refusal
from etude.data.store import verify

sound, path = Path(sys.argv[1]), Path(sys.argv[2])
data, good = bytearray(sound.read_bytes()), everything(sound)
inside = set()
for begin, end in ranges(sound).values():
    inside |= set(range(begin, end))
places, rng, counts = sorted(set(range(len(data))) - inside), random.Random(0), dict(refused=0, read=0)
for at in [*places[:48], *rng.sample(places, 350)]:
    bit = 1 << rng.randrange(8)
    data[at] ^= bit
    path.write_bytes(data)
    data[at] ^= bit
    try:
        assert everything(path) == good, f"byte {at} gives other elements"
        counts["read"] += 1
    except Refusal as error:
        assert str(error).isprintable() and str(path) in str(error), error
        counts["refused"] += 1
print(counts["refused"], counts["read"])
"""


def test_a_flipped_bit_in_the_structure(sound: Path, tmp_path: Path) -> None:
    """At hundreds of places, all of the superblock among them: refused, or nothing that is read depends on it. Never a
    crash, another exception or other elements: HDF5's oldest format had all three."""
    done = python(FLIP, sound, tmp_path / "a.h5")
    assert done.returncode == 0, done.stderr[-2000:]
    refused, read = map(int, done.stdout.split())
    assert refused > 100 and refused + read == 398


def test_no_checksum(tmp_path: Path) -> None:
    """verify does not call good what it cannot judge."""
    for missing in ("/", "k/00000"):
        save_h5(path := tmp_path / "a.h5", {"k": [IDS]})
        with h5py.File(path, "r+", libver=("v108", "v108")) as f:
            del f[missing].attrs["sha256"]
        with pytest.raises(Refusal) as caught:
            verify(path)
        one_line(caught, path, repr(missing), "no sha256")
        assert len(Flat(H5(path), "k")) == len(IDS)


def test_changed_attributes(tmp_path: Path) -> None:
    """They say what the ids mean, so opening compares them."""
    save_h5(path := tmp_path / "a.h5", {"k": [IDS]}, {"vocab": 5})
    with h5py.File(path, "r+", libver=("v108", "v108")) as f:
        f.attrs["vocab"] = np.bytes_("6")
    with pytest.raises(Refusal, match="attributes have another sha256") as caught:
        H5(path).attributes  # noqa: B018
    one_line(caught, path)


# ---------------------------------------------------------------- files that mean harm


def _dataset(f: h5py.File, name: str, shape: tuple[int, ...], dtype: Any = np.uint16, **plan: Any) -> Any:
    """A data set by h5py's lower half, which lets more through."""
    group, _, last = name.rpartition("/")
    p = h5p.create(h5p.DATASET_CREATE)
    for call, arguments in plan.items():
        getattr(p, call)(*arguments)
    kind = dtype if isinstance(dtype, h5t.TypeID) else h5t.py_create(np.dtype(dtype), logical=True)
    space = h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
    return h5d.create(f.require_group(group).id, last.encode(), kind, space, dcpl=p)


def _external_link(f: h5py.File) -> None:
    f.create_group("k")["00000"] = h5py.ExternalLink("/etc/hostname", "/x")


def _external_group(f: h5py.File) -> None:
    f["k"] = h5py.ExternalLink("other.h5", "/k")


def _soft_link(f: h5py.File) -> None:
    f["real/00000"] = IDS
    f.create_group("k")["00000"] = h5py.SoftLink("/real/00000")


def _dangling_link(f: h5py.File) -> None:
    f["k"] = h5py.SoftLink("/nowhere")


def _virtual(f: h5py.File) -> None:
    layout = h5py.VirtualLayout((10,), np.uint16)
    layout[:] = h5py.VirtualSource("other.h5", "k", (10,))
    f.create_virtual_dataset("k/00000", layout)


def _external_storage(f: h5py.File) -> None:
    f.create_dataset("k/00000", (4,), np.uint8, external=[("/etc/hostname", 0, 4)])


def _float64(f: h5py.File) -> None:
    f["k/00000"] = np.ones(3)


def _big_endian(f: h5py.File) -> None:
    f["k/00000"] = IDS.astype(">u2")


def _text(f: h5py.File) -> None:
    f["k/00000"] = ["a", "b"]


def _record(f: h5py.File) -> None:
    f["k/00000"] = np.zeros(3, dtype=[("a", "u2"), ("b", "f4")])


def _wide(f: h5py.File) -> None:
    """Ten of sixteen bits count: mapped as plain numbers they would be wrong."""
    kind = h5t.STD_U16LE.copy()
    kind.set_precision(10)
    h5d.DatasetID.write(_dataset(f, "k/00000", (3,), kind), h5s.ALL, h5s.ALL, IDS[:3].copy())


def _other_enum(f: h5py.File) -> None:
    f.create_dataset("k/00000", data=np.zeros(3, np.int8), dtype=h5py.enum_dtype({"NO": 0, "YES": 1}, "i1"))


def _two_dimensions(f: h5py.File) -> None:
    f["k/00000"] = np.ones((2, 3), np.uint16)


def _scalar(f: h5py.File) -> None:
    f["k/00000"] = np.uint16(3)


def _null(f: h5py.File) -> None:
    f["k/00000"] = h5py.Empty("u2")


def _absurd(f: h5py.File) -> None:
    f.create_dataset("k/00000", (10**15,), np.uint16, chunks=(1 << 20,))


def _absurd_gzip(f: h5py.File) -> None:
    f.create_dataset("k/00000", (10**15,), np.uint16, chunks=(1 << 20,), compression="gzip")[:10] = 1


def _absurd_contiguous(f: h5py.File) -> None:
    _dataset(f, "k/00000", (10**15,))


def _absurd_chunks(f: h5py.File) -> None:
    f.create_dataset("k/00000", (10**12,), np.uint8, chunks=(1 << 26,), compression="gzip")[:10] = 1


def _huge_chunk(f: h5py.File) -> None:
    f.create_dataset("k/00000", (1 << 26,), np.uint16, chunks=(1 << 26,), compression="gzip")


def _tiny_chunks(f: h5py.File) -> None:
    f.create_dataset("k/00000", (2_000_000,), np.uint16, chunks=(1,), fillvalue=0)


def _unwritten(f: h5py.File) -> None:
    f.create_dataset("k/00000", (1000,), np.uint16)


def _unwritten_chunks(f: h5py.File) -> None:
    f.create_dataset("k/00000", (1000,), np.uint16, chunks=(100,))[:950] = 1
    f.create_dataset("k/00001", (1000,), np.uint16, chunks=(100,))[:850] = 1


def _unfilled_gzip(f: h5py.File) -> None:
    d = f.create_dataset("k/00000", (1000,), np.uint16, chunks=(100,), compression="gzip")
    d[:300] = IDS[:300]


def _long_chunk(f: h5py.File) -> None:
    """A megabyte that would inflate to a gigabyte, as the chunk of a few hundred bytes."""
    d = f.create_dataset("k/00000", (100,), np.uint16, chunks=(100,), compression="gzip")
    d.id.write_direct_chunk((0,), b"x" * 1_000_000)


def _twice_compressed(f: h5py.File) -> None:
    p = h5p.create(h5p.DATASET_CREATE)
    p.set_chunk((100,))
    for _ in range(2):
        p.set_deflate(9)
    h5d.create(f.create_group("k").id, b"00000", h5t.NATIVE_UINT16, h5s.create_simple((1000,)), dcpl=p)


def _other_order(f: h5py.File) -> None:
    _dataset(f, "k/00000", (100,), set_chunk=((100,),), set_deflate=(9,), set_shuffle=())


def _huge_lzf_chunk(f: h5py.File) -> None:
    f.create_dataset("k/00000", (1 << 23,), np.uint8, chunks=(1 << 23,), compression="lzf")


def _unknown_filter(f: h5py.File) -> None:
    _dataset(f, "k/00000", (100,), set_chunk=((100,),), set_filter=(305, 1, (1, 2)))


def _plugin_filter(f: h5py.File) -> None:
    f.create_dataset("k/00000", data=IDS, chunks=(100,), scaleoffset=0)


def _cycle(f: h5py.File) -> None:
    b = f.create_group("a/b")
    b["back"] = f["a"]


def _cycle_to_root(f: h5py.File) -> None:
    f.create_group("a")["root"] = f["/"]


def _same_twice(f: h5py.File) -> None:
    f["k/00000"] = IDS
    f["k/00001"] = f["k/00000"]


def _too_deep(f: h5py.File) -> None:
    f["a/b/c/00000"] = IDS


def _at_the_top(f: h5py.File) -> None:
    f["00000"] = IDS


def _mixed(f: h5py.File) -> None:
    f["k/00000"] = IDS
    f["k/more/00000"] = IDS


def _named_otherwise(f: h5py.File) -> None:
    f["k/tokens"] = IDS


def _one_missing(f: h5py.File) -> None:
    f["k/00000"] = f["k/00002"] = IDS


def _named_type(f: h5py.File) -> None:
    f["k"] = np.dtype("u2")


def _ugly_name(f: h5py.File) -> None:
    h5d.create(f.id, b"bad\nname \x1b[31m \xff" + b"x" * 1000, h5t.NATIVE_UINT16, h5s.create_simple((1,)))


def _text_without_checksum(f: h5py.File) -> None:
    f["k/00000"] = IDS
    f.attrs["note"] = "of variable length"


def _not_json(f: h5py.File) -> None:
    f["k/00000"] = IDS
    f.attrs["note"] = np.bytes_("{")


def _deep_json(f: h5py.File) -> None:
    f["k/00000"] = IDS
    f.attrs["note"] = np.bytes_("[" * 60_000)


def _reference(f: h5py.File) -> None:
    f["k/00000"] = IDS
    f.attrs["note"] = f["k"].ref


def _unfinished(f: h5py.File) -> None:
    f["k/00000"] = IDS
    del f.attrs["complete"]


def _finished_in_words(f: h5py.File) -> None:
    f["k/00000"] = IDS
    f.attrs["complete"] = np.bytes_("no")


def _not_yet_finished(f: h5py.File) -> None:
    f["k/00000"] = IDS
    f.attrs["complete"] = False


HOSTILE: dict[Callable[[h5py.File], None], str] = {
    _external_link: "'k/00000': it is a link",
    _external_group: "'k': it is a link",
    _soft_link: "'k/00000': it is a link",
    _dangling_link: "'k': it is a link",
    _virtual: "'k/00000': it is a virtual data set",
    _external_storage: "'k/00000': its elements lie in another file",
    _float64: "'k/00000': its elements are floats of 64 bits",
    _big_endian: "'k/00000': its elements are big-endian unsigned integers of 16 bits",
    _text: "'k/00000': its elements are texts",
    _record: "'k/00000': its elements are records",
    _wide: "'k/00000': its elements are unsigned integers of 16 bits",
    _other_enum: "'k/00000': its elements are an enumeration",
    _two_dimensions: "'k/00000': it does not have one dimension",
    _scalar: "'k/00000': it does not have one dimension",
    _null: "'k/00000': it does not have one dimension",
    _absurd: "'k/00000': it has 953,674,317 chunks",
    _absurd_gzip: "'k/00000': it has 953,674,317 chunks",
    _absurd_chunks: "'k/00000': its 1,000,000,000,000 bytes were never written",
    _absurd_contiguous: "'k/00000': its 1,000,000,000,000,000 elements were never written",
    _huge_lzf_chunk: "'k/00000': its chunks have 8,388,608 bytes and 4,194,304",
    _huge_chunk: "'k/00000': its chunks have 134,217,728 bytes",
    _tiny_chunks: "'k/00000': it has 2,000,000 chunks",
    _unwritten: "'k/00000': its 1,000 elements were never written",
    _unwritten_chunks: "'k/00001': 1 of its 10 chunks were never written",
    _unfilled_gzip: "'k/00000': 7 of its 10 chunks were never written",
    _long_chunk: "'k/00000': 1 of its chunks cannot be true",
    _twice_compressed: "'k/00000': it is filtered more than once",
    _other_order: "'k/00000': it is filtered more than once, or in another order",
    _unknown_filter: "'k/00000': it needs HDF5's filter number 305",
    _plugin_filter: "'k/00000': it needs HDF5's filter number 6",
    _cycle: "several links lead to it",
    _cycle_to_root: "several links lead to it",
    _same_twice: "'k/00000': several links lead to it",
    _too_deep: "'a/b/c': it is a group too deep",
    _at_the_top: "'00000': a data set lies outside a group",
    _mixed: "'k': it has both groups and data sets",
    _named_otherwise: "'k/tokens': 'k/00000' was expected here",
    _one_missing: "'k/00002': ",
    _named_type: "'k': it is neither a group nor a data set",
    _ugly_name: "outside a group",
    _text_without_checksum: "'/@note': this text has no fixed length",
    _not_json: "'/@note': this attribute is not JSON",
    _deep_json: "recursion",
    _reference: "'/@note': this attribute is neither text nor numbers",
    _unfinished: "was not finished: run the command that made it again",
    _finished_in_words: "was not finished",
    _not_yet_finished: "was not finished",
}


def hostile(make: Callable[[h5py.File], None], path: Path, **options: Any) -> Path:
    with h5py.File(path, "w", **(LATEST | options)) as f:
        f.attrs["complete"] = True
        make(f)
    return path


@pytest.mark.parametrize("make", HOSTILE, ids=lambda f: f.__name__.strip("_"))
def test_refused(make: Callable[[h5py.File], None], tmp_path: Path) -> None:
    """One line that names the file, the place and the reason, at once, for each way to open it."""
    path = hostile(make, tmp_path / "a.h5")
    for use in (lambda: H5(path).keys, lambda: verify(path), lambda: load_h5(path)):
        start = time.process_time()
        with pytest.raises(Refusal) as caught:
            use()
        assert time.process_time() - start < 2
        one_line(caught, path, HOSTILE[make])


MEMORY = """
import resource, sys
from pathlib import Path
from test_store import HOSTILE
from etude.data.store import H5
from etude.errors import Refusal

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in Path(sys.argv[1]).glob("*.h5"):
    try:
        H5(path).keys
        raise AssertionError(path)
    except Refusal:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_refused_in_little_memory(tmp_path: Path) -> None:
    """All of them by one process, which takes no more than some megabytes for it."""
    for make in HOSTILE:
        hostile(make, tmp_path / f"{make.__name__}.h5")
    done = python(MEMORY, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 50_000, "kB"


def test_no_host_file_is_opened(tmp_path: Path) -> None:
    """A link to a named pipe, which would block whoever opens it: nobody does."""
    os.mkfifo(pipe := tmp_path / "pipe")

    def link(f: h5py.File) -> None:
        f["k"] = h5py.ExternalLink(str(pipe), "/")

    def virtual(f: h5py.File) -> None:
        layout = h5py.VirtualLayout((10,), np.uint16, maxshape=(None,))
        layout[:] = h5py.VirtualSource(str(pipe), "k", (10,), maxshape=(None,))
        f.create_virtual_dataset("k/00000", layout)

    def external(f: h5py.File) -> None:
        _dataset(f, "k/00000", (4,), np.uint8, set_external=(str(pipe).encode(), 0, 4))

    signal.alarm(20)
    for make in (link, virtual, external):
        with pytest.raises(Refusal):
            H5(hostile(make, tmp_path / "a.h5")).keys  # noqa: B018
    with pytest.raises(Refusal, match="not a regular file"):
        H5(pipe).keys  # noqa: B018
    signal.alarm(0)


def test_formats_without_checksums(tmp_path: Path) -> None:
    """HDF5's oldest format, and the lists of chunks of the next one: refused with what to type."""

    def plain(f: h5py.File) -> None:
        f["k/00000"] = IDS

    def chunked(f: h5py.File) -> None:
        f.create_dataset("k/00000", data=IDS, chunks=(100,))

    for make, libver, what in ((plain, "earliest", "oldest format"), (chunked, ("v108", "v108"), "list of its chunks")):
        with pytest.raises(Refusal) as caught:
            H5(hostile(make, tmp_path / "a.h5", libver=libver)).keys  # noqa: B018
        one_line(caught, what, "no checksums", 'libver="latest"')
    with h5py.File(hostile(plain, tmp_path / "a.h5", libver=("v108", "v108")), "r+", libver="earliest") as f:
        f["other/00000"] = IDS
    with pytest.raises(Refusal, match="no checksums"):
        H5(tmp_path / "a.h5").keys  # noqa: B018


def test_elements_beyond_the_end(sound: Path) -> None:
    """They would be mapped where there is no file, and reading them end the process with SIGBUS."""
    file = hdf5.File(sound)
    end = max(end for _, end in ranges(sound).values())
    for size, fits in ((end, True), (end - 1, False)):
        file.size = size
        names = [a.name for several in file.arrays.values() for a in several]
        refused = 0
        for name in names:
            try:
                file._array(name, file.h5[name].id, name)
            except Refusal as error:
                assert "beyond the file's" in str(error) and name in str(error)
                refused += 1
        assert refused == (0 if fits else 1)


def test_too_many_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted before they are opened; and the writer does not make what the reader refuses."""
    monkeypatch.setattr(hdf5, "MAX_OBJECTS", 50)
    with h5py.File(tmp_path / "a.h5", "w", **LATEST) as f:
        for i in range(51):
            f[f"k/{i:05d}"] = IDS[:1]
        f.attrs["complete"] = True
    with pytest.raises(Refusal, match="more than 50"):
        H5(tmp_path / "a.h5").keys  # noqa: B018
    with pytest.raises(Refusal, match="more than 50"):
        save_h5(tmp_path / "b.h5", {"k": [IDS[:1]] * 50})
    save_h5(tmp_path / "b.h5", {"k/l": [IDS[:1]] * 48})
    assert H5(tmp_path / "b.h5").lengths("k/l") == [1] * 48


@pytest.mark.parametrize("content, why", [(b"", "empty"), (b"abc", "not an HDF5"), (b"\x00" * 9000, "not an HDF5")])
def test_not_hdf5(content: bytes, why: str, tmp_path: Path) -> None:
    (path := tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(Refusal) as caught:
        H5(path).keys  # noqa: B018
    one_line(caught, path, why)


def test_no_file(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "a folder"), (tmp_path / "none.h5", "no file"), (Path("/dev/null"), "not a regular")):
        with pytest.raises(Refusal) as caught:
            H5(path).keys  # noqa: B018
        one_line(caught, path, why)


def test_damaged_chunk(tmp_path: Path) -> None:
    """Found when it is read, where a filter notices: a Refusal naming the data set."""
    with h5py.File(path := tmp_path / "a.h5", "w", **LATEST) as f:
        d = f.create_dataset("k/00000", data=IDS, chunks=(1000,), compression="gzip", fletcher32=True)
        at = d.id.get_chunk_info(3)
        f.attrs["complete"] = True
    data = bytearray(path.read_bytes())
    data[at.byte_offset + 100] ^= 1
    path.write_bytes(data)
    s = H5(path)
    assert np.array_equal(s.fetch("k", 0, 0, 3000), IDS[:3000])
    with pytest.raises(Refusal) as caught:
        s.fetch("k", 0, 2990, 3010)
    one_line(caught, path, "'k/00000'", "damaged")


BOMB = """
import resource, sys
from etude.data.store import H5
from etude.errors import Refusal

s = H5(sys.argv[1])
assert s.fetch("k", 0, 0, 10).tolist() == list(range(10))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    s.fetch("k", 0, 0, 2_000_000)
except Refusal as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def test_a_chunk_that_inflates_without_end(tmp_path: Path) -> None:
    """A quarter of a megabyte of gzip that is 256 MB: libhdf5 would make them, for a chunk of one."""
    with h5py.File(path := tmp_path / "a.h5", "w", **LATEST) as f:
        d = f.create_dataset("k/00000", (2_000_000,), np.uint8, chunks=(1_000_000,), compression="gzip")
        d[:] = np.arange(2_000_000).astype(np.uint8)
        d.id.write_direct_chunk((1_000_000,), zlib.compress(bytes(1 << 28), 9))
        f.attrs["complete"] = True
    done = python(BOMB, path)
    assert done.returncode == 0, done.stderr
    grown, _, message = done.stdout.partition(" ")
    assert int(grown) < 30_000, "kB"
    assert "'k/00000': chunk 1 is larger than it says" in message and str(path) in message


# ---------------------------------------------------------------- writing


def test_add_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of a flat file, in blocks, beside arrays; and one that it does not have."""
    monkeypatch.setattr(hdf5, "BLOCK", 64)
    IDS.tofile(tmp_path / "ids")
    with Writer(tmp_path / "a.h5") as out:
        out.add_file("t", tmp_path / "ids", "uint16", 0, 5000)
        out.add_file("t", tmp_path / "ids", "uint16", 5000, 5000)
        out.add("u", IDS[:100])
        out.add_file("u", tmp_path / "ids", "uint16", 17, 0)
        out.add_file("v", tmp_path / "ids", "int64", 3, 30)
        with pytest.raises(Refusal, match="has 10000 elements"):
            out.add_file("t", tmp_path / "ids", "uint16", 9000, 1001)
        with pytest.raises(Refusal, match="no file"):
            out.add_file("t", tmp_path / "none", "uint16", 0, 1)
    verify(tmp_path / "a.h5")
    s = H5(tmp_path / "a.h5")
    assert np.array_equal(Flat(s, "t")[:], IDS) and s.lengths("t") == [5000, 5000] and s.lengths("u") == [100, 0]
    assert np.array_equal(s.fetch("v", 0, 0, 30), np.fromfile(tmp_path / "ids", np.int64)[3:33])


COPY = """
import resource, sys
from etude.data.store import H5, Writer, verify

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Writer(sys.argv[2] + ".warm") as out:
    out.add_file("k", sys.argv[1], "uint16", 0, 5_000_000)
verify(sys.argv[2] + ".warm")
before = peak()
with Writer(sys.argv[2]) as out:
    out.add_file("k", sys.argv[1], "uint16", 0, 100_000_000)
verify(sys.argv[2])
print(peak() - before)
"""


def test_memory_of_copying(tmp_path: Path) -> None:
    """200 MB go from a file into an H5 file and are verified in a few."""
    with (tmp_path / "ids").open("wb") as f:
        f.truncate(200_000_000)
    done = python(COPY, tmp_path / "ids", tmp_path / "a.h5")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20_000, "kB"


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    save_h5(path := tmp_path / "a.h5", {"k": [IDS]})
    before = path.read_bytes()
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), Writer(path) as out:
            out.add("k", IDS[:3])
            raise error
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.h5"]
    with pytest.raises(ValueError, match="closed"):
        out.add("k", IDS)


FULL = """
import resource, sys
import numpy as np
from etude.data.store import save_h5
from etude.errors import StorageFault

path, limit, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
arrays = {"data": {"k": [np.ones(100_000, np.uint16)] * 4}, "structure": {f"{i}/k": [np.ones(1, np.uint8)] for i in range(300)}}
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save_h5(path, arrays.get(kind, {}), {"x": "a" * 400_000} if kind == "attributes" else None)
except StorageFault as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["data", "structure", "attributes"])
def test_full_disk(kind: str, tmp_path: Path) -> None:
    """A StorageFault naming the path, however far the writing came; the old file is whole and nothing else remains. By
    itself libhdf5 ended such processes with a segmentation fault."""
    save_h5(path := tmp_path / "a.h5", {"k": [IDS]})
    before = path.read_bytes()
    for limit in (0, 100, 3000, 60_000, 300_000):
        if kind == "structure" and limit == 300_000:
            continue
        done = python(FULL, path, limit, kind)
        assert done.returncode == 0 and not done.stderr, (limit, done.stderr[-2000:])
        assert str(path) in done.stdout and "File too large" in done.stdout and done.stdout.count("\n") == 1
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.h5"]


def test_interrupted_inside_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while libhdf5 writes: it is raised afterwards, and the library is left in order."""
    pwrite, calls = os.pwrite, itertools.count()

    def interrupted(*arguments: Any) -> int:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_h5(tmp_path / "a.h5", {f"k{i}": [IDS] for i in range(20)})
    assert not os.listdir(tmp_path) and next(calls) == 3, "nothing more is written: the number may be another file's"
    save_h5(tmp_path / "a.h5", {"k": [IDS]})
    verify(tmp_path / "a.h5")


KILLED = """
import os, signal, sys
import numpy as np
from etude.data.store import Writer

out = Writer(sys.argv[1])
out.add("k", np.ones(1_000_000, np.uint16))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    """The old file stays, and the next one to write takes over what was left."""
    save_h5(path := tmp_path / "a.h5", {"k": [IDS]})
    before = path.read_bytes()
    assert python(KILLED, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == before and len(os.listdir(tmp_path)) == 2
    save_h5(path, {"k": [IDS[:9]]})
    verify(path)
    assert H5(path).lengths("k") == [9] and os.listdir(tmp_path) == ["a.h5"]
    save_h5(tmp_path / "fresh.h5", {"k": [IDS[:9]]})
    assert path.read_bytes() == (tmp_path / "fresh.h5").read_bytes(), "nothing is left of it"


def test_two_writers(tmp_path: Path) -> None:
    """The second is refused and does no harm to the first."""
    with Writer(path := tmp_path / "a.h5") as out:
        out.add("k", IDS)
        with pytest.raises(Refusal) as caught:
            Writer(path)
        one_line(caught, path, "another process")
        out.add("k", IDS)
    verify(path)
    assert H5(path).lengths("k") == [len(IDS)] * 2


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFault) as caught:
        save_h5(tmp_path / "file" / "a.h5", {})
    one_line(caught, tmp_path / "file" / "a.h5")
    with pytest.raises(Refusal, match="is a folder"):
        save_h5(tmp_path, {})
    save_h5(tmp_path / "new" / "folder" / "a.h5", {"k": [IDS]})
    verify(tmp_path / "new" / "folder" / "a.h5")


def test_torch_is_not_imported() -> None:
    """Preparing data must not wait for it."""
    done = python("import sys, etude.data.store; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr
