"""A tracker's own process, started by etude.track.Follower: hands on what the run writes to its logs, line by line, until
the trainer says that it has ended, or is gone."""

import contextlib
import faulthandler
import fcntl
import json
import math
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from etude import config as conf
from etude.errors import Refusal
from etude.redact import redact, remember, scrub

POLL = 0.2  # seconds between looks at the logs
KINDS = ("metrics", "histograms", "samples")  # metrics first: see `follow`
Watch = Callable[[], AbstractContextManager[None]]


class Tail:
    """The lines of a growing JSONL file, each read once when it is whole."""

    def __init__(self, path: Path):
        self.path, self.at, self.line = path, 0, 0

    def read(self) -> list[dict]:
        try:
            with self.path.open("rb") as file:
                file.seek(self.at)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self.at += len(whole)
        records = []
        for line in whole.splitlines():
            self.line += 1
            try:
                record = json.loads(line)
                int(record["step"])
            except (ValueError, KeyError, TypeError):
                raise Refusal(f"{self.path}:{self.line} is not a line that a run writes: {line[:80]!r}") from None
            records.append(record)
        return records


def hand_over(tracker: Any, kind: str, record: dict) -> None:
    step = record["step"]
    if kind == "metrics":
        tracker.scalars(step, {k: v for k, v in record.items() if k != "step"})
    elif kind == "histograms" and hasattr(tracker, "histograms"):
        tracker.histograms(step, record["histograms"])
    elif kind == "samples" and hasattr(tracker, "text"):
        tracker.text(step, record["name"], record["text"])


def follow(tracker: Any, run: Path, held: int, over: Callable[[], bool], watch: Watch) -> int:
    """Hand over every line of a later step than `held`, in the order of steps, until `over()` (asked before each look at
    the files) is true. -> how many."""
    tails = {kind: Tail(run / "logs" / f"{kind}.jsonl") for kind in KINDS}
    waiting: list[tuple[int, str, dict]] = []
    reached, n = -math.inf, 0
    while True:
        last = over()
        found = {kind: tail.read() for kind, tail in tails.items()}
        # Files read later may be further on than the metrics read first: their lines wait, or steps would go back.
        reached = max([reached, *(r["step"] for r in found["metrics"])])
        waiting += [(r["step"], kind, r) for kind in ("histograms", "metrics", "samples") for r in found[kind]]
        ready = sorted((item for item in waiting if last or item[0] <= reached), key=lambda item: item[0])
        waiting = [item for item in waiting if not (last or item[0] <= reached)]
        for step, kind, record in ready:
            if step > held:
                with watch():
                    hand_over(tracker, kind, record)
                n += 1
        if last:
            return n


def replay(tracker: Any, run: Path, config: dict) -> int:
    """All that a run has logged, to a tracker that has nothing of it or takes things twice. -> how many lines."""
    held = tracker.open(run.resolve(), redact(config), 0)
    try:
        return follow(tracker, run, held or 0, lambda: True, contextlib.nullcontext)
    finally:
        tracker.close()


@contextlib.contextmanager
def alone(run: Path, name: str) -> Iterator[None]:
    """Waits for another process that hands the run to the same tracker: one of a trainer that was killed ends soon."""
    with (run / "logs" / f".{name}.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends the process when the block takes longer, and without asking the interpreter, which a blocked call may hold."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def serve(job: dict, over: Callable[[], bool]) -> None:
    """Build the tracker of `job` and follow its run to the end."""
    run = Path(job["folder"])
    config = json.loads((run / "meta" / "full_config.json").read_text(encoding="utf-8"))

    def watch() -> AbstractContextManager[None]:
        return within(job["timeout"])

    with contextlib.ExitStack() as stack:
        with watch():
            stack.enter_context(alone(run, job["name"]))
        with watch():
            tracker = conf.build(job["node"])
            held = tracker.open(run, redact(config), job["start_step"])
        follow(tracker, run, job["start_step"] if held is None else held, over, watch)
        with watch():
            tracker.close()


def main() -> int:
    """Standard input: a line of JSON, what to do, and another line when the run has ended. -> exit code."""
    os.nice(5)  # training goes first
    with open(0, "rb", buffering=0) as told:
        job, trainer = json.loads(told.readline()), os.getppid()
        remember(job["node"])

        def over() -> bool:
            return bool(select.select([told], [], [], POLL)[0]) or os.getppid() != trainer

        try:
            serve(job, over)
            code = 0
        except Exception as error:  # of a tracker, of any kind; the trainer reads the last line
            why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            print(scrub(f"{traceback.format_exc()}\n{why}"), file=sys.stderr)
            code = 1
    faulthandler.dump_traceback_later(job["timeout"], exit=True)  # what libraries do at exit may block as well
    return code


if __name__ == "__main__":
    sys.exit(main())
