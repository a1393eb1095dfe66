"""GGUF files (llama.cpp's format) as if they were Hugging Face folders: a config, tensors by Hugging Face's names, and a
tokenizer rebuilt from the metadata. The `gguf` package reads the file and undoes the quantisation."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor

from etude.errors import Refusal

QUANTS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
# general.architecture -> model_type without and with experts
KINDS = {
    "llama": ("llama", "mixtral"),
    "qwen2": ("qwen2", None),
    "qwen3": ("qwen3", None),
    "qwen3moe": (None, "qwen3_moe"),
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERT = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


class GGUF:
    """One file. `config` is like config.json; names(), shape(name) and get(name) speak of Hugging Face's tensors. Raises
    Refusal for a damaged file, an architecture or a quantisation that is not supported."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise Refusal("reading GGUF needs the gguf package: pip install gguf") from None
        self._dequantize, self.path = gguf.quants.dequantize, path
        try:
            reader = gguf.GGUFReader(path)
            self.meta = {k: f.contents() for k, f in reader.fields.items()}
        except Exception as error:  # the package raises whatever a damaged header leads to
            raise Refusal(f"{path} is not a whole GGUF file: {str(error) or type(error).__name__}") from None
        self.tensors = {t.name: t for t in reader.tensors}
        if wrong := sorted({t.tensor_type.name for t in self.tensors.values()} - set(QUANTS)):
            raise Refusal(f"{path} has tensors in {wrong[0]}, which is not supported; there is: {', '.join(QUANTS)}")
        self.arch = str(self.meta.get("general.architecture"))
        if self.arch not in KINDS:
            raise Refusal(f"{path}: architecture {self.arch} is not supported; there is: {', '.join(KINDS)}")
        self._last: tuple[str, np.ndarray] | None = None
        try:
            self.config = self._config()
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise Refusal(f"{path} has metadata of the wrong kind: {error}") from None
        self._named = self._names()

    def _get(self, key: str, default: Any = None) -> Any:
        """Metadata of the architecture. Raises Refusal where there is none and no default."""
        value = self.meta.get(f"{self.arch}.{key}", default)
        if value is None:
            raise Refusal(f"{self.path} has no {self.arch}.{key}")
        return value

    def _config(self) -> dict[str, Any]:
        n_experts = self._get("expert_count", 0)
        kind = KINDS[self.arch][bool(n_experts)]
        if kind is None:
            raise Refusal(f"{self.path}: {self.arch} {'with' if n_experts else 'without'} experts is not supported")
        heads, dim = self._get("attention.head_count"), self._get("embedding_length")
        head_dim = self._get("attention.key_length", dim // heads)
        if (turned := self._get("rope.dimension_count", head_dim)) != head_dim:
            raise Refusal(f"{self.path}: rope over {turned} of {head_dim} channels is not supported")
        config = {
            "model_type": kind,
            "hidden_size": dim,
            "num_hidden_layers": self._get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self._get("feed_forward_length", 4 * dim),
            "max_position_embeddings": self._get("context_length"),
            "rms_norm_eps": _short(self._get("attention.layer_norm_rms_epsilon")),
            "rope_theta": _short(self._get("rope.freq_base", 10000.0)),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "hidden_act": "silu",
        }
        if n_experts:
            size = self._get("expert_feed_forward_length", config["intermediate_size"])
            config |= {"num_experts_per_tok": self._get("expert_used_count"), "norm_topk_prob": True}
            config |= {"num_local_experts": n_experts, "num_experts": n_experts, "moe_intermediate_size": size}
        if self.arch == "llama" and "blk.0.attn_q.bias" in self.tensors:
            config["attention_bias"] = True
        if "rope_freqs.weight" in self.tensors:
            config["rope_scaling"] = self._llama3(config)
        elif (scaling := self._get("rope.scaling.type", "none")) != "none":
            config["rope_scaling"] = self._scaling(scaling)
        return config

    def _scaling(self, kind: str) -> dict[str, Any]:
        given = {k.rpartition(".")[2]: v for k, v in self.meta.items() if k.startswith(f"{self.arch}.rope.scaling.")}
        scaling = {"rope_type": kind, "factor": _short(given.pop("factor", 1.0))}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._get("rope.scaling.original_context_length")
            scaling |= {k: _short(given.pop(f"yarn_{k}")) for k in ("beta_fast", "beta_slow") if f"yarn_{k}" in given}
        if left := sorted(given.keys() - {"type", "original_context_length", "finetuned"}):
            raise Refusal(f"{self.path}: {self.arch}.rope.scaling.{left[0]} is not supported")
        return scaling

    def _llama3(self, config: dict[str, Any]) -> dict[str, Any]:
        """Llama 3.1's scaling is stored as what it comes to: a divisor of each pair's frequency."""
        from etude.model.rope import Llama3Rope, Rope

        divisors, dim, device = self._read("rope_freqs.weight"), config["head_dim"], torch.device("cpu")
        if divisors.shape != (dim // 2,):
            raise Refusal(f"{self.path}: rope_freqs.weight has shape {divisors.shape}, it should be ({dim // 2},)")
        numbers: dict[str, Any] = {"theta": config["rope_theta"], "dim": None, "layout": "half"}
        guess: dict[str, Any] = {"factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaled = Llama3Rope(**numbers, **guess, original_max_len=8192).frequencies(dim, device)
        wanted = Rope(**numbers).frequencies(dim, device) / torch.from_numpy(np.array(divisors))
        if not torch.allclose(scaled, wanted, rtol=1e-3):
            raise Refusal(f"{self.path}: rope_freqs.weight is no scaling that is known here")
        return {"rope_type": "llama3", "original_max_position_embeddings": 8192} | guess

    def _names(self) -> dict[str, tuple[str, int | None]]:
        """Hugging Face's name -> (the name here, the expert in it)."""
        named: dict[str, tuple[str, int | None]] = {}
        back = {v: k for k, v in TOP.items()}
        sparse = "block_sparse_moe" if self.config["model_type"] == "mixtral" else "mlp"
        inner = {v: k for k, v in BLOCK.items() if not k.endswith(".gate") or k == f"{sparse}.gate"}
        words = {v: k for k, v in EXPERT.items() if k.startswith("w") == (sparse != "mlp")}
        for name in self.tensors:
            if name in back:
                named[back[name]] = name, None
            elif m := re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight", name):
                for e in range(self.config["num_experts"]):
                    named[f"model.layers.{m[1]}.{sparse}.experts.{e}.{words[m[2]]}.weight"] = name, e
            elif (m := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)) and m[2] in inner:
                named[f"model.layers.{m[1]}.{inner[m[2]]}.{m[3]}"] = name, None
            elif name != "rope_freqs.weight":
                named[name] = name, None  # refused later, by this name
        return named

    def names(self) -> list[str]:
        return list(self._named)

    def shape(self, name: str) -> tuple[int, ...]:
        here, expert = self._named[name]
        shape = tuple(int(n) for n in reversed(self.tensors[here].shape))
        return shape if expert is None else shape[1:]

    def _read(self, here: str) -> np.ndarray:
        """A tensor's numbers; the last one is kept, because experts are asked for one by one."""
        if self._last is None or self._last[0] != here:
            t = self.tensors[here]
            numbers = t.data if t.tensor_type.name in ("F32", "F16") else self._dequantize(t.data, t.tensor_type)
            shape = [int(n) for n in reversed(t.shape)]
            self._last = here, np.ascontiguousarray(numbers).reshape(shape)
        return self._last[1]

    def get(self, name: str) -> Tensor:
        here, expert = self._named[name]
        numbers = self._read(here) if expert is None else self._read(here)[expert]
        tensor = torch.from_numpy(np.array(numbers))  # a copy: the file is mapped read-only
        if self.tensors[here].tensor_type.name == "BF16":
            tensor = tensor.bfloat16()
        if self.arch == "llama" and ".self_attn." in name and name.split(".")[-2] in ("q_proj", "k_proj"):
            # llama.cpp keeps this architecture's pairs side by side, Hugging Face half a head apart.
            heads = self.config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
            tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
        return tensor

    # ------------------------------------------------------------ the tokenizer

    def tokenizer_files(self) -> dict[str, str]:
        """tokenizer.json, tokenizer_config.json and generation_config.json of the metadata."""
        try:
            return self._tokenizer_files()
        except Refusal:
            raise
        except Exception as error:  # of the metadata, or of the tokenizers library, which raises plain ones
            what = f"no tokenizer can be built from its tokens, merges and scores ({type(error).__name__}: {' '.join(str(error).split())})"
            raise Refusal(f"{self.path}: {what}") from None

    def _tokenizer_files(self) -> dict[str, str]:
        kind = self.meta.get("tokenizer.ggml.model")
        makers = {"gpt2": self._byte_bpe, "llama": self._sentencepiece}
        if kind not in makers:
            raise Refusal(f"{self.path}: a tokenizer of kind {kind} is not supported; there is: {', '.join(makers)}")
        tokens = self.meta["tokenizer.ggml.tokens"]
        backend = makers[kind](tokens)
        types = self.meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
        if not isinstance(types, list) or len(types) != len(tokens):
            raise Refusal(f"{self.path}: tokenizer.ggml.token_type does not go with its {len(tokens)} tokens")
        # 3 control, 4 user-defined: found in text before anything is split
        added = [(t, k) for t, k in zip(tokens, types) if k in (3, 4)]
        backend.add_tokens([AddedToken(t, normalized=False, special=k == 3) for t, k in added])
        ids = {
            name: self.meta.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in (
                ("bos_token", "bos"),
                ("eos_token", "eos"),
                ("pad_token", "padding"),
                ("unk_token", "unknown"),
            )
        }
        special = {name: tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}
        if self.meta.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in special:
            bos = special["bos_token"]
            backend.post_processor = processors.Sequence(
                [*([backend.post_processor] if backend.post_processor else []), _beginning(bos, ids["bos_token"])]
            )
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special
        if template := self.meta.get("tokenizer.chat_template"):
            config["chat_template"] = template
        stop = {self.meta.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")} - {None}
        files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(config, indent=1)}
        if stop:
            files["generation_config.json"] = json.dumps(
                {"eos_token_id": sorted(stop), "bos_token_id": ids["bos_token"]}
            )
        return files

    def _byte_bpe(self, tokens: list[str]) -> Backend:
        pre = self.meta.get("tokenizer.ggml.pre", "default")
        if pre not in PRE:
            raise Refusal(
                f"{self.path}: a tokenizer that splits text as {pre} is not supported; there is: {', '.join(PRE)}"
            )
        merges = [(m.split(" ", 1)[0], m.split(" ", 1)[1]) for m in self.meta["tokenizer.ggml.merges"]]
        vocab = {t: i for i, t in enumerate(tokens)}
        if unknown := next((m for m in merges if not {m[0], m[1], m[0] + m[1]} <= vocab.keys()), None):
            raise Refusal(f"{self.path}: the merge {unknown} is not of its tokens")
        backend = Backend(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
        backend.pre_tokenizer = PRE[pre]()
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        if pre.startswith("qwen"):
            backend.normalizer = normalizers.NFC()
        return backend

    def _sentencepiece(self, tokens: list[str]) -> Backend:
        """Byte-fallback BPE whose merges follow from the tokens' scores: two pieces that make a token are merged in the
        order of its score."""
        scores, vocab = self.meta["tokenizer.ggml.scores"], {t: i for i, t in enumerate(tokens)}
        scored: list[tuple[float, tuple[str, str]]] = []
        for token, score in zip(tokens, scores):
            pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
            known = (p for p in pairs if p[0] in vocab and p[1] in vocab)
            scored += [(score, p) for p in sorted(known, key=lambda p: (vocab[p[0]], vocab[p[1]]))]
        merges = [p for _, p in sorted(scored, key=lambda s: -s[0])]
        unk = self.meta.get("tokenizer.ggml.unknown_token_id", 0)
        backend = Backend(models.BPE(vocab, merges, unk_token=tokens[unk], fuse_unk=True, byte_fallback=True))
        prefix = self.meta.get("tokenizer.ggml.add_space_prefix", True)
        spaces = normalizers.Replace(" ", "▁")
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return backend


def _short(number: float) -> float:
    """The number that was meant: metadata has 32 bits, 1e-5 comes back as 9.999999747378752e-06."""
    if number == 0 or not math.isfinite(number):
        return number
    return float(f"{number:.7g}")


def _beginning(token: str, i: Any) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, i)]
    )


def _split(pattern: str, *before: Any) -> Any:
    """Pieces that match, then their bytes."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([*before, split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_apart() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre -> how a text is cut before merging
PRE = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _digits_apart,
    "llama-bpe": lambda: _split(CONTRACTIONS + WORDS % "{1,3}"),
    "qwen2": lambda: _split(CONTRACTIONS + WORDS % ""),
}
