"""Mixture of experts: every way to compute it, routing, losses and balancing against formulas written with loops."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from running import metrics, run_in, tiny, train
from safetensors.torch import load_file
from test_model import V, made, model_node, small, tokens, uninitialised
from torch import Tensor, nn

from etude.config import build
from etude.errors import Refusal
from etude.loop import gradients, reduce, router_load, spread
from etude.model import moe, parts
from etude.model.attention import Documents
from etude.model.moe import EXPERTS, MoE, interleave
from etude.optim import adamw
from etude.parallel import Single, World
from etude.strategy.seq import Seq

SETTINGS: dict[str, Any] = {
    "n_experts": 8, "top_k": 2, "n_shared": 0, "hidden": 16, "activation": "silu", "score": "softmax", "n_groups": None,
    "top_groups": None, "group_top": 1, "renormalize": False, "scale": 1.0, "aux_loss": 0.0, "z_loss": 0.0, "bias_rate": None,
    "compute": "auto", "dropout": 0.0,
}  # fmt: skip


def layer(dim: int = 16, seed: int = 0, **changes: Any) -> MoE:
    torch.manual_seed(seed)
    made = MoE(dim, 0, **SETTINGS | changes)
    for p in made.parameters():
        nn.init.normal_(p, std=0.5)
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    return made


def close(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """To `tolerance` of the value, or of the largest one if that is above 1."""
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        found / scale, expected / scale, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
    )


# ---------------------------------------------------------------- the experts' computation

ROUTED = {
    "any": lambda N, K, E: torch.stack([torch.randperm(E)[:K] for _ in range(N)]),
    "one expert": lambda N, K, E: torch.full((N, K), E - 1),  # also twice the same, which no router chooses
    "empty experts": lambda N, K, E: torch.stack([2 * torch.randperm(E // 2)[:K] + 1 for _ in range(N)]),
    "first alone": lambda N, K, E: torch.zeros(N, K, dtype=torch.int64),
}
SIZES = {  # tokens, choices, experts, dim, hidden
    "plain": (37, 2, 8, 16, 24),
    "one token": (1, 2, 8, 16, 24),
    "one choice": (20, 1, 8, 16, 24),
    "two experts": (20, 2, 4, 8, 8),
    "odd dim": (20, 2, 8, 15, 24),
    "odd hidden": (20, 2, 8, 16, 23),
    "odd": (20, 3, 8, 13, 7),
    "of 4, not of 8": (20, 2, 8, 12, 20),
    "more experts than tokens": (3, 2, 64, 16, 8),
    "many of both": (1500, 3, 40, 8, 16),
}


def ways() -> list[tuple[str, str]]:
    """Each way with each size; the grouped product where rows are whole 16 bytes: elsewhere auto does not choose it."""
    found = itertools.product([*EXPERTS, "auto"], SIZES)
    return [(c, s) for c, s in found if c != "grouped" or all(n % 4 == 0 for n in SIZES[s][3:])]


def outputs_and_gradients(compute: str, case: tuple, chosen: Tensor, dtype: torch.dtype, act: str) -> dict[str, Tensor]:
    N, K, E, D, H = case
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(size, generator=generator).to(dtype).requires_grad_()  # noqa: E731
    named = {"x": draw(N, D), "weights": draw(N, K), "gate_up": draw(E, 2 * H, D), "out": draw(E, D, H)}
    x, weights, gate_up, out = named.values()
    y = moe.experts(x, chosen, weights, gate_up, out, parts.ACTIVATIONS[act], compute)
    (y * torch.randn(y.shape, generator=generator).to(dtype)).sum().backward()
    assert y.dtype == dtype and y.shape == (N, D)
    found = {"y": y.detach()}
    for name, t in named.items():
        assert t.grad is not None
        found[name] = t.grad
    return found


@pytest.mark.parametrize("compute,size", ways())
@pytest.mark.parametrize("routed", ROUTED)
def test_every_way_gives_the_same(compute: str, size: str, routed: str) -> None:
    """Outputs and the gradients of tokens, weights and both matrices: to 1e-5 in fp32, to 0.03 in bf16, of the
    reference in fp32."""
    N, K, E, D, H = SIZES[size]
    torch.manual_seed(0)
    chosen = ROUTED[routed](N, K, E)
    assert chosen.shape == (N, K) and chosen.max() < E
    expected = outputs_and_gradients("naive", SIZES[size], chosen, torch.float32, "silu")
    found = outputs_and_gradients(compute, SIZES[size], chosen, torch.float32, "silu")
    for name in expected:
        close(found[name], expected[name], 1e-5, name)
    idle = [e for e in range(E) if e not in chosen]
    for name in ("gate_up", "out"):
        assert (found[name][idle] == 0).all() and found[name][chosen.unique()].any(), "an expert that nobody visited"
    if compute == "grouped" and (D % 8 or H % 8):
        return
    half = outputs_and_gradients(compute, SIZES[size], chosen, torch.bfloat16, "silu")
    for name in expected:
        assert half[name].dtype == torch.bfloat16
        assert (half[name].float() - expected[name]).norm() <= 0.03 * expected[name].norm(), name


@pytest.mark.parametrize("compute", [*EXPERTS, "auto"])
@pytest.mark.parametrize("act", list(parts.ACTIVATIONS))
def test_every_way_with_every_activation(compute: str, act: str) -> None:
    """Gradients through each, to 1e-5."""
    torch.manual_seed(0)
    case = (40, 2, 16, 8, 8)
    chosen = ROUTED["any"](*case[:3])
    expected = outputs_and_gradients("naive", case, chosen, torch.float32, act)
    for name, found in outputs_and_gradients(compute, case, chosen, torch.float32, act).items():
        close(found, expected[name], 1e-5, name)


@pytest.mark.parametrize("compute", [*EXPERTS, "auto"])
def test_every_way_without_gradients(compute: str) -> None:
    """In generation nothing is kept: one token or many, frozen or in inference mode; and a second backward pass adds
    the same gradients once more."""
    torch.manual_seed(0)
    E, D, H, act = 16, 8, 8, parts.ACTIVATIONS["silu"]
    gate_up, out = torch.randn(E, 2 * H, D), torch.randn(E, D, H)
    for N in (1, 2, 50):
        x, weights, chosen = torch.randn(N, D), torch.rand(N, 2), ROUTED["any"](N, 2, E)
        expected = moe.naive(x, chosen, weights, gate_up, out, act)
        close(moe.experts(x, chosen, weights, gate_up, out, act, compute), expected, 1e-5)
        with torch.inference_mode():
            close(moe.experts(x, chosen, weights, nn.Parameter(gate_up), out, act, compute), expected, 1e-5)
    free = gate_up.clone().requires_grad_()
    loss = moe.experts(x, chosen, weights, free, out, act, compute).square().sum()
    loss.backward(retain_graph=True)
    assert free.grad is not None
    once = free.grad.clone()
    loss.backward()
    torch.testing.assert_close(free.grad, 2 * once)


@pytest.mark.parametrize("act", list(parts.ACTIVATIONS))
def test_the_reference_against_loops(act: str) -> None:
    """Token by token and choice by choice; a token may go to all experts, and all ways agree there too."""
    N, K, E, D, H = 5, 4, 4, 8, 6
    torch.manual_seed(0)
    x, weights, gate_up, out = torch.randn(N, D), torch.rand(N, K), torch.randn(E, 2 * H, D), torch.randn(E, D, H)
    chosen, f = torch.stack([torch.randperm(E) for _ in range(N)]), parts.ACTIVATIONS[act]
    expected = torch.zeros(N, D)
    for n, k in itertools.product(range(N), range(K)):
        e = chosen[n, k]
        hidden = f(gate_up[e, :H] @ x[n]) * (gate_up[e, H:] @ x[n])
        expected[n] += weights[n, k] * (out[e] @ hidden)
    for compute in [*(c for c in EXPERTS if c != "grouped"), "auto"]:
        close(moe.experts(x, chosen, weights, gate_up, out, f, compute), expected, 1e-5, compute)


def test_experts_under_autocast() -> None:
    """Products in bf16, gradients in the parameters' dtype; the router stays in fp32."""
    m, x = layer(), torch.randn(2, 9, 16, requires_grad=True)
    expected, aux = m(x)
    with torch.autocast("cpu", torch.bfloat16):
        found, other = m(x)
    assert found.dtype == torch.bfloat16 and 0 < (found.float() - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(aux.load, other.load) and torch.equal(aux.entropy, other.entropy)
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in (x, *m.parameters()))


