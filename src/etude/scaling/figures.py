"""Figures of scaling laws: loss against size at each amount of computing, and the law against what was measured."""

from typing import TYPE_CHECKING, Any

from etude.analysis.load import need
from etude.analysis.plots import LABELS, PALETTE
from etude.scaling.laws import IsoFlop, LossFit, budgets, usable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def _dress(ax: Any, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def plot_isoflop(table: "pd.DataFrame", fit: IsoFlop, params: str = "params") -> "Figure":
    """Left the parabolas with their minima and intervals; right the best sizes against FLOPs, with the power law."""
    np, plt, ticker = need("numpy"), need("matplotlib.pyplot"), need("matplotlib.ticker")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained")
    data = usable(table)
    number = budgets(data["flops"])
    groups = [group for _, group in data.groupby(number)]
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.82, len(groups)))
    for group, color in zip(groups, colors):
        flops = float(np.exp(np.log(group["flops"]).mean()))
        left.plot(group["params"], group["loss"], "o", color=color, markersize=4, label=f"{flops:.2g} FLOPs")
        close = np.abs(np.log(fit.minima["flops"] / flops)).to_numpy()
        if close.min() < 1e-9:
            at = int(close.argmin())
            x = np.linspace(np.log(group["params"].min()), np.log(group["params"].max()), 100)
            left.plot(np.exp(x), np.polyval(fit.parabolas[at], x), color=color)
            row = fit.minima.iloc[at]
            error = [[row["params"] - row["params_low"]], [row["params_high"] - row["params"]]]
            for ax, where in ((left, (row["params"], row["loss"])), (right, (row["flops"], row["params"]))):
                bars = {"xerr": error} if ax is left else {"yerr": error}
                ax.errorbar([where[0]], [where[1]], **bars, color=color, marker="*", markersize=11, markeredgecolor="black", markeredgewidth=0.6, capsize=3)  # fmt: skip
    for ax in (left, right):
        ax.set_xscale("log")
    right.set_yscale("log")
    span = np.geomspace(fit.minima["flops"].min() / 1.3, fit.minima["flops"].max() * 1.3, 50)
    low, high = fit.params.interval
    law = f"N ~ C^{fit.params.exponent:.2f} ({100 * fit.confidence:g} %: {low:.2f} .. {high:.2f})"
    right.plot(span, fit.params(span), "--", color="black", linewidth=1, label=law)
    for axis in (left.xaxis, right.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.EngFormatter(sep=""))
        axis.set_minor_formatter(ticker.NullFormatter())
    spent = fit.minima["flops"].tolist()
    right.set_xticks(spent, [f"{flops:.2g}" for flops in spent])
    right.xaxis.set_minor_formatter(ticker.NullFormatter())
    _dress(left, LABELS.get(params, params), "validation loss (nats per token)")
    _dress(right, "training compute (FLOPs)", f"best size ({LABELS.get(params, params)})")
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8)
    return figure


def plot_loss(table: "pd.DataFrame", fit: LossFit, params: str = "params") -> "Figure":
    """Left measured losses over the law's lines, one for each size; right measured against fitted."""
    np, plt, ticker = need("numpy"), need("matplotlib.pyplot"), need("matplotlib.ticker")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained")
    data = usable(table)
    sizes = sorted(data["params"].unique())
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.82, len(sizes)))
    span = np.geomspace(data["tokens"].min(), data["tokens"].max(), 100)
    engineering = ticker.EngFormatter(sep="", places=1)
    named = sizes[:: -(-len(sizes) // 8)]  # a legend of more would cover the figure
    for size, color in zip(sizes, colors):
        part = data[data["params"] == size]
        left.plot(part["tokens"], part["loss"], "o", color=color, markersize=4)
        name = f"N = {engineering(size)}" if size in named else None
        left.plot(span, fit.law.loss(size, span), color=color, linewidth=1.2, label=name)
        right.plot(fit.law.loss(part["params"], part["tokens"]), part["loss"], "o", color=color, markersize=4)
    left.axhline(fit.law.E, linestyle=":", color="black", linewidth=1)
    ends = [data["loss"].min(), data["loss"].max()]
    right.plot(ends, ends, color=PALETTE[-1], linewidth=1)
    left.set_xscale("log")
    left.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    left.xaxis.set_minor_formatter(ticker.NullFormatter())
    _dress(left, "training data (tokens)", "validation loss (nats per token)")
    _dress(right, "fitted loss (nats per token)", "measured loss (nats per token)")
    columns = 1 + (len(sizes) > 4)
    left.legend(frameon=False, fontsize=8, title=LABELS.get(params, params), title_fontsize=8, ncols=columns)
    left.annotate("E, the loss that stays", (span[-1], fit.law.E), xytext=(0, 3), textcoords="offset points", fontsize=8, ha="right")  # fmt: skip
    return figure
