"""What is written down of a step that went wrong, and any step once more."""

import hashlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, environment, identity, metrics, run_in, tiny, train
from scipy.stats import median_abs_deviation

from etude import replay
from etude.diagnosis import EVEN, Watch


def test_what_stands_out() -> None:
    """More deviations above the median than asked for, by scipy; never too early, never twice in a row, never a fall."""
    chance = random.Random(0)
    watch, past = Watch(8, 50), []
    said = {}
    for step in range(400):
        value = chance.gauss(2, 0.1) + (3 if step in (5, 200, 201, 300) else -1.5 if step == 250 else 0)
        why = watch.step({"grad_norm": value})
        last = past[-50:]
        if len(last) >= 20:
            deviation = max(float(median_abs_deviation(last)), EVEN * statistics.median(last))
            assert (why is not None) == (value > statistics.median(last) + 8 * deviation and step != 201), step
        if why:
            said[step] = why
        past.append(value)
    assert list(said) == [200, 300] and "above the median" in said[200]
    assert Watch(None, 50).step({"loss": 1e9}) is None
    assert "loss is nan" in (Watch(None, 50).step({"grad_norm": 1.0, "loss": math.nan}) or "")
    flat = Watch(3, 30)
    assert all(flat.step({"grad_norm": 0.0}) is None for _ in range(40)) and flat.step({"grad_norm": 5.0}) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of which some step stands out, and the same one that nobody watches."""
    folder = tmp_path_factory.mktemp("watched")
    changes = {
        "max_steps": 20,
        "save_every": 8,
        "eval_every": "null",
        "model__ffn__dropout": 0.1,
        "micro_batch_size": 2,
    }
    watched = {"model": "moe", "spike_window": 8, "optimizer.lr": 1e-4}
    for name, above in (("watched", 0.05), ("unwatched", "null")):
        overrides = tiny(folder, **changes, runs_dir=folder / name)
        train(*overrides, *(f"{k}={v}" for k, v in (watched | {"spike_above": above}).items()))
    return run_in(folder / "watched"), run_in(folder / "unwatched")


def test_a_spike_is_written_down_and_changes_nothing(runs: tuple[Path, Path]) -> None:
    """The looked-at step is done once more: weights and log equal those of a run without; the gradients' norms add up to
    the logged one, and the samples are the sampler's."""
    run, unwatched = runs
    dumps = sorted((run / "logs").glob("spike_step_*_rank_0.json"))
    assert dumps and not list((unwatched / "logs").glob("spike*"))
    assert identity(run) == identity(unwatched)
    found = json.loads(dumps[0].read_text())
    step = found["step"]
    logged = {m["step"]: m for m in metrics(run)}[step]
    assert found["values"] == {"grad_norm": logged["grad_norm"], "loss": logged["train/loss"]}
    assert math.hypot(*found["gradients"].values()) == pytest.approx(logged["grad_norm"], rel=1e-4)
    assert [len(rows) for rows in found["tokens"]] == [2, 2] == [len(m) for m in found["samples"]]
    assert set(found["before"]) == {str(s) for s in range(max(1, step - 10), step)}
    assert {"embed", "blocks.0", "blocks.1.attn", "blocks.1.ffn", "norm"} <= set(found["activations"])
    assert all(a["nonfinite"] == 0 and 0 < a["rms"] <= a["max"] for a in found["activations"].values())
    load = found["router_load"]
    assert len(load) == 2 and sum(load[0]) == sum(load[1]) == 4 * 32 * 2
    losses = [row["loss"] for row in found["rows"]]
    assert losses == sorted(losses, reverse=True) and sum(row["share"] for row in found["rows"]) == pytest.approx(1)


