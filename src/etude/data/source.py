"""The files that people bring, as a stream of rows and pieces of text that can be taken up again at any place.

A file's name says how it is read: .jsonl and .ndjson (a row a line), .parquet, .json whose first character is "[" (an
array of rows); anything else is UTF-8 text. Each of them but Parquet may end in .gz or .zst. No file is ever held
whole."""

import codecs
import contextlib
import dataclasses
import glob
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from etude.data.formats import BadRow, refuse_constant
from etude.errors import Refusal

UNIT = 1 << 21  # bytes of text that are worked on at once
PIECE = 1 << 18  # characters that are encoded at once; a longer text is cut at a line's end
MAX_ROW = 1 << 24  # bytes of one row: a longer one is a file of another kind, or a mistake
READ = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Files and how documents are made of them. `kind`: text, chats, pairs, labelled, prompts or groups. `split`: "hash" puts a
    document into validation by its content, "prompt" by what it asks, "position" the last characters of all. `separator` parts text files into documents."""

    kind: str
    root: Path
    names: tuple[str, ...]
    val_fraction: float
    split: str = "position"
    format: str = "auto"
    rename: tuple[tuple[str, str], ...] = ()
    separator: str | None = None
    on_error: str = "raise"
    duplicates: str = "keep"
    train_on: str = "assistant"
    key: str = "data."  # before a setting's name in what the user is told to type

    def settings(self) -> dict[str, Any]:
        """What changes the documents beside the files' contents: all but where the files lie."""
        return {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("root", "names", "key")
        }

    def where(self, entry: "Entry") -> str:
        return f"{self.root / self.names[entry.file]}" + (f":{entry.row}" if entry.row else "")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A row (bytes of JSON, or an object) with its line's or row's number from 1 on, or a piece of a text (row 0), `final`
    being the last one of its document."""

    file: int
    row: int
    content: Any
    final: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where reading goes on: a file, the byte in its uncompressed stream (lines only), the next row's number, and the
    pieces of text that are done with."""

    file: int = 0
    byte: int = 0
    row: int = 1
    pieces: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """Entries to be worked on at once, about how many bytes they are, and where the next unit begins."""

    entries: list[Entry]
    size: int
    then: Place


# ---------------------------------------------------------------- which files


def find(path_text: str, key: str = "data.path") -> tuple[Path, tuple[str, ...]]:
    """A file, a folder (hidden files and those that are neither rows nor text left out) or a glob -> (folder, names)."""
    path = Path(path_text).expanduser()
    if path.is_dir():
        found = [
            p
            for p in path.rglob("*")
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
        ]
        names = [p.relative_to(path).as_posix() for p in found if p.stat().st_size and _usable(p)]
        if not names:
            raise Refusal(f"{key}={path_text} is a folder without text, JSONL or Parquet files")
        return path, tuple(sorted(names))
    if glob.has_magic(path_text) and not path.exists():
        names = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        if not names:
            raise Refusal(f"{key}={path_text} matches no file")
        return Path(), tuple(names)
    if not path.exists():
        raise Refusal(f"{key}={path_text} does not exist (looked in {Path.cwd()}); give a file, a folder or a glob")
    if not path.is_file():
        raise Refusal(f"{key}={path_text} is not a file")
    if not path.stat().st_size:
        raise Refusal(f"{key}={path_text} is empty")
    return path.parent, (path.name,)


def _usable(path: Path) -> bool:
    if path.suffix in (".gz", ".zst", ".parquet"):
        return True
    with path.open("rb") as f:
        return b"\0" not in f.read(4096)


def kind_of(path: Path) -> str:
    """How a file is read: "lines", "array", "parquet" or "text"."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".ndjson")):
        return "lines"
    if path.name.lower().endswith(".parquet"):
        return "parquet"
    if name.endswith(".json"):
        with opened(path) as f:
            start = f.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        return "array" if start.startswith(b"[") else "text"
    return "text"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's uncompressed bytes. Raises Refusal where it is damaged, also while it is read."""
    try:
        if path.name.endswith(".gz"):
            with gzip.open(path, "rb") as f:
                yield f  # type: ignore[misc]
        elif path.name.endswith(".zst"):
            with path.open("rb") as raw, io.BufferedReader(Zstandard(raw), READ) as z:
                yield z
        else:
            with path.open("rb") as plain:
                yield plain
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refusal(f"{path} is damaged or cut off: {error}; bring a whole copy") from None
    except FileNotFoundError:
        raise Refusal(f"{path} is not there any more") from None
    except PermissionError:
        raise Refusal(f"{path} may not be read; change its permissions") from None


