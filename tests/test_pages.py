"""The page pool: a table's slots hold its own contents and nobody else's, whatever is shared, evicted or given back."""

import itertools
import random
import time
from collections.abc import Callable, Hashable

import pytest

from etude.infer.pages import AHEAD, Copy, PagePool, Table


class Clash(int):
    """A token whose hash is that of every other."""

    __hash__ = lambda self: 0  # noqa: E731


def done(pool: PagePool, ids: list[int], computed: int | None = None) -> list[int]:
    """A sequence from its beginning to its end; -> the pages it had."""
    table = opened(pool, ids)
    assert pool.grow(table, len(ids))
    pages = list(table.pages)
    pool.release(table, ids, len(ids) if computed is None else computed)
    pool.check()
    return pages


def opened(pool: PagePool, ids: list[int], salt: Hashable = None) -> Table:
    table, copy = pool.open(ids, salt=salt)
    if copy is not None:
        pool.copied(copy)
    return table


def hits(pool: PagePool, ids: list[int], salt: Hashable = None) -> int:
    """Tokens found, without a trace but in the order of eviction."""
    table = opened(pool, ids, salt)
    found = table.tokens
    pool.release(table, ids, found)
    return found


def at_rest(pool: PagePool) -> bool:
    s = pool.stats()
    return s["used"] == 0 and s["free"] + s["cached"] == s["pages"] == pool.n_pages


# ---------------------------------------------------------------- against a memory that is really written


class Sequence:
    """`expected[i]` stands for what position i holds: all tokens up to it, the weights of each, and the salt."""

    def __init__(self, ids: list[int], salt: Hashable, table: Table, copy: Copy | None):
        self.ids, self.salt, self.table, self.copy = ids, salt, table, copy
        self.expected: list[Hashable] = []
        self.trimmed = 0

    def grown(self, n: int, version: int) -> list[Hashable]:
        last = self.expected[-1] if self.expected else self.salt
        found = []
        for token in self.ids[len(self.expected) : len(self.expected) + n]:
            last = hash((last, int(token), version))
            found.append(last)
        return found


