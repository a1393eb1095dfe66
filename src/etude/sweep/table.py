"""What is shown of a sweep: a table that lives on a terminal, lines elsewhere, and at the end a table of every job."""

import re
import shutil
import sys
import time
from typing import Any

from rich.console import Console
from rich.constrain import Constrain
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from etude.redact import redact_override
from etude.signature import did_you_mean
from etude.sweep.job import Job, common

STYLES = {"running": "cyan", "completed": "green", "failed": "red", "interrupted": "yellow", "pruned": "magenta"}
# What a run is judged by, the first that it has.
JUDGED_BY = ("val/full_loss", "val/full_reward/mean", "val/loss", "train/loss", "train/reward/mean")


def duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def rounded(override: str) -> str:
    """Without the digits that no one types: a number that was drawn has 17 of them."""
    key, _, value = override.partition("=")
    drawn = re.fullmatch(r"-?\d+\.\d{8,}(e[+-]?\d+)?", value)
    return f"{key}={float(value):.4g}" if drawn else override


def fitted(grid: Grid, width: int) -> Grid:
    """The overrides get what the other columns leave of `width`, but as much as the longest one takes, up to 30 columns: they
    are broken between one and the next."""
    need = [max([len(c.header), *(len(str(cell)) for cell in c.cells)]) for c in grid.columns]  # type: ignore[arg-type]
    if grid.columns[-1].header == "why":
        need[-1] = min(need[-1], 40)
    words = " ".join(map(str, grid.columns[1].cells)).split() or [""]
    left = width - sum(need) + need[1] - 2 * (len(need) - 1)
    grid.columns[1].width = min(need[1], max(left, min(30, width // 3, max(map(len, words)))))
    return grid


class Table:
    """`mode` is train.py's progress: auto (live on a terminal, else lines), bar (live), lines, none (only the last table).
    `total` is None where jobs are thought up as the sweep goes, until `wanted` have not failed; `typed` are overrides that
    need not be shown."""

    def __init__(
        self,
        mode: str,
        jobs: list[Job],
        total: int | None,
        typed: list[str],
        metric: str | None,
        wanted: int | None = None,
    ):
        self.jobs, self.total, self.typed, self.metric, self.wanted = jobs, total, typed, metric, wanted
        if mode == "auto":
            mode = "bar" if sys.stdout.isatty() else "lines"
        self.mode, self.shown = mode, 0.0
        self.live: Live | None = None
        self.warned = False

    def __enter__(self) -> "Table":
        if self.mode == "bar":
            self.live = Live(console=Console(), auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def name(self, job: Job) -> str:
        """The overrides that tell a job from the others."""
        shared = common(self.jobs, self.typed)
        return " ".join(rounded(redact_override(o)) for o in job.overrides if o not in shared)

    def began(self, job: Job) -> None:
        if self.mode == "lines":
            again = " goes on" if job.record.get("step") else ""
            gpus = f" on GPU {','.join(job.gpus)}" if job.gpus else ""
            print(f"job {job.number}{again}: {self.name(job) or 'as it is'}{gpus}", flush=True)

    def ended(self, job: Job) -> None:
        if self.mode == "lines":
            said = f", {job.why}" if job.why else ""
            judged = self.judged(job)
            value = f", {judged[0]} {judged[1]:.4g}" if judged and job.status == "completed" else ""
            print(
                f"job {job.number} {job.status} in {duration(job.seconds)}{value}{said} ({self.counts()})", flush=True
            )

    def counts(self) -> str:
        if self.total is not None:
            return f"{sum(j.code is not None for j in self.jobs)} of {self.total} have ended"
        finished = sum(j.status in ("completed", "pruned") for j in self.jobs)
        return f"{finished}{'' if self.wanted is None else f' of {self.wanted}'} finished"

    def show(self) -> None:
        """Draw the live table anew, twice a second."""
        if self.live is not None and time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            # Narrower than the terminal: where an echoed ^C wraps, a line of the table would stay behind.
            width = self.live.console.width - 5
            self.live.update(Constrain(fitted(self.now(), width), width), refresh=True)

    def judged(self, job: Job) -> tuple[str, float] | None:
        metrics = job.metrics
        names = [self.metric] if self.metric else JUDGED_BY
        return next(((n, metrics[n]) for n in names if isinstance(metrics.get(n), (int, float))), None)

    def check_metric(self, job: Job) -> None:
        """Say once that runs do not have the metric that was asked for."""
        metrics = job.metrics
        if self.metric and metrics and self.metric not in metrics and job.status == "completed" and not self.warned:
            self.warned = True
            line = f"hydra.launcher.metric={self.metric} is not among the run's metrics"
            print(f"warning: {line}{did_you_mean(self.metric, list(metrics))}", file=sys.stderr)

    def now(self) -> Grid:
        """The running jobs and as many of the others as the screen has room for."""
        counts = {s: n for s in STYLES if (n := sum(j.status == s for j in self.jobs))}
        left = "" if self.total is None else f", {self.total - sum(counts.values())} waiting"
        grid = Grid(box=None, pad_edge=False, title=", ".join(f"{n} {s}" for s, n in counts.items()) + left)
        grid.title_justify = "left"
        for column, side in (("job", "right"), ("overrides", "left"), ("status", "left"), ("step", "right")):
            grid.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
        grid.add_column("loss", justify="right")
        grid.add_column("time", justify="right")
        order = ("running", "failed", "interrupted", "pruned", "completed")
        known = [j for j in self.jobs if j.status in order and not j.earlier]
        known.sort(key=lambda j: (order.index(j.status), -j.number))
        room = max(3, shutil.get_terminal_size().lines - 5)
        for job in sorted(known[:room], key=lambda j: j.number):
            record = job.record
            steps = f"{record.get('step', 0)}/{record.get('steps') or '?'}"
            loss = job.metrics.get("train/loss")
            seconds = time.monotonic() - job.begun if job.status == "running" else job.seconds
            grid.add_row(
                str(job.number),
                Text(self.name(job)),
                Text("stopping" if job.stopping and job.status == "running" else job.status, STYLES[job.status]),
                steps,
                f"{loss:.4f}" if isinstance(loss, float) else "",
                duration(seconds),
            )
        return grid

    def last(self, why: bool) -> Grid:
        """Every job that was looked at: its end, exit code, metric, and why it did not complete."""
        judged = {id(j): self.judged(j) for j in self.jobs}
        names = {found[0] for found in judged.values() if found}
        metric = names.pop() if len(names) == 1 else "metric"
        grid = Grid(box=None, pad_edge=False)
        grid.add_column("job", justify="right")
        grid.add_column("overrides", overflow="fold")
        grid.add_column("status")
        for column in ("exit", "step", "time", metric):
            grid.add_column(column, justify="right")
        if why:
            grid.add_column("why", overflow="fold")
        for job in sorted(self.jobs, key=lambda j: j.number):
            found = judged[id(job)]
            prefix = f"{found[0]} " if found and metric == "metric" else ""
            grid.add_row(
                str(job.number),
                Text(self.name(job)),
                Text(job.status + (" before" if job.earlier else ""), STYLES.get(job.status, "")),
                "" if job.code is None else str(job.code),
                str(job.record.get("step", "")),
                "" if job.earlier or job.status == "waiting" else duration(job.seconds),
                f"{prefix}{found[1]:.4f}" if found else "",
                *([Text(job.why)] if why else []),
            )
        return grid

    def print_last(self) -> None:
        """On a terminal as wide as it is, elsewhere as wide as it takes. Reasons have no column on a narrow one, but lines."""
        console = Console(width=None if sys.stdout.isatty() else 400, highlight=False)
        told = [j for j in sorted(self.jobs, key=lambda j: j.number) if j.why]
        beside = bool(told) and console.width >= 100
        console.print(fitted(self.last(beside), console.width))
        for job in told if not beside else ():
            print(f"job {job.number}: {job.why}")
