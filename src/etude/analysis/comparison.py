"""compare: does one arm differ from another, by how much, how sure is that, and how many more seeds would it take?"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from etude.analysis import stats
from etude.analysis.load import HASHES, Runs, find_runs, load_runs, need
from etude.analysis.settings import arms, need_numbers, plain, varying
from etude.errors import Refusal
from etude.signature import did_you_mean

if TYPE_CHECKING:
    import pandas as pd

# Values that mean the same whatever the data: everything else is refused between runs on other data.
PACE = ("perf/", "seconds", "tokens_per_s", "flops", "tokens", "params")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`arms`: a row an arm (runs, mean, sd, size). `table`: a row a pair of arms, difference = arm - baseline; low and
    high are Student's t interval, boot_low and boot_high the percentile-t bootstrap's, p is two-sided, p_holm corrected
    for the number of rows, p_permutation that of sign flips (paired) or exchanged runs (Welch), effect_size Cohen's d_z
    (paired) or d, seeds the number that a true difference `effect` takes at `power`, more_seeds what is lacking.
    `differences`: the pairs' own. `notes`: what was left out, and what else the arms differ in."""

    metric: str
    by: str
    confidence: float
    power: float
    arms: "pd.DataFrame"
    table: "pd.DataFrame"
    differences: dict[str, list[float]]
    notes: list[str]

    def sentences(self) -> list[str]:
        """The result in words, one sentence a pair of arms."""
        return [_sentence(self, row) for row in self.table.to_dict("records")]


def compare(
    runs: Runs | Mapping[str, Runs],
    group_by: str | Sequence[str] | None = None,
    metric: str = "val/full_loss",
    baseline: str | None = None,
    effect: float | None = None,
    confidence: float = 0.95,
    power: float = 0.8,
    seed: int = 0,
) -> Comparison:
    """Compare arms of completed runs: the values of `group_by` (settings like "model.dim", config groups like
    "model/attn", several with commas), or a mapping {name: runs}. Every two arms, or each with `baseline`.

    Two runs are a pair if they share the seed and every other setting in which the runs of either arm vary. A setting
    that is the same in all runs of an arm belongs to the arm. `effect` is the difference that one would want to find
    (default: the one observed); `seed` draws the bootstrap's resamples. Raises Refusal where the answer would mean
    nothing: other data, a single seed."""
    df, named, by = _arms(runs, group_by)
    need_numbers(df, metric)
    if effect is not None and not 0 < abs(effect) < math.inf:
        raise Refusal(f"effect={effect} should be the difference that would matter, a number like 0.01")
    if not 0 < confidence < 1 or not 0 < power < 1:
        raise Refusal(f"confidence={confidence} and power={power} have to lie between 0 and 1, like 0.95 and 0.8")
    order = sorted(dict.fromkeys(named), key=natural)
    df, named, notes = _usable(df, named, metric)
    if gone := [a for a in order if a not in named]:
        raise Refusal(f"no run of {', '.join(gone)} is completed and has {metric}; run it, or leave it out of the glob")
    if len(order) < 2:
        raise Refusal(f"by={by}: all runs have the same value, {order[0]}; give runs of two arms")
    if baseline is not None and baseline not in order:
        raise Refusal(f"baseline={baseline} is not an arm{did_you_mean(baseline, order)}")
    pairs = [(a, baseline) for a in order if a != baseline] if baseline else [(b, a) for a, b in combinations(order, 2)]
    values = [float(v) for v in df[metric]]
    settings = _normal(df, metric)
    rows: list[dict[str, Any]] = []
    differences: dict[str, list[float]] = {}
    for arm, base in pairs:
        ours, theirs = ([i for i, name in enumerate(named) if name == one] for one in (arm, base))
        a, b, is_paired, said = _match(arm, base, ours, theirs, settings, by)
        notes += [note for note in said if note not in notes]
        if min(len(a), len(b)) < 2:
            raise Refusal(_too_few(arm, base, len(ours), len(theirs)))
        x, y = [values[i] for i in a], [values[i] for i in b]
        found = (stats.paired if is_paired else stats.welch)(x, y, confidence, seed)
        if is_paired:
            differences[f"{arm} - {base}"] = [u - v for u, v in zip(x, y)]
        wanted = abs(found.difference if effect is None else effect)
        needed = stats.seeds_needed(wanted, found.spread, power, 1 - confidence)
        row = {
            "arm": arm,
            "baseline": base,
            "test": "paired t" if is_paired else "Welch t",
            **dataclasses.asdict(found),
        }
        row |= {"effect": wanted, "seeds": needed, "more_seeds": max(0, needed - found.n)}
        rows.append(row)
    for row, corrected in zip(rows, stats.holm([row["p"] for row in rows])):
        row["p_holm"] = corrected
    columns = "arm baseline test n difference low high boot_low boot_high p p_holm p_permutation sd effect_size effect seeds more_seeds"  # fmt: skip
    table = need("pandas").DataFrame(rows)[columns.split()]
    return Comparison(metric, by, confidence, power, _summary(df, named, metric, order), table, differences, notes)


