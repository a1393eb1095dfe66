"""One job of a sweep: a process in its folder, from the decision whether to run it to what became of it."""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from etude import config as conf
from etude import manifest
from etude import run as runs
from etude.errors import EtudeError, Interrupted, StorageFault
from etude.redact import scrub
from etude.sweep.place import as_typed, key_of, overrides_hash

Status = Literal["waiting", "running", "completed", "failed", "interrupted", "pruned"]
# Why a sweep stops a job.
PRUNED = "pruned"
STOPPED = "the sweep was stopped"


@dataclasses.dataclass
class Job:
    """A job's place in the sweep and how it stands."""

    number: int
    overrides: list[str]
    folder: Path
    status: Status = "waiting"
    earlier: bool = False  # completed by an earlier start of the sweep
    code: int | None = None  # exit code, 128 + n for signal n
    why: str = ""  # it did not complete
    process: subprocess.Popen[bytes] | None = None
    own_threads: int | None = None  # what its config says
    processes: int = 1  # of its config's parallel
    at_once: int = 1  # how many jobs like it the machine has room for
    threads: int = 1  # of each process
    gpus: list[str] = dataclasses.field(default_factory=list)
    begun: float = 0.0  # time.monotonic()
    seconds: float = 0.0
    log_start: int = 0  # where this attempt's output begins in stdout.log
    stopping: str = ""  # why the sweep stops it
    kill_at: float | None = None
    hurried: bool = False  # a second signal left it no time to save

    @property
    def record(self) -> dict[str, Any]:
        """status.json."""
        return runs.recorded(self.folder / "status.json")

    @property
    def metrics(self) -> dict[str, Any]:
        return self.record.get("metrics") or {}


def locked_by_another(folder: Path) -> bool:
    """Whether a live process writes this run: a job of a sweep that was killed may still be saving."""
    try:
        lock = (folder / ".lock").open("r+")
    except FileNotFoundError:
        return False
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except (BlockingIOError, PermissionError):
            return True


