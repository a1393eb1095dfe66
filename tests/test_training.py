"""Every model through the real loop, in this process."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from running import metrics, run_in, text_file
from test_model import MODELS, small

from etude import training
from etude.config import CONF, build, check
from etude.loop import key
from etude.model.transformer import Transformer
from etude.model.weights import model_tensors


def config(folder: Path, model: str, *more: str) -> dict[str, Any]:
    """A checked config of five steps; nothing in between is evaluated or sampled."""
    overrides = [
        *small(model), "model.init_std=null", "data=text", f"data.path={text_file(folder, 4000)}", "tokenizer=byte", "batch_size=4",
        "max_steps=5", "log_every=1", "eval_every=null", "sample_every=null", "sample_tokens=3", "sample_prompts=[a]", "save_every=null",
        "threads=1", f"runs_dir={folder}/runs", f"cache_dir={folder}/cache", "progress=none", "tracker=jsonl", "precision=fp32",
        "scheduler=constant", "scheduler.warmup=0", "optimizer.lr=5e-3", *more,
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return check(compose("train", overrides=overrides), "train")


def trained(folder: Path, model: str, *more: str) -> Path:
    assert training.train(config(folder, model, *more)) == 0
    return run_in(folder / "runs")


def test_what_fails_before_the_first_step_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a GPU has no room for the wrapped model: the run does not seem to be running for ever."""

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("etude.parallel.Single.wrap", fails)
    assert training.train(config(tmp_path, "dense")) == 1
    status = json.loads((run_in(tmp_path / "runs") / "status.json").read_text())
    assert status["status"] == "failed" and "out of memory" in status["error"] and status["exit_code"] == 1
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains(model: str, tmp_path: Path) -> None:
    """Five steps: finite numbers, every trained parameter moved, a loss that falls, an export that is the last model and
    that says what it is."""
    run = trained(tmp_path, model)
    rows = metrics(run)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert math.isfinite(row["train/loss"]) and 0 < row["grad_norm"] < 100
    assert abs(rows[0]["train/loss"] - math.log(261)) < 1 and rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.05
    sparse = model in ("moe", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3")
    assert ("train/router/max_load" in rows[0]) == sparse == ("val/full_router/entropy" in rows[-1])
    export = Transformer.from_pretrained(run / "artifacts" / "export")
    assert export.node == json.loads((run / "artifacts" / "export" / "config.json").read_text())["model"]
    assert export.n_params() == sum(t.numel() for t in model_tensors(export).values())
    first = build(export.node, export.vocab_size)
    torch.manual_seed(key(0, "init"))
    first.init_weights()
    for name, p in export.named_parameters():
        assert p.isfinite().all() and (p - first.get_parameter(name)).abs().max() < 5 * 5e-3 * 1.1, name
        assert (p != first.get_parameter(name)).float().mean() > (0.3 if name.endswith("ffn.bias") else 0.9), name
    assert "generate: python generate.py" in (run / "summary.txt").read_text()


@pytest.mark.parametrize("model", ["moe", "deepseek_v3"])
def test_micro_batches_through_the_loop(model: str, tmp_path: Path) -> None:
    """4x1 and 1x4: the same losses, loads and entropies at every step, to 1e-4 (updates let roundings grow)."""
    found = []
    for size in (4, 1):
        (tmp_path / str(size)).mkdir()
        rows = metrics(trained(tmp_path / str(size), model, f"micro_batch_size={size}"))
        names = (
            "train/loss",
            "train/nll",
            "train/aux",
            "train/router/max_load",
            "train/router/entropy",
            "batch",
            "grad_norm",
        )
        found.append([[row[n] for n in names] for row in rows])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_resumed_sparse_run_is_the_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, the router's bias among them, bit for bit: what balances is part of a checkpoint."""
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = trained(tmp_path / "whole", "deepseek_v3")
    broken = trained(tmp_path / "broken", "deepseek_v3", "max_steps=3")
    cfg = config(tmp_path / "broken", "deepseek_v3", f"resume={broken}")
    monkeypatch.setattr(training, "typed_overrides", lambda: [f"resume={broken}", "max_steps=5"])
    assert training.train(cfg) == 0
    files = [run / "artifacts" / "checkpoints" / "last" / "model.safetensors" for run in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((broken / "artifacts/checkpoints/last/state.json").read_text())["progress"]["step"] == 5
