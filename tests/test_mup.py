"""muP: nothing changes at the base width, the rules of Yang et al. 2022 beyond it, and all that reads a model honours them."""

import json
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from running import metrics, run_in, tiny, train
from test_convert import call, tokens
from test_engine import BACKENDS, GREEDY, engine, naive
from test_interop import close
from test_lora import SETTINGS, THEIRS, trained
from test_model import made, model_node, small

from etude.config import build
from etude.errors import Refusal
from etude.loop import horizon
from etude.lora import LoRA, adapter_tensors, peft_files
from etude.model import weights
from etude.model.transformer import Transformer
from etude.optim import adamw
from etude.scaling import command, coord

V = 61
RATES = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1, "lr_scale": {"residual": 0.5}}
KINDS = {
    "dense": ("dense",), "gpt": ("gpt",), "moe": ("moe",), "mla": ("dense", "model/attn=mla"), "deepseek_v3": ("deepseek_v3",),
    "gated": ("qwen3", "model.attn.gate=true", "model.logit_cap=3", "model.norm_at=sandwich"),
}  # fmt: skip


def fresh(*overrides: str, seed: int = 0, **changes: Any) -> Transformer:
    """A small model as it is initialised."""
    model = build(model_node(*small(*overrides), "model.init_std=null") | changes, V)
    torch.manual_seed(seed)
    model.init_weights()
    return model


def learn(model: Transformer, steps: int = 3) -> Transformer:
    optimizer = adamw(model, **RATES)
    for step in range(steps):
        ids = tokens(B=2, T=13, seed=step)
        scores, aux = model(ids[:, :-1], ids[:, 1:])
        (-scores.logprob.mean() + (0 if aux is None else aux.loss.mean())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_base_width_nothing_changes(kind: str) -> None:
    """Weights as initialised and after three updates, rates, decay, logits: to the bit, or a base run would have to be repeated."""
    plain, ours = fresh(*KINDS[kind]), fresh(*KINDS[kind], mup=True, mup_base=32)
    for mine, its in ((ours, plain), (learn(ours), learn(plain))):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), its.parameters(), strict=True))
        assert torch.equal(mine(tokens()), its(tokens()))


def test_the_rules_by_hand() -> None:
    """Standard deviation, rate and rate times decay of each matrix at four times the base's width, from the paper's table."""
    base = 0.02 * math.sqrt(768 / 32)
    out, m = 1 / math.sqrt(2 * 2), 4
    hidden, fixed = (base / math.sqrt(m), 1 / m), (base / m, 1 / m)
    constant = (base, 1.0)
    kinds = {
        ("moe", "model.tied=false"): {
            "embed.weight": constant, "head.weight": constant, "attn.q.weight": hidden, "attn.v.weight": hidden, "ffn.gate_up": hidden,
            "attn.out.weight": (hidden[0] * out, 0.5 / m), "ffn.router.weight": fixed, "attn_norm.weight": (0, 1),
        },
        ("gpt",): {"pos_embed.weight": constant, "ffn.up.weight": hidden, "ffn.up.bias": (0, 1), "ffn.out.weight": (hidden[0] * out, 0.5 / m)},
        # MLA's latents and heads are of fixed sizes: from the width to them, and from them to the width
        ("dense", "model/attn=mla"): {"attn.kv_down.weight": fixed, "attn.kv_up.weight": constant, "attn.out.weight": (base * out, 0.5)},
    }  # fmt: skip
    for overrides, wanted in kinds.items():
        model = fresh(*overrides, dim=128, mup=True, mup_base=32)
        groups = adamw(model, **RATES).param_groups
        rate = {id(p): group["lr"] for group in groups for p in group["params"]}
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        seen = set()
        for name, p in model.named_parameters():
            for end, (std, lr) in wanted.items():
                if name.endswith(end):
                    seen.add(end)
                    rounded = "ffn.out" in name  # from the hidden channels, which are whole multiples of 32
                    scale = m * model.base_shapes[name][-1] / p.shape[-1] if rounded else 1
                    if p.dim() > 1:
                        assert p.std().item() == pytest.approx(std * math.sqrt(scale), rel=0.1), name
                        assert decay[id(p)] * rate[id(p)] == pytest.approx(1e-3 * (0.5 if ".out." in end else 1)), name
                    assert rate[id(p)] == pytest.approx(1e-2 * lr * scale), name
        assert seen == wanted.keys()
    assert model.output_scale == 1 / 4


