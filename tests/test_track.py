"""Trackers: each holds what metrics.jsonl holds, after kills and resumes and syncs too; none of them can reach the run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import ROOT, environment

from etude import config as conf
from etude import track
from etude.errors import Refusal
from etude.track import Jsonl, Trackers

SECRET = "hunter2hunter2hunter2hunter2hunter2hunter2"
CONFIG = {"seed": 1, "optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}, "none": None, "x": {"api_key": SECRET}}


def folder_of(base: Path, config: dict | None = None) -> Path:
    """A run's folder, as far as trackers look at it."""
    for sub in ("logs", "meta"):
        (base / sub).mkdir(parents=True)
    (base / "meta" / "full_config.json").write_text(json.dumps(config or {}))
    (base / "status.json").write_text('{"status": "running"}')
    return base


def log(run: Path, start: int, stop: int, names: list[str]) -> Trackers:
    """Steps `start` + 1 to `stop` of a run, of which a later start differs in what depends on the clock alone."""
    trackers = Trackers(Jsonl(), {n: track.nodes()[n] | {"timeout": 280.0} for n in names})
    trackers.open(run, start)
    for step in range(start + 1, stop + 1):
        third = step % 3 == 0
        if third:
            trackers.histograms(step, [("params/w", torch.arange(100.0) * step)])
        values = {"train/loss": 1 / 3 / step, "batch": 123456789012 + step, "perf/seconds": step + (start and 0.1)}
        trackers.scalars(step, values | ({"val/loss": 2 / 3 / step, "bad": float("nan")} if third else {}))
        if third:
            trackers.text(step, "sample/0", f"<b> {step}\n    # after")
    return trackers


def contents(run: Path, *names: str, syncs: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "tests/tracked.py", str(run), ",".join(names), str(syncs)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def lines(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / f"{name}.jsonl").read_text().splitlines()]


def logged(run: Path) -> dict[tuple[str, int], float]:
    return {(k, row["step"]): v for row in lines(run, "metrics") for k, v in row.items() if k != "step"}


def as_dict(points: list[list]) -> dict[tuple[str, int], Any]:
    """[name, step, value] without any step twice."""
    found = {(n, s): v for n, s, v in points}
    assert len(found) == len(points), "a step is there more than once"
    return found


def assert_all_there(run: Path, found: dict[str, Any]) -> None:
    wanted = logged(run)
    single = {k: float(np.float32(v)) for k, v in wanted.items()}  # what TensorBoard stores
    np.testing.assert_equal(as_dict(found["tensorboard"]["scalars"]), single)
    np.testing.assert_equal({k: float(v) for k, v in as_dict(found["wandb"]["scalars"]).items()}, wanted)
    np.testing.assert_equal(as_dict(found["aim"]["scalars"]), wanted)

    bins = [(n, row["step"], b) for row in lines(run, "histograms") for n, b in row["histograms"].items()]
    assert [s for _, s, _ in bins] == [3, 6, 9]
    whole = [[n, s, b["counts"], b["low"], b["high"]] for n, s, b in bins]
    assert found["aim"]["histograms"] == found["tensorboard"]["histograms"] == whole
    assert found["wandb"]["histograms"] == [w[:3] for w in whole]
    texts = [[row["name"], row["step"], row["text"]] for row in lines(run, "samples")]
    assert found["aim"]["texts"] == texts and len(texts) == 3
    assert found["wandb"]["html"] == [f"<pre>&lt;b&gt; {s}\n    # after</pre>" for s in (3, 6, 9)]
    indented = [[f"{n}/text_summary", s, f"    <b> {s}\n        # after\n"] for n, s, _ in texts]
    assert found["tensorboard"]["texts"] == indented

    tb, wb = found["tensorboard"], found["wandb"]
    assert tb["images"] == ["figures/loss"] and tb["hparams"]["optimizer.lr"] == 0.1 and tb["status"] == 1
    assert wb["config"]["optimizer"] == CONFIG["optimizer"] and wb["config"]["group"] == ""
    assert found["aim"]["config"]["optimizer"] == CONFIG["optimizer"] and found["aim"]["status"] == "completed"


