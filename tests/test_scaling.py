"""Scaling laws and learning-rate transfer: known truths are found, intervals hold them, and too little is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from etude.analysis import load_runs
from etude.errors import Refusal
from etude.scaling import command, laws, transfer
from etude.scaling.figures import plot_isoflop, plot_loss

TRUTH = laws.Law(1.69, 406.4, 0.34, 410.7, 0.28)  # Hoffmann et al. 2022, equation 10


def runs(seed: int, noise: float, sizes: int = 5, amounts: int = 5) -> pd.DataFrame:
    """A grid of sizes and amounts of data whose losses are off the truth by `noise`, relatively."""
    n, d = np.meshgrid(np.logspace(6, 8.5, sizes), np.logspace(8, 10.5, amounts))
    loss = TRUTH.loss(n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(n.shape))
    table = {"params": n.ravel(), "tokens": d.ravel(), "flops": 6 * (n * d).ravel(), "loss": loss.ravel()}
    return pd.DataFrame(table)


def equal_flops(seed: int, noise: float, budgets: int = 4, sizes: int = 6, offset: float = 1.0) -> pd.DataFrame:
    """Sizes around the best one (times `offset`) at each budget, which the runs overshoot by up to a percent."""
    rng, rows = np.random.default_rng(seed), []
    for flops in np.logspace(17, 19, budgets):
        for factor in np.logspace(-0.4, 0.4, sizes):
            n = TRUTH.optimum(flops)[0] * factor * offset
            flops_spent = flops * (1 + 0.01 * rng.random())
            d = flops_spent / 6 / n
            rows.append((n, d, flops_spent, TRUTH.loss(n, d) * math.exp(noise * rng.standard_normal())))
    return pd.DataFrame(rows, columns=["params", "tokens", "flops", "loss"])


def test_the_law_without_noise_is_found_exactly() -> None:
    """Also its optimum: no other size has less loss for the same FLOPs."""
    fit = laws.fit_loss(runs(0, 0.0), resamples=2)
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(fit.law, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3), name
    n, d = fit.law.optimum(1e18)
    assert 6 * n * d == pytest.approx(1e18)
    assert all(fit.law.loss(n * f, d / f) > fit.law.loss(n, d) for f in (0.9, 1.1))


def test_the_law_with_noise_is_scipys() -> None:
    """The same Huber loss minimised by another method, from the truth: nothing lower, and the same place."""
    data = runs(1, 0.01)
    fit = laws.fit_loss(data, resamples=2)
    x, y, z = (np.log(data[c].to_numpy()) for c in ("params", "tokens", "loss"))

    def residuals(p: Any) -> Any:
        return np.log(np.exp(p[0] - p[1] * x) + np.exp(p[2] - p[3] * y) + np.exp(p[4])) - z

    start = [math.log(TRUTH.A), TRUTH.alpha, math.log(TRUTH.B), TRUTH.beta, math.log(TRUTH.E)]
    theirs = least_squares(residuals, start, loss="huber", f_scale=laws.DELTA, x_scale="jac", xtol=1e-14, ftol=1e-14)
    ours = [math.log(fit.law.A), fit.law.alpha, math.log(fit.law.B), fit.law.beta, math.log(fit.law.E)]
    assert laws._huber(residuals(ours), laws.DELTA)[0] <= laws._huber(theirs.fun, laws.DELTA)[0] * (1 + 1e-6)
    assert fit.law.alpha == pytest.approx(theirs.x[1], rel=1e-3) and fit.law.beta == pytest.approx(
        theirs.x[3], rel=1e-3
    )
    assert fit.error == pytest.approx(0.01, rel=0.5)


def test_intervals_of_the_law_hold_the_truth() -> None:
    """Of 90 % intervals over simulated studies most do: with 12 of them at least 8 (a right one fails that in one of 2,500
    tries; one of 50 % in nine of ten). docs/scaling.md has a larger count."""
    held = {"alpha": 0, "beta": 0, "size_exponent": 0}
    for seed in range(12):
        fit = laws.fit_loss(runs(seed, 0.01, 4, 5), resamples=16, confidence=0.9, seed=seed)
        for name in held:
            low, high = fit.interval(name)
            held[name] += low <= getattr(TRUTH, name) <= high
    assert all(count >= 8 for count in held.values()), held


def test_intervals_of_the_exponents_hold_the_truth() -> None:
    """Of 95 % intervals of a and b over 40 simulated studies at least 34."""
    held = 0
    for seed in range(40):
        fit = laws.fit_isoflop(equal_flops(seed, 0.003), resamples=60, seed=seed)
        a, b = fit.params.interval, fit.tokens.interval
        held += a[0] <= TRUTH.size_exponent <= a[1] and b[0] <= 1 - TRUTH.size_exponent <= b[1]
    assert held >= 34


def test_the_minima_without_noise() -> None:
    """The sizes of least loss are the law's, the exponents add up to 1, and a budget without a minimum is left out by name."""
    table = equal_flops(0, 0.0)
    fit = laws.fit_isoflop(table, resamples=10)
    for row in fit.minima.itertuples():
        n, d = TRUTH.optimum(row.flops)
        assert row.params == pytest.approx(n, rel=0.03) and row.tokens == pytest.approx(d, rel=0.03)
    assert fit.params.exponent == pytest.approx(TRUTH.size_exponent, abs=0.01)
    assert fit.params.exponent + fit.tokens.exponent == pytest.approx(1, abs=0.01)
    assert not fit.left_out and fit.flat == 0
    small = equal_flops(0, 0.0, budgets=2, offset=0.05).assign(flops=lambda t: t["flops"] * 1e4)
    (why, _) = laws.fit_isoflop(pd.concat([table, small]), resamples=10).left_out
    assert "no minimum among its sizes; add larger ones" in why


