"""A model made ready to compute tokens: a second tree of modules over the same parameters, in which layers of one input
are one product and, on CPU, our own kernels do the work. The model itself is left as it is, to be trained on."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.infer import kernels
from etude.model import adapted
from etude.model.gqa import GQA
from etude.model.mla import MLA
from etude.model.mlp import MLP, GatedMLP
from etude.model.moe import MoE
from etude.model.parts import RMSNorm
from etude.model.rope import Rope, angles, rope
from etude.model.transformer import Block

WHOLE = 4096  # numbers; a share of it, for any usual number of threads, is whole vectors
Product = Callable[[Tensor], Tensor]  # (..., K) -> (..., N)


def pack(model: nn.Module, dtype: torch.dtype, quant: Literal["int8"] | None, native: bool) -> Any:
    """The model to compute tokens with in `dtype`, in evaluation mode. `native`: with our kernels; `quant`: linear layers
    but routers in 8 bits. What is neither merged (adapters), cast, joined nor quantised stays the model's own storage: call
    it again when the model has changed. A class derived from one of ours keeps its own methods."""
    twin: Any = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    adapted.merge(twin)
    _cast(twin, dtype)
    product = functools.partial(_product, quant=quant, native=native)
    turns: dict[tuple[Rope, int], Turns] = {}
    modules: list[Any] = list(twin.modules())
    for module in modules:
        if names := getattr(module, "side_by_side", None):
            layers = [module.get_submodule(n) for n in names]
            joined = product(_rows([x.weight for x in layers]), _biases(layers))
            if native and type(module) is GatedMLP:
                _own(module, activate=_glu(joined, module.activation))
            else:
                _own(module, project=functools.partial(_split, joined, [x.out_features for x in layers]))
            for layer in layers:
                layer.weight = None  # nobody multiplies by it alone
        if type(module) is MoE:
            router = module.router.weight.float()
            _own(module, router_logits=_linear(router, None) if native else functools.partial(_float_linear, router))
            if native:
                _own(module, experts=_experts(module, product))
                if module.score is torch.sigmoid:  # softmax goes row by row
                    _own(module, score=steady(torch.sigmoid))
        if native and type(module) is Block:
            _own(module, add=functools.partial(_add, float(module.residual)))
        if native and type(module) is MLP:
            _own(module, act=steady(module.act))
        if native and type(module) is RMSNorm:
            _own(module, forward=functools.partial(_norm, module.weight, module.eps))
        if native and type(module) in (GQA, MLA) and module.rope is not None:
            dim = module.rope.dim or (module.rope_dim if type(module) is MLA else module.head_dim)
            _own(module, turn=turns.setdefault((module.rope, dim), Turns(module.rope, dim)))
        if native and type(module) is MLA:
            absorb, expand = _absorbed(module)
            _own(module, absorb=absorb, expand=expand)
    if native and twin.logit_cap is not None:
        tanh, cap = steady(torch.tanh), twin.logit_cap
        _own(twin, logits=lambda x: cap * tanh(twin.head(twin.outgoing(x)).float() / cap))
    routers = {id(m.router) for m in twin.modules() if isinstance(m, MoE)}
    for module in modules:
        if isinstance(module, nn.Linear) and module.weight is not None and id(module) not in routers:
            _own(module, forward=product(module.weight, module.bias))
    twin.turns = list(turns.values())
    return twin


def steady(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same elementwise function, with bits that do not depend on where in a tensor a number stands: torch computes the
    few at the end of a thread's share one by one, which rounds differently; so there are none."""

    def run(x: Tensor) -> Tensor:
        if x.numel() % WHOLE == 0:
            return function(x)
        flat = x.new_zeros(-(-x.numel() // WHOLE) * WHOLE)
        flat[: x.numel()] = x.flatten()
        return function(flat)[: x.numel()].view(x.shape)

    return run


def _own(module: nn.Module, **methods: Callable[..., Any]) -> None:
    """Methods of this one instance, before those of its class."""
    vars(module).update(methods)


def _cast(twin: nn.Module, dtype: torch.dtype) -> None:
    """Give the tree parameters of `dtype`, tied ones still one. A router's bias stays as exact as it was balanced."""
    made: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.dtype != dtype and not (isinstance(module, MoE) and name == "bias"):
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
                setattr(module, name, made[id(p)])


def _rows(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([w.detach() for w in weights])


def _biases(layers: Sequence[Any]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    nothing = [layer.weight.new_zeros(layer.out_features) for layer in layers]
    return torch.cat([n if layer.bias is None else layer.bias.detach() for layer, n in zip(layers, nothing)])


def _product(weight: Tensor, bias: Tensor | None, *, quant: Literal["int8"] | None, native: bool) -> Product:
    """x -> x W^T + bias."""
    weight, bias = weight.detach().contiguous(), None if bias is None else bias.detach()
    if not native:
        return lambda x: F.linear(x, weight, bias)
    if quant is None:
        return _linear(weight, bias)
    small = kernels.quantize(weight)
    return lambda x: _shaped(kernels.linear_int8(x.reshape(-1, x.shape[-1]), small, bias), x)


def _linear(weight: Tensor, bias: Tensor | None) -> Product:
    return lambda x: _shaped(kernels.linear(x.reshape(-1, x.shape[-1]).to(weight.dtype), weight, bias), x)


def _float_linear(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x.float(), weight)


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    return y.view(*x.shape[:-1], y.shape[-1])


def _split(joined: Product, sizes: list[int], x: Tensor) -> tuple[Tensor, ...]:
    return joined(x).split(sizes, -1)


def _glu(joined: Product, activation: str) -> Product:
    def activate(x: Tensor) -> Tensor:
        h = joined(x)
        return _shaped(kernels.glu(h.view(-1, h.shape[-1]), activation), x)

    return activate


def _add(factor: float, x: Tensor, y: Tensor) -> Tensor:
    return kernels.add(x.contiguous(), y.contiguous(), factor)


def _norm(weight: Tensor, eps: float, x: Tensor) -> Tensor:
    if x.ndim == 4 and len(x) == 1:  # heads of queries or keys, side by side in a joined product
        return kernels.rms_norm(x[0], weight, eps)[None]
    return kernels.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


class Turns:
    """Rotary positions from a table: (B, H, T, D), positions (B, T) or None -> like the first. The table grows by whole
    blocks, so that a position has the same bits whenever it is computed."""

    BLOCK = 1024

    def __init__(self, how: Rope, dim: int):
        self.how, self.dim = how, dim
        self.tables = torch.empty(2, 0, dim)
        self.last: tuple[Tensor | None, Tensor, Tensor] = (None, self.tables[0], self.tables[1])

    def __call__(self, x: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None or len(x) > 1:  # whole contexts
            return rope(x, positions, self.how)
        self.look_up(positions)
        y = kernels.rope(x[0].transpose(0, 1), self.last[1], self.last[2], self.how.layout == "half")
        return y.transpose(0, 1)[None]

    def look_up(self, positions: Tensor) -> None:
        if self.last[0] is not positions:  # the layers of a step ask for the same ones
            self.last = positions, *self._rows(positions[0])

    def _rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        while int(positions.max()) >= (n := self.tables.shape[1]):
            block = torch.arange(n, n + self.BLOCK)[None]
            more = torch.stack(angles(block, self.how, self.dim, block.device)).view(2, self.BLOCK, self.dim)
            self.tables = torch.cat((self.tables, more), 1)
        cos, sin = self.tables.index_select(1, positions)
        return cos, sin

    def refill(self, rows: tuple[Tensor, Tensor], positions: Tensor) -> None:
        """Write what (N,) positions need into the memory of earlier `rows`."""
        for to, new in zip(rows, self._rows(positions)):
            to.copy_(new)


def _experts(
    moe: MoE, product: Callable[[Tensor, Tensor | None], Product]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Expert after expert, so that a token's sum has one order whoever its neighbours are."""
    parts = [(_glu(product(g, None), moe.activation), product(o, None)) for g, o in zip(moe.gate_up, moe.out)]

    def compute(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros(x.shape, dtype=torch.float32)
        for e in chosen.unique().tolist():
            activate, out = parts[e]
            token, k = (chosen == e).nonzero(as_tuple=True)
            y.index_add_(0, token, out(activate(x[token])).float() * weights[token, k, None])
        return y.to(x.dtype)

    return compute


def _absorbed(mla: MLA) -> tuple[Product, Product]:
    """MLA's two products with the halves of its up-projection: (B, H, T, nope) -> (B, H, T, R) and (B, H, T, R) ->
    (B, H, T, v), head by head."""
    up = mla.kv_up.weight.detach().view(mla.n_heads, -1, mla.rank)
    k_up, v_up = up.split((mla.nope_dim, mla.v_dim), 1)
    heads = [(k.T.contiguous(), v.contiguous()) for k, v in zip(k_up, v_up)]

    def by_head(x: Tensor, which: int) -> Tensor:
        x = x.transpose(0, 1)  # (H, B, T, .)
        each = [kernels.linear(x[h].reshape(-1, x.shape[-1]).contiguous(), w[which]) for h, w in enumerate(heads)]
        return torch.stack(each).view(*x.shape[:-1], -1).transpose(0, 1)

    return functools.partial(by_head, which=0), functools.partial(by_head, which=1)
