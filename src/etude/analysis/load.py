"""Run folders as a table: one row a run, a column for every metric and every setting."""

import contextlib
import functools
import glob
import hashlib
import importlib
import itertools
import json
import math
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from etude.analysis import cache
from etude.errors import Refusal
from etude.run import flat

if TYPE_CHECKING:
    import pandas as pd

Runs: TypeAlias = Any  # a run, a folder of runs, a glob, a list of these, or load_runs's table

TEXTS, TIMES = "run name status goal error unreadable".split(), "started heartbeat ended".split()
SIZES = "params params_active params_non_embedding".split()
COUNTS = ["step", "tokens", "best_step", *SIZES]
VALUES = "flops flops_per_token seconds tokens_per_s best best_val_loss".split()
VALUES += "train/loss val/loss val/full_loss val/full_bits_per_byte".split()
HASHES = ["data/sha256", "data/tokenizer_sha256"]
SETTINGS = ("data/", "choice.", "config.")  # how the columns begin that say what a run was
FILES = [
    *("status.json", "logs/metrics.jsonl", "meta/data.json", "meta/config.yaml"),  # without these a run is damaged
    *("meta/full_config.json", "meta/model.json", "meta/choices.json", "meta/overrides"),
]
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is there


def need(module: str) -> Any:
    """A package of the analysis extra, or the refusal that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise Refusal(f'{missing} is not installed: pip install "etude[analysis]"') from None


def find_runs(pattern: Runs) -> list[Path]:
    """Run folders of `pattern`, each once, by path. Folders are searched three deep, which reaches
    runs/sweeps/<sweep>/<job>. Raises Refusal for a place that is not there, and where there is no run at all: of several
    places one may be empty, as a sweep is before its first job."""
    if hasattr(pattern, "columns"):
        return [Path(run) for run in pattern["run"]]
    patterns = [pattern] if isinstance(pattern, (str, Path)) else list(pattern)
    like = "give a folder of runs, a run or a glob, like runs or 'runs/2026*'"
    found: dict[Path, None] = {}
    for one in patterns:
        top = Path(one).expanduser()
        places = [top] if top.exists() else [Path(p) for p in sorted(glob.glob(str(top), recursive=True))]
        if not places:
            raise Refusal(f"{one}: there is no such folder; {like}")
        found |= dict.fromkeys(run for place in places for run in _search(place, 3))
    if not found:
        raise Refusal(f"{' '.join(map(str, patterns[:3])) or 'nothing'}: no run is in it; {like}")
    return list(found)


def _search(folder: Path, depth: int) -> Iterator[Path]:
    # A run that was killed while it began has no status.json yet.
    if (folder / "status.json").exists() or ((folder / "meta").is_dir() and (folder / "logs").is_dir()):
        yield folder
    elif depth and folder.is_dir():
        for child in sorted(folder.iterdir()):
            yield from _search(child, depth - 1)


def read_lines(path: Path) -> list[dict]:
    """The objects of a run's JSONL file; [] without the file. Lines cut short by a kill or a full disk are left out."""
    found: list[Any] = []
    raw = path.read_bytes().splitlines() if path.is_file() else []
    try:
        found = json.loads(b"[" + b",".join(raw) + b"]")  # twice as fast as line by line
    except (ValueError, RecursionError):
        for line in raw:
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]


def numbers(line: Any) -> dict[str, float]:
    pairs = line.items() if isinstance(line, dict) else ()
    return {k: v for k, v in pairs if isinstance(v, (int, float)) and not isinstance(v, bool)}


def samples(run: str | Path) -> "pd.DataFrame":
    """Texts that the run wrote while it trained -> (step, name, text)."""
    return need("pandas").DataFrame(read_lines(Path(run) / "logs/samples.jsonl"), columns=["step", "name", "text"])


def load_runs(pattern: Runs = "runs", cached: bool = True) -> "pd.DataFrame":
    """One row a run, the newest last. What was read of a run before is taken from a cache while its files are the same.

    `name` is the folder below the one that all runs share; times are UTC; `seconds` were spent training, over all
    resumes; `flops` are the model's so far; `tokens_per_s` is a median. train/..., val/... are last values, min/val/...
    and max/val/... the extremes over all evaluations; `goal` is the metric that evaluations judge by, `best` its best
    value, of update `best_step`; `best_val_loss` the least val/loss. params... is meta/model.json, data/...
    meta/data.json, choice.<group> what was chosen in a config group, config.<dotted key> the resolved config.
    `unreadable` names the files that could not be read."""
    pd = need("pandas")
    rows = rows_of(find_runs(pattern), cached)
    shared = os.path.commonpath([Path(row["run"]).absolute().parent for row in rows])
    names = [{"name": os.path.relpath(row["run"], shared)} for row in rows]
    frame = pd.DataFrame([row | name for row, name in zip(rows, names)], dtype=object)
    core = [*TEXTS[:3], *COUNTS[:3], *TIMES, *VALUES, *COUNTS[3:], *TEXTS[3:]]
    rest = [c for c in frame.columns if c not in core]
    frame = frame.reindex(columns=core + sorted(rest, key=lambda c: c.startswith(SETTINGS)))
    typed = {c: _typed(frame[c], c) for c in frame.columns}
    wall = (typed["ended"].fillna(typed["heartbeat"]) - typed["started"]).dt.total_seconds()
    typed["seconds"] = typed["seconds"].fillna(wall)  # folders of before status.json had seconds
    return pd.DataFrame(typed).sort_values("started", kind="stable", na_position="first", ignore_index=True)


