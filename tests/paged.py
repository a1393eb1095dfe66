"""Rows through the paged cache a few tokens at a time, for tests that look at a model's logits and not at an engine."""

import torch
from torch import Tensor

from etude.infer.cache import Batch, Chunk, PagedCache
from etude.infer.pages import PagePool
from etude.model.transformer import Transformer

CPU = torch.device("cpu")


def cache_of(m: Transformer, pool: PagePool) -> PagedCache:
    return PagedCache([a.cache_shape() for a in m.attentions()], pool, torch.float32, CPU, "views")


class Rows:
    """`batch` rows, empty at first."""

    def __init__(self, m: Transformer, batch: int, capacity: int):
        self.m, self.pool = m, PagePool(batch * -(-capacity // 4), 4)
        self.cache = cache_of(m, self.pool)
        self.tables = [self.pool.open([])[0] for _ in range(batch)]
        self.lengths = [0] * batch

    def logits(self, new: list[Tensor]) -> list[Tensor]:
        """The next tokens of each row (n,) -> their logits (n, V)."""
        for table, n, ids in zip(self.tables, self.lengths, new):
            assert self.pool.grow(table, n + len(ids))
        chunks = [Chunk(t, n, len(ids)) for t, n, ids in zip(self.tables, self.lengths, new)]
        self.cache.batch = batch = Batch(chunks, self.pool, CPU)
        x, _ = self.m.hidden(torch.cat(new)[None], batch.positions, None, self.cache)
        self.lengths = [c.end for c in chunks]
        return list(self.m.logits(x[0]).split([c.length for c in chunks]))
