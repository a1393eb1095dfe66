"""Processes, devices and what they share. The only module that reads the environment."""

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from etude.errors import Interrupted, Refusal

# torch is imported in the functions that need it: a launcher that only starts others stays light.


@dataclasses.dataclass
class World:
    """This process among its peers. `sum`, `gather` and `broadcast` are no-ops in a world of one."""

    rank: int
    size: int
    device: Any  # torch.device

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise sum over the ranks, in fp64."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        device = self.device if dist.get_backend() == "nccl" else torch.device("cpu")
        t = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(t)
        return t.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order, on rank 0; on the others an empty list."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, found, dst=0)
        return found or []

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (JSON-like) on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


class Single:
    """One process on `device` (auto: cuda, else mps, else cpu)."""

    def __init__(self, *, device: str):
        self.device = device

    def launch(self, work: Callable[..., int], *args: Any) -> int:
        """Run work(*args) here; -> its exit code."""
        return work(*args)

    @contextlib.contextmanager
    def world(self, threads: int | None) -> Iterator[World]:
        """This process as a World, with its threads and allocator set."""
        import torch

        settle(threads or cores())
        yield World(0, 1, torch.device(pick_device(self.device)))

    def wrap(self, model: Any, world: World) -> Any:
        return model

    def sync_gradients(self, model: Any, last: bool) -> Any:
        """A context in which backward leaves the gradients unsummed, unless it is the last micro-batch's."""
        return contextlib.nullcontext()


class DDP:
    """`nproc` processes that each hold the model and share the batch (torch DistributedDataParallel). Started here, or
    by torchrun, whose count then holds. `backend` auto: nccl on cuda, else gloo; `timeout` in seconds."""

    def __init__(self, *, nproc: int, device: str, backend: str, timeout: float):
        if nproc < 1:
            raise Refusal(f"parallel.nproc={nproc} should be at least 1")
        self.nproc, self.device, self.backend, self.timeout = nproc, device, backend, timeout

    def launch(self, work: Callable[..., int], *args: Any) -> int:
        """Run work(*args) in every process; -> the exit code that says most about what went wrong.

        When one ends badly the others have a moment to end by themselves and are then stopped; signals are passed on.
        The children end with this process, however it ends."""
        if "RANK" in os.environ:
            return work(*args)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.nproc),
            "LOCAL_WORLD_SIZE": str(self.nproc),
        }
        children = [
            context.Process(
                target=_child,
                args=(os.getpid(), shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, work, args),
                name=f"rank {r}",
            )
            for r in range(self.nproc)
        ]
        for child in children:
            child.start()

        def forward(signum: int, frame: Any) -> None:
            for child in children:
                if child.is_alive() and child.pid:
                    os.kill(child.pid, signum)

        before = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            return _wait(children)
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    @contextlib.contextmanager
    def world(self, threads: int | None) -> Iterator[World]:
        import torch
        import torch.distributed as dist

        local, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        settle(threads or max(1, cores() // local_size))
        kind = pick_device(self.device)
        device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(device)
        backend = ("nccl" if kind == "cuda" else "gloo") if self.backend == "auto" else self.backend
        dist.init_process_group(backend, timeout=timedelta(seconds=self.timeout))
        try:
            yield World(dist.get_rank(), dist.get_world_size(), device)
            dist.barrier()  # no rank takes the group down while another still writes its summary
        finally:
            dist.destroy_process_group()

    def wrap(self, model: Any, world: World) -> Any:
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(
            model, device_ids=[world.device] if world.device.type == "cuda" else None, gradient_as_bucket_view=True
        )

    def sync_gradients(self, model: Any, last: bool) -> Any:
        return contextlib.nullcontext() if last else model.no_sync()


def _child(parent: int, environment: dict[str, str], work: Callable[..., int], args: tuple) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphans
        if os.getppid() != parent:
            os._exit(1)
    os.environ.update(environment)
    code = work(*args)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: gloo's threads may outlive its group for a moment, and an interpreter that is torn down around them
    # aborts now and then. Everything of ours is closed by now.
    os._exit(code)


def _wait(children: list, grace: float = 15.0) -> int:
    """Exit code of the whole: 0 if every child's is. One that dies gives the others `grace` seconds, 2 if it was killed."""
    deadline = None
    named: set[str] = set()

    def look() -> bool:
        """Name the children that were killed; whether one of them just was."""
        killed = [c for c in children if not c.is_alive() and (c.exitcode or 0) < 0 and c.name not in named]
        for c in killed:
            named.add(c.name)
            print(f"error: {c.name} was killed by signal {signal.Signals(-c.exitcode).name}", file=sys.stderr)
        return bool(killed)

    while any(c.is_alive() for c in children):
        time.sleep(0.05)
        if look():
            deadline = time.monotonic() + 2
        elif deadline is None and any(c.exitcode for c in children if not c.is_alive()):
            deadline = time.monotonic() + grace
        if deadline and time.monotonic() > deadline:
            for c in children:
                if c.is_alive():
                    named.add(c.name)
                    print(f"error: {c.name} does not answer and is stopped", file=sys.stderr)
                    c.kill()
            deadline = time.monotonic() + grace
    look()
    codes = [c.exitcode for c in children]
    told = [c for c in codes if c is not None and c > 1]  # 2 to 5 say what happened; 1 and signals only that it did
    return told[0] if told else next((1 if c < 0 else c for c in codes if c), 0)


def rank() -> int:
    """This process's rank by what its launcher set; 0 without one."""
    return int(os.environ.get("RANK", 0))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settle(threads: int) -> None:
    """Set the thread count, and have freed memory stay with the process: by default glibc gives large blocks back to the
    system, which then clears their pages again at every step (a tenth to a fifth of a small model's step)."""
    import torch

    torch.set_num_threads(threads)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def deterministic(on: bool) -> None:
    """Only algorithms that repeat to the bit; on CUDA its matrix library needs a fixed workspace for that."""
    import torch

    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)


def pick_device(name: str) -> str:
    """cuda, mps or cpu; auto takes the first that is there. Raises Refusal for one that is not."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(n for n, ok in there.items() if ok)
    if not there.get(name, False):
        raise Refusal(f"device {name} is not here; use auto or one of {', '.join(n for n, ok in there.items() if ok)}")
    return name


def pick_precision(name: str, device: Any) -> str:
    """fp32 or bf16; auto is bf16 on hardware that multiplies it faster than fp32: CUDA from Ampere on, CPUs with AMX or
    AVX512-BF16 (there 4 times as fast, measured)."""
    import torch

    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu":
        return "bf16" if any(cpu_flag(f) for f in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")) else "fp32"
    return "fp32"


def cpu_flag(name: str) -> bool:
    import torch

    return bool(getattr(torch.cpu, name, lambda: False)())


PEAK_TFLOPS = {
    "A100": 312,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "4090": 165,
    "3090": 71,
}


def peak_flops(device: Any) -> float | None:
    """Dense bf16 FLOP/s of the device by its data sheet, None where it is not known (CPUs: it depends on clock, cores
    and neighbours)."""
    import torch

    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if key in name), None)


class StopSignals:
    """Counts SIGTERM, SIGINT and SIGUSR1 instead of dying of them; the loop looks at `name` between steps. A third
    SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._interrupts = 0

    def __enter__(self) -> "StopSignals":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: Any) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _note(self, signum: int, frame: Any) -> None:
        self.name = signal.Signals(signum).name
        if signum == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 2:
                raise Interrupted("interrupted three times: stopped without a checkpoint")
