"""How loss falls with size and data (Hoffmann et al. 2022): the sum of power laws fitted to all runs (approach 3), and the best
size at each amount of computing (approach 2). N parameters, D training tokens, C FLOPs, L loss in nats."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from etude.analysis.load import need
from etude.errors import Refusal

if TYPE_CHECKING:
    import pandas as pd

DELTA = 1e-3  # Huber's, on log L
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, params: Any, tokens: Any) -> Any:
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    @property
    def size_exponent(self) -> float:
        """a of N_opt ~ C^a, where C is proportional to N D."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops: float, per_pair: float = 6.0) -> tuple[float, float]:
        """(N, D) of the least loss with per_pair N D = flops."""
        product = flops / per_pair
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        params = ratio * product**self.size_exponent
        return params, product / params


@dataclasses.dataclass(frozen=True)
class LossFit:
    """`draws` (R, 5): E, A, alpha, B, beta of each resample. `error` is the standard deviation of log L about the law,
    for the five numbers fitted."""

    law: Law
    draws: Any
    error: float
    runs: int
    confidence: float

    def interval(self, what: str) -> Interval:
        """Of E, A, alpha, B, beta or size_exponent."""
        values = [getattr(Law(*row), what) for row in self.draws.tolist()]
        return percentiles(values, self.confidence)

    def loss_interval(self, params: float, tokens: float) -> Interval:
        """Of the law's loss, without the noise of a run."""
        return percentiles([Law(*row).loss(params, tokens) for row in self.draws.tolist()], self.confidence)