def _arms(runs: Any, group_by: str | Sequence[str] | None) -> tuple["pd.DataFrame", list[str], str]:
    """-> (table, arm of each row, what the arms are called together)."""
    if isinstance(runs, Mapping):
        if group_by is not None:
            raise Refusal("give either arms by name or group_by, not both")
        parts = {name: r if hasattr(r, "columns") else load_runs(find_runs(r)) for name, r in runs.items()}
        df = need("pandas").concat([part.astype(object) for part in parts.values()], ignore_index=True)
        if (twice := df["run"].duplicated()).any():
            raise Refusal(f"{df['run'][twice].iloc[0]} is in two arms; give each run once")
        return df.infer_objects(), [name for name, part in parts.items() for _ in range(len(part))], "arm"
    if not group_by:
        raise Refusal("say what makes the arms: by=model/attn, by=model.dim or another setting")
    df = runs if hasattr(runs, "columns") else load_runs(runs)
    return df, arms(df, group_by), group_by if isinstance(group_by, str) else ",".join(group_by)


def natural(name: str) -> tuple:
    """dim=64 before dim=128."""
    head, _, tail = name.rpartition("=")
    try:
        return (head, 0, float(tail), "")
    except ValueError:
        return (head, 1, 0.0, tail)


def _usable(df: "pd.DataFrame", named: list[str], metric: str) -> tuple["pd.DataFrame", list[str], list[str]]:
    """Without runs that did not come to their end or have no finite value of `metric`, counted in the notes."""
    notes: list[str] = []
    keep: list[int] = []
    unfinished: list[str] = []
    unknown: list[str] = []
    for i, (name, status, value) in enumerate(zip(df["name"], df["status"], plain(df[metric]))):
        if status != "completed":
            unfinished.append(f"{name} ({status})")
        elif value is None or not math.isfinite(value):
            unknown.append(f"{name} ({value})")
        else:
            keep.append(i)
    if unfinished:
        notes.append(f"left out, not completed: {_several(unfinished)}")
    if unknown:
        notes.append(
            f"left out, without a finite {metric}: {_several(unknown)}; what follows holds for the others only"
        )
    return df.iloc[keep].reset_index(drop=True), [named[i] for i in keep], notes


def _several(names: list[str]) -> str:
    return f"{len(names)} run{'s' * (len(names) > 1)}, {_list(names)}"


