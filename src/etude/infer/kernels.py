"""CPU kernels of our own, in C (kernels.c), compiled on first use and called with tensors.

An output row's bits depend on that row's inputs alone: not on how many rows stand beside it, in which order, on how many
threads compute them, nor, in attention, on how positions are cut over calls and pages. Tensors are fp32 or bf16 on the CPU
and contiguous where nothing else is said; sums are fp32. M rows, K input and N output channels, H heads, D channels."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")
GROUP = 32  # channels that share a scale in 8 bits
CHUNK = 256  # positions that attention takes as one; kernels.c has the same number
BLOCK = 16  # rows of a prompt that are attended together
GATES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}

# ------------------------------------------------------------------------------------------------ compiling

# No contraction of a * b + c by the compiler's choice: the same row would round differently in two loops.
FLAGS = "-std=c11 -D_GNU_SOURCE -O3 -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi".split()
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "avx2", "fma", "f16c", "bmi2"}


def available() -> bool:
    """Whether the kernels can be used here; the first call compiles them, some seconds, unless a process before has."""
    return _library()[0] is not None


def why_not() -> str:
    """Why they cannot be, or nothing."""
    return _library()[1]


@functools.cache
def _library() -> tuple[Any, str]:
    """-> (the loaded library or None, why there is none)."""
    compiler = _compiler()
    if compiler is None:
        return None, "there is no C compiler; install gcc or name one in $CC"
    try:
        folder = _folder()
        with _alone(folder):
            path, why = _build(compiler, folder)
    except OSError as error:
        return None, f"the C kernels could not be built: {error}"
    return (None, why) if path is None else (_open(path), "")


def _compiler() -> list[str] | None:
    named = os.environ.get("CC", "").strip()
    for command in [shlex.split(named)] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    return None


def _folder() -> Path:
    """Where compiled kernels are kept: the cache, or where that cannot be written a folder for this process."""
    folder = Path(os.environ.get("ETUDE_CACHE") or "~/.cache/etude").expanduser() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError:
        return Path(_temporary().name)


@functools.cache
def _temporary() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="etude-kernels-")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: ranks and jobs that start together wait for the first one's library. Where a file system has no
    locks each of them compiles, which does no harm."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _build(compiler: list[str], folder: Path) -> tuple[Path | None, str]:
    """-> (a library that passed its test in a process of its own, or None; why there is none). The answer is kept under a
    name that says what it depends on, so that it is looked for once."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    features = _cpu()
    depends: list[Any] = [
        SOURCE.read_text(encoding="utf-8"),
        Path(__file__).read_text(encoding="utf-8"),
        version,
        compiler,
    ]
    depends += [sorted(features), platform.machine()]
    name = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:24]
    library, verdict = folder / f"{name}.so", folder / f"{name}.json"
    with contextlib.suppress(OSError, ValueError):
        why = json.loads(verdict.read_text(encoding="utf-8"))["why"]
        if why or library.exists():
            return (None, why) if why else (library, "")
    why = ""
    for flags in _attempts(features):
        with tempfile.TemporaryDirectory(dir=folder) as room:
            built = Path(room) / library.name
            why = _compile(compiler, flags, built) or _test(built)
            if not why:
                os.replace(built, library)
        if not why:
            break
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
        json.dump({"why": why}, file)
    os.replace(file.name, verdict)
    return (None, why) if why else (library, "")


def _attempts(features: set[str]) -> list[list[str]]:
    """Flags, the fastest first. What the compiler takes for this machine's own can be more than a virtual machine runs."""
    machines = [["-march=native"]]
    if platform.machine() in ("x86_64", "AMD64"):
        if features >= _AVX512:
            machines.append([f"-m{f.replace('_', '')}" for f in sorted(_AVX512)])
        if features >= {"avx2", "fma"}:
            machines.append(["-mavx2", "-mfma"])
    machines.append([])
    return machines


def _cpu() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("flags", "features")):
                return set(line.split(":")[1].split())
    return set(platform.processor().split())


