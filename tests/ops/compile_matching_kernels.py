"""Print as JSON what the matching kernels compile to for NVIDIA GPUs, without a GPU."""

import json

import torch
from compile_kernels import ARITHMETIC, Launch, counts, recorded, specialized

from gndet.ops import matching_kernels

PATTERNS = ARITHMETIC | {"minima without NaN": r"\b(?:min|max)\.f32"}


def launches(images: int = 2, num: int = 1000, slots: int = 8) -> list[Launch]:
    """Return the launches of a training step: of the RPN, whose candidates all images share, and of a box head."""
    objects, gt_valid = torch.empty(images, slots, 4, device="meta"), torch.empty(images, slots, device="meta").bool()
    valid = torch.empty(images, num, device="meta").bool()
    keys, ids = (torch.empty(size, dtype=torch.int64, device="meta") for size in (images, num))
    with recorded() as seen:
        for shared in (True, False):
            candidates = torch.empty(1 if shared else images, num, 4, device="meta")
            matching_kernels.match(objects, gt_valid, candidates, valid, 0.3, 0.7, keep_best=shared)
            matching_kernels.ranks(keys, 5 + (not shared), ids if shared else ids.expand(images, num))
    return seen


def code() -> dict[str, dict[str, int]]:
    """Return counts of instructions, registers and spilled bytes of every kernel."""
    return {
        f"{launch.kernel.__name__} {launch.options.get('keep_best')} sm_{capability}": counts(
            launch, capability, PATTERNS
        )
        for capability in (80, 90, 100)
        for launch in launches()
    }


def kinds() -> list[str]:
    """Return the distinct specializations that batches of many sizes need."""
    sizes = [(1, 1, 1), (2, 16, 16), (3, 1000, 33), (16, 268569, 8)]
    return sorted({f"{a.kernel.__name__} {specialized(a, 90)[2]}" for size in sizes for a in launches(*size)})


print(json.dumps({"code": code(), "kinds": kinds(), "launches": len(launches())}))
