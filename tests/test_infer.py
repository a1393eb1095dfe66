"""What surrounds the engine: models from a folder, the packed twin, and generate.py's files and sessions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import varied_text
from test_engine import CHOICES
from test_model import V, made, model_node, small, uninitialised

from etude import checkpoint
from etude import config as conf
from etude.config import build
from etude.errors import Refusal, StorageFault
from etude.infer import kernels, session
from etude.infer.engine import InferenceEngine, encode_prompt
from etude.infer.load import load
from etude.infer.pack import pack
from etude.infer.sampling import Sampling
from etude.model import weights
from etude.text import tokenizer as tok

NATIVE = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.why_not()}")
ENGINE = {"_target_": "etude.infer.engine.Settings"}


def byte_model() -> tuple[Any, tok.Tokenizer]:
    tokenizer = tok.byte([], [])
    return made("dense", vocab_size=tokenizer.vocab_size), tokenizer


def test_same_seed_same_text() -> None:
    """However the samples are batched."""
    m, tokenizer = byte_model()
    prompts = ["a", "def f", "日本"]
    s = Sampling(temperature=1.0, seed=9)
    first = InferenceEngine(m, tokenizer).generate(prompts, sampling=s, max_tokens=15, n=2)
    assert [c.choice for c in first] == [0, 1] * 3
    assert [c.text for c in first] == [tokenizer.decode(c.ids, skip_special=True).rstrip("\ufffd") for c in first]
    engine = InferenceEngine(m, tokenizer)
    again = [c for p in prompts for c in engine.generate([p], sampling=s, max_tokens=15, n=2)]
    assert [c.ids for c in again] == [c.ids for c in first]
    other = engine.generate(prompts, sampling=Sampling(temperature=1.0, seed=10), max_tokens=15, n=2)
    assert all(a.ids != b.ids for a, b in zip(first, other)) and first[0].ids != first[1].ids


def test_prompts_that_are_empty() -> None:
    """They begin where documents begin."""
    byte = tok.byte([], [])
    assert encode_prompt(byte, "") == [byte.eos] and encode_prompt(byte, "a") == [97]
    char = tok.char(["ab\n"], ["ab\n"], unknown="error")
    assert encode_prompt(char, "") == char.encode("\n")
    assert encode_prompt(tok.char(["ab"], ["ab"], unknown="error"), "") == [0]


# ---------------------------------------------------------------- from a folder


@pytest.mark.parametrize("model", ["dense", "gpt"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_materialize_keeps_ties(model: str, tied: str) -> None:
    """A model from the meta device with loaded tensors: the same logits, one tensor for tied weights, names checked."""
    original = made(model, f"model.tied={tied}")
    tensors = {n: t.clone() for n, t in weights.model_tensors(original).items()}
    assert ("head.weight" in tensors) == (tied == "false")
    with torch.device("meta"):
        m = uninitialised(model, f"model.tied={tied}").eval()
    weights.materialize(m, tensors)
    assert (m.head.weight is m.embed.weight) == (tied == "true")
    assert all(p.device.type == "cpu" and isinstance(p, torch.nn.Parameter) for p in m.parameters())
    ids = torch.arange(12)[None]
    assert torch.equal(m(ids), original(ids))
    with torch.device("meta"):
        fresh = uninitialised(model, f"model.tied={tied}")
    for change in ({"extra": torch.zeros(1)}, {"embed.weight": torch.zeros(2, 2)}):
        with pytest.raises(Refusal, match="the weights do not fit the model"):
            weights.materialize(fresh, tensors | change)
    with pytest.raises(Refusal, match="norm.weight"):
        weights.materialize(fresh, {n: t for n, t in tensors.items() if n != "norm.weight"})


def test_load_needs_the_folder_alone(tmp_path: Path) -> None:
    """Weights, config and tokenizer from an export; a foreign target in it is refused before it is imported."""
    tokenizer = tok.bpe([varied_text(3000)], [], vocab_size=300)
    node = model_node(*small("dense"))
    torch.manual_seed(0)
    original = build(node, tokenizer.vocab_size)
    original.init_weights()
    config = {"format": 2, "step": 3, "vocab_size": tokenizer.vocab_size, "model": node, "seq_len": 32}
    files = {
        "model.safetensors": weights.model_tensors(original),
        "config.json": config,
        "tokenizer.json": tokenizer.to_json(),
    }
    folder = checkpoint.save(tmp_path / "export", files)
    state = torch.get_rng_state()
    for dtype, exact in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        e = load(str(folder), "cpu", dtype, ["etude"], ENGINE)
        m, t = e.model, e.tokenizer
        assert not m.training and t.sha256() == tokenizer.sha256() and weights.read_config(folder) == config
        assert {p.dtype for p in m.parameters()} == {exact}
        assert m.head.weight is m.embed.weight
        if dtype == "fp32":
            assert torch.equal(m(torch.arange(9)[None]), original.eval()(torch.arange(9)[None]))
    assert torch.equal(state, torch.get_rng_state()), "loading initialised the model at random"
    evil = config | {"model": node | {"_target_": "antigravity.fly"}}
    (tmp_path / "evil").mkdir()
    for name in files:
        (tmp_path / "evil" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "evil" / "config.json").write_text(json.dumps(evil))
    with pytest.raises(Refusal, match="antigravity.fly is outside trusted"):
        load(str(tmp_path / "evil"), "cpu", "fp32", ["etude"], ENGINE)
    with pytest.raises(Refusal, match="ckpt=.*nothing does not exist"):
        load(str(tmp_path / "nothing"), "cpu", "fp32", ["etude"], ENGINE)


@pytest.mark.parametrize("native", [pytest.param(True, marks=NATIVE), False], ids=["native", "torch"])
@pytest.mark.parametrize("name", CHOICES)
def test_the_packed_twin_gives_the_same_logits(name: str, native: bool) -> None:
    """One product for q, k and v (and gate and up, and the ways into latents), our kernels, and the model that was packed
    stays itself: names, values, storage, and what is not joined is not there twice."""
    m = made(*CHOICES[name])
    ids = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    held = {n: (p.data_ptr(), p.detach().clone()) for n, p in m.named_parameters()}
    with torch.inference_mode():
        before = m(ids)
        twin = pack(m, torch.float32, None, native)
        scale = max(1.0, before.abs().max().item())
        torch.testing.assert_close(twin(ids) / scale, before / scale, rtol=1e-5, atol=5e-6)
        assert torch.equal(m(ids), before)
    assert {n: p.data_ptr() for n, p in m.named_parameters()} == {n: at for n, (at, _) in held.items()}
    assert all(torch.equal(p, held[n][1]) for n, p in m.named_parameters())
    ours = {p.data_ptr() for p in m.parameters()}
    assert all(p.data_ptr() in ours for p in twin.parameters())
    part = m.blocks[0].attn
    for leaf in part.side_by_side:  # each is really used, from where it was joined
        if part.window == 1 and leaf in ("q", "k"):
            continue  # a position that sees itself alone has nothing to weigh
        layer = part.get_submodule(leaf)
        kept = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.zero_()
        with torch.inference_mode():
            assert not torch.allclose(pack(m, torch.float32, None, native)(ids), before, atol=1e-4), leaf
            torch.testing.assert_close(
                twin(ids) / scale, before / scale, rtol=1e-5, atol=5e-6
            )  # until it is packed again
        with torch.no_grad():
            layer.weight.copy_(kept)


# ---------------------------------------------------------------- generate.py


def options(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A whole config of generate.py on an export in tmp_path."""
    folder = tmp_path / "export"
    if not folder.exists():
        m, tokenizer = byte_model()
        m.save_pretrained(folder, tokenizer)
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        cfg = conf.check(compose("generate", overrides=[f"ckpt={folder}", "max_tokens=6", "threads=1"]), "generate")
    return cfg | changes