class Zstandard(io.RawIOBase):
    """Uncompressed bytes of a .zst file of any number of frames. A frame that is cut off raises EOFError, which the
    library's own reader keeps silent about. Small bites of input bound what one of them can swell to."""

    def __init__(self, raw: IO[bytes]):
        try:
            import zstandard
        except ImportError:
            raise Refusal("reading .zst files needs a package: pip install zstandard") from None
        self.raw, self.make, self.fault = raw, zstandard.ZstdDecompressor(), zstandard.ZstdError
        self.frame: Any = None
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        rest = b""
        while not self.ready:
            bite = rest or self.raw.read(4096)
            if not bite:
                if self.frame is not None:
                    raise EOFError("the last frame is not complete")
                return 0
            self.frame = self.frame or self.make.decompressobj()
            try:
                self.ready = self.frame.decompress(bite)
            except self.fault as error:
                raise EOFError(str(error)) from None
            rest = b""
            if self.frame.eof:
                rest, self.frame = self.frame.unused_data, None
                if rest and self.ready:
                    self.raw.seek(-len(rest), os.SEEK_CUR)
                    rest = b""
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


# ---------------------------------------------------------------- from files to units


def units(source: Source, start: Place = Place()) -> Iterator[Unit]:  # noqa: B008
    """Everything from `start` on, in order. How it is cut into units changes nothing that comes of it."""
    entries: list[Entry] = []
    size = 0
    for entry, then, length in _entries(source, start):
        entries.append(entry)
        size += length
        if size >= UNIT:
            yield Unit(entries, size, then)
            entries, size = [], 0
    if entries:
        yield Unit(entries, size, then)


def _entries(source: Source, start: Place) -> Iterator[tuple[Entry, Place, int]]:
    """(entry, where reading goes on behind it, about how many bytes it has)."""
    readers = {"lines": _lines, "array": _array, "parquet": _parquet, "text": _text}
    for i in range(start.file, len(source.names)):
        path = source.root / source.names[i]
        place = start if i == start.file else Place(i)
        yield from readers[kind_of(path)](source, path, place)


def _lines(source: Source, path: Path, place: Place) -> Iterator[tuple[Entry, Place, int]]:
    with opened(path) as f:
        byte, row = place.byte, place.row
        f.seek(byte) if f.seekable() else _skip(f, byte)
        while line := f.readline(MAX_ROW):
            byte += len(line)
            content: Any = line
            if len(line) == MAX_ROW and not line.endswith(b"\n"):
                length = MAX_ROW
                while (rest := f.readline(READ)) and length:
                    length += len(rest)
                    if rest.endswith(b"\n"):
                        break
                byte += length - MAX_ROW
                content = BadRow(f"the row has {length:,} bytes, more than {MAX_ROW:,}")
            elif not line.strip():
                content = None
            if content is not None:
                yield Entry(place.file, row, content), Place(place.file, byte, row + 1), min(len(line), MAX_ROW)
            row += 1


def _skip(f: IO[bytes], n: int) -> None:
    while n > 0 and (block := f.read(min(n, READ))):
        n -= len(block)


def _array(source: Source, path: Path, place: Place) -> Iterator[tuple[Entry, Place, int]]:
    """The objects of a JSON array one by one; `row` is the line on which an object begins. An array cannot be read on
    behind a mistake in its syntax, so that is refused in any case."""
    decoder = json.JSONDecoder(parse_constant=refuse_constant)
    with opened(path) as f:
        array = _Text(_decoded(f, path))
        array.skip("\ufeff")
        array.at += 1  # the bracket, by which kind_of knew it
        number = 0
        while (head := array.skip("")) != "]":
            if number and head == ",":
                array.at += 1
                head = array.skip("")
            elif number and head:
                raise Refusal(f"{path}:{array.line_of(array.at)}: not JSON: there is no comma between two rows")
            if not head:
                raise Refusal(f"{path}:{array.line_of(array.at)}: the array is cut off: there is no ] at its end")
            while True:
                mistake = ""
                try:
                    value, end = decoder.raw_decode(array.text, array.at)
                    if end < len(array.text) or not array.more():  # else a number might go on
                        break
                    continue
                except json.JSONDecodeError as error:
                    mistake, at = f"not JSON: {error.msg}", error.pos
                    # Text that is only cut off fails at its end, or where a string began.
                    cut = at >= len(array.text) - 16 or error.msg.startswith("Unterminated")
                    if cut and len(array.text) - array.at > MAX_ROW:
                        mistake = f"a row has more than {MAX_ROW:,} characters"
                    elif cut and array.more():
                        continue
                except BadRow as error:
                    mistake, at = str(error), array.at
                except RecursionError:
                    mistake, at = "nested too deep for the JSON parser", array.at
                except ValueError:
                    mistake, at = "an integer is too long; write it as a string", array.at
                raise Refusal(f"{path}:{array.line_of(at)}: {mistake}")
            number += 1
            row, length = array.line_of(array.at), end - array.at
            array.at = end
            if number > place.pieces:
                yield Entry(place.file, row, value), Place(place.file, pieces=number), length
        array.at += 1
        if array.skip(""):
            raise Refusal(f"{path}:{array.line_of(array.at)}: something follows the end of the array")


