"""What convert.py does: a Hugging Face folder or a GGUF file becomes an export of ours, and a run of ours a Hugging Face
folder. Tensors are read, changed and written a few at a time: one shard is all that is in memory."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from etude import checkpoint
from etude.config import build
from etude.errors import Interrupted, Refusal, StorageFault
from etude.interop import architectures, fold
from etude.interop.architectures import Architecture, Config, Entry, Node
from etude.model import weights
from etude.parallel import StopSignals
from etude.text import tokenizer as tok

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
EXACT = ".ffn.bias"  # a router's bias keeps its type: which experts are chosen hangs on it
# Tables that a file may hold beside the parameters, and that are computed.
IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias")


def run(cfg: dict) -> int:
    """-> exit code."""
    source, to = Path(cfg["from"]).expanduser(), Path(cfg["to"]).expanduser().resolve()
    if not 0 < cfg["shard_gb"] < math.inf:
        raise Refusal(f"shard_gb={cfg['shard_gb']} should be a number above 0")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise Refusal(f"to={cfg['to']} exists already; give a new folder, or delete that one")
    if not source.exists():
        raise Refusal(
            f"from={cfg['from']} does not exist; give a Hugging Face folder, a .gguf file, or a run of ours (a model's name on a hub is not enough: download it first)"
        )
    making = to.with_name(f".{to.name}.making")
    try:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        with StopSignals() as signals:
            writer = Writer(making, int(cfg["shard_gb"] * 2**30), weights.DTYPES.get(cfg["dtype"]), signals)
            said = _convert(source, writer, cfg["trusted"])
        to.mkdir(exist_ok=True)  # an empty one stays the folder that somebody may stand in
        for path in making.iterdir():
            path.rename(to / path.name)
    except (OSError, SafetensorError) as error:
        raise StorageFault(f"could not write {to}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(making, ignore_errors=True)
    print(said.replace("{to}", cfg["to"]))
    return 0


def _convert(source: Path, writer: "Writer", trusted: list[str]) -> str:
    if source.is_file():
        if source.suffix != ".gguf":
            raise Refusal(f"from={source} is a file and not .gguf; give the folder that holds config.json")
        from etude.interop.gguf import GGUF

        file = GGUF(source)
        return to_export(file.config, file, file.tokenizer_files(), writer)
    config = weights.read_json(source, "config.json") if (source / "config.json").exists() else {}
    if "model_type" in config:
        return to_export(config, weights.Stored(source), _files(source), writer)
    return to_hugging_face(checkpoint.find(str(source)), writer, trusted)


def _files(folder: Path) -> dict[str, str]:
    """The tokenizer's files in a folder, as they are."""
    found = {}
    for name in TOKENIZER_FILES:
        if (path := weights.inside(folder, name)).exists():
            found[name] = path.read_text(encoding="utf-8")
    return found


# ---------------------------------------------------------------- into ours