def _compile(compiler: list[str], flags: list[str], to: Path) -> str:
    """-> why it failed, or nothing."""
    whole = ["-Wl,-z,defs"] if sys.platform == "linux" else []  # a missing function is found now, not when it is called
    object_file = to.with_suffix(".o")
    first = [*compiler, *FLAGS, *flags, f"-DGROUP={GROUP}", "-c", str(SOURCE), "-o", str(object_file)]
    for command in (first, [*compiler, "-shared", str(object_file), *whole, "-lm", "-pthread", "-o", str(to)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [
                x for x in done.stderr.splitlines() if "error" in x or "undefined" in x
            ] or done.stderr.splitlines()
            return f"{shlex.join(compiler)} cannot compile the C kernels: {lines[0] if lines else done.returncode}"
    return ""


def _test(library: Path) -> str:
    """Run the library's self-test in a process that may die; -> what went wrong, or nothing."""
    program = (
        f"from etude.infer import kernels as k; k._library = lambda: (k._open({str(library)!r}), ''); k.self_test()"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=env)
    except subprocess.TimeoutExpired:
        return "the compiled C kernels hang in their self-test"
    if done.returncode < 0:
        return f"the compiled C kernels die in their self-test of signal {-done.returncode}"
    last = done.stderr.strip().splitlines()[-1:] or [str(done.returncode)]
    return f"the compiled C kernels fail their self-test: {last[0]}" if done.returncode else ""


def _open(path: Path | str) -> Any:
    # PyDLL keeps the GIL: a call takes microseconds, and giving it up three hundred times a step would have it fought for.
    library = ctypes.PyDLL(str(path))
    for name in ("linear", "linear_int8", "rms_norm", "rope", "glu", "attend", "add", "replay"):
        getattr(library, name).argtypes = [ctypes.c_char_p]
        getattr(library, name).restype = ctypes.c_int
    return library


@functools.cache
def _function(name: str) -> Callable[[bytes], int]:
    library, why = _library()
    if library is None:
        raise RuntimeError(why)
    return getattr(library, name)


class _Here(threading.local):
    """Of this thread: engines may run in several."""

    count: int | None = None  # threads that kernels use, where torch has but one
    tape: list[tuple[str, bytes]] | None = None  # calls that are written down


_here = _Here()


def _call(name: str, arguments: bytes) -> int:
    if _here.tape is not None:
        _here.tape.append((name, arguments))
    return _function(name)(arguments)


# ------------------------------------------------------------------------------------------------ calling

# A call passes one block of memory with the fields of the C function's struct, which takes a third of the time of as many
# arguments.
_LINEAR, _NORM, _ROPE, _GATE, _ATTEND = Struct("10q"), Struct("11qd"), Struct("13q"), Struct("7q"), Struct("35qd")
_LINEAR_INT8, _ADD = Struct("11q"), Struct("5qd")
_BF = {torch.float32: 0, torch.bfloat16: 1}


def threads() -> int:
    """How many the kernels use."""
    return _here.count or torch.get_num_threads()


@contextlib.contextmanager
def alone(count: int) -> Iterator[None]:
    """Within it `count` threads are the kernels', and torch's own operations have one: its pool's threads go on spinning
    after each of them, on the cores that the kernels' threads want."""
    before, _here.count = _here.count, count
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        _here.count = before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K), weight (N, K) of the same dtype, bias (N,) or None -> (M, N), rounded once."""
    (M, K), N, bf = x.shape, weight.shape[0], _BF[x.dtype]
    assert weight.shape[1] == K and weight.dtype == x.dtype and x.is_contiguous() and weight.is_contiguous()
    y = torch.empty((M, N), dtype=x.dtype)
    at, b_bf = _bias(bias, N)
    if M:
        count = threads() if M * N * K > 1 << 17 else 1
        _call("linear", _LINEAR.pack(x.data_ptr(), weight.data_ptr(), at, y.data_ptr(), bf, b_bf, M, N, K, count))
    return y


def _bias(bias: Tensor | None, N: int) -> tuple[int, int]:
    if bias is None:
        return 0, 0
    assert bias.shape[0] == N and bias.is_contiguous()
    return bias.data_ptr(), _BF[bias.dtype]


class Int8(NamedTuple):
    """A weight in 8 bits: panels of 16 outputs (the last filled up), in which four inputs of each output lie side by side."""

    weight: Tensor  # (N / 16, K / 4, 16, 4) uint8: the value and 128
    scale: Tensor  # (N / 16, K / GROUP, 16) bf16
    shape: tuple[int, int]  # N, K


def quantize(weight: Tensor) -> Int8:
    """weight (N, K), to the nearest of 255 steps between the largest magnitudes of each GROUP inputs of an output."""
    N, K = weight.shape
    w = F.pad(weight.detach().float(), (0, -K % GROUP, 0, -N % 16)).unflatten(1, (-1, GROUP))
    exact = w.abs().amax(-1) / 127
    scale = exact.bfloat16()
    # One bf16 up where it was rounded down, lest the largest weight fall beyond the last step.
    scale = torch.where(scale.float() < exact, (scale.view(torch.int16) + 1).view(torch.bfloat16), scale)
    q = torch.where(scale[..., None] > 0, w / scale.float()[..., None], 0.0).round_().clamp_(-127, 127) + 128
    q = q.to(torch.uint8).view(len(w) // 16, 16, -1, 4).transpose(1, 2).contiguous()
    return Int8(q, scale.view(len(w) // 16, 16, -1).transpose(1, 2).contiguous(), (N, K))


def linear_int8(x: Tensor, q: Int8, bias: Tensor | None = None) -> Tensor:
    """x (M, K), quantised by the same groups as it comes -> (M, N) in x's dtype."""
    (M, K), (N, inputs), bf = x.shape, q.shape, _BF[x.dtype]
    assert inputs == K and x.is_contiguous()
    y = torch.empty((M, N), dtype=x.dtype)
    at, b_bf = _bias(bias, N)
    if M:
        count = threads() if M * N * K > 1 << 18 else 1
        ours = q.weight.data_ptr(), q.scale.data_ptr()
        args = _LINEAR_INT8.pack(x.data_ptr(), *ours, at, y.data_ptr(), bf, b_bf, M, N, K, count)
        if _call("linear_int8", args):
            raise MemoryError(f"no memory to quantise {M} x {K} numbers")
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (M, D) or (M, H, D), of which only the channels need lie side by side, weight (D,) of either dtype -> like x,
    contiguous."""
    D = x.shape[-1]
    H, head = (x.shape[1], x.stride(1)) if x.ndim == 3 else (1, 0)
    assert weight.shape[0] == D and (D == 1 or x.stride(-1) == 1) and weight.is_contiguous()
    y, M = torch.empty(x.shape, dtype=x.dtype), x.shape[0] * H
    if M == 0:
        return y
    count, bf = threads() if M * D > 1 << 17 else 1, _BF[x.dtype]
    row = x.stride(0)
    _call(
        "rms_norm",
        _NORM.pack(
            x.data_ptr(), weight.data_ptr(), y.data_ptr(), bf, _BF[weight.dtype], M, D, H, row, head, count, eps
        ),
    )
    return y


def rope(x: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """Turn the first D_r channels of x (M, H, D), of which only the channels need lie side by side; cos and sin (M, D_r) fp32
    as model.rope.angles makes them; `half`: its layout -> contiguous (M, H, D)."""
    (M, H, D), turned = x.shape, cos.shape[1]
    row, head, one = x.stride()
    assert (one == 1 or D == 1) and cos.shape[0] == M and sin.shape == cos.shape and turned <= D and turned % 2 == 0
    assert cos.is_contiguous() and sin.is_contiguous() and cos.dtype == sin.dtype == torch.float32
    y = torch.empty((M, H, D), dtype=x.dtype)
    count = threads() if M * H * D > 1 << 15 else 1
    _call(
        "rope",
        _ROPE.pack(
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            y.data_ptr(),
            _BF[x.dtype],
            M,
            H,
            D,
            turned,
            half,
            row,
            head,
            count,
        ),
    )
    return y


def add(x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
    """x + factor * y, rounded once; contiguous, of one shape and dtype."""
    assert x.shape == y.shape and x.dtype == y.dtype and x.is_contiguous() and y.is_contiguous()
    total = torch.empty_like(x)
    _call("add", _ADD.pack(x.data_ptr(), y.data_ptr(), total.data_ptr(), _BF[x.dtype], x.numel(), factor))
    return total


def glu(h: Tensor, activation: str) -> Tensor:
    """h (M, 2 H) -> activation(h[:, :H]) * h[:, H:], one of GATES."""
    M, H = h.shape[0], h.shape[1] // 2
    assert h.is_contiguous() and h.shape[1] == 2 * H
    y = torch.empty((M, H), dtype=h.dtype)
    count = threads() if M * H > 1 << 13 else 1
    _call("glu", _GATE.pack(h.data_ptr(), y.data_ptr(), _BF[h.dtype], M, H, GATES[activation], count))
    return y


class Plan:
    """Who attends to what, made once a step and used by all layers.

    `tables` (S, P) int32: the page numbers of each sequence; `rows_of`: (sequence, position of the first row, rows) in the
    order of the rows. A row at position p sees positions 0..p of its sequence. A sequence of -1 is padding.

    Rows are dealt out as tasks: blocks of rows with all they see, or, where sequences begin with the same pages or one
    block is a large part of the work, single chunks of CHUNK positions for all rows that see them, whose keys and values
    are then read once."""

    def __init__(self, page_size: int, tables: np.ndarray, rows_of: Sequence[tuple[int, int, int]]):
        self.page_size, self.tables = page_size, np.ascontiguousarray(tables, dtype=np.int32)
        starts, blocks, N = [], [], 0
        for sequence, start, n in rows_of:
            starts.append(np.arange(start, start + n, dtype=np.int32))
            if sequence >= 0:
                step = n if n < 2 * BLOCK else BLOCK
                blocks += [(sequence, start + i, N + i, min(step, n - i)) for i in range(0, n, step)]
            N += n
        self.n_rows = N
        self.positions = np.concatenate(starts) if starts else np.zeros(0, np.int32)
        self.partials = np.full(N, -1, dtype=np.int32)
        self.cost = int(self.positions.sum()) + N
        shared = self._shared(blocks)
        tasks: list[tuple[int, list[int], int, int, int]] = []  # cost, rows, sequence, chunks from .. to
        by_chunk: dict[tuple[int, bytes | int], tuple[int, list[int]]] = {}
        self.n_partials = 0
        for i, (sequence, start, row, n) in enumerate(blocks):
            cost, end = n * (start + n), start + n
            chunks = -(-end // CHUNK)
            if i not in shared and (4 * cost <= self.cost or chunks == 1):
                tasks.append((cost, list(range(row, row + n)), sequence, 0, chunks))
                continue
            self.partials[row : row + n] = range(self.n_partials, self.n_partials + n * chunks, chunks)
            self.n_partials += n * chunks
            for c in range(chunks):
                # A chunk that is not full is still written to: nobody shares it.
                key = self._pages(sequence, c) if i in shared and (c + 1) * CHUNK <= start else sequence
                by_chunk.setdefault((c, key), (sequence, []))[1].extend(range(row, row + n))
        for (c, _), (sequence, rows) in by_chunk.items():
            for i in range(0, len(rows), 64):
                tasks.append((CHUNK * len(rows[i : i + 64]), rows[i : i + 64], sequence, c, c + 1))
        tasks.sort(key=lambda t: -t[0])
        self.rows = np.array([r for t in tasks for r in t[1]], dtype=np.int32)
        counts = np.array([len(t[1]) for t in tasks], dtype=np.int32)
        self.tasks = np.empty((len(tasks), 5), dtype=np.int32)
        self.tasks[:, 0], self.tasks[:, 1] = counts.cumsum() - counts, counts
        self.tasks[:, 2:] = [t[2:] for t in tasks] if tasks else 0
        arrays = self.positions, self.partials, self.rows, self.tasks, self.tables
        self.pointers = tuple(a.ctypes.data for a in arrays)
        self._scratch: Tensor = torch.empty(0)

    def _pages(self, sequence: int, chunk: int) -> bytes:
        first, last = chunk * CHUNK // self.page_size, ((chunk + 1) * CHUNK - 1) // self.page_size
        return self.tables[sequence, first : last + 1].tobytes()

    def _shared(self, blocks: list[tuple[int, int, int, int]]) -> set[int]:
        """Blocks of few rows whose first chunk has the pages of another one's."""
        by_first: dict[bytes, list[int]] = {}
        for i, (sequence, start, _, n) in enumerate(blocks):
            if n < BLOCK and start >= CHUNK:
                by_first.setdefault(self._pages(sequence, 0), []).append(i)
        return {i for same in by_first.values() if len({blocks[i][0] for i in same}) > 1 for i in same}

    def scratch(self, heads: int, width: int) -> int:
        """The address of room for the results of single chunks."""
        size = self.n_partials * heads * (16 + -(-width // 64) * 64)
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size)
        return self._scratch.data_ptr()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slots: Tensor,
    plan: Plan,
    scale: float,
    window: int | None,
    dv: int,
) -> Tensor:
    """Store k (N, H_kv, D_k) and v (N, H_kv, dv) in the caches (slots, H_kv, D) at `slots` (N,) int64, slot = page *
    page_size + offset; then each row of q (N, H, D_k) attends to its positions of `plan`, at most the last `window`, itself
    among them -> contiguous (N, H, dv). A row of slot -1 is padding: it is not stored, and zeros come out.

    v None: the values are the keys' first dv channels (MLA). One dtype; only channels need lie side by side."""
    N, H, Dk = q.shape
    y = torch.empty((N, H, dv), dtype=q.dtype)
    work = plan.cost * H * (Dk + dv)
    assert plan.n_rows == N == slots.shape[0] and slots.dtype == torch.int64 and slots.is_contiguous()
    if N and _call(
        "attend",
        _pack(
            q, k, v, k_cache, v_cache, slots, y.data_ptr(), plan, scale, window, dv, threads() if work > 1 << 19 else 1
        ),
    ):
        raise MemoryError(f"no memory to attend with {H} heads of {dv} channels")
    return y


def _pack(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slots: Tensor,
    out: int,
    plan: Plan,
    scale: float,
    window: int | None,
    dv: int,
    threads: int,
) -> bytes:
    (N, H, Dk), kv = q.shape, k_cache.shape[1]
    q_row, q_head, q_one = q.stride()
    k_row, k_head, k_one = k.stride()
    k_slot, k_cache_head, k_cache_one = k_cache.stride()
    assert q.dtype == k.dtype == k_cache.dtype and k.shape == (N, kv, Dk) and k_cache.shape[2] == Dk and H % kv == 0
    assert Dk == 1 or q_one == k_one == k_cache_one == 1
    if v is None or v_cache is None:
        assert dv <= Dk
        at, v_at, v_row, v_head, v_slot, v_cache_head = 0, k_cache.data_ptr(), 0, 0, k_slot, k_cache_head
    else:
        assert v.shape == (N, kv, dv) and v_cache.shape[1:] == (kv, dv) and v.dtype == v_cache.dtype == q.dtype
        at, v_at, (v_row, v_head, v_one), (v_slot, v_cache_head, v_cache_one) = (
            v.data_ptr(),
            v_cache.data_ptr(),
            v.stride(),
            v_cache.stride(),
        )
        assert dv == 1 or v_one == v_cache_one == 1
    made = *plan.pointers, plan.scratch(H, dv), len(plan.tasks), plan.tables.shape[1], plan.page_size
    return _ATTEND.pack(
        q.data_ptr(),
        k.data_ptr(),
        at,
        k_cache.data_ptr(),
        v_at,
        out,
        slots.data_ptr(),
        *made[:6],
        _BF[q.dtype],
        N,
        H,
        kv,
        Dk,
        dv,
        q_row,
        q_head,
        k_row,
        k_head,
        v_row,
        v_head,
        k_slot,
        k_cache_head,
        v_slot,
        v_cache_head,
        *made[6:],
        window or 1 << 40,
        at != 0,
        threads,
        scale,
    )


# ------------------------------------------------------------------------------------------------ whole forwards

_PLAN, _COUNTS, _THREADS = Struct("6q"), Struct("3q"), Struct("q")  # what an _ATTEND has of a plan, and where
_PLAN_AT, _COUNTS_AT, _THREADS_AT = 7 * 8, 29 * 8, 34 * 8
_HEADS = Struct("4q")  # H, H_kv, Dk, Dv
_HEADS_AT = 15 * 8


class Calls:
    """The kernels that a function called, to be called again in one go, in the same memory: what they read and write is to
    be kept alive, and to be filled anew, by whoever made it. Only the plan of attentions may be another one.

    `with Calls() as calls: ...` writes down, `calls.replay(plan)` calls again."""

    def __enter__(self) -> "Calls":
        assert _here.tape is None
        self._made: list[tuple[str, bytes]] = []
        _here.tape = self._made
        return self

    def __exit__(self, *exception: object) -> None:
        _here.tape = None
        offsets = [0]
        for _, arguments in self._made:
            offsets.append(offsets[-1] + len(arguments))
        self._arguments = ctypes.create_string_buffer(b"".join(a for _, a in self._made), offsets[-1] + 8)
        start = ctypes.addressof(self._arguments)
        library = _library()[0]
        address = {n: ctypes.cast(getattr(library, n), ctypes.c_void_p).value for n, _ in self._made}
        pairs = [x for (name, _), at in zip(self._made, offsets) for x in (address[name], start + at)]
        self._calls = Struct(f"{len(pairs) + 2}q").pack(*pairs, 0, 0)
        self._attends = [
            (at, *_HEADS.unpack_from(arguments, _HEADS_AT))
            for (name, arguments), at in zip(self._made, offsets)
            if name == "attend"
        ]

    def replay(self, plan: Plan) -> None:
        fixed = len(plan.tasks), plan.tables.shape[1], plan.page_size
        for at, heads, _, dk, dv in self._attends:
            _PLAN.pack_into(self._arguments, at + _PLAN_AT, *plan.pointers, plan.scratch(heads, dv))
            _COUNTS.pack_into(self._arguments, at + _COUNTS_AT, *fixed)
            count = threads() if plan.cost * heads * (dk + dv) > 1 << 19 else 1
            _THREADS.pack_into(self._arguments, at + _THREADS_AT, count)
        if _function("replay")(self._calls):
            raise MemoryError("no memory to attend or to quantise")


# ------------------------------------------------------------------------------------------------ self-test


def self_test() -> None:
    """Run each kernel on small inputs with one and two threads against plain torch in fp64. Raises AssertionError; on a
    machine that lacks an instruction the process dies."""
    g = torch.Generator().manual_seed(0)

    def near(what: str, y: Tensor, wanted: Tensor, tolerance: float) -> None:
        error = ((y.double() - wanted).abs().max() / wanted.abs().max()).item()
        assert error < tolerance, f"{what} ({y.dtype}) is off by {error:.1e}"

    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):

            def random(*shape: int) -> Tensor:
                return torch.randn(shape, generator=g).to(dtype)  # noqa: B023

            for M, K, N in ((1, 200, 700), (7, 200, 700), (3, 37, 19)):
                x, w, b = random(M, K), random(N, K), random(N)
                wanted = x.double() @ w.double().T + b.double()
                near("linear", linear(x, w, b), wanted, tolerance)
                # Whole numbers with a 127 in each group are on the grid of 8 bits: nothing is lost.
                x, w = ((t * 40).round().clamp(-127, 127) for t in (x, w))
                x[:, ::16], w[:, ::16] = 127, -127
                near("linear_int8", linear_int8(x, quantize(w)), x.double() @ w.double().T, tolerance)
            x, w = random(5, 37), random(37)
            wanted = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double()
            near("rms_norm", rms_norm(x, w, 1e-5), wanted, tolerance)
            x, angle = random(5, 2, 37), torch.rand(5, 17, generator=g)
            cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
            other, turned = x[..., :34].double().roll(17, -1), x.double()
            turned[..., :34] = turned[..., :34] * cos[:, None].double() + other * sin[:, None].double()
            near("rope", rope(x, cos, sin, True), turned, tolerance)
            near("add", add(x, x.flip(0).contiguous(), 0.5), x.double() + 0.5 * x.flip(0).double(), tolerance)
            h = random(5, 74)
            near("glu", glu(h, "silu"), F.silu(h[:, :37].double()) * h[:, 37:].double(), tolerance)
            # One sequence of 300 positions, whose last three are computed now.
            q, keys, values = random(3, 4, 24), random(320, 2, 24), random(320, 2, 40)
            plan = Plan(32, np.arange(10)[None], [(0, 297, 3)])
            y = attend(
                q,
                keys[297:300].clone(),
                values[297:300].clone(),
                keys,
                values,
                torch.arange(297, 300),
                plan,
                0.2,
                None,
                40,
            )
            for i in range(3):
                k, v = (t[: 298 + i].double().repeat_interleave(2, 1) for t in (keys, values))
                weights = (torch.einsum("hd,lhd->hl", q[i].double(), k) * 0.2).softmax(-1)
                near("attend", y[i], torch.einsum("hl,lhd->hd", weights, v), tolerance)
