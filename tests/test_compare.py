"""Comparisons of arms: statistics against scipy and simulations, pairing, refusals, figures, the command."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from test_analysis import CONFIG, ended, make_run

from etude import analysis
from etude.analysis import stats
from etude.errors import Refusal

matplotlib.use("Agg")


def frame(losses: dict[str, dict[int, float]], **columns: Any) -> pd.DataFrame:
    """A table as load_runs makes it, of {arm: {seed: loss}}; the arm is the setting `kind`."""
    rows = [
        {"run": f"{arm}/{seed}", "name": f"{arm}/{seed}", "status": "completed", "data/sha256": "d", "data/tokenizer_sha256": "t"}
        | {"config.kind": arm, "config.seed": seed, "val/full_loss": loss}
        for arm, seeds in losses.items()
        for seed, loss in seeds.items()
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def simulated(rng: np.random.Generator, n: int, **effects: float) -> pd.DataFrame:
    """Arms whose losses share what the seed does (sd 0.05) and differ by their effect and by noise (sd 0.01)."""
    common = rng.normal(3, 0.05, n)
    losses = {arm: common + shift + rng.normal(0, 0.01, n) for arm, shift in effects.items()}
    return frame({arm: dict(enumerate(values)) for arm, values in losses.items()})


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_cover_a_known_effect_and_identical_arms_are_seldom_told_apart(n: int) -> None:
    """The promise of a 95 % interval, and of p < 0.05, over simulated comparisons: two arms that are the same, one that
    is not."""
    rng = np.random.default_rng(n)
    tables = [analysis.compare(simulated(rng, n, a=0, b=0, c=0.02), "kind", baseline="a").table for _ in range(300)]
    rows = pd.concat(tables)
    truth = rows["arm"].map({"b": 0.0, "c": 0.02})
    covered = (rows["low"] <= truth) & (truth <= rows["high"])
    assert covered.groupby(rows["arm"]).mean().between(0.92, 0.98).all()
    same = rows[rows["arm"] == "b"]
    assert 0.02 <= (same["p"] < 0.05).mean() <= 0.08
    assert (same["p_permutation"] < 0.05).mean() <= 0.08
    if n == 3:
        assert rows["boot_low"].isna().all(), "three values: too many resamples are all the same"
    else:
        bootstrapped = (rows["boot_low"] <= truth) & (truth <= rows["boot_high"])
        assert bootstrapped.groupby(rows["arm"]).mean().between(0.92, 0.98).all()


@pytest.mark.parametrize("n", [2, 5, 12])
def test_the_paired_t_test_is_scipys(n: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(3.0, 0.1, n), rng.normal(3.1, 0.1, n)
    ours, theirs = stats.paired(a, b, 0.9), scipy.stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.9)
    assert (ours.difference, ours.p) == pytest.approx((np.mean(a - b), theirs.pvalue))
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))
    assert ours.effect_size == pytest.approx(theirs.statistic / math.sqrt(n))


def test_the_unpaired_t_test_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(3.0, 0.1, 4), rng.normal(3.1, 0.3, 9)
    ours, theirs = stats.welch(a, b), scipy.stats.ttest_ind(a, b, equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert (ours.p, ours.low, ours.high) == pytest.approx((theirs.pvalue, interval.low, interval.high))
    assert ours.boot_low < ours.difference < ours.boot_high


def test_the_permutation_p_counts_all_signs() -> None:
    """With three seeds no p below 1/4 is possible: all eight signs, of which two are as extreme."""
    assert stats.paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]).p_permutation == 2 / 8
    assert stats.paired([2.0, 3.0, 4.0, 0.5], [1.0, 1.0, 1.0, 1.0]).p_permutation == 4 / 16


def test_differences_without_spread_are_no_error() -> None:
    same = stats.paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.difference, same.low, same.high, same.p, same.effect_size) == (0, 0, 0, 1, 0)
    shifted = stats.paired([2.0, 3.0], [1.0, 2.0])
    assert (shifted.low, shifted.high, shifted.p) == (1, 1, 0) and shifted.effect_size == math.inf
    assert stats.welch([1.0, 1.0], [1.0, 1.0]).p == 1


def test_power_is_that_of_simulated_tests_and_of_r() -> None:
    """R: power.t.test(delta=.5, sd=1, power=.8, type="paired") says n = 33.37, two samples 63.77; delta=2: 4.22."""
    assert [stats.seeds_needed(0.5, (1.0,)), stats.seeds_needed(0.5, (1.0, 1.0))] == [34, 64]
    assert stats.seeds_needed(2.0, (1.0,)) == 5 and stats.seeds_needed(-2.0, (1.0,)) == 5
    assert stats.seeds_needed(0.0, (1.0,)) == math.inf and stats.seeds_needed(0.5, (0.0,)) == 2
    assert stats.power_of(33, 0.5, (1.0,)) < 0.8 <= stats.power_of(34, 0.5, (1.0,))
    d = np.random.default_rng(0).normal(1.2, 1.0, (20_000, 6))
    assert np.mean(scipy.stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05) == pytest.approx(stats.power_of(6, 1.2, (1.0,)), abs=0.01)  # fmt: skip
    x = np.random.default_rng(1).normal(0, [[[1.0]], [[3.0]]], (2, 20_000, 9)) + [[[3.0]], [[0.0]]]
    rejected = scipy.stats.ttest_ind(*x, axis=1, equal_var=False).pvalue < 0.05
    assert np.mean(rejected) == pytest.approx(stats.power_of(9, 3.0, (1.0, 3.0)), abs=0.015)
    assert 1e6 < stats.seeds_needed(1e-3, (1.0,)) < 1e7, "far beyond what anyone runs, and still a number"
    assert stats.power_of(10, 1e6, (1.0,)) == 1


def test_holm_is_rs() -> None:
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") in R."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.7]) == [0.7] and stats.holm([0.7, 0.9]) == [1.0, 1.0]


def test_the_bootstrap_repeats_with_its_seed() -> None:
    df = simulated(np.random.default_rng(0), 6, a=0, b=0.01)
    a, b, c = (analysis.compare(df, "kind", seed=s).table.iloc[0] for s in (0, 0, 1))
    assert a["boot_low"] == b["boot_low"] != c["boot_low"] and a["low"] == c["low"]


# ---------------------------------------------------------------- who is compared with whom


def test_runs_are_paired_by_seed_in_whatever_order(tmp_path: Path) -> None:
    df = frame({"a": {0: 3.0, 1: 3.5, 2: 4.0, 7: 9.0}, "b": {2: 4.3, 0: 3.1, 1: 3.7}})
    result = analysis.compare(df.sample(frac=1, random_state=1), "kind")
    (row,) = result.table.to_dict("records")
    assert (row["arm"], row["baseline"], row["test"], row["n"]) == ("b", "a", "paired t", 3)
    assert row["difference"] == pytest.approx(0.2)
    assert sorted(result.differences["b - a"]) == pytest.approx([0.1, 0.2, 0.3])
    assert any("1 run(s) have no partner with the same seed" in note for note in result.notes)
    assert result.arms.set_index("arm")["runs"].to_dict() == {"a": 4, "b": 3}


def test_what_both_arms_vary_pairs_too_and_what_is_an_arms_own_is_told() -> None:
    a = frame({"a": {0: 3.0, 1: 3.5}})
    b = frame({"b": {0: 3.1, 1: 3.7}}, **{"config.width": 7})
    grid = [p.assign(**{"config.lr": lr}) for lr in (1e-3, 2e-3) for p in (a, b.assign(**{"val/full_loss": b["val/full_loss"] + lr}))]  # fmt: skip
    df = pd.concat(grid, ignore_index=True).assign(run=lambda d: d.index.astype(str))
    result = analysis.compare(df, "kind")
    assert result.table["n"].tolist() == [4] and sorted(result.differences["b - a"]) == pytest.approx([0.101, 0.102, 0.201, 0.202])  # fmt: skip
    assert result.notes == ["b and a also differ in width"]
    assert analysis.compare(df, "kind,width").notes == []


def test_without_common_seeds_it_is_welchs_test() -> None:
    df = frame({"a": {0: 3.0, 1: 3.5, 2: 3.2}, "b": {3: 4.3, 4: 4.1}})
    result = analysis.compare(df, "kind")
    assert result.table[["test", "n"]].values.tolist() == [["Welch t", 2]] and "Welch" in result.notes[0]
    assert result.table["p"][0] == pytest.approx(
        scipy.stats.ttest_ind([4.3, 4.1], [3.0, 3.5, 3.2], equal_var=False).pvalue
    )


def test_every_two_arms_or_each_with_the_baseline() -> None:
    rng = np.random.default_rng(0)
    df = frame({arm: dict(enumerate(rng.normal(3, 0.1, 4))) for arm in ("x=16", "x=4", "x=64")})
    every = analysis.compare(df, "kind")
    assert every.table[["arm", "baseline"]].values.tolist() == [["x=16", "x=4"], ["x=64", "x=4"], ["x=64", "x=16"]]
    assert every.table["p_holm"].tolist() == stats.holm(every.table["p"].tolist())
    some = analysis.compare(df, "kind", baseline="x=64")
    assert some.table[["arm", "baseline"]].values.tolist() == [["x=4", "x=64"], ["x=16", "x=64"]]
    assert some.table["difference"][0] == pytest.approx(-every.table["difference"][1])


def test_how_many_seeds_are_lacking_for_the_effect_asked_for() -> None:
    df = simulated(np.random.default_rng(0), 4, a=0, b=0.02)
    row = analysis.compare(df, "kind", effect=0.01).table.iloc[0]
    assert row["seeds"] == stats.seeds_needed(0.01, (row["sd"],)) and row["more_seeds"] == row["seeds"] - 4 > 0
    (sentence,) = analysis.compare(df, "kind", effect=0.01).sentences()
    assert (
        f"a difference of 0.01 with power 0.8 takes {row['seeds']:.0f} seeds: {row['more_seeds']:.0f} more." in sentence
    )
    seen = analysis.compare(df, "kind").table.iloc[0]
    assert seen["effect"] == abs(seen["difference"]) and seen["seeds"] == stats.seeds_needed(
        seen["difference"], (seen["sd"],)
    )


def test_unfinished_and_diverged_runs_are_left_out_and_counted() -> None:
    df = frame({"a": {i: 3 + i / 10 for i in range(5)}, "b": {i: 3.1 + i / 9 for i in range(5)}})
    df.loc[0, "status"] = "pruned"
    df.loc[6, "val/full_loss"] = math.nan
    result = analysis.compare(df, "kind")
    assert result.table["n"].tolist() == [3]
    assert result.notes[:2] == [
        "left out, not completed: 1 run, a/0 (pruned)",
        "left out, without a finite val/full_loss: 1 run, b/1 (None); what follows holds for the others only",
    ]


TWO = {"a": {0: 3.0, 1: 3.1}, "b": {0: 3.2, 1: 3.4}}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "one seed": (lambda: analysis.compare(frame({"a": {0: 3.0}, "b": {0: 3.1, 1: 3.2}}), "kind"), "a has one seed: an interval takes 2 seeds"),
    "one arm": (lambda: analysis.compare(frame({"a": {0: 3.0, 1: 3.1}}), "kind"), "all runs have the same value, a"),
    "no arm": (lambda: analysis.compare(frame(TWO)), "say what makes the arms"),
    "unknown setting": (lambda: analysis.compare(frame(TWO), "kinds"), "did you mean kind"),
    "unknown metric": (lambda: analysis.compare(frame(TWO), "kind", "val/ful_loss"), "did you mean val/full_loss"),
    "no number": (lambda: analysis.compare(frame(TWO, **{"nothing": pd.array([1, None, 3, 4], "Int64")}), "kind", "status"), "status is not a number"),
    "no effect": (lambda: analysis.compare(frame(TWO), "kind", effect=math.nan), "effect=nan should be the difference"),
    "unknown baseline": (lambda: analysis.compare(frame(TWO), "kind", baseline="c"), "baseline=c is not an arm"),
    "other data": (lambda: analysis.compare(frame(TWO, **{"data/sha256": ["d", "d", "e", "e"]}), "kind"), "b and a have not seen the same data"),
    "other tokenizer": (lambda: analysis.compare(frame(TWO, **{"data/tokenizer_sha256": ["d", "d", "e", "e"]}), "kind"), "the same tokenizer"),
    "nothing finished": (lambda: analysis.compare(frame(TWO, status=["failed"] * 2 + ["completed"] * 2), "kind"), "no run of a is completed"),
    "confidence in percent": (lambda: analysis.compare(frame(TWO), "kind", confidence=95), "between 0 and 1"),
    "twice the same run": (lambda: analysis.compare({"x": frame(TWO), "y": frame(TWO)}), "a/0 is in two arms"),
}  # fmt: skip


@pytest.mark.parametrize("ask, message", REFUSED.values(), ids=list(REFUSED))
def test_what_has_no_answer_is_refused_in_one_line(ask: Callable[[], Any], message: str) -> None:
    with pytest.raises(Refusal, match=message) as refusal:
        ask()
    assert "\n" not in str(refusal.value)


def test_other_data_does_not_matter_to_speed_nor_another_tokenizer_to_bits_per_byte() -> None:
    df = frame(TWO, **{"data/tokenizer_sha256": ["d", "d", "e", "e"]})
    df = df.assign(**{"val/full_bits_per_byte": df["val/full_loss"], "tokens_per_s": df["val/full_loss"]})
    assert analysis.compare(df, "kind", "val/full_bits_per_byte").table["n"].tolist() == [2]
    df["data/sha256"] = ["d", "d", "e", "e"]
    assert analysis.compare(df, "kind", "tokens_per_s").table["n"].tolist() == [2]
    with pytest.raises(Refusal, match="same data"):
        analysis.compare(df, "kind", "val/full_bits_per_byte")


def test_runs_on_several_data_sets_are_paired_on_each() -> None:
    df = frame({"a": {0: 3.0, 1: 3.1}, "b": {0: 3.2, 1: 3.4}}, **{"data/sha256": ["d", "e", "d", "e"]})
    assert sorted(analysis.compare(df, "kind").differences["b - a"]) == pytest.approx([0.2, 0.3])
    df = frame({"a": {0: 3.0, 1: 3.1}, "b": {2: 3.2, 3: 3.4}}, **{"data/sha256": ["d", "e", "d", "e"]})
    with pytest.raises(Refusal, match="share no pair"):
        analysis.compare(df, "kind")


# ---------------------------------------------------------------- arms from run folders


ATTENTION = {"gqa": {"_target_": "x.GQA", "n_heads": 4}, "mla": {"_target_": "x.MLA", "rank": 8}}


def attention_runs(folder: Path, say: Callable[[str], list[str]]) -> Path:
    """Three seeds of two choices of model/attn; say(choice) is what was typed."""
    for i, (choice, node) in enumerate(ATTENTION.items()):
        for seed in range(3):
            config = CONFIG | {"seed": seed, "model": {"dim": 64, "attn": node}}
            run = make_run(
                folder / f"{choice}_{seed}", config, ended(3 + i / 10 + seed / 3 + i * seed / 50), minute=seed
            )
            (run / "meta/overrides").write_text("".join(f"{o}\n" for o in [*say(choice), f"seed={seed}"]))
            (run / "meta/model.json").write_text(json.dumps({"params": 1000 + i}))
    return folder


@pytest.mark.parametrize("say, arms", [
    (lambda c: [f"model/attn={c}"], ["gqa", "mla"]),
    (lambda c: [f"+model/attn@model.attn={c}"], ["gqa", "mla"]),
    (lambda c: ["model/attn=mla"] if c == "mla" else [], ["GQA", "mla"]),
    (lambda c: [], ["GQA", "MLA"]),
    (lambda c: [f"experiment=attention/{c}"], ["GQA", "MLA"]),
], ids=["typed", "with a package", "the default was not typed", "nothing typed", "by an experiment"])  # fmt: skip
def test_a_choice_in_a_config_group_is_found(tmp_path: Path, say: Callable[[str], list[str]], arms: list[str]) -> None:
    result = analysis.compare(attention_runs(tmp_path, say), "model/attn")
    assert result.arms[["arm", "params"]].values.tolist() == [[arms[0], 1000], [arms[1], 1001]]
    assert result.table["n"].tolist() == [3] and not result.notes
    assert result.table["difference"][0] == pytest.approx(0.12)


def test_an_experiment_is_an_arm(tmp_path: Path) -> None:
    attention_runs(tmp_path, lambda c: [f"experiment=attention/{c}"])
    result = analysis.compare(tmp_path, "experiment")
    assert result.arms["arm"].tolist() == ["gqa", "mla"]
    assert "also differ in model.attn._target_, model.attn.n_heads, model.attn.rank" in result.notes[0]


def test_recorded_choices_go_before_what_was_typed(tmp_path: Path) -> None:
    attention_runs(tmp_path, lambda c: ["model/attn=typed"])
    for run in tmp_path.iterdir():
        choice = run.name.partition("_")[0]
        (run / "meta/choices.json").write_text(
            json.dumps({"model": "dense", "model/attn": choice, "hydra/launcher": "x"})
        )
    df = analysis.load_runs(tmp_path)
    assert [c for c in df if c.startswith("choice.")] == ["choice.model", "choice.model/attn"]
    assert analysis.compare(df, "model/attn").arms["arm"].tolist() == ["gqa", "mla"]
    assert list(analysis.table(df).columns[-2:]) == ["model/attn", "seed"], "not each key that follows from the choice"
    assert analysis.over_seeds(df)["model/attn"].tolist() == ["gqa", "mla"]


def test_parts_of_one_class_are_told_apart_by_their_keys(tmp_path: Path) -> None:
    for i, heads in enumerate((2, 4, 4, 2)):
        make_run(
            tmp_path / str(i), CONFIG | {"seed": i // 2, "model": {"attn": {"_target_": "x.GQA", "n_heads": heads}}}
        )
    found = analysis.arms(analysis.load_runs(tmp_path), "model/attn")
    assert sorted(found) == ["GQA n_heads=2"] * 2 + ["GQA n_heads=4"] * 2


def test_arms_by_name(tmp_path: Path) -> None:
    attention_runs(tmp_path, lambda c: [])
    result = analysis.compare({"old": f"{tmp_path}/gqa*", "new": f"{tmp_path}/mla*"}, baseline="old")
    assert result.table[["arm", "baseline", "n"]].values.tolist() == [["new", "old", 3]]
    assert "model.attn._target_" in result.notes[0]


def test_final_is_what_a_scaling_law_is_fitted_to(tmp_path: Path) -> None:
    attention_runs(tmp_path, lambda c: [f"model/attn={c}"])
    make_run(tmp_path / "failed", lines=ended(1.0), status="failed")
    found = analysis.final(tmp_path)
    assert list(found.columns) == ["run", "params", "tokens", "flops", "loss", "model/attn", "seed"]
    assert len(found) == 6 and found["params"].dtype == found["tokens"].dtype == float
    with pytest.raises(Refusal, match="no run has par; did you mean params"):
        analysis.final(tmp_path, params="par")


# ---------------------------------------------------------------- figures and the command


def test_the_figure_shows_every_pair_and_interval() -> None:
    rng = np.random.default_rng(0)
    df = frame({arm: dict(enumerate(rng.normal(3, 0.1, 4))) for arm in "abc"})
    result = analysis.compare(df, "kind", baseline="a")
    figure = analysis.plot_compare(result)
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "b \N{MINUS SIGN} a\n(4 pairs)",
        "c \N{MINUS SIGN} a\n(4 pairs)",
    ]
    assert ax.get_xlabel().startswith("difference in val/full_loss (nats)")
    for i, name in enumerate(("b - a", "c - a")):
        assert np.asarray(ax.containers[i].lines[0].get_xdata()).tolist() == [result.table["difference"][i]]
        assert any(np.asarray(line.get_xdata()).tolist() == result.differences[name] for line in ax.lines)
        ends = ax.containers[i].lines[2][0].get_segments()[0][:, 0]
        assert ends.tolist() == pytest.approx([result.table["low"][i], result.table["high"][i]])
    plt.close(figure)


def test_curves_by_arm_are_means_with_intervals(tmp_path: Path) -> None:
    for arm in (1, 2):
        for seed in range(3):
            lines = [{"step": s, "tokens": 10 * s, "train/loss": arm + seed / 10} for s in (10, 20, 30)]
            make_run(tmp_path / f"{arm}_{seed}", CONFIG | {"seed": seed, "kind": arm}, lines)
    figure = analysis.plot_curves(tmp_path, "train/loss", x="tokens", by="kind")
    (ax,) = figure.axes
    assert [np.asarray(line.get_ydata()).tolist() for line in ax.lines] == [
        pytest.approx([1.1] * 3),
        pytest.approx([2.1] * 3),
    ]
    half = scipy.stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((1.1 - half, 1.1 + half))
    assert [t.get_text() for t in figure.legends[0].texts] == ["kind=1 (3 runs)", "kind=2 (3 runs)"]
    plt.close(figure)


def test_curves_logged_at_other_places_are_averaged_where_all_are_known(tmp_path: Path) -> None:
    for seed, every in enumerate((10, 15)):
        lines = [{"step": s, "train/loss": s / 10 + seed, "perf/seconds": s * 1.0} for s in range(every, 91, every)]
        make_run(tmp_path / f"{seed}", CONFIG | {"seed": seed, "kind": 1}, lines)
    figure = analysis.plot_curves(tmp_path, "train/loss", x="seconds", by="kind")
    x, y = (np.asarray(v) for v in figure.axes[0].lines[0].get_data())
    assert (x.min(), x.max()) == (15, 90) and y == pytest.approx(x / 10 + 0.5)
    plt.close(figure)


def test_results_against_compute(tmp_path: Path) -> None:
    for i, (flops, loss) in enumerate([(1e9, 4.0), (1e10, 3.0), (1e9, 4.2), (1e10, 3.2)]):
        lines = [{"step": 1, "flops": flops, "val/full_loss": loss}]
        make_run(tmp_path / f"{i}", CONFIG | {"seed": i // 2, "kind": 1}, lines)
    figure = analysis.plot_final(tmp_path, by="kind")
    (ax,) = figure.axes
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "training compute (FLOPs)"
    assert any(np.asarray(line.get_xydata()) == pytest.approx(np.array([[1e9, 4.1], [1e10, 3.1]])) for line in ax.lines)
    plt.close(figure)
    with pytest.raises(Refusal, match="no completed run has both val/full_loss and params"):
        analysis.plot_final(tmp_path, x="params")


def test_the_command_compares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attention_runs(tmp_path / "runs", lambda c: [f"model/attn={c}"])
    picture = tmp_path / "difference.png"
    options = ["by=model/attn", "metric=val/full_loss", "effect=0.01", "baseline=gqa", f"plot={picture}"]
    assert analysis.main(["compare", str(tmp_path / "runs"), *options]) == 0
    out = capsys.readouterr().out
    assert "mla differs from gqa: val/full_loss +0.120, 95 % interval" in out and "To find a difference of 0.01" in out
    assert picture.stat().st_size > 5000
    assert analysis.main(["compare", f"{tmp_path}/runs/gqa*", f"{tmp_path}/runs/mla*"]) == 0
    assert "note: " in capsys.readouterr().out
    assert analysis.main(["curves", str(tmp_path / "runs"), "by=model/attn", "ema=0.5", f"plot={tmp_path}/c.svg"]) == 0
    assert (tmp_path / "c.svg").stat().st_size > 5000


BAD = {
    "compare RUNS": "say what makes the arms",
    "compare RUNS byy=model/attn": "did you mean by?",
    "compare RUNS by=model/attn effect=much": "effect is a number",
    "compare RUNS by=model/attn plot=nowhere/x.png": "plot=nowhere/x.png",
    "curves RUNS": "say where the figure goes",
    "curves RUNS plot=x.png x=hours": "x=hours is no axis",
    "curves RUNS plot=x.png ema=1": "is not in [0, 1)",
}


@pytest.mark.parametrize("line, message", BAD.items(), ids=list(BAD))
def test_bad_options_are_one_line_and_exit_2(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(attention_runs(tmp_path / "runs", lambda c: []).parent)
    assert analysis.main(line.replace("RUNS", "runs").split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
