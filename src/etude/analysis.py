"""Compare runs from their folders alone: tables, curves, differences. A damaged run shows what of it can be read.

python -m etude.analysis [FOLDER, RUN or GLOB ...]    a table of the runs (default: runs)
python -m etude.analysis diff RUN_A RUN_B             the settings in which two runs differ"""

import contextlib
import fnmatch
import glob
import importlib
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from etude.config import guard
from etude.errors import Refusal
from etude.run import flat

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    Runs = str | Path | Iterable[str | Path] | pd.DataFrame  # a folder, a glob, several of them, or load_runs's table

COUNTS = ["step", "tokens"]
TIMES = ["started", "heartbeat", "ended"]
LOSSES = ["best_val_loss", "train/loss", "val/loss", "val/full_loss", "val/full_bits_per_byte"]
CORE = [
    "run",
    "name",
    "status",
    *COUNTS,
    "seconds",
    *TIMES,
    "error",
    "unreadable",
    "tokens_per_s",
    "best_step",
    *LOSSES,
]
# Where a run lies, what it is called and how it is shown: no difference between experiments.
ASIDE = {f"config.{k}" for k in ("cache_dir", "progress", "resume", "runs_dir", "tag", "threads")}
UNITS = {"loss": "nats", "nll": "nats", "entropy": "nats", "bits_per_byte": "bits per byte", "tokens_per_s": "tokens/s"}
# Okabe and Ito, Color Universal Design (2008), without the yellow, which is too light for a line.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]


def find_runs(pattern: "Runs") -> list[Path]:
    """Run folders of `pattern`, each once, in the order of their paths. Folders are searched three deep, which reaches
    runs/sweeps/<sweep>/<job>. Raises Refusal where there is none."""
    if not isinstance(pattern, (str, Path)):
        return list(dict.fromkeys(run for one in pattern for run in find_runs(one)))
    top = Path(pattern).expanduser()
    places = [top] if top.exists() else [Path(p) for p in sorted(glob.glob(str(top), recursive=True))]
    if found := list(dict.fromkeys(run for place in places for run in _search(place, 3))):
        return found
    what = "no run in it (a run has a status.json)" if places else "nothing there"
    raise Refusal(f"{pattern}: {what}; give a folder of runs, a run or a glob, like runs or 'runs/2026*'")


def _search(folder: Path, depth: int) -> Iterator[Path]:
    # A run that was killed while it began has no status.json yet.
    if (folder / "status.json").exists() or ((folder / "meta").is_dir() and (folder / "logs").is_dir()):
        yield folder
    elif depth and folder.is_dir():
        for child in sorted(folder.iterdir()):
            yield from _search(child, depth - 1)


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file; [] without the file. Lines that cannot be read, as a kill leaves them, are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]


def samples(run: str | Path) -> "pd.DataFrame":
    """Texts that the run wrote while it trained -> (step, name, text)."""
    return _need("pandas").DataFrame(read_lines(Path(run) / "logs/samples.jsonl"), columns=["step", "name", "text"])


def load_runs(pattern: "Runs" = "runs") -> "pd.DataFrame":
    """One row a run, in the order of their starts. `name` is the folder relative to the runs' common one; times are UTC
    and `seconds` those from the last start (or resume) to the end; `tokens_per_s` is a median; `best_val_loss` is the
    least val/loss, of update number `best_step`; train/..., val/... are last values; data/... is from meta/data.json and
    config.<dotted key> from meta/config.yaml; `unreadable` names the files that could not be read."""
    pd = _need("pandas")
    folders = find_runs(pattern)
    parents = [folder.absolute().parent.parts for folder in folders]
    shared = next((i for i, parts in enumerate(zip(*parents)) if len(set(parts)) > 1), min(map(len, parents)))
    names = ["/".join(folder.absolute().parts[shared:]) for folder in folders]
    frame = pd.DataFrame([_row(folder) | {"name": name} for folder, name in zip(folders, names)], dtype=object)
    rest = [c for c in frame.columns if c not in CORE]
    frame = frame.reindex(columns=CORE + sorted(rest, key=lambda c: c.startswith(("data/", "config."))))
    for c in frame.columns:
        if c in TIMES:
            frame[c] = pd.to_datetime(frame[c], errors="coerce", utc=True, format="ISO8601")
        elif c in COUNTS or c == "best_step":
            frame[c] = pd.to_numeric(frame[c], errors="coerce").astype("Int64")
        elif c in LOSSES or c == "tokens_per_s" or (c in rest and not c.startswith(("data/", "config."))):
            frame[c] = pd.to_numeric(frame[c], errors="coerce").astype(float)
        elif frame[c].notna().all():  # else as read: ints beside a gap would become floats
            frame[c] = frame[c].infer_objects()
    frame["seconds"] = (frame["ended"].fillna(frame["heartbeat"]) - frame["started"]).dt.total_seconds()
    return frame.sort_values("started", kind="stable", na_position="first", ignore_index=True)


