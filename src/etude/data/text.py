"""Text corpora: Python's own source, tiny Shakespeare, whatever the user brings."""

import dataclasses
import hashlib
import http.client
import sysconfig
import urllib.request
from pathlib import Path
from typing import Any

from etude.data.base import Files, Rows
from etude.data.prepare import write
from etude.data.source import find
from etude.errors import Refusal


class Stdlib(Files):
    """The installed Python's standard library, without tests, vendored packages and generated tables."""

    prompts = ("def ", "class ")

    def files(self, cache: Path) -> tuple[Path, tuple[str, ...]]:
        root = Path(sysconfig.get_path("stdlib"))
        left_out = {
            "test",
            "tests",
            "idle_test",
            "site-packages",
            "dist-packages",
            "_vendor",
            "_bundled",
            "__pycache__",
        }
        names = [
            p.relative_to(root).as_posix()
            for p in root.rglob("*.py")
            if not left_out & set(p.relative_to(root).parts)
            and not p.name.startswith("_sysconfigdata")
            and p.stat().st_size
        ]
        if not names:
            raise Refusal(f"no standard library source under {root}; use data=text data.path=<file, folder or glob>")
        return root, tuple(sorted(names))


@dataclasses.dataclass(kw_only=True)
class Shakespeare(Files):
    """Tiny Shakespeare (Karpathy 2015). `path` null: downloaded once into the cache, its checksum verified."""

    path: str | None

    prompts = ("\n",)
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

    def files(self, cache: Path) -> tuple[Path, tuple[str, ...]]:
        if self.path is not None:
            return find(self.path)
        target = cache / "downloads" / "tinyshakespeare.txt"
        if not target.exists():
            try:
                with urllib.request.urlopen(self.url, timeout=10) as response:
                    text = response.read()
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                raise Refusal(
                    f"could not download tiny Shakespeare ({getattr(error, 'reason', error)}): connect to the network, or give a copy "
                    f"with data.path=FILE (from {self.url})"
                ) from None
            if (got := hashlib.sha256(text).hexdigest()) != self.sha256:
                raise Refusal(
                    f"the download of tiny Shakespeare has sha256 {got} instead of {self.sha256}; give a good copy with data.path=FILE"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target, text)
        return target.parent, (target.name,)


@dataclasses.dataclass(kw_only=True)
class Text(Rows):
    """The user's text: files of plain text, or rows with a `text`. `separator` parts text files into documents."""

    separator: str | None

    prompts = ("\n",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.separator == "":
            raise Refusal("data.separator is empty; null makes each file one document")

    def reading(self) -> dict[str, Any]:
        return super().reading() | {"separator": self.separator}
