"""Compare runs from their folders alone: tables, curves, differences. A damaged run shows what of it can be read.

python -m etude.analysis [FOLDER, RUN or GLOB ...]    a table of the runs (default: runs)
python -m etude.analysis diff RUN_A RUN_B             the settings in which two runs differ"""

import contextlib
import fnmatch
import glob
import importlib
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from etude.errors import Refusal
from etude.run import flat

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Runs: TypeAlias = Any  # a run, a folder of runs, a glob, a list of these, or load_runs's table

TEXTS, TIMES = "run name status error unreadable".split(), "started heartbeat ended".split()
COUNTS = "step tokens best_step".split()
VALUES = "seconds tokens_per_s best_val_loss train/loss val/loss val/full_loss val/full_bits_per_byte".split()
HASHES = ["data/sha256", "data/tokenizer_sha256"]
# Where a run lies, what it is called and how it is shown: no difference between experiments.
ASIDE = [f"config.{k}" for k in "cache_dir progress resume runs_dir tag".split()]
UNITS = {"loss": "nats", "nll": "nats", "entropy": "nats", "bits_per_byte": "bits per byte", "tokens_per_s": "tokens/s"}
# Okabe and Ito, Color Universal Design (2008), without the yellow, which is too light for a line.
PALETTE = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000".split()
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is there


def find_runs(pattern: Runs) -> list[Path]:
    """Run folders of `pattern`, each once, by path. Folders are searched three deep, which reaches
    runs/sweeps/<sweep>/<job>. Raises Refusal where there is none."""
    if hasattr(pattern, "columns"):
        return [Path(run) for run in pattern["run"]]
    if not isinstance(pattern, (str, Path)):
        return list(dict.fromkeys(run for one in pattern for run in find_runs(one)))
    top = Path(pattern).expanduser()
    places = [top] if top.exists() else [Path(p) for p in sorted(glob.glob(str(top), recursive=True))]
    if found := list(dict.fromkeys(run for place in places for run in _search(place, 3))):
        return found
    what = "no run is in it" if places else "there is no such folder"
    raise Refusal(f"{pattern}: {what}; give a folder of runs, a run or a glob, like runs or 'runs/2026*'")


def _search(folder: Path, depth: int) -> Iterator[Path]:
    # A run that was killed while it began has no status.json yet.
    if (folder / "status.json").exists() or ((folder / "meta").is_dir() and (folder / "logs").is_dir()):
        yield folder
    elif depth and folder.is_dir():
        for child in sorted(folder.iterdir()):
            yield from _search(child, depth - 1)


def read_lines(path: Path) -> list[dict]:
    """The objects of a run's JSONL file; [] without the file. Lines cut short by a kill or a full disk are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]


def _numbers(line: Any) -> dict[str, float]:
    pairs = line.items() if isinstance(line, dict) else ()
    return {k: v for k, v in pairs if isinstance(v, (int, float)) and not isinstance(v, bool)}


def samples(run: str | Path) -> "pd.DataFrame":
    """Texts that the run wrote while it trained -> (step, name, text)."""
    return _need("pandas").DataFrame(read_lines(Path(run) / "logs/samples.jsonl"), columns=["step", "name", "text"])


def load_runs(pattern: Runs = "runs") -> "pd.DataFrame":
    """One row a run, the newest last. `name` is the folder below the one that all runs share; times are UTC, `seconds`
    from the last start (or resume) to the end; `tokens_per_s` is a median; `best_val_loss` the least val/loss, of update
    `best_step`; train/..., val/... are last values; data/... is meta/data.json, config.<dotted key> meta/config.yaml;
    `unreadable` names the files that could not be read."""
    pd = _need("pandas")
    rows = [_row(run) for run in find_runs(pattern)]
    shared = os.path.commonpath([Path(row["run"]).absolute().parent for row in rows])
    frame = pd.DataFrame([row | {"name": os.path.relpath(row["run"], shared)} for row in rows], dtype=object)
    core = [*TEXTS[:3], *COUNTS, *TIMES, *VALUES, *TEXTS[3:]]
    rest = [c for c in frame.columns if c not in core]
    frame = frame.reindex(columns=core + sorted(rest, key=lambda c: c.startswith(("data/", "config."))))
    for c in frame.columns:
        if c in TIMES:
            frame[c] = pd.to_datetime(frame[c].astype("str"), errors="coerce", utc=True, format="ISO8601")
        elif c in COUNTS:
            frame[c] = pd.to_numeric(frame[c], errors="coerce").astype("Int64")
        elif c.startswith(("data/", "config.")):  # with a gap, ints would become floats
            frame[c] = frame[c].infer_objects() if frame[c].notna().all() else frame[c]
        elif c not in TEXTS:
            frame[c] = pd.to_numeric(frame[c], errors="coerce").astype(float)
    frame["seconds"] = (frame["ended"].fillna(frame["heartbeat"]) - frame["started"]).dt.total_seconds()
    return frame.sort_values("started", kind="stable", na_position="first", ignore_index=True)


def _row(run: Path) -> dict[str, Any]:
    """What can be read of one run, by load_runs's columns."""
    read: dict[str, dict] = {}
    unreadable = []
    for name in ("status.json", "meta/data.json", "meta/config.yaml"):
        read[name] = {}
        try:
            text = (run / name).read_text(encoding="utf-8")
            read[name].update(yaml.load(text, _Loader) if name.endswith("yaml") else json.loads(text))
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            unreadable.append(name)
    status, data, config = read.values()
    if not (run / "logs/metrics.jsonl").is_file():
        unreadable.append("logs/metrics.jsonl")
    lines = [_numbers(line) for line in read_lines(run / "logs/metrics.jsonl")]
    last = {k: v for line in [_numbers(status.get("metrics")), *lines] for k, v in line.items()}
    rates = [line["perf/tokens_per_s"] for line in lines if "perf/tokens_per_s" in line]
    losses = [(line["val/loss"], line["step"]) for line in lines if not math.isnan(line.get("val/loss", math.nan))]
    best, best_step = min(losses, default=(None, None))
    row = last | {k: status.get(k) for k in [*TIMES, "error"]}
    row |= {"run": str(run), "status": status.get("status", "unknown"), "step": last.get("step", status.get("step"))}
    row |= {"best_val_loss": best, "best_step": best_step, "tokens_per_s": statistics.median(rates) if rates else None}
    row |= {"unreadable": ", ".join(unreadable)} | {f"data/{k}": v for k, v in data.items()}
    return row | (flat(config, "config") if config else {})