def test_too_little_is_refused() -> None:
    """In one line that says how much is there and what to type."""
    with pytest.raises(Refusal, match="8 runs or more .* here are 4 of 2 and 2; .*sweep=isoflop"):
        laws.fit_loss(runs(0, 0.01, 2, 2))
    with pytest.raises(Refusal, match="here are 10 of 2 and 5"):
        laws.fit_loss(runs(0, 0.01, 2, 5))
    with pytest.raises(Refusal, match="need 3 budgets .* here are 2"):
        laws.fit_isoflop(equal_flops(0, 0.0, budgets=2))
    with pytest.raises(Refusal, match="here are 0 .*3 sizes"):
        laws.fit_isoflop(equal_flops(0, 0.0, sizes=3))
    with pytest.raises(Refusal, match="here are 0"):
        laws.fit_isoflop(equal_flops(0, 0.0).assign(loss=math.nan))
    with pytest.raises(Refusal, match="two widths with three learning rates"):
        transfer.transfer(rates(0, lrs=2))


# ---------------------------------------------------------------- learning-rate transfer


def rates(seed: int, noise: float = 0.01, seeds: int = 3, lrs: int = 7, offset: float = 0.0) -> pd.DataFrame:
    """Losses that are parabolas of log2 lr: with muP the best rate is 2^-7 at every width, without it halves when the width
    doubles. A seed adds the same at all rates, and noise at each."""
    rng, rows = np.random.default_rng(seed), []
    for mup in (True, False):
        for width in (64, 128, 256):
            best = -7 + offset - (0 if mup else math.log2(width / 64))
            for s in range(seeds):
                of_seed = 0.1 * rng.standard_normal()
                for exponent in range(-10, -10 + lrs):
                    loss = 2 + 0.05 * (exponent - best) ** 2 + of_seed + noise * rng.standard_normal()
                    rows.append((mup, width, 2.0**exponent, s, loss))
    return pd.DataFrame(rows, columns=["mup", "width", "lr", "seed", "loss"])


def test_where_the_best_rate_lies_and_how_far_it_moves() -> None:
    """Over 40 simulated sweeps the 95 % intervals hold the truth in 34 or more, though seeds differ ten times as much as rates;
    the shift is 1 with muP and 1/4 without."""
    held = {"optimum": 0, "muP": 0, "standard": 0}
    for seed in range(40):
        result = transfer.transfer(rates(seed), resamples=100, seed=seed)
        low, high = result[True].optima[128].interval
        held["optimum"] += low <= 2.0**-7 <= high
        for mup, name, truth in ((True, "muP", 1.0), (False, "standard", 0.25)):
            low, high = result[mup].interval
            held[name] += low <= truth <= high
    assert all(count >= 34 for count in held.values()), held
    assert result[False].shift == pytest.approx(0.25, rel=0.4)