class _Text:
    """A text that is read block by block; what lies before `at` is forgotten. Lines are counted once."""

    def __init__(self, blocks: Iterator[str]):
        self.blocks, self.text, self.at = blocks, "", 0
        self.line, self.counted = 1, 0

    def line_of(self, at: int) -> int:
        """The line of a place; asked for places in order."""
        self.line += self.text.count("\n", self.counted, at)
        self.counted = max(self.counted, at)
        return self.line

    def more(self) -> bool:
        """One block more, if there is one."""
        block = next(self.blocks, "")
        self.line_of(self.at)
        self.text, self.counted, self.at = self.text[self.at :] + block, self.counted - self.at, 0
        return bool(block)

    def skip(self, also: str) -> str:
        """Go on to the next character that is neither space nor in `also`. -> it, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n" + also:
                self.at += 1
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]


def _parquet(source: Source, path: Path, place: Place) -> Iterator[tuple[Entry, Place, int]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Refusal(f"reading {path} needs a package: pip install pyarrow") from None
    row = place.row
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            ends = list(itertools.accumulate(f.metadata.row_group(g).num_rows for g in range(f.num_row_groups)))
            group = next((g for g, end in enumerate(ends) if end >= row), len(ends))
            first = (ends[group - 1] if group else 0) + 1
            for batch in f.iter_batches(256, row_groups=list(range(group, len(ends))), use_threads=False):
                done = min(max(row - first, 0), len(batch))
                first += done
                for value in batch.slice(done).to_pylist():
                    yield Entry(place.file, first, value), Place(place.file, row=first + 1), batch.nbytes // len(batch)
                    first += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Refusal(f"{path} is not a Parquet file that can be read: {' '.join(str(error).split())[:200]}") from None


def _text(source: Source, path: Path, place: Place) -> Iterator[tuple[Entry, Place, int]]:
    """The pieces of each document, a document being the file, or what stands between separators."""
    with opened(path) as f:
        number = 0
        for piece, final in _pieces(_decoded(f, path), source.separator):
            number += 1
            if number > place.pieces:
                yield Entry(place.file, 0, piece, final), Place(place.file, pieces=number), len(piece)


def _decoded(f: IO[bytes], path: Path) -> Iterator[str]:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        block = f.read(READ)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            byte = done - (len(error.object) - len(block)) + error.start
            raise Refusal(
                f"{path} is not UTF-8 text: byte {byte} is 0x{error.object[error.start]:02x}; convert it or leave it out"
            ) from None
        done += len(block)
        if not block:
            return


def _pieces(blocks: Iterator[str], separator: str | None) -> Iterator[tuple[str, bool]]:
    """(piece, whether it ends a document). Empty documents are left out."""
    text, begun = "", False
    for block in itertools.chain(blocks, [None]):  # type: ignore[list-item]
        text += block or ""
        *whole, text = text.split(separator) if separator else [text]
        for document in whole:
            for piece in _cut(document):
                yield piece, False
                document, begun = document[len(piece) :], True
            if document or begun:
                yield document, True
            begun = False
        if block is None:
            break
        held = len(separator) if separator else 0  # the separator may be half read
        for piece in _cut(text[: len(text) - held]):
            yield piece, False
            text, begun = text[len(piece) :], True
    for piece in _cut(text):
        yield piece, False
        text, begun = text[len(piece) :], True
    if text or begun:
        yield text, True


def cut(text: str) -> list[str]:
    """The pieces of a text: of each but the last more than PIECE characters were left."""
    pieces = list(_cut(text))
    return [*pieces, text[sum(map(len, pieces)) :]]


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most PIECE characters from the front of `text`, as long as more than that is left. Byte-level BPE parts
    a text in front of a line's end behind a letter or digit (GPT-2's rule and Llama 3's; GPT-2's behind a mark too), so
    cut there it is encoded as in one piece; where there is no such place the cut is anywhere."""
    start = 0
    while len(text) - start > PIECE:
        limit = start + PIECE
        ends = (_line_end(text, start + 1, limit, fitting) for fitting in (str.isalnum, lambda c: not c.isspace()))
        end = next((end for end in ends if end > 0), limit)
        yield text[start:end]
        start = end


def _line_end(text: str, start: int, end: int, fitting: Callable[[str], bool]) -> int:
    """The last place of a line's end behind a fitting character; -1 where there is none."""
    while (end := text.rfind("\n", start, end)) > 0 and not fitting(text[end - 1]):
        pass
    return end
