"""Runs that are killed, stopped or damaged, and go on."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import identity, metrics, run_in, start, tiny, train

LONG = {
    "max_steps": 48,
    "eval_every": 24,
    "save_every": 8,
    "model__attn__dropout": 0.1,
    "model__ffn__dropout": 0.1,
    "batch_size": 8,
    "micro_batch_size": 2,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Path]:
    """The unbroken run of LONG in one process or in two, made once."""
    made: dict[bool, Path] = {}

    def run(layout: list[str]) -> Path:
        ddp = "parallel=ddp" in layout
        if ddp not in made:
            folder = tmp_path_factory.mktemp("whole")
            train(*tiny(folder, **LONG), *[o for o in layout if "workers" not in o])
            made[ddp] = run_in(folder / "runs")
        return made[ddp]

    return run


def resumes(run: Path) -> int:
    path = run / "meta" / "resumes"
    return len(path.read_text().splitlines()) if path.exists() else 0


def lines(run: Path) -> int:
    path = run / "logs" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    "layout,times",
    [(["data.workers=0"], 3), (["data.workers=2"], 2), (["parallel=ddp", "parallel.nproc=2"], 2)],
    ids=["plain", "workers", "ddp"],
)
def test_kill_nine_and_resume_is_bit_exact(tmp_path: Path, layout: list[str], times: int, whole: Callable) -> None:
    """Kills at random moments change no bit of weights, optimizer or log."""
    broken = tmp_path / "broken"
    process = start(*tiny(tmp_path, **LONG, runs_dir=broken), *layout)
    run, chance, kills = run_in(broken), random.Random(7), 0
    while kills < times:
        before = lines(run)
        goal = chance.randint(1, 16)
        while process.poll() is None and lines(run) < before + goal:
            time.sleep(0.002)
        if process.poll() is not None:
            break
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.communicate()
        kills += 1
        process = start(f"resume={run}", fresh=kills == times)
        # Until it has cut the log back to its checkpoint, lines() would count the old ones.
        while process.poll() is None and resumes(run) < kills:
            time.sleep(0.02)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert kills == times
    assert identity(run) == identity(whole(layout))
    assert [m["step"] for m in metrics(run)] == list(range(1, 49))


def test_ranks_and_micro_batches_give_the_same_losses(tmp_path: Path) -> None:
    """One rank with two micro-batches and two ranks with one see the same samples and dropout: losses to 1e-5."""
    shape = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 8, "model__ffn__dropout": 0.1, "precision": "fp32"}
    train(*tiny(tmp_path, **shape, runs_dir=tmp_path / "one"))
    train(*tiny(tmp_path, **shape, runs_dir=tmp_path / "two"), "parallel=ddp", fresh=True)
    one, two = metrics(run_in(tmp_path / "one")), metrics(run_in(tmp_path / "two"))
    assert [m["batch"] for m in one] == [m["batch"] for m in two]
    for a, b in zip(one, two, strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < 1e-5
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-4 * a["grad_norm"]
    assert abs(one[-1]["val/full_loss"] - two[-1]["val/full_loss"]) < 1e-5


@pytest.mark.parametrize("name,layout", [("SIGTERM", []), ("SIGINT", []), ("SIGUSR1", ["parallel=ddp"])])
def test_signals_save_and_exit_3(tmp_path: Path, name: str, layout: list[str], whole: Callable) -> None:
    """A signal ends with a checkpoint of the step it came at, exit code 3, and a run that goes on to the same end."""
    process = start(*tiny(tmp_path, **LONG, runs_dir=tmp_path / "broken"), *layout)
    run = run_in(tmp_path / "broken")
    while lines(run) < 12:
        time.sleep(0.005)
    os.kill(process.pid, getattr(signal, name))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3, out
    assert f"resume={run}" in out
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "interrupted"
    state = json.loads((run / "artifacts/checkpoints/last/state.json").read_text())
    assert state["progress"]["step"] == lines(run)
    train(f"resume={run}")
    assert json.loads((run / "status.json").read_text())["status"] == "completed"
    assert identity(run) == identity(whole(layout))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("finished")
    train(*tiny(folder, max_steps=9))
    return folder, run_in(folder / "runs")


def copy(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[1], tmp_path / "run", symlinks=True))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    finished: tuple[Path, Path], tmp_path: Path, file: str, damage: object
) -> None:
    """The newest checkpoint that is whole is taken, and the one that is not is named with the reason."""
    from etude import checkpoint

    checkpoints = copy(finished, tmp_path) / "artifacts" / "checkpoints"
    *_, before, newest = checkpoint.steps(checkpoints)
    damage(newest / file)  # type: ignore[operator]
    if damage is flip and file == "manifest.json":
        assert checkpoint.fault(newest) is not None or json.loads((newest / file).read_text())
    warnings: list[str] = []
    found = checkpoint.newest(checkpoints, warnings.append)
    if found == newest:  # one bit of the manifest's own white space
        assert damage is flip and file == "manifest.json"
        return
    assert found == before
    assert len(warnings) == 1 and str(newest) in warnings[0]


def test_resume_falls_back_and_never_starts_afresh(finished: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy(finished, tmp_path)
    folders = sorted((run / "artifacts" / "checkpoints").glob("step_*"))
    flip(folders[-1] / "model.safetensors")
    done = train(f"resume={run}", "max_steps=12")
    assert "model.safetensors has another sha256" in done.stderr
    assert [m["step"] for m in metrics(run)] == list(range(1, 13))
    for folder in (run / "artifacts" / "checkpoints").glob("step_*"):
        truncate(folder / "optimizer.safetensors")
    done = train(f"resume={run}", "max_steps=20", check=False)
    assert done.returncode == 2
    assert "is whole" in done.stderr
    assert len(metrics(run)) == 12


def test_resume_refuses_another_run_and_allows_more_steps(finished: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy(finished, tmp_path)
    for change in ("model.dim=64", "model=gpt", "batch_size=8", "seed=5", "data.val_fraction=0.2", "optimizer.lr=1"):
        done = train(f"resume={run}", change, check=False)
        assert done.returncode == 2, change
        assert change.split("=")[0] in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    done = train(f"resume={run}", "experiment=nanogpt_cpu", check=False)
    assert done.returncode == 2 and "not be the same run" in done.stderr
    assert "is complete" in train(f"resume={run}").stdout
    train(f"resume={run}", "max_steps=11", "seed=0")  # seed=0 is what it was
    assert [m["step"] for m in metrics(run)] == list(range(1, 12))
    (finished[0] / "text.txt").write_text((finished[0] / "text.txt").read_text().replace("cat", "dog"))
    done = train(f"resume={run}", "max_steps=13", check=False)
    assert done.returncode == 2 and "not what this run was trained on" in done.stderr
    (finished[0] / "text.txt").write_text((finished[0] / "text.txt").read_text().replace("dog", "cat"))


def test_a_run_is_written_by_one_process_only(tmp_path: Path) -> None:
    process = start(*tiny(tmp_path, max_steps=100000, eval_every="null", save_every="null"))
    run = run_in(tmp_path / "runs")
    while lines(run) < 3:
        time.sleep(0.02)
    done = train(f"resume={run}", check=False)
    assert done.returncode == 2 and str(process.pid) in done.stderr
    process.kill()
    process.communicate()
    train(f"resume={run}", "max_steps=5")  # the lock went with its holder


def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    """The others stop, the message names the rank, nothing is left running."""
    process = start(*tiny(tmp_path, max_steps=100000, eval_every="null"), "parallel=ddp", fresh=True)
    run = run_in(tmp_path / "runs")
    while lines(run) < 5:
        time.sleep(0.02)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, 2, 3)
    assert "rank 1 was killed by signal SIGKILL" in out
    for child in children:
        assert not Path(f"/proc/{child}").exists()


def test_a_full_disk_exits_4_and_keeps_the_last_checkpoint(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk: the write fails in the middle of a checkpoint."""
    run = copy(finished, tmp_path)
    size = (run / "artifacts/checkpoints/last/optimizer.safetensors").stat().st_size
    program = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size - 100}, {size - 100}))\n"
        f"sys.argv = ['train.py', 'resume={run}', 'max_steps=12']\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    import sys

    from running import ROOT, environment

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 4, done.stderr
    assert "step_00000012" in done.stderr and "bytes" in done.stderr
    from etude import checkpoint

    newest = checkpoint.newest(run / "artifacts" / "checkpoints")
    assert newest is not None and newest.name == "step_00000009"
    assert not list((run / "artifacts" / "checkpoints").glob(".step*"))
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
