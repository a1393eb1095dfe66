"""Token ids that lie ready: files made by prepare.py, and nanoGPT's flat ones."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from etude.data import store
from etude.data.base import Data, Maker
from etude.data.prepare import BASELINE, Prepared, _hash, _stat, baseline, file_hash, open_prepared, write
from etude.errors import Refusal

# What suits a kind of rows: layout, overlong, order.
USUAL: dict[str, tuple[Any, Any, Any]] = {
    "text": ("windows", "split", "random"),
    "chats": ("packed", "right", "shuffle"),
    "pairs": ("documents", "right", "shuffle"),
    "labelled": ("documents", "right", "shuffle"),
    "prompts": ("documents", "drop", "shuffle"),
    "groups": ("documents", "drop", "shuffle"),
}


@dataclasses.dataclass(kw_only=True)
class H5(Data):
    """A file made by prepare.py, with the tokenizer in it. Its checksums are verified once, and again when it changed."""

    path: str
    layout: Literal["windows", "packed", "documents"] | None  # type: ignore[assignment]
    overlong: Literal["split", "right", "left", "drop", "error"] | None  # type: ignore[assignment]
    order: Literal["random", "shuffle", "sequential"] | None  # type: ignore[assignment]

    def prepare(self, maker: Maker, cache: Path) -> list[Prepared]:
        path = Path(self.path).expanduser()
        prepared = open_prepared(path)
        layout, overlong, order = USUAL[prepared.meta["kind"]]
        self.layout, self.overlong, self.order = self.layout or layout, self.overlong or overlong, self.order or order
        self.kind = prepared.meta["kind"]  # type: ignore[misc]
        self.__post_init__()  # what was left to the file is known now
        if maker.key is not None:
            raise Refusal(
                f"{path} was encoded by the tokenizer that lies in it, and no other can be chosen: leave out tokenizer="
            )
        verified = cache / "verified" / _hash([str(path.resolve()), _stat(path)])
        if not verified.exists():
            store.verify(path)
            verified.parent.mkdir(exist_ok=True)
            write(verified, b"")
        return [prepared]


@dataclasses.dataclass(kw_only=True)
class Bin(Data):
    """A folder with train.bin and val.bin, ids without a header, as nanoGPT's preparation scripts write them."""

    path: str
    dtype: Literal["uint16", "uint32"]

    def prepare(self, maker: Maker, cache: Path) -> list[Prepared]:
        if maker.key is None:
            raise Refusal("ids in .bin files bring no tokenizer: choose tokenizer=ids, or tokenizer=file")
        if self.layout != "windows":
            raise Refusal(f"ids in .bin files have no documents: data.layout={self.layout} should be windows")
        folder = Path(self.path).expanduser()
        files = {f"{split}/tokens": folder / f"{split}.bin" for split in ("train", "val")}
        for file in files.values():
            if not file.is_file():
                raise Refusal(f"there is no {file}; data.path should be a folder with train.bin and val.bin")
        flat = store.Bin(files, self.dtype)
        tokenizer = maker.make((), ())
        ids = {split: store.Flat(flat, f"{split}/tokens") for split in ("train", "val")}
        known = (
            cache / "bins" / (_hash([[str(f.resolve()), _stat(f)] for f in files.values()] + [self.dtype]) + ".json")
        )
        if not known.exists():
            known.parent.mkdir(exist_ok=True)
            found = {
                "sha256": _hash([file_hash(f) for f in files.values()]),
                "largest": max(_largest(i) for i in ids.values()),
            }
            write(known, json.dumps(found).encode())
        facts = json.loads(known.read_text())
        if facts["largest"] >= tokenizer.vocab_size:
            raise Refusal(
                f"{folder} has token id {facts['largest']} and the tokenizer {tokenizer.vocab_size} ids: choose its own tokenizer, raise tokenizer.vocab_size, or is data.dtype={self.dtype} wrong?"
            )
        meta = {
            "kind": "text",
            "source": str(folder),
            "files": 2,
            "sha256": facts["sha256"],
            "tokenizer_sha256": tokenizer.sha256(),
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
            "dropped": {},
        }
        meta |= baseline(ids["train"][:BASELINE], ids["val"][: BASELINE // 10], tokenizer.vocab_size)
        meta |= {f"{split}_tokens": len(i) for split, i in ids.items()}
        return [Prepared(flat, meta, tokenizer.files())]


def _largest(ids: store.Flat) -> int:
    step = 1 << 24
    return max(int(ids.read(i, min(i + step, len(ids))).max()) for i in range(0, len(ids), step))
