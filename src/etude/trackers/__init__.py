"""Trackers beside the JSONL files, one a module, each run in a process of its own (etude.track)."""

import importlib.util
from pathlib import Path

from etude.run import recorded


def remembered(folder: Path, name: str) -> str | None:
    """By what id a tracker knows the run; meta/<name>_id keeps it, so that a resume or a second sync finds it again."""
    path = folder / "meta" / f"{name}_id"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def remember(folder: Path, name: str, value: str) -> str:
    (folder / "meta" / f"{name}_id").write_text(value + "\n", encoding="utf-8")
    return value


def group_of(folder: Path) -> str | None:
    """The sweep that a run is a job of: runs/sweeps/<its name>/<job>."""
    return folder.parent.name if folder.parent.parent.name == "sweeps" else None


def runs_dir_of(folder: Path) -> Path:
    """The folder that all runs share: runs of runs/<run> and of runs/sweeps/<sweep>/<job>."""
    return folder.parents[2] if group_of(folder) else folder.parent


def status_of(folder: Path) -> str:
    """running, completed, failed or interrupted."""
    return recorded(folder / "status.json").get("status", "running")


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