def _row(run: Path) -> dict[str, Any]:
    """What can be read of one run, by column."""
    status, data, config, unreadable = {}, {}, {}, []
    for into, name in ((status, "status.json"), (data, "meta/data.json"), (config, "meta/config.yaml")):
        try:
            text = (run / name).read_text(encoding="utf-8")
            into.update(yaml.load(text, _Loader) if name.endswith("yaml") else json.loads(text))
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            unreadable.append(name)
    if not (run / "logs/metrics.jsonl").is_file():
        unreadable.append("logs/metrics.jsonl")
    lines = read_lines(run / "logs/metrics.jsonl")
    last = {k: v for line in [status.get("metrics") or {}, *lines] for k, v in _numbers(line).items()}
    losses = [(v, line["step"]) for line in lines if (v := _numbers(line).get("val/loss")) is not None and v == v]
    rates = [v for line in lines if (v := _numbers(line).get("perf/tokens_per_s")) is not None]
    best, best_step = min(losses, default=(None, None))
    return {
        **last,
        "run": str(run),
        "status": status.get("status", "unknown"),
        "step": lines[-1]["step"] if lines else status.get("step"),
        **{k: status.get(k) for k in [*TIMES, "error"]},
        "unreadable": ", ".join(unreadable),
        "tokens_per_s": statistics.median(rates) if rates else None,
        "best_val_loss": best,
        "best_step": best_step,
        **{f"data/{k}": v for k, v in data.items()},
        **(flat(config, "config") if config else {}),
    }


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is there


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Refusal(f'{error.name} is not installed: pip install "etude[analysis]"') from None


def _numbers(line: dict) -> dict[str, float]:
    return {k: v for k, v in line.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _folders(runs: "Runs") -> list[Path]:
    return [Path(r) for r in runs["run"]] if hasattr(runs, "columns") else find_runs(runs)


def curves(runs: "Runs", names: str | Sequence[str] = ("train/loss", "val/loss")) -> "pd.DataFrame":
    """Logged values in long form: (run, step in updates, tokens trained on, name, value). `names` are metrics or patterns
    like "val/*". Raises Refusal where the runs have metrics, but none of these."""
    wanted = [names] if isinstance(names, str) else list(names)
    records, known = [], set()
    for run in _folders(runs):
        per_step = None  # every update takes as many tokens; lines of an evaluation alone do not say how many
        for line in read_lines(run / "logs/metrics.jsonl"):
            values, step = _numbers(line), line["step"]
            known |= values.keys() - {"step"}
            per_step = values["tokens"] / step if "tokens" in values and step else per_step
            tokens = None if per_step is None else round(step * per_step)
            for name in values.keys() - {"step"}:
                if any(fnmatch.fnmatchcase(name, w) for w in wanted):
                    records.append((str(run), step, tokens, name, float(values[name])))
    if known and not records:
        raise Refusal(f"no run has the metric {' or '.join(wanted)}; there are {', '.join(sorted(known))}")
    frame = _need("pandas").DataFrame(records, columns=["run", "step", "tokens", "name", "value"])
    return frame.astype({"step": "int64", "tokens": "float64", "value": "float64"}).sort_values(
        ["run", "name", "step"], kind="stable", ignore_index=True
    )


def config_diff(a: str | Path, b: str | Path) -> "pd.DataFrame":
    """(key, a, b): the settings, and the hashes of data and tokenizer, in which two runs differ; `absent` where one run
    has no such key."""
    rows = []
    for run in (a, b):
        found = find_runs(run)
        if len(found) > 1:
            raise Refusal(f"{run} holds {len(found)} runs; name one of them, like {found[-1]}")
        row = _row(found[0])
        if "meta/config.yaml" in row["unreadable"]:
            raise Refusal(f"{found[0]}/meta/config.yaml cannot be read, so there is nothing to compare")
        hashes = {k: row[k] for k in ("data/sha256", "data/tokenizer_sha256") if k in row}
        rows.append({k.removeprefix("config."): v for k, v in row.items() if k.startswith("config.")} | hashes)
    pairs = [(k, *(row.get(k, "absent") for row in rows)) for k in dict.fromkeys([*rows[0], *rows[1]])]
    return _need("pandas").DataFrame([p for p in pairs if p[1] != p[2]], columns=["key", "a", "b"], dtype=object)


def varying(df: "pd.DataFrame") -> list[str]:
    """The config columns in which the runs of `df` differ. Runs without a readable config do not count; neither does what
    only says where a run lies, how it is called or how it is shown."""
    columns = [c for c in df.columns if c.startswith("config.") and c not in ASIDE]
    known = df.loc[df[columns].notna().any(axis=1), columns]
    values = {c: [None if v != v else v for v in known[c].tolist()] for c in columns}
    return [c for c, found in values.items() if any(v != found[0] for v in found)]


def over_seeds(df: "pd.DataFrame", metric: str = "val/full_loss") -> "pd.DataFrame":
    """Runs that differ in nothing but the seed as one row: the varying settings, the number of runs, mean of `metric` and
    its standard error (NaN for one run), the best first."""
    known = df[df[metric].notna()]
    settings = [c for c in varying(known) if c != "config.seed"]
    groups: dict[str, list[int]] = {}
    for i, values in zip(known.index, known[settings].values.tolist()):
        groups.setdefault(repr(values), []).append(i)
    rows = [
        {c.removeprefix("config."): known.at[group[0], c] for c in settings}
        | {
            "runs": len(group),
            metric: known.loc[group, metric].mean(),
            "standard error": known.loc[group, metric].sem(),
        }
        for group in groups.values()
    ]
    columns = [*(c.removeprefix("config.") for c in settings), "runs", metric, "standard error"]
    return _need("pandas").DataFrame(rows, columns=columns).sort_values(metric, ignore_index=True)


def plot_curves(runs: "Runs", names: str | Sequence[str] = ("train/loss", "val/loss"), x: str = "step") -> "Figure":
    """A panel for each metric, a line for each run; `x` is "step" or "tokens". -> the figure; save it with .savefig."""
    plt = _need("matplotlib.pyplot")
    if x not in COUNTS:
        raise Refusal(f"x={x} is neither step nor tokens")
    table = runs if hasattr(runs, "columns") else load_runs(runs)
    frame = curves(table, names)
    wanted = [names] if isinstance(names, str) else list(names)
    panels = list(dict.fromkeys(n for w in wanted for n in fnmatch.filter(sorted(set(frame["name"])), w))) or wanted
    figure, axes = plt.subplots(
        1, len(panels), figsize=(max(6.4, 4.8 * len(panels)), 4.2), squeeze=False, layout="constrained"
    )
    styles = [(color, line) for line in ("-", "--", ":") for color in PALETTE]
    handles = {}
    for run, label, (color, line) in zip(table["run"], _labels(table), cycle(styles)):
        for ax, name in zip(axes[0], panels):
            points = frame[(frame["run"] == run) & (frame["name"] == name)]
            marker = "o" if len(points) <= 20 else None
            (drawn,) = ax.plot(points[x], points["value"], color=color, linestyle=line, marker=marker, markersize=3)
            handles.setdefault(label, drawn)
    for ax, name in zip(axes[0], panels):
        unit = UNITS.get(name.rpartition("/")[2].removeprefix("eval_").removeprefix("full_"))
        ax.set_ylabel(f"{name} ({unit})" if unit else name)
        ax.set_xlabel("step (updates)" if x == "step" else "training data (tokens)")
        ax.xaxis.set_major_formatter(importlib.import_module("matplotlib.ticker").EngFormatter(sep=""))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=max(1, len(panels)),
        fontsize="small",
        frameon=False,
    )
    return figure


