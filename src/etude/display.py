"""What a person sees while a run goes on: a bar on a terminal, a line a log elsewhere, or nothing."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """`mode` bar, lines or none; auto is a bar on a terminal and lines elsewhere. Prints on rank 0 only."""

    def __init__(self, mode: str, active: bool = True):
        if mode == "auto":
            mode = "bar" if sys.stdout.isatty() else "lines"
        self.mode = mode if active else "none"
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar: Progress | None = None

    def start(self, step: int, steps: int | None) -> None:
        if self.mode == "bar":
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[line]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("training", total=steps or 1, completed=step, line="")
            self.bar.start()

    def update(self, step: int, steps: int | None, values: dict[str, Any], logged: bool) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step, total=steps or step)
            if logged:
                self.bar.update(self.task, line=line(values))
        elif self.mode == "lines" and logged:
            print(f"step {step}/{steps or '?'}  {line(values)}", flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.mode == "bar":
            self.console.print(text, markup=False)
        elif self.mode == "lines":
            print(text, flush=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


REWARDS = {"": "train/reward/mean", "val ": "val/reward/mean"}


def line(v: dict[str, Any]) -> str:
    """One line of a step's metrics."""
    parts = [f"loss {v['train/loss']:.4f}"] if "train/loss" in v else []
    if "val/loss" in v:
        parts.append(f"val {v['val/loss']:.4f}")
    parts += [f"{where}reward {v[k]:.3f}" for where, k in REWARDS.items() if k in v]
    if "lr" in v:
        parts.append(f"lr {v['lr']:.2e}")
    if "perf/tokens_per_s" in v:
        mfu = v.get("perf/mfu")
        parts += [f"{v['perf/tokens_per_s']:,.0f} tok/s", f"MFU {mfu:.1%}" if mfu is not None else "MFU n/a"]
    return "  ".join(parts)


def count(n: float) -> str:
    """1234567 -> 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"
