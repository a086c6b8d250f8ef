"""Print as JSON what the NMS kernels compile to for NVIDIA GPUs, without a GPU."""

import json

import torch
from compile_kernels import ARITHMETIC, Launch, counts, recorded

from gndet.ops import nms_kernels


def launches(num: int) -> list[Launch]:
    """Return the launches of NMS among num boxes of each of two images."""
    boxes, groups = torch.empty(2, num, 4, device="meta"), torch.empty(2, num, dtype=torch.int64, device="meta")
    with recorded() as seen:
        nms_kernels.keep_boxes(boxes, groups, torch.empty(2, num, device="meta").bool(), 0.7)
    return seen


overlap = launches(2000)[0]
walks = [launches(num)[1] for num in (32, 2000, 16_000)]  # 1, 64 and 512 words
print(
    json.dumps(
        {
            f"{launch.kernel.__name__} {launch.options['words']} sm_{capability}": counts(
                launch, capability, ARITHMETIC
            )
            for capability in (80, 90, 100)
            for launch in (overlap, *walks)
        }
    )
)