def percentiles(values: Any, confidence: float) -> Interval:
    np = need("numpy")
    low, high = np.nanquantile(np.asarray(values, float), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def usable(table: "pd.DataFrame") -> "pd.DataFrame":
    """The rows with a finite, positive loss and sizes above 0."""
    columns = ["params", "tokens", "flops", "loss"]
    numbers = table[columns].astype(float)
    return numbers[(numbers > 0).all(axis=1) & (numbers < math.inf).all(axis=1)]


def fit_loss(
    table: "pd.DataFrame", resamples: int = 200, confidence: float = 0.95, delta: float = DELTA, seed: int = 0
) -> LossFit:
    """Approach 3: the least Huber loss of log L, by L-BFGS from the best of a grid of starts. Intervals are percentiles of fits to
    resampled runs. `table` has columns params, tokens, flops, loss. Raises Refusal where there are too few runs."""
    np = need("numpy")
    data = usable(table)
    sizes, amounts = data["params"].nunique(), data["tokens"].nunique()
    if len(data) < 8 or sizes < 3 or amounts < 3:
        raise Refusal(
            f"a fit of L(N, D) has five numbers: it needs 8 runs or more of at least 3 sizes and 3 amounts of data, here are {len(data)} of {sizes} and {amounts}; train more, like: python train.py sweep=isoflop"
        )
    x, y, z = (np.log(data[c].to_numpy()) for c in ("params", "tokens", "loss"))
    centre = x.mean(), y.mean()
    x, y = x - centre[0], y - centre[1]  # else A and alpha all but determine each other
    found, _ = min((_descend(start, x, y, z, delta) for start in _starts(x, y, z, delta)), key=lambda f: f[1])
    residuals = z - _log_loss(found, x, y)[0]
    random = np.random.default_rng(seed)
    draws: list[Law] = []
    while len(draws) < resamples:
        chosen = random.integers(0, len(z), len(z))
        if len(np.unique(x[chosen])) >= 3 and len(np.unique(y[chosen])) >= 3 and len(np.unique(chosen)) >= 6:
            draws.append(_law(_descend(found, x[chosen], y[chosen], z[chosen], delta)[0], centre))
    rows = np.array([dataclasses.astuple(law) for law in draws])
    return LossFit(
        _law(found, centre), rows, float(residuals.std()) * math.sqrt(len(z) / (len(z) - 5)), len(z), confidence
    )


def _law(found: Any, centre: tuple[float, float]) -> Law:
    a, alpha, b, beta, e = map(float, found)
    return Law(math.exp(e), math.exp(a + alpha * centre[0]), alpha, math.exp(b + beta * centre[1]), beta)


def _log_loss(found: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """(a, alpha, b, beta, e) -> log(exp(a - alpha x) + exp(b - beta y) + exp(e)) (n,), and each term's share of it (3, n)."""
    np = need("numpy")
    a, alpha, b, beta, e = found
    terms = np.stack((a - alpha * x, b - beta * y, e + 0 * x))
    top = terms.max(0)
    shares = np.exp(terms - top)
    total = shares.sum(0)
    return top + np.log(total), shares / total


def _starts(x: Any, y: Any, z: Any, delta: float, best: int = 12) -> list[Any]:
    """The best of a grid; the terms are given by their shares of the mean loss at the middle of all runs."""
    np = need("numpy")
    slopes, shares = (0.1, 0.3, 0.5, 1.0, 1.5), np.log((0.02, 0.1, 0.3, 0.6))
    middle = z.mean()
    grid = np.array(
        [
            (middle + a, alpha, middle + b, beta, middle + e)
            for alpha in slopes for beta in slopes for a in shares for b in shares for e in shares
        ]
    )  # fmt: skip
    losses = [_huber(_log_loss(start, x, y)[0] - z, delta)[0] for start in grid]
    return [grid[i] for i in np.argsort(losses)[:best]]


def _huber(residuals: Any, delta: float) -> tuple[float, Any]:
    """Sum over delta, and its derivative."""
    np = need("numpy")
    clipped = np.clip(residuals, -delta, delta)
    return float((clipped * (residuals - clipped / 2)).sum() / delta), clipped / delta


def _descend(start: Any, x: Any, y: Any, z: Any, delta: float) -> tuple[Any, float]:
    """-> (the minimum from there, its loss)."""
    np, optimize = need("numpy"), need("scipy.optimize")

    def objective(found: Any) -> tuple[float, Any]:
        fitted, shares = _log_loss(found, x, y)
        loss, slope = _huber(fitted - z, delta)
        a, b, e = shares * slope
        return loss, np.array([a.sum(), -(a * x).sum(), b.sum(), -(b * y).sum(), e.sum()])

    bounds = [(None, None), (0, 4), (None, None), (0, 4), (None, None)]
    options = {"maxiter": 2000, "ftol": 1e-13, "gtol": 1e-9}
    done = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return done.x, float(done.fun)


# ---------------------------------------------------------------- the best size at each amount of computing


@dataclasses.dataclass(frozen=True)
class Power:
    """y = factor C^exponent, with the exponent's interval."""

    factor: float
    exponent: float
    interval: Interval

    def __call__(self, flops: Any) -> Any:
        return self.factor * flops**self.exponent


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """`minima`: a row for each budget (flops, runs, params, params_low, params_high, tokens, loss). `parabolas`: for each
    budget the coefficients of L over log N, the highest power first. `left_out` says which budgets have no minimum, and why;
    `flat` is the share of resamples in which some parabola had none."""

    minima: "pd.DataFrame"
    parabolas: list[Any]
    params: Power
    tokens: Power
    left_out: list[str]
    flat: float
    confidence: float


def budgets(flops: Any, apart: float = 1.1) -> Any:
    """For FLOPs (n,) the number of the budget that each belongs to: those within a factor `apart` of a neighbour are one (a
    run ends with a whole step, so that equal budgets are not equal to the last FLOP)."""
    np = need("numpy")
    order = np.argsort(flops)
    steps = np.diff(np.log(np.asarray(flops, float)[order])) > math.log(apart)
    found = np.empty(len(order), int)
    found[order] = np.concatenate(([0], steps.cumsum()))
    return found


def fit_isoflop(table: "pd.DataFrame", resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> IsoFlop:
    """Approach 2: for each budget a parabola of L in log N, through its minima the power laws N_opt ~ C^a and D_opt ~ C^b.
    Intervals are percentiles of refits with resampled residuals of the parabolas. Raises Refusal where fewer than three
    budgets have a minimum among their sizes."""
    np, pd = need("numpy"), need("pandas")
    data = usable(table)
    kept, left_out = [], []
    for _, group in data.groupby(budgets(data["flops"]) if len(data) else []):
        flops = float(np.exp(np.log(group["flops"]).mean()))
        x, loss, tokens = (
            np.log(group["params"].to_numpy()),
            group["loss"].to_numpy(),
            np.log(group["tokens"].to_numpy()),
        )
        if (n := group["params"].nunique()) < 4:
            left_out.append(f"{flops:.3g} FLOPs: {n} sizes, and a parabola with an error takes 4")
            continue
        curve = np.polyfit(x, loss, 2)
        if not (curve[0] > 0 and x.min() < -curve[1] / (2 * curve[0]) < x.max()):
            end = "smaller" if np.polyfit(x, loss, 1)[0] > 0 else "larger"
            left_out.append(f"{flops:.3g} FLOPs: no minimum among its sizes; add {end} ones")
            continue
        residuals = (loss - np.polyval(curve, x)) * math.sqrt(len(x) / max(1, len(x) - 3))
        kept.append((flops, x, curve, residuals, np.polyfit(x, tokens, 1)))
    if len(kept) < 3:
        why = "; ".join(left_out)
        raise Refusal(
            f"the power laws need 3 budgets of FLOPs or more with a minimum, here are {len(kept)}{f' ({why})' if why else ''}; train more, like: python train.py sweep=isoflop"
        )
    random = np.random.default_rng(seed)
    pool = np.concatenate([residuals for *_, residuals, _ in kept])
    logs = np.log([flops for flops, *_ in kept])

    def vertices(x: Any, curves: Any, line: Any) -> Any:
        """Of curves (3, R) -> log N, log D, L of each minimum (R, 3); NaN where a curve has none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.clip(-curves[1] / (2 * curves[0]), x.min() - 1, x.max() + 1)
        at = np.where(curves[0] > 0, at, math.nan)
        return np.stack((at, np.polyval(line, at), np.polyval(curves, at)), -1)

    def resampled(x: Any, curve: Any) -> Any:
        return np.polyfit(x, np.polyval(curve, x)[:, None] + random.choice(pool, (len(x), resamples)), 2)

    found = np.concatenate([vertices(x, curve[:, None], line) for _, x, curve, _, line in kept])  # (budgets, 3)
    drawn = np.stack([vertices(x, resampled(x, curve), line) for _, x, curve, _, line in kept], 1)  # (R, budgets, 3)
    whole = np.isfinite(drawn).all((1, 2))
    powers = []
    for column in (0, 1):
        slope, start = np.polyfit(logs, found[:, column], 1)
        slopes = np.polyfit(logs, drawn[whole, :, column].T, 1)[0]
        powers.append(Power(math.exp(start), float(slope), percentiles(slopes, confidence)))
    bounds = [percentiles(np.exp(drawn[:, i, 0]), confidence) for i in range(len(kept))]
    minima = pd.DataFrame(
        {
            "flops": np.exp(logs), "runs": [len(x) for _, x, *_ in kept], "params": np.exp(found[:, 0]),
            "params_low": [low for low, _ in bounds], "params_high": [high for _, high in bounds],
            "tokens": np.exp(found[:, 1]), "loss": found[:, 2],
        }
    )  # fmt: skip
    curves = [curve for _, _, curve, *_ in kept]
    return IsoFlop(minima, curves, powers[0], powers[1], left_out, 1 - float(whole.mean()), confidence)
