"""reproduce=: the same run again, what differs, and where two runs part."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from running import ROOT, environment, identity, metrics, run_in, tiny, train

from etude import git
from etude import run as runs
from etude.cli import quote
from etude.config import CONF, check
from etude.errors import Refusal
from etude.reproduce import adopt, compare, elsewhere, verdict

DROPS = {"model__attn__dropout": 0.1, "model__ffn__dropout": 0.1, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    train(*tiny(folder, **DROPS, tag="first"))
    return run_in(folder / "runs")


def again(source: Path, folder: Path, *overrides: str) -> Path:
    """Reproduce into another folder; -> the run."""
    done = train(f"reproduce={source}", f"runs_dir={folder}", *overrides)
    run = run_in(folder)
    assert record(run)["verdict"] in done.stdout and record(run)["verdict"] in (run / "summary.txt").read_text()
    return run


def record(run: Path) -> dict:
    return json.loads((run / "reproduction.json").read_text())


def test_the_same_machine_gives_the_same_bits(source: Path, tmp_path: Path) -> None:
    """Weights, optimizer and every logged value; the metadata names the source, and nothing is said to differ."""
    run = again(source, tmp_path / "again", "tag=second")
    assert identity(run) == identity(source)
    found = record(run)
    assert found["equal"] and found["weights"] and found["steps_compared"] == 6
    assert set(found["differs"]) <= {"code"}, "of a checkout that is worked on while tests run"
    assert {"train/loss", "lr", "batch", "grad_norm", "val/loss", "val/full_loss"} <= set(found["names"])
    assert not any(name.startswith("perf/") for name in found["names"])
    assert yaml.safe_load((run / "meta" / "config.yaml").read_text())["reproduce"]["run"] == str(source)
    assert run.name.endswith("_second")


def test_a_run_resumed_with_other_limits_is_reproduced(source: Path, tmp_path: Path) -> None:
    """The rate follows max_steps: until it was resumed the run had another, which the reproduction has too. Killed in the
    middle and resumed, the reproduction ends the same. Nothing of this needs small files that a power cut has emptied."""
    copy = Path(shutil.copytree(source, tmp_path / "copy", symlinks=True))
    for name in ("status.json", "meta/choices.json"):
        (copy / name).write_text("")
    train(f"resume={copy}", "max_steps=10")
    train(f"resume={copy}", "max_steps=12", "log_every=2")
    assert [until for until, _ in runs.earlier(copy)] == [6, 10]
    run = again(copy, tmp_path / "again")
    assert record(run)["equal"] and record(run)["last_step_compared"] == 12, record(run)
    assert identity(run)[0] == identity(copy)[0]


def test_adapters_and_a_beginning_are_reproduced(source: Path, tmp_path: Path) -> None:
    """Also when the model that they began with is gone: the run has kept what its adapters lie on."""
    base = Path(shutil.copytree(source, tmp_path / "base", symlinks=True))
    small = [o for o in tiny(tmp_path, max_steps=2, eval_every="null") if not o.startswith(("model", "tokenizer"))]
    train(*small, f"init_from={base}", "data.seq_len=32", "lora=true", "lora.rank=2")
    first = run_in(tmp_path / "runs")
    shutil.rmtree(base)
    run = again(first, tmp_path / "again")
    assert record(run)["equal"] and record(run)["weights"]


REFUSED = [
    (["reproduce={tmp}/nothing"], "is not a run"),
    (["reproduce={source}", "seed=1"], "seed: 0 -> 1"),
    (["reproduce={source}", "max_steps=50"], "max_steps: 6 -> 50"),
    (["reproduce={tmp}/torn"], "cannot be read"),
    (["reproduce={tmp}/redacted"], "tracker.wandb.api_key is a secret"),
    (["reproduce={tmp}/earlier"], "until_00000002.yaml cannot be read: bring back a copy"),
    (["reproduce.code=true"], "type reproduce=runs/<run> too"),
    (["reproduce.code=3"], "true or false"),
    (["reproduce={tmp}/gone", "reproduce.code=true"], "cannot be checked out"),
    (["reproduce={tmp}/nogit", "reproduce.code=true"], "no commit"),
]


def test_what_cannot_be_reproduced_is_one_line(source: Path, tmp_path: Path) -> None:
    config = (source / "meta" / "config.yaml").read_text()
    made = {
        "torn": ("a: [", "commit: " + "0" * 40 + "\n"),
        "earlier": (config, ""),
        "redacted": (config.replace("tracker: {}", "tracker: {wandb: {api_key: <redacted>}}"), ""),
        "gone": (config, "commit: " + "0" * 40 + "\n"),
        "nogit": (config, "not a git repository with a commit\n"),
    }
    for name, (text, commit) in made.items():
        (tmp_path / name / "meta" / "earlier").mkdir(parents=True)
        (tmp_path / name / "meta" / "config.yaml").write_text(text)
        (tmp_path / name / "meta" / "git.txt").write_text(commit)
        (tmp_path / name / "meta" / "diff.patch").write_text("")
    (tmp_path / "earlier" / "meta" / "earlier" / "until_00000002.yaml").write_text("a: [")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for overrides, said in REFUSED:
            given = [quote(o.format(source=source, tmp=tmp_path)) for o in overrides]
            with pytest.raises(Refusal) as refused:
                cfg = adopt(check(compose("train", overrides=given), "train"), given)
                if cfg["reproduce"]["code"]:
                    elsewhere(cfg, given)
            assert said in str(refused.value) and "\n" not in str(refused.value), (overrides, refused.value)
    done = train(f"reproduce={source}", "model.dim=64", check=False)
    assert done.returncode == 2 and "model.dim: 32 -> 64" in done.stderr and len(done.stderr.splitlines()) == 1
    done = train("reproduce.cod=true", check=False)
    assert done.returncode == 2 and "did you mean reproduce.code" in done.stderr


def test_threads_and_precision_are_as_they_were(source: Path, tmp_path: Path) -> None:
    """Where the config leaves them to the machine; what else may be typed is where things lie and what is logged."""
    copy = Path(shutil.copytree(source, tmp_path / "copy", symlinks=True))
    path = copy / "meta" / "config.yaml"
    path.write_text(path.read_text().replace("threads: 1", "threads: null"))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = [f"reproduce.run='{copy}'", "threads=null", "log_every=3", "tracker=default", f"data.path='{tmp_path}'"]
        cfg = adopt(check(compose("train", overrides=given[:-1]), "train") | {"data": {"path": "there"}}, given)
    assert cfg["threads"] == 1 and cfg["precision"] in ("fp32", "bf16") and cfg["log_every"] == 3 and cfg["tracker"]
    assert cfg["data"]["path"] == "there" and cfg["data"]["seq_len"] == 32


def test_where_two_logs_part_is_found() -> None:
    """The first step, every name, by how much; an integer that equals a float is not the same log."""
    then = {s: {"step": s, "lr": 0.1, "train/loss": 2.0 / s, "perf/tokens_per_s": s, "batch": 7} for s in range(1, 5)}
    now = json.loads(json.dumps({s: {**v, "perf/tokens_per_s": 0} for s, v in then.items()}))
    now = {int(s): v for s, v in now.items()}
    found = compare(then, now)
    assert found["equal"] and found["names"] == ["batch", "lr", "train/loss"]
    now[2]["lr"], now[3]["lr"] = 0.1000001, 0.5
    now[3]["train/loss"] += 0.25
    now[4]["only_here"] = 1
    found = compare(then, now)
    assert found["first"] == {"step": 2, "values": {"lr": [0.1, 0.1000001]}}
    assert found["first_by_name"] == {"lr": 2, "train/loss": 3}
    assert found["largest"]["train/loss"] == [3, 0.25] and found["largest"]["lr"] == [3, 0.4]
    line = verdict(found | {"source": "runs/x", "differs": {"code": ["src/a.py (+1 -1)"]}, "weights": False})
    assert "at step 2: lr 0.1 there, 0.1000001 here (+1e-07)" in line and "losses part at step 3" in line
    assert "src/a.py (+1 -1)" in line
    seldom = compare({s: then[s] for s in (1, 3)}, {s: now[s] for s in (1, 3)})
    line = verdict(seldom | {"source": "runs/x", "differs": {}, "weights": False})
    assert "between steps 1 and 3: lr 0.1 there, 0.5 here" in line and "so do train/loss" in line
    nan = float("nan")
    assert compare({1: {"a": nan}}, {1: {"a": nan}})["equal"] and not compare({1: {"a": 1}}, {2: {"a": 1}})["equal"]


# ---------------------------------------------------------------- code


def ask(*args: str, at: Path) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
    return subprocess.run(["git", *identity, *args], cwd=at, check=True, capture_output=True, text=True).stdout


def repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a package in it, which git.py takes for its own."""
    for name, text in {
        "src/etude/a.py": "x = 1\ny = 2\n",
        "src/etude/b.py": "z = 3\n",
        "src/etude/gone.py": "w = 4\n",
        "README.md": "text\n",
        ".env": "A=1\n",
        ".gitignore": "runs/\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "logo.bin").write_bytes(bytes(range(256)))
    ask("init", "-q", at=folder)
    ask("add", "-A", at=folder)
    ask("commit", "-qm", "one", at=folder)
    monkeypatch.setattr(git, "HERE", folder / "src" / "etude")
    return folder


def keep(folder: Path, name: str) -> Path:
    """The record of a repository as a run's meta folder."""
    meta = folder / "runs" / name / "meta"
    meta.mkdir(parents=True)
    said, patch = git.record()
    (meta / "git.txt").write_text(said)
    (meta / "diff.patch").write_bytes(patch)
    return meta


def tree(folder: Path) -> dict[str, bytes]:
    names = ask("ls-files", "--cached", "--others", "--exclude-standard", at=folder).split()
    return {n: (folder / n).read_bytes() for n in names if (folder / n).is_file()}


def test_commit_and_patch_are_the_whole_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed, staged, deleted, binary, executable and new files that git does not know; neither index, objects nor
    files of the user change by recording it, nor by checking it out."""
    root = repository(tmp_path, monkeypatch)
    (root / "src/etude/a.py").write_text("x = 1\ny = 5  # \xe4\n", encoding="latin-1")
    (root / "src/etude/gone.py").unlink()
    (root / "src/etude/my attention.py").write_text("new = True\nno newline at the end")
    (root / "src/etude/empty.py").write_text("")
    (root / "staged.yaml").write_text("a: 1\n")
    ask("add", "staged.yaml", at=root)
    (root / "logo.bin").write_bytes(bytes(range(255, -1, -1)))
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    before = ask("status", "--porcelain", at=root), sorted(p.name for p in (root / ".git/objects").rglob("*"))
    meta = keep(root, "one")
    with git.worktree(meta) as code:
        assert tree(code) == tree(root)
        assert os.access(code / "run.sh", os.X_OK)
        assert git.changes(meta, meta) == []
    assert not code.exists() and len(ask("worktree", "list", at=root).splitlines()) == 1
    assert before == (ask("status", "--porcelain", at=root), sorted(p.name for p in (root / ".git/objects").rglob("*")))


def test_files_that_differ_are_named_with_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = repository(tmp_path, monkeypatch)
    (root / "src/etude/new.py").write_text("a\n")
    one = keep(root, "one")
    (root / "src/etude/new.py").write_text("a\nb\nc\n")
    (root / "README.md").write_text("another\n")
    ask("commit", "-qam", "two", at=root)
    (root / "src/etude/b.py").write_text("z = 4\n")
    two = keep(root, "two")
    found = git.changes(one, two)
    assert list(map(str, found)) == ["src/etude/b.py (+1 -1)", "src/etude/new.py (+2 -0)", "README.md (+1 -1)"]
    (two / "git.txt").write_text("commit: " + "1" * 40 + "\n")
    assert "is not in" in str(git.changes(one, two))
    (two / "git.txt").write_text("not a git repository with a commit\n")
    assert "not in a git repository" in str(git.changes(one, two))
    with pytest.raises(Refusal, match="no commit"), git.worktree(two):
        pass


def test_what_may_be_a_secret_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file's name, by a token's form, by a literal under a secret's name; and what is large."""
    root = repository(tmp_path, monkeypatch)
    ask("remote", "add", "origin", "https://user:hunter2@host/x.git", at=root)
    (root / ".env").write_text("A=planted-1\n")
    (root / "src/etude/a.py").write_text("x = 'ghp_" + "a1" * 18 + "'\n")
    (root / "src/etude/keys.py").write_text("api_key = 'planted-2'\n")
    (root / "credentials.json").write_text("{'x': 'planted-3'}")
    (root / "notes.txt").write_text("planted-4: data, not source\n")
    (root / "large.py").write_text("#" * (git.LARGEST + 1))
    (root / "src/etude/fine.py").write_text("token = 5\n")
    meta = keep(root, "one")
    text = (meta / "git.txt").read_text()
    patch = (meta / "diff.patch").read_text()
    assert "planted" not in text + patch and "ghp_" not in text + patch and "hunter2" not in text + patch
    assert "https://host/x.git" in text and "fine.py" in patch
    for name in (".env", "src/etude/a.py", "src/etude/keys.py", "credentials.json", "large.py"):
        assert f"left out of diff.patch: {name}: " in text, name


def test_a_changed_constant_is_found_and_the_old_code_gives_the_old_bits(tmp_path: Path) -> None:
    """In a copy of the repository: the file and the step are named; with reproduce.code=true the recorded commit and patch
    run, new files and all, and the user's checkout is as it was."""
    root = tmp_path / "copy"
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", root)
    ask("init", "-q", at=root)
    ask("add", "-A", at=root)
    ask("commit", "-qm", "one", at=root)
    new = root / "src" / "etude" / "flat.py"
    new.write_text("def flat(step, steps, per_epoch):\n    return 0.5 if step < 2 else 0.25\n")
    (root / "conf" / "scheduler" / "flat.yaml").write_text("_target_: etude.flat.flat\n_partial_: true\n")

    def run(*overrides: str) -> str:
        env = environment(PYTHONPATH=str(root / "src"))
        command = [sys.executable, str(root / "train.py"), *overrides]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(*tiny(tmp_path, max_steps=4, eval_every="null", save_every="null"), "scheduler=flat", "runs_dir=first")
    first = run_in(tmp_path / "first")
    assert (tmp_path / "first").exists() and "flat.py" in (first / "meta" / "diff.patch").read_text()

    new.write_text(new.read_text().replace("0.25", "0.26"))
    said = run(f"reproduce={first}", "runs_dir=second")
    found = record(run_in(tmp_path / "second"))
    assert "differs  code: src/etude/flat.py (+1 -1)" in said
    assert found["first"]["step"] == 3 and list(found["first"]["values"]) == ["lr"]
    assert found["first_by_name"]["train/loss"] == 4 and "src/etude/flat.py" in found["verdict"]

    status = ask("status", "--porcelain", at=root)
    said = run(f"reproduce={first}", "reproduce.code=true", "runs_dir=third")
    third = run_in(tmp_path / "third")
    assert record(third)["equal"] and record(third)["weights"] and "code" not in record(third)["differs"]
    assert metrics(third)[-1]["train/loss"] == metrics(first)[-1]["train/loss"]
    assert ask("status", "--porcelain", at=root) == status and "0.26" in new.read_text()
    assert len(ask("worktree", "list", at=root).splitlines()) == 1
