"""Stateless randomness: numbers as a function of a key, the same on CPU and GPU, in any order and in any process.

An image's key is `hash_ints(seed, epoch, image_id)`.  Everything random about that image (augmentation, sampling of
anchors and regions) comes from `uniform(key, stream)` or `ranks(keys, stream, ids)`, never from a generator.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # reading a data set does not import torch
    from torch import Tensor

_MASK32 = 0xFFFFFFFF


class Stream(IntEnum):
    """What a number is drawn for, so that two uses of one key stay independent."""

    ORDER = 1
    RESIZE = 2
    FLIP = 3
    FLIP_VERTICAL = 4
    ANCHORS = 5
    REGIONS = 6
    DRAW = 7


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


def _mix(x: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int64 (MurmurHash3; overflow keeps the low bits right)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def ranks(keys: Tensor, stream: Stream, ids: Tensor) -> Tensor:
    """Draw an integer in [0, 2**59) for each candidate: a uniformly random order without ties within an image.

    keys (B,) int64; ids (N,) or (B, N) int64 in [0, 2**31) identify each candidate independently of the canvas.
    Returns (B, N) int64: a function of the image's key, the stream and the candidate's id alone.
    """
    low, high = (keys & _MASK32)[:, None], ((keys >> 32) & _MASK32)[:, None]  # (B, 1)
    value = _mix((ids * 0x9E3779B1 + int(stream)) & _MASK32)  # (N,) or (B, N)
    value = _mix(_mix(value ^ low) ^ high)  # (B, N)
    return (value >> 4 << 31) | ids
