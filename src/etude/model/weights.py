"""Weights on disk and in a model: safetensors by parameter name, in one file or in shards with an index, as Hugging Face
lays them out. No name in an index leads outside its folder."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from etude.config import build, check_relations, check_targets
from etude.errors import Refusal, StorageFault

SINGLE, INDEX = "{}.safetensors", "{}.safetensors.index.json"
FORMAT = 2  # of config.json
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def inside(folder: Path, name: Any) -> Path:
    """The file called `name` in `folder`. Raises Refusal for a name, or a link, that leads elsewhere. A snapshot in Hugging
    Face's cache may link to that model's own blobs."""
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or set(name) & {"\\", "\0"}:
        raise Refusal(f"{folder} names a file {name!r}: only plain names of files in that folder are followed")
    path = folder / name
    home, real = folder.resolve(), path.resolve()
    cached = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if real.parent != home and not cached:
        raise Refusal(f"{path} is a link out of its folder, to {real}; copy the file there itself (cp -L)")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object in a folder. Raises Refusal with the path and what is wrong."""
    path = inside(folder, name)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"there is no {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(f"{path} should be a JSON object, it is a {type(value).__name__}")
    return value


def files(folder: Path, name: str = "model") -> dict[str, Path] | None:
    """File of each tensor where an index says so; {} for one file of everything; None where there is neither."""
    if (folder / INDEX.format(name)).exists():
        index = read_json(folder, INDEX.format(name)).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise Refusal(f"{folder / INDEX.format(name)} has no weight_map")
        return {tensor: inside(folder, file) for tensor, file in index.items()}
    return {} if (folder / SINGLE.format(name)).exists() else None


class Stored:
    """The tensors of a folder, read one at a time."""

    def __init__(self, folder: Path, name: str = "model"):
        found = files(folder, name)
        if found is None:
            pickled = next((p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))), None)
            why = f" ({pickled} may hold code; save the model with safetensors)" if pickled else ""
            raise Refusal(f"there is no {folder / SINGLE.format(name)}{why}")
        self._open: dict[Path, Any] = {}
        if not found:
            path = inside(folder, SINGLE.format(name))
            found = dict.fromkeys(self._file(path).keys(), path)
        self._where = found

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise Refusal(f"{path} cannot be read: {error}") from None
        return self._open[path]

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        path = self._where[name]
        try:
            return self._file(path).get_slice(name)
        except SafetensorError as error:
            raise Refusal(f"{path} has no {name}, which its index promises: {error}") from None

    def get(self, name: str) -> Tensor:
        return self._slice(name)[:] if self.shape(name) else self._file(self._where[name]).get_tensor(name)


def tensors(folder: Path, name: str = "model", device: str = "cpu") -> dict[str, Tensor]:
    """All of <name>.safetensors, or of the shards that its index names."""
    found = files(folder, name)
    read: dict[str, Tensor] = {}
    for path in dict.fromkeys(found.values()) if found else [inside(folder, SINGLE.format(name))]:
        try:
            read |= load_file(path, device=device)
        except (OSError, SafetensorError) as error:
            raise Refusal(f"{path} cannot be read: {error}") from None
    return read


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """One .safetensors file, readable by whom other new files are: the library makes it for its owner alone."""
    save_file(tensors, path, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, a tied one once, under its first name."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}


def load_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters, by name. Raises Refusal if names or shapes differ."""
    parameters = dict(model.named_parameters())
    if wrong := sorted(parameters.keys() ^ tensors.keys()):
        raise Refusal(
            f"the weights do not fit the model: {wrong[0]} is only in {'the model' if wrong[0] in parameters else 'the file'}"
        )
    with torch.no_grad():
        for name, p in parameters.items():
            if p.shape != tensors[name].shape:
                raise Refusal(
                    f"the weights do not fit the model: {name} is {tuple(tensors[name].shape)} in the file and {tuple(p.shape)} in the model"
                )
            p.copy_(tensors[name])


def materialize(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a model made on the meta device these tensors as its parameters, tied ones shared. Raises Refusal if names or
    shapes differ."""
    first: dict[int, str] = {}
    made: dict[str, nn.Parameter] = {}
    for name, p in list(model.named_parameters(remove_duplicate=False)):
        source = first.setdefault(id(p), name)
        if source not in tensors or tensors[source].shape != p.shape:
            found = f"{tuple(tensors[source].shape)}" if source in tensors else "nothing"
            raise Refusal(
                f"the weights do not fit the model: {source} should be {tuple(p.shape)}, the file has {found}"
            )
        parameter = made.setdefault(source, nn.Parameter(tensors[source], requires_grad=p.requires_grad))
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameter)
    if left := sorted(tensors.keys() - made.keys()):
        raise Refusal(f"the weights do not fit the model: it has no {left[0]}")