def test_every_tracker_equals_the_jsonl_through_kill_resume_and_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The promise of trackers: killed with -9 after step 8, resumed from 4, synced twice, each holds metrics.jsonl and
    nothing else, under the id that it had; and no secret of the environment or the config is in any file of theirs."""
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    run, names = folder_of(tmp_path / "runs" / "20260101_000000_x", CONFIG), ["tensorboard", "wandb", "aim"]
    if (pid := os.fork()) == 0:
        try:
            log(run, 0, 8, names)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(lines(run, "metrics")) == 8
    trackers = log(run, 4, 9, names)
    (run / "status.json").write_text('{"status": "completed"}')
    trackers.close()
    assert capfd.readouterr().err == "" and not list(run.glob("logs/*.log"))
    ids = {n: (run / "meta" / f"{n}_id").read_text() for n in ("wandb", "aim")}
    found = contents(run, *names)
    assert_all_there(run, found)
    assert found["wandb"]["id"] == f"run-{ids['wandb'].strip()}"
    again = contents(run, *names, syncs=2)
    assert_all_there(run, again)
    assert again["wandb"]["id"] == found["wandb"]["id"]
    planted = run / "meta" / "full_config.json"
    files = [p for p in (tmp_path / "runs").rglob("*") if p.is_file() and p != planted]
    assert len(files) > 30 and not [p for p in files if SECRET.encode() in p.read_bytes()]


def test_mlflow_equals_the_jsonl(tmp_path: Path) -> None:
    """It cannot overwrite: synced three times, of values that have changed in between those alone are added, and count."""
    run = folder_of(tmp_path / "runs" / "20260101_000000_x", CONFIG)
    path = run / "logs" / "metrics.jsonl"
    log(run, 0, 9, []).close()
    before, text = logged(run), path.read_text()
    log(run, 4, 9, []).close()  # resumed: other seconds
    (run / "status.json").write_text('{"status": "completed"}')
    after = logged(run)
    path.rename(path.with_name("resumed.jsonl"))
    path.write_text(text)
    found = contents(run, "mlflow", syncs=3)["mlflow"]
    np.testing.assert_equal({(n, s): v for n, s, v in found["scalars"]}, after)
    points = [(n, s, repr(v)) for n, s, v in found["scalars"]]
    both = {(n, s, repr(float(v))) for values in (before, after) for (n, s), v in values.items()}
    assert sorted(points) == sorted(both) and len(both) == len(after) + 5
    assert found["params"]["optimizer.lr"] == "0.1" and found["status"] == "FINISHED"
    texts = {p.read_text() for p in run.parent.glob("mlartifacts/*/artifacts/sample/0/*.txt")}
    assert texts == {row["text"] for row in lines(run, "samples")}
    assert not [p for p in run.parent.rglob("ml*/**/*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert SECRET.encode() not in (run.parent / "mlflow.db").read_bytes()


# ------------------------------------------------------------ trackers that fail

BAD = """
import os, signal, time
from pathlib import Path

class Good:
    def open(self, folder, config, start_step):
        self.file = (folder / "good.txt").open("a")

    def scalars(self, step, values):
        print(step, values, file=self.file)

    def close(self):
        print("closed", file=self.file, flush=True)

class Bad(Good):
    def __init__(self, *, when: str, how: str, timeout: float):
        self.when, self.how = when, how
        self.act("init")

    def open(self, folder, config, start_step):
        self.act("open")

    def scalars(self, step, values):
        self.act("scalars")

    def close(self):
        self.act("close")

    def act(self, now):
        if now == self.when:
            {"raise": self.fail, "sleep": lambda: time.sleep(300), "exit": lambda: os._exit(7),
             "kill": lambda: os.kill(os.getpid(), signal.SIGKILL)}[self.how]()

    def fail(self):
        raise OSError("no route")
