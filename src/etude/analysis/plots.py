"""Figures for a paper: learning curves, differences with their intervals, results against size or computing."""

import fnmatch
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etude.analysis.comparison import Comparison, natural
from etude.analysis.lines import AXES, curves, smooth
from etude.analysis.load import Runs, load_runs, need
from etude.analysis.settings import arms, shown_settings
from etude.errors import Refusal
from etude.signature import did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = {"loss": "nats", "nll": "nats", "entropy": "nats", "bits_per_byte": "bits per byte", "tokens_per_s": "tokens/s"}
LABELS = {"step": "steps (updates)", "tokens": "training data (tokens)", "flops": "training compute (FLOPs)"}
LABELS |= {"seconds": "training time (s)", "params": "parameters", "params_active": "active parameters"}
LABELS |= {"params_non_embedding": "parameters without embeddings"}
# Okabe and Ito, Color Universal Design (2008), without the yellow, which is too light for a line.
PALETTE = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000".split()
MARKERS = "o s D ^ v < >".split()
GRID_POINTS = 400  # of a mean over runs that were logged at other places


def save_figure(figure: "Figure", file: str) -> None:
    """What plot=FILE does: write and close a figure, and say where it is. Raises Refusal."""
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise Refusal(f"plot={file}: {str(error).splitlines()[0]}; give a .png, .pdf or .svg in a folder that is there") from None  # fmt: skip
    finally:
        need("matplotlib.pyplot").close(figure)
    print(f"figure   {file}")


def label(name: str) -> str:
    """A metric with its unit."""
    unit = UNITS.get(name.rpartition("/")[2].removeprefix("eval_").removeprefix("full_"))
    return LABELS.get(name) or (f"{name} ({unit})" if unit else name)