def to_export(config: Config, stored: Any, files: dict[str, str], writer: "Writer") -> str:
    """Write an export of a model of theirs: `stored` has names(), shape(name), get(name) in Hugging Face's names. -> what
    to tell the user."""
    arch, node = architectures.read(config)
    names = set(stored.names())
    prefix = _prefix(arch, names)
    embed = next(arch.entries(arch.names, ["embed.weight"], 0)).theirs[0]
    if embed not in names and embed.removeprefix(prefix) not in names:
        raise Refusal(f"the weights have no {embed}: this is not the file of a {arch.model_type}")
    stored_name = lambda name: name if name in names else name.removeprefix(prefix)  # noqa: E731
    layers = {int(m[1]) for n in names if (m := re.search(r"(?:layers|h)\.(\d+)\.", n))}
    if len(layers) < node["n_layers"]:  # before a model of that size is made
        raise Refusal(f"the weights have {len(layers)} layers, config.json says {node['n_layers']}")
    shape = stored.shape(stored_name(embed))
    if len(shape) != 2:
        raise Refusal(f"{embed} has shape {shape}; it should have two dimensions")
    vocab_size = shape[0]
    entries = list(_entries(arch, node, vocab_size))
    wanted = {stored_name(n) for e in entries for n in e.theirs}
    if missing := sorted(wanted - names):
        raise Refusal(
            f"the weights have no {missing[0]}, which this {arch.model_type} needs ({len(missing)} are missing)"
        )
    further = config.get("num_nextn_predict_layers", 1) if arch.model_type == "deepseek_v3" else 0
    further = further if isinstance(further, int) else 0
    left = [n for n in sorted(names - wanted) if not _may_be_left(n, node, further)]
    if left:
        raise Refusal(
            f"{left[0]} is not part of a {arch.model_type} as it is built here ({len(left)} such tensors): that would be lost"
        )
    shapes = _shapes(node, vocab_size)
    to = writer.folder
    for entry in entries:
        try:
            tensors = entry.pack([stored.get(stored_name(n)) for n in entry.theirs])
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise Refusal(f"{entry.theirs[0]} and its like have shapes that do not go together: {error}") from None
        for name, tensor in zip(entry.ours, tensors, strict=True):
            if not tensor.is_floating_point():
                raise Refusal(f"{entry.theirs[0]} holds {tensor.dtype} numbers: quantised weights are not supported")
            if tensor.shape != shapes[name]:
                raise Refusal(
                    f"{entry.theirs[0]} makes {name} {tuple(tensor.shape)}, config.json says {tuple(shapes[name])}"
                )
            writer.add(name, tensor, cast=not name.endswith(EXACT))
    writer.close()
    ours = {
        "format": weights.FORMAT,
        "vocab_size": vocab_size,
        "model": node,
        "seq_len": node["max_len"],
        "architecture": arch.model_type,
    }
    _write_json(to / "config.json", ours)
    if "generation_config.json" not in files and config.get("eos_token_id") is not None:
        kept = {k: config[k] for k in ("bos_token_id", "eos_token_id") if config.get(k) is not None}
        files = files | {"generation_config.json": json.dumps(kept)}
    for name, text in files.items():
        (to / name).write_text(text, encoding="utf-8")
    return "\n".join([_summary(arch, writer), *_how_to_use(to, files)])


def _how_to_use(to: Path, files: dict[str, str]) -> list[str]:
    if "tokenizer.json" not in files:
        return ["note     there is no tokenizer.json beside the weights: generate.py needs one in {to}"]
    chat = tok.load(to).template is not None
    return [f'generate: python generate.py ckpt={{to}} {"chat=true " if chat else ""}prompt="Once upon a time"']


def _prefix(arch: Architecture, names: set[str]) -> str:
    """What this file leaves out before its names: GPT-2's is published without `transformer.`."""
    prefix = "transformer." if arch.model_type == "gpt2" else "model."
    return "" if any(n.startswith(prefix) for n in names) else prefix


def _may_be_left(name: str, node: Node, further: int) -> bool:
    """Whether a tensor is a computed table, a tied head, or of one of `further` layers that predict further tokens."""
    if name.endswith(IGNORED) or (name == "lm_head.weight" and node["tied"]):
        return True
    m = re.match(r"model\.layers\.(\d+)\.", name)
    return m is not None and node["n_layers"] <= int(m[1]) < node["n_layers"] + further