def curves(runs: Runs, names: str | Sequence[str] = ("train/loss", "val/loss")) -> "pd.DataFrame":
    """Logged values in long form: (run, step in updates, tokens trained on, name, value). `names` are metrics or patterns
    like "val/*". Raises Refusal where the runs have metrics, but none of these."""
    wanted = [names] if isinstance(names, str) else list(names)
    records, known = [], set()
    for run in find_runs(runs):
        per_step = math.nan  # the same for every update; the lines of an evaluation alone do not give tokens
        for line in read_lines(run / "logs/metrics.jsonl"):
            values, step = _numbers(line), line["step"]
            per_step = values["tokens"] / step if step and "tokens" in values else per_step
            known |= values.keys() - {"step"}
            found = [n for n in values if n != "step" and any(fnmatch.fnmatchcase(n, w) for w in wanted)]
            records += [(str(run), step, step * per_step, name, float(values[name])) for name in found]
    if known and not records:
        raise Refusal(f"no run has the metric {' or '.join(wanted)}; there are {', '.join(sorted(known))}")
    frame = _need("pandas").DataFrame(records, columns=["run", "step", "tokens", "name", "value"])
    return frame.astype({"step": "int64", "tokens": float, "value": float})


def config_diff(a: str | Path, b: str | Path) -> "pd.DataFrame":
    """(key, a, b): the settings, and the hashes of data and tokenizer, in which two runs differ; "absent" where one run
    has no such key."""
    sides = []
    for run in (a, b):
        found = find_runs(run)
        if len(found) > 1:
            raise Refusal(f"{run} holds {len(found)} runs; name one of them, like {found[-1]}")
        row = _row(found[0])
        if "meta/config.yaml" in row["unreadable"]:
            raise Refusal(f"{found[0]}/meta/config.yaml cannot be read, so there is nothing to compare")
        keys = [k for k in row if k.startswith("config.") or k in HASHES]
        sides.append({k.removeprefix("config."): row[k] for k in keys})
    pairs = [(k, *(side.get(k, "absent") for side in sides)) for k in sides[0] | sides[1]]
    return _need("pandas").DataFrame([p for p in pairs if p[1] != p[2]], columns=["key", "a", "b"], dtype=object)


def varying(df: "pd.DataFrame") -> list[str]:
    """The config columns in which the runs of `df` differ. Runs without a readable config do not count; neither does what
    only says where a run lies, how it is called or how it is shown."""
    columns = [c for c in df.columns if c.startswith("config.") and c not in ASIDE]
    known = df.loc[df[columns].notna().any(axis=1), columns]
    values = {c: [None if v != v else v for v in known[c].tolist()] for c in columns}
    return [c for c, found in values.items() if any(v != found[0] for v in found)]