def files(folder: Path) -> dict[str, str]:
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert replay.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_any_step_is_replayed_to_the_bit(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """From the nearest checkpoint before it, past a damaged one, or from the beginning; nothing is written into the run."""
    run, _ = runs
    logged = {m["step"]: m for m in metrics(run)}
    before = files(run)
    text = said(capsys, str(run), "step=19", "top=2")
    assert f"equal to the bit: train/loss {logged[19]['train/loss']}" in text and "NOT" not in text
    assert "from the checkpoint step_00000016, through 2 more" in text and "2 of them are in the log: equal" in text
    assert text.count("micro-batch") == 2 and "sample" in text and "router   tokens of each expert" in text
    from etude.text.tokenizer import load

    line = next(line for line in text.splitlines() if line.startswith("     '") or line.startswith('     "'))
    ids = [row for batch in sampled(run, 19) for row in batch]
    assert eval(line) in [load(run / "artifacts" / "export").decode(row) for row in ids]
    assert files(run) == before

    damaged = run / "artifacts" / "checkpoints" / "step_00000016" / "model.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    assert replay.main([str(run), "step=19"]) == 0
    out = capsys.readouterr()
    assert "step_00000016 is damaged and skipped" in out.err and "equal to the bit: train/loss" in out.out
    assert "step_00000016" not in out.out and "NOT" not in out.out
    damaged.write_bytes(whole)
    assert "from the beginning" in said(capsys, str(run), "step=1")


def sampled(run: Path, step: int) -> list[list[list[int]]]:
    """The tokens of a step, as the data has them."""
    import yaml

    from etude import training
    from etude.data.order import Order

    cfg = yaml.safe_load((run / "meta" / "config.yaml").read_text())
    data, prepared = training.prepare_data(cfg)
    ids = prepared[0].ids("train")
    n = len(ids) - cfg["data"]["seq_len"]
    numbers = range((step - 1) * cfg["batch_size"], step * cfg["batch_size"])
    import numpy as np

    order = Order(n, seed=cfg["seed"], kind=cfg["data"]["order"])
    at = order.sample(np.array(numbers))
    return [[ids.read(int(a), int(a) + cfg["data"]["seq_len"]).tolist() for a in at]]


@pytest.mark.parametrize(
    "arguments,wanted",
    [
        (["{run}", "step=99"], "did 20 steps"),
        (["{run}", "step=21"], "did 20 steps"),
        (["{run}", "step=²"], "should be a number"),
        (["{run}", "stpe=3"], "did you mean step"),
        (["{run}", "step=x"], "should be a number"),
        (["{run}"], "should be a number"),
        (["step=3"], "which run?"),
        (["{run}/nothing", "step=1"], "is not a run"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(runs: tuple[Path, Path], arguments: list[str], wanted: str) -> None:
    from etude.errors import Refusal

    with pytest.raises(Refusal) as refused:
        replay.main([a.format(run=runs[0]) for a in arguments])
    assert wanted in str(refused.value) and "\n" not in str(refused.value)


ROLLOUTS = (
    "strategy=grpo strategy.steps_per_rollout=2 strategy.iterations=2 strategy.beta=0.1 strategy.sync_interval=3 strategy.group_size=4 "
    "strategy.max_completion=6 +reward@strategy.rewards.short=length strategy.rewards.short.limit=4"
)


@pytest.mark.parametrize(
    "strategy,step",
    [
        ("strategy=sft lora=true lora.rank=2", 5),
        ("strategy=dpo strategy.layout=shared reference=cached", 4),
        (ROLLOUTS, 7),
        ("strategy=kto", 5),
        ("strategy=reward_model", 5),
    ],
    ids=["sft", "dpo", "grpo", "kto", "reward_model"],
)
def test_other_strategies(tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str, step: int) -> None:
    """Adapters, pairs, and a rollout of which a checkpoint holds the rest; step 7 of grpo lies in another than its checkpoint."""
    settings = (
        "data.n=40 data.val_fraction=0.1 tokenizer=byte model.dim=32 model.n_layers=1 model.attn.n_heads=2 model.attn.n_kv_heads=1 model.max_len=192 batch_size=4 max_steps=8 "
        "micro_batch_size=2 eval_every=null log_every=1 sample_every=null sample_tokens=3 threads=1 progress=lines save_every=3 tracker=jsonl"
    )
    train(*strategy.split(), *settings.split(), f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}")
    run = run_in(tmp_path / "runs")
    text = said(capsys, str(run), f"step={step}", "top=3")
    logged = {m["step"]: m for m in metrics(run)}[step]
    assert f"equal to the bit: train/loss {logged['train/loss']}" in text and "NOT" not in text, text
    assert "part at" not in text and text.count("micro-batch") == 3
    assert "<|im▁start|>assistant" in text.partition("rows ")[2].partition("layers ")[0]
    if "dpo" in strategy or "reward_model" in strategy:
        assert ", chosen" in text or ", rejected" in text
    if "sft" in strategy:  # whose loss is the mean over the step's targets: prompt and padding do not count
        every = re.findall(r"over (\d+) targets, ([\d.]+)%", said(capsys, str(run), f"step={step}", "top=99"))
        for n, percent in every:
            assert float(percent) == pytest.approx(100 * int(n) / sum(int(n) for n, _ in every), abs=0.06)
    if "grpo" in strategy:
        assert "advantage" in text
        reproduced(run, tmp_path / "again")


def reproduced(run: Path, folder: Path) -> None:
    """Whole, to the bit: a rollout's texts, and two ranks' sums, too."""
    train(f"reproduce={run}", f"runs_dir={folder}")
    found = json.loads((run_in(folder) / "reproduction.json").read_text())
    assert found["equal"] and found["weights"] and identity(run_in(folder)) == identity(run)


def test_two_processes(tmp_path: Path) -> None:
    """A step of a run of two ranks, by two: from the command line."""
    train(*tiny(tmp_path, max_steps=4, eval_every="null", save_every=2), "parallel=ddp")
    run = run_in(tmp_path / "runs")
    command = [sys.executable, "-m", "etude.replay", str(run), "step=4", "top=4"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "equal to the bit" in done.stdout and "NOT" not in done.stdout, (
        done.stdout + done.stderr
    )
    assert "rank 0" in done.stdout and "rank 1" in done.stdout
    assert sum(map(float, re.findall(r"([\d.]+)% of the gradient", done.stdout))) == pytest.approx(100, abs=0.3)
    reproduced(run, tmp_path / "again")


NAN = """
from etude.strategy.seq import Seq

class Breaks(Seq):
    def __init__(self, *, above: float):
        super().__init__(label_smoothing=0.0, z_loss=0.0)
        self.above = above

    def loss(self, model, ref, batch):
        loss, metrics = super().loss(model, ref, batch)
        late = next(p for n, p in model.named_parameters() if n.endswith("norm.weight")).detach().sub(1).abs().max() > self.above
        return (loss * float("nan") if late else loss), metrics
"""


def test_a_nan_is_written_down_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step that stopped a run is in no line of the log: it is run again all the same, and is not finite again."""
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "breaks.py").write_text(NAN)
    (tmp_path / "conf" / "strategy" / "breaks.yaml").write_text("_target_: breaks.Breaks\nabove: 0.0003\n")
    given = [f"--config-dir={tmp_path / 'conf'}", "strategy=breaks", "trusted=[etude,breaks]"]
    path = f"{ROOT / 'src'}{os.pathsep}{tmp_path}"
    done = train(*tiny(tmp_path, max_steps=9, eval_every="null", save_every=2), *given, check=False, PYTHONPATH=path)
    assert done.returncode == 5, done.stderr
    run = run_in(tmp_path / "runs")
    step = metrics(run)[-1]["step"] + 1
    assert 2 < step < 9 and f"step={step}" in done.stderr
    found = json.loads((run / "logs" / f"nonfinite_step_{step}_rank_0.json").read_text())
    assert (
        all(math.isnan(norm) for norm in found["gradients"].values()) and found["activations"]["norm"]["nonfinite"] == 0
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = said(capsys, str(run), f"step={step}")
    assert "there is nothing to compare it with" in text and "grad_norm nan" in text
