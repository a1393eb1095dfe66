"""sft, dpo and grpo from the command line: out of the box on every kind of model, killed and resumed, from other runs."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from forked import run as script
from running import ROOT, environment, identity, metrics, run_in, start, train
from safetensors.torch import load_file

MODELS = {"dense": [], "moe": ["model=moe"], "mla": ["model/attn=mla", "model.attn.kv_lora_rank=8"]}
ROLLOUTS = (
    "strategy.steps_per_rollout=2 strategy.iterations=2 strategy.beta=0.1 strategy.sync_interval=5 strategy.group_size=4 strategy.max_completion=6 "
    "+reward@strategy.rewards.short=length strategy.rewards.short.limit=4"  # an untrained model gives no right answers
)
STRATEGIES = {"sft": ["strategy=sft"], "dpo": ["strategy=dpo"], "grpo": ["strategy=grpo", *ROLLOUTS.split()]}


def tiny(folder: Path, *more: str) -> list[str]:
    """Overrides of a run of a few seconds on built-in rows."""
    attn = [] if any("mla" in o for o in more) else ["model.attn.n_kv_heads=1"]
    settings = (
        "data.n=60 data.val_fraction=0.1 tokenizer=byte model.dim=32 model.n_layers=2 model.attn.n_heads=2 model.max_len=192 batch_size=4 max_steps=16 "
        "micro_batch_size=2 eval_every=8 eval_iters=1 log_every=1 sample_every=null sample_tokens=3 threads=1 progress=lines save_every=3 tracker=jsonl"
    )
    return [*more[:2], *settings.split(), *attn, f"runs_dir={folder}", f"cache_dir={folder.parent}/cache", *more[2:]]


def with_model(folder: Path, strategy: str, model: str = "dense", *more: str) -> list[str]:
    return tiny(
        folder, *STRATEGIES[strategy][:1], *(MODELS[model] or ["model=dense"]), *STRATEGIES[strategy][1:], *more
    )


def lines(run: Path) -> int:
    path = run / "logs" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_and_resumed(overrides: list[str], runs: Path, moments: list[int]) -> Path:
    """The same run, killed when so many steps are logged, and gone on with until it ends."""
    process = start(*overrides)
    run = run_in(runs)
    for moment in moments:
        while process.poll() is None and lines(run) < moment:
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.wait(20)
        process = start(f"resume={run}")
        while process.poll() is None and not (run / "meta" / "resumes").exists():
            time.sleep(0.01)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return run


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trains_survives_kill_nine_and_generates(tmp_path: Path, strategy: str, model: str) -> None:
    """Weights, optimizer and log of a run killed in the middle (of a rollout, for grpo) equal the unbroken run's."""
    train(*with_model(tmp_path / "whole", strategy, model))
    whole = run_in(tmp_path / "whole")
    moment = random.Random(f"{strategy} {model}").randint(4, 12)
    broken = killed_and_resumed(with_model(tmp_path / "broken", strategy, model), tmp_path / "broken", [moment])
    assert identity(broken) == identity(whole)
    assert [m["step"] for m in metrics(broken)] == list(range(1, 17))
    said = script(
        ["generate.py", f"ckpt={broken}", "prompt=What is 1 + 1?", "max_tokens=4", "threads=1"], ROOT, environment()
    )
    assert said.returncode == 0 and said.stdout.startswith("What is 1 + 1?"), said.stderr


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapters_train_survive_and_are_all_that_is_saved(tmp_path: Path, strategy: str) -> None:
    """lora=true with every strategy: resumes to the bit; checkpoints hold the adapter, the run its base, the export both."""
    more = ["lora=true", "lora.rank=2"] + (["strategy.sync_interval=null"] if strategy == "grpo" else [])
    train(*with_model(tmp_path / "whole", strategy, "dense", *more))
    whole = run_in(tmp_path / "whole")
    broken = killed_and_resumed(with_model(tmp_path / "broken", strategy, "dense", *more), tmp_path / "broken", [7])
    assert identity(broken) == identity(whole)
    last = broken / "artifacts/checkpoints/last"
    assert not (last / "model.safetensors").exists()
    adapter, base = load_file(last / "adapter.safetensors"), load_file(broken / "artifacts/base/model.safetensors")
    export = load_file(broken / "artifacts/export/model.safetensors")
    assert all(".lora_" in name for name in adapter) and export.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], export[name])}
    assert changed == {name.replace("lora_A", "weight") for name in adapter if name.endswith("lora_A")}
    assert (broken / "artifacts/adapter/adapter_config.json").exists()
    texts = [
        script(
            ["generate.py", f"ckpt={c}", "prompt=ab", "max_tokens=6", "temperature=0", "threads=1"], ROOT, environment()
        )
        for c in (broken, broken / "artifacts/export")
    ]
    assert texts[0].returncode == 0 and texts[0].stdout == texts[1].stdout, texts[0].stderr


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sft run."""
    folder = tmp_path_factory.mktemp("tuned")
    train(*with_model(folder / "runs", "sft", "dense", "model.ffn.hidden=40"))
    return run_in(folder / "runs")


def test_a_run_begins_where_another_ended(tuned: Path, tmp_path: Path) -> None:
    """Architecture, tokenizer and weights come with init_from; the reference is what they were, also after a stop."""
    begin = ["strategy=dpo", f"init_from={tuned}", *tiny(tmp_path / "a", "optimizer.lr=1e-3", "scheduler=constant")]
    begin = [o for o in begin if not o.startswith(("model", "tokenizer"))]
    train(*begin)
    whole = run_in(tmp_path / "a")
    first = metrics(whole)[0]
    assert first["train/rewards/margin"] == pytest.approx(0, abs=1e-6), "the first step's policy is the reference"
    config = json.loads((whole / "artifacts/export/config.json").read_text())
    assert config["model"]["ffn"]["hidden"] == 40
    begin = [o.replace(str(tmp_path / "a"), str(tmp_path / "b")) for o in begin]
    broken = killed_and_resumed(begin, tmp_path / "b", [9])
    assert identity(broken) == identity(whole)


def test_a_reference_that_is_gone_or_another_is_told(tuned: Path, tmp_path: Path) -> None:
    """A resumed dpo run needs the weights it began with, to the bit; an sft run does not."""
    start_of = Path(shutil.copytree(tuned / "artifacts/export", tmp_path / "start"))
    common = [
        o for o in tiny(tmp_path / "r", f"init_from={start_of}", "max_steps=3") if not o.startswith(("model", "tok"))
    ]
    train("strategy=dpo", *[o for o in common if o != "max_steps=16"])
    run = run_in(tmp_path / "r")
    path = start_of / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    (start_of / "manifest.json").unlink()
    done = train(f"resume={run}", "max_steps=5", check=False)
    assert done.returncode == 2 and "is not what this run began with" in done.stderr and done.stderr.count("\n") == 1
    shutil.rmtree(start_of)
    done = train(f"resume={run}", "max_steps=5", check=False)
    assert done.returncode == 2 and "is not there any more: bring it back" in done.stderr


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["model=gpt"], "model comes with init_from="),
        (["tokenizer=char"], "tokenizer comes with init_from="),
        (["model.dimm=3"], "unknown key model.dimm"),
        (["init_from=nowhere"], "init_from=nowhere does not exist"),
        (["lora=true", "lora.rank=0"], "lora.rank=0 should be at least 1"),
        (["lora=true", "lora.targets=[x]"], "lora.targets: x names no linear layer"),
        (["strategy=grpo", "engine.cache_mb=99999999", "engine.max_running=999999"], "lower engine.cache_mb"),
        (
            ["strategy=grpo", "strategy.beta=0.1", "reference=cached"],
            "reference=cached needs completions that are known",
        ),
        (["strategy=grpo", "strategy.sync_interval=2", "strategy.beta=0.1", "lora=true"], "set reference=copy"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(tuned: Path, tmp_path: Path, wrong: list[str], told: str) -> None:
    """Exit code 2, one line, no run left behind."""
    base = [] if any(o.startswith("init_from") for o in wrong) else [f"init_from={tuned}"]
    sft = [] if any(o.startswith("strategy=") for o in wrong) else ["strategy=sft"]
    done = train(*sft, *base, "data.n=60", *wrong, f"runs_dir={tmp_path}/runs", "threads=1", check=False)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list((tmp_path).glob("runs/2*")), "nothing was begun"


def test_a_cached_reference_gives_the_same_run(tmp_path: Path) -> None:
    """Losses as with a copy in memory, a second run reads what the first has written, a resume too."""
    fp32 = ["precision=fp32", "max_steps=6", "save_every=2"]
    overrides = [o for o in with_model(tmp_path / "copy", "dpo") if o not in ("max_steps=16", "save_every=3")] + fp32
    train(*overrides)
    cached = [o.replace(str(tmp_path / "copy"), str(tmp_path / "cached")) for o in overrides] + ["reference=cached"]
    broken = killed_and_resumed(cached, tmp_path / "cached", [3])
    files = list((tmp_path / "cache" / "reference").glob("*.safetensors"))
    before = [(f, f.stat().st_mtime_ns) for f in files]
    assert len(files) == 1
    for a, b in zip(metrics(run_in(tmp_path / "copy")), metrics(broken), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)
    train(*[o.replace(str(tmp_path / "cached"), str(tmp_path / "again")) for o in cached])
    assert [(f, f.stat().st_mtime_ns) for f in files] == before
    assert identity(run_in(tmp_path / "again")) == identity(broken)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_are_one(tmp_path: Path, strategy: str) -> None:
    """One rank with two micro-batches, two ranks with one: the same rollouts, losses and metrics to 1e-5."""
    shape = ["precision=fp32", "max_steps=5", "eval_every=5", "save_every=null"]
    overrides = [
        o for o in with_model(tmp_path / "one", strategy) if not o.startswith(("max_steps", "eval_every", "save_every"))
    ]
    train(*overrides, *shape)
    train(*[o.replace(str(tmp_path / "one"), str(tmp_path / "two")) for o in overrides], *shape, "parallel=ddp")
    one, two = metrics(run_in(tmp_path / "one")), metrics(run_in(tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not name.startswith("perf/") and name != "seconds" and name != "time":
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name


def test_prepared_data_has_to_have_the_models_tokenizer(tuned: Path, tmp_path: Path) -> None:
    """Ids of another vocabulary would train without an error, and mean nothing."""
    rows = [{"prompt": f"What is {i} + {i}?", "completion": str(2 * i)} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizers = {"own": ["tokenizer=file", f"tokenizer.path={tuned}/artifacts/export"], "bpe": ["tokenizer=bpe"]}
    done = {}
    for name, chosen in tokenizers.items():
        to = f"{tmp_path}/{name}.h5"
        prepared = ["prepare.py", f"from={tmp_path}/rows.jsonl", f"to={to}", "kind=chats", *chosen, "progress=none"]
        made = script(prepared, ROOT, environment())
        assert made.returncode == 0, made.stderr
        settings = [
            "data=h5",
            f"data.path={to}",
            "data.layout=packed",
            "data.seq_len=64",
            "max_steps=2",
            "batch_size=4",
        ]
        begin = ["strategy=sft", f"init_from={tuned}", *settings, f"runs_dir={tmp_path}/runs", "threads=1"]
        done[name] = train(*begin, "tracker=jsonl", check=False)
    assert done["own"].returncode == 0, done["own"].stderr
    told = done["bpe"].stderr
    assert done["bpe"].returncode == 2 and "the data has another tokenizer than" in told and told.count("\n") == 1