def over_seeds(df: "pd.DataFrame", metric: str = "val/full_loss") -> "pd.DataFrame":
    """Runs on the same data that differ in nothing but the seed as one row: the varying settings, the number of runs, the
    mean of `metric` and its standard error (NaN for one run), the least first."""
    known = df[df[metric].notna()]
    settings = [c for c in varying(known) if c != "config.seed"]
    groups: dict[str, list[int]] = {}
    for i, values in zip(known.index, known[settings + [c for c in HASHES if c in df]].values.tolist()):
        groups.setdefault(repr(values), []).append(i)
    rows = [
        [*known.loc[group[0], settings], len(group), known.loc[group, metric].mean(), known.loc[group, metric].sem()]
        for group in groups.values()
    ]
    columns = [*(c.removeprefix("config.") for c in settings), "runs", metric, "standard error"]
    return _need("pandas").DataFrame(rows, columns=columns).sort_values(metric, ignore_index=True)


def plot_curves(runs: Runs, names: str | Sequence[str] = ("train/loss", "val/loss"), x: str = "step") -> "Figure":
    """A panel for each metric, a line for each run, over x="step" or x="tokens". -> the figure, to .savefig(...)."""
    if x not in ("step", "tokens"):
        raise Refusal(f"x={x} is neither step nor tokens")
    plt, ticker = _need("matplotlib.pyplot"), _need("matplotlib.ticker")
    df = load_runs(runs) if not hasattr(runs, "columns") else runs
    points, wanted = curves(df, names), [names] if isinstance(names, str) else list(names)
    panels = list(dict.fromkeys(n for w in wanted for n in fnmatch.filter(sorted(set(points["name"])), w))) or wanted
    size = max(6.4, 4.8 * len(panels)), 4 + 0.2 * len(df) / len(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    styles = itertools.cycle((color, line) for line in ("-", "--", ":") for color in PALETTE)
    lines = []
    for run, (color, style) in zip(df["run"], styles):
        for ax, name in zip(axes[0], panels):
            here = points[(points["run"] == run) & (points["name"] == name)]
            marker = "o" if len(here) <= 20 else None  # one evaluation alone should be seen too
            lines += ax.plot(here[x], here["value"], style, color=color, marker=marker, markersize=3)
    for ax, name in zip(axes[0], panels):
        unit = UNITS.get(name.rpartition("/")[2].removeprefix("eval_").removeprefix("full_"))
        ax.set_ylabel(f"{name} ({unit})" if unit else name)
        ax.set_xlabel("steps (updates)" if x == "step" else "training data (tokens)")
        ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(lines[:: len(panels)], _labels(df), loc="outside lower center", ncols=len(panels), frameon=False)
    return figure


def _labels(df: "pd.DataFrame") -> list[str]:
    """Names for a legend, with the settings that differ where those are few."""
    keys = varying(df)
    keys = keys if len(keys) <= 3 else []
    texts = [[f"{k.rpartition('.')[2]}={v}" for k, v in zip(keys, values)] for values in df[keys].values.tolist()]
    return [" ".join([name, *text]) for name, text in zip(df["name"], texts)]


def table(df: "pd.DataFrame") -> "pd.DataFrame":
    """What one looks at first: status ("silent" is a run without a heartbeat for ten minutes), val loss over the whole
    split at the end, best val loss over the batches of an evaluation, and the settings that vary."""
    names = {"step": "steps", "val/full_loss": "val loss", "best_val_loss": "best val loss", "tokens_per_s": "tokens/s"}
    settings = {c: c.removeprefix("config.") for c in varying(df)}
    pd = _need("pandas")
    silent = (df["status"] == "running") & (pd.Timestamp.now("UTC") - df["heartbeat"] > pd.Timedelta(minutes=10))
    short = df[["name", "status", *names, *settings]].rename(columns=names | settings)
    return short.assign(status=df["status"].mask(silent, "silent"))


def _show(df: "pd.DataFrame") -> None:
    def text(value: Any) -> str:
        if value is None:
            return "null"
        if value is _need("pandas").NA or value != value:
            return "-"
        shown = f"{value:.5g}" if isinstance(value, float) else " ".join(str(value).split())
        return shown if len(shown) <= 60 else shown[:57] + "..."

    print(df.astype(object).map(text).to_string(index=False) if len(df) else "no difference")


def _show_runs(df: "pd.DataFrame", widest: int = 16) -> None:
    short = table(df)
    _show(short.iloc[:, :widest])
    if more := list(short.columns[widest:]):
        print(f"{len(more)} more settings vary: {' '.join(more)}")
    if any(df[c].nunique() > 1 for c in HASHES if c in df):
        print("not all of these runs share data and tokenizer: their losses cannot be compared")


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise Refusal(f'{missing} is not installed: pip install "etude[analysis]"') from None


def main(arguments: list[str]) -> int:
    """-> exit code."""
    try:
        if {"-h", "--help"} & set(arguments):
            print(__doc__)
        elif arguments[:1] != ["diff"]:
            _show_runs(load_runs(arguments or "runs"))
        elif len(arguments) == 3:
            _show(config_diff(*arguments[1:]))
        else:
            raise Refusal("diff takes two runs: python -m etude.analysis diff RUN_A RUN_B")
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
