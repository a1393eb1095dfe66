"""Sweeps whose jobs are processes of their own: what one job costs, and what the same command does again.

Most jobs here are a script that keeps a run's folder as train.py does, without torch: what is tested is the sweep."""

import contextlib
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from forked import Forked, run
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext, RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, flag_override
from optuna.distributions import CategoricalDistribution
from rich.table import Table as Grid
from running import ROOT, environment, identity, run_in, tiny, train

from etude import cli
from etude.config import CONF, check
from etude.errors import JobFailed, Refusal, StorageFault
from etude.run import Status, locked, recorded
from etude.run import claim as claim_run
from etude.sweep import job as jobs
from etude.sweep.job import Job
from etude.sweep.place import RECORD, Place, choice_files, overrides_hash
from etude.sweep.place import identity as identity_of
from etude.sweep.pool import Pool, Resources, Stop, share, visible_gpus
from etude.sweep.table import Table
from hydra_plugins.etude_optuna.sweeper import OptunaSweeper

SCRIPT = """
from etude.cli import main

@main("train")
def work(cfg):
    from light_run import run
    return run(cfg)

if __name__ == "__main__":
    work()
"""

RUN = """
import json, os, signal, sys, time
from pathlib import Path
from etude.errors import Interrupted, NonFinite
from etude.run import Status, claim_job, locked, take
from etude.training import sweep_job

def run(cfg):
    folder, new = sweep_job()
    folder = claim_job(folder) if new else take(folder)
    fate = json.loads(os.environ.get("FATES", "{}")).get(str(cfg["seed"]), "")
    with locked(folder):
        status = Status(folder)
        status.write()
        names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
        (folder / "env.json").write_text(json.dumps({n: os.environ.get(n) for n in names} | {"threads": cfg["threads"]}))
        def stop(*_):
            status.end("interrupted", 1, "SIGTERM after step 1", 3)
            raise SystemExit(3)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if fate == "deaf" else stop)
        print("seed", cfg["seed"], "begins", flush=True)
        if fate in ("sleep", "deaf"):
            Path(folder, "asleep").touch()
            time.sleep(120)
        if fate == "nan":
            status.end("failed", 1, "the gradient of step 1 is nan", 5)
            raise NonFinite("the gradient of step 1 is nan")
        if fate == "silent":
            os._exit(0)
        if fate == "secret":
            print("my key is", cfg["data"]["seq_len"], os.environ["SOME_TOKEN"])
        status.beat(1, 0.5, {"val/full_loss": 1.0 + cfg["seed"]})
        status.end("completed", 1)
    return 0
"""


@pytest.fixture
def light(tmp_path: Path) -> Callable[..., CompletedProcess]:
    """`light(*overrides, **environment)`: the script above as a sweep, in the test's own folder. `forked=False` starts a Python of
    its own: Hydra looks for plugins once a process, and the forked ones have looked before there was one of the test's."""
    (tmp_path / "light.py").write_text(SCRIPT)
    (tmp_path / "light_run.py").write_text(RUN)

    def sweep(
        *overrides: str, wait: bool = True, multirun: bool = True, forked: bool = True, **env: str
    ) -> CompletedProcess:
        path = os.pathsep.join([str(ROOT / "src"), str(tmp_path)])
        other = any(o.startswith(("hydra/launcher=", "hydra.launcher.at_once=")) for o in overrides)
        argv = ["light.py", *(["-m"] if multirun else []), *([] if other else ["hydra.launcher.at_once=2"]), *overrides]
        env = environment(PYTHONPATH=path, **env)
        if not forked:
            return subprocess.run([sys.executable, *argv], cwd=tmp_path, env=env, capture_output=True, text=True)
        return run(argv, tmp_path, env) if wait else Forked(argv, tmp_path, env)  # type: ignore[return-value]

    return sweep


def sweeps(folder: Path) -> list[Path]:
    return sorted((folder / "runs" / "sweeps").iterdir())


def status(sweep: Path, number: int) -> dict:
    (folder,) = sweep.glob(f"{number}_*")
    return json.loads((folder / "status.json").read_text())


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def row(done: CompletedProcess, number: int) -> str:
    """A job's line of the last table."""
    table = done.stdout[done.stdout.rindex("job  ") :]
    return next(line for line in table.splitlines() if re.match(rf" *{number} ", line))


ROGUE = """
import json, os, signal
from etude.strategy.seq import Seq

class Rogue(Seq):
    def __init__(self, *, seed: int):
        super().__init__(label_smoothing=0.0, z_loss=0.0)
        self.calls, self.fate = 0, json.loads(os.environ.get("FATES", "{}")).get(str(seed), "")

    def loss(self, model, ref, batch):
        self.calls += model.training
        if self.fate == "raise" and self.calls == 4:
            raise ValueError("the fourth batch is bad")
        if self.fate == "kill" and self.calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fate == "exit":
            os._exit(7)
        return super().loss(model, ref, batch)
"""


