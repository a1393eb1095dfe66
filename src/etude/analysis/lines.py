"""Learning curves: logged values over steps, tokens, FLOPs or seconds, and smoothed."""

import fnmatch
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etude.analysis.load import Runs, find_runs, need, numbers, read_lines
from etude.errors import Refusal
from etude.signature import did_you_mean

if TYPE_CHECKING:
    import pandas as pd

AXES = {"step": "step", "tokens": "tokens", "flops": "flops", "seconds": "perf/seconds"}  # and where lines say it
COLUMNS = ["run", *AXES, "name", "value"]


def curves(runs: Runs, names: str | Sequence[str] = ("train/loss", "val/loss")) -> "pd.DataFrame":
    """Logged values in long form: (run, step in updates, tokens trained on, FLOPs of the model, seconds spent training,
    name, value). `names` are metrics or patterns like "val/*". Where a line lacks tokens, FLOPs or seconds (an evaluation
    alone), they are interpolated by steps; NaN where no line has them. Raises Refusal where the runs have metrics, but
    none of these."""
    wanted = [names] if isinstance(names, str) else list(names)
    records, known = [], set()
    for run in find_runs(runs):
        lines = [numbers(line) for line in read_lines(run / "logs/metrics.jsonl")]
        steps = [line["step"] for line in lines]
        xs = [interpolated(steps, [line.get(key, math.nan) for line in lines]) for key in list(AXES.values())[1:]]
        known |= {name for line in lines for name in line if name != "step"}
        for line, *at in zip(lines, *xs):
            found = [n for n in line if n != "step" and any(fnmatch.fnmatchcase(n, w) for w in wanted)]
            records += [(str(run), line["step"], *at, name, float(line[name])) for name in found]
    if known and not records:
        close = did_you_mean(wanted[0], sorted(known)) if len(known) > 20 else f"; there are {', '.join(sorted(known))}"
        raise Refusal(f"no run has the metric {' or '.join(wanted)}{close}")
    frame = need("pandas").DataFrame(records, columns=COLUMNS)
    return frame.astype({"step": "int64"} | {c: float for c in ("tokens", "flops", "seconds", "value")})


def interpolated(steps: Sequence[float], values: Sequence[float]) -> list[float]:
    """`values` of a quantity that grows from 0 with the steps, its gaps (NaN) filled: linear between known ones, and
    after the last at the rate before it. All NaN where none is known."""
    np = need("numpy")
    known = {0: 0.0} | {s: v for s, v in sorted(zip(steps, values)) if math.isfinite(v)}
    if len(known) == 1:
        return [math.nan] * len(steps)
    x, y = np.array(list(known)), np.array(list(known.values()))
    filled = np.interp(steps, x, y)
    rate = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return [float(y[-1] + rate * (s - x[-1]) if s > x[-1] else v) for s, v in zip(steps, filled)]


def smooth(points: "pd.DataFrame", ema: float | None = None, median: int | None = None) -> "pd.DataFrame":
    """`curves` with smoothed values, each run and metric by itself; values that are not finite are left out and stay NaN.

    ema=b in [0, 1): the exponential moving average s_t = sum_i b^(t-i) x_i / sum_i b^(t-i) over i <= t, which is
    s_t = b s_(t-1) + (1-b) x_t from s_0 = 0 divided by 1 - b^t (the bias correction of Kingma and Ba 2015).
    median=w: the median of the w points around each (of those that are there at the ends), which single spikes leave
    alone. Both: the median first."""
    if ema is not None and not 0 <= ema < 1:
        raise Refusal(f"smooth={ema} is not in [0, 1); 0.9 averages over about ten points")
    if median is not None and median < 1:
        raise Refusal(f"median={median} is not a number of points; 11 takes five to each side")

    def smoothed(values: "pd.Series") -> Any:
        finite = values.where(values.abs() < math.inf)
        if median is not None:
            finite = finite.rolling(median, center=True, min_periods=1).median().where(finite.notna())
        if ema is not None:
            finite = finite.ewm(alpha=1 - ema, adjust=True, ignore_na=True).mean().where(finite.notna())
        return finite

    return points.assign(value=points.groupby(["run", "name"], sort=False)["value"].transform(smoothed))
