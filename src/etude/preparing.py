"""What prepare.py does: files to one HDF5 file of token ids, with a bar while it goes on and statistics at the end."""

import contextlib
import fcntl
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from etude.data import formats
from etude.data.journal import Workers
from etude.data.prepare import Preparation, Prepared, Texts, content_hash, open_prepared
from etude.data.source import Source, find
from etude.data.work import without_data
from etude.errors import Interrupted, Refusal, StorageFault
from etude.parallel import cores
from etude.training import maker_of


def run(cfg: dict) -> int:
    """-> exit code."""
    source, target = source_of(cfg), Path(cfg["to"]).expanduser()
    if target.is_dir():
        raise Refusal(f"to={cfg['to']} is a folder; give the name of a file, such as {target / 'corpus.h5'}")
    if cfg["processes"] is not None and cfg["processes"] < 1:
        raise Refusal(f"processes={cfg['processes']} should be at least 1")
    maker = maker_of(cfg["tokenizer"])
    console = Console(highlight=False, soft_wrap=True)
    beside = [target.with_name(f".{target.name}.{what}") for what in ("building", "lock")]
    if target.exists():
        code = already(target, source, maker.key, console)
        clear(beside)  # a process that was killed after its last step
        return code
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f".{target.name}.lock").open("w") as lock:
            alone(lock, target)
            with Workers(cfg["processes"] or cores()) as workers, Bar(cfg["progress"], console) as bar:
                preparation = Preparation(source, target, workers, maker.key, bar.tell)
                with contextlib.closing(preparation.journal), given_up(preparation, beside):
                    preparation.scan()
                    train = bar.count("tokenizer", Texts([preparation], "train"), preparation.characters_of("train"))
                    preparation.encode(preparation.tokenizer or maker.make(train, Texts([preparation], None)))
        clear(beside)
    except KeyboardInterrupt:
        raise Interrupted("what is done is kept: the same command goes on from there") from None
    except OSError as error:
        raise StorageFault(f"{error.filename or target}: {error.strerror or error}") from None
    if cfg["progress"] != "none":
        show(target, open_prepared(target), console)
    return 0


@contextlib.contextmanager
def given_up(preparation: Preparation, beside: list[Path]) -> Iterator[None]:
    """What is refused has to change, so what was done of it is of no use."""
    try:
        yield
    except Refusal:
        preparation.journal.close()
        clear(beside)
        raise


def clear(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def source_of(cfg: dict) -> Source:
    if not 0 < cfg["val_fraction"] < 1:
        raise Refusal(f"val_fraction={cfg['val_fraction']} should lie between 0 and 1")
    if cfg["separator"] == "":
        raise Refusal("separator is empty; null makes each file one document")
    try:
        formats.check_format(cfg["format"], cfg["kind"])
    except Refusal as refusal:
        raise Refusal(without_data(str(refusal))) from None
    root, names = find(cfg["from"], "from")
    settings = ("kind", "format", "separator", "train_on", "on_error", "duplicates", "split", "val_fraction")
    rename = tuple((cfg["rename"] or {}).items())
    return Source(root=root, names=names, rename=rename, key="", **{k: cfg[k] for k in settings})


def already(target: Path, source: Source, key: str | None, console: Console) -> int:
    meta = (prepared := open_prepared(target)).meta
    same = meta["settings"] == source.settings() | {"rename": [list(r) for r in source.rename]}
    if not same or meta.get("tokenizer_key") != key or meta["sha256"] != content_hash(source):
        raise Refusal(
            f"to={target} is there already, made of other files or settings; choose another name, or delete it"
        )
    console.print(f"{target} is there already, made of the same files with the same settings", markup=False)
    show(target, prepared, console)
    return 0


def alone(lock: Any, target: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refusal(f"{target} is being made by another process; wait for it or stop it") from None


class Bar:
    """How far each pass is, with the time that is left: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, mode: str, console: Console):
        self.mode = ("bar" if sys.stdout.isatty() else "lines") if mode == "auto" else mode
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=self.mode != "bar")
        self.tasks: dict[str, Any] = {}
        self.begun: dict[str, tuple[float, int]] = {}
        self.said = time.monotonic()

    def __enter__(self) -> "Bar":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def tell(self, what: str, done: int, total: int | None) -> None:
        """`done` of `total` bytes or characters, at most as many; a total of None is not known."""
        amount = f"{done / 1e6:,.0f} MB" + (f" of {total / 1e6:,.0f}" if total else "")
        now = time.monotonic()
        began, first = self.begun.setdefault(what, (now, done))
        if self.mode == "bar":
            if what not in self.tasks:
                self.tasks[what] = self.bar.add_task(what, total=total, amount="")
            self.bar.update(self.tasks[what], completed=done, total=total, amount=amount)
        elif self.mode == "lines" and (now - self.said > 5 or done == total):
            self.said = now
            rate = (done - first) / max(now - began, 1e-9)
            left = f", {(total - done) / rate:,.0f} s left" if total and rate and done < total else ""
            print(f"{what} {amount}{left}", flush=True)

    def count(self, what: str, texts: Iterable[str], total: int) -> Iterable[str]:
        """The texts, told of as they are read."""
        bar = self

        class Counted:
            def __iter__(self) -> Any:
                done = 0
                for text in texts:
                    yield text
                    done += len(text)
                    bar.tell(what, done, total)

        return Counted()


def show(target: Path, prepared: Prepared, console: Console) -> None:
    """Documents, tokens, lengths, and what was left out."""
    meta = prepared.meta
    strategy = "" if meta["kind"] == "text" else f" strategy={formats.STRATEGIES[meta['kind']]}"
    table = Table("", "train", "val", box=None)
    for name, value in {
        "documents": lambda s: f"{meta[f'{s}_documents']:,}",
        "tokens": lambda s: f"{meta[f'{s}_tokens']:,}",
        "characters": lambda s: f"{meta[f'{s}_characters']:,}",
        "characters a token": lambda s: f"{meta[f'{s}_characters'] / meta[f'{s}_tokens']:.2f}",
        "tokens a document, median": lambda s: f"{meta[f'{s}_lengths']['50']:,}",
        "5 % to 95 %": lambda s: f"{meta[f'{s}_lengths']['5']:,} to {meta[f'{s}_lengths']['95']:,}",
        "longest": lambda s: f"{meta[f'{s}_lengths']['100']:,}",
    }.items():
        table.add_row(name, value("train"), value("val"))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    kept = "kept" if meta["settings"]["duplicates"] == "keep" else "dropped"
    console.print(f"duplicates {meta['duplicates']:,} {kept}", markup=False)
    console.print(
        f"bad rows   {sum(meta['dropped'].values()):,}"
        + "".join(f", {n:,} {why}" for why, n in meta["dropped"].items()),
        markup=False,
    )
    console.print(f"tokenizer  {meta['vocab_size']:,} tokens, sha256 {meta['tokenizer_sha256'][:16]}", markup=False)
    console.print(f"\nnext: python train.py data=h5 data.path={target}{strategy}", markup=False)
