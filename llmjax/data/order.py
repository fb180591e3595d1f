"""The order of training as a pure function of (key, index): permutations without memory, mixtures in exact proportion. No files, no tokens."""
import hashlib

import numpy as np

BLOCK = 1024
"""Rows over which a mixture keeps its proportions exactly."""


def make_key(*parts) -> int:
    """64 bits from anything that prints the same everywhere: a seed, a hash, an epoch."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def scramble(x: np.ndarray, key: int) -> np.ndarray:
    """uint64 -> uint64, each bit depending on all (the finaliser of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where each of `index` (in [0, size)) goes in a random permutation of `size` that the key decides: int64. No table: a Feistel network over the next even number of bits,
    walked until it lands inside (Black & Rogaway 2002)."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [make_key(key, round) for round in range(6)]
    x = np.asarray(index, np.uint64).copy()
    walking = np.ones(x.shape, bool)
    while walking.any():
        y = x[walking]
        left, right = y >> half, y & mask
        for k in keys:
            left, right = right, left ^ (scramble(right, k) & mask)
        y = (left << half) | right
        x[walking] = y
        walking[walking] = y >= np.uint64(size)
    return x.astype(np.int64)


def epochs(index: np.ndarray, size: int, *key) -> np.ndarray:
    """The row that stands at each place of an endless sequence of epochs, each a permutation of `size` of its own: int64."""
    index = np.asarray(index, np.int64)
    epoch, place = index // size, index % size
    rows = np.empty_like(place)
    for e in np.unique(epoch):
        rows[epoch == e] = permute(place[epoch == e], size, make_key(*key, int(e)))
    return rows


def proportions(weights) -> np.ndarray:
    """How many of each BLOCK rows are each part's: int64, by largest remainder."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[:BLOCK - int(counts.sum())]] += 1
    return counts


def mix(index: np.ndarray, counts: np.ndarray, *key) -> tuple[np.ndarray, np.ndarray]:
    """Which part each place of an endless mixture belongs to, and the how-manieth of that part it is: two int64 arrays."""
    index = np.asarray(index, np.int64)
    block, place = index // BLOCK, index % BLOCK
    slot = np.empty_like(place)
    for b in np.unique(block):
        slot[block == b] = permute(place[block == b], BLOCK, make_key(*key, "mix", int(b)))
    ends = np.cumsum(counts)
    part = np.searchsorted(ends, slot, "right")
    return part, block * counts[part] + slot - (ends - counts)[part]
