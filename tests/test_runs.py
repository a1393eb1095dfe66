"""What a run leaves behind, and what a user adds to it."""

import json
import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml
from forked import run
from running import ROOT, environment, metrics, run_in, text_file, tiny, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything on, started with secrets about."""
    folder = tmp_path_factory.mktemp("run")
    train(
        *tiny(folder, max_steps=6, sample_every=3, histogram_every=3, tracker="default", tag="all"),
        HF_TOKEN="hunter2-token", WANDB_API_KEY="hunter2-key", OMP_NUM_THREADS="1",
    )  # fmt: skip
    return run_in(folder / "runs")


def test_the_folder_is_as_documented(finished: Path) -> None:
    assert re.fullmatch(r"\d{8}_\d{6}_all", finished.name)
    for name in (
        "artifacts/checkpoints/last/model.safetensors artifacts/checkpoints/best/manifest.json artifacts/export/model.safetensors "
        "artifacts/export/config.json artifacts/export/tokenizer.json logs/metrics.jsonl logs/samples.jsonl logs/histograms.jsonl "
        "meta/config.yaml meta/full_config.json meta/overrides meta/command meta/git.txt meta/diff.patch meta/env.txt meta/packages.txt "
        "meta/data.json status.json summary.txt"
    ).split():
        assert (finished / name).is_file(), name
    assert list((finished / "logs" / "tensorboard").glob("events*"))
    status = json.loads((finished / "status.json").read_text())
    assert status["status"] == "completed" and status["step"] == 6 and status["exit_code"] == 0
    assert status["metrics"]["val/full_loss"] == metrics(finished)[-1]["val/full_loss"]
    assert "completed" in (finished / "summary.txt").read_text()
    data = json.loads((finished / "meta" / "data.json").read_text())
    assert len(data["sha256"]) == len(data["tokenizer_sha256"]) == 64
    config = yaml.safe_load((finished / "meta" / "config.yaml").read_text())
    assert config["model"]["dim"] == 32 and "${" not in json.dumps(config)
    assert "torch==" in (finished / "meta" / "packages.txt").read_text()
    assert re.search(r"^(commit: [0-9a-f]{40}|not a git)", (finished / "meta" / "git.txt").read_text())


def test_metrics_are_one_line_a_step_and_tensorboard_agrees(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = metrics(finished)
    assert [r["step"] for r in rows] == list(range(1, 7))
    assert all(r["train/loss"] > 0 and r["lr"] > 0 for r in rows)
    assert "val/loss" in rows[2] and "train/eval_loss" in rows[2] and "val/loss" not in rows[0]
    events = EventAccumulator(str(finished / "logs" / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    for name in ("train/loss", "lr", "val/full_loss"):
        wanted = {r["step"]: r[name] for r in rows if name in r}
        found = {e.step: e.value for e in events.Scalars(name)}
        assert found.keys() == wanted.keys()
        assert all(abs(found[s] - wanted[s]) <= 1e-6 * abs(wanted[s]) for s in wanted)
    histograms = [json.loads(line) for line in (finished / "logs" / "histograms.jsonl").read_text().splitlines()]
    assert [h["step"] for h in histograms] == [3, 6]
    assert {"params/embed.weight", "grads/blocks.0.attn.q.weight"} <= set(histograms[0]["histograms"])
    assert sum(histograms[0]["histograms"]["grads/embed.weight"]["counts"]) == 32 * 261
    assert set(events.Tags()["histograms"]) == set(histograms[0]["histograms"])


def test_no_secret_lands_in_the_folder(tmp_path: Path, finished: Path) -> None:
    for path in finished.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
    from etude.run import redact, redact_override

    assert redact({"a": {"api_key": "x", "token": "y", "max_tokens": 5, "tokenizer": "z"}}) == {
        "a": {"api_key": "<redacted>", "token": "<redacted>", "max_tokens": 5, "tokenizer": "z"}
    }
    assert redact("https://user:pw@host/x.git") == "https://host/x.git"
    assert redact_override("+tracker.wandb.api_key=abc") == "+tracker.wandb.api_key=<redacted>"
    assert redact_override("seed=1") == "seed=1"


def test_export_and_checkpoint_and_run_generate_the_same(finished: Path) -> None:
    texts = []
    for ckpt in (finished, finished / "artifacts/checkpoints/best", finished / "artifacts/export"):
        done = generate(f"ckpt={ckpt}", "prompt=the cat ", "max_tokens=8", "temperature=0")
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[1] == texts[2] and texts[0].startswith("the cat ")


def generate(*overrides: str, stdin: str | None = None) -> subprocess.CompletedProcess:
    return run(["generate.py", *overrides, "threads=1"], ROOT, environment(), stdin)


def test_generate_from_files_and_standard_input(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "the {cat}, \'x\'"}\n{"prompt": "a"}\n')
    done = generate(
        f"ckpt={finished}",
        f"file={tmp_path / 'p.jsonl'}",
        f"out={tmp_path / 'o.jsonl'}",
        "n=2",
        "max_tokens=5",
        "top_k=9",
        "top_p=0.9",
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["choice"]) for r in rows] == [
        ("the {cat}, 'x'", 0),
        ("the {cat}, 'x'", 1),
        ("a", 0),
        ("a", 1),
    ]
    assert all(r["tokens"] <= 5 and r["finish"] in ("length", "stop") for r in rows)
    alone = generate(f"ckpt={finished}", "max_tokens=5", "top_k=9", "top_p=0.9", stdin="a\n")
    assert alone.stdout == "a" + rows[2]["text"] + "\n"


@pytest.mark.parametrize(
    "override,said",
    [
        ("ckpt=runs/nothing", "does not exist"),
        ("file=nowhere.txt", "nowhere.txt does not exist"),
        ("temperature=-1", "temperature=-1"),
        ("top_p=2", "top_p=2"),
        ("tempreature=1", "did you mean temperature"),
        ("n=0", "n=0"),
    ],
)
def test_generate_refuses_bad_input(finished: Path, override: str, said: str) -> None:
    given = [] if override.startswith("ckpt") else [f"ckpt={finished}"]
    done = generate(*given, override, *([] if override.startswith("file") else ["prompt=a"]))
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_hostile_export_is_refused_before_anything_is_imported(finished: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(finished / "artifacts" / "export", tmp_path / "export"))
    config = json.loads((folder / "config.json").read_text())
    config["model"]["attn"] = {"_target_": "os.system", "_partial_": False, "command": f"touch {tmp_path / 'owned'}"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()
    done = generate(f"ckpt={folder}", "prompt=a")
    assert done.returncode == 2 and "outside trusted" in done.stderr
    assert not (tmp_path / "owned").exists()


def test_multirun_gives_isolated_folders(tmp_path: Path) -> None:
    """Two models and two seeds in one process: each a whole run under one sweep; one that is refused costs only itself."""
    overrides = [
        o
        for o in tiny(tmp_path, max_steps=2, eval_every="null", save_every="null")
        if not o.startswith(("model.attn", "model.max_len", "runs_dir"))
    ]
    done = train(
        "-m",
        "hydra/launcher=basic",
        *overrides,
        "model.attn.n_heads=2,3",
        "model.attn.n_kv_heads=null",
        "seed=0,1",
        "tag=sweep",
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2  # dim=32 does not divide by 3
    assert done.stderr.count("not divisible by n_heads=3") == 2
    sweep = list((tmp_path / "runs" / "sweeps").glob("*_sweep"))
    assert len(sweep) == 1
    jobs = sorted(p for p in sweep[0].iterdir() if p.is_dir())
    assert [p.name.split("_")[0] for p in jobs] == ["0", "1"]
    seeds = [yaml.safe_load((p / "meta" / "config.yaml").read_text())["seed"] for p in jobs]
    assert seeds == [0, 1]
    assert all(json.loads((p / "status.json").read_text())["status"] == "completed" for p in jobs)
    assert not list((tmp_path / "runs").glob("2*"))


def test_a_new_attention_and_a_new_loss_are_one_file_and_one_yaml_each(tmp_path: Path) -> None:
    """As docs/add-a-part.md says: no file of the repository is touched."""
    conf = tmp_path / "conf"
    (conf / "model" / "attn").mkdir(parents=True)
    (conf / "strategy").mkdir()
    (tmp_path / "mean_attention.py").write_text(
        textwrap.dedent("""
        from torch import nn

        class MeanAttention(nn.Module):
            tp_plan = {"value": "col", "out": "row"}

            def __init__(self, dim, layer, *, bias: bool):
                super().__init__()
                self.value, self.out = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)

            def flops_per_token(self, length):
                return 0

            def forward(self, x, positions=None, mask=None, cache=None):
                v = self.value(x)
                return self.out(v.cumsum(1) / (1 + v.new_ones(v.shape[1]).cumsum(0)[:, None]))
        """)
    )
    (conf / "model" / "attn" / "mean.yaml").write_text(
        "_target_: mean_attention.MeanAttention\n_partial_: true\nbias: false\n"
    )
    (tmp_path / "focal.py").write_text(
        textwrap.dedent("""
        class Focal:
            needs_reference = False

            def __init__(self, *, gamma: float):
                self.gamma = gamma

            def collect(self, model, batches, seeds, world):
                return batches

            def weight(self, batch):
                return int((batch["targets"] >= 0).sum())

            def loss(self, model, ref, batch):
                scores, _ = model(batch["tokens"], targets=batch["targets"])
                n = (batch["targets"] >= 0).sum()
                loss = -((1 - scores.logprob.exp()) ** self.gamma * scores.logprob).sum()
                return loss, {"loss": (loss.detach(), n), "nll": (-scores.logprob.detach().sum(), n)}
        """)
    )
    (conf / "strategy" / "focal.yaml").write_text("_target_: focal.Focal\ngamma: 2.0\n")
    overrides = [o for o in tiny(tmp_path, max_steps=4) if not o.startswith("model.attn")]
    path = f"{ROOT / 'src'}{os.pathsep}{tmp_path}"
    done = train(
        f"--config-dir={conf}",
        *overrides,
        "model/attn=mean",
        "strategy=focal",
        "trusted=[etude,mean_attention,focal]",
        PYTHONPATH=path,
    )
    assert "completed" in (run_in(tmp_path / "runs") / "summary.txt").read_text(), done.stdout
    rows = metrics(run_in(tmp_path / "runs"))
    assert rows[-1]["train/loss"] < rows[-1]["train/nll"]
    done = train(f"--config-dir={conf}", *overrides, "model/attn=mean", "strategy=focal", check=False, PYTHONPATH=path)
    assert done.returncode == 2 and "trusted=[etude,mean_attention]" in done.stderr
    done = train(
        f"--config-dir={conf}",
        *overrides,
        "model/attn=mean",
        "model.attn.bais=1",
        "trusted=[etude,mean_attention]",
        check=False,
        PYTHONPATH=path,
    )
    assert done.returncode == 2 and "did you mean model.attn.bias" in done.stderr


NAN = """
import torch
from etude.strategy.seq import Seq