@pytest.mark.parametrize("dim,hidden", [(16, 16), (15, 9), (20, 12)])
@pytest.mark.parametrize("n_shared", [0, 2])
def test_the_layer_against_its_formula(dim: int, hidden: int, n_shared: int) -> None:
    """Shared experts are one MLP of their widths together, added without a weight; to 1e-5, at odd sizes too."""
    m = layer(dim, hidden=hidden, n_shared=n_shared, renormalize=True, scale=2.5)
    x = torch.randn(2, 9, dim)
    expected = torch.zeros_like(x)
    for b, t in itertools.product(range(2), range(9)):
        p = (m.router.weight @ x[b, t]).softmax(0)
        best = p.argsort(descending=True)[:2]
        for e in best:
            gate, up = (m.gate_up[e] @ x[b, t]).chunk(2)
            expected[b, t] += 2.5 * p[e] / p[best].sum() * (m.out[e] @ (F.silu(gate) * up))
    if n_shared:
        assert m.shared is not None and m.shared.up.out_features == n_shared * hidden
        expected = expected + m.shared.out(F.silu(m.shared.gate(x)) * m.shared.up(x))
    close(m(x)[0], expected, 1e-5)


# ---------------------------------------------------------------- routing


def route_by_hand(scores: list[float], m: MoE) -> dict[int, float]:
    """One token's experts and weights, one rule after another."""
    bias = [0.0] * len(scores) if m.bias is None else m.bias.tolist()
    choice = [s + b for s, b in zip(scores, bias)]
    open_experts = list(range(len(scores)))
    if m.n_groups is not None and m.top_groups is not None:
        size = len(scores) // m.n_groups
        groups = [range(g * size, (g + 1) * size) for g in range(m.n_groups)]
        worth = [sum(sorted((choice[e] for e in group), reverse=True)[: m.group_top]) for group in groups]
        best = sorted(range(m.n_groups), key=lambda g: -worth[g])[: m.top_groups]
        open_experts = [e for g in best for e in groups[g]]
    chosen = sorted(open_experts, key=lambda e: -choice[e])[: m.top_k]
    total = sum(scores[e] for e in chosen) if m.renormalize else 1.0
    return {e: m.scale * scores[e] / total for e in chosen}