def read_config(folder: Path) -> dict:
    """config.json of an export or a checkpoint. Raises Refusal for another program's."""
    config = read_json(folder, "config.json")
    if "model_type" in config:
        raise Refusal(
            f"{folder} is a Hugging Face model ({config['model_type']}); first: python convert.py from={folder} to=runs/{folder.name}"
        )
    if config.get("format") != FORMAT or not {"model", "vocab_size"} <= config.keys():
        raise Refusal(
            f"{folder / 'config.json'} has format {config.get('format')} and this version reads {FORMAT}; it was written by another version of etude"
        )
    model, size = config["model"], config["vocab_size"]
    if not isinstance(model, dict) or not isinstance(model.get("_target_"), str) or not model.get("_partial_"):
        raise Refusal(f"{folder / 'config.json'}: model should be a node with _target_ and _partial_: true")
    if not isinstance(size, int) or size < 1:
        raise Refusal(f"{folder / 'config.json'}: vocab_size={size} should be a whole number of at least 1")
    return config


def check_parts(node: dict, trusted: list[str]) -> None:
    """A model's config from a folder that anybody may have made: of our own package it may name parts of models only.
    Raises Refusal."""
    check_targets({"model": node}, ["etude.model" if t == "etude" else t for t in trusted])
    check_relations({"model": node})


def base(folder: Path) -> Path:
    """What the adapter in a LoRA run's checkpoint was trained on. Raises Refusal."""
    found = folder.resolve().parent.parent / "base"
    if files(found) is None:
        raise Refusal(
            f"{folder} is an adapter, and the run's artifacts/base is not beside it; give the whole run, or its export"
        )
    return found


def from_pretrained(folder: Path, device: str, dtype: torch.dtype | None, trusted: list[str]) -> Any:
    """See Transformer.from_pretrained."""
    if not folder.is_dir():
        raise Refusal(f"{folder} is not a folder; give an export or a checkpoint")
    config = read_config(folder)
    check_parts(config["model"], trusted)
    try:
        with torch.device("meta"):
            model = build(config["model"], config["vocab_size"])
    except (TypeError, AttributeError) as error:
        raise Refusal(f"{folder / 'config.json'} describes no model: {error}") from None
    adapter = config.get("lora")
    materialize(model, tensors(folder if adapter is None else base(folder), "model", device))
    if adapter is not None:
        check_targets({"lora": adapter}, ["etude.lora" if t == "etude" else t for t in trusted])
        build(adapter).join(model, tensors(folder, "adapter", device))
    for p in model.parameters() if dtype is not None else ():
        if p.requires_grad:  # a router's bias stays as exact as it was balanced
            p.data = p.data.to(dtype)
    return model.eval()


def save_pretrained(model: Any, folder: Path, tokenizer: Any) -> None:
    """See Transformer.save_pretrained."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (folder / INDEX.format("model")).unlink()  # of shards that were there before
        write(model_tensors(model), folder / SINGLE.format("model"))
        config = {"format": FORMAT, "vocab_size": model.vocab_size, "model": model.node, "seq_len": model.max_len}
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        if tokenizer is not None:
            for name, text in tokenizer.files().items():
                (folder / name).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StorageFault(f"could not write {folder}: {error}") from None
