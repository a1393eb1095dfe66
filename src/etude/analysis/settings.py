"""In what runs differ: settings, choices in config groups, arms of a comparison; tables of it."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.analysis.load import HASHES, Runs, find_runs, load_runs, need, rows_of
from etude.errors import Refusal
from etude.signature import did_you_mean

if TYPE_CHECKING:
    import pandas as pd

# Where a run lies, what it is called, how it is shown and kept: no difference between experiments.
ASIDE = "cache_dir progress resume runs_dir tag save_every keep sweep tracker tracker.* sample_* histogram_every trusted dry_run".split()


def varying(df: "pd.DataFrame") -> list[str]:
    """The config columns in which the runs of `df` differ. Runs without a readable config do not count; neither does what
    only says where a run lies, how it is called or how it is shown."""
    columns = [c for c in df.columns if c.startswith("config.") and not _aside(c)]
    known = df.loc[df[columns].notna().any(axis=1), columns]
    values = {c: plain(known[c]) for c in columns}
    return [c for c, found in values.items() if any(v != found[0] for v in found)]


def plain(column: "pd.Series") -> list[Any]:
    """Values with None for what is missing. An absent key and null are the same setting."""
    return [None if missing else v for v, missing in zip(column.tolist(), column.isna())]


def need_numbers(df: "pd.DataFrame", *columns: str) -> None:
    """Raises Refusal unless every one of `columns` is there and holds numbers."""

    def numeric(column: str) -> bool:
        return all(v is None or isinstance(v, (int, float)) and not isinstance(v, bool) for v in plain(df[column]))

    for column in columns:
        if column not in df or not numeric(column):
            close = did_you_mean(column, [c for c in df.columns if not c.startswith("config.") and numeric(c)])
            kind = "is not a number; take one like val/full_loss or seconds"
            raise Refusal(f"{column} {kind}" if column in df else f"no run has {column}{close}")


def _aside(column: str) -> bool:
    return any(fnmatch.fnmatchcase(column.partition(".")[2], a) for a in ASIDE)


def shown_settings(df: "pd.DataFrame") -> dict[str, str]:
    """{column: how it is called} of what varies, for people: where runs chose differently in a config group, the choice
    instead of what follows from it."""
    choices = [c for c in df.columns if c.startswith("choice.") and not _aside(c) and df[c].notna().all()]
    choices = [c for c in choices if df[c].astype(str).nunique() > 1]
    shown = choices + varying(df)
    for choice in sorted(choices, key=len):  # a part's choice before those of its own parts
        if choice in shown:
            shown = [c for c in shown if c == choice or not (_inside(c, choice) and _follows(df, c, choice))]
    return {c: c.partition(".")[2] for c in shown}


def _inside(column: str, choice: str) -> bool:
    key, group = (c.partition(".")[2].replace("/", ".") for c in (column, choice))
    return key.startswith(f"{group}.") or key == group or (group == "experiment" and key != "seed")


def _follows(df: "pd.DataFrame", column: str, choice: str) -> bool:
    """Whether runs of the same choice have the same value."""
    known: dict[str, Any] = {}
    return all(known.setdefault(str(a), v) == v for a, v in zip(plain(df[choice]), plain(df[column])))


def arms(df: "pd.DataFrame", by: str | Sequence[str]) -> list[str]:
    """The name of each run's arm: its values of the settings or config groups `by`, like "model.dim" or "model/attn",
    one or several (or with commas between). Raises Refusal for what no run has."""
    keys = by.replace(" ", "").split(",") if isinstance(by, str) else list(by)
    return [", ".join(parts) for parts in zip(*(_values(df, key) for key in keys))]


def _values(df: "pd.DataFrame", key: str) -> list[str]:
    path, group = key.replace("/", "."), key.replace(".", "/")
    inside = [c for c in df.columns if c.startswith(f"config.{path}.")]
    column = key if key in df else f"config.{key}"
    if column in df and not inside:
        values = plain(df[column])
        return [v if isinstance(v, str) else f"{key.rpartition('.')[2]}={'null' if v is None else v}" for v in values]
    chosen = plain(df[f"choice.{group}"]) if f"choice.{group}" in df else [None] * len(df)
    if any(v is None for v in chosen) and inside:
        chosen = _by_content(df[inside], f"config.{path}._target_", chosen)
    elif f"choice.{group}" not in df:
        known = [c.partition(".")[2] for c in df.columns if c.startswith(("choice.", "config."))]
        raise Refusal(f"by={key}: these runs have no such setting or config group{did_you_mean(key, known)}")
    names = ["none" if v is None else str(v) for v in chosen]
    folder = names[0].rpartition("/")[0] + "/"
    return [n.removeprefix(folder) for n in names] if all(n.startswith(folder) for n in names) else names


def _by_content(part: "pd.DataFrame", target: str, chosen: list[Any]) -> list[str]:
    """Names of the parts that runs have where not all of them say which they chose (defaults that nobody typed, in
    folders without meta/choices.json): the choice of a run with an equal part, else the class and the keys in which the
    part differs from others of that class."""
    rows = [dict(zip(part.columns, values)) for values in zip(*(plain(part[c]) for c in part.columns))]
    names = {repr(row): str(choice) for row, choice in zip(rows, chosen) if choice is not None}
    for row in rows:
        same = [other for other in rows if other.get(target) == row.get(target)]
        keys = [c for c in part.columns if any(other[c] != row[c] for other in same)]
        kind = str(row.get(target) or "none").rpartition(".")[2]
        text = " ".join([kind, *(f"{c.rpartition('.')[2]}={row[c]}" for c in keys)])
        names.setdefault(repr(row), text)
    return [names[repr(row)] for row in rows]


def config_diff(a: str | Path, b: str | Path) -> "pd.DataFrame":
    """(key, a, b): the settings, and the hashes of data and tokenizer, in which two runs differ; "absent" where one run
    has no such key."""
    sides = []
    for run in (a, b):
        found = find_runs(run)
        if len(found) > 1:
            raise Refusal(f"{run} holds {len(found)} runs; name one of them, like {found[-1]}")
        (row,) = rows_of(found)
        if "meta/config.yaml" in row["unreadable"]:
            raise Refusal(f"{found[0]}/meta/config.yaml cannot be read, so there is nothing to compare")
        keys = [k for k in row if k.startswith("config.") or k in HASHES]
        sides.append({k.removeprefix("config."): row[k] for k in keys})
    pairs = [(k, *(side.get(k, "absent") for side in sides)) for k in sides[0] | sides[1]]
    return need("pandas").DataFrame([p for p in pairs if p[1] != p[2]], columns=["key", "a", "b"], dtype=object)


def over_seeds(df: "pd.DataFrame", metric: str = "val/full_loss") -> "pd.DataFrame":
    """Runs on the same data that differ in nothing but the seed as one row: the varying settings, the number of runs, the
    mean of `metric` and its standard error (NaN for one run), the least first."""
    known = df[df[metric].notna()]
    settings = [c for c in varying(known) if c != "config.seed"]
    groups: dict[str, list[int]] = {}
    for i, values in zip(known.index, known[settings + [c for c in HASHES if c in df]].values.tolist()):
        groups.setdefault(repr(values), []).append(i)
    shown = {c: name for c, name in shown_settings(known).items() if c != "config.seed"}
    shown |= {c: c for c in HASHES if c in df and known[c].nunique() > 1}
    rows = [
        [*known.loc[group[0], list(shown)], len(group), known.loc[group, metric].mean(), known.loc[group, metric].sem()]
        for group in groups.values()
    ]
    columns = [*shown.values(), "runs", metric, "standard error"]
    return need("pandas").DataFrame(rows, columns=columns).sort_values(metric, ignore_index=True)


def table(df: "pd.DataFrame") -> "pd.DataFrame":
    """What one looks at first: status ("silent" is a run without a heartbeat for ten minutes), val loss over the whole
    split at the end, best val loss over the batches of an evaluation (or what else the runs are judged by), and the
    settings that vary."""
    names = {"step": "steps", "val/full_loss": "val loss", "best_val_loss": "best val loss", "tokens_per_s": "tokens/s"}
    goals = sorted(set(df["goal"].dropna()) - {"val/loss"})
    for goal in goals:
        full = goal.replace("val/", "val/full_")
        names |= {c: c.replace("val/", "val ").replace("full_", "") for c in [full] if c in df}
    if goals:
        names["best"] = f"best {' or '.join(sorted(set(df['goal'].dropna())))}".replace("val/", "val ")
    if goals and df["val/full_loss"].isna().all():
        names = {c: n for c, n in names.items() if "loss" not in c}
    settings = shown_settings(df)
    pd = need("pandas")
    silent = (df["status"] == "running") & (pd.Timestamp.now("UTC") - df["heartbeat"] > pd.Timedelta(minutes=10))
    short = df[["name", "status", *names, *settings]].rename(columns=names | settings)
    return short.assign(status=df["status"].mask(silent, "silent"))


def final(runs: Runs, metric: str = "val/full_loss", params: str = "params") -> "pd.DataFrame":
    """Completed runs as (run, params, tokens, flops, loss) and the settings that vary: what a scaling law is fitted to.
    `params` may be params_active or params_non_embedding; `loss` is the last value of `metric`. Raises Refusal where no
    run has them."""
    df = load_runs(runs) if not hasattr(runs, "columns") else runs
    need_numbers(df, metric, params)
    done = df[(df["status"] == "completed") & df[metric].notna()]
    settings = shown_settings(done)
    columns = {params: "params", "tokens": "tokens", "flops": "flops", metric: "loss"}
    found = done[["run", *columns, *settings]].rename(columns=columns | settings)
    return found.astype({c: float for c in columns.values()}).reset_index(drop=True)