def prepare(job: Job) -> list[str]:
    """Make the job's folder ready; -> the overrides with which its script is to be started. A run with a whole checkpoint
    goes on as it was, with those settings that a resume may change; one without begins again."""
    root = lambda o: key_of(o).replace("/", ".").split(".")[0]  # noqa: E731
    whole = any(manifest.fault(p) is None for p in manifest.steps(job.folder / "artifacts" / "checkpoints"))
    if whole and (job.folder / "meta" / "config.yaml").exists():
        # `tracker=default ~tracker.tensorboard`: the stored config has what comes of it, and nothing to delete.
        stays = {root(o) for o in job.overrides if o.startswith("~")}
        change = [o for o in job.overrides if root(o) in conf.MAY_CHANGE and root(o) not in stays]
        return [*change, f"resume={job.folder}"]
    for name in ("artifacts", "logs", "meta"):
        shutil.rmtree(job.folder / name, ignore_errors=True)
    for name in ("status.json", "summary.txt"):
        (job.folder / name).unlink(missing_ok=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    return job.overrides


def start(job: Job, command: list[str], environment: Mapping[str, str], pipe: int, grace: float) -> None:
    """Start `command` (a script and its arguments) in a session of its own, its output added to the job's stdout.log."""
    job.begun, job.status = time.monotonic(), "running"
    note(job, status="running")  # before the run itself writes there
    with (job.folder / "stdout.log").open("ab") as log:
        job.log_start = log.tell()
        log.write(f"$ {as_typed(command)}\n".encode())
        log.flush()
        job.process = subprocess.Popen(
            [sys.executable, "-m", "etude.sweep.child", str(pipe), str(grace), *command],
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(pipe,),
        )


def note(job: Job, **fields: Any) -> None:
    """Write status.json anew with these fields; of what was there, what a resume goes on with stays. Where the disk does not
    take it the sweep goes on, as it does not read there what it knows."""
    kept = ("started", "step", "steps", "seconds", "metrics")
    before = {k: v for k, v in job.record.items() if k in kept}
    record = {"started": now(), **before, **fields, "heartbeat": now()}
    with contextlib.suppress(OSError, StorageFault):
        job.folder.mkdir(parents=True, exist_ok=True)  # a job may have removed it
        runs.replace(job.folder / "status.json", json.dumps(record, indent=1))


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def stop(job: Job, why: str, grace: float) -> None:
    """SIGTERM, after which a run saves and exits with 3; `ended` kills it when `grace` seconds are over."""
    if job.process is not None and not job.stopping:
        job.stopping, job.kill_at = why, time.monotonic() + grace
        job.process.send_signal(signal.SIGTERM)


def kill(job: Job) -> None:
    """End the job's process with all that it started."""
    if job.process is not None:
        try:
            os.killpg(job.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def lost(job: Job, error: OSError | EtudeError) -> None:
    """A job that could not even be started."""
    if isinstance(error, OSError):
        error = StorageFault(f"{error.filename or job.folder}: {error.strerror}")
    job.status, job.code, job.why = "failed", error.code, scrub(str(error))
    note(job, status="failed", exit_code=job.code, error=job.why, ended=now())


def ended(job: Job, dry: bool) -> bool:
    """Whether the job's process has ended; if so the job says how. A dry run writes no status: its exit code is all."""
    assert job.process is not None
    job.seconds = time.monotonic() - job.begun
    if job.kill_at is not None and time.monotonic() > job.kill_at:
        kill(job)
        job.kill_at = None
    if (code := job.process.poll()) is None:
        return False
    kill(job)  # what it left behind
    clean(job.folder / "stdout.log")
    killed = signal.Signals(-code).name if code < 0 else ""
    job.code = 128 - code if code < 0 else code
    record = job.record
    if record.get("status") == "completed" or (dry and code == 0):
        job.status, job.code, job.why = "completed", 0, f"{killed} after its end" if killed else ""
        if record.get("status") != "completed":
            note(job, status="completed", exit_code=0)
        return True
    if job.stopping:
        late = " and killed at the second Ctrl-C" if job.hurried else ", did not save in time and was killed"
        job.why = job.stopping + (late if killed == "SIGKILL" else "")
    elif killed:
        job.why = f"killed by {killed}" + (" (out of memory?)" if killed == "SIGKILL" else "")
    elif code == 0:
        job.code, job.why = 1, "exited with code 0 before its end"
    elif "error" in record:
        job.why = reason(record["error"]) or reason(f"error: {record['error']}")
    else:
        job.why = reason(output(job)) or f"exited with code {code} and no message"
    job.status = (
        "pruned"
        if job.stopping == PRUNED
        else "interrupted"
        if code == Interrupted.code or job.stopping == STOPPED
        else "failed"
    )
    error = job.why if job.stopping or "error" not in record else record["error"]
    note(job, status=job.status, exit_code=job.code, error=error, ended=now())
    return True


def clean(log: Path) -> None:
    """Take secrets out of what a job printed, a piece at a time, as that may be more than fits in memory."""
    cleaned = log.with_name(f".{log.name}.{os.getpid()}")
    changed = False
    with contextlib.suppress(OSError):  # no log, no secret in it
        with (
            log.open(encoding="utf-8", errors="surrogateescape", newline="") as old,
            cleaned.open("w", encoding="utf-8", errors="surrogateescape", newline="") as new,
        ):
            for text in pieces(old):
                new.write(scrubbed := scrub(text))
                changed |= scrubbed != text
        if changed:
            os.replace(cleaned, log)
    with contextlib.suppress(OSError):
        cleaned.unlink(missing_ok=True)


def pieces(log: TextIO, size: int = 2**20) -> Iterator[str]:
    """Whole lines of together about `size` characters; a private key is not cut in two."""
    while lines := log.readlines(size):
        text = "".join(lines)
        while text.rfind("-----BEGIN ") > text.rfind("-----END ") and len(text) < 2 * size and (line := log.readline()):
            text += line
        yield text


def output(job: Job, most: int = 8192) -> str:
    """The end of what this attempt has printed, without the command."""
    try:
        with (job.folder / "stdout.log").open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(job.log_start, size - most))
            return log.read().decode(errors="replace").partition("\n")[2]
    except OSError:
        return ""


def reason(text: str) -> str:
    """What went wrong in at most 160 characters, by the exception of the last traceback or by the line that cli.guard
    printed last; empty where the text has neither. Left out is the middle: after a long path comes what was wrong with it."""
    before, traceback, after = text.rpartition("Traceback (most recent call last):")
    lines = after.splitlines()
    if traceback:
        said = next((line for line in lines if line and not line.startswith(" ")), "")
    else:
        said = next((m[1] for line in reversed(lines) if (m := re.match("(?:error|stopped): (.+)", line))), "")
    return said if len(said) <= 160 else f"{said[:57]}...{said[-100:]}"


def common(jobs: Iterable[Job], typed: list[str]) -> set[str]:
    """The overrides that all jobs share, which a table need not repeat."""
    each = [set(job.overrides) for job in jobs]
    return set.intersection(*each) if len(each) > 1 else set(typed)


def find(sweep: Path, number: int, overrides: list[str], taken: set[Path]) -> Job:
    """The job in the folder of an earlier start of the sweep that had these overrides, else in a new one."""
    digest = overrides_hash(overrides)
    known = [sweep / f"{number}_{digest}", *sorted(sweep.glob(f"*_{digest}"))]
    folder = next((f for f in known if f.is_dir() and f not in taken), known[0])
    job = Job(number, overrides, folder)
    if job.record.get("status") == "completed":
        job.status, job.earlier, job.code = "completed", True, 0
    return job
