"""Checkpoints: folders of safetensors and JSON that are either whole or not there.

step_00000500/ holds model.safetensors (adapter.safetensors of a LoRA run), optimizer.safetensors, state.json, config.json, tokenizer.json and, written
last, manifest.json with the size and sha256 of each. It is made under another name, synced to disk and renamed."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from etude.errors import Refusal, StorageFault
from etude.manifest import MANIFEST, fault, sha256, steps
from etude.model import weights


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>/<name>` tensors. Its groups' settings are the config's and not kept."""
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
    return {
        f"{names[p]}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the state back in the dtypes in which it was saved, which optimizer.load_state_dict would change; the groups
    keep the config's settings. A fused step counter lives with its parameter, as the kernel wants it."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        p = parameters[parameter]
        optimizer.state[p][key] = tensor.to(p.device)


def save(folder: Path, files: dict[str, dict[str, Tensor] | dict | str]) -> Path:
    """Write a folder of tensors (.safetensors), JSON values and texts, whole or not at all. Raises StorageFault with
    the path and the bytes that it would have taken; what was there before is left intact."""
    making = folder.with_name(f".{folder.name}.{os.getpid()}")
    name = ""
    try:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        manifest = {}
        for name, content in files.items():
            path = making / name
            if isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            elif name.endswith(".safetensors"):
                weights.write(content, path)  # type: ignore[arg-type]
            else:
                path.write_text(json.dumps(content, indent=1), encoding="utf-8")
            manifest[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
            _sync(path)
        name = MANIFEST
        (making / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _sync(making / MANIFEST)
        _sync(making)
        if folder.exists():  # the same step again, after a resume from an earlier one
            shutil.rmtree(folder)
        os.rename(making, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(making, ignore_errors=True)
        size = sum(t.nbytes for c in files.values() if isinstance(c, dict) for t in c.values() if isinstance(t, Tensor))
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise StorageFault(
            f"could not write {folder / name}: {why}; the checkpoint takes {size:,} bytes. The one before it is intact"
        ) from None
    return folder


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def newest(
    checkpoints: Path, warn: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=2)
) -> Path | None:
    """The newest whole checkpoint, None where there never was one. Damaged ones are skipped with one warning each that
    names file and reason. Raises Refusal if all are damaged: a run does not silently start afresh."""
    found = steps(checkpoints)
    for folder in reversed(found):
        if (reason := fault(folder)) is None:
            return folder
        warn(f"checkpoint {folder} is damaged and skipped: {reason}")
    if found:
        raise Refusal(f"no checkpoint in {checkpoints} is whole; start a new run, or bring back a copy of one")
    return None


def point(checkpoints: Path, name: str, folder: Path) -> None:
    """Let checkpoints/<name> ("best", "last") lead to a step's folder."""
    making = checkpoints / f".{name}.{os.getpid()}"
    making.unlink(missing_ok=True)
    making.symlink_to(folder.name)
    os.replace(making, checkpoints / name)


def retain(checkpoints: Path, keep: int, good: set[Path]) -> None:
    """Delete all but the newest `keep` whole checkpoints and the best one. `good` are those verified already in this
    process, so that each is hashed once; damaged ones do not count and are left for inspection."""
    best = checkpoints / "best"
    protected = best.resolve() if best.exists() else None
    kept = 0
    for folder in reversed(steps(checkpoints)):
        if folder not in good and fault(folder) is not None:
            continue
        good.add(folder)
        kept += 1
        if kept > keep and folder.resolve() != protected:
            shutil.rmtree(folder, ignore_errors=True)
            good.discard(folder)


def read(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return json.loads((folder / "state.json").read_text())


def find(path: str) -> Path:
    """The folder with weights, config.json and tokenizer.json that `path` means: a run (its newest whole
    checkpoint, else its export), a checkpoint or an export. Raises Refusal where there is none, or it is damaged."""
    given = Path(path).expanduser()
    if not given.exists():
        runs = sorted(p.name for p in given.parent.glob("*") if p.is_dir()) if given.parent.is_dir() else []
        near = f"; the newest there is {given.parent / runs[-1]}" if runs else ""
        raise Refusal(f"ckpt={path} does not exist{near}")
    if weights.files(given) is not None or weights.files(given, "adapter") is not None:
        if (given / MANIFEST).exists() and (reason := fault(given)):
            raise Refusal(f"ckpt={path} is damaged: {reason}")
        return given
    checkpoints = given / "artifacts" / "checkpoints" if (given / "artifacts").is_dir() else given
    if (folder := newest(checkpoints)) is not None:
        return folder
    if weights.files(export := given / "artifacts" / "export") is not None:
        return export
    raise Refusal(f"ckpt={path} holds no checkpoint yet; give a run's folder, a checkpoint's folder or an export")
