"""Whether a checkpoint's folder is whole, told without torch: a sweep asks before it starts a job again."""

import hashlib
import json
from pathlib import Path

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint's folder, in words; None if every file is as the manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is unreadable ({error})"
    if not isinstance(manifest, dict) or not {"model.safetensors", "adapter.safetensors"} & manifest.keys():
        return f"{MANIFEST} does not list model.safetensors"
    for name, wanted in manifest.items():
        path = folder / name
        try:
            if (size := path.stat().st_size) != wanted["size"]:
                return f"{name} has {size} bytes instead of {wanted['size']}"
            if sha256(path) != wanted["sha256"]:
                return f"{name} has another sha256 than when it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def steps(checkpoints: Path) -> list[Path]:
    """The step folders, oldest first."""
    return sorted(p for p in checkpoints.glob("step_*") if p.is_dir() and not p.is_symlink())