@pytest.mark.timeout(900)  # eleven starts of train.py
def test_three_of_eight_jobs_die_and_the_same_command_finishes_them(tmp_path: Path) -> None:
    """One raises, one is killed, one calls os._exit: five finish equal to solo runs, the table names the three, the second
    start runs only those, and then they equal solo runs too, two of them resumed."""
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "rogue.py").write_text(ROGUE)
    (tmp_path / "conf" / "strategy" / "rogue.yaml").write_text("_target_: rogue.Rogue\nseed: ${seed}\n")
    path = os.pathsep.join([str(ROOT / "src"), str(tmp_path)])
    flag = f"--config-dir={tmp_path / 'conf'}"
    given = [
        *tiny(tmp_path, max_steps=5, save_every=2, eval_every="null", sample_prompts="[]", tracker="default"),
        "~tracker.tensorboard",  # which a job that goes on must not delete again
        "strategy=rogue",
        "trusted=[etude,rogue]",
    ]
    sweep = [flag, "-m", *given, "seed=range(0,8)", "tag=rogues", "hydra.launcher.at_once=2"]
    fates = json.dumps({"1": "raise", "4": "kill", "6": "exit"})
    done = train(*sweep, check=False, PYTHONPATH=path, FATES=fates)
    (folder,) = sweeps(tmp_path)
    assert done.returncode == 1 and folder.name.endswith("_rogues"), done.stdout + done.stderr
    assert "job 1 failed: ValueError: the fourth batch is bad" in done.stderr
    assert re.search(r"failed +1 .* ValueError: the fourth batch is bad", row(done, 1))
    assert re.search(r"failed +137 .* killed by SIGKILL \(out of memory\?\)", row(done, 4))
    assert re.search(r"failed +7 .* exited with code 7", row(done, 6))
    assert [status(folder, n)["status"] for n in range(8)].count("completed") == 5
    assert "ValueError" in status(folder, 1)["error"] and status(folder, 4)["exit_code"] == 137
    written = {p: p.stat().st_mtime_ns for p in folder.glob("[02357]_*/status.json")}
    assert len(written) == 5

    done = train(*sweep, PYTHONPATH=path)
    assert sweeps(tmp_path) == [folder]
    assert {p: p.stat().st_mtime_ns for p in written} == written
    assert all("completed before" in row(done, n) for n in (0, 2, 3, 5, 7))
    assert [(folder / next(folder.glob(f"{n}_*")).name / "meta" / "resumes").exists() for n in (1, 4, 6)] == [
        True,
        True,
        False,
    ]
    train(flag, *given, "seed=2", f"runs_dir={tmp_path}/solo", PYTHONPATH=path)
    alone = [
        "hydra/launcher=basic",
        "seed=range(0,8)",
        f"runs_dir={tmp_path}/basic",
    ]  # one after the other in a process
    train(flag, "-m", *given, *alone, PYTHONPATH=path)
    for n in range(8):
        (job,), (same,) = folder.glob(f"{n}_*"), (tmp_path / "basic").glob(f"sweeps/*/{n}_*")
        assert identity(job) == identity(same)
        assert (job / "stdout.log").read_text().count("$ python") == (2 if n in (1, 4, 6) else 1)
        if n == 2:
            assert identity(job) == identity(run_in(tmp_path / "solo"))


def test_all_completed_and_a_fresh_sweep(tmp_path: Path, light: Callable) -> None:
    """The third start runs nothing and says what to type; progress and the order of overrides make no other sweep."""
    first = light("seed=0,1", "max_steps=5", FATES='{"1": "nan"}')
    assert first.returncode == 5 and "the gradient of step 1 is nan" in row(first, 1)
    assert light("seed=0,1", "max_steps=5").returncode == 0
    again = light("max_steps=5", "progress=none", "seed=0,1")
    assert again.returncode == 0 and "2 jobs of this sweep are completed" in again.stdout, again.stdout + again.stderr
    assert "hydra.launcher.fresh=true" in again.stdout and "job 0:" not in again.stdout
    (only,) = sweeps(tmp_path)
    assert len(list(only.glob("*_*/"))) == 2
    assert (only / next(only.glob("1_*")).name / "stdout.log").read_text().count("seed 1 begins") == 2
    assert light("seed=0,1", "max_steps=5", "hydra.launcher.fresh=true", FATES='{"0": "nan"}').returncode == 5
    assert len(sweeps(tmp_path)) == 2


def test_two_sweeps_in_the_same_second_do_not_mix(tmp_path: Path, light: Callable) -> None:
    both = [light("seed=0", wait=False) for _ in range(2)]
    assert [b.wait(120) for b in both] == [0, 0]
    assert len(sweeps(tmp_path)) == 2
    for sweep in sweeps(tmp_path):
        assert [p.name.split("_")[0] for p in sweep.glob("*/")] == ["0"] and status(sweep, 0)["status"] == "completed"
        assert len(recorded(sweep / RECORD)["jobs"]) == 1


