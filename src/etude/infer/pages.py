"""Which pages of the key-value cache belong to whom (PagedAttention, Kwon et al. 2023), and which hold beginnings that a
new sequence can share (RadixAttention, Zheng et al. 2024).

A page holds `page_size` consecutive positions of a sequence, in all layers; slot = page * page_size + offset. Every page is
free, cached (its contents are valid and nobody holds it) or used (held by tables, or by a copy that is under way). The
prefix cache is a tree: a node is a page's tokens behind those of its parents. Its key is thus the whole beginning, and
Python's dictionaries compare keys: no collision of hashes can give another's contents. A page is in the tree only when it
is full, or when the table that wrote it was released: nobody writes to a page that others see."""

import dataclasses
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import numpy as np

AHEAD = 8  # pages evicted at once, at most, where a table will need them: one by one they would rarely be adjacent


@dataclasses.dataclass(frozen=True)
class Copy:
    """The first `count` positions of page `source` belong into page `target`."""

    source: int
    target: int
    count: int


class _Node:
    """A page's tokens behind a chain of full pages. `page` is None where their contents were evicted, or are a table's
    own, while others below are used. `order` has the tokens of all children that have a page, sorted; none of them is the
    beginning of another."""

    __slots__ = ("parent", "tokens", "page", "children", "order", "tables")

    def __init__(self, parent: "_Node | None", tokens: tuple[Any, ...]):
        self.parent, self.tokens = parent, tokens
        self.page: int | None = None
        self.children: dict[tuple[Any, ...], _Node] = {}
        self.order: list[tuple[Any, ...]] = []
        self.tables = 0  # whose full pages end here


class Table:
    """What one sequence holds: its pages in order of position, -1 where one behind a sliding window was given back; the
    first `tokens` positions have valid contents."""

    __slots__ = ("pages", "tokens", "_number", "_full", "_end", "_shared", "_copy", "_trimmed", "_want", "_promise")

    def __init__(self, number: int):
        self.pages: list[int] = []
        self.tokens = 0
        self._number = number
        self._full = 0  # pages whose contents are complete; -1: released
        self._end: _Node | None = None  # of the last of them; None: nothing of this table is cached
        self._shared = 0  # pages that came from the cache
        self._copy: Copy | None = None  # under way
        self._trimmed = 0  # pages given back
        self._want = 0  # pages that it may need in the end
        self._promise = (0, 0)  # free pages, from .. to, that others take only if there are no better ones