class Breaks(Seq):
    def __init__(self, *, at: int, rank: int):
        super().__init__(label_smoothing=0.0, z_loss=0.0)
        self.at, self.rank, self.calls = at, rank, 0

    def loss(self, model, ref, batch):
        loss, metrics = super().loss(model, ref, batch)
        self.calls += model.training
        here = not torch.distributed.is_initialized() or torch.distributed.get_rank() == self.rank
        return (loss * float("nan") if here and self.calls == self.at else loss), metrics
"""


@pytest.mark.parametrize("layout", [[], ["parallel=ddp"]], ids=["one", "ddp"])
def test_a_nan_stops_every_rank_before_the_update(tmp_path: Path, layout: list[str]) -> None:
    """Exit code 5, the newest checkpoint finite, the batch's ids on disk; with on_nonfinite=skip the run goes on."""
    import torch
    from safetensors.torch import load_file

    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "breaks.py").write_text(NAN)
    (tmp_path / "conf" / "strategy" / "breaks.yaml").write_text("_target_: breaks.Breaks\nat: 5\nrank: 1\n")
    rank, at = (1, 6) if layout else (0, 5)  # DDP's warm-up is a call too
    given = [
        f"--config-dir={tmp_path / 'conf'}",
        "strategy=breaks",
        f"strategy.at={at}",
        f"strategy.rank={rank}",
        "trusted=[etude,breaks]",
        *layout,
    ]
    path = f"{ROOT / 'src'}{os.pathsep}{tmp_path}"
    done = train(*tiny(tmp_path, max_steps=8, eval_every="null", save_every=2), *given, check=False, PYTHONPATH=path)
    assert done.returncode == 5, done.stderr
    assert "step 5" in done.stderr and "on_nonfinite=skip" in done.stderr
    run = run_in(tmp_path / "runs")
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
    weights = load_file(run / "artifacts" / "checkpoints" / "last" / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in weights.values())
    dumped = json.loads((run / "logs" / "nonfinite_step_5_rank_0.json").read_text())
    assert len(dumped["tokens"][0]) == (2 if layout else 4)
    train(
        *tiny(tmp_path, max_steps=8, eval_every="null", runs_dir=tmp_path / "skip"),
        *given,
        "on_nonfinite=skip",
        PYTHONPATH=path,
    )
    assert metrics(run_in(tmp_path / "skip"))[-1]["skipped"] == 1


