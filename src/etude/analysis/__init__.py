"""Runs as data: load, compare and plot them from their folders alone. python -m etude.analysis --help"""

from etude.analysis.command import main
from etude.analysis.comparison import Comparison, compare
from etude.analysis.lines import curves, smooth
from etude.analysis.load import find_runs, load_runs, read_lines, samples
from etude.analysis.plots import plot_compare, plot_curves, plot_final
from etude.analysis.settings import arms, config_diff, final, over_seeds, table, varying
from etude.analysis.stats import paired, power_of, seeds_needed, welch

__all__ = [
    "Comparison", "arms", "compare", "config_diff", "curves", "final", "find_runs", "load_runs", "main", "over_seeds",
    "paired", "plot_compare", "plot_curves", "plot_final", "power_of", "read_lines", "samples", "seeds_needed", "smooth",
    "table", "varying", "welch",
]  # fmt: skip
