"""Rows for post-training: chats, preference pairs, prompts with answers. Without a path, built-in ones made by code."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from etude.data import synthetic
from etude.data.base import Rows
from etude.data.prepare import write


@dataclasses.dataclass(kw_only=True)
class BuiltIn(Rows):
    """`path` null: `n` rows about arithmetic and short texts, a pure function of `rows_seed`, written to the cache as
    JSONL for anyone to look at."""

    n: int
    rows_seed: int

    make: ClassVar[staticmethod]  # (n, seed) -> rows

    def files(self, cache: Path) -> tuple[Path, tuple[str, ...]]:
        if self.path is not None:
            return super().files(cache)
        target = cache / "builtin" / f"{self.kind}_{self.n}_{self.rows_seed}_{synthetic.VERSION}.jsonl"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in type(self).make(self.n, self.rows_seed))
            write(target, "".join(lines).encode())
        return target.parent, (target.name,)


@dataclasses.dataclass(kw_only=True)
class Chats(BuiltIn):
    """Conversations, or prompts with completions. `train_on`: every assistant turn, the completion alone, or all."""

    train_on: Literal["assistant", "completion", "all"]

    kind = "chats"
    make = staticmethod(synthetic.chats)

    def reading(self) -> dict[str, Any]:
        return super().reading() | {"train_on": self.train_on}


class Pairs(BuiltIn):
    """Preferences: a prompt with a chosen and a rejected answer."""

    kind = "pairs"
    make = staticmethod(synthetic.pairs)


class Prompts(BuiltIn):
    """Prompts with whatever rewards need to judge an answer."""

    kind = "prompts"
    make = staticmethod(synthetic.prompts)


class Facts(BuiltIn):
    """Plain texts made by code, to be mixed with other text."""

    make = staticmethod(synthetic.texts)