GROUPS = {
    "none": {},
    "best one": {"n_groups": 4, "top_groups": 2, "group_top": 1},
    "best two": {"n_groups": 4, "top_groups": 2, "group_top": 2},
    "best three": {"n_groups": 3, "top_groups": 1, "group_top": 3},
    "all groups": {"n_groups": 4, "top_groups": 4, "group_top": 2},
}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("biased", [False, True])
def test_routes_against_the_rules(score: Any, renormalize: bool, groups: str, biased: bool) -> None:
    """Which experts, and weights to 1e-6, for 200 tokens."""
    m = layer(
        n_experts=12,
        top_k=3,
        score=score,
        renormalize=renormalize,
        scale=2.5,
        **GROUPS[groups],
        bias_rate=0.1 if biased else None,
    )
    if m.bias is not None:
        m.bias.data = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 0.2
    logits = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) * 2
    scores = logits.softmax(-1) if score == "softmax" else 1 / (1 + torch.exp(-logits))
    torch.testing.assert_close(m.score(logits), scores)
    chosen, weights = m.route(scores)
    for i, row in enumerate(scores.tolist()):
        expected = route_by_hand(row, m)
        assert dict(zip(chosen[i].tolist(), weights[i].tolist())) == pytest.approx(expected, rel=1e-6)
    if renormalize:
        torch.testing.assert_close(weights.sum(-1), torch.full((200,), 2.5))


def test_groups_narrow_the_choice() -> None:
    """By their best one or by their best two, which are other groups here: a test of the tests above."""
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.5, 0.6, 0.1, 0.3, 0.2]])
    found = {
        top: set(layer(n_groups=4, top_groups=1, group_top=top, score="sigmoid").route(scores)[0][0].tolist())
        for top in (1, 2)
    }
    assert found == {1: {0, 1}, 2: {2, 3}}
    assert set(layer(score="sigmoid").route(scores)[0][0].tolist()) == {0, 4}


def test_bias_changes_the_choice_and_not_the_weights() -> None:
    """An expert that the bias brings in counts by its own score, as if it had been the best."""
    m = layer(bias_rate=0.1, score="sigmoid")
    assert m.bias is not None
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.2, 0.3, 0.4, 0.5]])
    assert m.route(scores)[0].tolist() == [[0, 1]]
    m.bias.data[3] = 5.0
    chosen, weights = m.route(scores)
    assert dict(zip(chosen[0].tolist(), weights[0].tolist())) == pytest.approx({3: 0.1, 0: 0.9})
    m.bias.data[:] = -3.0  # of all: nothing
    assert m.route(scores)[0].tolist() == [[0, 1]]
    m.bias.data[:] = 0.0
    x = torch.randn(2, 5, 16)
    before, aux = m(x)
    m.bias.data[:] = torch.randn(8)
    after, other = m(x)
    assert not torch.equal(aux.load, other.load) and torch.equal(aux.entropy, other.entropy)
    assert not torch.allclose(before, after, atol=1e-3)


def test_gradients_flow_through_the_weights_alone() -> None:
    """Of the router: d weight of the chosen scores, nothing by the choice, nothing for the bias; against autograd of
    the formula with the choice held fixed, to 1e-6."""
    for settings in ({}, {"renormalize": True}, {"score": "sigmoid", "n_groups": 4, "top_groups": 2, "group_top": 2}):
        m = layer(bias_rate=0.1, **settings)
        assert m.bias is not None
        m.bias.data = torch.randn(8, generator=torch.Generator().manual_seed(1)) * 0.1
        logits = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
        free, held = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        chosen, weights = m.route(m.score(free))
        (weights * torch.arange(60).view(30, 2)).sum().backward()
        picked = m.score(held).gather(1, chosen.detach())
        picked = picked / picked.sum(-1, keepdim=True) if m.renormalize else picked
        (picked * torch.arange(60).view(30, 2)).sum().backward()
        torch.testing.assert_close(free.grad, held.grad, rtol=1e-6, atol=1e-6)
        assert m.bias.grad is None and not chosen.requires_grad
    alone = layer(score="sigmoid")
    logits = torch.randn(30, 8, requires_grad=True)
    chosen, weights = alone.route(alone.score(logits))
    weights.sum().backward()
    assert torch.equal(logits.grad != 0, torch.zeros(30, 8).scatter_(1, chosen, 1).bool())


