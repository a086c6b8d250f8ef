"""Print as JSON what the RoIAlign kernels compile to for NVIDIA GPUs, without a GPU; `quick`: for one size of bins."""

import json
import sys

import torch
import triton.language as tl
from compile_kernels import Launch, counts, recorded

from gndet.ops import roi_align_kernels as kernels

CHANNELS, STRIDES = 256, (4, 8, 16, 32)
TYPES = {
    "bf16": (torch.bfloat16, tl.bfloat16), "fp16": (torch.float16, tl.float16), "fp32": (torch.float32, tl.float32),
    "fp64": (torch.float64, tl.float64),
}  # fmt: skip
PATTERNS = {
    "16-byte loads": r"ld\.global(?:\.\w+)*\.v4\.b32|ld\.global(?:\.\w+)*\.v2\.b64",
    "16-byte stores": r"st\.global(?:\.\w+)*\.v4\.b32|st\.global(?:\.\w+)*\.v2\.b64",
    "16-byte copies": r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (?:0x)?(?:10|16)",
    "tensor core": r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)",
    "atomics": r"\b(?:atom|red)\.",
}


def launches(name: str, size: int, ratio: int) -> list[Launch]:
    """Return the launches of a head that pools from four levels of padded pictures, and of its gradient."""
    dtype, operand = TYPES[name]
    boxes, limits = torch.empty(64, 4, device="meta"), torch.empty(2, 4, 2, dtype=torch.int64, device="meta")
    places = boxes, *(torch.empty(64, dtype=torch.int64, device="meta") for _ in range(2)), limits
    maps = [torch.empty(2, CHANNELS, 512 // s, 768 // s, dtype=dtype, device="meta") for s in STRIDES]
    with recorded() as seen:
        pooled = kernels.pool(maps, *places, STRIDES, size, ratio, True)
        sides = 2, [x.shape[2] for x in maps], [x.shape[3] for x in maps]
        kernels.gradients(pooled, *places, *sides, STRIDES, ratio, True)
    for launch in seen:
        if "operand" in launch.options:
            launch.options["operand"] = operand  # as on a GPU; the interpreter multiplies float32
    return seen


def main(quick: bool) -> None:
    """Print the counts of every kernel, type and GPU."""
    found = {}
    for capability in (80, 90, 100):
        for name in TYPES:
            for size, ratio in ((7, 2),) if quick else ((7, 2), (14, 2), (7, 0)):
                for launch in launches(name, size, ratio):
                    key = f"{launch.kernel.__name__} {name} P={size} ratio={ratio} sm_{capability}"
                    found[key] = counts(launch, capability, PATTERNS)
    print(json.dumps(found))


if __name__ == "__main__":
    main("quick" in sys.argv)
