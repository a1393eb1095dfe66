"""Mixture of experts: a router sends each token to a few of many small feed-forward parts (Shazeer et al. 2017), with
some that every token visits (DeepSeekMoE, Dai et al. 2024). No token is ever dropped.

`experts` computes what the router chose. `naive` is the reference, one expert after another; the fast ways put the
tokens of an expert together first, and give the same numbers. Shapes: N tokens, E experts, K experts a token, H channels."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.model import parts
from etude.model.attention import Documents
from etude.model.mlp import GatedMLP
from etude.model.parts import Aux


class MoE(nn.Module):
    """n_experts gated MLPs of `hidden` channels, of which each token visits the router's best top_k, and n_shared more
    that all tokens visit, as one MLP. `hidden` null: 8/3 dim / (top_k + n_shared), rounded up to a multiple of 32: as
    many products a token as a dense part's.

    The router's score of an expert is the softmax over all or the sigmoid of its own logit, in fp32. With n_groups the
    experts are in so many groups of equal size, and only the best top_groups are looked at (DeepSeek-V2, V3): a group
    counts by the sum of its best group_top scores. `renormalize` lets the chosen scores sum to 1, `scale` multiplies
    them.

    Three ways to keep the load even: `aux_loss` weighs the balance loss of each row, E / (K T) sum_i count_i mean_i(p)
    (DeepSeek-V3, 2024, eq. 17-20; with one row it is Switch's); `z_loss` weighs the mean square of the logits'
    logsumexp (ST-MoE, Zoph et al. 2022); `bias_rate` adds to each expert's score, for the choice alone, a bias that
    `balance` moves by so much after every step (Wang et al. 2024). null: no bias.

    `compute` is one of EXPERTS or auto. Raises ValueError where settings do not fit together."""

    tp_plan = {"router": "replicate", "bias": "replicate", "gate_up": "expert", "out": "expert"}

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        n_experts: int,
        top_k: int,
        n_shared: int,
        hidden: int | None,
        activation: Literal["relu", "relu2", "gelu", "gelu_tanh", "silu"],
        score: Literal["softmax", "sigmoid"],
        n_groups: int | None,
        top_groups: int | None,
        group_top: int,
        renormalize: bool,
        scale: float,
        aux_loss: float,
        z_loss: float,
        bias_rate: float | None,
        compute: Literal["auto", "naive", "batched", "grouped"],
        dropout: float,
    ):
        super().__init__()
        self.check(n_experts, top_k, n_shared, hidden, n_groups, top_groups, group_top, dropout)
        hidden = hidden or parts.gated_hidden(dim, top_k + n_shared)
        self.n_experts, self.top_k, self.hidden = n_experts, top_k, hidden
        self.act, self.activation, self.score = parts.ACTIVATIONS[activation], activation, SCORES[score]
        self.n_groups, self.top_groups, self.group_top = n_groups, top_groups, group_top
        self.renormalize, self.scale = renormalize, scale
        self.aux_loss, self.z_loss, self.bias_rate = aux_loss, z_loss, bias_rate
        self.compute, self.dropout = compute, dropout
        self.router = nn.Linear(dim, n_experts, bias=False)
        self.bias = nn.Parameter(torch.empty(n_experts), requires_grad=False) if bias_rate is not None else None
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * hidden, dim))
        self.out = nn.Parameter(torch.empty(n_experts, dim, hidden))
        self.shared = (
            GatedMLP(dim, layer, hidden=n_shared * hidden, activation=activation, bias=False, dropout=0.0)
            if n_shared
            else None
        )

    @staticmethod
    def check(
        n_experts: int,
        top_k: int,
        n_shared: int,
        hidden: int | None,
        n_groups: int | None,
        top_groups: int | None,
        group_top: int,
        dropout: float,
    ) -> None:
        """Raises ValueError for settings that do not fit together; config.py runs it before torch is imported."""
        if not 0 <= dropout < 1:
            raise ValueError(f"model.ffn.dropout={dropout} should be at least 0 and below 1")
        if not 1 <= top_k <= n_experts:
            raise ValueError(
                f"top_k={top_k} should be between 1 and n_experts={n_experts}; set model.ffn.top_k or model.ffn.n_experts"
            )
        if n_shared < 0 or (hidden is not None and hidden < 1):
            raise ValueError(f"n_shared={n_shared} should be at least 0 and hidden={hidden} at least 1, or null")
        if (n_groups is None) != (top_groups is None):
            raise ValueError(f"n_groups={n_groups} and top_groups={top_groups} go together: set both, or both to null")
        if n_groups is None or top_groups is None:
            return
        if n_groups < 1 or n_experts % n_groups:
            raise ValueError(f"n_experts={n_experts} is not divisible by n_groups={n_groups}; set model.ffn.n_groups")
        size = n_experts // n_groups
        if not 1 <= top_groups <= n_groups or top_groups * size < top_k:
            raise ValueError(
                f"top_groups={top_groups} of n_groups={n_groups} hold {top_groups * size} experts; top_k={top_k} must fit in; set model.ffn.top_groups"
            )
        if not 1 <= group_top <= size:
            raise ValueError(f"group_top={group_top} should be between 1 and the {size} experts of a group")

    def init_weights(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def n_idle(self) -> int:
        """Parameters that a token does not visit."""
        return (self.n_experts - self.top_k) * (self.gate_up[0].numel() + self.out[0].numel())

    def router_logits(self, x: Tensor) -> Tensor:
        """x (N, D) -> (N, E) in fp32."""
        return F.linear(x.float(), self.router.weight.float())

    def experts(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """What the chosen experts make of x, see `experts` below; inference has its own way (infer.pack)."""
        return experts(x, chosen, weights, self.gate_up, self.out, self.act, self.compute)

    def route(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """scores (N, E) -> the chosen experts (N, K) and their weights (N, K)."""
        choice = scores.detach()
        if self.bias is not None:
            choice = choice + self.bias
        if self.n_groups is not None and self.top_groups is not None:
            grouped = choice.unflatten(1, (self.n_groups, -1))
            best = grouped.topk(self.group_top, -1).values.sum(-1).topk(self.top_groups, -1).indices
            looked_at = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
            choice = grouped.masked_fill(~looked_at[..., None], -torch.inf).flatten(1)
        chosen = choice.topk(self.top_k, -1).indices
        weights = scores.gather(1, chosen)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.scale

    def forward(self, x: Tensor, documents: Documents | None = None) -> tuple[Tensor, Aux | None]:
        """x (B, T, D), and the documents in its rows -> ((B, T, D), aux); aux is None under torch.inference_mode."""
        B, T, D = x.shape
        flat = x.reshape(-1, D)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router_logits(flat)
            scores = self.score(logits)
            chosen, weights = self.route(scores)
        y = self.experts(flat, chosen, weights).view(B, T, D)
        if self.shared is not None:
            y = y + self.shared(x)[0]
        y = parts.dropout(y, self.dropout, self.training)
        if torch.is_inference_mode_enabled():
            return y, None
        return y, self.look(logits.view(B, T, -1), scores.view(B, T, -1), chosen.view(B, T, -1), documents)

    def look(self, logits: Tensor, scores: Tensor, chosen: Tensor, documents: Documents | None = None) -> Aux:
        """Auxiliary losses and metrics of what was routed: logits, scores (B, T, E), chosen (B, T, K)."""
        B, T, E = scores.shape
        p = (scores / scores.sum(-1, keepdim=True)).flatten(0, 1)
        z2 = logits.logsumexp(-1).square().flatten()
        if documents is None:
            of = torch.arange(B, device=p.device).repeat_interleave(T)
            n = p.new_full((B,), T)
        else:
            of, n = documents.run_of, documents.run_lengths.to(p.dtype)
        total = p.new_zeros(len(n), E).index_add(0, of, p)
        places = (of[:, None] * E + chosen.flatten(0, 1)).flatten()
        count = p.new_zeros(len(n) * E).scatter_add_(0, places, p.new_ones(()).expand(len(places))).view(-1, E)
        z = p.new_zeros(len(n)).index_add(0, of, z2) if self.z_loss else None
        if documents is not None:
            total, count, n = (documents.with_trunk(sums) for sums in (total, count, n))
            z = None if z is None else documents.with_trunk(z)
        loss = self.aux_loss * E / (self.top_k * n) * (count * (total / n[:, None])).sum(-1)
        if z is not None:
            loss = loss + self.z_loss * z / n
        with torch.no_grad():
            entropy = torch.special.entr(p).sum(-1).view(B, T)
        if documents is None:
            return Aux(loss[:, None], count.sum(0), entropy)
        return Aux(loss[of].view(B, T), count[documents.run_is_text].sum(0), entropy)

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """After a step whose tokens went to the experts in numbers `load` (E,): raise the bias of those that had less
        than the mean and lower that of the others."""
        if self.bias is not None and self.bias_rate is not None:
            load = load.to(self.bias)
            self.bias.add_(torch.sign(load.mean() - load), alpha=self.bias_rate)


def interleave(
    dim: int,
    layer: int,
    *,
    first_dense: int,
    every: int,
    dense: Callable[[int, int], nn.Module],
    sparse: Callable[[int, int], nn.Module],
) -> nn.Module:
    """The feed-forward part of a layer: `dense` in the first `first_dense` layers, from there on `sparse` in every
    `every`-th (numbered from 1) and `dense` in the others."""
    return (sparse if layer >= first_dense and (layer + 1) % every == 0 else dense)(dim, layer)


def check_interleave(first_dense: int, every: int) -> None:
    """Raises ValueError for settings out of range; config.py runs it before torch is imported."""
    if first_dense < 0 or every < 1:
        raise ValueError(f"first_dense={first_dense} should be at least 0 and every={every} at least 1; set model.ffn")


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid}


# ---------------------------------------------------------------- the experts' computation


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    out: Tensor,
    act: Callable[[Tensor], Tensor],
    compute: str = "auto",
) -> Tensor:
    """sum_k weights[n, k] out_e (act(gate_e x_n) * up_e x_n) with e = chosen[n, k].

    x (N, D), chosen and weights (N, K), gate_up (E, 2H, D) with the gates first, out (E, D, H) -> (N, D). Computed in
    autocast's dtype where that is on."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if compute == "auto":  # the grouped kernel wants CUDA, bf16 and rows of whole 16 bytes
        aligned = x.shape[1] % 8 == 0 and out.shape[2] % 8 == 0
        compute = "grouped" if x.is_cuda and x.dtype == torch.bfloat16 and aligned else "batched"
    with torch.autocast(x.device.type, enabled=False):
        return EXPERTS[compute](x, chosen, weights, gate_up, out, act)


def naive(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, out: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """The definition, one expert after another: what the others are tested against."""
    y, gate_up, out = torch.zeros_like(x), gate_up.to(x.dtype), out.to(x.dtype)
    for e in range(len(out)):
        token, k = (chosen == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[e]).chunk(2, -1)
        y = y.index_add(0, token, F.linear(act(gate) * up, out[e]) * weights[token, k, None].to(x.dtype))
    return y


class Layout(NamedTuple):
    """Where each token's visits are computed: experts in groups of similar load, the visits of each in a block of equal
    length, blocks one after another."""

    groups: list[tuple[list[int], int]]  # experts, rows a block
    tokens: Tensor  # (R,) the token of each row; padding repeats token 0
    back: Tensor  # (N * K,) the row of each visit


def layout(chosen: Tensor, n_experts: int, size: int) -> Layout:
    """Of chosen (N, K), with `size` experts a group; those that no token visits are left out.

    Blocks are filled up to a power of two, or from 32 on to one of at most sixteen lengths an octave. Not for the
    products' sake: on CPU the bf16 library compiles a product for every new shape, which takes longer than to compute
    it, so there must be few."""
    flat = chosen.flatten()
    count = torch.bincount(flat, minlength=n_experts)
    counts = count.tolist()
    by_load = sorted((e for e in range(n_experts) if counts[e]), key=lambda e: -counts[e])
    groups, starts, total = [], [0] * n_experts, 0
    for i in range(0, len(by_load), size):
        experts = by_load[i : i + size]
        most = counts[experts[0]]
        step = 1 << max(5, most.bit_length() - 5)
        rows = -(-most // step) * step if most > 32 else 1 << (most - 1).bit_length()
        for e in experts:
            starts[e] = total
            total += rows
        groups.append((experts, rows))
    # numpy sorts small integers in linear time
    order = torch.from_numpy(flat.cpu().numpy().astype("uint16").argsort(kind="stable")).to(flat.device)
    place = torch.arange(len(flat), device=flat.device)
    place += (torch.tensor(starts, device=flat.device) - count.cumsum(0) + count)[flat[order]]
    tokens = place.new_zeros(total).index_copy_(0, place, order // chosen.shape[1])
    return Layout(groups, tokens, torch.empty_like(order).scatter_(0, order, place))


class _Batched(torch.autograd.Function):
    """A few batched products a step instead of several an expert, every gather written as one, and the K rows of a token
    summed as they are gathered."""

    @staticmethod
    def forward(ctx, x, chosen, weights, gate_up, out, act, size):
        lay = layout(chosen, len(out), size)
        matrices = [_stack(w, experts, x.dtype) for experts, _ in lay.groups for w in (gate_up, out)]
        scale = weights.new_zeros(len(lay.tokens)).index_copy_(0, lay.back, weights.flatten())[:, None].to(x.dtype)
        h = _products(x.index_select(0, lay.tokens), matrices[::2], lay, True)
        gate, up = (t.contiguous() for t in h.chunk(2, -1))  # activations are slow on half rows
        with torch.enable_grad():
            acted = act(gate.requires_grad_())
        y = _products((acted.detach() * up).mul_(scale), matrices[1::2], lay, True)
        ctx.save_for_backward(x, up, scale, *matrices)
        ctx.gate, ctx.acted, ctx.lay, ctx.shapes = gate, acted, lay, (gate_up.shape, out.shape)
        return _gather(y, lay, chosen)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, up, scale, *matrices = ctx.saved_tensors
        lay, acted = ctx.lay, ctx.acted.detach()
        visits = lay.back.view(len(x), -1)
        dy = dy.index_select(0, lay.tokens)
        d = _products(dy, matrices[1::2], lay, False)
        a = acted * up
        d_scale = (d * a).sum(-1)
        d.mul_(scale)
        d_out = _outer(dy, a.mul_(scale), lay, ctx.shapes[1]) if ctx.needs_input_grad[4] else None
        dh = torch.empty(len(d), 2 * d.shape[1], dtype=d.dtype, device=d.device)
        d_gate, d_up = dh.chunk(2, -1)
        torch.mul(d, acted, out=d_up)
        d_gate.copy_(torch.autograd.grad(ctx.acted, ctx.gate, d.mul_(up), retain_graph=True)[0])
        learns = ctx.needs_input_grad[3]  # not where only adapters are trained
        d_gate_up = _outer(dh, x.index_select(0, lay.tokens), lay, ctx.shapes[0]) if learns else None
        dx = _gather(_products(dh, matrices[::2], lay, False), lay, visits)
        return dx, None, d_scale.index_select(0, lay.back).view(visits.shape), d_gate_up, d_out, None, None


def _gather(rows: Tensor, lay: Layout, visits: Tensor) -> Tensor:
    """The sum of each token's rows: (R, n) -> (N, n)."""
    return F.embedding_bag(lay.back.view(visits.shape), rows, mode="sum")


def _stack(weights: Tensor, experts: list[int], dtype: torch.dtype) -> Tensor:
    """The matrices of some experts (E', m, n), cast on the way."""
    if len(experts) == 1:
        return weights[experts[0]][None].to(dtype)
    stacked = weights.new_empty(len(experts), *weights.shape[1:], dtype=dtype)
    for to, e in zip(stacked, experts):
        to.copy_(weights[e])
    return stacked


def _blocks(t: Tensor, lay: Layout) -> list[Tensor]:
    """(R, n) -> for each group (E', rows, n)."""
    parts = t.split([len(experts) * rows for experts, rows in lay.groups])
    return [part.view(len(experts), rows, -1) for part, (experts, rows) in zip(parts, lay.groups)]


def _products(rows: Tensor, matrices: list[Tensor], lay: Layout, transposed: bool) -> Tensor:
    """Each block times its expert's matrix, or the transposed one: (R, n) -> (R, m)."""
    y = rows.new_empty(len(rows), matrices[0].shape[1 if transposed else 2] if matrices else 0)
    for a, w, to in zip(_blocks(rows, lay), matrices, _blocks(y, lay)):
        torch.bmm(a, w.transpose(1, 2) if transposed else w, out=to)
    return y


def _outer(left: Tensor, right: Tensor, lay: Layout, shape: torch.Size) -> Tensor:
    """left^T right of each expert's block: the gradient of its matrix, fp32; (R, m), (R, n) -> (E, m, n)."""
    grad = torch.empty(shape, device=left.device)
    unvisited = set(range(shape[0]))
    for a, b, (experts, _) in zip(_blocks(left, lay), _blocks(right, lay), lay.groups):
        for e, product in zip(experts, torch.bmm(a.transpose(1, 2), b)):
            grad[e].copy_(product)
        unvisited -= set(experts)
    for e in unvisited:
        grad[e].zero_()
    return grad


@torch.compiler.disable
def batched(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, out: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """Experts of similar load together, as batched products: the fastest on CPU."""
    # Experts one by one need no copy of their weights: best where nothing is trained or cast, as in generation.
    size = max(1, len(out) // 8) if torch.is_grad_enabled() else 1
    return _Batched.apply(x, chosen, weights, gate_up, out, act, size)


@torch.compiler.disable
def grouped(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, out: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """Tokens sorted by expert and all experts' products in one call, whose sizes stay on the device: for CUDA. The
    weights are applied to the narrow rows between the two products."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=len(out)).cumsum(0, dtype=torch.int32)
    gate_up, out = gate_up.to(x.dtype), out.to(x.dtype)
    rows = F.grouped_mm(x.index_select(0, order // chosen.shape[1]), gate_up.transpose(1, 2), offs=ends)
    gate, up = rows.chunk(2, -1)
    rows = act(gate) * up * weights.flatten().index_select(0, order)[:, None].to(x.dtype)
    y = F.grouped_mm(rows, out.transpose(1, 2), offs=ends)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return y.index_select(0, back).view(*chosen.shape, -1).sum(1)


EXPERTS = {"naive": naive, "batched": batched, "grouped": grouped}