def test_what_is_not_known_is_said() -> None:
    """One seed has no interval; a best rate at the end of the grid may lie beyond it."""
    said = "\n".join(transfer.sentences(transfer.transfer(rates(0, seeds=1))))
    assert said.count("no interval: one seed") == 8
    said = "\n".join(transfer.sentences(transfer.transfer(rates(0, offset=4.0))))
    assert said.count("the grid ends there") >= 4
    # muP's best rate lies above the grid at every width, and without it at the narrower ones alone.
    assert "muP      from width 64 to 256 nothing is known of how the best rate moves: the grid ends at that of" in said
    lower = transfer.sentences(transfer.transfer(rates(0, offset=-1.5)))
    assert "standard from width 64 to 256 the best rate is multiplied by" in lower[3] and " or less: " in lower[3], (
        lower
    )


# ---------------------------------------------------------------- the commands, on run folders


def folders(place: Path, table: pd.DataFrame, settings: dict[str, str]) -> None:
    """Run folders with what the commands read; `settings`: column -> config key."""
    import json

    import yaml

    for i, row in enumerate(table.to_dict("records")):
        run = place / f"{i:03}"
        (run / "meta").mkdir(parents=True)
        (run / "logs").mkdir()
        config: dict[str, Any] = {}
        for column, key in settings.items():
            *parents, last = key.split(".")
            node = config
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = row[column]
        (run / "meta" / "config.yaml").write_text(yaml.safe_dump(config))
        (run / "meta" / "data.json").write_text("{}")
        (run / "meta" / "model.json").write_text(json.dumps({"params": int(row.get("params", 1))}))
        last_line = {"step": 5, "lr": 1e-4, "val/full_loss": row["loss"]} | {
            k: int(row[k]) for k in ("tokens", "flops") if k in row
        }
        (run / "logs" / "metrics.jsonl").write_text(json.dumps(last_line) + "\n")
        (run / "status.json").write_text(json.dumps({"status": "completed", "started": "2026-01-01T00:00:00"}))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """fit, isoflop and lr_transfer from folders, with figures; unknown options and empty places in one line."""
    folders(tmp_path / "iso", equal_flops(3, 0.002), {"params": "model.dim"})
    keys = {"mup": "model.mup", "width": "model.dim", "lr": "optimizer.lr", "seed": "seed"}
    folders(tmp_path / "lr", rates(3, seeds=2, lrs=5), keys)
    assert len(load_runs(tmp_path / "iso")) == 24
    for what, where in (("fit", "iso"), ("isoflop", "iso"), ("lr_transfer", "lr")):
        more = ["flops=1e21"] if what == "fit" else []
        assert command.main([what, str(tmp_path / where), f"plot={tmp_path}/{what}.png", *more]) == 0
        assert (tmp_path / f"{what}.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    for part in (
        "L(N, D) = ",
        "a in N_opt ~ C^a",
        "with 1e+21 FLOPs",
        "times the largest run: the interval holds if the law still does there",
        "N_opt = ",
        "best size",
        "best lr",
        "the best rate is multiplied by",
    ):
        assert part in said, part
    for arguments, why in {
        ("fit", "plots=x"): "fit has no option plots=; did you mean plot?",
        ("isoflap",): "etude.scaling has no isoflap; did you mean isoflop?",
        ("fit", f"{tmp_path}/none"): "there is no such folder",
        ("lr_transfer", f"{tmp_path}/iso"): "no run has config.model.mup",
        ("isoflop", f"{tmp_path}/iso", "plot=/no/where.png"): "plot=/no/where.png",
        ("coord", "widths=32"): "two or more different widths",
        ("coord", "widths=32,32"): "two or more different widths",
        ("fit", f"{tmp_path}/iso", "flops=-1"): "flops=-1 should be",
        ("fit", f"{tmp_path}/iso", "flops=nan"): "flops=nan should be",
        ("isoflop", f"{tmp_path}/iso", "params=run"): "run is not a number",
        ("lr_transfer", f"{tmp_path}/lr", "metric=status"): "status is not a number",
        ("coord", "model.dims=3"): "model.dims",
    }.items():
        assert command.main(list(arguments)) == 2, arguments
        assert why in capsys.readouterr().err, arguments


def test_figures_have_labels_and_units() -> None:
    fits = (plot_isoflop(t := equal_flops(0, 0.002), laws.fit_isoflop(t, 20)), plot_loss(t, laws.fit_loss(t, 2)))
    for figure in fits:
        for ax in figure.axes:
            assert ax.get_xlabel() and ax.get_ylabel()
    assert any("FLOPs" in ax.get_xlabel() for figure in fits for ax in figure.axes)
