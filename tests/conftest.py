"""What all tests share: one thread, a cache of their own, a tiny corpus and train.py as a process."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in every process that a test starts

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)
# A shell that starts tests in the background has them ignore Ctrl-C, and so would every script that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    base = tmp_path_factory.getbasetemp()
    kernels = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    kernels.mkdir(exist_ok=True)  # compiled once for all workers
    (cache / "kernels").symlink_to(kernels)
    os.environ["ETUDE_CACHE"] = str(cache)


def varied_text(length: int, seed: int = 0) -> str:
    """Lines of made-up words with capitals, digits and punctuation: something to learn, nothing to download."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioubcdfghlmnprstvwyz", k=rng.randint(1, 8))) for _ in range(300)]
    lines: list[str] = []
    found = 0
    while found < length:
        line = " ".join(rng.choices(words, k=rng.randint(3, 12)))
        lines.append(
            rng.choice(["", "    ", "def "])
            + line.capitalize()
            + rng.choice([".", "?", ":", f" {rng.randint(0, 99)}"])
            + "\n"
        )
        found += len(lines[-1])
    return "".join(lines)[:length]


@pytest.fixture
def tiny_text(tmp_path: Path) -> Path:
    """A text file of 20 kB."""
    path = tmp_path / "tiny.txt"
    path.write_text(varied_text(20_000), encoding="utf-8")
    return path


@pytest.fixture
def tiny(tiny_text: Path, tmp_path: Path) -> list[str]:
    """Overrides of train.py for a run of seconds, all of whose files lie in the test's own folder."""
    return [
        "data=text",
        f"data.path={tiny_text}",
        "tokenizer=byte",
        "model.dim=32",
        "model.n_layers=2",
        "model.attn.n_heads=2",
        "model.attn.n_kv_heads=1",
        "model.max_len=32",
        "batch_size=4",
        "max_steps=6",
        "eval_every=3",
        "eval_iters=1",
        "sample_every=null",
        "sample_tokens=5",
        "threads=1",
        f"runs_dir={tmp_path}/runs",
        f"cache_dir={tmp_path}/cache",
        "progress=lines",
        "save_every=3",
    ]


@pytest.fixture
def etude_run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`etude_run(*overrides, script="train.py")`: a script as a user starts it, with its output as text. `before` is put
    ahead of src on PYTHONPATH, `env` laid over the environment, `input` given as standard input."""

    def run(
        *overrides: str,
        script: str = "train.py",
        before: Path | None = None,
        env: dict[str, str] | None = None,
        input: str | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([*([str(before)] if before else []), str(ROOT / "src")])
        environment = os.environ | {"PYTHONPATH": path} | (env or {})
        if before is None:
            return forked.run([script, *overrides], ROOT, environment, input, timeout)
        return subprocess.run(
            [sys.executable, script, *overrides],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL if input is None else None,
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
