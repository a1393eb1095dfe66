"""LoRA and DoRA: what a layer computes is the formula and PEFT's, nothing else is trained, and what is merged, saved, loaded,
generated with or given to PEFT is the same model."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from paged import Rows
from test_engine import GREEDY, engine, ragged
from test_engine import naive as uncached
from test_interop import close, convert_to, ids, theirs
from test_model import made, tokens
from torch import Tensor, nn

from etude.config import CONF, build, check
from etude.errors import Refusal
from etude.lora import (
    Base,
    LoRA,
    adapter_tensors,
    base_tensors,
    load_adapter,
    merged,
    peft_files,
    trainable,
)
from etude.model import adapted, parts, roles, weights
from etude.model.adapted import Adapted
from etude.model.transformer import Transformer
from etude.optim import adamw
from etude.strategy.grpo import tempered

SETTINGS: dict[str, Any] = {
    "rank": 3,
    "alpha": 5.0,
    "dropout": 0.0,
    "targets": ["blocks.*"],
    "dora": False,
    "rslora": False,
}
KINDS = {"lora": {}, "dora": {"dora": True}, "rslora": {"rslora": True}}


def lora(**changes: Any) -> LoRA:
    return LoRA(**SETTINGS | changes)


def trained(model: nn.Module, seed: int = 5) -> Any:
    """As after some steps: B is not zero any more, and DoRA's magnitudes have moved."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(std=0.3, generator=draw)
            elif name.endswith("lora_magnitude"):
                p.mul_(1 + 0.2 * torch.randn(p.shape, generator=draw))
    return model


def adapted_model(*choice: str, seed: int = 0, **changes: Any) -> Transformer:
    model = made(*(choice or ("dense",)), seed=seed)
    lora(**changes).apply(model)
    return trained(model).eval()


def layer(dora: bool, bias: bool = True, dropout: float = 0.0) -> Adapted:
    torch.manual_seed(3)
    made: Any = nn.Linear(7, 5, bias=bias)
    Adapted.turn(made, rank=2, scale=1.5, dropout=dropout, dora=dora)
    return trained(made)


