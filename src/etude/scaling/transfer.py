"""Where the best learning rate lies at each width, and how far it moves: what muP promises not to happen (Yang et al. 2022)."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from etude.analysis.load import Runs, load_runs, need
from etude.analysis.settings import need_numbers
from etude.errors import Refusal
from etude.scaling.laws import Interval, percentiles

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = {"config.model.mup": "mup", "config.model.dim": "width", "config.optimizer.lr": "lr", "config.seed": "seed"}


@dataclasses.dataclass(frozen=True)
class Optimum:
    """Of one width: the learning rate of the parabola's least loss, its interval (NaN with one seed), whether the grid of rates
    ends before it, and draws of its log2, as many as of every other width."""

    lr: float
    interval: Interval
    beyond: int  # -1 or 1: the grid ends at the best rate, which may lie lower or higher; else 0
    draws: Any


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Of one parametrisation. `shift`: by what factor the best rate changes from the narrowest to the widest model."""

    optima: dict[int, Optimum]
    shift: float
    interval: Interval


def table(runs: Runs, metric: str = "val/full_loss") -> "pd.DataFrame":
    """Runs as (mup, width, lr, seed, loss). A run that diverged has no loss and is left out. Raises Refusal where there is
    nothing to compare."""
    df = load_runs(runs)
    if missing := [c for c in COLUMNS if c not in df]:
        raise Refusal(f"no run has {missing[0]}; train some with: python train.py sweep=lr_transfer")
    need_numbers(df, metric)
    found = df[df["status"] == "completed"][[*COLUMNS, metric]].rename(columns=COLUMNS | {metric: "loss"})
    found = found[found["loss"].notna() & (found["loss"] < math.inf)].reset_index(drop=True)
    if not len(found):
        raise Refusal(f"none of the {len(df)} runs is completed with a {metric}")
    return found.astype({"width": int, "lr": float, "loss": float, "mup": bool})


