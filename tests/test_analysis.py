"""Runs as tables and curves: from synthetic folders, whole and damaged."""

import concurrent.futures
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml

from etude import analysis
from etude.analysis import load
from etude.errors import Refusal

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"seed": 0, "tag": "", "max_epochs": None, "prompts": ["a", "b"], "model": {"dim": 64, "attn": {"n_heads": 4}}, "optimizer": {"lr": 1e-3}}  # fmt: skip
METRICS: list[dict] = [
    {"step": 1, "train/loss": 5.0, "tokens": 128, "perf/tokens_per_s": 10.0},
    {"step": 3, "val/loss": 4.5},  # an evaluation between two logged steps
    {"step": 4, "train/loss": 4.0, "tokens": 512, "perf/tokens_per_s": 300.0},
    {"step": 6, "train/loss": 3.0, "tokens": 768, "perf/tokens_per_s": 200.0, "val/loss": 4.6, "val/full_loss": 4.7},
]


def make_run(
    folder: Path, config: dict | None = None, lines: list[dict] | None = None, minute: int = 0, **status: Any
) -> Path:
    """A run's folder as train.py leaves it, started `minute` minutes after ten."""
    for sub in ("artifacts/checkpoints", "logs", "meta"):
        (folder / sub).mkdir(parents=True)
    fields = {
        "status": "completed",
        "pid": 1,
        "started": f"2026-01-02T10:{minute:02}:00+00:00",
        "heartbeat": f"2026-01-02T10:{minute:02}:50+00:00",
        "step": 6,
        "metrics": {"train/loss": 3.0},
        "ended": f"2026-01-02T11:{minute:02}:52+01:00",
    }
    (folder / "status.json").write_text(json.dumps(fields | status))
    (folder / "meta/config.yaml").write_text(yaml.safe_dump(CONFIG if config is None else config, sort_keys=False))
    (folder / "meta/data.json").write_text(json.dumps({"sha256": "da7a", "tokenizer_sha256": "70c", "eos": None}))
    (folder / "logs/metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in (METRICS if lines is None else lines)))  # fmt: skip
    return folder


def with_changes(**changes: Any) -> dict:
    return CONFIG | changes


def ended(loss: float, tokens: int = 128) -> list[dict]:
    return [{"step": 1, "train/loss": loss, "tokens": tokens, "val/loss": loss, "val/full_loss": loss}]


def test_a_row_says_what_the_run_was_and_how_it_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs/20260102_100000")
    (row,) = analysis.load_runs(tmp_path / "runs").to_dict("records")
    assert (row["run"], row["name"], row["status"]) == (str(run), "20260102_100000", "completed")
    assert (row["step"], row["tokens"], row["seconds"]) == (6, 768, 52.0)  # ended is given in another time zone
    assert (row["train/loss"], row["val/loss"], row["val/full_loss"]) == (3.0, 4.6, 4.7)
    assert (row["best_val_loss"], row["best_step"]) == (4.5, 3)
    assert row["tokens_per_s"] == 200.0, "a median: the first step, which warms up, does not count for more"
    assert (row["config.model.attn.n_heads"], row["config.optimizer.lr"]) == (4, 1e-3)
    assert row["config.max_epochs"] is None and row["config.prompts"] == ["a", "b"]
    assert row["data/sha256"] == "da7a" and row["error"] is None and row["unreadable"] == ""


def test_runs_are_found_in_sweeps_by_glob_and_in_lists(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    late = make_run(runs / "20260102_a", minute=30)
    jobs = [make_run(runs / "sweeps/20260101_s" / f"{i}_abc", minute=i) for i in (2, 10)]
    (runs / ".aim").mkdir()
    (runs / "notes.txt").write_text("not a run")
    everything = analysis.load_runs(str(runs))
    assert list(everything["name"]) == ["sweeps/20260101_s/2_abc", "sweeps/20260101_s/10_abc", "20260102_a"]
    assert list(analysis.load_runs(runs / "sweeps/20260101_s")["name"]) == ["2_abc", "10_abc"]
    assert list(analysis.load_runs(f"{runs}/2026*")["run"]) == [str(late)]
    assert list(analysis.load_runs(f"{runs}/sweeps/*")["name"]) == ["2_abc", "10_abc"]
    assert len(analysis.load_runs([jobs[0], str(late), runs])) == 3, "each run once"
    (runs / "sweeps/20260102_before_its_first_job").mkdir()
    assert len(analysis.load_runs([str(p) for p in sorted((runs / "sweeps").iterdir())])) == 2
    assert list(analysis.load_runs(everything.tail(1))["run"]) == [str(late)], "the choice of a table"


@pytest.mark.parametrize("pattern", ["nowhere", "no*where", "empty", "empty/file.txt"])
def test_nothing_found_is_refused_with_what_to_give(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/file.txt").write_text("")
    with pytest.raises(Refusal, match="give a folder of runs"):
        analysis.load_runs(str(tmp_path / pattern))


def cut_off(name: str, at: int) -> Callable[[Path], Any]:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:at])


def replaced(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda run: (run / name).write_bytes(content)


def removed(name: str) -> Callable[[Path], Any]:
    return lambda run: (run / name).unlink()


DAMAGE = {
    "no status yet": (removed("status.json"), "status.json"),
    "empty status": (cut_off("status.json", 0), "status.json"),
    "half a status": (cut_off("status.json", 40), "status.json"),
    "status of another kind": (replaced("status.json", b"[1, 2]"), "status.json"),
    "status null": (replaced("status.json", b"null"), "status.json"),
    "status nested otherwise": (replaced("status.json", b'{"status": "completed", "metrics": [1], "started": 5}'), ""),
    "no config": (removed("meta/config.yaml"), "meta/config.yaml"),
    "empty config": (replaced("meta/config.yaml", b""), "meta/config.yaml"),
    "config not yaml": (replaced("meta/config.yaml", b"a: [1, \n\x00"), "meta/config.yaml"),
    "config not text": (replaced("meta/config.yaml", b"\xff\xfe\xfd"), "meta/config.yaml"),
    "no data": (removed("meta/data.json"), "meta/data.json"),
    "no metrics": (removed("logs/metrics.jsonl"), "logs/metrics.jsonl"),
}


@pytest.mark.parametrize("damage, file", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_run_shows_the_rest_of_it(tmp_path: Path, damage: Callable[[Path], Any], file: str) -> None:
    whole, hurt = make_run(tmp_path / "whole", minute=1), make_run(tmp_path / "hurt", with_changes(seed=1))
    damage(hurt)
    df = analysis.load_runs(tmp_path)
    row = df.set_index("name").loc["hurt"]
    assert row["unreadable"] == file
    assert row["status"] == ("unknown" if file == "status.json" else "completed")
    assert row["step"] == 6 and row["train/loss"] == 3.0, "from either of status and metrics"
    assert (row["data/sha256"] == "da7a") == (file != "meta/data.json")
    assert df.set_index("name").loc["whole", "config.seed"] == 0
    assert analysis.varying(df) == ([] if file == "meta/config.yaml" else ["config.seed"])
    assert set(analysis.table(df)["name"]) == {"whole", "hurt"}
    analysis.plot_curves(df)
    assert str(whole) in set(analysis.curves(df)["run"])


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "logs/metrics.jsonl").open("ab") as out:
        out.write(b'{"step": 8, "train/lo\n[1]\n{"train/loss": 1.0}\n\x00\x00\xff\n{"step": 9, "train/loss": 2.5')
    (row,) = analysis.load_runs(run).to_dict("records")
    assert row["step"] == 6 and row["train/loss"] == 3.0


def test_losses_that_are_not_numbers_are_never_the_best(tmp_path: Path) -> None:
    lines = [{"step": i, "val/loss": v} for i, v in enumerate([math.nan, 4.0, math.inf, 3.0, math.nan], 1)]
    make_run(tmp_path / "a", lines=lines)
    make_run(tmp_path / "b", lines=lines[:1], minute=1)
    df = analysis.load_runs(tmp_path)
    assert (df["best_val_loss"][0], df["best_step"][0]) == (3.0, 4)
    assert math.isnan(df["best_val_loss"][1]) and math.isnan(df["val/loss"][0])


def test_a_run_without_a_heartbeat_is_silent(tmp_path: Path) -> None:
    make_run(tmp_path / "run", status="running", ended=None)
    df = analysis.load_runs(tmp_path)
    assert list(df["status"]) == ["running"] and list(df["seconds"]) == [50.0]
    assert list(analysis.table(df)["status"]) == ["silent"]


def test_integers_stay_integers_beside_a_gap(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", with_changes(model={"dim": 64, "attn": {"latent": 8}}), minute=1)
    df = analysis.load_runs(tmp_path)
    assert df["config.model.dim"].dtype == "int64"
    assert df["config.model.attn.n_heads"][0] == 4 and isinstance(df["config.model.attn.n_heads"][0], int)


def test_curves_are_long_and_know_their_tokens(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    frame = analysis.curves(run)
    assert list(frame.columns) == ["run", "step", "tokens", "flops", "seconds", "name", "value"]
    val = frame[frame["name"] == "val/loss"]
    assert val[["step", "tokens", "value"]].values.tolist() == [[3, 384, 4.5], [6, 768, 4.6]]
    assert set(analysis.curves(run, "val/*")["name"]) == {"val/loss", "val/full_loss"}
    with pytest.raises(Refusal, match="no run has the metric train/los; there are .*train/loss"):
        analysis.curves(run, "train/los")


def test_curves_of_a_run_that_only_began_are_empty(tmp_path: Path) -> None:
    frame = analysis.curves(make_run(tmp_path / "run", lines=[]))
    assert len(frame) == 0 and list(frame.columns) == ["run", "step", "tokens", "flops", "seconds", "name", "value"]


def test_gaps_in_tokens_flops_and_seconds_are_interpolated_by_steps(tmp_path: Path) -> None:
    lines = [
        {"step": 2, "val/loss": 6.0},  # before the first known: from 0 on
        {"step": 4, "tokens": 400, "flops": 4e6, "perf/seconds": 8.0, "val/loss": 5.0},
        {"step": 5, "val/loss": 4.0},
        {"step": 8, "tokens": 1200, "flops": 8e6, "perf/seconds": 10.0},
        {"step": 10, "val/loss": 3.0},  # after the last: at the last rate
    ]
    frame = analysis.curves(make_run(tmp_path / "a", lines=lines), "val/loss")
    assert frame["tokens"].tolist() == [200, 400, 600, 1600]
    assert frame["flops"].tolist() == [2e6, 4e6, 5e6, 10e6] and frame["seconds"].tolist() == [4, 8, 8.5, 11]
    frame = analysis.curves(make_run(tmp_path / "b", lines=[{"step": 3, "val/loss": 1.0, "tokens": 30}]), "val/loss")
    assert frame["tokens"].tolist() == [30] and frame[["flops", "seconds"]].isna().all(axis=None)
    with pytest.raises(Refusal, match="no line of these runs says it"):
        analysis.plot_curves(tmp_path / "b", "val/loss", x="flops")


def test_smoothing_is_what_its_formulas_say(tmp_path: Path) -> None:
    values = [4.0, 2.0, math.nan, 9.0, 3.0, math.inf, 1.0]
    for run in "ab":
        make_run(tmp_path / run, lines=[{"step": i, "train/loss": v} for i, v in enumerate(values, 1)])
    points = analysis.curves(tmp_path, "train/loss")
    b, s, expected = 0.8, 0.0, []
    for t, x in enumerate([4.0, 2.0, 9.0, 3.0, 1.0], 1):  # Kingma and Ba's form of it
        s = b * s + (1 - b) * x
        expected.append(s / (1 - b**t))
    found = analysis.smooth(points, ema=b)["value"].tolist()
    assert math.isnan(found[2]) and math.isnan(found[5])
    assert [v for v in found[:7] if not math.isnan(v)] == pytest.approx(expected)
    assert [v for v in found[7:] if not math.isnan(v)] == pytest.approx(expected), "each run begins anew"
    spiky = points.assign(value=[1, 1, 100, 1, 1, 1, 1] * 2)
    assert analysis.smooth(spiky, median=3)["value"].tolist() == [1] * 14
    assert analysis.smooth(points, ema=0.0)["value"].dropna().tolist() == [4, 2, 9, 3, 1] * 2
    with pytest.raises(Refusal, match=r"smooth=1 is not in \[0, 1\)"):
        analysis.smooth(points, ema=1)


def test_a_run_is_judged_by_its_own_goal(tmp_path: Path) -> None:
    lines = [{"step": i, "val/reward/mean": v, "val/loss": v} for i, v in enumerate([0.2, 0.9, 0.5], 1)]
    make_run(tmp_path / "grpo", lines=[*lines, {"step": 4, "val/full_reward/mean": 0.4}], goal={"metric": "val/reward/mean", "mode": "max"})  # fmt: skip
    make_run(tmp_path / "seq", lines=lines, minute=1)
    df = analysis.load_runs(tmp_path)
    assert df["goal"].tolist() == ["val/reward/mean", "val/loss"]
    assert df["best"].tolist() == [0.9, 0.2] and df["best_step"].tolist() == [2, 1]
    assert (df["min/val/reward/mean"] == 0.2).all() and (df["max/val/reward/mean"] == 0.9).all()
    table = analysis.table(df.head(1))
    assert table.loc[0, ["val reward/mean", "best val reward/mean"]].tolist() == [0.4, 0.9] and "val loss" not in table


def test_size_computing_and_time_of_a_run(tmp_path: Path) -> None:
    lines = [{"step": 1, "flops": 5e9, "tokens": 128, "perf/seconds": 2.0}]
    run = make_run(tmp_path / "run", lines=lines, seconds=7.5)
    (run / "meta/model.json").write_text(
        '{"params": 1000, "params_active": 600, "params_non_embedding": 500, "flops_per_token": 9}'
    )
    (row,) = analysis.load_runs(run).to_dict("records")
    assert (row["params"], row["params_active"], row["params_non_embedding"], row["flops_per_token"]) == (
        1000,
        600,
        500,
        9,
    )
    assert row["flops"] == 5e9 and row["seconds"] == 7.5, "spent training, not the time between start and end"


def test_a_smoothed_line_has_its_raw_values_behind_it_and_evaluations_are_left_alone(tmp_path: Path) -> None:
    lines = [{"step": i, "train/loss": float(v), "val/loss": float(v)} for i, v in enumerate([4, 2, 3], 1)]
    figure = analysis.plot_curves(make_run(tmp_path / "a", lines=lines), ema=0.5)
    shown = [[np.asarray(line.get_ydata()).tolist() for line in ax.lines] for ax in figure.axes]
    assert shown == [[[4, 2, 3], pytest.approx([4, 8 / 3, 20 / 7])], [[4, 2, 3]]]
    plt.close(figure)


# ---------------------------------------------------------------- the cache


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the runs that were read from their files, with a cache of the test's own."""
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "cache"))
    seen: list[str] = []
    row = load._row
    monkeypatch.setattr(load, "_row", lambda run: (seen.append(run.name), row(run))[1])
    return seen


def old(folder: Path, seconds: int = 60) -> Path:
    """As if nothing below had changed for a minute."""
    for path in folder.rglob("*"):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))
    return folder


