"""The code that a run is made of: the commit that it lies on and the patch that leads from there to what is on disk; what has
changed since; and the code as it was, in a folder of its own."""

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etude.errors import Refusal
from etude.redact import has_secret, scrub

HERE = Path(__file__).resolve().parent
# Files that git does not know yet and that belong in the patch: what programs are made of, not data.
SOURCE = tuple(".py .pyi .yaml .yml .toml .json .jinja .sh .c .cc .cpp .cu .cuh .h .html".split())
SECRETS = re.compile(
    r"(?i)(^|/)(\.env(\.[^/]*)?|[^/]*\.(env|pem|key|p12|pfx|keystore)|\.netrc|\.pypirc|id_(rsa|dsa|ecdsa|ed25519)[^/]*|[^/]*credentials?[^/]*"
    r"|[^/]*secrets?[^/]*\.(json|ya?ml|toml|txt|ini|cfg))$"
)
LARGEST = 1 << 20  # bytes of one file's part of a patch
PLAIN = (
    "-c core.quotePath=false -c core.hooksPath=/dev/null -c diff.noprefix=false -c diff.mnemonicPrefix=false".split()
)
DIFF = "--binary --full-index --no-renames --no-color --no-ext-diff --no-textconv --ignore-submodules=dirty".split()


def ask(*args: str | Path, at: Path, env: dict[str, str] | None = None, given: bytes | None = None) -> bytes:
    """What git says in the folder `at`. Raises OSError or subprocess.SubprocessError."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | (env or {})
    command = ["git", *PLAIN, *map(str, args)]
    return subprocess.run(command, cwd=at, env=env, input=given, capture_output=True, timeout=60, check=True).stdout


def line(*args: str, at: Path) -> str:
    return os.fsdecode(ask(*args, at=at)).strip()


def top() -> Path:
    """The repository's root folder."""
    return Path(line("rev-parse", "--show-toplevel", at=HERE))


@contextlib.contextmanager
def apart(repository: Path) -> Iterator[dict[str, str]]:
    """Variables with which git writes its index and its objects into a folder that goes, and leaves the user's as they are."""
    objects = (repository / line("rev-parse", "--git-path", "objects", at=repository)).resolve()
    with tempfile.TemporaryDirectory(prefix="etude-git-") as place:
        (Path(place) / "objects").mkdir()
        yield {
            "GIT_INDEX_FILE": f"{place}/index",
            "GIT_OBJECT_DIRECTORY": f"{place}/objects",
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects),
        }


# ---------------------------------------------------------------- what it is


def record() -> tuple[str, bytes]:
    """Commit, branch, remote and status of the repository that this code lies in, and what is left out of the patch; and
    the patch: commit and patch together are the code, new files that git does not know yet with it."""
    try:
        root = top()
        facts = {
            "commit": line("rev-parse", "HEAD", at=root),
            "branch": line("rev-parse", "--abbrev-ref", "HEAD", at=root),
        }
        facts["remote"] = " ".join(sorted({w for w in line("remote", "-v", at=root).split() if "/" in w or ":" in w}))
        status = os.fsdecode(ask("status", "--porcelain", at=root))
        patch, left_out = difference(root)
    except (OSError, subprocess.SubprocessError):
        return "not a git repository with a commit\n", b""
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines += [f"left out of diff.patch: {name}: {why}" for name, why in left_out.items()]
    return scrub("\n".join([*lines, "status:", status or "clean"])) + "\n", patch


def difference(root: Path) -> tuple[bytes, dict[str, str]]:
    """From the commit to what is on disk: the patch, and the files that it leaves out, with the reason."""
    with apart(root) as env:
        index = root / line("rev-parse", "--git-path", "index", at=root)
        if index.exists():
            shutil.copy2(index, env["GIT_INDEX_FILE"])
        found = ask("ls-files", "--others", "--exclude-standard", "-z", at=root, env=env).split(b"\0")
        left_out: dict[str, str] = {}
        new = []
        for name in (os.fsdecode(f) for f in found if f):
            if name.endswith(SOURCE) and (root / name).is_file():
                if (root / name).stat().st_size > LARGEST:
                    left_out[name] = "it is large"
                else:
                    new.append(name)
        if new:
            names = b"\0".join(map(os.fsencode, new))
            ask(
                "add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul", at=root, env=env, given=names
            )
        kept = []
        for name, part in parts(ask("diff", *DIFF, "HEAD", at=root, env=env)):
            if (why := unfit(root, name, part)) is None:
                kept.append(part)
            else:
                left_out[name] = why
    return b"".join(kept), left_out


