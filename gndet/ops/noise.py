"""Stateless randomness: numbers as a function of a key, the same on CPU and GPU, in any order and in any process.

An image's key is `hash_ints(seed, epoch, image_id)`.  Everything random about that image (augmentation, sampling of
anchors and regions) comes from `uniform(key, stream)` or `matching.ranks(keys, stream, ids)`, never from a generator.
"""

from enum import IntEnum


class Stream(IntEnum):
    """What a number is drawn for, so that two uses of one key stay independent."""

    ORDER = 1
    RESIZE = 2
    FLIP = 3
    FLIP_VERTICAL = 4
    ANCHORS = 5
    REGIONS = 6
    DRAW = 7
    CROP = 8
    COLOR = 9
    DROPOUT = 10
    DEPTH = 11
    PARTNER = 12
    MIX = 13
    AUGMENT = 14


def hash_ints(*values: int) -> int:
    """Hash integers to an integer in [0, 2**63), by chained SplitMix64 finalizers (Steele et al. 2014)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 31)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    return (state ^ (state >> 27)) >> 1


def uniform(*values: int) -> float:
    """Return a number in [0, 1) that is a function of the integers."""
    return hash_ints(*values) / 2**63