def test_a_run_is_read_once_until_it_changes(tmp_path: Path, counted: list[str]) -> None:
    for i in range(3):
        make_run(tmp_path / f"runs/{i}", with_changes(seed=i, x=None, y=[1, {"a": 2.5}]), minute=i)
    old(tmp_path / "runs")
    first = analysis.load_runs(tmp_path / "runs")
    assert sorted(counted) == ["0", "1", "2"]
    pd.testing.assert_frame_equal(analysis.load_runs(tmp_path / "runs"), first)
    assert len(counted) == 3
    with (tmp_path / "runs/1/logs/metrics.jsonl").open("a") as out:
        out.write('{"step": 7, "val/loss": 1.25}\n')
    assert analysis.load_runs(tmp_path / "runs")["best_val_loss"].tolist() == [4.5, 1.25, 4.5]
    assert counted[3:] == ["1"]
    analysis.load_runs(tmp_path / "runs")
    assert counted[3:] == ["1", "1"], "written a moment ago: it may change again within the same tick of the clock"
    analysis.load_runs(tmp_path / "runs", cached=False)
    assert len(counted) == 8


@pytest.mark.parametrize("damage", [
    lambda f: f.write_bytes(f.read_bytes()[:-20]),
    lambda f: f.write_bytes(f.read_bytes().replace(b"4.5", b"0.5")),
    lambda f: f.write_bytes(b""),
    lambda f: f.write_bytes(b"\xff\x00\n{}"),
    lambda f: f.write_bytes(b"[" * 100_000),
    lambda f: (f.unlink(), f.mkdir()),
    lambda f: f.write_bytes(f.read_bytes().replace(b"runs of", b"runs or")),
], ids=["cut", "a digit changed", "empty", "not text", "nested", "a folder", "foreign"])  # fmt: skip
def test_a_damaged_cache_is_ignored(tmp_path: Path, counted: list[str], damage: Callable[[Path], Any]) -> None:
    make_run(tmp_path / "runs/a")
    old(tmp_path / "runs")
    analysis.load_runs(tmp_path / "runs")
    (file,) = (tmp_path / "cache/analysis").iterdir()
    damage(file)
    assert analysis.load_runs(tmp_path / "runs")["best_val_loss"].tolist() == [4.5]
    assert counted == ["a", "a"]