# ---------------------------------------------------------------- losses and metrics


def losses_by_hand(m: MoE, x: Tensor) -> tuple[list[float], list[int], list[float]]:
    """(loss of each row, load, entropy of each row) with loops, in fp64."""
    loss, entropy, load = [], [], [0] * m.n_experts
    for row in x.double():
        count, mean, z2, h = [0] * m.n_experts, [0.0] * m.n_experts, 0.0, 0.0
        for token in row:
            z = (m.router.weight.double() @ token).tolist()
            scores = [math.exp(v) if m.score is moe.SCORES["softmax"] else 1 / (1 + math.exp(-v)) for v in z]
            p = [s / sum(scores) for s in scores]
            for e in route_by_hand(scores if m.score is not moe.SCORES["softmax"] else p, m):
                count[e] += 1
                load[e] += 1
            mean = [a + b / len(row) for a, b in zip(mean, p)]
            z2 += math.log(sum(map(math.exp, z))) ** 2 / len(row)
            h -= sum(q * math.log(q) for q in p) / len(row)
        balance = m.n_experts / (m.top_k * len(row)) * sum(c * q for c, q in zip(count, mean))
        loss.append(m.aux_loss * balance + m.z_loss * z2)
        entropy.append(h)
    return loss, load, entropy


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("weights", [(0.1, 0.0), (0.0, 0.3), (0.1, 0.3)])
@pytest.mark.parametrize("bias_rate", [None, 0.1])
def test_losses_against_their_formulas(score: Any, weights: tuple[float, float], bias_rate: float | None) -> None:
    """The balance loss and the z-loss of each row, the load and the entropy, to 1e-5."""
    m = layer(score=score, aux_loss=weights[0], z_loss=weights[1], bias_rate=bias_rate)
    if m.bias is not None:
        m.bias.data = torch.randn(8, generator=torch.Generator().manual_seed(1)) * 0.1
    x = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(0))
    aux = m(x)[1]
    loss, load, entropy = losses_by_hand(m, x)
    assert aux.loss[:, 0].tolist() == pytest.approx(loss, rel=1e-5) and min(loss) > 0
    assert aux.load.tolist() == load and sum(load) == 3 * 11 * 2
    assert aux.entropy.mean(1).tolist() == pytest.approx(entropy, rel=1e-5)
    assert not aux.entropy.requires_grad and not aux.load.requires_grad


def test_the_balance_loss_is_least_where_the_load_is_even() -> None:
    """1 for an even load, E for one expert that has all, at K = 1; its gradient takes probability from the busiest."""
    m = layer(top_k=1, n_experts=4, aux_loss=1.0)
    even = torch.eye(4).repeat(1, 3, 1) * 50
    chosen = even.argmax(-1, keepdim=True)
    assert m.look(even, even.softmax(-1), chosen).loss[:, 0].tolist() == pytest.approx([1.0])
    logits = torch.zeros(1, 12, 4)
    logits[..., 2] = 50
    assert m.look(logits, logits.softmax(-1), logits.argmax(-1, keepdim=True)).loss[:, 0].tolist() == pytest.approx(
        [4.0]
    )
    free = torch.zeros(1, 12, 4, requires_grad=True)
    m.look(free, free.softmax(-1), torch.full((1, 12, 1), 2)).loss.sum().backward()
    assert (free.grad[..., 2] > 0).all() and (free.grad[..., [0, 1, 3]] < 0).all()