def test_a_file_in_a_file_out_and_on_after_a_kill(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One line a sample in the prompts' order; a call that was cut, in the middle of a line too, goes on and ends with the
    file of an unbroken one; a file of other prompts is left alone."""
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(7)))
    cfg = options(tmp_path, file=str(tmp_path / "p.txt"), out=str(tmp_path / "o.jsonl"), n=2, logprobs=0)
    assert session.run(cfg) == 0
    whole = (tmp_path / "o.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [(r["prompt"], r["choice"]) for r in rows] == [(f"prompt {i}", j) for i in range(7) for j in range(2)]
    assert all(r["tokens"] == 6 == len(r["logprobs"]) and r["finish"] == "length" for r in rows)
    lines = whole.splitlines(keepends=True)
    for cut in (b"", lines[0], b"".join(lines[:5]), b"".join(lines[:5]) + lines[5][:9], whole):
        (tmp_path / "o.jsonl").write_bytes(cut)
        assert session.run(cfg) == 0 and (tmp_path / "o.jsonl").read_bytes() == whole
    assert "14 of them from before" in capsys.readouterr().out
    for other in (b'{"prompt": "x", "choice": 0}\n', b"not JSON\n", whole + lines[0]):
        (tmp_path / "o.jsonl").write_bytes(other)
        with pytest.raises(Refusal, match=r"line \d+ is not of this call's prompts"):
            session.run(cfg)
        assert (tmp_path / "o.jsonl").read_bytes() == other
    with pytest.raises(StorageFault, match="could not write out="):
        session.run(cfg | {"out": str(tmp_path / "no" / "o.jsonl")})


def test_options_reach_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Each changes the text, or is refused with a line."""
    cfg = options(tmp_path, prompt="ab", max_tokens=30, stream=False)

    def text(**changes: Any) -> str:
        assert session.run(cfg | changes) == 0
        return capsys.readouterr().out

    plain = text()
    assert text() == plain
    for change in ({"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.2}, {"min_p": 0.5}, {"typical_p": 0.2}, {"seed": 1}):
        assert text(**change) != plain, change
    said = [c for c in text(temperature=0.0).split("\n", 1)[1] if c.isprintable() and c not in "ab\ufffd"][-1]
    for change in (
        {"repetition_penalty": 9.0},
        {"presence_penalty": 9.0},
        {"frequency_penalty": 9.0},
        {"stop": [said]},
    ):
        assert text(temperature=0.0, **change) != text(temperature=0.0), change
    assert text(regex="[xyz]{12}").split("\n")[1].removeprefix("ab").strip("xyz") == ""
    made = json.loads(text(json_schema='{"enum": ["one", 2]}').split("\n")[1].removeprefix("ab"))
    assert made in ("one", 2)
    for wrong, line in (
        ({"n": 0}, "n=0 should be at least 1"),
        ({"file": "x"}, "both say what to begin with"),
        ({"regex": "a", "json_schema": "{}"}, "both say what the text must be"),
        ({"json_schema": "/nothing"}, "neither a JSON schema nor a file"),
        ({"system": "x"}, "type chat=true"),
        ({"top_p": 2.0}, "top_p=2.0 should be"),
    ):
        with pytest.raises(Refusal, match=line):
            session.run(cfg | wrong)