"""


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bad.py").write_text(BAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_tracker_that_fails_costs_one_warning_and_no_time(bad: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each way to fail, at each moment: a warning each, the others get everything, and the end is waited for once."""
    ways = [("init", "raise"), ("open", "sleep"), ("scalars", "raise"), ("scalars", "sleep"), ("scalars", "kill"),
            ("close", "raise"), ("close", "sleep"), ("close", "exit")]  # fmt: skip
    nodes = {f"{w}_{h}": {"_target_": "bad.Bad", "when": w, "how": h, "timeout": 20.0} for w, h in ways}
    for node in nodes.values():
        node["timeout"] = 3.0 if node["how"] == "sleep" else 60.0
    run = folder_of(bad / "run")
    trackers = Trackers(Jsonl(), nodes | {"good": {"_target_": "bad.Good"}})
    trackers.open(run, 0)
    took = []
    for step in range(1, 101):
        begun = time.monotonic()
        trackers.scalars(step, {"a": step / 3})
        took.append(time.monotonic() - begun)
    until = time.monotonic() + 120
    while len(trackers.others) > 5 and time.monotonic() < until:  # those that fail before the end are told of at once
        time.sleep(0.05)
        trackers.text(100, "n", "t")
    begun = time.monotonic()
    trackers.close()
    assert time.monotonic() - begun < 90
    assert sorted(took)[50] < 0.001, "of a step's time, with nine of them"
    err = capfd.readouterr().err
    for name, node in nodes.items():
        [line] = [x for x in err.splitlines() if f"tracker {name} failed" in x]
        why = {"raise": "no route", "kill": "SIGKILL", "exit": "code 7", "sleep": "seconds"}[str(node["how"])]
        assert why in line and "python -m etude.track sync" in line
    assert len(err.splitlines()) == len(nodes)
    good = (run / "good.txt").read_text().splitlines()
    assert good == [*(f"{s} {{'a': {s / 3}}}" for s in range(1, 101)), "closed"]
    assert "Timeout" in (run / "logs" / "scalars_sleep.log").read_text()


def test_a_signal_to_the_terminal_does_not_reach_trackers(bad: Path) -> None:
    """Ctrl-C goes to a whole process group: the trackers have one of their own, and finish what they have."""
    trackers = Trackers(Jsonl(), {"good": {"_target_": "bad.Good"}})
    trackers.open(folder_of(bad / "run"), 0)
    assert os.getpgid(trackers.others[0].process.pid) != os.getpgid(0)
    trackers.close()


def test_a_line_of_a_later_file_waits_for_its_step(tmp_path: Path) -> None:
    """Some trackers drop a step that is smaller than the one before: files read at different moments must not mix."""
    from etude.trackers.follow import follow

    jsonl, run, steps = Jsonl(), folder_of(tmp_path / "run"), []
    jsonl.open(run, 0)

    class Recorder:
        def scalars(self, step: int, values: dict) -> None:
            steps.append((step, "scalars"))

        def histograms(self, step: int, bins: dict) -> None:
            steps.append((step, "histograms"))
            assert bins["w"]["counts"] and sum(bins["w"]["counts"]) == 4

    def over() -> bool:
        looks.append(1)
        if len(looks) == 1:  # step 2's scalars are not there yet
            jsonl.scalars(1, {"a": 1.0})
            jsonl.histograms(2, [("w", torch.ones(4))])
        elif len(looks) == 2:
            assert steps == [(1, "scalars")]
            with jsonl.path.open("a") as half:
                half.write('{"step": 2, "a"')
        elif len(looks) == 3:
            assert steps == [(1, "scalars")]
            jsonl.path.write_text(jsonl.path.read_text() + ": 1.0}\n")
        return len(looks) == 4

    looks: list[int] = []
    assert follow(Recorder(), run, 0, over, contextlib.nullcontext) == 3
    jsonl.close()
    assert steps == [(1, "scalars"), (2, "histograms"), (2, "scalars")]


# ------------------------------------------------------------ config and command line


