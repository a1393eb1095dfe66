"""The statistics of a comparison: intervals, p-values, and how many seeds a difference takes to be seen.

A difference is arm minus baseline. Paired: n differences, one a seed. Unpaired (Welch): two samples of different spread."""

import dataclasses
import math
from typing import Any

from etude.analysis.load import need

RESAMPLES = 9_999


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean difference and what is known of it. `sd` is that of the differences (paired) or
    sqrt((sd_a^2 + sd_b^2) / 2) (Welch); effect_size is difference / sd: Cohen's d_z, or d with that average."""

    difference: float
    low: float
    high: float
    p: float
    sd: float
    effect_size: float
    boot_low: float
    boot_high: float
    p_permutation: float
    n: int  # pairs, or the runs of the smaller arm
    spread: tuple[float, ...]  # what seeds_needed takes


def paired(a: Any, b: Any, confidence: float = 0.95, seed: int = 0) -> Difference:
    """a, b (n,): values of the same seeds, n >= 2. Student's t of the differences; p-values are two-sided."""
    np, scipy = need("numpy"), need("scipy.stats")
    d = np.asarray(a, float) - np.asarray(b, float)
    n, mean, sd = len(d), d.mean(), d.std(ddof=1)
    flips = scipy.permutation_test(
        (d,), np.mean, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES, rng=seed
    )
    boot = _bootstrap_t([d], mean, sd / math.sqrt(n), confidence, seed)
    return _difference(mean, sd / math.sqrt(n), n - 1, sd, n, (sd,), boot, flips.pvalue, confidence)


def welch(a: Any, b: Any, confidence: float = 0.95, seed: int = 0) -> Difference:
    """a (n,), b (m,): values of runs that have no seed in common, n, m >= 2 (Welch 1947)."""
    np, scipy = need("numpy"), need("scipy.stats")
    a, b = np.asarray(a, float), np.asarray(b, float)
    sds = a.std(ddof=1), b.std(ddof=1)
    parts = sds[0] ** 2 / len(a), sds[1] ** 2 / len(b)
    error, mean = math.sqrt(sum(parts)), a.mean() - b.mean()
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)) if error else 1.0
    permuted = scipy.permutation_test(
        (a, b), _mean_difference, permutation_type="independent", vectorized=True, n_resamples=RESAMPLES, rng=seed
    )
    boot = _bootstrap_t([a, b], mean, error, confidence, seed)
    sd, n = math.sqrt((sds[0] ** 2 + sds[1] ** 2) / 2), min(len(a), len(b))
    return _difference(mean, error, freedom, sd, n, sds, boot, permuted.pvalue, confidence)


def _mean_difference(a: Any, b: Any, axis: int) -> Any:
    return a.mean(axis) - b.mean(axis)


def _difference(
    mean: float,
    error: float,
    freedom: float,
    sd: float,
    n: int,
    spread: tuple[float, ...],
    boot: tuple[float, float],
    permuted: float,
    confidence: float,
) -> Difference:
    t = need("scipy.stats").t
    half = t.ppf((1 + confidence) / 2, freedom) * error
    p = 2 * t.sf(abs(mean) / error, freedom) if error else float(mean == 0)
    size = mean / sd if sd else math.copysign(math.inf, mean) if mean else 0.0
    return Difference(
        difference=float(mean),
        low=float(mean - half),
        high=float(mean + half),
        p=float(p),
        sd=float(sd),
        effect_size=float(size),
        boot_low=float(boot[0]),
        boot_high=float(boot[1]),
        p_permutation=float(permuted),
        n=n,
        spread=tuple(map(float, spread)),
    )


def _bootstrap_t(samples: list[Any], mean: float, error: float, confidence: float, seed: int) -> tuple[float, float]:
    """The percentile-t (studentized) interval of Efron and Tibshirani 1993, section 12.5: the quantiles of
    t* = (mean* - mean) / error* over resamples take the place of Student's. NaN where too many resamples have no spread
    (fewer than four values): then a quantile is infinite."""
    np = need("numpy")
    if not error:
        return mean, mean
    rng = np.random.default_rng(seed)
    centre, variance = 0.0, 0.0
    for sign, x in zip((1, -1), samples):
        draws = x[rng.integers(len(x), size=(RESAMPLES, len(x)))]
        centre = centre + sign * draws.mean(1)
        # Of equal values the variance is 0, not what rounding leaves of it.
        variance = variance + np.where(np.ptp(draws, axis=1) > 0, draws.var(1, ddof=1), 0.0) / len(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num((centre - mean) / np.sqrt(variance), nan=0.0, posinf=np.inf, neginf=-np.inf)
    tail = (1 - confidence) / 2
    low, high = np.quantile(t, [tail, 1 - tail], method="nearest")
    return (mean - high * error, mean - low * error) if np.isfinite([low, high]).all() else (math.nan, math.nan)


def power_of(n: int, effect: float, spread: tuple[float, ...], alpha: float = 0.05) -> float:
    """The chance that a two-sided t-test of level `alpha` finds a true difference `effect` with n seeds an arm, by the
    noncentral t. `spread` is (sd of the differences,) where seeds are paired, else the two arms' sds."""
    scipy = need("scipy.stats")
    square = [s * s for s in spread]
    freedom = n - 1 if len(square) == 1 else (n - 1) * sum(square) ** 2 / sum(s * s for s in square)
    shift = abs(effect) * math.sqrt(n / sum(square))
    limit = scipy.t.ppf(1 - alpha / 2, freedom)
    if shift > limit + 40 or freedom > 1e6:  # where the noncentral t is hard to compute and the normal is the same
        return float(scipy.norm.sf(limit - shift) + scipy.norm.cdf(-limit - shift))
    return float(scipy.nct.sf(limit, freedom, shift) + scipy.nct.cdf(-limit, freedom, shift))


def seeds_needed(effect: float, spread: tuple[float, ...], power: float = 0.8, alpha: float = 0.05) -> float:
    """The fewest seeds an arm with which a true difference `effect` is found with probability `power`; at least 2,
    infinite for no effect."""
    if not effect:
        return math.inf
    if not sum(spread):
        return 2
    low, high = 1, 2
    while power_of(high, effect, spread, alpha) < power:
        low, high = high, 2 * high
        if high > 1e9:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power_of(middle, effect, spread, alpha) < power else (low, middle)
    return high


def holm(ps: list[float]) -> list[float]:
    """p-values corrected for as many comparisons (Holm 1979): the chance of any false finding stays below alpha."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    found, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        found[i] = highest
    return found