def test_scores_of_attention() -> None:
    """sqrt(base d) / d where heads widen; where there are more of them, or they are MLA's, nothing changes; MLA's YaRN factor stays."""
    wide = fresh("dense", dim=128, mup=True, mup_base=32)
    assert wide.blocks[1].attn.scale == pytest.approx(math.sqrt(8) / 32)
    node = model_node(*small("dense", "model.attn.head_dim=8", "model.attn.n_heads=16")) | {"dim": 128, "mup": True}
    more = build(node | {"mup_base": {"dim": 32, "attn": {"n_heads": 4}}}, V)
    assert more.blocks[0].attn.scale == 8**-0.5
    assert more.base_shapes["blocks.0.attn.out.weight"] == (32, 32)
    plain = build(model_node(*small("dense", "model/attn=mla", "model/attn/rope=yarn")), V)
    ours = build(plain.node | {"dim": 128, "mup": True, "mup_base": 32}, V)
    assert ours.blocks[0].attn.scale == plain.blocks[0].attn.scale


def test_bases_that_cannot_be() -> None:
    """Each refused in one line before torch is imported, or by the part of the base that is impossible."""
    for base, why in {
        "0": "should be the base model's dim",
        "{attn:{n_heads:2}}": "or a mapping with dim",
        "{dim:32,attn:{heads:2}}": r"model.mup_base.attn.heads=2 changes nothing",
        "{dim:32,n_layers:2}": r"model.mup_base.n_layers=2 changes nothing",
        "{dim:32,attn:3}": r"mup_base.attn=3",
    }.items():
        with pytest.raises(Refusal, match=why):
            model_node(*small("dense"), f"model.mup_base={base}")
    with pytest.raises(Refusal, match=r"mup_base=30: of the base model dim=30 is not divisible by n_heads=4"):
        build(model_node(*small("dense"), "model.mup=true", "model.mup_base=30"), V)


# ---------------------------------------------------------------- the coordinate check