def test_a_cache_of_another_folder_or_of_other_code_is_ignored(
    tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        old(make_run(tmp_path / name / "run", with_changes(seed=name)).parent)
    analysis.load_runs(tmp_path / "a")
    (file,) = (tmp_path / "cache/analysis").iterdir()
    analysis.load_runs(tmp_path / "b")
    (other,) = (f for f in file.parent.iterdir() if f != file)
    other.write_bytes(file.read_bytes())
    assert analysis.load_runs(tmp_path / "b")["config.seed"].tolist() == ["b"] and len(counted) == 3
    monkeypatch.setattr(load, "_code", lambda: "other")
    analysis.load_runs(tmp_path / "a")
    assert len(counted) == 4


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, counted: list[str]) -> None:
    make_run(tmp_path / "runs/a")
    old(tmp_path / "runs")
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert len(analysis.load_runs(tmp_path / "runs")) == len(analysis.load_runs(tmp_path / "runs")) == 1
    assert counted == ["a", "a"]


def test_readers_at_the_same_time_all_see_everything(tmp_path: Path, counted: list[str]) -> None:
    for i in range(20):
        make_run(tmp_path / f"runs/{i:02}", with_changes(seed=i), minute=i)
    old(tmp_path / "runs")

    def read(_: int) -> list[int]:
        return analysis.load_runs(tmp_path / "runs")["config.seed"].tolist()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(seeds == list(range(20)) for seeds in pool.map(read, range(24)))
    (file,) = (tmp_path / "cache/analysis").iterdir()
    counted.clear()
    assert read(0) == list(range(20)) and not counted and file.name.endswith(".json"), "and left a whole cache behind"


