"""Trackers: where metrics go. A tracker has `scalars`, `histograms`, `text` and `close`; logs/metrics.jsonl, which is
one too, is the source of truth. W&B and Aim follow this protocol as two more classes here."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from etude.errors import StorageFault


class Tracker(Protocol):
    def open(self, folder: Path, config: dict, start_step: int) -> None:
        """Begin writing the run in `folder`; what was written of later steps than `start_step` is void."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def histograms(self, step: int, tensors: Iterable[tuple[str, Any]]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


class Jsonl:
    """logs/metrics.jsonl: one object a line, {"step": n, name: value, ...}, floats written so that they read back to the
    same bits. After a resume each step is in it once."""

    def open(self, folder: Path, config: dict, start_step: int) -> None:
        self.path = folder / "logs" / "metrics.jsonl"
        self.samples = folder / "logs" / "samples.jsonl"
        self.shapes = folder / "logs" / "histograms.jsonl"
        for path in (self.path, self.samples, self.shapes):
            _cut(path, start_step)
        self.file = self.path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._write(self.file, {"step": step, **values})

    def histograms(self, step: int, tensors: Iterable[tuple[str, Any]]) -> None:
        """logs/histograms.jsonl: edges and counts of 32 bins of each tensor."""
        import torch

        bins = {}
        for name, t in tensors:
            counts, edges = torch.histogram(t.detach().float().cpu().flatten(), bins=32)
            bins[name] = {"counts": counts.int().tolist(), "low": edges[0].item(), "high": edges[-1].item()}
        self._append(self.shapes, {"step": step, "histograms": bins})

    def text(self, step: int, name: str, text: str) -> None:
        """logs/samples.jsonl."""
        self._append(self.samples, {"step": step, "name": name, "text": text})

    def _append(self, path: Path, record: dict) -> None:
        with path.open("a", encoding="utf-8") as file:
            self._write(file, record)

    def _write(self, file: Any, record: dict) -> None:
        try:
            file.write(json.dumps(record) + "\n")
            file.flush()
        except OSError as error:
            raise StorageFault(f"could not write {file.name}: {error.strerror}") from None

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """logs/tensorboard: tensorboard --logdir runs."""

    def open(self, folder: Path, config: dict, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RuntimeError("tensorboard is not installed: pip install tensorboard, or use tracker=jsonl") from None
        self.writer = SummaryWriter(
            str(folder / "logs" / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def histograms(self, step: int, tensors: Iterable[tuple[str, Any]]) -> None:
        for name, t in tensors:
            self.writer.add_histogram(name, t.detach().float().cpu(), step)

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, "```\n" + text + "\n```", step)

    def close(self) -> None:
        self.writer.close()


class Trackers:
    """All trackers of a run as one. The first, the JSONL, must work; any other that raises is dropped with one warning:
    a tracker never stops or changes a run."""

    def __init__(self, jsonl: Jsonl, others: dict[str, Tracker]):
        self.jsonl, self.others = jsonl, dict(others)

    def open(self, folder: Path, config: dict, start_step: int) -> None:
        self.jsonl.open(folder, config, start_step)
        self._each(lambda t: t.open(folder, config, start_step))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.jsonl.scalars(step, values)
        self._each(lambda t: t.scalars(step, values))

    def histograms(self, step: int, tensors: list[tuple[str, Any]]) -> None:
        self.jsonl.histograms(step, tensors)
        self._each(lambda t: t.histograms(step, tensors))

    def text(self, step: int, name: str, text: str) -> None:
        self.jsonl.text(step, name, text)
        self._each(lambda t: t.text(step, name, text))

    def close(self) -> None:
        self._each(lambda t: t.close())
        self.jsonl.close()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.others.items()):
            try:
                action(tracker)
            except Exception as error:
                del self.others[name]
                print(f"warning: tracker {name} failed and is off for the rest of this run: {error}", file=sys.stderr)


def _cut(path: Path, start_step: int) -> None:
    """Drop the lines of steps after `start_step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= start_step:
                kept.append(line)
        except ValueError:
            continue
    making = path.with_name(f".{path.name}.{os.getpid()}")
    making.write_text("".join(kept), encoding="utf-8")
    os.replace(making, path)