def formula(of: Adapted, x: Tensor) -> Tensor:
    """With the whole matrix, as the papers write it."""
    v = of.weight + of.scale * of.lora_B @ of.lora_A
    if of.lora_magnitude is not None:
        v = of.lora_magnitude[:, None] * v / v.detach().square().sum(1, keepdim=True).sqrt()
    return x @ v.T + (0 if of.bias is None else of.bias)


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_is_the_formula(dora: bool, bias: bool) -> None:
    """Output, and gradients of the input and of everything trained, for several shapes of input."""
    for shape in ((4, 7), (2, 3, 7)):
        ours = layer(dora, bias)
        x = torch.randn(shape, requires_grad=True)
        direction = torch.randn(*shape[:-1], 5)
        names = [n for n in adapted.NAMES if getattr(ours, n) is not None]
        inputs = [x, *(getattr(ours, n) for n in names)]
        y, expected = ours(x), formula(ours, x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        found = torch.autograd.grad((y * direction).sum(), inputs)
        wanted = torch.autograd.grad((expected * direction).sum(), inputs)
        for name, a, b in zip(["x", *names], found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(F.linear(x, ours.merged(), ours.bias), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_only_in_training(dora: bool) -> None:
    """One mask a call, drawn from torch's generator, on the input of what was trained; the frozen product sees all of it."""
    ours, x = layer(dora, dropout=0.4), torch.randn(6, 7)
    ours.eval()
    torch.testing.assert_close(ours(x), formula(ours, x), rtol=1e-5, atol=1e-6)
    ours.train()
    torch.manual_seed(8)
    y = ours(x)
    torch.manual_seed(8)
    kept = parts.dropout(x, 0.4, True)
    assert (kept == 0).any()
    plain = F.linear(x, ours.weight, ours.bias)
    torch.testing.assert_close(y, plain + formula(ours, kept) - F.linear(kept, ours.weight, ours.bias))
    torch.manual_seed(9)
    assert not torch.equal(ours(x), y)


@pytest.mark.parametrize("dora", [False, True])
def test_autocast(dora: bool) -> None:
    """bf16 products on fp32 masters: the layer gives bf16 and its gradients are fp32, near the exact ones."""
    ours, x = layer(dora), torch.randn(50, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), formula(ours, x), rtol=0.03, atol=0.03)
    y.float().square().sum().backward()
    names = [n for n in adapted.NAMES if getattr(ours, n) is not None]
    exact = torch.autograd.grad(formula(ours, x).square().sum(), [getattr(ours, n) for n in names])
    for name, grad in zip(names, exact):
        found = getattr(ours, name).grad
        assert found.dtype == torch.float32
        assert (found - grad).norm() < 0.03 * grad.norm(), name


def test_a_row_of_zeros_stays_finite() -> None:
    """Pruned weights have rows of length 0, by which DoRA would divide."""
    ours: Any = nn.Linear(4, 3)
    ours.weight.data[1] = 0
    Adapted.turn(ours, rank=2, scale=1.0, dropout=0.0, dora=True)
    x = torch.randn(5, 4)
    torch.testing.assert_close(ours(x), F.linear(x, ours.weight, ours.bias))
    ours(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in (ours.lora_A, ours.lora_B, ours.lora_magnitude))


def test_merging_low_precision_weights_is_done_in_fp32() -> None:
    ours: Any = nn.Linear(7, 5).to(torch.bfloat16)
    Adapted.turn(ours, rank=2, scale=1.5, dropout=0.0, dora=True)
    trained(ours)
    assert ours.lora_A.dtype == torch.float32
    exact = ours.weight.double() + 1.5 * ours.lora_B.double() @ ours.lora_A.double()
    exact *= (ours.lora_magnitude.double() / exact.norm(dim=1))[:, None]
    assert torch.equal(ours.merged(), exact.to(torch.bfloat16))


# ---------------------------------------------------------------- a model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", [("dense",), ("moe",), ("deepseek_v3",), ("gpt",)], ids=lambda c: c[0])
def test_to_begin_with_nothing_changes(choice: tuple[str, ...], kind: str) -> None:
    """Bit for bit; under the same names; every linear layer of the blocks but the router."""
    model, plain = made(*choice), made(*choice)
    n = lora(**KINDS[kind]).apply(model)
    assert torch.equal(model(tokens()), plain(tokens()))
    layers = [m for name, m in plain.named_modules() if isinstance(m, nn.Linear) and "router" not in name]
    assert n == len(layers) - 1 == len(adapted.layers(model))  # without the head
    assert dict(plain.named_parameters()).keys() == base_tensors(model).keys()
    assert all(p.requires_grad == adapted.is_adapter(name) for name, p in model.named_parameters())
    assert trainable(model) == sum(t.numel() for t in adapter_tensors(model).values())


def test_first_values() -> None:
    """A uniform in +-1/sqrt(in) from torch's generator, as PEFT's; B zero; magnitudes the lengths of W's rows. Initialising
    the adapted model again leaves them so."""
    model = made("dense")
    torch.manual_seed(11)
    lora(rank=16, dora=True).apply(model)
    first = adapter_tensors(model)
    torch.manual_seed(11)
    drawn = torch.empty(16, 32)
    nn.init.uniform_(drawn, -(32**-0.5), 32**-0.5)
    assert torch.equal(first["blocks.0.attn.q.lora_A"], drawn)
    model.init_weights()
    for name, layer in adapted.layers(model).items():
        assert (
            layer.lora_A.abs().max() <= layer.in_features**-0.5 and layer.lora_A.std() > 0.5 * layer.in_features**-0.5
        )
        assert not layer.lora_B.any(), name
        torch.testing.assert_close(layer.lora_magnitude, layer.weight.norm(dim=1))


@pytest.mark.parametrize("choice", ["dense", "moe", "deepseek_v3"])
def test_only_adapters_train(choice: str) -> None:
    """Of the optimizer's parameters and of what a few steps change; a router's bias, which `balance` moves, is frozen too."""
    extra = ["model.ffn.bias_rate=0.1"] if choice == "moe" else []
    model = made(choice, *extra)
    lora(dora=True).apply(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = adamw(model, lr=0.01, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.1, lr_scale={"lora_B": 16.0})
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == trainable(model)
    model.train()
    losses = []
    for _ in range(5):
        scores, aux = model(tokens()[:, :-1], targets=tokens()[:, 1:])
        loss = -scores.logprob.mean() + (0 if aux is None else aux.loss.mean())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if aux is not None:
            model.balance(aux.load)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == adapter_tensors(model).keys()


def test_activation_checkpoints_change_no_gradient() -> None:
    """Though nothing that enters the first block requires one; with the same dropout the second time."""
    found = []
    for kept in (False, True):
        model = made("dense", checkpoint=kept)
        lora(dropout=0.3).apply(model)
        trained(model).train()
        torch.manual_seed(2)
        (-model(tokens(), targets=tokens(seed=2))[0].logprob.sum()).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(g, found[1][n]) for n, g in found[0].items())


def test_roles() -> None:
    """Matrices of adapters decay and have rates of their own (LoRA+), in layers named `out` too; magnitudes do not decay."""
    model = made("dense")
    lora(dora=True).apply(model)
    found = {n: roles.role(n, p) for n, p in model.named_parameters() if adapted.is_adapter(n)}
    assert {n.rpartition(".")[2]: r for n, r in found.items()} == {
        "lora_A": "lora_A",
        "lora_B": "lora_B",
        "lora_magnitude": "vector",
    }
    optimizer = adamw(model, lr=0.1, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.1, lr_scale={"lora_B": 16.0})
    assert sorted((g["weight_decay"], g["base_lr"]) for g in optimizer.param_groups) == [
        (0.0, 0.1),
        (0.1, 0.1),
        (0.1, pytest.approx(1.6)),
    ]


# ---------------------------------------------------------------- which layers


@pytest.mark.parametrize(
    "choice, targets, expected",
    [
        ("dense", ["*.attn.q", "*.attn.v"], {"attn.q", "attn.v"}),
        ("dense", ["blocks.*.ffn.*"], {"ffn.gate", "ffn.up", "ffn.out"}),
        ("dense", ["*.q", "blocks.0.attn.*", "*.attn.q"], {"attn.q", "attn.k", "attn.v", "attn.out"}),
        ("moe", ["*.ffn.*"], {"ffn.shared.gate", "ffn.shared.up", "ffn.shared.out"}),
        ("deepseek_v2", ["*.kv_up", "*.kv_down"], {"attn.kv_up", "attn.kv_down"}),
    ],
)
def test_targets(choice: str, targets: list[str], expected: set[str]) -> None:
    model = made(choice)
    n = lora(targets=targets).apply(model)
    found = adapted.layers(model)
    assert {name.split(".", 2)[2] for name in found} == expected and n == len(found)


@pytest.mark.parametrize(
    "choice, pattern, said",
    [
        (
            "dense",
            "q_proj",
            "lora.targets: q_proj names no linear layer that can have an adapter; there is: blocks.*.attn.q",
        ),
        ("dense", "head", "(head is the head)"),
        ("dense", "*norm", "(blocks.0.attn_norm is a RMSNorm)"),
        ("dense", "embed", "(embed is a Embedding)"),
        ("moe", "*.router", "(blocks.0.ffn.router is a router)"),
        ("moe", "*.gate_up", "(blocks.0.ffn.gate_up holds the matrices of all experts in one tensor)"),
        ("mixtral", "*.ffn.*", "(blocks.0.ffn.gate_up holds the matrices of all experts in one tensor)"),
    ],
)
def test_targets_that_are_refused(choice: str, pattern: str, said: str) -> None:
    """Before anything is changed, with what the pattern names instead and with the names that there are."""
    model = made(choice)
    with pytest.raises(Refusal) as refused:
        lora(targets=["blocks.*", pattern]).apply(model)
    assert said in str(refused.value) and "blocks.*.attn.out" in str(refused.value) and "\n" not in str(refused.value)
    assert not adapted.layers(model) and all(p.requires_grad for n, p in model.named_parameters() if "bias" not in n)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_of_ones_own_that_derives_from_linear_is_left_alone() -> None:
    """Its forward may be another one."""
    model = made("dense")
    model.blocks[0].attn.q.__class__ = Twice
    with pytest.raises(Refusal, match="blocks.0.attn.q is a Twice"):
        lora(targets=["blocks.0.attn.q"]).apply(model)
    assert lora().apply(model) == 13 and type(model.blocks[0].attn.q) is Twice


def test_adapters_on_adapters_are_refused() -> None:
    with pytest.raises(Refusal, match="has adapters already"):
        lora().apply(adapted_model())


@pytest.mark.parametrize(
    "override, said",
    [
        ("lora.rank=0", "lora.rank=0 should be at least 1"),
        ("lora.alpha=0", "lora.alpha=0 should be above 0"),
        ("lora.alpha=inf", "lora.alpha=inf should be above 0"),
        ("lora.dropout=1", "lora.dropout=1 should be at least 0 and below 1"),
        ("lora.targets=[]", "lora.targets=[] should be patterns"),
        ("lora.targets=q", "lora.targets=q should be"),
        ("lora.dora=1", "lora.dora=1 should be"),
        ("lora.rank=2.5", "lora.rank=2.5 should be"),
    ],
)
def test_settings_that_are_refused(override: str, said: str) -> None:
    """Before torch is imported, in one line that names the key."""
    with pytest.raises(Refusal) as refused, initialize_config_dir(str(CONF), version_base="1.3"):
        check(compose("train", overrides=["lora='true'", override]), "train")
    assert said in str(refused.value)


def test_choices() -> None:
    """conf/lora: every choice builds, and its patterns fit every model, with and without shared experts."""
    choices = {p.stem for p in (CONF / "lora").glob("*.yaml")}
    assert choices == {"true", "dora"}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for choice in choices:
            node = check(compose("train", overrides=[f"lora='{choice}'", "lora.targets=[*.attn.*]"]), "train")["lora"]
            assert node["dora"] == (choice == "dora") and node["targets"] == ["*.attn.*"]
            node = check(compose("train", overrides=[f"lora='{choice}'"]), "train")["lora"]
            for model in ("dense", "gpt", "moe", "mixtral", "deepseek_v2"):
                assert build(node).apply(made(model)) >= 8


# ---------------------------------------------------------------- the reference for free


@pytest.mark.parametrize("choice", ["dense", "moe"])
def test_base_is_the_model_without_its_adapters(choice: str) -> None:
    """Scores bit for bit, with packed documents too; without gradients and dropout, and with the adapters and the training
    mode left as they were; also of a model that is wrapped, and with a temperature laid over it."""
    plain = made(choice)
    model = made(choice)
    lora(dropout=0.5, dora=True).apply(model)
    trained(model).train()
    wrapped = nn.Module()
    wrapped.module = model
    doc_ids = torch.repeat_interleave(torch.tensor([0, 1, -1]), torch.tensor([9, 8, 3]))[None].expand(3, -1)
    plain.eval()
    for ref in (Base(model), Base(wrapped)):
        with torch.no_grad():
            expected, _ = plain(tokens(), targets=tokens(seed=2), doc_ids=doc_ids)
        scores, _ = ref(tokens(), targets=tokens(seed=2), doc_ids=doc_ids)
        assert torch.equal(scores.logprob, expected.logprob) and not scores.logprob.requires_grad
        assert model.training and all(m.enabled and m.training for m in adapted.layers(model).values())
        with torch.no_grad(), tempered(plain, 0.7):
            expected, _ = plain(tokens(), targets=tokens(seed=2))
        with tempered(ref, 0.7):
            scores, _ = ref(tokens(), targets=tokens(seed=2))
        assert torch.equal(scores.logprob, expected.logprob)
        assert torch.equal(ref(tokens()), plain(tokens()))  # the temperature is gone
    model.eval()
    assert not torch.allclose(model(tokens()), plain(tokens()), atol=1e-2)
    Base(model)(tokens())
    assert not model.training


def test_a_failing_forward_leaves_the_adapters_on() -> None:
    model = adapted_model()
    with pytest.raises(IndexError):
        Base(model.train())(torch.full((1, 3), 10**6))
    assert model.training and all(m.enabled for m in adapted.layers(model).values())


# ---------------------------------------------------------------- merged, saved, loaded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", [("dense",), ("moe",), ("deepseek_v3",), ("gpt",)], ids=lambda c: c[0])
def test_merged(choice: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    """A plain model that computes the same, beside the adapted one; written and read as any other; and what `join` makes
    of the base's and the adapter's tensors."""
    model = adapted_model(*choice, **KINDS[kind])
    expected = model(tokens())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    twin = merged(model)
    tolerance = 1e-6 * float(expected.detach().abs().max())
    torch.testing.assert_close(twin(tokens()), expected, rtol=1e-6, atol=3 * tolerance)
    assert not adapted.layers(twin) and all(type(m) is not Adapted for m in twin.modules())
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in made(*choice).named_parameters()]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and len(adapted.layers(model))
    assert torch.equal(model(tokens()), expected) and trainable(model) == sum(
        p.numel() for n, p in model.named_parameters() if adapted.is_adapter(n)
    )
    twin.save_pretrained(tmp_path)
    assert torch.equal(Transformer.from_pretrained(tmp_path)(tokens()), twin(tokens()))
    joined = made(*choice)
    trains = [p.requires_grad for p in joined.parameters()]
    weights.load_model(joined, base_tensors(model))
    lora(**KINDS[kind]).join(joined, adapter_tensors(model))
    for (name, a), (_, b) in zip(joined.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [p.requires_grad for p in joined.parameters()] == trains


@pytest.mark.parametrize("kind", KINDS)
def test_resume(kind: str) -> None:
    """The base made anew, adapters with the saved tensors: bit for bit, and other tensors are refused."""
    model = adapted_model("moe", **KINDS[kind])
    again = made("moe")
    lora(**KINDS[kind]).apply(again)
    saved = adapter_tensors(model)
    load_adapter(again, saved)
    assert torch.equal(again(tokens()), model(tokens()))
    name = "blocks.0.attn.q.lora_B"
    for tensors, said in (
        ({n: t for n, t in saved.items() if n != name}, f"{name} is only in the model"),
        (saved | {"x.lora_A": saved[name]}, "x.lora_A is only in the file"),
        (saved | {name: saved[name][:, :2]}, f"{name} is (32, 2) in the file and should be (32, 3)"),
    ):
        plain = made("moe")
        for attempt in (
            lambda t=tensors: load_adapter(again, t),
            lambda t=tensors, m=plain: lora(**KINDS[kind]).join(m, t),
        ):
            with pytest.raises(Refusal) as refused:
                attempt()
            assert said in str(refused.value)
    assert torch.equal(again(tokens()), model(tokens()))


def test_a_checkpoint_is_read_merged(tmp_path: Path) -> None:
    """From the run's base and the checkpoint's adapter; in bf16 too, where the merging is still done in fp32."""
    model = adapted_model("moe", dora=True)
    artifacts, folder = tmp_path / "artifacts", tmp_path / "artifacts" / "checkpoints" / "step_00000001"
    made("moe").save_pretrained(artifacts / "base")
    folder.mkdir(parents=True)
    weights.write(adapter_tensors(model), folder / "adapter.safetensors")
    config = weights.read_json(artifacts / "base", "config.json")
    node = {"_target_": "etude.lora.LoRA"} | SETTINGS | {"dora": True}
    (folder / "config.json").write_text(json.dumps(config | {"lora": node}))
    found = Transformer.from_pretrained(folder)
    torch.testing.assert_close(found(tokens()), merged(model)(tokens()), rtol=1e-5, atol=1e-5)
    small = Transformer.from_pretrained(folder, dtype=torch.bfloat16).blocks[0].attn.q.weight
    assert torch.equal(small, found.blocks[0].attn.q.weight.bfloat16())


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    "choice",
    [("dense",), ("moe",), ("dense", "model/attn=mla"), ("deepseek_v3",), ("gpt",)],
    ids=["dense", "moe", "mla", "mla_q_lora", "gpt"],
)
def test_engine(choice: tuple[str, ...], kind: str) -> None:
    """The engine generates with the adapters, token for token as the plain forward, and takes their new values at a
    refresh; the model that it wraps goes on training them."""
    model = adapted_model(*choice, **KINDS[kind])
    prompts = ragged(random.Random(4), [9, 3, 14])
    e = engine(model)
    first = [c.ids for c in e.generate(prompts, sampling=GREEDY, max_tokens=10)]
    assert first == [uncached(model, p, 10) for p in prompts]
    with adapted.disabled(model):
        assert first != [uncached(model, p, 10) for p in prompts]
    trained(model, seed=6)
    e.refresh()
    second = [c.ids for c in e.generate(prompts, sampling=GREEDY, max_tokens=10)]
    assert second == [uncached(model, p, 10) for p in prompts] != first
    model(tokens()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_absorbed_products_have_the_adapter_in_them(kind: str) -> None:
    """MLA multiplies by the halves of its up-projection itself where there is a cache."""
    model = adapted_model("dense", "model/attn=mla", targets=["*.kv_up"], **KINDS[kind])
    row = tokens(1, 12)[0]
    with torch.no_grad():
        found = torch.cat([Rows(model, 1, 12).logits([row])[0]])
        torch.testing.assert_close(found, model(row[None])[0], rtol=1e-5, atol=1e-5)
        with adapted.disabled(model):
            assert not torch.allclose(found, model(row[None])[0], atol=1e-2)


# ---------------------------------------------------------------- PEFT


EVERY, ATTN = ["blocks.*"], ["*.attn.*"]
PEFT = [(case, kind, EVERY) for case in ("llama-bias", "qwen3", "gpt2") for kind in ("lora", "dora")]
PEFT += [(case, "dora", ATTN) for case in ("qwen3_moe-every-2nd", "deepseek_v2", "deepseek_v3")]
PEFT += [("mixtral", "lora", EVERY), ("llama", "rslora", ["*.attn.q", "blocks.1.ffn.up"])]
PEFT += [("gpt2", "rslora", EVERY), ("gpt2", "dora", ["*.attn.q", "*.attn.v", "blocks.2.ffn.up"])]


def imported(case: str, folder: Path) -> Transformer:
    """A random model of transformers in folder/hf, as ours in folder/base, exported again to folder/out."""
    theirs(case).save_pretrained(folder / "hf")
    convert_to(folder / "hf", folder / "base")
    convert_to(folder / "base", folder / "out")
    return Transformer.from_pretrained(folder / "base")


THEIRS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft with transformers


@THEIRS
@pytest.mark.parametrize("case, kind, targets", PEFT, ids=["-".join((c, k, str(len(t)))) for c, k, t in PEFT])
def test_peft(case: str, kind: str, targets: list[str], tmp_path: Path) -> None:
    """peft loads our files on the exported base and computes our logits, has our gradients, and merges into our merged
    model."""
    import peft
    import transformers

    model = imported(case, tmp_path)
    node = SETTINGS | KINDS[kind] | {"targets": targets}
    LoRA(**node).apply(model)
    trained(model)
    files = peft_files(model, adapter_tensors(model), node, base=str(tmp_path / "out"))
    (tmp_path / "adapter").mkdir()
    weights.write(files.pop("adapter_model.safetensors"), tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(files.pop("adapter_config.json")))
    assert not files

    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = model(ids())
    assert not torch.allclose(hf(ids()).logits, expected, atol=1e-2)
    tuned = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter", is_trainable=True).eval()
    close(tuned(ids()).logits, expected)

    tuned(ids()).logits.square().mean().backward()
    expected.square().mean().backward()
    found = {n.replace(".default", ""): p.grad for n, p in tuned.named_parameters() if p.requires_grad}
    ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    wanted = peft_files(model, ours, node)["adapter_model.safetensors"]
    found = {n.removesuffix(".weight") if "magnitude" in n else n: g for n, g in found.items()}
    assert found.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, grad in wanted.items():
        there = grad != 0 if "lora_B" in name else torch.ones_like(grad, dtype=torch.bool)  # blocks on a diagonal
        if "c_attn.lora_magnitude" in name and targets != EVERY:
            there[32:64] = False  # of k, which has no adapter of ours
        torch.testing.assert_close(
            found[name][there], grad[there], rtol=1e-4, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )

    plain = tuned.merge_and_unload()
    close(plain(ids()).logits, merged(model)(ids()))


@THEIRS
def test_peft_writes_the_same_file(tmp_path: Path) -> None:
    """What peft itself saves of the adapter that it loaded has our names, shapes and numbers."""
    import peft
    import transformers

    model = imported("llama", tmp_path)
    node = SETTINGS | {"dora": True, "targets": ATTN}
    LoRA(**node).apply(model)
    files = peft_files(trained(model), adapter_tensors(model), node)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5.0, use_dora=True, target_modules=names, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), config)
    state = files["adapter_model.safetensors"]
    peft.set_peft_model_state_dict(tuned, state)
    tuned.save_pretrained(tmp_path / "theirs")
    saved = weights.tensors(tmp_path / "theirs", "adapter_model")
    assert saved.keys() == state.keys() and all(torch.equal(saved[n], t) for n, t in state.items())
    written = weights.read_json(tmp_path / "theirs", "adapter_config.json")
    for key in files["adapter_config.json"].keys() - {"base_model_name_or_path"}:
        value, found = files["adapter_config.json"][key], written[key]
        assert (sorted(found) if isinstance(found, list) else found) == value, key


def test_adapters_that_peft_cannot_have(tmp_path: Path) -> None:
    """One reason each: no architecture has the model; peft takes dense parts' layers for experts' where there are experts."""
    model = adapted_model("dense", "model/attn=gated")
    with pytest.raises(Refusal, match="model.attn.gate=true"):
        peft_files(model, adapter_tensors(model), SETTINGS)
    model = adapted_model("deepseek_v3")
    with pytest.raises(Refusal, match=r"mlp.gate_proj cannot be .* lora.targets=\[\*.attn.\*\] can"):
        peft_files(model, adapter_tensors(model), SETTINGS)
