"""Best-fit decreasing: documents into samples of a fixed length with hardly any room left over."""

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put items of `lengths` (each from 1 to `capacity`) into bins: the longest first, each into the fullest bin that has
    room for it (Johnson 1973). -> (items in the order of their bins, where each bin's items end in that order).

    Bins are kept by the room they have left, and which rooms occur is one long integer, whose lowest set bit at or above
    a length is the best fit. So the time is that of sorting and of n operations on `capacity` bits."""
    order = np.argsort(-lengths, kind="stable")
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r: a bin with room r
    for item, length in zip(order.tolist(), lengths[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            at = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            bins[at].append(item)
        else:
            room, at = capacity, len(bins)
            bins.append([item])
        left = room - length
        by_room[left].append(at)
        rooms |= 1 << left
    items = np.array([i for b in bins for i in b], dtype=np.int64)
    return items, np.cumsum([len(b) for b in bins], dtype=np.int64)