def _typed(column: "pd.Series", name: str) -> "pd.Series":
    pd = need("pandas")
    if name in TIMES:
        return pd.to_datetime(column.astype("str"), errors="coerce", utc=True, format="ISO8601")
    if name in COUNTS:
        return pd.to_numeric(column, errors="coerce").astype("Int64")
    if name.startswith(SETTINGS):  # with a gap, ints would become floats
        return column.infer_objects() if column.notna().all() else column
    return column if name in TEXTS else pd.to_numeric(column, errors="coerce").astype(float)


def rows_of(runs: list[Path], cached: bool = True) -> list[dict[str, Any]]:
    """What can be read of each run, by load_runs's columns, in the order of `runs`."""
    rows = {}
    for parent, group in itertools.groupby(sorted(runs, key=lambda r: str(r.parent)), lambda r: r.parent):
        known = cache.read(parent, _code()) if cached else {}
        new = {}
        for run in group:
            marks = cache.signature(run, FILES)
            before, row = known.get(run.name, (None, {}))
            if before != marks:
                row = _row(run)
                if cache.settled(marks):
                    new[run.name] = [marks, row]
            rows[run] = {"run": str(run), **row}
        if cached and new:
            cache.write(parent, _code(), {k: v for k, v in (known | new).items() if (parent / k).is_dir()})
    return [rows[run] for run in runs]


@functools.cache
def _code() -> str:
    """Another version of this file may make other rows of the same runs."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _row(run: Path) -> dict[str, Any]:
    unreadable = []

    def read(name: str, needed: bool = True) -> dict[str, Any]:
        try:
            text = (run / name).read_text(encoding="utf-8")
            return dict(yaml.load(text, _Loader) if name.endswith("yaml") else json.loads(text))
        except (OSError, ValueError, TypeError, yaml.YAMLError, RecursionError):
            if needed:
                unreadable.append(name)
            return {}

    status, data = read("status.json"), read("meta/data.json")
    config = read("meta/full_config.json", False) or read("meta/config.yaml")  # the same; JSON is read faster
    if not (run / "logs/metrics.jsonl").is_file():
        unreadable.append("logs/metrics.jsonl")
    lines = read_lines(run / "logs/metrics.jsonl")
    last: dict[str, Any] = {}
    for line in [status.get("metrics"), *lines]:
        last |= line if isinstance(line, dict) else {}
    last = numbers(last)
    series = {
        k: [(line[k], line["step"]) for line in lines if isinstance(line.get(k), (int, float))]
        for k in last
        if k == "perf/tokens_per_s" or (k.startswith("val/") and not k.startswith("val/full_"))
    }
    rates = [value for value, _ in series.pop("perf/tokens_per_s", [])]
    evaluated = {k: finite for k, v in series.items() if (finite := [pair for pair in v if math.isfinite(pair[0])])}
    row: dict[str, Any] = last | numbers(read("meta/model.json", False))
    row |= {f"min/{k}": min(v)[0] for k, v in evaluated.items()} | {f"max/{k}": max(v)[0] for k, v in evaluated.items()}
    row |= {k: status.get(k) for k in [*TIMES, "error", "seconds"]}
    row |= {"status": status.get("status", "unknown"), "step": last.get("step", status.get("step"))}
    row |= _best(status.get("goal"), evaluated) | {"tokens_per_s": statistics.median(rates) if rates else None}
    row |= {"unreadable": ", ".join(unreadable)} | {f"data/{k}": v for k, v in data.items()}
    row |= {f"choice.{k}": v for k, v in _choices(run, read("meta/choices.json", False), config).items()}
    return row | (flat(config, "config") if config else {})


def _best(goal: Any, evaluated: dict[str, list[tuple[float, int]]]) -> dict[str, Any]:
    """`goal` is status.json's {"metric": name, "mode": "min" or "max"}; without it val/loss, where there is one."""
    name, sign = "val/loss", 1
    if isinstance(goal, dict):
        name, sign = str(goal.get("metric")), -1 if goal.get("mode") == "max" else 1
    value, step = min(((sign * v, step) for v, step in evaluated.get(name, [])), default=(None, None))
    row = {
        "goal": name if value is not None else None,
        "best": None if value is None else sign * value,
        "best_step": step,
    }
    return row | {"best_val_loss": min(evaluated.get("val/loss", []), default=(None,))[0]}


def _choices(run: Path, recorded: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """{config group: choice}, like {"model/attn": "mla"}: meta/choices.json, else what was typed. An override is of a
    group if its key is no setting, or one that holds settings."""
    if recorded:
        return {k: v for k, v in recorded.items() if not k.startswith("hydra/")}
    found = {}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in (run / "meta/overrides").read_text(encoding="utf-8").splitlines():
            key, eq, value = line.lstrip("+").partition("=")
            group, node = key.split("@")[0], config
            for part in group.replace("/", ".").split("."):
                node = node.get(part, {}) if isinstance(node, dict) else None
            if eq and config and isinstance(node, dict) and ("." not in group):
                found[group] = value.strip("'\"")
    return found