def test_ctrl_c_stops_the_jobs_and_the_same_command_goes_on(tmp_path: Path, light: Callable) -> None:
    going = light("seed=0,1", "hydra.launcher.at_once=1", wait=False, FATES='{"0": "sleep"}')
    wait_for(lambda: list(tmp_path.glob("runs/sweeps/*/*/asleep")))
    going.send_signal(signal.SIGINT)
    assert going.wait(60) == 3
    out, error = going.communicate()
    assert "type the same command again" in error, error
    (sweep,) = sweeps(tmp_path)
    assert status(sweep, 0)["status"] == "interrupted" and not list(sweep.glob("1_*"))
    assert re.search("interrupted +3 .* the sweep was stopped", out) and re.search("1 +seed=1 +waiting", out)
    assert light("seed=0,1").returncode == 0
    assert sweeps(tmp_path) == [sweep] and [status(sweep, n)["status"] for n in (0, 1)] == ["completed"] * 2


BARE = """
import json, os, shutil, signal, sys, time
from pathlib import Path

folder, fate = Path(sys.argv[1]), sys.argv[2]

def end(status, code):
    (folder / "status.json").write_text(json.dumps({"status": status, "step": 1, "metrics": {"val/full_loss": 2.5}}))
    os._exit(code)

(folder / "env.json").write_text(json.dumps({"pid": os.getpid(), "argv": sys.argv[3:], **os.environ}))
signal.signal(signal.SIGTERM, signal.SIG_IGN if fate == "deaf" else lambda *_: end("interrupted", 3))
if fate == "child":
    (folder / "child").write_text(str(os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "300")))
if fate in ("deaf", "sleep"):
    (folder / "asleep").touch()
    time.sleep(100)
if fate == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if fate == "silent":
    os._exit(0)
if fate == "gone":
    shutil.rmtree(folder)
    os._exit(9)
if fate == "late":
    (folder / "status.json").write_text('{"status": "completed"}')
    os.abort()
time.sleep(0.2)
end("completed", 0)
"""


def pool(folder: Path, fates: list[str], own: Callable = lambda job: (None, 1), **settings: object) -> list[Job]:
    """Run jobs of the script above, whose configs say own(job) = (threads, processes)."""
    (folder / "bare.py").write_text(BARE)
    given = {
        "at_once": 2,
        "threads": 1,
        "gpus": None,
        "cores": 2,
        "timeout": None,
        "grace": 0.5,
    }
    found = [Job(n, [fate], folder / str(n)) for n, fate in enumerate(fates)]
    ends: list[Job] = []
    runner = Pool(Resources(**given | settings), lambda j, o: [str(folder / "bare.py"), str(j.folder), *o], own, False)  # type: ignore[arg-type]
    runner.run(iter(found), Table("lines", found, len(found), [], None), None, ends.append)
    assert {j.number for j in ends} == set(range(len(fates)))
    return found


def told(job: Job) -> dict:
    return json.loads((job.folder / "env.json").read_text())