def test_gradients_of_the_losses() -> None:
    """Through the mean probabilities and the logsumexp, the counts held fixed; against autograd of the formula."""
    m = layer(aux_loss=0.7, z_loss=0.2)
    x = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(0))
    m(x)[1].loss[:, 0].mul(torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    found = m.router.weight.grad.clone()
    m.zero_grad()
    z = x @ m.router.weight.T
    p = z.softmax(-1)
    count = F.one_hot(p.topk(2, -1).indices, 8).sum((1, 2))
    loss = 0.7 * 8 / (2 * 11) * (count * p.mean(1)).sum(-1) + 0.2 * z.logsumexp(-1).square().mean(-1)
    loss.mul(torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(found, m.router.weight.grad, rtol=1e-5, atol=1e-6)


def test_aux_is_of_each_document() -> None:
    """Packed with others and padded, a document has the losses that it has alone, and padding has no load."""
    m = layer(aux_loss=0.1, z_loss=0.3)
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    doc_ids = torch.tensor([[0] * 7 + [1] * 9 + [-1] * 4, [0] * 3 + [1] * 17])
    aux = m(x, Documents(doc_ids))[1]
    whole = torch.zeros(8)
    for row, begin, end in ((0, 0, 7), (0, 7, 16), (1, 0, 3), (1, 3, 20)):
        alone = m(x[row : row + 1, begin:end])[1]
        torch.testing.assert_close(aux.loss[row, begin:end], alone.loss[0].expand(end - begin))
        torch.testing.assert_close(aux.entropy[row, begin:end], alone.entropy[0])
        whole += alone.load
    assert torch.equal(aux.load, whole) and aux.load.sum() == 2 * 36


def test_aux_of_a_model() -> None:
    """Losses of the layers are summed, loads stacked, entropies averaged; under inference_mode there is none."""
    m, ids = made("moe", n_layers=3), tokens()
    seen: list[Any] = []
    for block in m.blocks:
        block.ffn.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    _, aux = m(ids, targets=ids)
    torch.testing.assert_close(aux.loss, seen[0].loss + seen[1].loss + seen[2].loss)
    assert torch.equal(aux.load, torch.stack([s.load for s in seen])) and aux.load.shape == (3, 8)
    torch.testing.assert_close(aux.entropy, (seen[0].entropy + seen[1].entropy + seen[2].entropy) / 3)
    assert aux.loss.shape == (3, 1) and aux.entropy.shape == ids.shape and (aux.load.sum(-1) == ids.numel() * 2).all()
    with torch.inference_mode():
        scores, none = m(ids, targets=ids)
        assert (
            none is None
            and m.hidden(ids, None, None, None)[1] is None
            and m.blocks[0].ffn(torch.ones(1, 2, 32))[1] is None
        )
    with torch.no_grad():
        assert m(ids, targets=ids)[1] is not None  # validation reports it


# ---------------------------------------------------------------- micro-batches


def ragged_batch() -> dict[str, Tensor]:
    targets = tokens(8, 12, seed=2)
    for row, n in enumerate((0, 3, 12, 11, 7, 0, 1, 5)):  # one row has no target at all
        targets[row, :n] = -100
    return {"tokens": tokens(8, 12), "targets": targets}


@pytest.mark.parametrize("model", ["moe", "deepseek_v3"])
@pytest.mark.parametrize("sizes", [[1] * 8, [3, 5], [2, 2, 2, 2]], ids=str)
def test_micro_batches_change_nothing(model: str, sizes: list[int]) -> None:
    """A step of one batch or of several micro-batches, with ragged ignored targets: the same loss, auxiliary loss,
    entropy and load, and gradients of every parameter to 1e-5 of the largest."""
    weights = {
        "moe": ["model.ffn.aux_loss=0.5", "model.ffn.z_loss=0.1"],
        "deepseek_v3": ["model.ffn.sparse.aux_loss=0.5"],
    }
    m, strategy, batch = made(model, *weights[model]).train(), Seq(label_smoothing=0.1, z_loss=0.01), ragged_batch()
    world, single = World(0, 1, torch.device("cpu")), Single(device="cpu")
    found = []
    for split in ([8], sizes):
        m.zero_grad()
        parts_of = {k: v.split(split) for k, v in batch.items()}
        batches = [{k: parts_of[k][i] for k in batch} for i in range(len(split))]
        collected = strategy.collect(m, batches, list(range(len(split))), world)
        weight = sum(strategy.weight(b) for b in collected)
        off = torch.autocast("cpu", enabled=False)
        settings = {"seed": 0, "clip": None}
        sums, norm = gradients(m, None, strategy, collected, weight, settings, 0, single, world, off)
        load = router_load(sums, world)
        found.append((load, reduce(sums, world), {n: p.grad for n, p in m.named_parameters() if p.requires_grad}))
    (load, values, grads), (other_load, other_values, other_grads) = found
    assert torch.equal(load, other_load) and load.sum() == 8 * 12 * (2 * 2 if model == "moe" else 4)
    assert values == pytest.approx(other_values, rel=1e-5)
    assert values["aux"] > 0.1 and values.keys() >= {"loss", "aux", "nll", "router/entropy"}
    for name, grad in grads.items():
        close(other_grads[name], grad, 1e-5, name)
    m.zero_grad()
    s, aux = m(batch["tokens"], targets=batch["targets"])
    rows = batch["targets"] >= 0
    assert values["aux"] == pytest.approx((aux.loss * rows).sum().item() / rows.sum().item(), rel=1e-5)
    total = -0.9 * s.logprob.sum() - 0.1 * s.mean_logprob.sum() + 0.01 * s.logz.square().sum() + (aux.loss * rows).sum()
    (total / rows.sum()).backward()
    for name, p in m.named_parameters():
        if p.requires_grad:
            close(p.grad, grads[name], 1e-5, name)


# ---------------------------------------------------------------- balancing


def skewed(bias_rate: float | None, **changes: Any) -> tuple[MoE, Tensor]:
    """A router that prefers expert 0, and a little expert 1, on inputs of positive mean; and 16 rows of such inputs."""
    m = layer(bias_rate=bias_rate, **changes)
    x = torch.randn(16, 32, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    nn.init.normal_(m.router.weight, std=0.1)
    m.router.weight.data[0] += 0.3
    m.router.weight.data[1] += 0.1
    return m, x


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", ["none", "best two"])
def test_the_bias_evens_out_the_load(score: Any, groups: str) -> None:
    """Within 300 steps at a fixed router, from a share of over 2 to one below 1.3; without it the load stays."""
    for rate in (0.003, None):
        m, x = skewed(rate, score=score, **GROUPS[groups])
        shares = []
        for _ in range(300):
            load = m(x)[1].load
            shares.append(spread(load[None])["router/max_load"])
            m.balance(load)
        assert shares[0] > 2
        if rate is None:
            assert shares[-1] == shares[0] and m.bias is None
        else:
            assert max(shares[-20:]) < 1.3
            assert m.bias is not None and m.bias[0] == m.bias.min() < 0


def test_a_step_of_the_bias() -> None:
    """Up by the rate below the mean, down above it, nothing at it; on a model, each sparse layer by its own load."""
    m = layer(n_experts=4, bias_rate=0.25)
    assert m.bias is not None
    m.balance(torch.tensor([10.0, 2.0, 6.0, 6.0]))
    assert m.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    m.balance(torch.tensor([7, 7, 7, 7]))
    assert m.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    whole = made("deepseek_v3", n_layers=3)
    before = [b.ffn.bias.clone() for b in whole.blocks[1:]]
    load = torch.zeros(2, 16)
    load[0, 3], load[1, 5] = 8, 8
    whole.balance(load)
    for i, e in ((0, 3), (1, 5)):
        moved = whole.blocks[i + 1].ffn.bias - before[i]
        expected = torch.full((16,), 0.001)
        expected[e] = -0.001
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError):
        whole.balance(torch.zeros(3, 16))


def test_spread_of_a_load() -> None:
    """Largest and smallest share in any layer, and experts without a token in all."""
    load = torch.tensor([[4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0], [2.0, 6.0, 4.0, 4.0]])
    assert spread(load) == {"router/max_load": 4.0, "router/min_load": 0.0, "router/dead": 3.0}
    assert spread(load[2:]) == {"router/max_load": 1.5, "router/min_load": 0.5, "router/dead": 0.0}
    assert spread(None) == {}


def test_the_optimizer_leaves_the_bias_alone() -> None:
    """Neither by a gradient nor by decay."""
    m = made("deepseek_v3").train()
    optimizer = adamw(m, lr=0.1, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.5, lr_scale={})
    owned = {id(p) for g in optimizer.param_groups for p in g["params"]}
    biases = {n: p for n, p in m.named_parameters() if n.endswith("ffn.bias")}
    assert len(biases) == 1 and not owned & {id(p) for p in biases.values()}
    assert owned == {id(p) for n, p in m.named_parameters() if n not in biases}
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    for _ in range(3):
        scores, aux = m(tokens(), targets=tokens(seed=2))
        (aux.loss.sum() - scores.logprob.sum()).backward()
        optimizer.step()
    for n, p in m.named_parameters():
        assert torch.equal(p, before[n]) == (n in biases), n


@pytest.fixture(scope="module")
def balanced_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    overrides = [o for o in tiny(folder, model="deepseek_v3") if not o.startswith("model.attn.n_kv_heads")]
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    train(*overrides, *(f"model.attn.{k}={v}" for k, v in latent.items()), "model.ffn.sparse.hidden=8")
    return run_in(folder / "runs")


def test_a_run_says_how_its_experts_fare(balanced_run: Path) -> None:
    """Logged at every step, and not of the load as if it were a loss."""
    rows = metrics(balanced_run)
    assert len(rows) == 6
    for row in rows:
        assert row["train/router/max_load"] >= 1 >= row["train/router/min_load"] >= 0
        assert row["train/router/dead"] in range(17)
        assert 0 < row["train/router/entropy"] <= math.log(16) + 1e-6
        assert row["train/aux"] > 0 and "train/router/load" not in row
        assert row["train/loss"] == pytest.approx(row["train/nll"], rel=1e-6)
    assert (
        "val/router/entropy" in rows[2] and "val/full_aux" in rows[-1] and not any("router/load" in k for k in rows[-1])
    )


def test_a_runs_bias_moves_and_is_kept(balanced_run: Path) -> None:
    """One rate a step, in the checkpoint, without moments of the optimizer."""
    last = balanced_run / "artifacts" / "checkpoints" / "last"
    bias = load_file(last / "model.safetensors")["blocks.1.ffn.bias"]
    assert bias.any() and bias.dtype == torch.float32
    steps = bias / 0.001
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert steps.abs().max().round() <= 6 and steps.min() < 0 < steps.max()
    moments = load_file(last / "optimizer.safetensors")
    assert not any("ffn.bias" in name for name in moments)
    assert "blocks.1.ffn.gate_up/exp_avg" in moments


def test_a_resumed_run_balances_on(balanced_run: Path, tmp_path: Path) -> None:
    """Its bias is where it was and moves on with its further steps."""
    last = balanced_run / "artifacts" / "checkpoints" / "last"
    config = json.loads((last / "config.json").read_text())
    m = build(config["model"], config["vocab_size"])
    from etude.model import weights

    weights.load_model(m, weights.tensors(last))
    bias = m.blocks[1].ffn.bias
    assert bias.any() and not bias.requires_grad
    found = weights.from_pretrained(last, "cpu", torch.bfloat16, ["etude"])
    kept = found.blocks[1].ffn.bias
    assert kept.dtype == torch.float32 and torch.equal(kept, bias) and not kept.requires_grad
    assert found.blocks[1].ffn.out.dtype == torch.bfloat16


# ---------------------------------------------------------------- which layers, how much work


@pytest.mark.parametrize(
    "first_dense,every,sparse", [(0, 1, [0, 1, 2, 3, 4, 5]), (1, 1, [1, 2, 3, 4, 5]), (0, 2, [1, 3, 5]), (3, 2, [3, 5]), (2, 3, [2, 5]), (9, 1, [])]
)  # fmt: skip
def test_which_layers_are_sparse(first_dense: int, every: int, sparse: list[int]) -> None:
    """The first ones dense, then every so manieth, numbered from 1 over all layers; each part knows its layer."""
    calls: list[tuple[str, int, int]] = []

    def part(kind: str) -> Any:
        return lambda dim, layer: calls.append((kind, dim, layer)) or nn.Identity()

    for i in range(6):
        interleave(24, i, first_dense=first_dense, every=every, dense=part("dense"), sparse=part("sparse"))
    assert [i for kind, dim, i in calls if kind == "sparse"] == sparse and len(calls) == 6
    assert [(dim, i) for _, dim, i in calls] == [(24, i) for i in range(6)]
    said = [f"model.ffn.first_dense={first_dense}", f"model.ffn.every={every}"]
    m = uninitialised("deepseek_v2", *said, n_layers=6)
    assert [i for i, b in enumerate(m.blocks) if isinstance(b.ffn, MoE)] == sparse
    m.init_weights()
    aux = m(tokens(), targets=tokens())[1]
    assert (aux is None) if not sparse else (aux.load.shape == (len(sparse), 16))


def test_sparse_counts_by_hand() -> None:
    """Parameters, those that a token visits, and FLOPs, written out."""
    d, e, k, shared, h = 32, 8, 2, 1, 32  # 8/3 of 32 by 3, rounded up to a multiple of 32
    expert, router = 3 * d * h, d * e
    attention = d * d + 2 * d * 16 + d * d
    rest = V * d + d + 2 * (attention + 2 * d)
    m = made("moe")
    assert m.blocks[0].ffn.hidden == h
    assert m.n_params() == rest + 2 * (router + (e + shared) * expert)
    assert m.n_active() == rest + 2 * (router + (k + shared) * expert)
    assert m.flops_per_token(20) == 6 * m.n_active() + 2 * 12 * d * 20
    dense = 3 * d * 96
    untied = made("moe", "model.tied=false")
    assert untied.n_params() == m.n_params() + V * d and untied.n_active() == m.n_active()
    v2 = uninitialised("deepseek_v2", "model.ffn.sparse.hidden=8", "model.ffn.sparse.bias_rate=0.1", "model.tied=true")
    e, k, shared, expert = 16, 4, 2, 3 * d * 8
    latent = sum(p.numel() for p in v2.blocks[0].attn.parameters())
    rest = V * d + d + 2 * (latent + 2 * d) + dense
    assert v2.n_params() == rest + d * e + e + (e + shared) * expert
    assert v2.n_active() == v2.n_params() - (e - k) * expert
    assert v2.flops_per_token(20) == 6 * v2.n_active() + 2 * v2.blocks[0].attn.flops_per_token(20)


def test_published_sizes_are_what_they_say() -> None:
    """DeepSeek-V3's 671B with 37B active, Mixtral's 47B with 13B, Qwen3's 30B with 3B, on the meta device; those that a
    token visits to a tenth, as the papers round them and count the embedding or do not."""
    for name, vocab, total, active in (
        ("deepseek_v3/671b", 129280, 671_026_419_200, 37e9),
        ("mixtral/8x7b", 32000, 46_702_792_704, 13e9),
        ("qwen3_moe/30b_a3b", 151936, 30_532_122_624, 3e9),
    ):
        with torch.device("meta"):
            m = build(model_node(f"model={name}"), vocab)
        assert m.n_params() == total
        assert m.n_active() == pytest.approx(active, rel=0.1)


def test_widths_that_are_derived() -> None:
    """A token's products are a dense part's, up to the rounding to 32."""
    for dim, k, shared, hidden in ((32, 2, 1, 32), (96, 2, 0, 128), (768, 4, 2, 352), (64, 1, 0, 192), (8, 8, 0, 32)):
        m = layer(dim, n_experts=8, top_k=k, n_shared=shared, hidden=None)
        assert m.hidden == hidden and m.hidden % 32 == 0
        assert 0 <= 3 * (k + shared) * hidden - 8 * dim < 3 * (k + shared) * 32


# ---------------------------------------------------------------- what is refused

BAD = [
    (["model=moe", "model.ffn.top_k=9"], "top_k=9 should be between 1 and n_experts=8; set model.ffn.top_k or model.ffn.n_experts"),
    (["model=moe", "model.ffn.top_k=0"], "top_k=0 should be between 1 and n_experts=8"),
    (["model=moe", "model.ffn.n_groups=4"], "n_groups=4 and top_groups=None go together"),
    (["model=moe", "model.ffn.top_groups=2"], "n_groups=None and top_groups=2 go together"),
    (["model=moe", "model.ffn.n_groups=3", "model.ffn.top_groups=1"], "n_experts=8 is not divisible by n_groups=3"),
    (["model=moe", "model.ffn.n_groups=0", "model.ffn.top_groups=1"], "n_experts=8 is not divisible by n_groups=0"),
    (["model=moe", "model.ffn.n_groups=2", "model.ffn.top_groups=3"], "top_groups=3 of n_groups=2"),
    (["model=moe", "model.ffn.n_groups=8", "model.ffn.top_groups=1", "model.ffn.group_top=1"], "hold 1 experts; top_k=2 must fit in"),
    (["model=moe", "model.ffn.n_groups=4", "model.ffn.top_groups=2", "model.ffn.group_top=3"], "group_top=3 should be between 1 and the 2 experts"),
    (["model=moe", "model.ffn.n_groups=4", "model.ffn.top_groups=2", "model.ffn.group_top=0"], "group_top=0 should be"),
    (["model=moe", "model.ffn.n_shared=-1"], "n_shared=-1 should be at least 0"),
    (["model=moe", "model.ffn.hidden=0"], "hidden=0 at least 1"),
    (["model=moe", "model.ffn.dropout=1.0"], "dropout=1.0 should be"),
    (["model=moe", "model.ffn.score=tanh"], "model.ffn.score=tanh should be one of softmax, sigmoid"),
    (["model=moe", "model.ffn.compute=fast"], "model.ffn.compute=fast should be one of auto, naive, "),
    (["model=moe", "model.ffn.top_k=1.5"], "model.ffn.top_k=1.5 should be a whole number"),
    (["model=deepseek_v3", "model.ffn.sparse.top_k=99"], "top_k=99 should be between 1 and n_experts=16"),
    (["model=deepseek_v3", "model.ffn.sparse.top_groups=null"], "n_groups=4 and top_groups=None go together"),
    (["model=deepseek_v3", "model.ffn.every=0"], "every=0"),
]  # fmt: skip


@pytest.mark.parametrize("overrides,message", BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_settings_that_do_not_fit(overrides: list[str], message: str) -> None:
    """One line, before torch is needed."""
    with pytest.raises(Refusal, match=message) as caught:
        model_node(*overrides)
    assert "\n" not in str(caught.value)


def test_constructors_refuse_them_too() -> None:
    """A model that is built from Python, or from a config.json, passes the same check."""
    for changes in ({"top_k": 9}, {"n_groups": 4}, {"n_groups": 3, "top_groups": 1}, {"dropout": 1.0}, {"hidden": 0}):
        with pytest.raises(ValueError):
            MoE(16, 0, **SETTINGS | changes)


def test_a_bad_setting_on_the_command_line(tmp_path: Path) -> None:
    """Exit code 2, one line, no run's folder."""
    overrides = [o for o in tiny(tmp_path, model="moe")]
    done = train(*overrides, "model.ffn.top_k=9", check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: top_k=9 should be between 1 and n_experts=8; set model.ffn.top_k or model.ffn.n_experts"
    ]
    assert not (tmp_path / "runs").exists()


def test_small_overrides_name_a_model_that_is_sparse() -> None:
    """What the tests above train is what they say: experts, of which a token visits a few."""
    for model in ("moe", "deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe"):
        m = build(model_node(*small(model)), V)
        assert 0 < m.n_active() < m.n_params() - V * 32 * (m.head.weight is not m.embed.weight)
