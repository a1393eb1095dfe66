"""What every data node of a config says: how samples are cut from documents, and in which order they come."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from etude.data import formats
from etude.data.prepare import Make, Prepared, cached
from etude.data.source import Source, find
from etude.errors import Refusal


@dataclasses.dataclass(frozen=True)
class Maker:
    """A tokenizer to be made of (training texts, all texts). `key` tells apart makers that differ, None where the data is
    to bring its own tokenizer."""

    key: str | None
    make: Make


@dataclasses.dataclass(kw_only=True)
class Data:
    """How samples of at most `seq_len` inputs are cut from documents.

    `layout`: "windows" of the documents laid end to end, `stride` tokens apart; "packed", several whole documents a sample,
    none of which sees another; "documents", one a sample, padded. `overlong` is what happens to a document
    that is longer: "split" into several, "right" or "left" cut off, "drop", or "error"."""

    seq_len: int
    layout: Literal["windows", "packed", "documents"]
    stride: int | None
    isolate_documents: bool
    overlong: Literal["split", "right", "left", "drop", "error"]
    order: Literal["random", "shuffle", "sequential"]
    drop_last: bool
    workers: int
    prefetch: int

    kind: ClassVar[str] = "text"
    prompts: ClassVar[tuple[str, ...]] = ()  # what samples begin with, where the config does not say

    def __post_init__(self) -> None:
        if self.seq_len < 1 or (self.stride is not None and self.stride < 1):
            raise Refusal(f"data.seq_len={self.seq_len} and data.stride={self.stride} should be at least 1")
        if self.workers < 0 or self.prefetch < 1:
            raise Refusal(
                f"data.workers={self.workers} should be 0 or more and data.prefetch={self.prefetch} at least 1"
            )
        if self.layout in ("packed", "documents"):
            for name in ("stride", "isolate_documents"):
                if getattr(self, name):
                    raise Refusal(
                        f"data.{name}={json.dumps(getattr(self, name))} is for data.layout=windows; leave it out, or set that"
                    )

    @property
    def step_between(self) -> int:
        return self.stride or (1 if self.order == "random" else self.seq_len)

    def parts(self) -> dict[str, "Data"]:
        """The sources of a mixture by name; of anything else, itself."""
        return {"": self}

    def prepare(self, maker: Maker, cache: Path) -> list[Prepared]:
        """The ids of every part, as a store."""
        raise NotImplementedError

    def check_prepared(self, prepared: Prepared) -> None:
        """Raises Refusal where what was prepared cannot be cut into samples as this node says."""
        if self.layout == "windows":
            if prepared.meta["kind"] != "text":
                raise Refusal(
                    f"data.layout=windows is for text and these are {prepared.meta['kind']}: set data.layout=packed or documents"
                )
            for split in ("train", "val"):
                if (n := prepared.meta[f"{split}_tokens"]) <= self.seq_len:
                    raise Refusal(
                        f"the {split} split has {n} tokens and a sample needs {self.seq_len + 1}: lower data.seq_len or bring more text"
                    )
            if self.isolate_documents and prepared.meta["eos"] is None:
                raise Refusal(
                    "data.isolate_documents=true needs a tokenizer with an end token: use tokenizer=bpe or tokenizer=byte"
                )
        elif prepared.meta["kind"] not in ("text", "chats") and self.layout != "documents":
            raise Refusal(f"{prepared.meta['kind']} are trained row by row: set data.layout=documents")


@dataclasses.dataclass(kw_only=True)
class Files(Data):
    """Documents from files. Validation takes the last `val_fraction` of the characters."""

    val_fraction: float

    split: ClassVar[str] = "position"
    duplicates: ClassVar[str] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.val_fraction < 1:
            raise Refusal(f"data.val_fraction={self.val_fraction} should lie between 0 and 1")

    def files(self, cache: Path) -> tuple[Path, tuple[str, ...]]:
        """The folder of the documents and their files' names in it, in order."""
        raise NotImplementedError

    def source(self, cache: Path) -> Source:
        root, names = self.files(cache)
        return Source(
            kind=self.kind,
            root=root,
            names=names,
            val_fraction=self.val_fraction,
            split=self.split,
            duplicates=self.duplicates,
            **self.reading(),
        )

    def reading(self) -> dict[str, Any]:
        """How rows are read: the other settings of a Source."""
        return {}

    def prepare(self, maker: Maker, cache: Path) -> list[Prepared]:
        return prepare_all([self], maker, cache)


@dataclasses.dataclass(kw_only=True)
class Rows(Files):
    """Rows that somebody brings, in any of the formats of etude.data.formats. `split` "hash" puts a document into
    validation by its content, whatever stands around it; "prompt" by what stands before its first answer, so that no
    question of validation is trained on (by its content where nothing does); "position" the last ones."""

    path: str | None
    split: Literal["hash", "prompt", "position"]  # type: ignore[misc]
    duplicates: Literal["keep", "drop"]  # type: ignore[misc]
    format: str
    rename: dict[str, str] | None
    on_error: Literal["raise", "skip"]

    def __post_init__(self) -> None:
        super().__post_init__()
        formats.check_format(self.format)

    def files(self, cache: Path) -> tuple[Path, tuple[str, ...]]:
        assert self.path is not None
        return find(self.path)

    def reading(self) -> dict[str, Any]:
        return {"format": self.format, "rename": tuple((self.rename or {}).items()), "on_error": self.on_error}


def prepare_all(parts: list[Files], maker: Maker, cache: Path) -> list[Prepared]:
    """Several parts with one tokenizer, trained on all of them."""
    if maker.key is None:
        raise Refusal(
            "tokenizer=stored is for data that brings its tokenizer (data=h5); choose tokenizer=bpe, char, byte or file"
        )
    return cached([part.source(cache) for part in parts], maker.make, maker.key, cache)
