"""Hugging Face's architectures in our words: config.json <-> model node, and the names of the weights.

Each architecture reads a config (`to_node`) and writes one (`to_config`). A model of ours is of an architecture if writing
its node and reading it again gives the same node: so no setting is ever lost silently."""

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etude.config import check_relations, check_targets, show
from etude.errors import Refusal
from etude.model import parts

Node = dict[str, Any]
Config = dict[str, Any]


class Entry(NamedTuple):
    """Tensors of ours that are made of tensors of theirs, and the ways there and back."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    pack: Callable[[list[Tensor]], list[Tensor]]  # theirs -> ours
    unpack: Callable[[list[Tensor]], list[Tensor]]  # ours -> theirs


@dataclasses.dataclass(frozen=True)
class Architecture:
    """`parts` are the classes of attention, feed-forward and norm; `head` the class in transformers; `names` their
    modules by ours."""

    model_type: str
    head: str
    parts: tuple[str, str, str]
    to_node: Callable[[Config], Node]
    to_config: Callable[[Node], Config]
    names: dict[str, str]
    entries: Callable[[dict[str, str], list[str], int], Iterator[Entry]]


# ---------------------------------------------------------------- weights


def _same(tensors: list[Tensor]) -> list[Tensor]:
    return tensors


def decoder_entries(names: dict[str, str], ours: list[str], n_experts: int) -> Iterator[Entry]:
    """For each parameter of ours, where it lies in a file of theirs. An expert's matrices lie there one by one."""
    for name in ours:
        module, _, leaf = name.rpartition(".")
        if m := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            where, inner = f"model.layers.{m[1]}.", m[2]
            if inner in ("ffn.gate_up", "ffn.out"):
                kinds = ("gate", "up") if inner == "ffn.gate_up" else ("out",)
                files = tuple(
                    f"{where}{names['experts']}.{e}.{names[kind]}.weight" for e in range(n_experts) for kind in kinds
                )
                yield Entry((name,), files, _stack(n_experts), _unstack(len(kinds)))
                continue
            if inner == "ffn.bias":
                yield Entry((name,), (where + names[inner],), _same, _same)
                continue
            theirs = where + names[inner.rpartition(".")[0]]
        else:
            theirs = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[module]
        yield Entry((name,), (f"{theirs}.{leaf}",), _same, _same)


def _stack(n_experts: int) -> Callable[[list[Tensor]], list[Tensor]]:
    def pack(tensors: list[Tensor]) -> list[Tensor]:
        each = len(tensors) // n_experts
        return [torch.stack([torch.cat(tensors[i : i + each]) for i in range(0, len(tensors), each)])]

    return pack


def _unstack(kinds: int) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda tensors: [part for expert in tensors[0] for part in expert.chunk(kinds)]


def gpt2_entries(names: dict[str, str], ours: list[str], n_experts: int) -> Iterator[Entry]:
    """GPT-2 keeps q, k and v in one matrix, and all of a block's matrices transposed."""
    for name in ours:
        module, _, leaf = name.rpartition(".")
        if m := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
            where, inner = f"transformer.h.{m[1]}.", m[2]
            if inner in ("attn.k", "attn.v"):
                continue
            matrix = leaf == "weight" and "norm" not in inner
            if inner == "attn.q":
                trio = tuple(f"blocks.{m[1]}.attn.{x}.{leaf}" for x in "qkv")
                yield Entry(trio, (f"{where}attn.c_attn.{leaf}",), *_trio(matrix))
            else:
                turn = _transpose if matrix else _same
                yield Entry((name,), (f"{where}{names[inner]}.{leaf}",), turn, turn)
        else:
            theirs = {"embed": "transformer.wte", "pos_embed": "transformer.wpe", "norm": "transformer.ln_f"}
            yield Entry((name,), (f"{theirs.get(module, 'lm_head')}.{leaf}",), _same, _same)


def _transpose(tensors: list[Tensor]) -> list[Tensor]:
    return [t.mT.contiguous() for t in tensors]


