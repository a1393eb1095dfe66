"""Rows for post-training: chats, preference pairs, labelled answers, prompts with answers, groups of completions with
rewards. Without a path, built-in ones made by code."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from etude.data import synthetic
from etude.data.base import Rows
from etude.data.prepare import write
from etude.errors import Refusal


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
        name, rows = self.rows()
        target = cache / "builtin" / f"{name}_{synthetic.VERSION}.jsonl"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write(target, "".join(lines).encode())
        return target.parent, (target.name,)

    def rows(self) -> tuple[str, Iterator[dict[str, Any]]]:
        """What tells the built-in rows from others, and the rows."""
        return f"{self.kind}_{self.n}_{self.rows_seed}", type(self).make(self.n, self.rows_seed)


@dataclasses.dataclass(kw_only=True)
class Questions(BuiltIn):
    """`task` says what the built-in rows ask: "mixed", arithmetic and words in many wordings; "arithmetic", one calculation
    of `operations` on numbers of at most `digits` digits, row i the same in every kind of data and no question twice."""

    task: Literal["mixed", "arithmetic"]
    digits: int | None
    operations: list[str] | None

    @staticmethod
    def check(path: str | None, n: int, task: str, digits: int | None, operations: list[str] | None) -> None:
        """Raises ValueError for settings that do not fit together; config.py runs it before torch is imported."""
        if n < 1:
            raise ValueError(f"data.n={n} should be at least 1")
        if task == "mixed":
            for name, value in (("digits", digits), ("operations", operations)):
                if value is not None:
                    raise ValueError(f"data.{name} is for data.task=arithmetic: type that too, or leave it out")
            return
        if path is not None:
            raise ValueError("data.task=arithmetic makes rows and data.path brings them: leave one of the two out")
        if digits is not None and not 1 <= digits <= 9:
            raise ValueError(f"data.digits={digits} should lie between 1 and 9")
        numbers = 10 ** (digits or 2)
        sizes = {"add": numbers**2, "subtract": numbers * (numbers + 1) // 2, "multiply": 8 * numbers}
        chosen = ["add", "subtract"] if operations is None else operations
        if unknown := [o for o in chosen if o not in sizes]:
            raise ValueError(f"data.operations has {unknown[0]}; there is: {', '.join(sizes)}")
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError("data.operations should name one operation at least, and none twice")
        if n > (total := sum(sizes[o] for o in chosen)):
            raise ValueError(
                f"data.n={n} is more than the {total} questions that there are with data.digits={digits or 2}: lower data.n, or raise data.digits"
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.check(self.path, self.n, self.task, self.digits, self.operations)
        except ValueError as error:
            raise Refusal(str(error)) from None

    def rows(self) -> tuple[str, Iterator[dict[str, Any]]]:
        if self.task == "mixed":
            return super().rows()
        digits, operations = self.digits or 2, self.operations or ["add", "subtract"]
        name = f"{self.kind}_{digits}_{'_'.join(operations)}_{self.n}_{self.rows_seed}"
        return name, synthetic.arithmetic(self.kind, self.n, self.rows_seed, digits, operations)


@dataclasses.dataclass(kw_only=True)
class Chats(Questions):
    """Conversations, or prompts with completions. `train_on`: every assistant turn, the completion alone, or all."""

    train_on: Literal["assistant", "completion", "all"]

    kind = "chats"
    make = staticmethod(synthetic.chats)

    def reading(self) -> dict[str, Any]:
        return super().reading() | {"train_on": self.train_on}


class Pairs(Questions):
    """Preferences: a prompt with a chosen and a rejected answer."""

    kind = "pairs"
    make = staticmethod(synthetic.pairs)


class Labelled(Questions):
    """A prompt with one answer, and whether that is a good one."""

    kind = "labelled"
    make = staticmethod(synthetic.labelled)


class Prompts(Questions):
    """Prompts with whatever rewards need to judge an answer."""

    kind = "prompts"
    make = staticmethod(synthetic.prompts)


class Groups(Questions):
    """Prompts with several completions each and the rewards that these were given."""

    kind = "groups"
    make = staticmethod(synthetic.groups)


class Facts(BuiltIn):
    """Plain texts made by code, to be mixed with other text."""

    make = staticmethod(synthetic.texts)