def plot_curves(
    runs: Runs,
    names: str | Sequence[str] = ("train/loss", "val/loss"),
    x: str = "step",
    by: str | Sequence[str] | None = None,
    ema: float | None = None,
    median: int | None = None,
    confidence: float = 0.95,
) -> "Figure":
    """A panel for each metric, over x="step", "tokens", "flops" or "seconds". A line for each run; with `by` (as in
    `compare`) a line for each arm, the mean of its runs where all of them have values, and Student's t interval of that
    mean as a band. `ema` and `median` smooth (see `smooth`) all but val/..., of which each point is a mean over many
    batches already. -> the figure, to .savefig(...)."""
    if x not in AXES:
        raise Refusal(f"x={x} is no axis{did_you_mean(x, list(AXES))}")
    plt = need("matplotlib.pyplot")
    df = load_runs(runs) if not hasattr(runs, "columns") else runs
    raw, wanted = curves(df, names), [names] if isinstance(names, str) else list(names)
    points = raw
    if ema is not None or median is not None:
        training = raw[~raw["name"].str.startswith("val/")]
        points = raw.assign(value=smooth(training, ema, median)["value"].reindex(raw.index).fillna(raw["value"]))
    if len(points) and points[x].isna().all():
        raise Refusal(f"x={x}: no line of these runs says it; there is x=step")
    groups = _groups(df, by)
    panels = list(dict.fromkeys(n for w in wanted for n in fnmatch.filter(sorted(set(points["name"])), w))) or wanted
    size = max(6.4, 4.8 * len(panels)), 4 + 0.2 * len(groups) / len(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    styles = itertools.cycle((color, line) for line in ("-", "--", ":") for color in PALETTE)
    lines = []
    for members, (color, style) in zip(groups.values(), styles):
        for ax, name in zip(axes[0], panels):
            here = points[points["run"].isin(members) & (points["name"] == name) & points["value"].notna()]
            if len(members) > 1:
                here = _band(ax, here, members, x, color, confidence)
            elif points is not raw and not name.startswith("val/"):
                ax.plot(here[x], raw.loc[here.index, "value"], style, color=color, alpha=0.25, linewidth=0.8)
            marker = "o" if len(here) <= 20 else None  # one evaluation alone should be seen too
            lines += ax.plot(here[x], here["value"], style, color=color, marker=marker, markersize=3, linewidth=1.5)
    for ax, name in zip(axes[0], panels):
        _dress(ax, label(x), label(name))
    title = f"mean and {100 * confidence:g} % interval" if any(len(m) > 1 for m in groups.values()) else None
    figure.legend(
        lines[:: len(panels)], list(groups), loc="outside lower center", ncols=len(panels), frameon=False, title=title
    )
    return figure


def _groups(df: "pd.DataFrame", by: str | Sequence[str] | None) -> dict[str, list[str]]:
    """{label: runs of one line}."""
    if by is None:
        return {text: [run] for run, text in zip(df["run"], _labels(df))}
    found: dict[str, list[str]] = {}
    for run, arm in zip(df["run"], arms(df, by)):
        found.setdefault(arm, []).append(run)
    return {
        f"{arm} ({len(members)} run{'s' * (len(members) > 1)})": members
        for arm, members in sorted(found.items(), key=lambda kv: natural(kv[0]))
    }


def _labels(df: "pd.DataFrame") -> list[str]:
    """Names for a legend, with the settings that differ where those are few."""
    settings = shown_settings(df)
    keys = list(settings) if len(settings) <= 3 else []
    texts = [[f"{settings[k].rpartition('.')[2]}={v}" for k, v in zip(keys, row)] for row in df[keys].values.tolist()]
    return [" ".join([name, *text]) for name, text in zip(df["name"], texts)]


def _band(
    ax: "Axes", points: "pd.DataFrame", members: list[str], x: str, color: str, confidence: float
) -> "pd.DataFrame":
    """Draw the interval of the mean over runs, -> the mean as (x, value), between the last first x and the first last x."""
    np, pd = need("numpy"), need("pandas")
    each = [points[points["run"] == run].sort_values(x) for run in members]
    each = [p for p in each if len(p)]
    if not each:
        return points
    xs = np.unique(points[x])
    xs = xs[(xs >= max(p[x].min() for p in each)) & (xs <= min(p[x].max() for p in each))]
    if len(xs) > max(map(len, each)) + 2:  # logged at other places: seconds, or tokens of unequal batches
        xs = np.linspace(xs[0], xs[-1], min(GRID_POINTS, max(map(len, each))))
    values = np.array([np.interp(xs, p[x], p["value"]) for p in each])
    if len(each) > 1:
        half = need("scipy.stats").t.ppf((1 + confidence) / 2, len(each) - 1) * values.std(0, ddof=1) / len(each) ** 0.5
        ax.fill_between(xs, values.mean(0) - half, values.mean(0) + half, color=color, alpha=0.18, linewidth=0)
    return pd.DataFrame({x: xs, "value": values.mean(0)})


def plot_compare(result: Comparison) -> "Figure":
    """A row a pair of arms: each seed's own difference (hollow), their mean and interval (filled), no difference as a
    line."""
    plt = need("matplotlib.pyplot")
    rows = result.table.to_dict("records")
    figure, ax = plt.subplots(figsize=(6.4, 1.4 + 0.45 * len(rows)), layout="constrained")
    ax.axvline(0, color="0.5", linewidth=1, linestyle="--", zorder=0)
    for y, row in enumerate(rows):
        own = result.differences.get(f"{row['arm']} - {row['baseline']}", [])
        ax.plot(own, [y] * len(own), "o", color="0.45", markerfacecolor="none", markersize=4, zorder=1)
        ends = [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
        ax.errorbar(row["difference"], y, xerr=ends, fmt="s", color=PALETTE[0], capsize=4, linewidth=1.8, markersize=6)
    n = [f"{row['n']} {'pairs' if row['test'] == 'paired t' else 'runs each'}" for row in rows]
    ax.set_yticks(
        range(len(rows)), [f"{row['arm']} \N{MINUS SIGN} {row['baseline']}\n({k})" for row, k in zip(rows, n)]
    )
    ax.set_ylim(len(rows) - 0.5, -0.5)
    _dress(
        ax,
        f"difference in {label(result.metric)}, mean and {100 * result.confidence:g} % interval (circles: pairs)",
        "",
    )
    ax.grid(visible=False, axis="y")
    return figure


def plot_final(
    runs: Runs, metric: str = "val/full_loss", x: str = "flops", by: str | Sequence[str] | None = None, log: bool = True
) -> "Figure":
    """The last `metric` of each completed run against x="flops", "params", "params_active", "params_non_embedding",
    "tokens", "seconds" or any numeric column. With `by`, an arm a colour and a line through its means at equal x."""
    plt, pd = need("matplotlib.pyplot"), need("pandas")
    df = load_runs(runs) if not hasattr(runs, "columns") else runs
    for column in (x, metric):
        if column not in df:
            raise Refusal(f"no run has {column}{did_you_mean(column, [c for c in df if df[c].dtype != object])}")
    arm = pd.Series(arms(df, by) if by else [""] * len(df), index=df.index)
    done = (df["status"] == "completed") & df[metric].notna() & df[x].notna()
    if not done.any():
        raise Refusal(f"no completed run has both {metric} and {x}")
    figure, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for i, name in enumerate(sorted(set(arm[done]), key=natural)):
        color, marker = PALETTE[i % 7], MARKERS[(i + i // 7) % 7]
        part = df[done & (arm == name)].astype({x: float})
        ax.plot(part[x], part[metric], marker, color=color, markerfacecolor="none", markersize=5, alpha=0.6)
        means = part.groupby(x)[metric].mean()
        line = "-" if by else "none"
        ax.plot(means.index, means, linestyle=line, color=color, marker=marker, markersize=5, label=name)
    if log and (df[done][x] > 0).all():
        ax.set_xscale("log")
    _dress(ax, label(x), label(metric))
    if by:
        figure.legend(loc="outside right upper", frameon=False)
    return figure


def _dress(ax: "Axes", x: str, y: str) -> Any:
    ticker = need("matplotlib.ticker")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if ax.get_xscale() == "linear" and not x.startswith("difference"):
        ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
