"""Print as JSON what the norm kernels would launch and compile, without a GPU: `launches` or `code`."""

import json
import random
import sys

import torch
from compile_kernels import Launch, compiled, recorded, specialized

from gndet.modeling.norms import triton_kernels as norm_kernels

RESNET = ((64, 2), (64, 4), (256, 4), (128, 8), (512, 8), (256, 16), (1024, 16), (512, 32), (2048, 32), (256, 64))


def launches(size: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16, padded: bool = True) -> list[Launch]:
    """Return the launches of a training step's norm with 32 groups, a residual and ReLU on a map (B, C, H, W)."""
    x = torch.empty(size, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    gamma = torch.empty(size[1], device="meta")
    sizes = torch.empty(size[0], 2, dtype=torch.int64, device="meta") if padded else None
    with recorded() as seen:
        _, mean, rstd = norm_kernels.forward(x, gamma, gamma, 32, 1e-5, sizes, relu=True, residual=x)
        norm_kernels.renormalize(x, gamma, gamma, mean, rstd, sizes, relu=True)
        norm_kernels.backward(x, x, gamma, mean, rstd, sizes, gamma)
    return seen


def grids() -> dict[str, list[tuple[int, ...]]]:
    """Return the grids of large maps and of many small ones."""
    sizes = ((1, 64, 2112, 2112), (2, 64, 8192, 8192), (2, 2048, 256, 256), (100_000, 256, 7, 7), (1, 2048, 13, 21))
    return {str(size): [launch.grid for launch in launches(size)] for size in sizes}


def kinds() -> list[list[str]]:
    """Return the distinct specializations that two multi-scale batches need, and those that 100 need."""
    chance, needed = random.Random(0), []
    for canvases in (
        [(320, 320), (1344, 1344)],
        [(chance.randrange(320, 1345), chance.randrange(320, 1345)) for _ in range(100)],
    ):
        seen = set()
        for height, width in canvases:
            for channels, stride in RESNET:
                size = (chance.choice((1, 2, 3, 16)), channels, -(-height // stride), -(-width // stride))
                seen |= {f"{launch.kernel.__name__} {specialized(launch, 90)[2]}" for launch in launches(size)}
        needed.append(sorted(seen))
    return needed


def code() -> dict[str, object]:
    """Return the facts of every kernel, compiled for an A100, an H100 and a B200."""
    wanted = [
        (256, dtype, padded, capability)
        for capability in (80, 90, 100) for dtype in (torch.bfloat16, torch.float32) for padded in (False, True)
    ]  # fmt: skip
    wanted += [(channels, torch.bfloat16, True, 90) for channels in (64, 2048)]
    return {
        f"{launch.kernel.__name__} {channels} {dtype} padded={padded} sm_{capability}": compiled(
            launch, capability
        )._asdict()
        for channels, dtype, padded, capability in wanted
        for launch in launches((2, channels, 60, 60), dtype, padded)
    }


print(json.dumps(code() if sys.argv[1] == "code" else {"grids": grids(), "kinds": kinds()}))