class Machine:
    """Random operations on a pool, with the contents that an engine would write."""

    def __init__(self, seed: int, n_pages: int, page_size: int, token: Callable[[int], int], eager: bool):
        self.rng = random.Random(seed)
        self.pool = PagePool(n_pages, page_size)
        self.size, self.token, self.eager, self.most = page_size, token, eager, 2 + n_pages // 6
        self.memory: list[list[Hashable]] = [[None] * page_size for _ in range(n_pages)]
        self.live: list[Sequence] = []
        self.prompts: list[list[int]] = [[token(0)]]
        self.version = 0
        self.counts = dict.fromkeys(("shared", "copies", "refused", "trims", "forgets", "given up"), 0)

    def run(self, operations: int) -> None:
        every = [self.open] * 4 + [self.compute] * 9 + [self.release] * 3 + [self.preempt, self.trim, self.too_much]
        for _ in range(operations):
            operation = self.rng.choice(every) if self.rng.random() < 0.997 else self.forget
            if self.live if operation != self.open else len(self.live) < self.most:
                operation()
            self.pool.check()
            self.hold_against_memory()
        while self.live:
            self.release()
        self.pool.check()
        assert at_rest(self.pool)
        self.pool.forget()
        assert self.pool.stats()["free"] == self.pool.n_pages and not self.pool._roots

    def some(self) -> Sequence:
        return self.rng.choice(self.live)

    def prompt(self) -> list[int]:
        """Often the beginning of an earlier one, with something behind it."""
        old = self.rng.choice(self.prompts)
        kept = old[: self.rng.randint(0, len(old))] if self.rng.random() < 0.7 else old
        longest = max(1, self.pool.n_pages * self.size * 2 // 3)
        new = [self.token(self.rng.randrange(3)) for _ in range(self.rng.randint(0, 3 * self.size))]
        ids = (kept + new)[:longest] or [self.token(0)]
        self.prompts = [*self.prompts[-20:], ids]
        return list(ids)

    def open(self) -> None:
        ids, salt = self.prompt(), self.rng.choice((None, None, "a"))
        best = self.longest(ids, salt)
        table, copy = self.pool.open(ids, salt=salt)
        full = best // self.size * self.size
        assert table.tokens == (best if copy else full) and len(table.pages) == full // self.size + (copy is not None)
        assert copy is None or copy == Copy(copy.source, table.pages[-1], best - full)
        s = Sequence(ids, salt, table, copy)
        s.expected = s.grown(table.tokens, self.version)
        self.live.append(s)
        self.counts["shared"] += full // self.size
        self.counts["copies"] += copy is not None
        if copy and self.eager:
            self.copy(s)

    def longest(self, ids: list[int], salt: Hashable) -> int:
        """What open should find, by looking at every page that can be found."""
        best = 0
        for node in self.pool._nodes:
            tokens: list[int] = []
            while node is not None and node.page is not None and node.parent is not None:
                tokens[:0] = node.tokens
                node = node.parent
            if node is not None and node.parent is None and node.tokens == (salt,):
                same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, ids[:-1]))
                best = max(best, len(list(same)))
        return best

    def copy(self, s: Sequence) -> None:
        assert s.copy is not None
        source, target, count = s.copy.source, s.copy.target, s.copy.count
        self.memory[target][:count] = self.memory[source][:count]
        self.pool.copied(s.copy)
        s.copy = None

    def compute(self) -> None:
        """A chunk, or a new token at the end."""
        s = self.some()
        if s.copy:
            self.copy(s)
        computed = len(s.expected)
        n = self.rng.choice((1, 1, self.rng.randint(1, 2 * self.size)))
        s.ids += [self.token(self.rng.randrange(3)) for _ in range(computed + n - len(s.ids))]
        hint = self.rng.choice((0, 0, len(s.ids), len(s.ids) + 4 * self.size))
        before = list(s.table.pages), self.pool.stats()
        if not self.pool.grow(s.table, computed + n, hint=hint):
            assert (s.table.pages, self.pool.stats()) == before
            self.counts["refused"] += 1
            return
        others = [p for o in self.live if o is not s for p in o.table.pages if p >= 0]
        others += [p for o in self.live if o.copy for p in (o.copy.source, o.copy.target)]
        for content in s.grown(n, self.version):
            page, offset = s.table.pages[len(s.expected) // self.size], len(s.expected) % self.size
            assert page not in others
            self.memory[page][offset] = content
            s.expected.append(content)
        if self.rng.random() < 0.8:
            self.pool.commit(s.table, s.ids, len(s.expected))
            assert s.table.tokens == len(s.expected)

    def release(self) -> None:
        s = self.some()
        self.live.remove(s)
        if s.copy and self.rng.random() < 0.5:
            self.copy(s)
        self.pool.release(s.table, s.ids, len(s.expected))
        if s.copy:  # given up before it was made: what its target holds must not be found
            self.counts["given up"] += 1
            self.memory[s.copy.target] = [None] * self.size
            self.pool.copied(s.copy)
        with pytest.raises(ValueError, match="released"):
            self.pool.commit(s.table, s.ids, len(s.expected))

    def preempt(self) -> None:
        """The same tokens are asked for again at once."""
        s = self.some()
        if s.copy:
            self.copy(s)
        self.live.remove(s)
        self.pool.release(s.table, s.ids, len(s.expected))
        self.prompts[-1] = s.ids
        self.open()

    def trim(self) -> None:
        s = self.some()
        position = self.rng.randint(0, s.table.tokens)
        if not s.copy:
            self.pool.trim(s.table, position)
            s.trimmed = max(s.trimmed, position // self.size)
            self.counts["trims"] += 1

    def too_much(self) -> None:
        s, before = self.some(), self.pool.stats()
        assert not self.pool.grow(s.table, (self.pool.n_pages + 1 + s.trimmed) * self.size)
        assert self.pool.stats() == before

    def forget(self) -> None:
        for s in self.live:
            if s.copy:
                self.copy(s)
        self.pool.forget()
        self.version += 1
        self.counts["forgets"] += 1
        assert self.pool.stats()["cached"] == 0

    def hold_against_memory(self) -> None:
        for s in self.live:
            ready = len(s.expected) if not s.copy else len(s.expected) - s.copy.count
            for i in range(s.trimmed, -(-ready // self.size)):
                end = min(ready, (i + 1) * self.size)
                assert self.memory[s.table.pages[i]][: end - i * self.size] == s.expected[i * self.size : end]
            assert s.table.pages[: s.trimmed] == [-1] * s.trimmed
        for s in self.live[-1:]:
            start = self.rng.randint(s.trimmed * self.size, max(s.trimmed * self.size, len(s.expected) - 1))
            if start < len(s.expected):
                runs = self.pool.runs(s.table, start, len(s.expected) - start)
                slots = [slot + i for slot, n in runs for i in range(n)]
                positions = range(start, len(s.expected))
                assert slots == [s.table.pages[p // self.size] * self.size + p % self.size for p in positions]
                assert all(a + n != b for (a, n), (b, _) in zip(runs, runs[1:]))


@pytest.mark.parametrize(
    "seed, n_pages, page_size, token, eager",
    [
        (1, 24, 4, int, True),
        (2, 40, 2, int, False),
        (3, 12, 16, int, False),
        (4, 16, 1, int, False),
        (5, 5, 3, int, False),
        (6, 1, 4, int, False),
        (7, 2, 64, int, True),
        (8, 20, 3, Clash, False),
    ],
)
def test_ten_thousand_operations(
    seed: int, n_pages: int, page_size: int, token: Callable[[int], int], eager: bool
) -> None:
    """Each table's slots hold what was computed for it at every moment; all invariants hold after each operation."""
    machine = Machine(seed, n_pages, page_size, token, eager)
    machine.run(10_000)
    counts = machine.counts | machine.pool.stats()
    assert counts["evictions"] > 500 and counts["trims"] > 100 and counts["forgets"] > 10 and counts["refused"] > 0
    assert counts["shared"] > 300 or n_pages < 5
    assert counts["copies"] > 50 or n_pages == 1 or page_size == 1
    assert counts["given up"] > 20 or eager or counts["copies"] == 0


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_finds_the_longest_beginning(page_size: int) -> None:
    """With room for all, a prompt finds as many tokens as it has in common with anything that came before."""
    rng, before = random.Random(page_size), []
    pool = PagePool(4000, page_size)
    for _ in range(150):
        old = rng.choice(before)[: rng.randrange(60)] if before else []
        ids = old + [rng.randrange(3) for _ in range(rng.randint(1, 40))]
        common = [sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(b, ids[:-1]))) for b in before]
        assert hits(pool, ids) == max(common, default=0)
        computed = rng.randint(0, len(ids))
        table = opened(pool, ids)
        computed = max(computed, table.tokens)
        assert pool.grow(table, computed)
        pool.release(table, ids, computed)
        before.append(ids[:computed])
    pool.check()
    assert pool.stats()["evictions"] == 0


# ---------------------------------------------------------------- open, commit, release


def test_full_pages_are_shared_and_the_next_is_copied() -> None:
    """Sequences that run at once, one of them behind the other by its last, partly equal page."""
    pool = PagePool(10, 4)
    ids = list(range(11))
    first, copy = pool.open(ids)
    assert (first.pages, first.tokens, copy) == ([], 0, None)
    assert pool.grow(first, 11)
    pool.commit(first, ids, 11)
    second, copy = pool.open([*range(6), 90, 91, 92])
    assert second.pages[0] == first.pages[0] and copy == Copy(first.pages[1], second.pages[1], 2)
    assert second.tokens == 6 and second.pages[1] not in first.pages
    with pytest.raises(ValueError, match="under way"):
        pool.copied(Copy(copy.source, copy.target, 1))
    pool.copied(copy)
    with pytest.raises(ValueError, match="under way"):
        pool.copied(copy)
    third, copy = pool.open(ids)  # the third page is being written by the first
    assert third.pages == first.pages[:2] and third.tokens == 8 and copy is None
    pool.check()
    for table, tokens in ((second, [*range(6), 90]), (first, ids), (third, ids)):
        pool.release(table, tokens, min(table.tokens, len(tokens)))
        pool.check()
    assert at_rest(pool)
    assert hits(pool, ids) == 10 and hits(pool, [*ids, 7, 7]) == 11


def test_last_token_is_always_computed() -> None:
    """Also where all of a prompt is cached, in full pages or not; a prompt of one token shares nothing."""
    pool = PagePool(8, 4)
    done(pool, list(range(8)))
    assert hits(pool, list(range(8))) == 7 and hits(pool, list(range(9))) == 8 and hits(pool, list(range(5))) == 4
    assert hits(pool, [0]) == 0 and hits(pool, []) == 0
    single = PagePool(8, 1)
    done(single, [1, 2, 3])
    assert hits(single, [1, 2, 3]) == 2 and hits(single, [1]) == 0


def test_equal_prompts_at_once() -> None:
    """Each computes its own pages; one of them enters the cache, the other's become free."""
    pool = PagePool(10, 4)
    ids = list(range(10))
    tables = [opened(pool, ids) for _ in range(3)]
    for t in tables:
        assert pool.grow(t, 10)
    for t in tables:
        pool.commit(t, ids, 10)
        pool.check()
    assert len({p for t in tables for p in t.pages}) == 9
    for t in tables:
        pool.release(t, ids, 10)
        pool.check()
    assert pool.stats()["cached"] == 3 and hits(pool, ids) == 9


def test_partial_page_gives_way_to_a_longer_one() -> None:
    """Of beginnings of one page only the longest is kept; what branches off stays."""
    pool = PagePool(10, 8)
    done(pool, [1, 2, 3])
    done(pool, [1, 2, 3, 4, 5])
    assert pool.stats()["cached"] == 1
    done(pool, [1, 2, 3, 4])  # less than there is
    assert pool.stats()["cached"] == 1 and hits(pool, [1, 2, 3, 4, 5, 6]) == 5
    done(pool, [1, 2, 9])
    assert pool.stats()["cached"] == 2 and hits(pool, [1, 2, 9, 9]) == 3
    done(pool, list(range(1, 9)))
    assert pool.stats()["cached"] == 2 and hits(pool, list(range(1, 12))) == 8
    pool.check()


def test_partial_page_that_is_being_copied_may_be_superseded() -> None:
    """The copy's source stays as it is until the copy was made, and is free then."""
    pool = PagePool(4, 8)
    (page,) = done(pool, [1, 2, 3])
    table, copy = pool.open([1, 2, 3, 4])
    assert copy is not None and copy.source == page
    other = done(pool, [1, 2, 3, 4, 5, 6])
    assert page not in other and pool.stats() | {"used": 2, "cached": 1, "free": 1} == pool.stats()
    pool.copied(copy)
    pool.check()
    assert pool.stats() | {"used": 1, "cached": 1, "free": 2} == pool.stats()
    pool.release(table, [1, 2, 3, 4], 4)
    assert pool.stats()["cached"] == 1 and hits(pool, [1, 2, 3, 4, 5, 6, 7]) == 6


def test_only_equal_salts_share() -> None:
    pool = PagePool(10, 2)
    table = opened(pool, [1, 2, 3, 4], salt="alice")
    assert pool.grow(table, 4)
    pool.release(table, [1, 2, 3, 4], 4)
    assert hits(pool, [1, 2, 3, 4]) == 0 == hits(pool, [1, 2, 3, 4], salt="bob")
    assert hits(pool, [1, 2, 3, 4], salt="alice") == 3
    pool.check()


def test_colliding_hashes() -> None:
    """Tokens are compared, and so is all that comes before them."""
    pool = PagePool(20, 2)
    a, b = ([Clash(x) for x in ids] for ids in ([1, 2, 5, 6, 7], [3, 4, 5, 6, 7]))
    assert hash(tuple(a)) == hash(tuple(b))
    pages = done(pool, a)
    assert hits(pool, b) == 0
    assert set(done(pool, b)).isdisjoint(pages)
    table = opened(pool, [*b, Clash(8)])
    assert table.tokens == 5 and set(table.pages).isdisjoint(pages)


def test_without_prefix_cache() -> None:
    pool = PagePool(4, 2, prefix_cache=False)
    done(pool, [1, 2, 3, 4, 5])
    assert hits(pool, [1, 2, 3, 4, 5]) == 0
    assert pool.stats()["free"] == 4


def test_release_with_less_than_was_committed() -> None:
    """Contents that are not to be trusted leave the cache, with those that were computed from them."""
    pool = PagePool(10, 2)
    ids = list(range(8))
    done(pool, ids)
    table = opened(pool, ids)
    assert table.tokens == 7
    pool.release(table, ids, 2)
    pool.check()
    assert hits(pool, ids) == 2 and pool.stats()["cached"] == 1


def test_release_within_a_page_that_others_share() -> None:
    """Its beginning may be right, but the page is not this table's alone."""
    pool = PagePool(10, 4)
    ids = list(range(9))
    table = opened(pool, ids)
    assert pool.grow(table, 9)
    pool.commit(table, ids, 9)
    other = opened(pool, ids)
    assert other.pages == table.pages[:2]
    pool.release(table, ids, 5)
    pool.check()
    assert hits(pool, ids) == 4
    pool.release(other, ids, 8)
    pool.check()
    assert hits(pool, ids) == 8


def test_copy_from_contents_that_turned_out_bad() -> None:
    """Its source left the cache meanwhile, and it was never made: its target does not take that place."""
    pool = PagePool(10, 4)
    table = opened(pool, [1, 2, 3, 4])
    assert pool.grow(table, 4)
    pool.commit(table, [1, 2, 3, 4], 4)
    late, copy = pool.open([1, 2, 9])
    assert copy is not None and late.tokens == 2
    pool.release(table, [1, 2, 3, 4], 0)
    pool.release(late, [1, 2, 9], 2)
    pool.copied(copy)
    pool.check()
    assert hits(pool, [1, 2, 9]) == 0 and pool.stats()["free"] == 10


def test_copy_that_was_never_made() -> None:
    """A request that ends in the step of its admission: its page is held until the copy is dropped, and never cached."""
    pool = PagePool(10, 4)
    done(pool, [1, 2, 3, 4, 5, 6])
    table, copy = pool.open([1, 2, 3, 4, 5, 9])
    assert copy is not None and table.tokens == 5
    pool.release(table, [1, 2, 3, 4, 5, 9], 5)
    pool.check()
    other = opened(pool, [7])
    assert pool.grow(other, 4 * 7) and copy.target not in other.pages and copy.source not in other.pages
    assert not pool.grow(other, 4 * 8 + 1) and pool.grow(other, 4 * 7)
    pool.copied(copy)
    pool.check()
    assert hits(pool, [1, 2, 3, 4, 5, 6, 7]) == 6


def test_preempted_and_opened_again() -> None:
    """What was computed so far is found again, to the token."""
    pool = PagePool(10, 4)
    ids = list(range(100, 120))
    table = opened(pool, ids)
    assert pool.grow(table, 20)
    pool.commit(table, ids, 9)
    pool.release(table, ids, 11)
    again = opened(pool, ids)
    assert again.tokens == 11
    pool.check()


def test_released_tables_are_refused() -> None:
    """As are those of another pool, and numbers that cannot be."""
    pool, ids = PagePool(4, 2), [1, 2, 3]
    table = opened(pool, ids)
    assert pool.grow(table, 3)
    for bad in (5, -1):
        with pytest.raises(ValueError, match="computed="):
            pool.release(table, ids, bad)
    with pytest.raises(ValueError, match="cannot be full"):
        pool.commit(table, ids, 4)
    pool.commit(table, ids, 3)
    with pytest.raises(ValueError, match="cannot be full"):
        pool.commit(table, ids, 1)
    with pytest.raises(ValueError, match="behind"):
        pool.trim(table, 4)
    with pytest.raises(ValueError, match="another pool's"):
        PagePool(4, 2).grow(table, 1)
    pool.check()
    pool.release(table, ids, 3)
    calls: list[Callable[[], object]] = [
        lambda: pool.release(table, ids, 3),
        lambda: pool.commit(table, ids, 3),
        lambda: pool.grow(table, 1),
        lambda: pool.trim(table, 0),
        lambda: pool.runs(table, 0, 1),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()
    for n_pages, page_size in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            PagePool(n_pages, page_size)


# ---------------------------------------------------------------- room


def test_pool_of_one_page() -> None:
    pool = PagePool(1, 4)
    done(pool, [1, 2, 3])
    table, copy = pool.open([1, 2, 3, 4])  # its page would be the copy's source
    assert copy is None and table.tokens == 0 and pool.grow(table, 4)
    other = opened(pool, [5])
    assert not pool.grow(other, 1)
    pool.release(table, [1, 2, 3, 4], 4)
    assert pool.grow(other, 1) and pool.stats()["evictions"] == 2
    assert pool.fits(4) and not pool.fits(5)


def test_a_copy_never_keeps_a_sequence_out() -> None:
    """Where its source is needed for the sequence's own pages there is no copy: else it would be asked for forever."""
    pool = PagePool(3, 4)
    done(pool, [1, 2, 3, 4, 5, 6])
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    table, copy = pool.open(ids)
    assert copy is None and table.tokens == 4 and pool.grow(table, len(ids))
    pool.check()


def test_oldest_and_ends_of_chains_are_evicted_first() -> None:
    pool = PagePool(6, 2)
    first, second = [1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6]
    pages = done(pool, first)
    done(pool, second)
    table = opened(pool, [])
    gone = []
    for n in range(1, 4):
        assert pool.grow(table, 2 * n)
        gone.append(table.pages[-1])
        pool.check()
        assert pool.stats()["evictions"] == n
    assert gone == pages[::-1]
    pool.release(table, [], 0)
    assert hits(pool, [*second, 0]) == 6 and hits(pool, [*first, 0]) == 0


def test_use_makes_young() -> None:
    pool = PagePool(4, 2)
    done(pool, [1, 1, 2, 2])
    done(pool, [3, 3, 4, 4])
    assert hits(pool, [1, 1, 2, 2, 0]) == 4
    done(pool, [5, 5])
    assert hits(pool, [1, 1, 2, 2, 0]) == 4 and hits(pool, [3, 3, 4, 4, 0]) == 2


def test_use_of_an_equal_page_makes_young() -> None:
    """What a table computed for itself counts as a use of the cached page with the same contents."""
    pool = PagePool(6, 2)
    first, second = opened(pool, [1, 1]), opened(pool, [1, 1])
    assert pool.grow(first, 2) and pool.grow(second, 2)
    pool.release(first, [1, 1], 2)
    done(pool, [3, 3])
    pool.release(second, [1, 1], 2)
    taking = opened(pool, [])
    assert pool.grow(taking, 10) and pool.stats()["evictions"] == 1
    assert hits(pool, [1, 1, 0]) == 2 and hits(pool, [3, 3, 0]) == 0


def test_private_pages_stand_in_for_evicted_ones() -> None:
    """Two compute the same at once; the first's page goes while the second still runs: its own enters at its end, so that
    what it appended is found."""
    pool = PagePool(6, 2)
    ids = [1, 2, 3, 4]
    first, second = opened(pool, ids), opened(pool, ids)
    assert pool.grow(first, 2) and pool.grow(second, 4)
    pool.commit(first, ids, 2)
    pool.commit(second, ids, 4)
    pool.release(first, ids, 2)
    third = opened(pool, [7])
    assert pool.grow(third, 8) and pool.stats()["evictions"] == 1
    pool.check()
    assert hits(pool, [*ids, 0]) == 0  # the page in use below cannot be reached
    pool.release(second, ids, 4)
    pool.check()
    assert hits(pool, [*ids, 0]) == 4


def test_pages_below_an_evicted_one_do_not_leak() -> None:
    """A trimmed beginning is evicted while its end is in use: the end is not cached, and comes back when computed anew."""
    pool = PagePool(4, 2)
    ids = [1, 2, 3, 4, 5, 6]
    table = opened(pool, ids)
    assert pool.grow(table, 6)
    pool.commit(table, ids, 6)
    pool.trim(table, 3)
    pool.check()
    assert table.pages[0] == -1 and pool.stats()["cached"] == 1 and pool.fits(8)
    other = opened(pool, [9])
    assert pool.grow(other, 4)  # takes the free one and the trimmed one
    pool.check()
    assert hits(pool, ids) == 0
    pool.release(table, ids, 6)
    pool.check()
    assert pool.stats()["cached"] == 0 and pool.stats()["free"] == 2
    pool.release(other, [9], 1)
    done(pool, ids)
    assert hits(pool, [*ids, 0]) == 6


def test_trim() -> None:
    pool = PagePool(10, 4)
    ids = list(range(20))
    table = opened(pool, ids)
    assert pool.grow(table, 20)
    pool.commit(table, ids, 18)
    pool.trim(table, -5)
    pool.trim(table, 7)
    pages = list(table.pages)
    assert pages[0] == -1 and min(pages[1:]) >= 0
    pool.trim(table, 7)
    pool.trim(table, 16)
    assert table.pages == [-1] * 4 + pages[4:] and pool.stats()["used"] == 1 and pool.stats()["cached"] == 4
    assert pool.runs(table, 17, 2) == [(pages[4] * 4 + 1, 2)]
    with pytest.raises(ValueError, match="positions 15..17"):
        pool.runs(table, 15, 3)
    with pytest.raises(ValueError, match="positions 17..20"):
        pool.runs(table, 17, 4)
    pool.check()
    pool.release(table, ids, 18)
    assert at_rest(pool) and hits(pool, ids) == 18


def test_forget() -> None:
    """Nothing of the old weights is found, from neither finished tables nor those that go on."""
    pool = PagePool(12, 4)
    ids = list(range(12))
    done(pool, [5, 6, 7, 8, 9])
    table = opened(pool, ids)
    assert pool.grow(table, 12)
    pool.commit(table, ids, 8)
    late, copy = pool.open([*range(6), 70])
    assert copy is not None
    pool.forget()
    pool.check()
    assert pool.stats()["cached"] == 0 and hits(pool, ids) == 0 == hits(pool, [5, 6, 7, 8, 9])
    pool.copied(copy)
    pool.commit(table, ids, 12)
    pool.check()
    assert hits(pool, ids) == 0
    fresh = opened(pool, ids)
    assert pool.grow(fresh, 12)
    pool.commit(fresh, ids, 4)
    pool.release(table, ids, 12)
    pool.release(late, [*range(6), 70], 6)
    assert hits(pool, ids) == 4
    pool.release(fresh, ids, 12)
    pool.check()
    assert hits(pool, ids) == 11 and at_rest(pool)


def test_stats() -> None:
    pool = PagePool(4, 2)
    assert pool.stats() == dict(pages=4, free=4, cached=0, used=0, hit_tokens=0, queried_tokens=0, evictions=0)
    table = opened(pool, [1, 2, 3])
    assert pool.grow(table, 3)
    assert pool.stats() == dict(pages=4, free=2, cached=0, used=2, hit_tokens=0, queried_tokens=3, evictions=0)
    pool.release(table, [1, 2, 3], 3)
    assert pool.stats() == dict(pages=4, free=2, cached=2, used=0, hit_tokens=0, queried_tokens=3, evictions=0)
    table = opened(pool, [1, 2, 4])
    assert pool.stats() == dict(pages=4, free=2, cached=1, used=1, hit_tokens=2, queried_tokens=6, evictions=0)
    assert pool.grow(table, 8)
    assert pool.stats() == dict(pages=4, free=0, cached=0, used=4, hit_tokens=2, queried_tokens=6, evictions=1)


def test_check_sees_what_is_wrong() -> None:
    """Each kind of damage to a pool's books."""

    def damaged(damage: Callable[[PagePool, Table], object]) -> None:
        pool = PagePool(8, 2)
        done(pool, [8, 8, 9])
        table = opened(pool, [1, 2, 3, 4, 5])
        assert pool.grow(table, 5, hint=8)
        pool.commit(table, [1, 2, 3, 4, 5], 5)
        pool.check()
        damage(pool, table)
        with pytest.raises((AssertionError, KeyError)):
            pool.check()

    def set_node(pool: PagePool, table: Table) -> None:
        pool._nodes[table.pages[-1]] = pool._nodes[table.pages[0]]

    def set_promise(pool: PagePool, table: Table) -> None:
        pool._space[pool._space == table._number] = 77

    for damage in (
        lambda pool, table: pool._refs.__setitem__(table.pages[0], 2),
        lambda pool, table: pool._refs.__setitem__(next(iter(pool._lru)), 1),
        lambda pool, table: pool._lru.popitem(),
        lambda pool, table: pool._lru.__setitem__(table.pages[0], None),
        lambda pool, table: pool._space.__setitem__(table.pages[0], 0),
        lambda pool, table: table.pages.append(table.pages[0]),
        lambda pool, table: table.pages.pop(),
        lambda pool, table: table._end.order.append((0, 0)),
        lambda pool, table: pool._roots.clear(),
        set_node,
        set_promise,
    ):
        damaged(damage)


# ---------------------------------------------------------------- adjacent pages


def test_one_run_each_in_a_fresh_pool() -> None:
    """Sequences that come and grow in turn, a token at a time, with hints of what they need when they come."""
    pool = PagePool(64, 4)
    lengths = [40, 17, 64, 33, 90]
    tables = [opened(pool, [i] * 3) for i in range(5)]
    for step in range(120):
        for i, (table, length) in enumerate(zip(tables, lengths)):
            n = step - 5 * i
            assert not 3 <= n <= length or pool.grow(table, n, hint=length if n == 3 else 0)
        pool.check()
    for i, (table, length) in enumerate(zip(tables, lengths)):
        assert pool.runs(table, 0, length) == [(table.pages[0] * 4, length)]
        pool.release(table, [i] * length, 0)
    assert not pool._space[:-1].any()  # no promise outlives its table


def test_who_outgrows_a_hint_leaves_the_others_theirs() -> None:
    pool = PagePool(32, 2)
    short, long = opened(pool, [1]), opened(pool, [2])
    assert pool.grow(short, 1, hint=8) and pool.grow(long, 1, hint=16)
    assert pool.grow(short, 12) and pool.grow(long, 16)
    assert [len(pool.runs(short, 0, 12)), len(pool.runs(long, 0, 16))] == [2, 1]


def test_second_half_of_a_promise() -> None:
    """Rather than a gap that is shorter; and of as many pages as are needed now."""
    pool = PagePool(16, 1)
    first, second = opened(pool, [1]), opened(pool, [2])
    assert pool.grow(first, 1, hint=14) and pool.grow(second, 1, hint=8) and pool.grow(second, 6)
    assert second.pages == list(range(8, 14))
    pool = PagePool(16, 1)
    first, second = opened(pool, [1]), opened(pool, [2])
    assert pool.grow(first, 1, hint=16) and pool.grow(second, 12)
    assert len(pool.runs(second, 0, 12)) == 1


def test_few_runs_where_hints_are_too_large() -> None:
    """Each may need the whole pool: they share the room by halves instead of going page by page."""
    pool = PagePool(64, 4)
    tables = [opened(pool, [i]) for i in range(4)]
    for n in range(1, 61):
        for table in tables:
            assert pool.grow(table, n, hint=256)
    assert [len(pool.runs(t, 0, 60)) for t in tables] == [1, 1, 1, 1]


def test_the_smallest_gap_with_room() -> None:
    pool = PagePool(12, 1)
    tables = [opened(pool, [i]) for i in range(5)]
    for table, n in zip(tables, (3, 1, 2, 1, 5)):
        assert pool.grow(table, n)
    pool.release(tables[0], [0] * 3, 0)
    pool.release(tables[2], [0] * 2, 0)  # free: 0..2, 4..5
    for need, hint, expected in ((1, 2, [4]), (2, 5, [0, 1]), (2, 2, [2, 5])):
        table = opened(pool, [9])
        assert pool.grow(table, need, hint=hint) and sorted(table.pages) == expected
        pool.check()
    assert not pool.grow(table, 3)


def test_few_runs_where_all_is_cached() -> None:
    """A sequence that lives on evicted pages gets several at once."""
    pool = PagePool(64, 4)
    for i in range(4):
        done(pool, [i] * 64)
    assert pool.stats()["cached"] == 64
    table = opened(pool, [9])
    for n in range(1, 129):
        assert pool.grow(table, n, hint=128)
    assert len(pool.runs(table, 0, 128)) <= 6
    assert pool.stats()["evictions"] <= 32 + AHEAD


def test_hints_change_nothing_else() -> None:
    """A promise is no claim: others get the pages where there are no more."""
    pool = PagePool(8, 2)
    greedy, other = opened(pool, [1]), opened(pool, [2])
    assert pool.grow(greedy, 1, hint=16) and pool.grow(other, 14) and not pool.grow(greedy, 3)
    pool.check()
    pool.release(other, [2] * 14, 0)
    assert pool.grow(greedy, 16)
    pool.check()


# ---------------------------------------------------------------- speed


def test_speed() -> None:
    """With ten thousand pages, most of them cached: 64 pages in far less time than the step they are for. The limits are
    ten times what was measured."""
    pool, rng = PagePool(10_000, 32), random.Random(0)
    prompts = [[1, 2, 3] + [rng.randrange(50_000) for _ in range(64 * 32 - 3)] for _ in range(150)]
    for ids in prompts:
        table = opened(pool, ids)
        assert pool.grow(table, len(ids))
        pool.release(table, ids, len(ids))
    assert pool.stats()["cached"] > 9_000
    best = dict.fromkeys(("open", "grow", "commit", "nothing", "release"), 1.0)

    def timed(name: str, call: Callable[[], object], n: int = 1) -> None:
        start = time.perf_counter()
        for _ in range(n):
            call()
        best[name] = min(best[name], (time.perf_counter() - start) / n)

    for ids in prompts[:20]:
        tables: list[Table] = []
        timed("open", lambda: tables.append(opened(pool, ids)))  # noqa: B023
        pool.release(tables.pop(), ids, 0)
        table = opened(pool, ids)
        timed("grow", lambda: pool.grow(table, len(ids)))  # noqa: B023
        timed("commit", lambda: pool.commit(table, ids, len(ids)))  # noqa: B023
        timed("nothing", lambda: pool.commit(table, ids, len(ids)), 100)  # noqa: B023
        timed("release", lambda: pool.release(table, ids, len(ids)))  # noqa: B023
    print({k: f"{v * 1e6:.1f} us" for k, v in best.items()})
    assert best.pop("nothing") < 5e-6 and max(best.values()) < 1e-3
