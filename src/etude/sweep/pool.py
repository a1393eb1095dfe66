"""Running a sweep's jobs: so many at once, each in a process of its own, until none is left or the sweep is stopped."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from etude.errors import EtudeError, Interrupted
from etude.sweep import job as jobs
from etude.sweep.job import Job
from etude.sweep.table import Table

TICK = 0.05  # seconds between looks at the jobs


@dataclasses.dataclass(frozen=True)
class Resources:
    """What jobs get of the machine."""

    at_once: int | None  # None: what the machine has room for
    threads: int | None  # of those whose own setting does not say; None: their share
    gpus: list[str] | None  # None: leave CUDA_VISIBLE_DEVICES as it is
    cores: int
    timeout: float | None  # seconds
    grace: float  # seconds from SIGTERM to SIGKILL


def share(
    at_once: int | None, threads: int | None, gpus: list[str] | None, processes: int, cores: int
) -> tuple[int, int]:
    """(jobs at once, threads a process) for jobs of so many `processes`, where a setting does not say."""
    if at_once is None:
        at_once = len(gpus) // processes if gpus else cores // ((threads or 1) * processes)
        at_once = max(1, at_once)
    elif threads is None:
        threads = max(1, cores // (at_once * processes))
    if threads is None:
        threads = max(1, cores // (at_once * processes)) if gpus else 1
    return at_once, threads


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use, found without torch."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [g.strip() for g in given.split(",") if g.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    ask = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


class Stop:
    """SIGINT, SIGTERM and SIGHUP are counted instead of ending the sweep: the first stops its jobs, the second kills them."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Stop":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, *_: Any) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.count += 1


class Pool:
    """The jobs that run. `command(job, overrides)` is a job's script and arguments, `own(job)` its config's threads (None: it
    does not say) and processes."""

    def __init__(
        self,
        resources: Resources,
        command: Callable[[Job, list[str]], list[str]],
        own: Callable[[Job], tuple[int | None, int]],
        dry: bool,
    ):
        self.resources, self.command, self.own, self.dry = resources, command, own, dry
        self.running: list[Job] = []
        self.turn = 0

    def run(
        self,
        waiting: Iterator[Job],
        table: Table,
        watch: Callable[[int, Path], bool] | None,
        done: Callable[[Job], None],
    ) -> None:
        """Take jobs as there is room for them and call done(job) as they end. Raises Interrupted after a signal, when all
        have ended."""
        left, looked = True, 0.0
        following: Job | None = None  # waits for more room than there is
        with Stop() as stop, table, self._lifeline():
            while self.running or left:
                while left and not stop.count and (free := self._free()) > 0:
                    if following is None and (following := self._next(waiting, done)) is None:
                        left = False
                    elif self.running and Fraction(1, following.at_once) > free:
                        break
                    else:
                        self.running.append(following)
                        following.begun = time.monotonic()
                        following = None
                self._look(stop, table, done)
                if watch is not None and time.monotonic() - looked > 1:
                    looked = time.monotonic()
                    for job in self.running:
                        if job.process is not None and not job.stopping and watch(job.number, job.folder):
                            jobs.stop(job, jobs.PRUNED, self.resources.grace)
                table.show()
                if stop.count and not self.running:
                    raise Interrupted("the sweep; type the same command again to go on with it")
                if self.running:
                    time.sleep(TICK)

    def _free(self) -> Fraction:
        """How much of the machine no job has; one of which it has room for three has a third."""
        return 1 - sum((Fraction(1, job.at_once) for job in self.running), Fraction(0))

    def _next(self, waiting: Iterator[Job], done: Callable[[Job], None]) -> Job | None:
        """The next job that is to be run, with its share of the machine."""
        for job in waiting:
            if job.status != "completed":
                r = self.resources
                job.own_threads, job.processes = self.own(job)
                job.at_once, job.threads = share(
                    r.at_once, job.own_threads or r.threads, r.gpus, job.processes, r.cores
                )
                return job
            if not jobs.locked_by_another(job.folder):
                jobs.clean(job.folder / "stdout.log")  # a sweep that was killed before the job's end has not
            done(job)
        return None

    @contextlib.contextmanager
    def _lifeline(self) -> Iterator[None]:
        """A pipe whose other end the jobs have: nothing is ever written, but when it closes they know that the sweep is
        gone. Whatever ends the sweep, its jobs are told to save and have their time for it."""
        self.jobs_end, ours = os.pipe()
        try:
            yield
        finally:
            for job in self.running:
                jobs.stop(job, jobs.STOPPED, self.resources.grace)
            while any(job.process is not None and not jobs.ended(job, self.dry) for job in self.running):
                time.sleep(TICK)
            os.close(ours)
            os.close(self.jobs_end)

    def _look(self, stop: Stop, table: Table, done: Callable[[Job], None]) -> None:
        """Start those that have their folder to themselves, stop those whose time is over, take away those that ended, or that
        the file system does not let begin."""
        grace, timeout = self.resources.grace, self.resources.timeout
        for job in list(self.running):
            if job.process is None:
                if stop.count:
                    self.running.remove(job)
                    continue
                try:
                    if jobs.locked_by_another(job.folder):
                        continue
                    self._start(job)
                except (OSError, EtudeError) as error:
                    jobs.lost(job, error)
                else:
                    table.began(job)
                    continue
            if job.process is None or jobs.ended(job, self.dry):
                self.running.remove(job)
                table.ended(job)
                done(job)
            elif stop.count:
                jobs.stop(job, jobs.STOPPED, grace)
                if stop.count > 1:
                    job.hurried = True
                    jobs.kill(job)
            elif timeout is not None and job.seconds > timeout:
                jobs.stop(job, f"timed out after {timeout / 60:g} minutes", grace)

    def _start(self, job: Job) -> None:
        overrides = jobs.prepare(job)
        if job.own_threads is None:
            overrides = [*overrides, f"threads={job.threads}"]
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
        environment = os.environ | {name: str(job.threads) for name in names}
        if self.resources.gpus is not None:
            job.gpus = self._free_gpus(job.processes)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(job.gpus)
        jobs.start(job, self.command(job, overrides), environment, self.jobs_end, self.resources.grace)

    def _free_gpus(self, n: int) -> list[str]:
        """The next `n` in turn of those that the fewest running jobs have."""
        gpus = self.resources.gpus or []
        order = gpus[self.turn :] + gpus[: self.turn]
        taken = [g for job in self.running for g in job.gpus]
        chosen = sorted(order, key=taken.count)[:n]
        if chosen:
            self.turn = (gpus.index(chosen[-1]) + 1) % len(gpus)
        return chosen
