"""What a run begins with: a model drawn from its seed, or taken from `init_from`, and the reference, which stays as the model
was before the first step of the first run, however often that run is resumed."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch

from etude import checkpoint, lora
from etude import config as conf
from etude.errors import Refusal
from etude.model import weights
from etude.text.tokenizer import Tokenizer, load
from etude.window import key

LONGEST = 1024  # inputs of a sample, where neither the user nor the model's own training says less


def adopt(cfg: dict, overrides: list[str]) -> dict:
    """The config of a run that begins with the model in cfg.init_from: that one's architecture and tokenizer, with what was
    typed of `model.` laid over it. Raises Refusal."""
    try:
        folder = checkpoint.find(cfg["init_from"])
    except Refusal as error:
        raise Refusal(str(error).replace("ckpt=", "init_from=")) from None
    found = weights.read_config(folder)
    node = copy.deepcopy(found["model"])
    weights.check_parts(node, cfg["trusted"])
    typed = {o.partition("=")[0].lstrip("+~").split("@")[0] for o in overrides}
    if given := sorted(
        name for name in typed if name in ("model", "tokenizer") or name.startswith(("model/", "tokenizer"))
    ):
        raise Refusal(f"{given[0]} comes with init_from={cfg['init_from']}; leave {given[0]}= out")
    for name in sorted(name for name in typed if name.startswith("model.")):
        *parents, last = name.split(".")[1:]
        source, target = cfg["model"], node
        for part in parents:
            source, target = source[part], target.get(part, {})
        if last not in target:
            raise Refusal(f"the model in init_from={cfg['init_from']} has no {name}; leave it out")
        target[last] = source[last]
    default = cfg["model"]["max_len"]
    longest = min(found.get("seq_len", LONGEST), LONGEST)
    tokenizer = cfg["tokenizer"]
    if tokenizer["_target_"] != "etude.text.tokenizer.stored":  # which lies with the data: see check_tokenizer
        tokenizer = {"_target_": "etude.text.tokenizer.file", "_partial_": True, "path": str(folder)}
    data = cfg["data"]
    if "data.seq_len" not in typed and data.get("seq_len") == default:  # model.max_len, of another model
        data = data | {"seq_len": longest}
    cfg = cfg | {"model": node, "tokenizer": tokenizer, "data": data, "init_from": str(folder)}
    conf.check_relations({"model": node})
    return cfg


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raises Refusal where the data was encoded with another tokenizer than the model's: data that brings its own."""
    if load(folder).sha256() != tokenizer.sha256():
        raise Refusal(
            f"the data has another tokenizer than {folder}: prepare it anew with tokenizer=file tokenizer.path={folder}"
        )


def fingerprint(cfg: dict) -> str | None:
    """sha256 of the weights to begin with; None where they are drawn, or are not there any more."""
    folder = source(cfg)
    if folder is None or not folder.is_dir():
        return None
    name = "adapter" if weights.files(folder) is None else "model"
    where = weights.files(folder, name)
    paths = sorted(set(where.values())) if where else [folder / weights.SINGLE.format(name)]
    return hashlib.sha256("".join(map(checkpoint.sha256, paths)).encode()).hexdigest()


def model(cfg: dict, vocab_size: int, needed: bool) -> Any:
    """The model before the first step, on the CPU in fp32. The adapters of a LoRA run come on top of it. Not `needed`:
    a run that is resumed has all of it in its checkpoint."""
    folder = source(cfg)
    if folder is not None and not folder.is_dir() and cfg["resume"] is not None and not needed:
        folder = None
    if folder is None:
        made = conf.build(cfg["model"], vocab_size)
        torch.manual_seed(key(cfg["seed"], "init"))
        made.init_weights()
        return made
    if not folder.is_dir():
        raise Refusal(f"{folder}, which this run began with, is not there any more: bring it back")
    found = weights.from_pretrained(folder, "cpu", torch.float32, cfg["trusted"])
    for p in found.parameters():  # read from a file, they lie in memory as they lay there, and sums would round by that
        p.data = p.data.clone()
    if cfg["model"] == weights.read_config(folder)["model"]:
        return found.train()
    with torch.device("meta"):
        made = conf.build(cfg["model"], found.vocab_size)
    weights.materialize(made, weights.model_tensors(found))
    return made.train()


def source(cfg: dict) -> Path | None:
    """The folder of the weights to begin with; None where they are drawn. A resumed LoRA run has its base by itself."""
    if cfg["resume"] is not None and (base := Path(cfg["resume"]) / "artifacts" / "base").is_dir():
        return base
    return None if cfg["init_from"] is None else Path(cfg["init_from"])


def adapt(model: Any, cfg: dict) -> None:
    """Put the adapters of cfg.lora, if there are any, into the model."""
    if cfg["lora"] is not None:
        torch.manual_seed(key(cfg["seed"], "lora"))
        conf.build(cfg["lora"]).apply(model)


def shapes(cfg: dict, vocab_size: int) -> tuple[Any, int]:
    """The model on the meta device, and how many of its numbers are trained."""
    with torch.device("meta"):
        made = conf.build(cfg["model"], vocab_size)
        adapt(made, cfg)
    return made, lora.trainable(made)


def reference(model: Any, cfg: dict) -> Any | None:
    """What `model`, still untrained, is compared with: a frozen copy, or the model itself without its adapters. None
    for reference=cached, which is made of the data."""
    if cfg["reference"] == "cached":
        return None
    if cfg["lora"] is not None and cfg["reference"] == "auto":
        return lora.Base(model)
    return copy.deepcopy(model).eval().requires_grad_(False)
