"""Pictures of a run for trackers that show some."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from etude.trackers import installed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "figures/loss": ("train/loss", "val/loss", "val/full_loss"),
    "figures/optimizer": ("lr", "grad_norm"),
}
COLORS = ("#0072B2", "#D55E00", "#009E73")  # of Okabe and Ito: told apart by everyone


def draw(run: Path) -> dict[str, tuple[int, "Figure"]]:
    """Curves over the steps of what the run has logged, name -> (last step, figure); {} without matplotlib."""
    if not installed("matplotlib"):
        return {}
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, tuple[int, Figure]] = {}
    for title, names in PANELS.items():
        curves = {n: [(r["step"], r[n]) for r in rows if n in r] for n in names}
        curves = {n: points for n, points in curves.items() if points}
        if not curves:
            continue
        shared = title == "figures/loss"  # curves of one unit share a panel
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots(1 if shared else len(curves), 1, sharex=True, squeeze=False)[:, 0]
        for i, (name, points) in enumerate(curves.items()):
            ax = axes[0 if shared else i]
            marker = "o" if len(points) <= 20 else None
            ax.plot(*zip(*points), color=COLORS[i], marker=marker, markersize=3, label=name)
            ax.set_ylabel("loss (nats a token)" if shared else name)
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        if shared:
            axes[0].legend(frameon=False)
        axes[-1].set_xlabel("steps (updates)")
        found[title] = rows[-1]["step"], figure
    return found