def _trio(matrix: bool) -> tuple[Callable[[list[Tensor]], list[Tensor]], Callable[[list[Tensor]], list[Tensor]]]:
    if not matrix:
        return lambda ts: [t.clone() for t in ts[0].chunk(3)], lambda ts: [torch.cat(ts)]
    return lambda ts: [t.contiguous() for t in ts[0].mT.chunk(3)], lambda ts: [torch.cat(ts).mT.contiguous()]


ATTN = {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn.out": "self_attn.o_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
QK_NORM = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
MLP = {"ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.out": "mlp.down_proj"}
EXPERTS = {"ffn.router": "mlp.gate", "experts": "mlp.experts", "gate": "gate_proj", "up": "up_proj", "out": "down_proj"}
MIXTRAL = {
    "ffn.router": "block_sparse_moe.gate",
    "experts": "block_sparse_moe.experts",
    "gate": "w1",
    "up": "w3",
    "out": "w2",
}
SHARED = {
    f"ffn.shared.{a}": f"mlp.shared_experts.{b}_proj" for a, b in (("gate", "gate"), ("up", "up"), ("out", "down"))
}
MLA = {
    "attn.q": "self_attn.q_proj",
    "attn.q_down": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.q_up": "self_attn.q_b_proj",
    "attn.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.kv_up": "self_attn.kv_b_proj",
    "attn.out": "self_attn.o_proj",
}
GPT2 = {
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "attn.out": "attn.c_proj",
    "ffn.up": "mlp.c_fc",
    "ffn.out": "mlp.c_proj",
}
DEEPSEEK = NORMS | MLA | MLP | EXPERTS | SHARED | {"ffn.bias": "mlp.gate.e_score_correction_bias"}


# ---------------------------------------------------------------- config.json -> node

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "relu2": "relu2"}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")


def _unsupported(c: Config, **wanted: Any) -> None:
    """Raises Refusal for the first key whose value is given and not the wanted one."""
    for key, value in wanted.items():
        if c.get(key, value) != value:
            raise Refusal(f"config.json: {key}={c[key]} is not supported for {c['model_type']}; only {key}={value} is")