def _shapes(node: Node, vocab_size: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {n: p.shape for n, p in build(node, vocab_size).named_parameters()}


def _entries(arch: Architecture, node: Node, vocab_size: int) -> Iterator[Entry]:
    sparse = node["ffn"].get("sparse", node["ffn"])
    return arch.entries(arch.names, list(_shapes(node, vocab_size)), sparse.get("n_experts", 0))


# ---------------------------------------------------------------- out of ours


def to_hugging_face(folder: Path, writer: "Writer", trusted: list[str]) -> str:
    """Write a folder that AutoModelForCausalLM.from_pretrained reads. -> what to tell the user."""
    ours = weights.read_config(folder)
    if "lora" in ours:
        raise Refusal(
            f"{folder} is an adapter of an unfinished run: convert the run's artifacts/base, or its artifacts/export when it is finished"
        )
    weights.check_parts(ours["model"], trusted)
    arch, config = architectures.write(ours["model"], ours.get("architecture"))
    stored, to, factors = weights.Stored(folder), writer.folder, fold.factors(ours["model"])
    for entry in _entries(arch, ours["model"], ours["vocab_size"]):
        tensors = entry.unpack([stored.get(n) * factors[n] if n in factors else stored.get(n) for n in entry.ours])
        for name, tensor in zip(entry.theirs, tensors, strict=True):
            writer.add(name, tensor, cast=not entry.ours[0].endswith(EXACT))
    writer.close()
    files = _files(folder)
    if "tokenizer.json" in files:
        tokenizer = tok.load(folder)
        files = tokenizer.files() | files
        ids = {"bos_token_id": tokenizer.bos, "pad_token_id": tokenizer.pad}
        stop = sorted(tokenizer.stop_ids)
        config |= ids | {"eos_token_id": stop[0] if len(stop) == 1 else stop or None}
    _write_json(to / "config.json", config | {"vocab_size": ours["vocab_size"], "torch_dtype": writer.dtype_name()})
    for name, text in files.items():
        (to / name).write_text(text, encoding="utf-8")
    return f'{_summary(arch, writer)}\nload:    transformers.AutoModelForCausalLM.from_pretrained("{{to}}")'


# ---------------------------------------------------------------- files


class Writer:
    """Safetensors in shards of about `size` bytes, with an index where there is more than one."""

    def __init__(self, folder: Path, size: int, dtype: torch.dtype | None, signals: StopSignals):
        self.folder, self.size, self.dtype, self.signals = folder, size, dtype, signals
        self.shard: dict[str, Tensor] = {}
        self.done: list[list[str]] = []
        self.held, self.bytes, self.parameters = 0, 0, 0
        self.dtypes: dict[torch.dtype, int] = {}

    def add(self, name: str, tensor: Tensor, cast: bool) -> None:
        if self.signals.name is not None:
            raise Interrupted(f"{self.signals.name}: nothing was written")
        tensor = tensor.to((cast and self.dtype) or tensor.dtype).contiguous()
        if self.dtype is torch.float16 and not tensor.isfinite().all():
            raise Refusal(f"{name} has numbers beyond fp16's 65504; use dtype=bf16 or fp32")
        if self.shard and self.held + tensor.nbytes > self.size:
            self._flush()
        self.held += tensor.nbytes
        # Its own memory: a slice would keep all that it was cut from, and be refused by the library.
        self.shard[name] = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        self.bytes += tensor.nbytes
        self.parameters += tensor.numel()
        self.dtypes[tensor.dtype] = self.dtypes.get(tensor.dtype, 0) + tensor.numel()

    def _flush(self) -> None:
        weights.write(self.shard, self._path(len(self.done)))
        self.done.append(list(self.shard))
        self.shard, self.held = {}, 0

    def _path(self, i: int) -> Path:
        return self.folder / f"shard-{i}.safetensors"

    def close(self) -> None:
        """Write what is left, give the shards their names, and the index."""
        self._flush()
        if len(self.done) == 1:
            self._path(0).rename(self.folder / "model.safetensors")
            return
        index: dict[str, str] = {}
        for i, names in enumerate(self.done):
            file = f"model-{i + 1:05d}-of-{len(self.done):05d}.safetensors"
            self._path(i).rename(self.folder / file)
            index |= dict.fromkeys(names, file)
        _write_json(
            self.folder / weights.INDEX.format("model"), {"metadata": {"total_size": self.bytes}, "weight_map": index}
        )

    def dtype_name(self) -> str:
        """Of most parameters, as config.json has it."""
        return str(max(self.dtypes, key=lambda d: self.dtypes[d])).removeprefix("torch.")


def _summary(arch: Architecture, writer: Writer) -> str:
    shards = f" in {len(writer.done)} shards" if len(writer.done) > 1 else ""
    return f"wrote    {{to}}: {arch.model_type}, {writer.parameters:,} parameters, {writer.dtype_name()}, {writer.bytes / 2**20:,.0f} MiB{shards}"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