@pytest.mark.parametrize("overrides", [["model=moe"], ["model/attn=mla"]], ids=["moe", "mla"])
def test_the_coordinate_check_tells_them_apart(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As typed: muP passes with room, the standard parametrisation fails; a figure is written."""
    shape = ["model.n_layers=1", "model.attn.n_heads=4", "widths=32,64,128", "seeds=1", "steps=3"]
    assert command.main(["coord", *overrides, *shape, f"plot={tmp_path}/c.png"]) == 0
    said = capsys.readouterr().out
    assert "muP passes" in said and "targets" in said.split("standard fails: ")[1]
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_the_coordinate_check_finds_what_is_missing() -> None:
    """muP with one of its rules left out does not pass: rates, the head's factor, the embedding's constant scale."""
    node = model_node(*small("dense"), "model.init_std=null", "model.mup=true", "model.mup_base=32") | {"n_layers": 1}

    def check(spoil: str) -> dict[str, float]:
        def make(width: int) -> tuple[Any, Any]:
            model = build(node | {"dim": width}, V)
            model.init_weights()
            if spoil == "head":
                model.output_scale = 1.0
            if spoil == "embedding":
                model.embed.weight.data *= (32 / width) ** 0.5
            if spoil == "rates":
                model.base_shapes = {}
            return model, adamw(model, **RATES | {"lr": 2e-3, "lr_scale": {}})

        return coord.failing(coord.measure(make, [32, 64, 128], [0], 3, V))

    assert check("") == {}
    assert {"targets"} <= check("head").keys()
    assert {"0 stream"} <= check("rates").keys()
    assert check("embedding")


# ---------------------------------------------------------------- all that reads a model


def wide(*overrides: str, **changes: Any) -> Transformer:
    """A model four times as wide as its base with weights at which logits and attention differ."""
    return made(*overrides, mup=True, mup_base=8, **{"init_std": 1.0} | changes)


@pytest.mark.parametrize("kind", ["dense", "mla", "gated"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_engine_is_the_plain_forward(kind: str, backend: str) -> None:
    """Greedy tokens, with our kernels (also replayed from a tape) and without; and without muP's factors they would differ."""
    model = wide(*KINDS[kind])
    prompts = [row.tolist() for row in tokens(B=2, T=9)]
    found = engine(model, attention=backend).generate(prompts, sampling=GREEDY, max_tokens=12)
    assert [[t.id for t in row.tokens] for row in found] == [naive(model, p, 12) for p in prompts]
    plain = build(model.node | {"mup": False}, V).eval()
    weights.load_model(plain, weights.model_tensors(model))
    assert (plain(tokens()) - model(tokens())).abs().max() > 0.1


def test_saved_and_loaded(tmp_path: Path) -> None:
    """from_pretrained gives the same logits, and an export from before there was muP still loads."""
    model = wide("dense")
    model.save_pretrained(tmp_path / "new")
    assert torch.equal(Transformer.from_pretrained(tmp_path / "new")(tokens()), model(tokens()))
    plain = made("dense")
    plain.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    for key in ("mup", "mup_base"):
        del config["model"][key]
    path.write_text(json.dumps(config))
    assert torch.equal(Transformer.from_pretrained(tmp_path / "old")(tokens()), plain(tokens()))


ARCHITECTURES = [
    ("llama",),
    ("llama", "model.tied=true"),
    ("qwen3",),
    ("gpt2",),
    ("mixtral",),
    ("deepseek_v2",),
    ("deepseek_v3",),
]


@pytest.mark.parametrize("overrides", ARCHITECTURES, ids="-".join)
def test_transformers_computes_the_same(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Other programs have no such factors: the export's weights hold them."""
    transformers = pytest.importorskip("transformers")
    model = wide(*overrides, **({} if overrides[0] != "deepseek_v3" else {"init_std": 0.4}))
    model.save_pretrained(tmp_path / "ours")
    assert call(tmp_path / "ours", tmp_path / "theirs") == 0
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    expected = model(tokens())
    assert expected.std() > 0.1
    close(hf(tokens()).logits, expected, 3e-5)


@THEIRS
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_of_a_wide_model(name: str, dora: bool, tmp_path: Path) -> None:
    """LoRA's rates are LoRA+'s, and peft computes the same with our adapter on our export."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = wide(name)
    model.save_pretrained(tmp_path / "ours")
    assert call(tmp_path / "ours", tmp_path / "out") == 0
    node = SETTINGS | {"dora": dora, "targets": ["*.attn.q", "*.attn.v"]}
    LoRA(**node).apply(model)
    rate = {id(p): group["lr"] for group in adamw(model, **RATES).param_groups for p in group["params"]}
    layer = model.blocks[0].attn.q
    assert rate[id(layer.lora_A)] == pytest.approx(1e-2 / 4) and rate[id(layer.lora_B)] == 1e-2
    trained(model)
    files = peft_files(model, adapter_tensors(model), node, base=str(tmp_path / "out"))
    (tmp_path / "adapter").mkdir()
    weights.write(files["adapter_model.safetensors"], tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(files["adapter_config.json"]))
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tuned = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    close(tuned(tokens()).logits, model(tokens()), 3e-5)


# ---------------------------------------------------------------- FLOPs as a limit


def test_max_flops_ends_a_run(tmp_path: Path) -> None:
    """A model with muP trains until the step that reaches the budget, which is where its schedule ends too."""
    budget = 2.5e8
    train(
        *tiny(tmp_path, model__mup="true", model__mup_base=16, max_steps="null", max_flops=budget, scheduler__warmup=0)
    )
    lines = [line for line in metrics(run_in(tmp_path / "runs")) if "flops" in line]
    assert lines[-1]["flops"] - lines[0]["flops"] < budget <= lines[-1]["flops"]
    assert lines[-1]["lr"] < 0.2 * lines[0]["lr"]


def test_the_horizon_is_the_nearest_limit() -> None:
    settings = {"batch_size": 4, "max_steps": None, "max_epochs": None, "max_tokens": None, "max_flops": 1000.0}
    batches: Any = types.SimpleNamespace(epoch_samples=10, tokens_per_sample=5)
    assert horizon(settings, batches, 1, 7) == 8  # 140 FLOPs a step
    assert horizon(settings | {"max_steps": 3}, batches, 1, 7) == 3
    assert horizon(settings | {"max_flops": None}, batches, 1, 7) is None