def parts(patch: bytes) -> list[tuple[str, bytes]]:
    """(file, its part) of a patch."""
    found = []
    for part in re.split(rb"(?m)^(?=diff --git )", patch):
        if part:
            names = part.split(b"\n", 1)[0][len("diff --git ") :]
            name = os.fsdecode(names[: len(names) // 2].strip(b'"'))
            found.append((name.removeprefix("a/"), part))
    return found


def unfit(root: Path, name: str, part: bytes) -> str | None:
    """Why a file's part does not go into the patch, if it does not."""
    if SECRETS.search(name):
        return "files of that name hold secrets"
    if len(part) > LARGEST:
        return "it is large"
    text = part
    if b"\nGIT binary patch\n" in part and (root / name).is_file():
        text += (root / name).read_bytes()
    return "something in it looks like a secret" if has_secret(text.decode("utf-8", "replace")) else None


# ---------------------------------------------------------------- what has changed since


@dataclasses.dataclass(frozen=True)
class Change:
    """Lines of one file that were added and removed; None of a binary file."""

    file: str
    added: int | None
    removed: int | None

    def __str__(self) -> str:
        return f"{self.file} " + ("(binary)" if self.added is None else f"(+{self.added} -{self.removed})")


def commit_of(git_txt: str) -> str | None:
    found = re.search(r"(?m)^commit: ([0-9a-f]{40,64})$", git_txt)
    return found[1] if found else None


def changes(then: Path, now: Path) -> list[Change] | str:
    """The files in which the code of two runs (meta folders) differs, those that a run is made of first; or in words why
    that is not known."""
    trees = []
    try:
        root = top()
        with apart(root) as env:
            for meta in (then, now):
                commit = commit_of((meta / "git.txt").read_text(encoding="utf-8"))
                if commit is None:
                    return "it was not in a git repository with a commit"
                try:
                    ask("cat-file", "-e", f"{commit}^{{commit}}", at=root)
                except subprocess.SubprocessError:
                    return f"commit {commit[:12]} is not in {root}"
                ask("read-tree", commit, at=root, env=env)
                if patch := (meta / "diff.patch").read_bytes():
                    ask("apply", "--cached", "--whitespace=nowarn", "-", at=root, env=env, given=patch)
                trees.append(os.fsdecode(ask("write-tree", at=root, env=env)).strip())
            said = os.fsdecode(ask("diff", "--numstat", "--no-renames", "-z", *trees, at=root, env=env))
    except (OSError, subprocess.SubprocessError) as error:
        return f"git failed: {reason(error)}"
    found = []
    for entry in filter(None, said.split("\0")):
        added, removed, file = entry.split("\t", 2)
        found.append(Change(file, *(None if n == "-" else int(n) for n in (added, removed))))
    return sorted(found, key=lambda c: (not matters(c.file), c.file))


def matters(file: str) -> bool:
    """Whether a run may depend on a file of the repository: on its programs and settings, not on its tests and texts."""
    return file.endswith((".py", ".yaml", ".jinja", ".toml")) and not file.startswith(
        ("tests/", "docs/", "experiments/")
    )


def reason(error: Exception) -> str:
    said = getattr(error, "stderr", None)
    lines = os.fsdecode(said).strip().splitlines() if said else [str(error)]
    return scrub(lines[-1])


# ---------------------------------------------------------------- the code as it was


@contextlib.contextmanager
def worktree(meta: Path) -> Iterator[Path]:
    """The repository at the commit and with the patch of a run's meta folder, in a folder that goes; -> the folder in it
    that train.py lies in. The user's own files are not touched. Raises Refusal."""
    commit = commit_of((meta / "git.txt").read_text(encoding="utf-8")) if (meta / "git.txt").exists() else None
    if commit is None:
        raise Refusal(
            f"{meta.parent} has no commit in its meta/git.txt, so its code is not known; leave reproduce.code out"
        )
    try:
        root = top()
        inside = HERE.parents[1].relative_to(root)
    except (OSError, subprocess.SubprocessError, ValueError):
        raise Refusal(
            f"{HERE} is not in a git repository, so there is no commit to check out; leave reproduce.code out"
        ) from None
    with tempfile.TemporaryDirectory(prefix="etude-code-") as place:
        tree = Path(place).resolve() / "tree"
        try:
            ask("worktree", "prune", at=root)  # of one that was killed
            ask("worktree", "add", "--detach", "--quiet", tree, commit, at=root)
            if patch := (meta / "diff.patch").read_bytes():
                ask("apply", "--whitespace=nowarn", "-", at=tree, given=patch)
        except (OSError, subprocess.SubprocessError) as error:
            remove(root, tree)
            raise Refusal(
                f"the code of {meta.parent} (commit {commit[:12]}) cannot be checked out: {reason(error)}"
            ) from None
        try:
            yield tree / inside
        finally:
            remove(root, tree)


def remove(root: Path, tree: Path) -> None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask("worktree", "remove", "--force", tree, at=root)
