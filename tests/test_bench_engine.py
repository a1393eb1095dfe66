"""bench.py what=engine: what it times is the same work on all sides, what it counts is counted right, and what cannot be timed
is refused in one line."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from test_model import made

from etude import bench
from etude import config as conf
from etude.bench_engine import Job, cache_bytes, ours, weight_bytes
from etude.errors import Refusal
from etude.infer import kernels
from etude.infer.engine import InferenceEngine, Settings
from etude.text import tokenizer as tok

NATIVE = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.why_not()}")
QUICK = """threads=1 dtype=fp32 rounds=1 decode_tokens=40 decode_batches=[3] requests=3 prompt_lengths=[5,30] new_lengths=[2,4]
    prefix_tokens=64 prompt_tokens=32""".split()


def run(*overrides: str) -> None:
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        cfg = compose("bench", overrides=["what=engine", "parallel.device=cpu", *QUICK, *overrides])
    assert bench.run(conf.check(cfg, "bench")) == 0


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`export(model, ...)`: the folder of a tiny model."""

    def write(*args: str) -> Path:
        folder = tmp_path_factory.mktemp("export")
        model = made(*args, "model.max_len=128")
        model.save_pretrained(folder, tok.ids([], [], vocab_size=model.vocab_size))
        return folder

    return write


def test_transformers_takes_turns(export: Callable[..., Path], capsys: Any) -> None:
    """Both sides make the same tokens in fp32, every rate is one of something, and its ratio that of the two rates."""
    run(f"ckpt={export('dense')}")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["same_tokens_as_transformers"] == 40
    for measure, who in [
        *((m, "transformers") for m in ("decode", "prompt", "batch_3")),
        ("requests", "generate_batch"),
        ("requests", "padded_generate"),
    ]:
        mine, theirs = (found[f"{w}{measure}_tokens_per_s"] for w in ("", f"{who}_"))
        ratio = found[f"{measure}_ratio_to_{who}"]
        assert all(math.isfinite(x) and x > 0 for x in (mine, theirs, ratio))
        assert ratio == pytest.approx(mine / theirs), (measure, who)
    assert found["bandwidth_share"] == pytest.approx(
        found["mb_per_token"] * found["decode_tokens_per_s"] / found["read_gb_per_s"] / 1000
    )
    assert found["prefix_ratio"] == pytest.approx(found["first_request_ms"] / found["second_request_ms"])
    assert len(found["generate_batch_best_of"]) > 1 and len(found["padded_generate_best_of"]) > 1


@NATIVE
def test_alone_with_settings_of_the_engine(export: Callable[..., Path], capsys: Any) -> None:
    """Without a peer there is no ratio, and engine.* reaches the engine."""
    run(f"ckpt={export('moe')}", "peer=none", "engine.quant=int8", "dtype=bf16")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["quant"] == "int8" and found["dtype"] == "bf16" and found["decode_tokens_per_s"] > 0
    assert not [name for name in found if "_ratio_to_" in name or "transformers" in name]


def test_what_is_counted() -> None:
    """Tokens after the first of every prompt, and a shared beginning is not computed again unless it was forgotten."""
    engine = InferenceEngine(made("dense"), tok.ids([], [], vocab_size=61), Settings(page_size=4, step_tokens=8))
    job = Job([[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 4]], [3, 6])
    assert job.tokens == 20
    done = ours(engine, *job)
    assert [len(i) for i in done.ids] == job.new and 0 < done.first < done.seconds
    assert 0 < done.later <= 7  # the short prompt's first tokens may come before the long one's
    before = engine.stats()["computed_tokens"]
    assert ours(engine, [job.prompts[0] + [3]], [1], forget=False).later == 0
    assert engine.stats()["computed_tokens"] - before == 1
    before = engine.stats()["computed_tokens"]
    ours(engine, [job.prompts[0] + [3]], [1])
    assert engine.stats()["computed_tokens"] - before == 10


@pytest.mark.parametrize("model", ["dense", "moe", "gpt", "deepseek_v2"])
def test_bytes_are_those_of_the_parameters_that_a_token_meets(model: str) -> None:
    """Against the model's own count of active parameters, which others' counts are held against elsewhere."""
    m = made(model)
    engine = InferenceEngine(m, tok.ids([], [], vocab_size=m.vocab_size), Settings(attention="views"))
    assert weight_bytes(engine) == pytest.approx(4 * m.n_active())
    shapes = [a.cache_shape() for a in m.attentions()]
    assert cache_bytes(engine, 10) == 40 * sum(heads * (dk + dv) for heads, dk, dv in shapes)


@NATIVE
def test_int8_bytes_are_those_of_the_kernels() -> None:
    """A linear layer's weights and scales as kernels.quantize makes them; norms and the embedding stay as they are."""
    m = made("dense", "model.tied=false").to(torch.bfloat16)
    engine = InferenceEngine(m, tok.ids([], [], vocab_size=m.vocab_size), Settings(quant="int8"))
    linear = [x.weight for x in m.modules() if isinstance(x, torch.nn.Linear)]
    small = sum(t.nbytes for w in linear for t in kernels.quantize(w)[:2])
    rest = sum(p.nbytes for p in m.parameters() if p.dim() == 1)
    assert weight_bytes(engine) == small + rest


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("peer=none", "type ckpt="),
        ("ckpt=gone", "gone"),
        ("ckpt=TINY gguf=gone.gguf", "gguf=gone.gguf is no file"),
        ("ckpt=TINY peer=none prefix_tokens=900", "type a smaller prefix_tokens"),
        ("ckpt=TINY peer=none prompt_lengths=[100,126]", "type a smaller prompt_lengths"),
        ("ckpt=TINY peer=none decode_batches=[0]", "decode_batches=[0]"),
        ("ckpt=TINY peer=none decode_batches=[8] engine.max_running=4", "engine.max_running=4"),
        ("ckpt=TINY peer=none requests=300", "engine.max_waiting=300"),
        ("ckpt=TINY peer=none prompt_lengths=[3]", "prompt_lengths=[3]"),
        ("ckpt=POST", "type peer=none"),
        ("ckpt=TINY what=train", "what=engine"),
        ("ckpt=TINY compare=true", "compare="),
        ("ckpt=TINY parallel=ddp parallel.device=cpu parallel.nproc=2", "parallel=single"),
    ],
)
def test_bad_input_is_one_line(overrides: str, said: str, export: Callable[..., Path]) -> None:
    """Each with what to type instead, before anything long begins."""
    if "POST" in overrides:
        overrides = overrides.replace("POST", str(export("dense", "model.norm_at=post")))
    with pytest.raises(Refusal) as error:
        run(*overrides.replace("TINY", str(export("dense"))).split())
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["transformers", "llama_cpp"])
def test_a_missing_peer_is_named_with_its_install_command(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Refusal, match="pip install"):
        run(f"ckpt={tmp_path}", f"gguf={tmp_path / 'x.gguf'}")