def test_each_end_is_told(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """What became of a job is in its status.json and in its line, however it ended; os._exit(0) is no success. One that
    removes its folder, or whose folder cannot be made, costs only itself."""
    (tmp_path / "6").touch()
    found = pool(tmp_path, ["good", "killed", "silent", "late", "child", "gone", "nowhere"], at_once=7)
    assert [j.status for j in found] == ["completed", "failed", "failed", "completed", "completed", "failed", "failed"]
    assert [j.code for j in found] == [0, 137, 1, 0, 0, 9, 4]
    why = [j.why for j in found]
    assert why == [
        "",
        "killed by SIGKILL (out of memory?)",
        "exited with code 0 before its end",
        "SIGABRT after its end",
        "",
        "exited with code 9 and no message",
        f"{tmp_path}/6/.lock: Not a directory",
    ]
    assert [j.record["status"] for j in found[:6]] == [j.status for j in found[:6]]
    assert found[1].record["exit_code"] == 137 and found[1].record["error"] == why[1]
    said = capfd.readouterr().out
    assert "job 0 completed in 0:0" in said and "val/full_loss 2.5" in said and "(7 of 7 have ended)" in said
    left = int((found[4].folder / "child").read_text())
    wait_for(lambda: not alive(left))  # what a job leaves behind goes with it


def test_time_out(tmp_path: Path) -> None:
    """A job over its time is told to save; one that does not listen is killed. The others are done meanwhile."""
    found = pool(tmp_path, ["sleep", "deaf", "good"], timeout=3.0)
    assert [(j.status, j.code) for j in found] == [("interrupted", 3), ("failed", 137), ("completed", 0)]
    assert found[0].why == "timed out after 0.05 minutes"
    assert found[1].why == "timed out after 0.05 minutes, did not save in time and was killed"
    assert found[0].record["error"] == found[0].why


def test_gpus_and_threads_are_handed_out(tmp_path: Path) -> None:
    """Two jobs at once on two GPUs never share one, and what a job's own config says goes before the sweep's."""
    found = pool(tmp_path, ["good"] * 4, gpus=["3", "5"], threads=2)
    assert sorted(j.gpus[0] for j in found[:2]) == ["3", "5"] and {j.gpus[0] for j in found} == {"3", "5"}
    assert [told(j)["CUDA_VISIBLE_DEVICES"] for j in found] == [j.gpus[0] for j in found]
    assert all(told(j)["OMP_NUM_THREADS"] == "2" and told(j)["argv"] == ["threads=2"] for j in found)
    none = tmp_path / "none"
    none.mkdir()
    (job,) = pool(none, ["good"], lambda job: (3, 1), gpus=[])
    assert told(job)["CUDA_VISIBLE_DEVICES"] == "" and told(job)["OMP_NUM_THREADS"] == "3" and not told(job)["argv"]
    both = tmp_path / "both"
    both.mkdir()
    found = pool(both, ["good", "good"], lambda job: (None, 2), gpus=["0", "1", "2"])
    assert [j.gpus for j in found] == [["0", "1"], ["2", "0"]]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    found = pool(mixed, ["good"] * 3, lambda job: (None, [1, 2, 1][job.number]), at_once=None, gpus=["0", "1"])
    assert [len(j.gpus) for j in found] == [1, 2, 1]
    ends = [j.begun + j.seconds for j in found]
    assert found[1].begun >= ends[0] and found[2].begun >= ends[1], "two ranks wait until both GPUs are free"


ARGUMENTS = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[-1].partition("=")[2])
(folder / "argv.json").write_text(json.dumps(sys.argv))
(folder / "status.json").write_text('{"status": "completed", "metrics": {"val/full_loss": 2.5}}')
"""


def test_each_job_is_asked_for_its_threads_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """They may come from a swept choice. A config that there is not costs only its job; a metric that no run has is told."""
    (tmp_path / "script.py").write_text(ARGUMENTS)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    given = ("at_once=2", "gpus=[0,1,2,3]", "metric=val/ful_loss")
    with hydra_of(CONF) as hydra:
        settings = [f"hydra.sweep.dir={tmp_path / 'sweep'}", *(f"hydra.launcher.{s}" for s in given)]
        config = hydra.compose_config("train", settings, RunMode.MULTIRUN)
        launcher = instantiate(config.hydra.launcher)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
        launcher.setup(hydra_context=context, task_function=None, config=config)
        (tmp_path / "sweep").mkdir()
        launcher.launch([["experiment=schedule/cosine"], ["parallel=ddp", "parallel.nproc=3"], ["no.such=1"]], 0)
        folders = [next(p.parent for p in (tmp_path / "sweep").glob(f"{n}_*/argv.json")) for n in range(3)]
        typed = [[a for a in json.loads((f / "argv.json").read_text()) if "threads=" in a] for f in folders]
        assert [len(t) for t in typed] == [0, 1, 1], "experiment/study.yaml has threads: 1"
        told = capsys.readouterr()
        assert re.search("job 1: .* on GPU 1,2,3\n", told.out) and re.search("job 2: .* on GPU .\n", told.out), told.out
        assert told.err.count("did you mean val/full_loss") == 1, told.err

        launcher.threads = 2
        (result,) = launcher.launch([["experiment=schedule/wsd"]], 0)
        with pytest.raises(JobFailed, match="threads=1 and hydra.launcher.threads=2 disagree"):
            assert result.return_value


def test_a_second_signal_is_told(tmp_path: Path) -> None:
    """A job that it leaves no time was neither deaf nor out of memory."""
    deaf = ["sh", "-c", "trap '' TERM; echo; exec sleep 100"]
    process = subprocess.Popen(deaf, start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    process.stdout.close()
    job = Job(0, [], tmp_path, status="running", process=process)
    runner = Pool(Resources(1, 1, None, 1, None, 9.0), lambda j, o: [], lambda j: (None, 1), False)
    runner.running = [job]
    stop, table = Stop(), Table("none", [job], 1, [], None)
    stop.count = 2
    runner._look(stop, table, lambda job: None)
    assert cells(table.now(), "status") == ["stopping"]
    process.wait()
    runner._look(stop, table, lambda job: None)
    assert (job.status, job.code) == ("interrupted", 137)
    assert job.why == job.record["error"] == "the sweep was stopped and killed at the second Ctrl-C"


def cells(grid: Grid, name: str) -> list[str]:
    return [str(cell) for c in grid.columns if c.header == name for cell in c.cells]


def test_tables_on_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Overrides are broken between one and the next, drawn numbers have few digits, reasons have lines of their own."""
    drawn = ["optimizer.lr=0.0011288378916846883", "optimizer.eps=1.1288378916846883e-08", "optimizer.eps=1.23e-08"]
    found = [Job(n, [lr, "scheduler.warmup=120"[: 20 - n]], tmp_path, status="failed") for n, lr in enumerate(drawn)]
    found[1].why = "a long reason " * 9
    table = Table("none", found, None, [], None, wanted=7)
    assert table.counts() == "0 of 7 finished"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    table.print_last()
    said = capsys.readouterr().out
    pieces = ("optimizer.lr=0.001129 ", "scheduler.warmup=120 ", "optimizer.eps=1.129e-08 ", "optimizer.eps=1.23e-08 ")
    assert all(piece in said for piece in pieces) and f"job 1: {found[1].why}" in said, said
    assert max(map(len, re.sub(r"\x1b\[\w+", "", said.split("job 1: ")[0]).splitlines())) <= 70


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Files can be made, and nothing written to them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The error names what could not be written, and no empty folder stays behind."""
    config = composed(f"runs_dir={tmp_path}", "tag=none")
    run = claim_run(str(tmp_path), "full")
    for write in (lambda: Place()._folder(config), lambda: contextlib.ExitStack().enter_context(locked(run))):
        with full_disk(), pytest.raises(StorageFault, match=rf"could not write {tmp_path}/.*/\.lock: File too large"):
            write()
    assert [p.name for p in tmp_path.rglob("*")] == ["sweeps"]
    assert cli._disk(OSError(errno.ENOSPC, "No space left on device"), "the disk under runs") == 4
    assert capsys.readouterr().err == "error: the disk under runs: No space left on device\n"


def test_a_run_is_no_sweeps_folder(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(Refusal, match="is a run; give a sweep's folder"):
        Place()._folder(composed(f"hydra.sweep.dir={tmp_path}"))
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]


def test_a_job_that_goes_on_knows_its_steps(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"step": 12, "steps": 80, "status": "interrupted", "exit_code": 3}')
    jobs.note(Job(0, [], tmp_path), status="running")
    Status(tmp_path).write()
    record = Job(0, [], tmp_path).record
    assert (record["step"], record["steps"], record["status"]) == (12, 80, "running") and "exit_code" not in record


def test_paths_are_swept_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free text is one value whatever it holds, but for a list of quoted ones; paths that look like several are refused."""
    for name in ("a", "b", "c,d"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for value in ("'a','b'", '"a", "b"', "choice(a,b)"):
        assert cli.lists(f"init_from={value}")
        (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides([f"init_from={value}"]), None)
        parsed = OverridesParser.create().parse_overrides([cli.quote(job) for (job,) in batch])
        assert [str(getattr(v := o.value(), "text", v)) for o in parsed] == ["a", "b"]
    for one in (
        "init_from='a,b'",
        "init_from=c,d",
        "data.separator=, ",
        "prompt=a, b",
        f"prompt={'x,' * 999}x",
        "seed=1,2",
        "-m",
    ):
        assert not cli.lists(one)
    with pytest.raises(Refusal, match="init_from=a,e does not exist; .* type init_from=\"'a','e'\"$"):
        cli.lists("init_from=a,e")


def test_an_error_in_the_sweep_stops_its_jobs(tmp_path: Path) -> None:
    """What is wrong in a sweeper must not leave jobs behind."""
    (tmp_path / "bare.py").write_text(BARE)
    job = Job(0, ["sleep"], tmp_path / "0")

    def watch(number: int, folder: Path) -> bool:
        if (folder / "asleep").exists():
            raise ValueError("a sweeper's mistake")
        return False

    runner = Pool(
        Resources(2, 1, None, 2, None, 5.0),
        lambda j, o: [str(tmp_path / "bare.py"), str(j.folder), *o],
        lambda j: (None, 1),
        False,
    )
    with pytest.raises(ValueError, match="mistake"):
        runner.run(iter([job]), Table("none", [job], None, [], None), watch, lambda j: None)
    assert job.status == "interrupted" and job.code == 3


def test_jobs_do_not_outlive_a_killed_sweep(tmp_path: Path) -> None:
    """Killed with -9, a sweep can tell its jobs nothing: they notice, save, and are killed if they do not end."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom test_sweep import pool\nfrom pathlib import Path\npool(Path({str(tmp_path)!r}), ['sleep', 'deaf'], grace=1.0)\n"
    sweep = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.DEVNULL)
    wait_for(lambda: all((tmp_path / n / "asleep").exists() for n in "01"))
    pids = [json.loads((tmp_path / n / "env.json").read_text())["pid"] for n in "01"]
    sweep.kill()
    sweep.wait()
    wait_for(lambda: not any(map(alive, pids)))
    assert json.loads((tmp_path / "0" / "status.json").read_text())["status"] == "interrupted"


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_job_waits_for_its_folder(tmp_path: Path) -> None:
    """One that a killed sweep left may still be saving: it is not run twice at the same time."""
    folder = tmp_path / "0"
    folder.mkdir()
    code = f"import time\nfrom pathlib import Path\nfrom etude.run import locked\nwith locked(Path({str(folder)!r})):\n  print('held', flush=True)\n  time.sleep(1)\n  Path({str(folder / 'free')!r}).touch()\n"
    holder = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert jobs.locked_by_another(folder)
    (job,) = pool(tmp_path, ["good"])
    assert job.status == "completed" and (folder / "free").stat().st_mtime <= (folder / "env.json").stat().st_mtime
    holder.wait()
    holder.stdout.close()


def test_at_once_and_threads_fit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    # (at_once, threads, gpus, processes of a job, cores)
    assert share(None, None, [], 1, 16) == (16, 1)
    assert share(None, 4, [], 1, 16) == (4, 4)
    assert share(None, 4, [], 2, 16) == (2, 4)
    assert share(3, None, [], 1, 16) == (3, 5)
    assert share(None, None, ["0", "1"], 1, 16) == (2, 8)
    assert share(None, None, ["0", "1"], 2, 16) == (1, 8)
    assert share(8, None, ["0"], 1, 4) == (8, 1)
    assert share(None, 8, [], 1, 4) == (1, 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert visible_gpus() == ["2", "GPU-5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_no_secret_is_left_in_a_sweep(tmp_path: Path, light: Callable) -> None:
    done = light(
        "seed=0", "+data.api_key=hunter2-override", "+data.url=https://me:hunter2-url@host/x",
        FATES='{"0": "secret"}', SOME_TOKEN="hunter2-token",
    )  # fmt: skip
    assert "data.api_key" in done.stderr and done.returncode == 2  # no such key: the jobs say so, with what was typed
    preset = ("sweep=seeds", "seed=0")  # which is a multirun without -m
    assert light(*preset, multirun=False, FATES='{"0": "secret"}', SOME_TOKEN="hunter2-token").returncode == 0
    assert len(sweeps(tmp_path)) == 2
    for path in (tmp_path / "runs").rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path


@pytest.mark.parametrize(
    "override,said",
    [
        ("hydra.launcher.at_once=0", "hydra.launcher.at_once=0 should be above 0"),
        ("hydra.launcher.gpus=all", "hydra.launcher.gpus=all should be"),
        ("hydra.launcher.threads=2", "threads=3 and hydra.launcher.threads=2 disagree"),
        ("hydra.sweeper.max_batch_size=1", "use hydra.launcher.at_once=N"),
        ("resume=runs/x", "a sweep's jobs are runs of their own"),
    ],
)
def test_what_a_sweep_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str) -> None:
    """Before any job is started."""
    (tmp_path / "script.py").touch()
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    config = composed(
        "threads=3", f"hydra.sweep.dir={tmp_path / 'sweep'}", *([override] if "hydra" in override else [])
    )
    launcher = instantiate(config.hydra.launcher)
    with pytest.raises(Refusal, match=re.escape(said)):
        launcher.setup(hydra_context=None, task_function=None, config=config)
        launcher.launch([["seed=0"], ["seed=1", override]], 0)
    assert not (tmp_path / "sweep").exists()


def test_a_slip_leaves_no_folder(tmp_path: Path, light: Callable) -> None:
    done = light("optimizer.lrr=1,2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "unknown key optimizer.lrr; did you mean optimizer.lr?" in done.stderr
    assert not sweeps(tmp_path)


def test_an_unknown_setting_of_the_launcher(light: Callable) -> None:
    done = light("seed=0,1", "hydra.launcher.at_onse=2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "unknown key hydra.launcher.at_onse; did you mean hydra.launcher.at_once" in done.stderr


@pytest.mark.parametrize("preset,jobs", [("lr", 5), ("seeds", 5), ("widths", 12), ("attention_ffn", 9)])
def test_presets_are_sweeps(preset: str, jobs: int) -> None:
    """sweep=<name> alone is a multirun of what its file says, every job of which is a sound config; what is typed goes
    before what the file says."""
    cfg = composed(f"sweep={preset}")
    assert str(cfg.hydra.mode) == "RunMode.MULTIRUN"
    chosen = [f"{k}={v}" for k, v in cfg.hydra.sweeper.params.items()]
    parse = OverridesParser.create().parse_overrides
    (batch,) = BasicSweeper.split_arguments(parse(chosen), None)
    assert len(batch) == jobs
    for overrides in batch[:: (len(batch) - 1) // 2]:
        job = composed(*overrides)
        with flag_override(job, "struct", False):
            del job["hydra"]
        check(job, "train")
    key = next(iter(cfg.hydra.sweeper.params))
    (fewer,) = BasicSweeper.split_arguments(parse([*chosen, f"{key}=5"]), None)
    assert len(fewer) < jobs


@contextlib.contextmanager
def hydra_of(folder: Path) -> Iterator[Hydra]:
    with initialize_config_dir(str(folder), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        yield hydra


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=True)


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_other_launchers(tmp_path: Path, light: Callable, launcher: str) -> None:
    """Theirs work too: a folder for each job, and the exit code of the one that failed comes home."""
    pytest.importorskip({"joblib": "joblib", "submitit_local": "submitit"}.get(launcher, "hydra"))
    done = light("seed=0,1", f"hydra/launcher={launcher}", FATES='{"0": "nan"}')
    (sweep,) = sweeps(tmp_path)
    assert done.returncode == 5, done.stdout + done.stderr
    assert [status(sweep, n)["status"] for n in range(2)] == ["failed", "completed"]
    assert not (sweep / "multirun.yaml").exists()  # it would have what was typed, secrets too


LATE = """
import json
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

class Late(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        order, values = [], []

        def jobs():
            for n in range(4):
                order.append(f"ask {n}")
                yield n, [f"seed={n}"]

        def done(n, result):
            order.append(f"done {n}")
            try:
                values.append(result.return_value["val/full_loss"])
            except Exception as error:
                values.append(str(error))

        results = self.launcher.run(jobs(), lambda n, folder: n == 1 and (folder / "asleep").exists(), done, 4)
        assert [r.overrides for r in results] == [[f"seed={n}"] for n in range(4)]
        print(json.dumps({"order": order, "values": values}))
"""


def test_run_takes_jobs_late_and_stops_those_that_are_not_worth_it(tmp_path: Path, light: Callable) -> None:
    """What a sweeper that learns from its trials uses: the next job is asked for when there is room, a watched one can be
    stopped, and each result has the run's metrics."""
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "late.py").write_text(LATE)
    (tmp_path / "conf" / "hydra" / "sweeper").mkdir(parents=True)
    (tmp_path / "conf" / "hydra" / "sweeper" / "late.yaml").write_text("_target_: hydra_plugins.late.Late\n")
    fates = '{"1": "sleep", "3": "nan"}'
    done = light("--config-dir=conf", "hydra/sweeper=late", "hydra.launcher.at_once=1", forked=False, FATES=fates)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["order"] == ["ask 0", "done 0", "ask 1", "done 1", "ask 2", "done 2", "ask 3", "done 3"]
    assert told["values"] == [1.0, "job 1 pruned: pruned", 3.0, "job 3 failed: the gradient of step 1 is nan"]
    (sweep,) = sweeps(tmp_path)
    assert status(sweep, 1)["status"] == "pruned"
    assert "(3 of 4 finished)" in done.stdout and "stdout.log" in done.stdout
    assert "same command" not in done.stdout, "a sweeper may go on by itself"


def test_a_hash_is_of_what_counts() -> None:
    counts = overrides_hash(["seed=1", "model=moe"])
    assert overrides_hash(["model=moe", "seed=1", "runs_dir=x", "progress=bar"]) == counts
    assert overrides_hash(["seed=1"]) != overrides_hash(["seed=2"])
    this = identity_of(composed("max_steps=5", "seed=1"))
    assert identity_of(composed("seed=1", "max_steps=5", "runs_dir=x", "hydra.launcher.at_once=3")) == this
    assert identity_of(composed("max_steps=6", "seed=1")) != this
    config = composed("max_steps=5", "seed=1")
    config.optimizer.lr = 0.5  # as if a config file had been edited
    assert identity_of(config) != this


def test_a_sweep_over_files_knows_when_one_is_changed(tmp_path: Path) -> None:
    """Also where a choice takes in another file by its defaults list."""
    files = {
        "model/attn/one": "defaults: [two, /other@x: deep, rope: 'some_${x}', _self_]",
        "model/attn/two": "defaults: [/other/in/list, override /other: [in/group, null]]",
        "model/attn/three": "b: 1",
        "model/attn/rope/some_a": "a: 1",
        "other/deep": "c: 1",
        "other/in/list": "defaults: [beside]",  # starts from other/in
        "other/in/beside": "defaults: [list]",
        "other/in/group": "{",
        "model/attn/in/group": "defaults: [three]",  # starts from model/attn, as Hydra has it for a choice
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    found = choice_files([tmp_path], ["model/attn=one,four", "seed=0,1", "model.dim=3"])
    assert set(found) == {f"{n}.yaml" for n in files} - {"model/attn/three.yaml", "model/attn/in/group.yaml"}
    found = choice_files([tmp_path], ["+model/attn='in/group',three", "model/attn@y=glob(t*,exclude=two)"])
    assert list(found) == ["model/attn/in/group.yaml", "model/attn/three.yaml"]
    assert list(choice_files([tmp_path], ["other=[deep],[in/beside,in/list]"])) == [
        "other/deep.yaml", "other/in/beside.yaml", "other/in/list.yaml",
    ]  # fmt: skip


def test_the_files_of_a_choice_are_those_that_hydra_reads() -> None:
    """For every file of conf/experiment and conf/sweep that takes in others."""
    with hydra_of(CONF) as hydra:
        _, repo = hydra.config_loader._parse_overrides_and_create_caching_repo("train", [])  # type: ignore[attr-defined]
        parse = OverridesParser.create().parse_overrides

        def read_for(*overrides: str) -> set[str]:
            made = create_defaults_list(repo, "train", parse(list(overrides)), prepend_hydra=True, skip_missing=False)
            return {f"{d.config_path}.yaml" for d in made.defaults}

        always, looked_at = read_for(), 0
        for group in ("experiment", "sweep"):
            for path in (CONF / group).rglob("*.yaml"):
                if "defaults:" in path.read_text():
                    choice = path.relative_to(CONF / group).with_suffix("")
                    found = choice_files([CONF], [f"{group}={choice},none"])
                    assert read_for(f"{group}={choice}") - always <= set(found), path
                    looked_at += 1
        assert looked_at > 10


def test_an_edit_of_what_swept_experiments_take_in_is_another_sweep(tmp_path: Path) -> None:
    """And of a file that only Optuna's choices name: another study, and no going on with one of that name."""
    folder = shutil.copytree(CONF, tmp_path / "conf")
    with hydra_of(folder) as hydra:
        arms = hydra.compose_config("train", ["experiment=schedule/cosine,schedule/wsd"], RunMode.MULTIRUN)
        space = ["hydra/sweeper=optuna", "+hydra.sweeper.params={model/attn:{choices:[gqa,mla]}}"]
        searched = hydra.compose_config("train", space, RunMode.MULTIRUN)
    sweeper = OptunaSweeper.__new__(OptunaSweeper)
    sweeper.config, sweeper.metrics, sweeper.directions = searched, ["val/loss"], ["minimize"]
    sweeper.compose = lambda overrides: OmegaConf.create({"seed": 1})  # type: ignore[method-assign]
    found = {"model/attn": CategoricalDistribution(["gqa", "mla"])}
    before = identity_of(arms), identity_of(searched), sweeper.identity([], found)
    assert before == (identity_of(arms), identity_of(searched), sweeper.identity([], found))
    for name in ("experiment/study.yaml", "model/attn/mla.yaml"):
        with (folder / name).open("a") as file:
            file.write("# edited\n")
    after = identity_of(arms), identity_of(searched), sweeper.identity([], found)
    assert before[0] != after[0] and before[1] != after[1]
    assert {k for k in after[2] if before[2].get(k) != after[2][k]} == {"model/attn/mla.yaml"}


def test_what_goes_on_deletes_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored config has what came of a deletion; typed again without it, the rest of its node would bring it back."""
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "config.yaml").touch()
    monkeypatch.setattr(jobs.manifest, "steps", lambda folder: [folder / "step"])
    monkeypatch.setattr(jobs.manifest, "fault", lambda step: None)
    typed = ["tracker=default", "~tracker.tensorboard", "model=moe", "max_steps=9", "~lora"]
    assert jobs.prepare(Job(0, typed, tmp_path)) == ["max_steps=9", f"resume={tmp_path}"]


def test_logs_are_cleaned_however_large_and_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hunter2-token")
    key = "-----BEGIN PRIVATE KEY-----\n" + "abcd\n" * 9 + "-----END PRIVATE KEY-----\n"
    log = tmp_path / "stdout.log"
    log.write_text("a\r\n" * 9 + key + "hunter2-token\n")
    assert any(key in text for text in jobs.pieces(io.StringIO(log.read_text()), 64))
    (tmp_path / "status.json").write_text('{"status": "completed"}')  # of a sweep that was killed before the job's end
    done = Job(0, [], tmp_path, status="completed", earlier=True)
    runner = Pool(Resources(1, 1, None, 1, None, 1.0), lambda j, o: [], lambda j: (None, 1), False)
    runner.run(iter([done]), Table("none", [done], 1, [], None), None, lambda job: None)
    assert log.read_bytes() == b"a\r\n" * 9 + b"<redacted>\n<redacted>\n" and len(list(tmp_path.iterdir())) == 2

    monkeypatch.setattr(jobs, "scrub", lambda text: text.replace("hunter2", "x"))  # the real one takes seconds
    log.write_text("a line of 20 letters\n" * (2**26 // 21) + "and the last one has hunter2\n")
    assert log.stat().st_size > 2**26
    jobs.clean(log)
    assert log.read_bytes().endswith(b"and the last one has x\n")


def test_a_stuck_tracker_has_its_time() -> None:
    """A run that was told to stop saves, then waits for its trackers: it must not be killed meanwhile."""
    nodes = [n for p in (CONF / "tracker").glob("*.yaml") for n in (yaml.safe_load(p.read_text()) or {}).values()]
    longest = max(n.get("timeout", 0) for n in nodes if isinstance(n, dict))
    assert longest and composed().hydra.launcher.grace_seconds > longest


def test_a_job_of_two_processes(tmp_path: Path) -> None:
    overrides = tiny(tmp_path, max_steps=1, eval_every="null", save_every="null", sample_prompts="[]")
    done = train("-m", *overrides, "parallel=ddp", "parallel.nproc=2", "hydra.launcher.at_once=1")
    (sweep,) = sweeps(tmp_path)
    assert status(sweep, 0)["status"] == "completed" and status(sweep, 0)["step"] == 1, done.stdout


def test_reasons() -> None:
    """The exception of the last traceback, or the line that the scripts print."""
    raised = "a\nTraceback (most recent call last):\n  File x\n    y\nmod.Odd: it\nis\n"
    assert jobs.reason(raised) == "mod.Odd: it"
    assert (
        jobs.reason(raised + "\nDuring ...\n\nTraceback (most recent call last):\n  File x\nKeyError: 1\n")
        == "KeyError: 1"
    )
    assert jobs.reason("step 1\nwarning: a\nerror: dim=3\nstep 2") == "dim=3"
    assert jobs.reason("step 1") == ""
    full = f"could not write /{'a/' * 99}optimizer.safetensors: I/O error: No space left on device (os error 28)"
    said = jobs.reason(f"error: {full}")
    assert len(said) == 160 and said.startswith("could not write /a/a") and said.endswith(full[-80:])


def test_a_run_killed_after_its_last_checkpoint_is_completed(tmp_path: Path) -> None:
    """All steps are done and nothing says so: a resume exports the model and has the metrics in status.json."""
    train(*tiny(tmp_path, max_steps=2, eval_every=2, sample_prompts="[]"))
    folder = run_in(tmp_path / "runs")
    before = json.loads((folder / "status.json").read_text())
    shutil.rmtree(folder / "artifacts" / "export")
    (folder / "status.json").write_text(json.dumps({"started": before["started"], "status": "running"}))
    train(f"resume={folder}")
    after = json.loads((folder / "status.json").read_text())
    assert after["status"] == "completed" and after["step"] == 2 and after["metrics"] == before["metrics"]
    assert (folder / "artifacts" / "export" / "model.safetensors").exists()