def transfer(
    found: "pd.DataFrame", resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[bool, Transfer]:
    """For each parametrisation (mup or not) in a table (mup, width, lr, seed, loss) the best rate of each width. Raises Refusal
    for fewer than two widths of three rates each."""
    result = {}
    for mup, group in found.groupby("mup"):
        optima = {}
        for width, part in group.groupby("width"):
            if part["lr"].nunique() >= 3:
                optima[int(width)] = optimum(part, resamples, confidence, seed)
        if len(optima) < 2:
            continue
        first, last = optima[min(optima)], optima[max(optima)]
        draws = last.draws - first.draws
        low, high = percentiles(draws, confidence) if not math.isnan(draws[0]) else (math.nan, math.nan)
        result[bool(mup)] = Transfer(optima, last.lr / first.lr, (2.0**low, 2.0**high))
    if not result:
        raise Refusal(
            "there are not two widths with three learning rates each; train more: python train.py sweep=lr_transfer"
        )
    return result


def optimum(part: "pd.DataFrame", resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Optimum:
    """The least loss over log2 lr of runs (lr, seed, loss) of one width: the vertex of a parabola through the best rate and two
    on either side. The interval is that of the parabola when the mean at each rate has the noise that the seeds show, without
    what a seed adds at all rates alike."""
    np = need("numpy")
    grid = part.pivot_table(index="lr", columns="seed", values="loss")
    means = grid.mean(axis=1)
    best = int(means.to_numpy().argmin())
    grid = grid.iloc[max(0, best - 2) : best + 3]
    x, y = np.log2(grid.index.to_numpy(float)), grid.mean(axis=1).to_numpy()
    at = float(_vertices(x, y[:, None])[0])
    beyond = -1 if best == 0 else int(best == len(means) - 1)
    complete = grid.dropna(axis=1).to_numpy()
    rates, seeds = complete.shape
    if seeds < 2:
        return Optimum(2.0**at, (math.nan, math.nan), beyond, np.full(resamples, math.nan))
    noise = complete - complete.mean(0) - complete.mean(1)[:, None] + complete.mean()
    freedom = (rates - 1) * (seeds - 1)
    random = np.random.default_rng([seed, int(part["width"].iloc[0])])
    # The spread itself is known no better than from so many residuals: Student's t, drawn as a normal over a chi.
    spread = np.sqrt((noise**2).sum() / seeds / random.chisquare(freedom, resamples))
    draws = _vertices(x, y[:, None] + spread * random.standard_normal((rates, resamples)))
    low, high = percentiles(draws, confidence)
    return Optimum(2.0**at, (2.0**low, 2.0**high), beyond, draws)


def _vertices(x: Any, y: Any) -> Any:
    """Of the parabolas through the points x (n,), y (n, R), no further out than they are -> (R,); of a curve without one, the
    lower end."""
    np = need("numpy")
    a, b, _ = np.polyfit(x, y, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.clip(-b / (2 * a), x.min(), x.max())
    return np.where(a > 0, inside, np.where(y[0] <= y[-1], x[0], x[-1]))


NAMES = {False: "standard", True: "muP"}


def sentences(result: dict[bool, Transfer], confidence: float = 0.95) -> list[str]:
    """What was found, a line for each width and one for the shift."""
    said = []
    for mup, found in result.items():
        for width, o in found.optima.items():
            low, high = o.interval
            range_ = f"{100 * confidence:g} % {low:.2g} .. {high:.2g}" if low == low else "no interval: one seed"
            end = "; the grid ends there, so that the best may lie beyond" if o.beyond else ""
            said.append(f"{NAMES[mup]:8} width {width:5}  best lr {o.lr:.2g}  ({range_}{end})")
        widths = min(found.optima), max(found.optima)
        low, high = found.interval
        range_ = f"{100 * confidence:g} % {low:.2g} .. {high:.2g}" if low == low else "no interval: one seed"
        shift = f"the best rate is multiplied by {found.shift:.2g} ({range_})"
        if open_ := [w for w in widths if found.optima[w].beyond]:
            ways = {found.optima[widths[1]].beyond, -found.optima[widths[0]].beyond} - {0}
            shift = "nothing is known of how the best rate moves"
            if len(ways) == 1:
                shift = f"the best rate is multiplied by {found.shift:.2g} or {'less' if ways == {-1} else 'more'}"
            shift += f": the grid ends at that of width {' and '.join(map(str, open_))}; sweep more rates"
        said.append(f"{NAMES[mup]:8} from width {widths[0]} to {widths[1]} {shift}")
    return said


def plot(found: "pd.DataFrame", result: dict[bool, Transfer]) -> "Figure":
    """A panel for each parametrisation: mean loss against the learning rate, a line for each width, a mark and an interval at the
    best rate of each."""
    plt = need("matplotlib.pyplot")
    figure, axes = plt.subplots(1, len(result), figsize=(4.8 * len(result), 4.2), squeeze=False, sharey=True, layout="constrained")  # fmt: skip
    widths, rates = sorted(found["width"].unique()), sorted(found["lr"].unique())
    colors = plt.get_cmap("viridis")([0.82 * i / max(1, len(widths) - 1) for i in range(len(widths))])
    lines: dict[int, Any] = {}
    for ax, (mup, of) in zip(axes[0], sorted(result.items())):
        for width, color in zip(widths, colors):
            part = found[(found["mup"] == mup) & (found["width"] == width)].groupby("lr")["loss"]
            if not len(part):
                continue
            lines[width] = ax.errorbar(part.mean().index, part.mean(), yerr=part.sem().fillna(0), color=color, marker="o", markersize=3, capsize=2)  # fmt: skip
            if (o := of.optima.get(int(width))) is not None:
                low = part.mean().min()
                bounds = [[max(0.0, o.lr - o.interval[0])], [max(0.0, o.interval[1] - o.lr)]] if o.interval[0] == o.interval[0] else None  # fmt: skip
                ax.errorbar([o.lr], [low], xerr=bounds, color=color, marker="*", markersize=11, markeredgecolor="black", markeredgewidth=0.6, capsize=4, elinewidth=2.5)  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
        ax.set_title("muP" if mup else "standard parametrisation")
        ax.set_xlabel("learning rate")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("validation loss (nats per token)")
    names = [f"width {w}" for w in lines]
    figure.legend(list(lines.values()), names, loc="outside lower center", ncols=5, frameon=False, title="mean over seeds and its standard error; a star is the parabola's best rate and its interval")  # fmt: skip
    return figure