def _list(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _normal(df: "pd.DataFrame", metric: str) -> dict[str, list[str]]:
    """{what varies: each run's value as text}; with it the hashes, where the metric depends on the data."""
    hashes = [] if metric.startswith(PACE) else [c for c in HASHES if c in df]
    if metric.endswith("bits_per_byte"):  # comparable between tokenizers on the same text
        hashes = [c for c in hashes if "tokenizer" not in c]
    columns = varying(df) + [c for c in hashes if len(set(map(str, plain(df[c])))) > 1]
    return {c: [repr(float(v)) if isinstance(v, (int, float)) else repr(v) for v in plain(df[c])] for c in columns}


def _match(
    arm: str, base: str, ours: list[int], theirs: list[int], settings: dict[str, list[str]], by: str
) -> tuple[list[int], list[int], bool, list[str]]:
    """Rows of the two arms that belong together -> (a, b, whether a[i] and b[i] are a pair, notes)."""
    keys, differing, notes = [], [], []
    for column, values in settings.items():
        a, b = {values[i] for i in ours}, {values[i] for i in theirs}
        if column in HASHES and not a & b:
            what = "tokenizer" if "tokenizer" in column else "data"
            raise Refusal(f"{arm} and {base} have not seen the same {what} ({column} differs): their losses cannot be compared; give runs on one")  # fmt: skip
        if len(a) > 1 or len(b) > 1:
            keys.append(column)
        elif a != b and not any(f"{column}.".startswith(f"config.{key}.") for key in by.replace("/", ".").split(",")):
            differing.append(column.removeprefix("config."))
    ka, kb = ({tuple(settings[c][i] for c in keys): i for i in rows} for rows in (ours, theirs))
    if (repeats := len(ours) + len(theirs) - len(ka) - len(kb)) > 0:
        notes.append(f"{arm}, {base}: {repeats} run(s) repeat another's seed and settings: the newest counts")
    if differing:
        notes.append(f"{arm} and {base} also differ in {_list(differing, 6)}")
    shared = [k for k in ka if k in kb]
    names = _list([c.removeprefix("config.") for c in keys]) or "nothing that varies"
    if len(shared) >= 2 or (len(shared) == 1 and min(len(ka), len(kb)) == 1):
        if left := len(ka) + len(kb) - 2 * len(shared):
            notes.append(f"{arm}, {base}: {left} run(s) have no partner with the same {names} and are left out")
        return [ka[k] for k in shared], [kb[k] for k in shared], True, notes
    if any(c in HASHES for c in keys):
        raise Refusal(
            f"{arm} and {base} were trained on several data sets and share no pair of runs on one; give runs on one"
        )
    notes.append(
        f"{arm}, {base}: no pairs with the same {names}, so Welch's t; the same seeds in both arms would tell more"
    )
    return list(ka.values()), list(kb.values()), False, notes


def _too_few(arm: str, base: str, ours: int, theirs: int) -> str:
    short = arm if ours <= theirs else base
    have = f"{short} has one seed" if min(ours, theirs) == 1 else f"{arm} and {base} share one seed"
    return (
        f"{have}: an interval takes 2 seeds of each at the very least and 5 to be of use; run it with seed=1,2,3,4 too"
    )


def _summary(df: "pd.DataFrame", named: list[str], metric: str, order: list[str]) -> "pd.DataFrame":
    sizes = [c for c in ("params", "tokens", "flops") if c in df and df[c].notna().all()]
    columns = {c: [float(v) for v in df[c]] for c in (metric, *sizes)}
    rows = []
    for arm in order:
        values, *others = ([v for v, name in zip(columns[c], named) if name == arm] for c in (metric, *sizes))
        sd = statistics.stdev(values) if len(values) > 1 else math.nan
        rows.append([arm, len(values), statistics.fmean(values), sd, *map(statistics.fmean, others)])
    return need("pandas").DataFrame(rows, columns=["arm", "runs", "mean", "sd", *sizes])


def _sentence(result: Comparison, row: dict[str, Any]) -> str:
    d, half = row["difference"], (row["high"] - row["low"]) / 2
    digits = max(0, 1 - math.floor(math.log10(half))) if 0 < half < math.inf else 4

    def show(value: float) -> str:
        return f"{value:+.{min(digits, 9)}f}" if abs(value) < 1e6 else f"{value:+.3g}"

    corrected = f", {row['p_holm']:.2g} after Holm's correction" if len(result.table) > 1 else ""
    found = "differs from" if row["p_holm"] < 1 - result.confidence else "is not shown to differ from"
    unit = "pairs" if row["test"] == "paired t" else "runs an arm"
    text = f"{row['arm']} {found} {row['baseline']}: {result.metric} {show(d)}, {100 * result.confidence:g} % interval {show(row['low'])} to {show(row['high'])} ({row['n']} {unit}), p = {row['p']:.2g}{corrected}."  # fmt: skip
    if not math.isfinite(row["seeds"]):
        return text
    more = f"{row['more_seeds']:.0f} more" if row["more_seeds"] else "enough are there"
    return f"{text} To find a difference of {row['effect']:.3g} with power {result.power:g} takes {row['seeds']:.0f} seeds: {more}."
