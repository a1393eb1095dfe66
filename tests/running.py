"""Runs of train.py as a user starts them, for tests that kill, resume and compare."""

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path

from forked import Forked, run

ROOT = Path(__file__).resolve().parents[1]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **extra}


def text_file(folder: Path, n: int = 20_000) -> Path:
    """Varied text that a small model can learn something of."""
    words = "the cat sat on a mat and saw one red bird fly over two green trees".split()
    state, out, length = 1, [], 0
    while length < n:
        state = (state * 1103515245 + 12345) % 2**31
        out.append(words[(state >> 16) % len(words)] + (".\n" if state % 7 == 0 else " "))
        length += len(out[-1])
    path = folder / "text.txt"
    path.write_text("".join(out))
    return path


def tiny(folder: Path, **changes: object) -> list[str]:
    """Overrides of a run that takes a second or two."""
    settings = {
        "data": "text", "data.path": text_file(folder), "tokenizer": "byte", "model.dim": 32, "model.n_layers": 2, "model.attn.n_heads": 2,
        "model.attn.n_kv_heads": 1, "model.max_len": 32, "batch_size": 4, "max_steps": 6, "eval_every": 3, "eval_iters": 1, "log_every": 1,
        "sample_every": "null", "sample_tokens": 5, "threads": 1, "runs_dir": folder / "runs", "cache_dir": folder / "cache", "progress": "lines",
        "save_every": 3, "tracker": "jsonl",
    }  # fmt: skip
    settings.update({k.replace("__", "."): v for k, v in changes.items()})
    return [f"{k}={v}" for k, v in settings.items()]


def train(
    *overrides: str, check: bool = True, cwd: Path = ROOT, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess:
    """train.py from start to end; with `fresh` its ranks are Pythons of their own, not forks."""
    done = run([str(ROOT / "train.py"), *overrides], cwd, environment(**env), fresh=fresh)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def start(*overrides: str, fresh: bool = False) -> Forked:
    """train.py, its output and errors in one."""
    return Forked(["train.py", *overrides], ROOT, environment(), joined=True, fresh=fresh)


def run_in(folder: Path) -> Path:
    """The one run under a runs_dir, once it is there."""
    for _ in range(1200):
        if found := [p for p in folder.glob("2*") if (p / "logs").is_dir()]:
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no run in {folder}")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def identity(run: Path) -> tuple[dict[str, str], list[tuple]]:
    """What two equal runs share to the bit: weights, optimizer, and every logged loss, rate and batch."""
    last = run / "artifacts" / "checkpoints" / "last"
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in last.glob("*.safetensors")}
    names = ("step", "train/loss", "lr", "batch", "grad_norm", "val/loss", "val/full_loss", "tokens")
    return hashes, [tuple(m.get(n) for n in names) for m in metrics(run)]
