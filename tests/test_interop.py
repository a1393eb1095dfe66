"""Models that others wrote, converted: the same logits and gradients, and back again bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from paged import Rows
from torch import Tensor

from etude.interop import architectures, convert
from etude.model.transformer import Transformer

V = 99
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "rms_norm_eps": 1e-5}),
    "llama-3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral-whole": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-window": ("Qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"num_experts": 6, "norm_topk_prob": True, "head_dim": 12}),
    "qwen3_moe-every-2nd": ("Qwen3Moe", EXPERTS | {"num_experts": 6, "decoder_sparse_step": 2, "head_dim": 8}),
    "deepseek_v2": ("DeepseekV2", EXPERTS | LATENT | {"q_lora_rank": None, "routed_scaling_factor": 1.0}),
    "deepseek_v2-groups": (
        "DeepseekV2",
        EXPERTS
        | LATENT
        | {"q_lora_rank": 14, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        | {"routed_scaling_factor": 4.0, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        EXPERTS
        | LATENT
        | {"q_lora_rank": 14, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "attention_bias": True}
        | {"num_mtp_layers": 0, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek_v3-half": (
        "DeepseekV3",
        EXPERTS
        | LATENT
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False}
        | {"num_mtp_layers": 0},
    ),
    "gpt2": ("GPT2", {}),
    "gpt2-untied": ("GPT2", {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 40}),
}


def theirs(case: str, seed: int = 0) -> Any:
    """A small random transformers model, its norms, biases and router biases random too, in evaluation mode."""
    import transformers

    name, settings = CASES[case]
    if name == "GPT2":
        small = {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
        small |= {k: None for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        kind = transformers.GPT2LMHeadModel
    else:
        small, kind = SMALL, getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(seed)
    model = kind(kind.config_class(**small | settings)).eval()
    for tensor_name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.dim() == 1 and "inv_freq" not in tensor_name:
            t.data += 0.2 * torch.randn_like(t)
        elif t.dim() >= 2 and "experts" in tensor_name:  # transformers leaves them as they were allocated in places
            t.data = 0.3 * torch.randn_like(t)
        elif tensor_name.endswith("mlp.gate.weight"):
            t.data = 0.5 * torch.randn_like(t)
    return model


def convert_to(source: Path, to: Path, **changes: Any) -> None:
    cfg = {"from": str(source), "to": str(to), "dtype": "keep", "shard_gb": 4.0, "trusted": ["etude"]} | changes
    assert convert.run(cfg) == 0


def ids(B: int = 3, T: int = 23, seed: int = 1) -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * expected.detach().abs().max().clamp_min(1).item()
    )


@pytest.mark.parametrize("case", CASES)
def test_the_same_model(case: str, tmp_path: Path) -> None:
    """Logits to 1e-5 and gradients to 1e-4 of the largest one; with a cache; in a right-padded batch; as packed documents.
    Then back: every tensor bit for bit, and logits that transformers computes from our folder too."""
    import transformers

    hf = theirs(case)
    hf.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    convert_to(tmp_path / "hf", tmp_path / "ours")
    model = Transformer.from_pretrained(tmp_path / "ours")
    tokens = ids()
    expected = hf(tokens).logits
    assert expected.std() > 0.1
    close(model(tokens), expected)
    gradients(model, hf, tokens)
    cached(model, tokens, expected)
    # Rows of other lengths, filled up on the right
    padded = tokens.clone()
    padded[1, 9:], padded[2, 17:] = 0, 0
    found = model(padded)
    close(found[1, :9], hf(tokens[1:2, :9]).logits[0])
    close(found[2, :17], hf(tokens[2:, :17]).logits[0])
    # Three documents in one row, each as if it were alone
    lengths, at = [9, 1, 13], 0
    doc_ids = torch.repeat_interleave(torch.tensor([4, 7, 2]), torch.tensor(lengths))[None].expand(3, -1)
    found = model(tokens, doc_ids=doc_ids)
    for n in lengths:
        close(found[:, at : at + n], hf(tokens[:, at : at + n]).logits)
        at += n
    # and back
    convert_to(tmp_path / "ours", tmp_path / "back", shard_gb=20e3 / 2**30)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(hf)
    for (name, a), (_, b) in zip(hf.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(again(tokens).logits, expected)


def gradients(model: Transformer, hf: Any, tokens: Tensor) -> None:
    targets = ids(seed=2)
    targets[0, :7] = -100
    scores, _ = model(tokens, targets=targets)
    (-scores.logprob.sum()).backward()
    logits = hf(tokens).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    ).backward()
    arch, node = architectures.read(hf.config.to_dict())
    their = {n: p.grad for n, p in hf.named_parameters() if p.grad is not None}
    for name in [n for n in their if n.endswith("experts.gate_up_proj")]:  # transformers stacks what files keep apart
        base = name.removesuffix("gate_up_proj")
        stem = base.replace(".mlp.", ".block_sparse_moe.") if arch.model_type == "mixtral" else base
        for e, (both, down) in enumerate(zip(their.pop(name), their.pop(base + "down_proj"))):
            gate, up = both.chunk(2)
            words = [arch.names[w] for w in ("gate", "up", "out")]
            their |= {f"{stem}{e}.{w}.weight": g for w, g in zip(words, (gate, up, down))}
        if arch.model_type == "mixtral":
            router = base.replace("experts.", "gate.weight")
            their[router.replace(".mlp.", ".block_sparse_moe.")] = their.pop(router)
    ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    largest = max(float(g.abs().max()) for g in their.values())
    seen = 0
    for entry in convert._entries(arch, node, V):
        if entry.ours[0].endswith("ffn.bias"):
            continue
        for name, grad in zip(entry.ours, entry.pack([their[n] for n in entry.theirs])):
            torch.testing.assert_close(
                ours[name], grad, rtol=1e-4, atol=1e-4 * largest, msg=lambda m, n=name: f"{n}: {m}"
            )
            seen += 1
    assert seen == len(ours)


@torch.no_grad()
def cached(model: Transformer, tokens: Tensor, expected: Tensor) -> None:
    """A prefill of unequal rows, then token by token."""
    starts = [11, 3, 7]
    rows = Rows(model, 3, 23)
    for row, found in enumerate(rows.logits([t[:n] for t, n in zip(tokens, starts)])):
        close(found, expected[row, : starts[row]])
    for i in range(12):
        at = torch.tensor(starts) + i
        close(torch.cat(rows.logits(list(tokens.gather(1, at[:, None])))), expected[torch.arange(3), at])
