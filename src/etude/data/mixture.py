"""Several data nodes as one, in exact proportions."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from etude.data.base import Files, Maker, prepare_all
from etude.data.prepare import Prepared
from etude.errors import Refusal


@dataclasses.dataclass(kw_only=True)
class Mixture:
    """`sources` by name, each a data node with a layout and an order of its own. A source's share of the samples is its
    weight (null: its training tokens) to the power of 1 / temperature (Arivazhagan et al. 2019): 1 keeps the
    proportions, more evens them out."""

    sources: dict[str, Any]
    weights: dict[str, float] | None
    temperature: float
    seq_len: int
    workers: int
    prefetch: int

    def __post_init__(self) -> None:
        if not self.sources:
            raise Refusal("data.sources is empty: +data@data.sources.<name>=text adds one")
        if not 0 < self.temperature < math.inf:
            raise Refusal(f"data.temperature={self.temperature} should be a number above 0")
        if self.weights is not None:
            if odd := sorted(set(self.weights) ^ set(self.sources)):
                raise Refusal(
                    f"data.weights and data.sources differ in {', '.join(odd)}: give every source a weight, or data.weights=null"
                )
            if low := [name for name, w in self.weights.items() if not 0 < w < math.inf]:
                raise Refusal(
                    f"data.weights.{low[0]}={self.weights[low[0]]} should be a number above 0; to leave the source out: ~data.sources.{low[0]} ~data.weights.{low[0]}"
                )
        for name, part in self.sources.items():
            if not isinstance(part, Files):
                raise Refusal(
                    f"data.sources.{name} is of a kind that cannot be mixed: use files or rows, such as data=text"
                )
            for key in ("seq_len", "workers", "prefetch"):
                if (its := getattr(part, key)) != (own := getattr(self, key)):
                    raise Refusal(f"data.sources.{name}.{key}={its} and data.{key}={own} should be the same: set both")
            if part.drop_last:
                raise Refusal(
                    f"data.sources.{name}.drop_last=true has no meaning in a mixture: no batch is a source's own"
                )
        kinds = {("text" if part.kind == "chats" else part.kind) for part in self.sources.values()}
        if len(kinds) > 1:
            raise Refusal(
                f"data.sources holds {' and '.join(sorted(kinds))}, which one strategy cannot train on together"
            )

    @property
    def kind(self) -> str:
        kinds = {part.kind for part in self.sources.values()}
        return kinds.pop() if len(kinds) == 1 else "text"

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p for part in self.sources.values() for p in part.prompts))

    def parts(self) -> dict[str, Files]:
        return self.sources

    def prepare(self, maker: Maker, cache: Path) -> list[Prepared]:
        return prepare_all(list(self.sources.values()), maker, cache)

    def shares(self, prepared: list[Prepared]) -> list[float]:
        """Each source's weight, not normalised."""
        sizes = [p.meta["train_tokens"] for p in prepared]
        weights = [self.weights[name] for name in self.sources] if self.weights is not None else sizes
        return weights if self.temperature == 1 else [(w / max(weights)) ** (1 / self.temperature) for w in weights]