def test_a_failing_tracker_changes_nothing(tmp_path: Path) -> None:
    """One that raises and one that sleeps: a warning each, weights and losses to the bit, and an end in time."""
    (tmp_path / "conf" / "tracker").mkdir(parents=True)
    (tmp_path / "bad.py").write_text(
        "import time\n\nclass Bad:\n    def open(self, folder, config, start_step): pass\n    def scalars(self, step, values): raise OSError('no route')\n    def close(self): pass\n\nclass Slow(Bad):\n    def __init__(self, *, timeout: float): pass\n    def scalars(self, step, values): time.sleep(300)\n"
    )
    (tmp_path / "conf" / "tracker" / "bad.yaml").write_text(
        "bad:\n  _target_: bad.Bad\nslow:\n  _target_: bad.Slow\n  timeout: 3.0\n"
    )
    path = f"{ROOT / 'src'}{os.pathsep}{tmp_path}"
    train(*tiny(tmp_path))
    overrides = [o for o in tiny(tmp_path, runs_dir=tmp_path / "bad") if not o.startswith("tracker")]
    done = train(f"--config-dir={tmp_path / 'conf'}", *overrides, "tracker=bad", "trusted=[etude,bad]", PYTHONPATH=path)
    assert done.stderr.count("tracker bad failed") == 1 and "no route" in done.stderr
    assert done.stderr.count("tracker slow failed") == 1
    from running import identity

    assert identity(run_in(tmp_path / "bad")) == identity(run_in(tmp_path / "runs"))


