"""Schedules against their formulas, optimizer groups."""

import math

import pytest
import torch
from test_model import MODELS, made, tokens, uninitialised
from torch import nn

from etude import schedule
from etude.errors import Refusal
from etude.model.roles import ROLES, role
from etude.optim import adamw, set_lr

STEPS, WARMUP = 1000, 100


def rates(f, **settings) -> list[float]:
    return [f(s, STEPS, 50.0, warmup=WARMUP, **settings) for s in range(STEPS)]


ALL = {
    "constant": (schedule.constant, {}),
    "linear": (schedule.linear, {"min_rate": 0.1}),
    "cosine": (schedule.cosine, {"min_rate": 0.1}),
    "sgdr": (schedule.sgdr, {"min_rate": 0.1, "cycle": 100, "t_mult": 2.0}),
    "wsd": (schedule.wsd, {"min_rate": 0.1, "decay": 0.2}),
    "step": (schedule.step, {"every": 2.0, "gamma": 0.5}),
}


@pytest.mark.parametrize("name", ALL)
def test_warm_up_rises_in_a_line_from_above_zero(name: str) -> None:
    """A first step with rate 0 would be wasted, a jump at the end of warm-up would not be one."""
    f, settings = ALL[name]
    found = rates(f, **settings)
    assert found[:WARMUP] == pytest.approx([(s + 1) / (WARMUP + 1) for s in range(WARMUP)])
    no_warm_up = f(0, STEPS, 50.0, **settings, warmup=0)
    assert no_warm_up == pytest.approx(1.0)
    assert all(0 < r <= 1 for r in found)


def test_formulas_after_warm_up() -> None:
    """Each against its definition at every step, written another way."""
    part = [(s - WARMUP) / (STEPS - WARMUP) for s in range(STEPS)]
    expected = {
        "constant": lambda s: 1.0,
        "linear": lambda s: 0.1 * part[s] + 1.0 * (1 - part[s]),
        "cosine": lambda s: 0.55 + 0.45 * math.cos(math.pi * part[s]),
        "wsd": lambda s: 1.0 if s <= 800 else 0.1 + 0.9 * (1000 - s) / 200,
        "step": lambda s: 0.5 ** (s // 100),
    }
    for name, formula in expected.items():
        f, settings = ALL[name]
        assert rates(f, **settings)[WARMUP:] == pytest.approx([formula(s) for s in range(WARMUP, STEPS)]), name


def test_sgdr_restarts_and_stretches() -> None:
    """Cycles of 100, 200, 400 steps: full rate at each start, close to the least one before."""
    f, settings = ALL["sgdr"]
    found = rates(f, **settings)
    for start, length in ((100, 100), (200, 200), (400, 400)):
        assert found[start] == pytest.approx(1.0)
        assert found[start + length // 2] == pytest.approx(0.55)
        assert 0.1 < found[start + length - 1] < 0.101
        assert found[start : start + length] == sorted(found[start : start + length], reverse=True)
    assert f(10**6, STEPS, 50.0, warmup=0, cycle=7, t_mult=1.0, min_rate=0.0) == pytest.approx(
        0.5 + 0.5 * math.cos(math.pi * (10**6 % 7) / 7)
    )


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps,warmup", [(1, 0), (1, 100), (100, 100), (50, 100)])
def test_short_runs_and_steps_beyond_the_end(name: str, steps: int, warmup: int) -> None:
    """A run no longer than its warm-up, or that goes on past its estimate, must not divide by zero or leave [min, 1]."""
    f, settings = ALL[name]
    for s in range(3 * (steps + warmup)):
        assert 0 < f(s, steps, 1.0, **settings, warmup=warmup) <= 1
    assert f(steps + warmup + 10_000, steps, 1.0, **settings, warmup=warmup) >= 0.1 - 1e-9


def test_wsd_never_falls_below_its_floor() -> None:
    """A run bounded by time can go a little past the estimated steps."""
    assert schedule.wsd(1010, 1000, 1.0, warmup=0, decay=0.2, min_rate=0.1) == pytest.approx(0.1)


ADAMW = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.5, "lr_scale": {}}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))


def test_matrices_decay_vectors_do_not() -> None:
    """Decaying a norm's weight would pull it to 0; decaying nothing would be another optimizer."""
    model = net()
    model[3].weight.requires_grad_(False)
    optimizer = adamw(model, lr=0.1, **ADAMW)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    expected = {"0.weight": 0.5, "1.weight": 0.5, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0}
    assert {n: decay[id(p)] for n, p in model.named_parameters() if id(p) in decay} == expected
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_rates_follow_the_factor() -> None:
    """set_lr multiplies the full rate, not the last one: the schedule must not compound."""
    optimizer = adamw(net(), lr=0.1, **ADAMW)
    optimizer.param_groups[1]["base_lr"] = 0.4
    for factor in (0.5, 0.5, 0.25):
        set_lr(optimizer, factor)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.4 * factor])