def _labels(df: "pd.DataFrame") -> list[str]:
    """Names for a legend, with the settings that differ where those are few."""
    keys = varying(df)
    keys = keys if len(keys) <= 3 else []
    texts = [[f"{k.rpartition('.')[2]}={v}" for k, v in zip(keys, values)] for values in df[keys].values.tolist()]
    return [" ".join([name, *text]) for name, text in zip(df["name"], texts)]


def table(df: "pd.DataFrame") -> "pd.DataFrame":
    """What one looks at first: name, status, steps, val loss (nats a token over the whole split, at the end), best val
    loss (over the batches of an evaluation), tokens/s, and the settings that vary."""
    short = df[["name", "status", "step", "val/full_loss", "best_val_loss", "tokens_per_s", *varying(df)]]
    names = {"step": "steps", "val/full_loss": "val loss", "best_val_loss": "best val loss", "tokens_per_s": "tokens/s"}
    return short.rename(columns=lambda c: names.get(c, c.removeprefix("config.")))


def _print(df: "pd.DataFrame") -> None:
    def text(value: Any) -> str:
        if value is None or value is _need("pandas").NA or value != value:
            return "-"
        shown = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
        return shown if len(shown) <= 60 else shown[:57] + "..."

    print(df.map(text).to_string(index=False) if len(df) else "no difference")


def main(arguments: list[str]) -> int:
    """-> exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    elif arguments[:1] == ["diff"]:
        if len(arguments) != 3:
            raise Refusal("diff takes two runs: python -m etude.analysis diff RUN_A RUN_B")
        _print(config_diff(*arguments[1:]))
    else:
        _print(table(load_runs(arguments or ["runs"])))
    return 0


if __name__ == "__main__":
    sys.exit(guard(lambda: main(sys.argv[1:])))