def test_limits(tmp_path: Path) -> None:
    """max_tokens, max_epochs, max_minutes and early stopping each end a run, with the reason."""
    limits = {
        "tokens": ["max_tokens=400"],
        "epochs": ["max_epochs=0.05"],
        "early": ["early_stopping=2", "optimizer.lr=0.0", "eval_every=1"],
        "reached": ["stop_at=9", "eval_every=2"],
    }
    steps = {}
    for name, change in limits.items():
        unlimited = [] if "eval_every" in change[-1] else ["max_steps=null"]
        train(
            *tiny(tmp_path, runs_dir=tmp_path / name, eval_every="null", save_every="null", max_steps=50),
            *unlimited,
            *change,
        )
        steps[name] = metrics(run_in(tmp_path / name))[-1]["step"]
    assert steps == {"tokens": 4, "epochs": 8, "early": 3, "reached": 2}
    run = run_in(tmp_path / "reached")
    assert "reached stop_at=9" in (run / "summary.txt").read_text()
    assert "stop_at=null" in train(f"resume={run}").stdout and metrics(run)[-1]["step"] == 2
    train(f"resume={run}", "stop_at=null", "max_steps=4")
    assert metrics(run)[-1]["step"] == 4
    done = train(
        *tiny(tmp_path, runs_dir=tmp_path / "time", max_steps="null", eval_every="null", save_every="null"),
        "max_minutes=0.02",
    )
    assert "time limit" in done.stdout
    done = train(*tiny(tmp_path, max_steps="null"), check=False)
    assert done.returncode == 2 and "nothing says when to stop" in done.stderr


def test_the_second_start_reads_no_text(tmp_path: Path) -> None:
    """The cache is keyed by what the data is, and is all that a second start needs."""
    overrides = tiny(tmp_path, max_steps=1)
    train(*overrides)
    tokens = sorted((tmp_path / "cache" / "tokens").iterdir())
    before = {p: p.stat().st_mtime_ns for p in tokens}
    train(*overrides, "seed=1")
    assert {p: p.stat().st_mtime_ns for p in sorted((tmp_path / "cache" / "tokens").iterdir())} == before


def test_eight_launches_in_one_second_get_eight_folders(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from etude.run import claim

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: claim(str(tmp_path), "x"), range(8)))
    assert len(set(folders)) == 8


def test_options_that_change_training_do(tmp_path: Path) -> None:
    """Each of these options reaches the loss; none is silently ignored."""
    text_file(tmp_path)
    base = {"max_steps": 3, "eval_every": "null", "save_every": "null", "sample_prompts": "[]"}
    options = [
        "strategy.label_smoothing=0.1", "strategy.z_loss=0.1", "model.ffn.dropout=0.5", "model.attn.dropout=0.5", "model.dropout=0.5", "clip=0.01",
        "optimizer.weight_decay=50", "optimizer.eps=0.1", "precision=bf16", "data.order=sequential", "data.isolate_documents=true", "scheduler=constant",
        "model.tied=false", "model.init_std=0.1", "seed=3",
    ]  # fmt: skip
    from etude.training import train as run

    def losses(name: str, *overrides: str) -> list[float]:
        from hydra import compose, initialize_config_dir

        from etude.config import CONF, check

        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = check(
                compose(
                    "train", overrides=[*tiny(tmp_path, **base, runs_dir=tmp_path / name, precision="fp32"), *overrides]
                ),
                "train",
            )
        assert run(cfg) == 0
        return [m["train/loss"] for m in metrics(run_in(tmp_path / name))]

    plain = losses("plain")
    assert losses("again", "compile=false") == plain
    assert losses("checkpointing", "model.checkpoint=true") == pytest.approx(plain, abs=1e-6)
    for i, option in enumerate(options):
        if option == "data.isolate_documents=true":
            continue
        assert losses(f"o{i}", option) != plain, option