def _activation(c: Config, key: str = "hidden_act") -> str:
    name = c.get(key, "silu")
    if name not in ACTIVATIONS:
        raise Refusal(f"config.json: {key}={name} is not supported; there is {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rope_node(c: Config, layout: str = "half", theta: float = 10000.0) -> Node:
    """Of rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    given = (c.get("rope_parameters") or {}) | (c.get("rope_scaling") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    partial = given.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise Refusal(f"config.json: partial_rotary_factor={partial} is not supported for {c['model_type']}")
    base = next((t for t in (given.get("rope_theta"), c.get("rope_theta")) if t is not None), theta)
    node: Node = {"theta": float(base), "dim": None, "layout": layout}
    at = "etude.model.rope."
    if kind == "default":
        return {"_target_": at + "Rope"} | node
    length = given.get("original_max_position_embeddings", c["max_position_embeddings"])
    factor = given.get("factor")
    if factor is None and kind == "yarn":
        factor = c["max_position_embeddings"] / length
    node |= {"factor": float(factor or 1.0)}
    if kind == "linear":
        return {"_target_": at + "LinearRope"} | node
    if kind == "llama3":
        freq = {k: float(given[k]) for k in ("low_freq_factor", "high_freq_factor")}
        return {"_target_": at + "Llama3Rope", "original_max_len": length} | node | freq
    if kind == "yarn" and given.get("truncate", True):
        betas = {"beta_fast": float(given.get("beta_fast") or 32), "beta_slow": float(given.get("beta_slow") or 1)}
        optional = {k: _number(given.get(k)) for k in ("mscale", "mscale_all_dim", "attention_factor")}
        return {"_target_": at + "YarnRope", "original_max_len": length} | node | betas | optional
    raise Refusal(
        f"config.json: rope_type={kind} is not supported; there is default, linear, llama3, yarn (one that changes with the length of the text would leave the cached keys behind)"
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def model_node(c: Config, attn: Node, ffn: Node, **changes: Any) -> Node:
    """What all architectures but GPT-2 have in common."""
    return {
        "_target_": "etude.model.transformer.Transformer",
        "_partial_": True,
        "dim": c["hidden_size"],
        "n_layers": c["num_hidden_layers"],
        "max_len": c["max_position_embeddings"],
        "pos": "rope",
        "tied": bool(c.get("tie_word_embeddings", False)),
        "norm_at": "pre",
        "embed_scale": None,
        "residual_scale": 1.0,
        "logit_cap": None,
        "dropout": 0.0,
        "init_std": c.get("initializer_range", 0.02),
        "checkpoint": False,
        "attn": attn,
        "ffn": ffn,
        "norm": {"_target_": "etude.model.parts.RMSNorm", "_partial_": True, "eps": c.get("rms_norm_eps", 1e-6)},
    } | changes


def gqa_node(c: Config, **changes: Any) -> Node:
    return {
        "_target_": "etude.model.gqa.GQA",
        "_partial_": True,
        "n_heads": c["num_attention_heads"],
        "n_kv_heads": c.get("num_key_value_heads") or c["num_attention_heads"],
        "head_dim": c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        "rope": rope_node(c),
        "rope_layers": None,
        "window": None,
        "qk_norm": False,
        "norm_eps": c.get("rms_norm_eps", 1e-6),
        "gate": False,
        "bias": bool(c.get("attention_bias", False)),
        "out_bias": bool(c.get("attention_bias", False)),
        "dropout": 0.0,
    } | changes


def swiglu_node(c: Config, hidden: int, bias: bool = False) -> Node:
    return {
        "_target_": "etude.model.mlp.GatedMLP",
        "_partial_": True,
        "hidden": hidden,
        "activation": _activation(c),
        "bias": bias,
        "dropout": 0.0,
    }


def moe_node(c: Config, **changes: Any) -> Node:
    return {
        "_target_": "etude.model.moe.MoE",
        "_partial_": True,
        "n_experts": 0,
        "top_k": c["num_experts_per_tok"],
        "n_shared": 0,
        "hidden": 0,
        "activation": _activation(c),
        "score": "softmax",
        "n_groups": None,
        "top_groups": None,
        "group_top": 2,
        "renormalize": True,
        "scale": 1.0,
        "aux_loss": float(c.get("router_aux_loss_coef", 0.001)),
        "z_loss": 0.0,
        "bias_rate": None,
        "compute": "auto",
        "dropout": 0.0,
    } | changes


def interleaved(dense: Node, sparse: Node, first_dense: int, every: int) -> Node:
    return {
        "_target_": "etude.model.moe.interleave",
        "_partial_": True,
        "first_dense": first_dense,
        "every": every,
        "dense": dense,
        "sparse": sparse,
    }


def llama_node(c: Config) -> Node:
    return model_node(c, gqa_node(c), swiglu_node(c, c["intermediate_size"], bool(c.get("mlp_bias", False))))


def windows(c: Config, first: int | None = None) -> int | list[int | None] | None:
    """The window of each layer: of layer_types, or of all from `first` on (None: of all)."""
    size, n = c.get("sliding_window"), c["num_hidden_layers"]
    if size is None or c.get("use_sliding_window", True) is False:
        return None
    kinds = c.get("layer_types") or ["full_attention" if i < (first or 0) else "sliding_attention" for i in range(n)]
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise Refusal(f"config.json: layer_types has {unknown[0]}, which is not supported")
    each = [size if kind == "sliding_attention" else None for kind in kinds]
    return each[0] if len(set(each)) == 1 else each


def mistral_node(c: Config) -> Node:
    return model_node(c, gqa_node(c, window=windows(c)), swiglu_node(c, c["intermediate_size"]))


def qwen2_node(c: Config) -> Node:
    attn = gqa_node(
        c, bias=True, out_bias=False, window=windows({"use_sliding_window": False} | c, c.get("max_window_layers", 28))
    )
    return model_node(c, attn, swiglu_node(c, c["intermediate_size"]))


def qwen3_attn(c: Config) -> Node:
    window = windows({"use_sliding_window": False} | c, c.get("max_window_layers", 28))
    return gqa_node({"head_dim": 128} | c, qk_norm=True, window=window)


def qwen3_node(c: Config) -> Node:
    return model_node(c, qwen3_attn(c), swiglu_node(c, c["intermediate_size"]))


def mixtral_node(c: Config) -> Node:
    ffn = moe_node(c, n_experts=c.get("num_local_experts", 8), hidden=c["intermediate_size"])
    return model_node({"rms_norm_eps": 1e-5} | c, gqa_node({"rms_norm_eps": 1e-5} | c, window=windows(c)), ffn)


def qwen3_moe_node(c: Config) -> Node:
    if c.get("mlp_only_layers"):
        raise Refusal(f"config.json: mlp_only_layers={c['mlp_only_layers']} is not supported; decoder_sparse_step is")
    window = c.get("sliding_window") if c.get("use_sliding_window") else None
    experts = c.get("num_experts", c.get("num_local_experts", 128))
    ffn = moe_node(
        c, n_experts=experts, hidden=c["moe_intermediate_size"], renormalize=bool(c.get("norm_topk_prob", False))
    )
    if (step := c.get("decoder_sparse_step", 1)) != 1:
        ffn = interleaved(swiglu_node(c, c["intermediate_size"]), ffn, 0, step)
    return model_node(c, qwen3_attn(c) | {"window": window}, ffn)


def mla_node(c: Config, interleave: bool) -> Node:
    if c.get("num_key_value_heads") not in (None, c["num_attention_heads"]):
        raise Refusal(f"config.json: num_key_value_heads={c['num_key_value_heads']} is not supported with MLA")
    return {
        "_target_": "etude.model.mla.MLA",
        "_partial_": True,
        "n_heads": c["num_attention_heads"],
        "q_lora_rank": c.get("q_lora_rank"),
        "kv_lora_rank": c["kv_lora_rank"],
        "qk_nope_head_dim": c["qk_nope_head_dim"],
        "qk_rope_head_dim": c["qk_rope_head_dim"],
        "v_head_dim": c["v_head_dim"],
        "rope": rope_node(c, "interleaved" if interleave else "half"),
        "rope_layers": None,
        "window": None,
        "norm_eps": 1e-6,
        "bias": bool(c.get("attention_bias", False)),
        "dropout": 0.0,
    }


def deepseek_ffn(c: Config, **changes: Any) -> Node:
    _unsupported(c, moe_layer_freq=1, mlp_bias=False)
    experts = {"n_experts": c["n_routed_experts"], "hidden": c["moe_intermediate_size"]}
    sparse = moe_node(
        c,
        **experts,
        n_shared=c.get("n_shared_experts") or 0,
        scale=float(c.get("routed_scaling_factor", 1.0)),
        aux_loss=float(c.get("aux_loss_alpha", 0.001)),
        **changes,
    )
    dense = swiglu_node(c, c["intermediate_size"])
    return interleaved(dense, sparse, c.get("first_k_dense_replace", 0), 1)


def deepseek_v2_node(c: Config) -> Node:
    _unsupported(c, norm_topk_prob=False, scoring_func="softmax")
    method = c.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise Refusal(f"config.json: topk_method={method} is not supported; greedy and group_limited_greedy are")
    groups = {} if method == "greedy" else {"n_groups": c["n_group"], "top_groups": c["topk_group"]}
    return model_node(c, mla_node(c, True), deepseek_ffn(c, renormalize=False, group_top=1, **groups))


def deepseek_v3_node(c: Config) -> Node:
    _unsupported(c, scoring_func="sigmoid", topk_method="noaux_tc")
    ffn = deepseek_ffn(
        c,
        score="sigmoid",
        n_groups=c["n_group"],
        top_groups=c["topk_group"],
        renormalize=bool(c.get("norm_topk_prob", True)),
        bias_rate=0.001,
    )
    return model_node(c, mla_node(c, bool(c.get("rope_interleave", True))), ffn)


def gpt2_node(c: Config) -> Node:
    usual: Config = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "activation_function": "gelu_new"}
    c = usual | c
    _unsupported(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    common = {
        "hidden_size": c["n_embd"],
        "num_hidden_layers": c["n_layer"],
        "max_position_embeddings": c["n_positions"],
        "num_attention_heads": c["n_head"],
        "tie_word_embeddings": c.get("tie_word_embeddings", True),
        "initializer_range": c.get("initializer_range", 0.02),
        "model_type": "gpt2",
    }
    ffn = {
        "_target_": "etude.model.mlp.MLP",
        "_partial_": True,
        "hidden": c.get("n_inner") or 4 * c["n_embd"],
        "activation": _activation(c, "activation_function"),
        "bias": True,
        "dropout": 0.0,
    }
    norm = {
        "_target_": "etude.model.parts.LayerNorm",
        "_partial_": True,
        "eps": c.get("layer_norm_epsilon", 1e-5),
        "bias": True,
    }
    attn = gqa_node(common, rope=None, bias=True, out_bias=True)
    return model_node(common, attn, ffn, pos="learned", norm=norm)


# ---------------------------------------------------------------- node -> config.json


def _activation_name(name: str) -> str:
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)


def rope_config(rope: Node) -> Config:
    """As transformers 4 and 5 both read it."""
    kind = {"Rope": None, "LinearRope": "linear", "Llama3Rope": "llama3", "YarnRope": "yarn"}.get(_class(rope))
    config: Config = {"rope_theta": rope["theta"]}
    if kind is None:
        return config
    skip = ("_target_", "theta", "dim", "layout", "original_max_len")
    scaling = {"rope_type": kind} | {k: v for k, v in rope.items() if k not in skip and v is not None}
    if "original_max_len" in rope:
        scaling["original_max_position_embeddings"] = rope["original_max_len"]
    return config | {"rope_scaling": scaling}


def common_config(n: Node) -> Config:
    """Of a decoder with RMSNorm and rotary positions."""
    return {
        "hidden_size": n["dim"],
        "num_hidden_layers": n["n_layers"],
        "max_position_embeddings": n["max_len"],
        "tie_word_embeddings": n["tied"],
        "rms_norm_eps": n["norm"]["eps"],
        "initializer_range": n["init_std"] or 0.02,
        "num_attention_heads": n["attn"]["n_heads"],
    } | (rope_config(n["attn"]["rope"]) if n["attn"]["rope"] else {})


def gqa_config(n: Node) -> Config:
    a = n["attn"]
    return common_config(n) | {"num_key_value_heads": a["n_kv_heads"], "head_dim": a["head_dim"]}


def dense_config(n: Node) -> Config:
    f = n["ffn"]
    return gqa_config(n) | {"intermediate_size": f["hidden"], "hidden_act": _activation_name(f["activation"])}


def llama_config(n: Node) -> Config:
    return dense_config(n) | {"attention_bias": n["attn"]["bias"], "mlp_bias": n["ffn"]["bias"]}


def mistral_config(n: Node) -> Config:
    window = n["attn"]["window"]
    return dense_config(n) | {"sliding_window": None if isinstance(window, list) else window}


def window_config(n: Node) -> Config:
    window, layers = n["attn"]["window"], n["n_layers"]
    each = window if isinstance(window, list) else [window]
    each = [each[i % len(each)] for i in range(layers)]
    sizes = {w for w in each if w is not None}
    if len(sizes) != 1:
        return {"use_sliding_window": False, "sliding_window": None}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in each]
    return {"use_sliding_window": True, "sliding_window": sizes.pop(), "max_window_layers": 0, "layer_types": kinds}


def qwen2_config(n: Node) -> Config:
    return dense_config(n) | window_config(n)


def qwen3_config(n: Node) -> Config:
    return dense_config(n) | window_config(n) | {"attention_bias": n["attn"]["bias"]}


def mixtral_config(n: Node) -> Config:
    f, window = n["ffn"], n["attn"]["window"]
    return gqa_config(n) | {
        "intermediate_size": f["hidden"],
        "hidden_act": _activation_name(f["activation"]),
        "num_local_experts": f["n_experts"],
        "num_experts_per_tok": f["top_k"],
        "router_aux_loss_coef": f["aux_loss"],
        "sliding_window": None if isinstance(window, list) else window,
    }


def qwen3_moe_config(n: Node) -> Config:
    f, step = n["ffn"], 1
    dense = None
    if _class(f) == "interleave":
        f, step, dense = f["sparse"], f["every"], f["dense"]
    window = n["attn"]["window"]
    return gqa_config(n) | {
        "intermediate_size": dense["hidden"] if dense else 4 * n["dim"],
        "moe_intermediate_size": f["hidden"],
        "hidden_act": _activation_name(f["activation"]),
        "num_experts": f["n_experts"],
        "num_experts_per_tok": f["top_k"],
        "norm_topk_prob": f["renormalize"],
        "router_aux_loss_coef": f["aux_loss"],
        "decoder_sparse_step": step,
        "mlp_only_layers": [],
        "attention_bias": n["attn"]["bias"],
        "use_sliding_window": isinstance(window, int),
        "sliding_window": window if isinstance(window, int) else None,
    }


def deepseek_config(n: Node) -> Config:
    a, f = n["attn"], n["ffn"]
    sparse: Node = f.get("sparse", f)
    dense: Node = f.get("dense", {"hidden": 4 * n["dim"]})
    keys = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return (
        common_config(n)
        | {k: a[k] for k in keys}
        | {
            "num_key_value_heads": a["n_heads"],
            "attention_bias": a["bias"],
            "intermediate_size": dense["hidden"],
            "hidden_act": _activation_name(sparse["activation"]),
            "first_k_dense_replace": f.get("first_dense", 0),
            "moe_intermediate_size": sparse["hidden"],
            "n_routed_experts": sparse["n_experts"],
            "n_shared_experts": sparse["n_shared"],
            "num_experts_per_tok": sparse["top_k"],
            "routed_scaling_factor": sparse["scale"],
            "aux_loss_alpha": sparse["aux_loss"],
            "n_group": sparse["n_groups"],
            "topk_group": sparse["top_groups"],
        }
    )


def deepseek_v2_config(n: Node) -> Config:
    config = deepseek_config(n)
    method = "greedy" if config["n_group"] is None else "group_limited_greedy"
    return config | {"topk_method": method, "scoring_func": "softmax", "norm_topk_prob": False}


def deepseek_v3_config(n: Node) -> Config:
    config, f = deepseek_config(n), n["ffn"].get("sparse", n["ffn"])
    groups = {"n_group": config["n_group"] or 1, "topk_group": config["topk_group"] or 1}
    more = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": f["renormalize"]}
    layout = n["attn"]["rope"]["layout"] if n["attn"]["rope"] else "half"
    return config | groups | more | {"rope_interleave": layout == "interleaved", "num_nextn_predict_layers": 0}


def gpt2_config(n: Node) -> Config:
    return {
        "n_embd": n["dim"],
        "n_layer": n["n_layers"],
        "n_head": n["attn"]["n_heads"],
        "n_positions": n["max_len"],
        "n_ctx": n["max_len"],
        "n_inner": n["ffn"]["hidden"],
        "activation_function": {"gelu_tanh": "gelu_new"}.get(n["ffn"]["activation"], n["ffn"]["activation"]),
        "layer_norm_epsilon": n["norm"]["eps"],
        "initializer_range": n["init_std"] or 0.02,
        "tie_word_embeddings": n["tied"],
        "embd_pdrop": n["dropout"],
        "resid_pdrop": n["attn"]["dropout"],
        "attn_pdrop": 0.0,
    }


def _llama_like(
    model_type: str, head: str, ffn: str, node: Callable, config: Callable, names: dict[str, str], attn: str = "GQA"
) -> Architecture:
    return Architecture(model_type, f"{head}ForCausalLM", (attn, ffn, "RMSNorm"), node, config, names, decoder_entries)


DENSE = NORMS | ATTN | MLP
ARCHITECTURES = {
    a.model_type: a
    for a in (
        _llama_like("llama", "Llama", "GatedMLP", llama_node, llama_config, DENSE),
        _llama_like("mistral", "Mistral", "GatedMLP", mistral_node, mistral_config, DENSE),
        _llama_like("qwen2", "Qwen2", "GatedMLP", qwen2_node, qwen2_config, DENSE),
        _llama_like("qwen3", "Qwen3", "GatedMLP", qwen3_node, qwen3_config, DENSE | QK_NORM),
        _llama_like("mixtral", "Mixtral", "MoE", mixtral_node, mixtral_config, NORMS | ATTN | MIXTRAL),
        _llama_like("qwen3_moe", "Qwen3Moe", "MoE", qwen3_moe_node, qwen3_moe_config, DENSE | QK_NORM | EXPERTS),
        _llama_like("deepseek_v2", "DeepseekV2", "MoE", deepseek_v2_node, deepseek_v2_config, DEEPSEEK, "MLA"),
        _llama_like("deepseek_v3", "DeepseekV3", "MoE", deepseek_v3_node, deepseek_v3_config, DEEPSEEK, "MLA"),
        Architecture(
            "gpt2", "GPT2LMHeadModel", ("GQA", "MLP", "LayerNorm"), gpt2_node, gpt2_config, GPT2, gpt2_entries
        ),
    )
}


# ---------------------------------------------------------------- which architecture a model is of


def _class(node: Node) -> str:
    return node["_target_"].rpartition(".")[2]


def read(config: Config) -> tuple[Architecture, Node]:
    """The architecture and node of a config.json. Raises Refusal that names what is not supported."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise Refusal(f"model_type={kind} is not supported; there is: {', '.join(ARCHITECTURES)}")
    if how := config.get("quantization_config"):
        method = how.get("quant_method", "quantized") if isinstance(how, dict) else how
        raise Refusal(
            f"config.json: {method} weights are not supported; bring the model in float32, float16 or bfloat16"
        )
    arch = ARCHITECTURES[kind]
    try:
        node = arch.to_node(config)
        check_targets({"model": node}, ["etude.model"])
        check_relations({"model": node})
        return arch, node
    except KeyError as error:
        raise Refusal(f"config.json has no {error.args[0]}, which {kind} needs") from None
    except (TypeError, AttributeError, ZeroDivisionError, ValueError, OverflowError) as error:
        raise Refusal(f"config.json has a value of the wrong kind: {error}") from None


def canonical(node: Node) -> Node:
    """A model's node with nulls resolved, and without what says nothing of its function: two nodes that compute the same
    are equal."""
    n = copy.deepcopy(node)
    n |= {"dropout": 0.0, "init_std": None, "checkpoint": False}
    for key in ("mup", "mup_base"):  # what they do to the function is written into the weights: interop.fold
        n.pop(key, None)
    if n["embed_scale"] == 1.0:
        n["embed_scale"] = None
    attn = n["attn"]
    attn["dropout"] = 0.0
    if _class(attn) == "GQA":
        attn["n_kv_heads"] = attn["n_kv_heads"] or attn["n_heads"]
        attn["head_dim"] = attn["head_dim"] or n["dim"] // attn["n_heads"]
        if not attn["qk_norm"]:
            attn["norm_eps"] = None
        if attn["rope"] and attn["rope"]["dim"] == attn["head_dim"]:
            attn["rope"]["dim"] = None
    if isinstance(attn.get("window"), list):
        each = [attn["window"][i % len(attn["window"])] for i in range(n["n_layers"])]
        attn["window"] = each[0] if len(set(each)) == 1 else each
    if attn.get("rope_layers") and all(attn["rope_layers"]):
        attn["rope_layers"] = None
    _canonical_ffn(n["ffn"], n["dim"])
    if _class(n["ffn"]) == "interleave" and (n["ffn"]["first_dense"], n["ffn"]["every"]) == (0, 1):
        n["ffn"] = n["ffn"]["sparse"]
    return n


def _canonical_ffn(f: Node, dim: int) -> None:
    kind = _class(f)
    if kind == "interleave":
        _canonical_ffn(f["dense"], dim)
        _canonical_ffn(f["sparse"], dim)
        return
    f["dropout"] = 0.0
    if kind == "MLP":
        f["hidden"] = f["hidden"] or 4 * dim
    elif kind == "GatedMLP":
        f["hidden"] = f["hidden"] or parts.gated_hidden(dim)
    elif kind == "MoE":
        f["hidden"] = f["hidden"] or parts.gated_hidden(dim, f["top_k"] + f["n_shared"])
        f |= {"aux_loss": 0.0, "z_loss": 0.0, "compute": "auto"}
        f["bias_rate"] = None if f["bias_rate"] is None else 0.001
        if f["n_groups"] is None or f["n_groups"] == f["top_groups"]:
            f |= {"n_groups": None, "top_groups": None, "group_top": None}


def differences(a: Any, b: Any, path: str = "model") -> Iterator[str]:
    """Keys at which two nodes differ, with a's values, as one would type them."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            yield from differences(a.get(key), b.get(key), f"{path}.{key}")
    elif a != b:
        value = a["_target_"] if isinstance(a, dict) and "_target_" in a else a
        yield f"{path}={show(value)}"


def write(node: Node, prefer: str | None = None) -> tuple[Architecture, Config]:
    """The architecture that a model is of, and its config.json (without the vocabulary). `prefer` is tried first. Raises
    Refusal that names the settings which no architecture has."""
    wanted = canonical(node)
    ffn = _class(node["ffn"]["sparse"]) if _class(node["ffn"]) == "interleave" else _class(node["ffn"])
    classes = (_class(node["attn"]), ffn, _class(node["norm"]))
    fits = [a for a in ARCHITECTURES.values() if a.parts == classes]
    fits.sort(key=lambda a: a.model_type != prefer)
    closest: list[str] | None = None
    name = ""
    for arch in fits:
        try:
            config = arch.to_config(_resolved(node)) | {"model_type": arch.model_type, "architectures": [arch.head]}
            found = list(differences(wanted, canonical(arch.to_node(config))))
        except (KeyError, TypeError):  # settings of another kind than this architecture's
            continue
        except Refusal as error:
            found = [str(error)]
        if not found:
            return arch, config
        if closest is None or len(found) < len(closest):
            closest, name = found, arch.model_type
    if closest is None:
        raise Refusal(
            f"no Hugging Face architecture here has the parts {', '.join(classes)} together; there is: {', '.join(ARCHITECTURES)}"
        )
    raise Refusal(f"the nearest Hugging Face architecture, {name}, does not have {', '.join(closest)}")


def _resolved(node: Node) -> Node:
    """The node with its nulls resolved but its own dropout and losses, which a config.json records."""
    n, own = canonical(node), copy.deepcopy(node)
    n |= {"dropout": own["dropout"], "init_std": own["init_std"]}
    n["attn"]["dropout"] = own["attn"]["dropout"]
    sparse, recorded = n["ffn"].get("sparse", n["ffn"]), own["ffn"].get("sparse", own["ffn"])
    if "aux_loss" in recorded:
        sparse["aux_loss"] = recorded["aux_loss"]
    return n
