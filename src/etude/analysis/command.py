"""Compare runs from their folders alone: tables, curves, differences. A damaged run shows what of it can be read.

python -m etude.analysis [FOLDER, RUN or GLOB ...]     a table of the runs (default: runs)
python -m etude.analysis diff RUN_A RUN_B              the settings in which two runs differ
python -m etude.analysis compare RUNS ... by=model/attn [metric=val/full_loss] [baseline=gqa] [effect=0.01]
                                 [confidence=0.95] [power=0.8] [plot=FILE.png]
    mean differences between arms over paired seeds, with intervals and the seeds that are lacking.
    Without by=, each place named is an arm: compare runs/sweeps/A runs/sweeps/B
python -m etude.analysis curves RUNS ... plot=FILE.png [metric=train/loss,val/loss] [x=step] [by=model/attn]
                                 [ema=0.9] [median=11]
    learning curves over x=step, tokens, flops or seconds; with by=, means and intervals over seeds"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.analysis.comparison import Comparison, compare
from etude.analysis.load import HASHES, find_runs, load_runs, need
from etude.analysis.plots import plot_compare, plot_curves, save_figure
from etude.analysis.settings import config_diff, table
from etude.cli import guard
from etude.errors import Refusal
from etude.signature import did_you_mean

if TYPE_CHECKING:
    import pandas as pd

OPTIONS: dict[str, dict[str, type]] = {
    "compare": {"by": str, "metric": str, "baseline": str, "effect": float, "confidence": float, "power": float, "plot": str},
    "curves": {"plot": str, "metric": str, "x": str, "by": str, "ema": float, "median": int},
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """-> exit code."""
    return guard(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    what, rest = arguments[:1], arguments[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    elif what == ["compare"]:
        _compare(*_parsed("compare", rest))
    elif what == ["curves"]:
        _curves(*_parsed("curves", rest))
    elif what != ["diff"]:
        _show_runs(load_runs(arguments or "runs"))
    elif len(rest) == 2:
        _show(config_diff(*rest))
    else:
        raise Refusal("diff takes two runs: python -m etude.analysis diff RUN_A RUN_B")


def _parsed(command: str, arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """-> (places of runs, options)."""
    places, options = [], {}
    for argument in arguments:
        key, eq, value = argument.partition("=")
        if not eq or Path(argument).exists():
            places.append(argument)
        elif key not in OPTIONS[command]:
            raise Refusal(f"{command} has no option {key}={did_you_mean(key, list(OPTIONS[command]))}")
        else:
            try:
                options[key] = OPTIONS[command][key](value)
            except ValueError:
                raise Refusal(f"{argument}: {key} is a number, like {key}={0.01 if key == 'effect' else 0.9}") from None
    return places or ["runs"], options


def _compare(places: list[str], options: dict[str, Any]) -> None:
    by, file = options.pop("by", None), options.pop("plot", None)
    if by is None and len(places) < 2:
        raise Refusal("say what makes the arms: by=model/attn, by=optimizer.lr, or name two or more places of runs")
    runs = places if by else {p: find_runs(p) for p in places}
    result = compare(runs, by, **options)
    _show_comparison(result)
    if file:
        save_figure(plot_compare(result), file)


def _curves(places: list[str], options: dict[str, Any]) -> None:
    file, names = options.pop("plot", None), options.pop("metric", "train/loss,val/loss").split(",")
    if file is None:
        raise Refusal("say where the figure goes: plot=curves.png (or .pdf, .svg)")
    save_figure(plot_curves(places, names, **options), file)


def _show_comparison(result: Comparison) -> None:
    print(f"{result.metric} by {result.by}\n")
    counts = {c: [f"{v:,.0f}" for v in result.arms[c]] for c in ("params", "tokens") if c in result.arms}
    _show(result.arms.assign(**counts))
    names = {"p_holm": "p (Holm)", "p_permutation": "p (permutation)", "effect_size": "effect size"}
    names |= {"more_seeds": "more seeds"}
    shown = result.table.rename(columns=names)
    percent = f"{100 * result.confidence:g} %"
    for title, (low, high) in {
        f"{percent} t": ("low", "high"),
        f"{percent} bootstrap": ("boot_low", "boot_high"),
    }.items():
        bounds = [f"{a:.4g} .. {b:.4g}" if math.isfinite(a + b) else "-" for a, b in zip(shown[low], shown[high])]
        shown = shown.assign(**{title: bounds})
    intervals = list(shown.columns[-2:])
    shown = shown.assign(**{c: [f"{v:.2g}" for v in shown[c]] for c in shown if c.startswith("p")})
    print()
    _show(shown[["arm", "baseline", "test", "n", "difference", *intervals, "p", *names.values()]])
    print()
    print("\n".join([*result.sentences(), *(f"note: {note}" for note in result.notes)]))


def _show(df: "pd.DataFrame") -> None:
    def text(value: Any) -> str:
        if value is None:
            return "null"
        if value is need("pandas").NA or value != value:
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