def test_a_step_is_adamw() -> None:
    """First step: p (1 - lr wd) - lr g / (|g| + eps) for matrices, without the decay for vectors."""
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = adamw(model, lr=0.1, **ADAMW)
    set_lr(optimizer, 0.5)
    torch.manual_seed(1)
    model(torch.tensor([[0, 1, 2]])).square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    for n, p in model.named_parameters():
        decay = 0.5 if p.dim() > 1 else 0.0
        expected = before[n] * (1 - 0.05 * decay) - 0.05 * grads[n] / (grads[n].abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)


SCALES = {"embedding": 0.5, "hidden": 2.0, "residual": 3.0, "head": 0.25, "vector": 4.0}


@pytest.mark.parametrize("model", ["dense", "gpt", "deepseek_v3"])
def test_rates_of_roles(model: str) -> None:
    """Each parameter has lr times its role's scale and its role's decay, with a schedule's factor too; a role that is not
    named has the plain rate; every parameter that is trained is in one group."""
    m = uninitialised(model, "model.tied=false")
    for scales in (SCALES, {"residual": 3.0}, {}, dict.fromkeys(ROLES, 1.0)):
        optimizer = adamw(m, lr=0.1, **ADAMW | {"lr_scale": scales})
        for factor in (1.0, 0.5):
            set_lr(optimizer, factor)
            rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
            decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
            assert len(rate) == sum(len(g["params"]) for g in optimizer.param_groups)
            trained = [(n, p) for n, p in m.named_parameters() if p.requires_grad]
            assert rate.keys() == {id(p) for _, p in trained}
            for name, p in trained:
                r = role(name, p)
                assert rate[id(p)] == pytest.approx(0.1 * factor * scales.get(r, 1.0)), name
                assert decay[id(p)] == (0.0 if r == "vector" else 0.5), name
    assert len(adamw(m, lr=0.1, **ADAMW).param_groups) == 2


def test_scaled_rates_scale_the_step() -> None:
    """A first step of AdamW is lr g / (|g| + eps): with twice the rate it is twice as far; 0 leaves the role alone."""
    moved = {}
    for scale in (1.0, 2.0, 0.0):
        m = made("moe").train()
        before = {n: p.detach().clone() for n, p in m.named_parameters()}
        optimizer = adamw(m, lr=0.01, **ADAMW | {"weight_decay": 0.0, "lr_scale": {"residual": scale}})
        m(tokens(), targets=tokens(seed=2))[0].logprob.sum().backward()
        optimizer.step()
        moved[scale] = {n: p.detach() - before[n] for n, p in m.named_parameters()}
    for name, step in moved[1.0].items():
        residual = name in ("blocks.0.ffn.out", "blocks.1.ffn.out") or name.endswith(".out.weight")
        torch.testing.assert_close(moved[2.0][name], (2 if residual else 1) * step, rtol=1e-3, atol=1e-6)
        assert step.any() and moved[0.0][name].any() != residual, name


def test_a_tied_head_has_the_embeddings_rate() -> None:
    """It is one parameter, in one group."""
    m = uninitialised("dense", "model.tied=true")
    optimizer = adamw(m, lr=0.1, **ADAMW | {"lr_scale": SCALES})
    found = [g["lr"] for g in optimizer.param_groups for p in g["params"] if p is m.head.weight]
    assert found == [pytest.approx(0.05)]


def test_unknown_roles_are_refused() -> None:
    """Misspelt, it would do nothing."""
    with pytest.raises(
        Refusal, match="optimizer.lr_scale has no role embeddings; there is: embedding, hidden, residual"
    ):
        adamw(net(), lr=0.1, **ADAMW | {"lr_scale": {"hidden": 1.0, "embeddings": 2.0}})


@pytest.mark.parametrize("model", MODELS)
def test_the_config_builds_the_optimizer(model: str) -> None:
    """conf/optimizer/adamw.yaml names every role, all at the same rate."""
    from hydra import compose, initialize_config_dir

    from etude.config import CONF, build, check

    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = check(compose("train"), "train")["optimizer"]
    assert node["lr_scale"] == dict.fromkeys(ROLES, 1.0)
    optimizer = build(node, uninitialised(model))
    assert {g["base_lr"] for g in optimizer.param_groups} == {node["lr"]} and len(optimizer.param_groups) == 2