@pytest.mark.parametrize(
    "package, choice", [("wandb", "wandb"), ("aim", "aim"), ("mlflow", "mlflow"), ("tensorboard", "default")]
)
def test_a_tracker_that_is_not_installed_is_refused_before_the_run(
    package: str, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typo-like error: one line with the install command, not a warning after a night."""
    node = next(iter(composed(f"tracker={choice}")["tracker"].values()))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Refusal, match=f"{package} is not installed: pip install {package}"):
        conf.check_relations({"tracker": {choice: node}})


def composed(*overrides: str) -> dict:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        return conf.check(compose("train", overrides=list(overrides)), "train")


def test_several_trackers_at_once() -> None:
    assert list(composed("tracker=[default,wandb]")["tracker"]) == ["tensorboard", "wandb"]
    assert (
        sorted(composed("tracker=all")["tracker"]) == sorted(track.nodes()) == ["aim", "mlflow", "tensorboard", "wandb"]
    )
    with pytest.raises(Refusal, match="init_timeout=90 should be above 0 and below tracker.wandb.timeout=60"):
        composed("tracker=wandb", "tracker.wandb.init_timeout=90")
    with pytest.raises(Refusal, match="mode=on should be one of offline, online"):
        composed("tracker=wandb", "tracker.wandb.mode=on")


def test_where_a_run_lies_says_its_group(tmp_path: Path) -> None:
    """A sweep's jobs share a group, and one Aim repository with all other runs."""
    from etude.trackers import group_of, runs_dir_of

    job, run = tmp_path / "runs/sweeps/20260101_000000_lr/0_abcd", tmp_path / "runs/20260101_000000_x"
    assert group_of(job) == "20260101_000000_lr" and group_of(run) is None
    assert runs_dir_of(job) == runs_dir_of(run) == tmp_path / "runs"


@pytest.mark.parametrize(
    "arguments, line",
    {
        "sync": "say what and where: python -m etude.track sync runs/<run> to=<tracker>",
        "sink RUN": "there is no sink; there is: sync",
        "sync RUN": "say what and where",
        "sync RUN to=wanbd": "to=wanbd is no tracker; did you mean wandb?; there are aim, mlflow, tensorboard, wandb",
        "sync nowhere* to=aim": "nowhere* is not there: name a folder like runs/<run>",
        "sync EMPTY to=aim": "holds no run",
        "sync RUN to=wandb mod=online": "unknown key wandb.mod; did you mean wandb.mode?",
        "sync RUN to=wandb mode=onlin": "wandb.mode=onlin should be one of offline, online",
        "sync RUN to=tensorboard": "metrics.jsonl:2 is not a line that a run writes: b'{\"a\": 1}'",
    }.items(),
)
def test_sync_refuses_in_one_line(
    arguments: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder_of(tmp_path / "runs" / "r")
    (tmp_path / "empty").mkdir()
    (run / "logs" / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"a": 1}\n')
    words = [{"RUN": str(run), "EMPTY": str(tmp_path / "empty")}.get(w, w) for w in arguments.split()]
    assert track.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and line in err


def test_sync_calls_nothing_that_a_run_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings come from the run, which may be anyone's; the class does not."""
    node = {"_target_": "pathlib.Path.touch", "figures": False}
    run = folder_of(tmp_path / "runs" / "r", {"tracker": {"tensorboard": node}})
    (run / "logs" / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n')
    assert track.main(["sync", str(run), "to=tensorboard"]) == 0 and list(run.rglob("events.out.*"))
    (run / "meta" / "full_config.json").write_text(json.dumps({"tracker": {"tensorboard": node | {"hook": 1}}}))
    assert track.main(["sync", str(run), "to=tensorboard"]) == 2
    assert "unknown key tensorboard.hook" in capsys.readouterr().err


def test_lines_that_no_run_wrote_are_dropped_at_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n{"a": 1}\n\xff\n{"step": 2}\n{"step": 3}\n{"st')
    track._cut(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_sync_takes_globs_and_folders_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "sweeps/s/0_x"):
        run = folder_of(tmp_path / "runs" / name)
        (run / "logs" / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n')
    runs = tmp_path / "runs"
    assert track.find([str(runs / "[ab]")]) == [runs / "a", runs / "b"]
    assert track.find([str(runs), str(runs / "a")]) == [runs / "a", runs / "b", runs / "sweeps/s/0_x"]
    assert track.main(["sync", str(runs / "*"), "to=tensorboard", "figures=false"]) == 0
    assert capsys.readouterr().out.count("1 lines to tensorboard") == 3
    assert len(list(runs.rglob("events.out.*"))) == 3


def test_figures_show_what_was_logged(tmp_path: Path) -> None:
    from etude.trackers.figures import draw

    run = folder_of(tmp_path / "run")
    rows = [{"step": s, "train/loss": 2.0 / s, "lr": 0.1, **({"val/loss": 1.0} if s == 4 else {})} for s in range(1, 5)]
    (run / "logs" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    figures = draw(run)
    step, figure = figures["figures/loss"]
    [ax] = figure.axes
    assert step == 4 and [line.get_label() for line in ax.lines] == ["train/loss", "val/loss"]
    assert ax.lines[0].get_ydata().tolist() == [2.0 / s for s in range(1, 5)]
    assert [a.get_ylabel() for a in figures["figures/optimizer"][1].axes] == ["lr"]
