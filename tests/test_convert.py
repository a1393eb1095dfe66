"""convert.py: what it refuses and how, what it leaves behind, and models of ours that transformers computes alike."""

import functools
import json
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy as copy_of
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from running import ROOT, environment, run_in, tiny, train
from safetensors.torch import load_file, save_file
from test_interop import LLAMA3, YARN, close, convert_to, ids, theirs
from test_model import made, model_node, small, tokens, uninitialised
from torch import Tensor

from etude import checkpoint
from etude.errors import EtudeError, Refusal, StorageFault
from etude.infer.load import load
from etude.infer.sampling import Sampling
from etude.interop import convert
from etude.model import weights
from etude.model.transformer import Transformer
from etude.text import tokenizer as tok

GONE = object()  # a key to take out
Run = Callable[..., subprocess.CompletedProcess[str]]

ENGINE = {"_target_": "etude.infer.engine.Settings"}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`originals(case)`: the folder of a transformers model, made once; not to be written to."""
    made_already: dict[str, Path] = {}

    def original(case: str) -> Path:
        if case not in made_already:
            made_already[case] = tmp_path_factory.mktemp(case) / "hf"
            theirs(case).save_pretrained(made_already[case])
        return made_already[case]

    return original


@pytest.fixture
def copy(originals: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """`copy(case, key=value)`: a folder of one's own of a transformers model, with these keys of config.json changed."""

    def copied(case: str = "llama", **changes: Any) -> Path:
        folder = tmp_path / "hf"
        shutil.copytree(originals(case), folder)
        reconfigure(folder, **changes)
        return folder

    return copied


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in (config | changes).items() if v is not GONE}
    (folder / "config.json").write_text(json.dumps(config))


def reweigh(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Let `change` edit the tensors of a folder's one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every path under a folder, hidden ones too, with what the files hold."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def call(source: Path, to: Path, **changes: Any) -> int:
    cfg = {"from": str(source), "to": str(to), "dtype": "keep", "shard_gb": 4.0, "trusted": ["etude"]} | changes
    return convert.run(cfg)


def refused(source: Path, match: str = ".", to: Path | None = None, error: type = Refusal, **changes: Any) -> str:
    """Refused in one line, and everything around is as it was; -> the line."""
    to = to or source.parent / "to"
    before = everything(source.parent)
    with pytest.raises(error, match=match) as raised:
        call(source, to, **changes)
    assert everything(source.parent) == before
    line = str(raised.value)
    assert "\n" not in line and 10 < len(line) < 600
    return line


def refused_by_the_script(etude_run: Run, match: str, folder: Path, *overrides: str, code: int = 2) -> None:
    before = everything(folder)
    done = etude_run(*overrides, script="convert.py")
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and match in done.stderr
    assert everything(folder) == before


# ---------------------------------------------------------------- where from and where to


def test_the_script_refuses_in_one_line(etude_run: Run, copy: Callable[..., Path], tmp_path: Path) -> None:
    """Exit code 2, and nothing left behind, for a config, and for weights that are found wrong at the very end."""
    folder = copy(model_type="gemma2")
    refused_by_the_script(etude_run, "gemma2 is not supported", tmp_path, f"from={folder}", f"to={tmp_path}/to")
    reconfigure(folder, model_type="llama")
    reweigh(folder, lambda t: t.update({"lm_head.weight": torch.zeros(99, 31)}))
    refused_by_the_script(
        etude_run, "lm_head.weight makes", tmp_path, f"from={folder}", f"to={tmp_path}/to", "shard_gb=1e-5"
    )


def test_a_folder_that_is_there_is_not_touched(copy: Callable[..., Path], tmp_path: Path) -> None:
    """Neither one with something in it nor a file of that name; an empty folder may be filled."""
    folder, to = copy(), tmp_path / "to"
    to.mkdir()
    (to / ".hidden").write_text("mine")
    refused(folder, "exists already")
    refused(folder, "exists already", to=folder)
    (tmp_path / "file").write_text("mine")
    refused(folder, "exists already", to=tmp_path / "file")
    (to / ".hidden").unlink()
    assert call(folder, to) == 0
    assert Transformer.from_pretrained(to).n_layers == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "hf", "to"]


