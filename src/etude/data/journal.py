"""How long work is done: in worker processes, and in steps that a kill does not undo."""

import collections
import concurrent.futures.process
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from etude.data.source import Place, Unit
from etude.errors import StorageFault

COMMIT_SECONDS = 2.0


class Workers:
    """A function over units: here with 0 or 1 processes, else in that many, a few units ahead and in order."""

    def __init__(self, processes: int):
        self.processes = processes
        self.pool: concurrent.futures.ProcessPoolExecutor | None = None

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
        """A call may start a process, and a Ctrl-C in that moment would end the worker, with a traceback: so the worker
        inherits it blocked, until it ignores it for good, and here it waits until the call is made."""
        assert self.pool is not None
        resource_tracker.ensure_running()  # its start would unblock the signal
        held: list[int] = []
        before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            future = self.pool.submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            signal.signal(signal.SIGINT, before)
        if held:
            raise KeyboardInterrupt
        return future


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
