"""What a run keeps and takes up again: checkpoints, the export, the base under adapters."""

import base64
import dataclasses
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etude import checkpoint, lora
from etude.errors import Refusal
from etude.model import weights

Session = Any  # etude.training.Session, which imports this module


def save(session: Session, best: bool) -> None:
    """A checkpoint of this moment; the other ranks wait until it is on disk."""
    rollout = session.window.files(session.progress.step)
    if session.world.rank == 0:
        if session.cfg["lora"] is None:
            tensors = {"model.safetensors": weights.model_tensors(session.model)}
        else:
            tensors = {"adapter.safetensors": lora.adapter_tensors(session.model)}
        if getattr(session.strategy, "sync_interval", None) and session.ref is not None:
            tensors["reference.safetensors"] = weights.model_tensors(session.ref)
        folder = checkpoint.save(
            session.checkpoints / f"step_{session.progress.step:08d}",
            {
                **tensors,
                **rollout,
                "optimizer.safetensors": checkpoint.optimizer_tensors(session.model, session.optimizer),
                "state.json": state_of(session),
                "config.json": model_config(session),
                **session.tokenizer.files(),
            },
        )
        session.whole.add(folder)
        checkpoint.point(session.checkpoints, "last", folder)
        if best:
            checkpoint.point(session.checkpoints, "best", folder)
        checkpoint.retain(session.checkpoints, session.cfg["keep"], session.whole)
    session.world.broadcast(None)


def state_of(session: Session) -> dict:
    session.batches.sampler.step = session.window.data_step(session.progress.step)
    pack = lambda value: base64.b64encode(value).decode()  # noqa: E731
    return {
        "progress": dataclasses.asdict(session.progress),
        "sampler": session.batches.sampler.state_dict(),
        "rng": {
            "python": random.getstate(),
            "numpy": [s if not isinstance(s, np.ndarray) else s.tolist() for s in np.random.get_state()],
            "torch": pack(torch.get_rng_state().numpy().tobytes()),
        },
        "world_size": session.world.size,
        "threads": torch.get_num_threads(),
        "precision": session.precision,
        "data_sha256": session.meta["sha256"],
        "tokenizer_sha256": session.meta["tokenizer_sha256"],
        "start_sha256": session.start_sha256,
        "time": time.time(),
    }


def model_config(session: Session) -> dict:
    return {
        "format": weights.FORMAT,
        "step": session.progress.step,
        "vocab_size": session.model.vocab_size,
        "model": session.cfg["model"],
        "seq_len": session.data.seq_len,
    } | ({} if session.cfg["lora"] is None else {"lora": session.cfg["lora"]})


def restore(session: Session) -> None:
    """Take weights, optimizer and progress from the run's newest whole checkpoint. A run that was stopped before its
    first checkpoint begins again."""
    found = None
    if session.world.rank == 0:
        newest = checkpoint.newest(session.checkpoints, lambda text: print(f"warning: {text}", file=sys.stderr))
        found = None if newest is None else str(newest)
    if (found := session.world.broadcast(found)) is None:
        if session.cfg["init_from"] is not None and session.start_sha256 is None:
            raise Refusal(
                f"there is no checkpoint yet and {session.cfg['init_from']} is not there any more: bring it back"
            )
        return
    load(session, Path(found))


def load(session: Session, folder: Path) -> None:
    """Take them from one checkpoint, which is whole. Raises Refusal where data, tokenizer or beginning are others."""
    state = checkpoint.read(folder)
    for name in ("data_sha256", "tokenizer_sha256"):
        if state[name] != (now := session.meta[name.replace("data_", "")]):
            what = name.removesuffix("_sha256")
            raise Refusal(
                f"the {what} is not what this run was trained on (sha256 {state[name][:12]} then, {now[:12]} now)"
            )
    then = state.get("start_sha256")
    if then != session.start_sha256 and session.strategy.needs_reference and session.cfg["lora"] is None:
        raise Refusal(
            f"{session.cfg['init_from']} is not what this run began with (sha256 of its weights {str(then)[:12]} then, {str(session.start_sha256)[:12]} now), so there is no reference; bring it back"
        )
    if session.cfg["lora"] is None:
        weights.load_model(session.model, weights.tensors(folder, "model"))
    else:
        lora.load_adapter(session.model, weights.tensors(folder, "adapter"))
    if session.ref is not None and (folder / "reference.safetensors").exists():
        weights.load_model(session.ref, weights.tensors(folder, "reference"))
    if (folder / "rollout.json").exists():
        rest = weights.read_json(folder, "rollout.json")
        session.window.restore(state["progress"]["step"], weights.tensors(folder, "rollout"), rest)
    checkpoint.load_optimizer(session.model, session.optimizer, weights.tensors(folder, "optimizer"))
    for name, value in state["progress"].items():
        setattr(session.progress, name, value)
    restore_rng(session, state)
    warn_if_not_exact(session, state)


def restore_rng(session: Session, state: dict) -> None:
    """The generators' states and the sampler's. Nothing in the loop depends on them (see loop.key); what a user's own
    part draws goes on as if it had never stopped."""
    try:
        session.batches.sampler.load_state_dict(state["sampler"])
    except ValueError as error:
        raise Refusal(f"the order of the data would change: {error}") from None
    version, internal, gauss = state["rng"]["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["rng"]["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["rng"]["torch"])), dtype=torch.uint8))


def warn_if_not_exact(session: Session, state: dict) -> None:
    now = {"world_size": session.world.size, "threads": torch.get_num_threads(), "precision": session.precision}
    for name, value in now.items():
        if state[name] != value and session.world.rank == 0:
            print(
                f"warning: {name} was {state[name]} and is {value}: the run goes on, but not bit for bit as it would have",
                file=sys.stderr,
            )


def export(session: Session) -> None:
    """artifacts/export: what inference needs, of the checkpoint with the best validation loss (the last one where
    none was evaluated)."""
    best = session.checkpoints / "best"
    source = best if best.exists() else session.checkpoints / "last"
    tensors, config = {}, json.loads((source / "config.json").read_text())
    if session.cfg["lora"] is None:
        tensors = weights.tensors(source, "model")
    else:
        config.pop("lora")
        tensors = weights.model_tensors(weights.from_pretrained(source, "cpu", torch.float32, session.cfg["trusted"]))
        try:
            files = lora.peft_files(session.model, weights.tensors(source, "adapter"), session.cfg["lora"])
            checkpoint.save(session.folder / "artifacts" / "adapter", files)
        except Refusal as error:  # a model that transformers does not have
            print(f"note     there is no artifacts/adapter for PEFT: {error}")
    checkpoint.save(
        session.folder / "artifacts" / "export",
        {"model.safetensors": tensors, "config.json": config, **session.tokenizer.files()},
    )


def write_base(session: Session) -> None:
    """artifacts/base: the model under the adapters, which checkpoints then leave out."""
    folder = session.folder / "artifacts" / "base"
    if not folder.exists():
        config = {k: v for k, v in model_config(session).items() if k != "lora"}
        checkpoint.save(
            folder,
            {"model.safetensors": lora.base_tensors(session.model), "config.json": config, **session.tokenizer.files()},
        )