def test_the_current_folder_can_be_filled(
    copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """to=. in a new folder: written, or refused in words."""
    folder, here = copy(), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    try:
        call(folder, Path("."))
    except EtudeError:
        assert everything(here) == {}
    else:
        assert Transformer.from_pretrained(here).n_layers == 3


def test_sources_that_are_none(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    refused(tmp_path / "none", "none does not exist")
    (tmp_path / "model.txt").write_text("a model")
    refused(tmp_path / "model.txt", "is a file and not .gguf")
    refused(folder / "model.safetensors", "is a file and not .gguf", to=tmp_path / "to")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty")
    refused(folder, "shard_gb", shard_gb=0.0)
    refused(folder, "shard_gb", shard_gb=-1.0)


@pytest.mark.parametrize("size", [float("nan"), float("inf")])
def test_shards_of_no_size(size: float, copy: Callable[..., Path], tmp_path: Path) -> None:
    """Hydra reads shard_gb=nan and shard_gb=inf as numbers."""
    try:
        assert call(copy(), tmp_path / "to", shard_gb=size) == 0
    except EtudeError:
        assert not (tmp_path / "to").exists()


def test_no_model_type(copy: Callable[..., Path]) -> None:
    """A config.json without model_type is one of ours or nothing."""
    folder = copy(model_type=GONE)
    refused(folder, "config.json has format None")
    (folder / "config.json").write_text("{}")
    refused(folder, "config.json has format None")
    (folder / "config.json").unlink()
    refused(folder, "there is no .*config.json")
    (folder / "model.safetensors").unlink()
    refused(folder, "hf")


def test_a_disk_that_is_full(copy: Callable[..., Path], tmp_path: Path) -> None:
    """A file that cannot grow: exit code 4 and nothing left. The limit is the shell's (in blocks of 1 KiB)."""
    folder = copy()
    before = everything(tmp_path)
    script = f"ulimit -f 40; exec {sys.executable} convert.py from={folder} to={tmp_path}/to"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == StorageFault.code, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert everything(tmp_path) == before


def test_a_place_where_no_folder_can_be(copy: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(copy(), "could not write", to=tmp_path / "file" / "to", error=StorageFault)


def test_what_a_killed_one_left_is_not_in_the_way(copy: Callable[..., Path], tmp_path: Path) -> None:
    left = tmp_path / ".to.making"
    left.mkdir()
    (left / "shard-7.safetensors").write_text("half of it")
    assert call(copy(), tmp_path / "to") == 0
    found = sorted(p.name for p in (tmp_path / "to").iterdir())
    assert found == ["config.json", "generation_config.json", "model.safetensors"]
    assert not left.exists()


# ---------------------------------------------------------------- config.json

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONGROPE = DYNAMIC | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "model type": ("llama", {"model_type": "gemma2"}, "gemma2 is not supported; there is: llama, mistral"),
    "quantised": ("llama", {"quantization_config": {"quant_method": "gptq"}}, "gptq weights are not supported"),
    "quantised somehow": ("llama", {"quantization_config": {"bits": 4}}, "weights are not supported"),
    "rope dynamic": ("llama", {"rope_parameters": DYNAMIC}, "rope_type=dynamic is not supported"),
    "rope longrope": ("llama", {"rope_parameters": LONGROPE}, "rope_type=longrope is not supported"),
    "rope, before 5": (
        "llama",
        {"rope_parameters": GONE, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type=dynamic is not supported",
    ),
    "rope of half a head": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "activation": ("llama", {"hidden_act": "tanh"}, "hidden_act=tanh is not supported; there is silu"),
    "activation of gpt2": ("gpt2", {"activation_function": "tanh"}, "activation_function=tanh is not supported"),
    "scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported"),
    "layer types": ("qwen3", {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    "top-k method": ("deepseek_v2", {"topk_method": "best"}, "topk_method=best is not supported"),
    "top-k method of v3": ("deepseek_v3", {"topk_method": "greedy"}, "topk_method=greedy is not supported"),
    "scores": ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func=softmax is not supported"),
    "every second": ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
    "few latent heads": ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads=2 is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_unsupported_configs_are_named(what: str, copy: Callable[..., Path]) -> None:
    case, changes, match = UNSUPPORTED[what]
    refused(copy(case, **changes), match)


MISSING = {
    "llama": [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    ],
    "mixtral": ["num_experts_per_tok", "intermediate_size"],
    "qwen3_moe": ["moe_intermediate_size", "num_experts_per_tok"],
    "deepseek_v3": ["kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_group", "topk_group"],
}


@pytest.mark.parametrize("case,key", [(c, k) for c, keys in MISSING.items() for k in keys])
def test_missing_keys_are_named(case: str, key: str, copy: Callable[..., Path]) -> None:
    refused(copy(case, **{key: GONE}), f"no {key}, which {case} needs")


NUMBERS = {
    "llama": [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    ],
    "gpt2": ["n_embd", "n_layer", "n_head", "n_positions"],
    "mixtral": ["num_local_experts", "num_experts_per_tok", "num_attention_heads"],
    "deepseek_v3": ["kv_lora_rank", "v_head_dim", "n_routed_experts", "n_group", "topk_group", "moe_intermediate_size"],
}
WRONG: list[Any] = ["big", None, -1, 0, 1e9, 1.5, [], [2], {}, True]


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_that_are_none(case: str, value: Any, copy: Callable[..., Path]) -> None:
    """A count that is a text, nothing, a fraction, below 1, a list or an object: no traceback, and no export that
    could not be loaded."""
    folder = copy(case)
    before = (folder / "config.json").read_text()
    for key in NUMBERS[case]:
        (folder / "config.json").write_text(before)
        reconfigure(folder, **{key: value})
        refused(folder)


OTHERS: list[tuple[str, str, Any]] = [
    ("llama", "head_dim", "big"),
    ("llama", "head_dim", 1e9),
    ("llama", "num_key_value_heads", "big"),
    ("llama", "num_key_value_heads", 3),
    ("llama", "rms_norm_eps", "small"),
    ("llama", "rms_norm_eps", None),
    ("llama", "rms_norm_eps", []),
    ("llama", "initializer_range", "small"),
    ("llama", "initializer_range", [1]),
    ("llama", "hidden_act", 5),
    ("llama", "hidden_act", ["silu"]),
    ("llama", "hidden_act", None),
    ("llama", "model_type", ["llama"]),
    ("llama", "model_type", {}),
    ("llama", "model_type", None),
    ("llama", "quantization_config", "gptq"),
    ("llama", "quantization_config", [1]),
    ("llama", "rope_parameters", "default"),
    ("llama", "rope_parameters", [1]),
    ("llama", "rope_parameters", {"rope_theta": "big"}),
    ("llama", "rope_parameters", {"rope_theta": -1.0}),
    ("llama", "rope_parameters", {"rope_type": ["default"], "rope_theta": 1e4}),
    ("llama", "rope_parameters", {"rope_type": "linear", "factor": "big", "rope_theta": 1e4}),
    ("llama", "rope_parameters", {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}),
    ("llama", "rope_parameters", YARN | {"original_max_position_embeddings": 0, "factor": None}),
    ("llama", "rope_parameters", YARN | {"original_max_position_embeddings": "big"}),
    ("llama", "rope_parameters", YARN | {"beta_fast": [32]}),
    ("llama", "rope_parameters", YARN | {"mscale": "big"}),
    ("llama", "partial_rotary_factor", "half"),
    ("mistral", "sliding_window", "wide"),
    ("mistral", "sliding_window", -5),
    ("mistral", "sliding_window", 0),
    ("qwen3-window", "layer_types", 5),
    ("qwen3-window", "layer_types", [[]]),
    ("qwen3-window", "max_window_layers", "big"),
    ("qwen3_moe", "decoder_sparse_step", "big"),
    ("qwen3_moe", "decoder_sparse_step", 0),
    ("mixtral", "num_experts_per_tok", 5),
    ("mixtral", "router_aux_loss_coef", "big"),
    ("deepseek_v3", "first_k_dense_replace", "big"),
    ("deepseek_v3", "routed_scaling_factor", "big"),
    ("deepseek_v3", "n_group", 3),
    ("deepseek_v3", "topk_group", 5),
    ("deepseek_v3", "n_shared_experts", "big"),
]


@pytest.mark.parametrize("case,key,value", OTHERS, ids=str)
def test_values_of_the_wrong_kind(case: str, key: str, value: Any, copy: Callable[..., Path]) -> None:
    folder = copy(case)
    if key == "max_window_layers":
        reconfigure(folder, layer_types=GONE)
    reconfigure(folder, **{key: value})
    refused(folder)


BROKEN: dict[str, str | bytes] = {
    "empty": "",
    "half": '{"model_type": "lla',
    "not UTF-8": b'{"model_type": "llama\xff"}',
    "a list": "[1, 2]",
    "a number": "7",
    "deep": '{"model_type": "llama", "x": ' + "[" * 100_000,
    "deep and whole": '{"model_type": "llama", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("what", BROKEN)
def test_config_that_is_no_json_object(what: str, copy: Callable[..., Path]) -> None:
    folder, content = copy(), BROKEN[what]
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "key", ["initializer_range", "hidden_size", "rms_norm_eps", "rope_theta", "max_position_embeddings"]
)
def test_a_config_of_theirs_runs_no_code(key: str, copy: Callable[..., Path], tmp_path: Path) -> None:
    """Where a number should be, a `_target_` that copies a file: it comes from the internet, it is never called."""
    stolen = tmp_path / "stolen"
    target = {"_target_": "shutil.copyfile", "src": str(ROOT / "README.md"), "dst": str(stolen)}
    folder = copy(**{key: target})
    if key == "rope_theta":
        reconfigure(folder, rope_parameters=GONE)
    try:
        call(folder, tmp_path / "to")
    except Refusal as error:
        assert "\n" not in str(error)
    else:
        pytest.fail("it was converted")
    finally:
        assert not stolen.exists()


def test_an_export_of_ours_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target outside trusted= is refused before its module is imported; a package named there is not."""
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    made("dense").save_pretrained(tmp_path / "ours")
    for part in ("attn", "ffn", "norm", None):
        config = json.loads((tmp_path / "ours" / "config.json").read_text())
        (config["model"][part] if part else config["model"])["_target_"] = "evil_module.Part"
        folder = tmp_path / f"evil-{part}"
        shutil.copytree(tmp_path / "ours", folder)
        (folder / "config.json").write_text(json.dumps(config))
        refused(folder, "evil_module.Part is outside trusted", to=tmp_path / "to")
    assert "evil_module" not in sys.modules


# ---------------------------------------------------------------- weights


def test_tensors_that_are_missing_or_too_many(copy: Callable[..., Path]) -> None:
    """What a config promises is there, and what is there is kept: else it is named and counted."""
    folder = copy()
    whole = load_file(folder / "model.safetensors")
    up, bias = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"

    def without(*names: str) -> Callable[[dict[str, Tensor]], object]:
        return lambda t: (t.clear(), t.update({k: v for k, v in whole.items() if k not in names}))

    reweigh(folder, without(up))
    refused(folder, rf"no {up}, which this llama needs \(1 are missing\)")
    reweigh(folder, without("lm_head.weight", "model.norm.weight", up))
    refused(folder, r"no lm_head.weight.* \(3 are missing\)")
    reweigh(folder, without("model.embed_tokens.weight"))
    refused(folder, "no model.embed_tokens.weight")
    reweigh(folder, without())
    reweigh(folder, lambda t: t.update({bias: torch.zeros(32)}))
    refused(folder, rf"{bias} is not part of a llama .*\(1 such tensors\)")
    reweigh(folder, without())
    reweigh(folder, lambda t: t.update({"surprise": torch.zeros(3), "model.layers.0.x.weight": torch.zeros(3)}))
    refused(folder, r"model.layers.0.x.weight is not part .*\(2 such tensors\)")


def test_layers_that_are_left_out_are_deepseeks_alone(copy: Callable[..., Path]) -> None:
    """A config with fewer layers than the file would make another model of it, silently."""
    refused(copy(num_hidden_layers=2), "model.layers.2.*is not part of a llama")


SHAPES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "a row too many": ("llama", "model.layers.2.mlp.up_proj.weight", (49, 32)),
    "transposed": ("llama", "model.layers.0.mlp.down_proj.weight", (48, 32)),
    "flat": ("llama", "model.layers.0.self_attn.k_proj.weight", (512,)),
    "one number": ("llama", "model.norm.weight", ()),
    "an embedding of one axis": ("llama", "model.embed_tokens.weight", (99,)),
    "an embedding of none": ("llama", "model.embed_tokens.weight", ()),
    "an expert": ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w1.weight", (47, 32)),
    "an expert's width": ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w3.weight", (48, 31)),
    "an expert of one number": ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w2.weight", ()),
    "an expert less": ("mixtral", "model.layers.1.block_sparse_moe.gate.weight", (3, 32)),
    "three in one": ("gpt2", "transformer.h.0.attn.c_attn.weight", (32, 95)),
    "two of three": ("gpt2", "transformer.h.0.attn.c_attn.weight", (32, 2)),
    "three biases": ("gpt2", "transformer.h.1.attn.c_attn.bias", (2,)),
    "a matrix of one axis": ("gpt2", "transformer.h.1.mlp.c_fc.weight", (128,)),
    "positions": ("gpt2", "transformer.wpe.weight", (63, 32)),
}


@pytest.mark.parametrize("what", SHAPES)
def test_tensors_of_the_wrong_shape(what: str, copy: Callable[..., Path]) -> None:
    case, name, shape = SHAPES[what]
    folder = copy(case)
    assert load_file(folder / "model.safetensors")[name].shape != shape
    reweigh(folder, lambda t: t.update({name: torch.zeros(shape)}))
    refused(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_tensors_that_are_no_numbers_of_a_model(dtype: torch.dtype, copy: Callable[..., Path]) -> None:
    """Whole numbers are quantised weights without their scales: they could not be parameters."""
    folder, name = copy(), "model.layers.0.mlp.up_proj.weight"
    reweigh(folder, lambda t: t.update({name: torch.ones(48, 32, dtype=dtype)}))
    refused(folder, name)


@pytest.mark.parametrize("left", [0, 5, 200, 0.5, 0.999])
def test_truncated_weights(left: float, copy: Callable[..., Path]) -> None:
    folder = copy()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: left if isinstance(left, int) else int(left * len(whole))])
    refused(folder, "model.safetensors cannot be read")


def test_a_header_longer_than_the_file(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}" * 10)
    refused(folder, "model.safetensors cannot be read")


NAMES: dict[str, Any] = {
    "above": "../evil.safetensors",
    "far": "/etc/passwd",
    "below": "a/b.safetensors",
    "empty": "",
    "a number": 7,
    "nothing": None,
    "here": ".",
    "up": "..",
    "a list": ["model.safetensors"],
    "of Windows": "..\\evil.safetensors",
    "with a zero": "a\0b.safetensors",
}


@pytest.mark.parametrize("what", NAMES)
def test_an_index_that_leads_elsewhere(what: str, copy: Callable[..., Path]) -> None:
    """The file it names is there and would be a good one: it is refused for where it lies."""
    folder = copy()
    shutil.copy(folder / "model.safetensors", folder.parent / "evil.safetensors")
    (folder / "a").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "a" / "b.safetensors")
    found = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    found["lm_head.weight"] = NAMES[what]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": found}))
    refused(folder, "names a file")


def test_an_index_that_is_wrong(copy: Callable[..., Path]) -> None:
    folder = copy()
    index = folder / "model.safetensors.index.json"
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    for content in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": ["x"]}'):
        index.write_text(content)
        refused(folder, "index.json")
    index.write_text(json.dumps({"weight_map": names | {"lm_head.weight": "model-2.safetensors"}}))
    refused(folder, "model-2.safetensors cannot be read")
    index.write_text(json.dumps({"weight_map": names | {"lm_head.weight": "config.json"}}))
    refused(folder, "config.json cannot be read")
    reweigh(folder, lambda t: t.pop("lm_head.weight"))
    index.write_text(json.dumps({"weight_map": names}))
    refused(folder, "has no lm_head.weight, which its index promises")


def test_pickled_weights_say_why(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"no .*model.safetensors \(pytorch_model.bin may hold code; save the model with safetensors\)")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, r"no .*model.safetensors$")


def a_tokenizer(folder: Path) -> tok.Tokenizer:
    """A byte tokenizer's files in a folder, with a chat template."""
    made_here = tok.byte([], [])
    tokenizer = tok.Tokenizer(made_here.backend, {"chat_template": "{{ messages[0]['content'] }}"})
    for name, text in tokenizer.files().items():
        (folder / name).write_text(text)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return tokenizer


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", *convert.TOKENIZER_FILES])
def test_links_out_of_the_folder(name: str, copy: Callable[..., Path], tmp_path: Path) -> None:
    """By an absolute path and by a relative one."""
    folder = copy()
    a_tokenizer(folder)
    (tmp_path / "secret").mkdir()
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    (folder / name).rename(tmp_path / "secret" / name)
    (folder / name).symlink_to(tmp_path / "secret" / name)
    refused(folder, f"{name} is a link out of its folder")
    (folder / name).unlink()
    (folder / name).symlink_to(f"../secret/{name}")
    refused(folder, f"{name} is a link out of its folder")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", *convert.TOKENIZER_FILES])
def test_links_that_lead_nowhere(name: str, copy: Callable[..., Path], tmp_path: Path) -> None:
    """A link is not taken for a file that is missing, also where it may be."""
    folder = copy()
    a_tokenizer(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "nowhere")
    refused(folder, to=tmp_path / "to")


def test_hugging_faces_cache(copy: Callable[..., Path], tmp_path: Path) -> None:
    """A snapshot is links into that model's blobs; links into another model's are refused."""
    folder = copy()
    a_tokenizer(folder)
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, blobs / f"12{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/12{i}")
    convert_to(snapshot, tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").is_file() and not (tmp_path / "ours" / "config.json").is_symlink()
    assert tok.load(tmp_path / "ours").template == "{{ messages }}"
    other = tmp_path / "models--y" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(blobs / "120", other / "120")
    link = next(p for p in snapshot.iterdir() if p.readlink().name == "120")
    link.unlink()
    link.symlink_to("../../../models--y/blobs/120")
    refused(snapshot, "is a link out of its folder", to=tmp_path / "to")


# ---------------------------------------------------------------- what files of theirs may also hold


def test_layers_that_predict_further_tokens_are_left_out(copy: Callable[..., Path], tmp_path: Path) -> None:
    """DeepSeek-V3's file has one more layer than num_hidden_layers, with parts of its own."""
    folder = copy("deepseek_v3", num_nextn_predict_layers=1)
    convert_to(folder, tmp_path / "plain")
    more = {f"model.layers.3.{n}.weight": torch.ones(2, 2) for n in ("eh_proj", "enorm", "shared_head.head")}
    reweigh(folder, lambda t: t.update(more | {"model.layers.3.self_attn.o_proj.weight": torch.ones(3)}))
    convert_to(folder, tmp_path / "ours")
    assert same_tensors(tmp_path / "ours", tmp_path / "plain")


def same_tensors(a: Path, b: Path) -> bool:
    """Bit for bit, names and types too."""
    x, y = weights.tensors(a), weights.tensors(b)
    return list(sorted(x)) == list(sorted(y)) and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)


def test_gpt2_as_it_was_published(copy: Callable[..., Path], tmp_path: Path) -> None:
    """Names without `transformer.`, and the triangles that it kept as buffers."""
    folder = copy("gpt2")
    convert_to(folder, tmp_path / "plain")

    def publish(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(3):
            tensors[f"h.{i}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    reweigh(folder, publish)
    assert "wte.weight" in load_file(folder / "model.safetensors")
    convert_to(folder, tmp_path / "ours")
    assert same_tensors(tmp_path / "ours", tmp_path / "plain")
    close(Transformer.from_pretrained(tmp_path / "ours")(ids()), theirs("gpt2")(ids()).logits)


def test_a_tied_head_that_is_in_the_file_too(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy("llama-tied")
    convert_to(folder, tmp_path / "plain")
    reweigh(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    reweigh(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    convert_to(folder, tmp_path / "ours")
    assert same_tensors(tmp_path / "ours", tmp_path / "plain")


# ---------------------------------------------------------------- models of ours


def ours(*overrides: str) -> Transformer:
    """`made`, with what is no choice of a group put in afterwards: one composition for all that choose the same."""
    choices = [o for o in overrides if "/" in o.partition("=")[0] or "=" not in o]
    node = copy_of(model_node(*small(*choices)))
    for path, _, value in (o.partition("=") for o in overrides if o not in choices):
        *inner, last = path.removeprefix("model.").split(".")
        part = functools.reduce(operator.getitem, inner, node)
        assert last in part, path
        part[last] = yaml.safe_load(value)
    return made(*choices, **node)


UNFIT: dict[str, tuple[list[str], list[str]]] = {
    "gated": (["dense", "model/attn=gated"], [r"model\.attn\.gate=true"]),
    "cap": (["dense", "model.logit_cap=30"], [r"model\.logit_cap=30"]),
    "post": (["dense", "model.norm_at=post"], [r"model\.norm_at=post"]),
    "sandwich": (["qwen3", "model.norm_at=sandwich"], ["qwen3", r"model\.norm_at=sandwich"]),
    "shared": (["moe"], [r"model\.ffn\.n_shared=1"]),
    "local": (["dense", "model/attn=local"], [r"model\.attn\.rope_layers=\[true, ?true, ?false\]"]),
    "layers without positions": (["dense", "model.attn.rope_layers=[true,false]"], [r"model\.attn\.rope_layers"]),
    "ntk": (["dense", "model/attn/rope=ntk"], ["model.attn.rope"]),
    "partial rope": (["dense", "model.attn.rope.dim=4"], [r"model\.attn\.rope\.dim=4"]),
    "interleaved": (["dense", "model.attn.rope.layout=interleaved"], [r"rope\.layout=interleaved"]),
    "scaled": (["llama", "model.embed_scale=3.0"], [r"model\.embed_scale=3\.0"]),
    "residual": (["llama", "model.residual_scale=0.5"], [r"model\.residual_scale=0\.5"]),
    "two": (["dense", "model.logit_cap=30", "model.embed_scale=2.0"], [r"logit_cap=30", r"embed_scale=2\.0"]),
    "squares": (["dense", "model/ffn=relu2"], ["GQA, MLP, RMSNorm"]),
    "LayerNorm": (["dense", "model/norm=layernorm"], ["GQA, GatedMLP, LayerNorm"]),
    "latent and dense": (["dense", "model/attn=mla"], ["MLA, GatedMLP, RMSNorm"]),
    "window and LayerNorm": (["gpt", "model.attn.window=4"], [r"model\.attn\.window=4"]),
    "sinusoidal": (["gpt", "model.pos=sinusoidal"], [r"model\.pos=sinusoidal"]),
    "no positions": (["dense", "model.attn.rope=null"], [r"model\.attn\.rope=null"]),
    "no biases": (["gpt", "model.attn.bias=false"], [r"model\.attn\.bias=false"]),
    "normed and biased": (["qwen3", "model.attn.bias=true"], [r"model\.attn\.(out_)?bias="]),
    "sigmoid": (["mixtral", "model.ffn.score=sigmoid"], [r"model\.ffn\.score=sigmoid"]),
    "latent experts, renormalised": (["moe", "model/attn=mla"], [r"model\.ffn\.(sparse\.)?renormalize=true"]),
    "balanced": (["mixtral", "model.ffn.bias_rate=0.001"], [r"model\.ffn\.bias_rate"]),
}


@pytest.mark.parametrize("what", UNFIT)
def test_models_of_no_architecture(what: str, tmp_path: Path) -> None:
    """The settings that no architecture of Hugging Face's has are named, as one would type them; others are not."""
    overrides, matches = UNFIT[what]
    ours(*overrides).save_pretrained(tmp_path / "ours")
    line = refused(tmp_path / "ours")
    for match in matches:
        assert re.search(f"(?i){match}", line), line
    assert line.count("=") <= 3


FITS: dict[str, tuple[list[str], str]] = {
    "dense": (["dense"], "llama"),
    "gpt": (["gpt"], "gpt2"),
    "gpt2": (["gpt2"], "gpt2"),
    "llama": (["llama"], "llama"),
    "qwen3": (["qwen3"], "qwen3"),
    "mixtral": (["mixtral"], "mixtral"),
    "qwen3_moe": (["qwen3_moe"], "qwen3_moe"),
    "deepseek_v2": (["deepseek_v2"], "deepseek_v2"),
    "deepseek_v3": (["deepseek_v3"], "deepseek_v3"),
    "moe": (["moe", "model.ffn.n_shared=0"], "mixtral"),
    "moe, not renormalised": (["moe", "model.ffn.n_shared=0", "model.attn.qk_norm=true", "model.ffn.renormalize=false"], "qwen3_moe"),
    "moe, latent": (["moe", "model/attn=mla", "model.ffn.renormalize=false"], "deepseek_v2"),
    "moe, latent, in groups": (
        ["moe", "model/attn=mla", "model.ffn.renormalize=false", "model.ffn.n_groups=4", "model.ffn.top_groups=2", "model.ffn.group_top=1"],
        "deepseek_v2",
    ),
    "moe, latent, sigmoid": (
        ["moe", "model/attn=mla_q_lora", "model.ffn.score=sigmoid", "model.ffn.bias_rate=0.01", "model.ffn.scale=1.5"],
        "deepseek_v3",
    ),
    "latent, halves": (["deepseek_v3", "model.attn.rope.layout=half"], "deepseek_v3"),
    "all layers sparse": (["deepseek_v2", "model.ffn.first_dense=0"], "deepseek_v2"),
    "no sparse layer": (["deepseek_v2", "model.ffn.first_dense=2"], "deepseek_v2"),
    "one wide head of keys": (["dense", "model/attn=mqa", "model.attn.head_dim=12", "model.ffn.hidden=40", "model.tied=false"], "llama"),
    "GELU": (["dense", "model/ffn=geglu", "model.ffn.activation=gelu_tanh", "model.dropout=0.1", "model.ffn.dropout=0.1"], "llama"),
    "GPT with ReLU": (["gpt", "model.ffn.activation=relu", "model.tied=false", "model.ffn.hidden=40"], "gpt2"),
    "biases": (["dense", "model.attn.bias=true", "model.attn.out_bias=true", "model.ffn.bias=true"], "llama"),
    "biases of q, k, v": (["dense", "model.attn.bias=true"], "qwen2"),
    "window": (["dense", "model.attn.window=5"], "mistral"),
    "window and biases": (["dense", "model.attn.bias=true", "model.attn.window=[null,5]"], "qwen2"),
    "window and norms": (["qwen3", "model.attn.window=[5,null]"], "qwen3"),
    "window and experts": (["mixtral", "model.attn.window=5"], "mixtral"),
    "rope linear": (["dense", "model/attn/rope=linear"], "llama"),
    "rope llama3": (["dense", "model/attn/rope=llama3", "model.attn.rope.original_max_len=16"], "llama"),
    "rope yarn": (["dense", "model/attn/rope=yarn", "model.attn.rope.original_max_len=8"], "llama"),
    "rope yarn, latent": (
        ["deepseek_v3", "model/attn/rope=yarn", "model.attn.rope.layout=interleaved", "model.attn.rope.original_max_len=8", "model.attn.rope.mscale=1.0", "model.attn.rope.mscale_all_dim=0.7"],
        "deepseek_v3",
    ),
    "theta and epsilon": (["qwen3", "model.attn.rope.theta=50000.0", "model.norm.eps=0.001", "model.attn.norm_eps=0.001"], "qwen3"),
}  # fmt: skip


@pytest.mark.parametrize("what", FITS)
def test_transformers_computes_our_models_alike(what: str, tmp_path: Path) -> None:
    """Logits to 1e-5, and back again the same tensors bit for bit and the same logits."""
    import transformers

    overrides, model_type = FITS[what]
    model = ours(*overrides)
    model.save_pretrained(tmp_path / "ours")
    convert_to(tmp_path / "ours", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == model_type
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    expected = model(tokens())
    assert expected.std() > 0.05
    close(hf(tokens()).logits, expected)
    convert_to(tmp_path / "hf", tmp_path / "again")
    assert same_tensors(tmp_path / "ours", tmp_path / "again")
    close(Transformer.from_pretrained(tmp_path / "again")(tokens()), expected, 1e-6)


def test_ropes_of_theirs_come_back_the_same(copy: Callable[..., Path], tmp_path: Path) -> None:
    """Scalings survive both directions, in the spelling that transformers 4 reads too."""
    for name, scaling in (("llama-3", LLAMA3), ("llama-yarn", YARN)):
        folder = tmp_path / name
        theirs(name).save_pretrained(folder / "hf")
        convert_to(folder / "hf", folder / "ours")
        convert_to(folder / "ours", folder / "back")
        config = json.loads((folder / "back" / "config.json").read_text())
        found = config["rope_scaling"] | {"rope_theta": config["rope_theta"]}
        assert {k: found[k] for k in scaling} == scaling


# ---------------------------------------------------------------- types

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "keep": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["llama", "deepseek_v3"])
def test_stored_types(case: str, dtype: str, originals: Callable[[str], Path], tmp_path: Path) -> None:
    """All tensors in the type asked for, in and out again; but the bias that balances DeepSeek-V3's experts stays as exact
    as it was, as in its published files: which experts are chosen hangs on it."""
    import transformers

    source = originals(case)
    convert_to(source, tmp_path / "ours", dtype=dtype)
    convert_to(tmp_path / "ours", tmp_path / "hf", dtype="keep")
    convert_to(source, tmp_path / "plain")
    convert_to(tmp_path / "plain", tmp_path / "hf2", dtype=dtype)
    whole = {"ours": weights.tensors(tmp_path / "plain"), "hf": load_file(source / "model.safetensors")}
    for folder, kind in (("ours", "ours"), ("hf", "hf"), ("hf2", "hf")):
        found = weights.tensors(tmp_path / folder)
        for name, tensor in found.items():
            wanted = torch.float32 if name.endswith(("ffn.bias", "e_score_correction_bias")) else DTYPES[dtype]
            assert tensor.dtype == wanted, (folder, name)
            assert torch.equal(tensor, whole[kind][name].to(wanted)), (folder, name)
        assert len(found) == len(whole[kind])
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf2")
    assert hf.dtype == DTYPES[dtype]


def test_keep_keeps_every_bit(copy: Callable[..., Path], tmp_path: Path) -> None:
    """bf16 in, bf16 out, and a tensor of another type among them in its own; loaded as they are."""
    folder = copy("deepseek_v3")

    def halve(tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            tensors[name] = t if name.endswith("bias") else t.half() if "norm" in name else t.bfloat16()

    reweigh(folder, halve)
    before = load_file(folder / "model.safetensors")
    assert {t.dtype for t in before.values()} == {torch.bfloat16, torch.float16, torch.float32}
    convert_to(folder, tmp_path / "ours")
    convert_to(tmp_path / "ours", tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
    model = Transformer.from_pretrained(tmp_path / "ours")
    assert model.embed.weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


# ---------------------------------------------------------------- shards


def test_shards_hold_the_same(tmp_path: Path) -> None:
    """A model of ours through Hugging Face and back in shards: an index that is right, the same values, and the same text."""
    tokenizer = tok.byte([], [])
    model = made("mixtral", vocab_size=tokenizer.vocab_size)
    model.save_pretrained(tmp_path / "one", tokenizer)
    gb = 30_000 / 2**30
    convert_to(tmp_path / "one", tmp_path / "hf", shard_gb=gb)
    convert_to(tmp_path / "hf", tmp_path / "many", shard_gb=gb)
    assert same_tensors(tmp_path / "one", tmp_path / "many")
    for folder in (tmp_path / "hf", tmp_path / "many"):
        files = sorted(p.name for p in folder.glob("*.safetensors"))
        n = len(files)
        assert n > 3 and files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        held = {file: load_file(folder / file) for file in files}
        assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
        assert index["metadata"]["total_size"] == sum(t.nbytes for ts in held.values() for t in ts.values())
        for tensors in held.values():
            assert sum(t.nbytes for t in tensors.values()) <= 30_000 or len(tensors) == 1
    assert checkpoint.find(str(tmp_path / "many")) == tmp_path / "many"
    texts = []
    for folder in ("one", "many"):
        engine = load(str(tmp_path / folder), "cpu", "fp32", ["etude"], ENGINE)
        texts.append(engine.generate(["To be"], sampling=Sampling(temperature=1.0, seed=1), max_tokens=12)[0].text)
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("case", ["gpt2", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("size", [1, 9_000, 40_000])
def test_no_more_than_a_shard_is_held(
    case: str, size: int, originals: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both directions: never more than the size asked for, or one tensor that is larger. What is held is the tensors'
    own memory, not a slice's of something larger."""
    held: list[tuple[int, int]] = []
    add, written = convert.Writer.add, []
    write = weights.write

    def spy(self: convert.Writer, name: str, tensor: Tensor, cast: bool) -> None:
        add(self, name, tensor, cast)
        held.append((sum(t.untyped_storage().nbytes() for t in self.shard.values()), len(self.shard)))

    def count(tensors: dict[str, Tensor], path: Path) -> None:
        written.append(sum(t.untyped_storage().nbytes() for t in tensors.values()))
        write(tensors, path)

    monkeypatch.setattr(convert.Writer, "add", spy)
    monkeypatch.setattr(weights, "write", count)
    convert_to(originals(case), tmp_path / "ours", shard_gb=size / 2**30)
    convert_to(tmp_path / "ours", tmp_path / "hf", shard_gb=size / 2**30)
    assert all(n <= size or alone == 1 for n, alone in held)
    assert max(n for n, _ in held) == max(written)
    total = sum(t.nbytes for t in weights.tensors(tmp_path / "hf").values())
    assert sum(written) == 2 * total
    assert len(written) <= 2 * len(held) and (size > 1 or len(written) == len(held))


def test_one_shard_needs_no_index(originals: Callable[[str], Path], tmp_path: Path) -> None:
    convert_to(originals("llama"), tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").glob("model*")) == ["model.safetensors"]


# ---------------------------------------------------------------- as a user runs it


def generate(*overrides: str) -> str:
    done = forked.run(["generate.py", *overrides], ROOT, environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(*overrides: str) -> str:
    done = forked.run(["convert.py", *overrides], ROOT, environment())
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    return done.stdout


def test_a_run_to_hugging_face_and_back(tmp_path: Path) -> None:
    """Train, convert, and let transformers write the same greedy text as generate.py; back again it is the same still. The
    lines that convert.py prints say how to go on, and are right."""
    import transformers

    train(*tiny(tmp_path, max_steps=25, eval_every=25, save_every=25))
    run, hf, back = run_in(tmp_path / "runs"), tmp_path / "h f=1", tmp_path / "back"
    said = script(f"from={run}", f"to={hf}")
    assert f"wrote    {hf}: llama, " in said and f'from_pretrained("{hf}")' in said
    model, tokenizer = (
        kind.from_pretrained(hf) for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    assert f"{model.num_parameters():,} parameters, float32" in said
    own = tok.load(checkpoint.find(str(run)))
    for text in ("the cat sat", "naïve 日本語 👍\n\n  x", "<|im▁start|>user\n<|end▁of▁sentence|>", ""):
        assert tokenizer(text)["input_ids"] == own.encode(text)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (own.eos, own.bos, own.pad)
    assert model.generation_config.eos_token_id in (own.eos, [own.eos])
    prompt = "the cat "
    greedy = model.generate(
        **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False), do_sample=False, max_new_tokens=40
    )
    text = tokenizer.decode(greedy[0], skip_special_tokens=True)
    assert len(set(text)) > 4 and greedy.shape[1] == len(prompt) + 40
    engine = load(str(run), "cpu", "fp32", ["etude"], ENGINE)
    assert prompt + engine.generate([prompt], sampling=Sampling(temperature=0), max_tokens=40)[0].text == text
    assert f"ckpt={back}" in script(f"from={hf}", f"to={back}")
    assert generate(f"ckpt={back}", f"prompt='{prompt}'", "max_tokens=40", "temperature=0") == text + "\n"
    stored = weights.tensors(checkpoint.find(str(run)))
    assert all(torch.equal(t, stored[n]) for n, t in weights.tensors(back).items())


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """Stopped between two of many shards: exit code 3, no folder; and again from the beginning it works."""
    model = uninitialised("dense", "model.dim=256", "model.ffn.hidden=1024", "model.n_layers=16")
    source, to = tmp_path / "ours", tmp_path / "to"
    model.save_pretrained(source)
    command = [sys.executable, "convert.py", f"from={source}", f"to={to}", "shard_gb=0.0001"]
    for _ in range(5):  # on a busy machine it may be done before the signal is sent
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while not (tmp_path / ".to.making" / "shard-1.safetensors").exists() and child.poll() is None:
            time.sleep(0.0005)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
        if not to.exists():
            break
        shutil.rmtree(to)
    assert child.returncode == 3, out + err
    assert err == "stopped: SIGINT: nothing was written\n" and out == ""
    assert os.listdir(tmp_path) == ["ours"]
    convert_to(source, to, shard_gb=0.001)
    assert sorted(os.listdir(tmp_path)) == ["ours", "to"] and len(list(to.glob("*.safetensors"))) > 40