class PagePool:
    """`n_pages` pages of `page_size` positions. Without `prefix_cache` nothing is shared or kept. Raises ValueError for
    tables that were released, and for values that cannot be."""

    def __init__(self, n_pages: int, page_size: int, prefix_cache: bool = True):
        if n_pages < 1 or page_size < 1:
            raise ValueError(f"n_pages={n_pages} and page_size={page_size} should be at least 1")
        self.n_pages, self.page_size, self.prefix_cache = n_pages, page_size, prefix_cache
        # -1: not free; 0: free; else free and promised to the table of that number. The last one ends every run.
        self._space = np.zeros(n_pages + 1, dtype=np.int64)
        self._space[-1] = -1
        self._n_free = n_pages
        self._refs = [0] * n_pages  # tables and copies that hold a page
        self._nodes: list[_Node | None] = [None] * n_pages
        self._lru: OrderedDict[int, None] = OrderedDict()  # cached pages, the next to go first
        self._roots: dict[tuple[Any, ...], _Node] = {}  # by salt
        self._tables: dict[int, Table] = {}
        self._copies: dict[Copy, Table] = {}
        self._number = self._hit_tokens = self._queried_tokens = self._evictions = 0

    # ------------------------------------------------------------ a table's life

    def open(self, ids: list[int], *, salt: Hashable = None) -> tuple[Table, Copy | None]:
        """A table with the longest cached beginning of `ids` but the last token, whose logits are wanted. Full pages are
        shared. Of the next page, what agrees with a cached one is to be copied: both pages are held until `copied`, so
        that several copies may be made in any order, or at once. There is none where that would leave too few pages for
        `ids`. Only equal salts share."""
        self._number += 1
        table = self._tables[self._number] = Table(self._number)
        self._queried_tokens += len(ids)
        if not self.prefix_cache:
            return table, None
        size = self.page_size
        node = self._roots.get((salt,))
        if node is None:
            node = self._roots[(salt,)] = _Node(None, (salt,))
        tokens = tuple(ids[:-1])
        for at in range(0, len(tokens) - size + 1, size):
            child = node.children.get(tokens[at : at + size])
            if child is None or child.page is None:
                break
            node = child
            self._hold(child.page)
            table.pages.append(child.page)
        node.tables += 1
        table._end = node
        table._full = table._shared = full = len(table.pages)
        table.tokens = full * size
        table._want = -(-len(ids) // size)
        table._copy = copy = self._copy(table, node, tokens[full * size : (full + 1) * size])
        if copy is not None:
            table.tokens += copy.count
        self._hit_tokens += table.tokens
        return table, copy

    def _copy(self, table: Table, node: _Node, tokens: tuple[Any, ...]) -> Copy | None:
        """From the child that has most of the tokens in common: sorted, it stands next to them."""
        at = bisect_left(node.order, tokens)
        count, best = max(((_common(o, tokens), o) for o in node.order[max(0, at - 1) : at + 1]), default=(0, ()))
        source = node.children[best].page if count else None
        if source is None:
            return None
        room = self._n_free + len(self._lru) - (self._refs[source] == 0)
        if room < table._want - len(table.pages):
            return None
        self._hold(source)
        self._extend(table, 1)
        copy = Copy(source, table.pages[-1], count)
        self._refs[copy.target] += 1
        self._copies[copy] = table
        return copy

    def copied(self, copy: Copy) -> None:
        """The copy that `open` asked for was made, or will never be."""
        table = self._copies.pop(copy, None)
        if table is None:
            raise ValueError(f"{copy} is not under way")
        table._copy = None
        for page in (copy.source, copy.target):
            node = self._nodes[page]
            chain = _chain(node)
            self._give_back([-1] * (len(chain) - 1) + [page], chain)

    def grow(self, table: Table, length: int, *, hint: int = 0) -> bool:
        """Give the table pages for positions 0..length-1. False, and nothing changed, if there are too few that are free or
        cached. A table goes on with adjacent pages where it can; where it starts it looks for room for `hint` positions,
        as many as it may have in the end."""
        self._check_open(table)
        need = -(-length // self.page_size) - len(table.pages)
        if need > self._n_free + len(self._lru):
            return False
        table._want = max(table._want, -(-hint // self.page_size))
        if need > 0:
            self._extend(table, need)
        return True

    def commit(self, table: Table, ids: list[int], computed: int) -> None:
        """The first `computed` positions hold the contents for ids[:computed]: pages that are full by now can be shared."""
        full = computed // self.page_size
        if full != table._full:
            self._commit(table, ids, full)
        table.tokens = computed

    def _commit(self, table: Table, ids: list[int], full: int) -> None:
        self._check_open(table)
        if not table._full <= full <= min(len(table.pages), len(ids) // self.page_size):
            raise ValueError(
                f"{full} pages cannot be full: {table._full} are, of {len(table.pages)}, and there are {len(ids)} tokens"
            )
        if table._end is not None:
            end = table._end
            tokens = tuple(ids[table._full * self.page_size : full * self.page_size])
            for i in range(table._full, full):
                at = (i - table._full) * self.page_size
                end = self._index(end, tokens[at : at + self.page_size], table.pages[i])
            table._end.tables -= 1  # it stays: it has a child
            end.tables += 1
            table._end = end
        table._full = full

    def trim(self, table: Table, position: int) -> None:
        """Give back the pages that lie wholly before `position`, which no query will see any more."""
        self._check_open(table)
        if position > table.tokens:
            raise ValueError(f"position {position} lies behind the {table.tokens} that are computed")
        first, end = table._trimmed, min(position // self.page_size, len(table.pages))
        if first < end:
            pages = [-1] * first + table.pages[first:end]
            table.pages[first:end] = [-1] * (end - first)
            table._trimmed = end
            self._give_back(pages, _chain(table._end))

    def release(self, table: Table, ids: list[int], computed: int) -> None:
        """End the table. What it computed stays cached as long as there is room, a partly filled last page as well. If
        `computed` is less than `table.tokens`, the pages behind it leave the prefix cache: what they hold is not to be
        trusted. The same goes for a copy that was never said to be made."""
        self._check_open(table)
        size = self.page_size
        if table._copy is not None:
            computed = min(computed, table._shared * size)
        if not 0 <= computed <= min(len(table.pages) * size, len(ids)):
            raise ValueError(f"computed={computed}, with {len(table.pages)} pages and {len(ids)} tokens")
        full = computed // size
        if full > table._full:
            self._commit(table, ids, full)
        chain = _chain(table._end)
        for node, page in zip(chain[full:], table.pages[full:]):
            if node.page == page:
                self._drop(node)
        del chain[full:]
        for node, page in zip(chain, table.pages):
            if node.page is None:  # evicted while this table had its own
                if page < 0 or node.parent is None:
                    break
                self._index(node.parent, node.tokens, page)
        if table._end is not None:
            rest = tuple(ids[full * size : computed])
            if rest and full == table._full:
                parent = chain[-1] if chain else table._end
                chain.append(self._index(parent, rest, table.pages[full]))
        self._give_back(table.pages, chain)
        if table._end is not None:
            table._end.tables -= 1
            self._prune(table._end)
        self._promise(table, 0, 0)
        del self._tables[table._number]
        table.pages, table.tokens, table._full, table._end = [], 0, -1, None

    def forget(self) -> None:
        """Drop the prefix cache, because the weights changed. What tables that are open now hold is never cached."""
        self._space[list(self._lru)] = 0
        self._n_free += len(self._lru)
        self._lru.clear()
        self._roots.clear()
        self._nodes = [None] * self.n_pages
        for table in self._tables.values():
            table._end = None

    # ------------------------------------------------------------ questions

    @property
    def room(self) -> int:
        """Pages that are free or could be."""
        return self._n_free + len(self._lru)

    def fits(self, length: int) -> bool:
        """Whether a sequence of that length can ever have its pages."""
        return length <= self.n_pages * self.page_size

    def runs(self, table: Table, start: int, length: int) -> list[tuple[int, int]]:
        """(first slot, number of positions) of each run of adjacent slots that holds positions start..start+length-1."""
        size, pages = self.page_size, table.pages
        first, last = start // size, (start + length - 1) // size
        if not 0 <= start < start + length <= len(pages) * size or pages[first] < 0:
            raise ValueError(f"the table does not have positions {start}..{start + length - 1}")
        found, begin = [], start
        for i in range(first, last):
            if pages[i + 1] != pages[i] + 1:
                end = (i + 1) * size
                found.append((pages[begin // size] * size + begin % size, end - begin))
                begin = end
        found.append((pages[begin // size] * size + begin % size, start + length - begin))
        return found

    def stats(self) -> dict[str, int]:
        """Pages by state now; since the beginning, tokens that were asked for and found cached, and pages evicted."""
        return {
            "pages": self.n_pages,
            "free": self._n_free,
            "cached": len(self._lru),
            "used": self.n_pages - self._n_free - len(self._lru),
            "hit_tokens": self._hit_tokens,
            "queried_tokens": self._queried_tokens,
            "evictions": self._evictions,
        }

    # ------------------------------------------------------------ pages

    def _check_open(self, table: Table) -> None:
        if self._tables.get(table._number) is not table:
            raise ValueError("this table was released, or is another pool's")

    def _hold(self, page: int) -> None:
        if not self._refs[page]:
            del self._lru[page]
        self._refs[page] += 1

    def _free(self, page: int) -> None:
        self._space[page] = 0
        self._n_free += 1

    def _give_back(self, pages: list[int], chain: list[_Node]) -> None:
        """Drop one reference to each of a sequence's first pages (-1: none is held). `chain`: their nodes, as far as there
        are any. Those that nobody holds any more are cached if the cache has all that comes before them, too; the end of
        the chain is to be evicted first."""
        whole = next((i for i, node in enumerate(chain) if node.page is None), len(chain))
        for i, page in enumerate(pages):
            if page < 0:
                continue
            self._refs[page] -= 1
            if not self._refs[page]:
                node = self._nodes[page]
                if node is None:
                    self._free(page)
                elif i >= whole:
                    self._uncache(node)
        for node in reversed(chain[:whole]):
            if node.page is not None and not self._refs[node.page]:
                self._lru[node.page] = None
                self._lru.move_to_end(node.page)

    def _extend(self, table: Table, need: int) -> None:
        """Give a table that many more pages, of those that are free or cached."""
        room = max(need, table._want - len(table.pages))
        if self._n_free < need:
            while self._n_free < min(room, need + AHEAD) and self._lru:
                self._evict()
        while need:
            start = table.pages[-1] + 1 if table.pages else self.n_pages
            ahead = self._space[start : start + room]
            taken = (ahead < 0).nonzero()[0]  # what others were promised lies behind pages that they have
            length = int(taken[0]) if len(taken) else len(ahead)
            if not length:
                start, length = self._gap(need, room)
            n = min(length, need)
            self._space[start : start + n] = -1
            self._refs[start : start + n] = [1] * n
            self._n_free -= n
            table.pages.extend(range(start, start + n))
            self._promise(table, start + n, start + min(length, room))
            need -= n
            room -= n

    def _promise(self, table: Table, start: int, end: int) -> None:
        """Free pages start..end-1 are the table's to grow into, instead of those before."""
        before = self._space[slice(*table._promise)]
        before[before == table._number] = 0
        self._space[start:end] = table._number
        table._promise = (start, end)

    def _gap(self, need: int, room: int) -> tuple[int, int]:
        """(first page, length) of a run of free pages: the shortest one with room that is promised to nobody, else the
        longest such, or the second half of the longest one that is promised, whichever is longer."""
        starts, lengths = _runs(self._space == 0)
        if len(starts):
            fitting = np.where(lengths >= room, lengths, self.n_pages + 1)
            best = int(fitting.argmin() if lengths.max() >= room else lengths.argmax())
            if lengths[best] >= room:
                return int(starts[best]), int(lengths[best])
        all_starts, all_lengths = _runs(self._space >= 0)
        longest = int(all_lengths.argmax())
        start, length = int(all_starts[longest]), int(all_lengths[longest])
        skip = min(length // 2, max(length - need, 0))
        if len(starts) and lengths[best] >= length - skip:
            return int(starts[best]), int(lengths[best])
        return start + skip, length - skip

    # ------------------------------------------------------------ the prefix cache

    def _index(self, parent: _Node, tokens: tuple[Any, ...], page: int) -> _Node:
        """Put a page that has these tokens into the tree, unless one there has them, and maybe more behind them; -> the node
        of that one. A page with fewer of them is not needed any more."""
        order = parent.order
        at = bisect_left(order, tokens)
        if at < len(order) and order[at][: len(tokens)] == tokens:
            return parent.children[order[at]]
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = _Node(parent, tokens)
        if at and tokens[: len(order[at - 1])] == order[at - 1]:
            self._uncache(parent.children[order[at - 1]])
            at -= 1
        order.insert(at, tokens)
        node.page = page
        self._nodes[page] = node
        return node

    def _uncache(self, node: _Node) -> None:
        """Take a node's page out of the tree; it becomes free if nobody holds it."""
        page, parent = node.page, node.parent
        assert page is not None and parent is not None
        node.page = self._nodes[page] = None
        del parent.order[bisect_left(parent.order, node.tokens)]
        self._prune(node)
        if not self._refs[page]:
            self._lru.pop(page, None)
            self._free(page)

    def _prune(self, node: _Node) -> None:
        """Remove a node that nothing needs any more, and those above it likewise."""
        while node.page is None and not node.children and not node.tables:
            if node.parent is None:
                del self._roots[node.tokens]
                return
            del node.parent.children[node.tokens]
            node = node.parent

    def _drop(self, node: _Node) -> int:
        """Take a node's page out of the tree, and those below that nobody holds: they cannot be found any more. -> how
        many."""
        if not node.children:
            self._uncache(node)
            return 1
        below, n = [node], 0
        while below:
            one = below.pop()
            below.extend(one.children.values())
            if one.page is not None and (one is node or not self._refs[one.page]):
                self._uncache(one)
                n += 1
        return n

    def _evict(self) -> None:
        node = self._nodes[next(iter(self._lru))]
        assert node is not None
        self._evictions += self._drop(node)

    # ------------------------------------------------------------ for tests

    def check(self) -> None:
        """Assert all that should always hold."""
        refs = [0] * self.n_pages
        for table in self._tables.values():
            for page in table.pages:
                if page >= 0:
                    refs[page] += 1
        for copy in self._copies:
            refs[copy.source] += 1
            refs[copy.target] += 1
        assert refs == self._refs, "references"
        free = {int(p) for p in np.flatnonzero(self._space[:-1] >= 0)}
        used = {p for p in range(self.n_pages) if refs[p]}
        assert self._space[-1] == -1 and self._n_free == len(free)
        assert len(free) + len(self._lru) + len(used) == self.n_pages, "a page is in two states, or in none"
        assert free | set(self._lru) | used == set(range(self.n_pages))
        for p in np.flatnonzero(self._space > 0):
            start, end = self._tables[int(self._space[p])]._promise
            assert start <= p < end, "a promise to nobody"
        self._check_tree()
        for number, table in self._tables.items():
            assert table._number == number and (table._copy is None or self._copies[table._copy] is table)
            self._check_table(table)

    def _check_tree(self) -> None:
        ends = [t._end for t in self._tables.values()]
        found: dict[int, _Node] = {}
        below = [(root, True) for root in self._roots.values()]
        while below:
            node, whole = below.pop()
            assert node.page is not None or node.children or node.tables, "a node that nothing needs"
            assert node.tables == sum(end is node for end in ends)
            assert node.order == sorted(t for t, c in node.children.items() if c.page is not None)
            assert not any(b[: len(a)] == a for a, b in zip(node.order, node.order[1:])), "a page has less than another"
            for tokens, child in node.children.items():
                assert child.parent is node and child.tokens == tokens and 0 < len(tokens) <= self.page_size
                assert len(tokens) == self.page_size or not (child.children or child.tables)
                if child.page is not None:
                    assert self._nodes[child.page] is child and child.page not in found
                    found[child.page] = child
                    assert whole or self._refs[child.page], "a cached page that nobody can find"
                below.append((child, whole and child.page is not None))
        assert {p for p in range(self.n_pages) if self._nodes[p] is not None} == set(found)
        assert set(self._lru) == {p for p in found if not self._refs[p]}, "the LRU order has exactly the cached pages"

    def _check_table(self, table: Table) -> None:
        held = [p for p in table.pages if p >= 0]
        assert len(set(held)) == len(held) and -1 not in table.pages[table._trimmed :]
        assert table._full == table.tokens // self.page_size <= len(table.pages)
        for page in table.pages[table._full :]:
            copying = table._copy is not None and page == table._copy.target
            assert page < 0 or self._refs[page] == 1 + copying, "a table will write to a page that others hold"
            assert page < 0 or self._nodes[page] is None, "a table will write to a page that others may find"
        if table._end is None:
            return
        chain = _chain(table._end)
        assert len(chain) == table._full
        for node, page in zip(chain, table.pages):
            assert page < 0 or self._nodes[page] in (node, None)


def _chain(node: _Node | None) -> list[_Node]:
    """A node and its parents but for the root, from the beginning on."""
    chain = []
    while node is not None and node.parent is not None:
        chain.append(node)
        node = node.parent
    return chain[::-1]


def _common(a: tuple, b: tuple) -> int:
    """How many tokens two beginnings have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _runs(free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of the runs of True in an array that ends with False."""
    edges = np.flatnonzero(free != np.roll(free, 1))
    return edges[::2], edges[1::2] - edges[::2]
