"""What load_runs read of runs before, so that a thousand of them open at once. One file for all runs of a folder, under
$ETUDE_CACHE or ~/.cache/etude; it can be deleted at any time."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SETTLED = 2.0  # seconds: a file changed later than that may change again without another time or size


def signature(run: Path, names: Iterable[str]) -> list[list[int] | None]:
    """(time of change in ns, bytes, inode) of each file of a run; None where there is none."""
    found: list[list[int] | None] = []
    for name in names:
        try:
            s = os.stat(f"{run}/{name}")
            found.append([s.st_mtime_ns, s.st_size, s.st_ino])
        except OSError:
            found.append(None)
    return found


def settled(marks: list[list[int] | None]) -> bool:
    return max((m[0] for m in marks if m), default=0) / 1e9 < time.time() - SETTLED


def read(parent: Path, code: str) -> dict[str, list]:
    """{run's name: [signature, row]} of the runs in `parent`; {} where the file is not there, damaged, of another folder
    or written by other code."""
    try:
        head, _, body = _file(parent).read_bytes().partition(b"\n")
        if json.loads(head) == _head(parent, code, body):
            return json.loads(body)
    except (OSError, ValueError, RecursionError):
        pass
    return {}


def write(parent: Path, code: str, entries: dict[str, list]) -> None:
    """Replace the file in one move: another reader sees the old or the new one. Where it cannot be, the next load reads
    the runs again."""
    path, making = _file(parent), None
    try:
        body = json.dumps(entries).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".making", delete=False) as file:
            making = Path(file.name)
            file.write(json.dumps(_head(parent, code, body)).encode() + b"\n" + body)
        os.replace(making, path)
    except (OSError, TypeError, ValueError):
        if making is not None:
            with contextlib.suppress(OSError):
                making.unlink()


def _head(parent: Path, code: str, body: bytes) -> dict[str, Any]:
    return {"runs of": str(parent.absolute()), "code": code, "sha256": hashlib.sha256(body).hexdigest()}


def _file(parent: Path) -> Path:
    folder = Path(os.environ.get("ETUDE_CACHE") or "~/.cache/etude").expanduser() / "analysis"
    return folder / (hashlib.sha256(str(parent.absolute()).encode()).hexdigest()[:16] + ".json")