# ---------------------------------------------------------------- differences


def test_config_diff_shows_only_what_differs(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", with_changes(max_epochs=2, prompts=["a"], model={"dim": 32, "attn": {"latent": None}}))
    (b / "meta/data.json").write_text(json.dumps({"sha256": "0ther", "tokenizer_sha256": "70c"}))
    found = analysis.config_diff(a, b)
    assert {k: (x, y) for k, x, y in found.values.tolist()} == {
        "max_epochs": (None, 2),
        "prompts": (["a", "b"], ["a"]),
        "model.dim": (64, 32),
        "model.attn.n_heads": (4, "absent"),
        "model.attn.latent": ("absent", None),
        "data/sha256": ("da7a", "0ther"),
    }
    assert len(analysis.config_diff(a, a)) == 0


def test_config_diff_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    with pytest.raises(Refusal, match="holds 2 runs; name one"):
        analysis.config_diff(tmp_path, a)
    (b / "meta/config.yaml").unlink()
    with pytest.raises(Refusal, match="b/meta/config.yaml cannot be read"):
        analysis.config_diff(a, b)


def test_varying_leaves_out_where_a_run_lies_and_how_it_is_called(tmp_path: Path) -> None:
    here = {"tag": "x", "runs_dir": "elsewhere", "resume": "runs/a", "progress": "bar", "cache_dir": "c"}
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", with_changes(**here, prompts=["c"], optimizer={"lr": 2e-3, "new": None}), minute=1)
    assert analysis.varying(analysis.load_runs(tmp_path)) == ["config.prompts", "config.optimizer.lr"]


def test_runs_that_differ_in_the_seed_are_one_row(tmp_path: Path) -> None:
    for i, (dim, seed, loss) in enumerate([(32, 0, 3.0), (32, 1, 3.2), (32, 2, 3.4), (64, 0, 2.0)]):
        make_run(tmp_path / str(i), with_changes(seed=seed, model={"dim": dim}), ended(loss), minute=i)
    make_run(tmp_path / "unfinished", with_changes(seed=3, model={"dim": 32}), METRICS[:2])
    found = analysis.over_seeds(analysis.load_runs(tmp_path))
    assert list(found.columns) == ["model.dim", "runs", "val/full_loss", "standard error"]
    assert found["model.dim"].tolist() == [64, 32] and found["runs"].tolist() == [1, 3]
    assert found["val/full_loss"].tolist() == pytest.approx([2.0, 3.2])
    assert math.isnan(found["standard error"][0])
    assert found["standard error"][1] == pytest.approx(0.2 / math.sqrt(3))


def test_runs_on_other_data_are_another_row(tmp_path: Path) -> None:
    a, b = (make_run(tmp_path / str(i), with_changes(seed=i), ended(3.0)) for i in (0, 1))
    assert analysis.over_seeds(analysis.load_runs([a, b]))["runs"].tolist() == [2]
    (b / "meta/data.json").write_text(json.dumps({"sha256": "0ther"}))
    assert analysis.over_seeds(analysis.load_runs([a, b]))["runs"].tolist() == [1, 1]


@pytest.mark.parametrize("x, label, points", [("step", "steps (updates)", [3, 6]), ("tokens", "training data (tokens)", [384, 768])])  # fmt: skip
def test_a_plot_has_a_panel_a_metric_and_a_line_a_run(tmp_path: Path, x: str, label: str, points: list) -> None:
    for i in (0, 1):
        make_run(tmp_path / f"r{i}", with_changes(seed=i), minute=i)
    figure = analysis.plot_curves(tmp_path, ["train/loss", "val/loss"], x=x)
    left, right = figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("train/loss (nats)", "val/loss (nats)")
    assert left.get_xlabel() == right.get_xlabel() == label
    assert [np.asarray(line.get_xdata()).tolist() for line in right.lines] == [points, points]
    assert np.asarray(right.lines[0].get_ydata()).tolist() == [4.5, 4.6]
    assert [t.get_text() for t in figure.legends[0].texts] == ["r0 seed=0", "r1 seed=1"]
    assert [line.get_color() for line in left.lines] == [line.get_color() for line in right.lines]
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    plt.close(figure)


def test_many_runs_all_look_different(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{i:02}") for i in range(16)]
    figure = analysis.plot_curves(runs, "train/loss")
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == 16
    plt.close(figure)


def test_plot_refuses_an_unknown_axis(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="x=hours"):
        analysis.plot_curves(make_run(tmp_path / "run"), x="hours")


def test_samples_are_in_the_order_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert len(analysis.samples(run)) == 0
    (run / "logs/samples.jsonl").write_text('{"step": 3, "name": "sample/0", "text": "é"}\n{"step": 6, "na')
    assert analysis.samples(run).values.tolist() == [[3, "sample/0", "é"]]


@pytest.mark.parametrize("missing", ["pandas", "matplotlib"])
def test_a_missing_package_is_named_with_its_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    run = make_run(tmp_path / "run")
    for name in [m for m in sys.modules if m.split(".")[0] == missing] + [missing]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refusal, match=rf'^{missing} is not installed: pip install "etude\[analysis\]"$'):
        analysis.load_runs(run) if missing == "pandas" else analysis.plot_curves(run)


# ---------------------------------------------------------------- the command line


def command(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "etude.analysis", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/first")
    make_run(tmp_path / "runs/second", with_changes(optimizer={"lr": 2e-3}), METRICS[:1], minute=1, status="failed")
    done = command(cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert [line.split() for line in done.stdout.splitlines()] == [
        "name status steps val loss best val loss tokens/s optimizer.lr".split(),
        "first completed 6 4.7 4.5 200 0.001".split(),
        "second failed 1 - - 10 0.002".split(),
    ]


def test_the_table_says_when_losses_cannot_be_compared_and_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", {f"key_{i}": 0 for i in range(30)})
    other = make_run(tmp_path / "b", {f"key_{i}": 1 for i in range(30)}, minute=1)
    (other / "meta/data.json").write_text(json.dumps({"sha256": "0ther"}))
    assert analysis.main([str(tmp_path)]) == 0
    *_, more, data = capsys.readouterr().out.splitlines()
    assert more.startswith("20 more settings vary: key_10 ") and more.endswith(" key_29")
    assert "cannot be compared" in data


def test_the_command_prints_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", with_changes(max_epochs=0.5))
    assert analysis.main(["diff", str(a), str(b)]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["key", "a", "b"], ["max_epochs", "null", "0.5"]]  # fmt: skip
    assert analysis.main(["diff", str(a), str(a)]) == 0
    assert capsys.readouterr().out == "no difference\n"


@pytest.mark.parametrize("arguments", [["nowhere"], ["diff"], ["diff", "a"], ["diff", "a", "b"], ["--colour"]], ids=" ".join)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert analysis.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """`... | head`: no traceback, and the exit code that a shell expects."""
    make_run(tmp_path / "a")
    command = f"{sys.executable} -m etude.analysis {tmp_path} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_importing_analysis_is_light() -> None:
    code = "import sys, etude.analysis; assert not {'torch', 'pandas', 'matplotlib', 'hydra'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, check=True)
