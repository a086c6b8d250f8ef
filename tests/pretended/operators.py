"""What is known about an operator before it runs: its tensors, its place in gndet, its number of launches."""

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

FREE = (  # operators that start no kernel, besides views
    "aten::empty", "aten::new_empty", "aten::detach", "aten::alias", "aten::lift", "aten::_unsafe_view", "aten::set_",
    "aten::is_", "aten::resize_", "aten::_local_scalar_dense", "prim::",
)  # fmt: skip
# ATen's MultiTensorApply.cuh: tensors in a launch by number of lists, blocks in a launch, numbers in a block
MULTI_TENSORS, MULTI_BLOCKS, MULTI_CHUNK = (110, 64, 48, 36, 30), 320, 65536


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments, also those in lists, tuples and dicts."""
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, list | tuple | dict):
        for argument in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from tensors_in(argument)


def is_device(argument: object) -> bool:
    """Return whether an argument names a device."""
    return isinstance(argument, torch.device) or (isinstance(argument, str) and argument in ("cpu", "cuda", "cuda:0"))


def own_kernel(func: Any) -> Callable[..., Any] | None:
    """Return what an operator that gndet defines runs on a GPU, or None for another operator."""
    defined = torch._library.custom_ops.OPDEFS.get(func._schema.name)
    return defined and (defined._backend_fns.get("cuda") or defined._backend_fns.get(None))


def num_launches(func: Any, args: Any) -> int:
    """Return how many kernels an operator starts: mostly one, but for lists of many or large tensors more."""
    name = func._schema.name
    if func.is_view or name.startswith(FREE):
        return 0
    lists = [part for part in args if isinstance(part, list | tuple) and part and isinstance(part[0], Tensor)]
    if not lists or not ("_foreach_" in name or "_fused_" in name):
        return 1
    blocks = sum(-(-tensor.numel() // MULTI_CHUNK) for tensor in lists[0])
    most = MULTI_TENSORS[min(len(lists), len(MULTI_TENSORS)) - 1]
    return max(-(-len(lists[0]) // most), -(-blocks // MULTI_BLOCKS))


def gndet_frames() -> Iterator[FrameType]:
    """Yield the frames of gndet's functions on the stack, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("gndet."):
            yield frame
        frame = frame.f_back


def functions() -> tuple[str, ...]:
    """Return gndet's functions on the stack, innermost first, like "training.update.to_device"."""
    return tuple(f"{frame.f_globals['__name__'][6:]}.{frame.f_code.co_name}" for frame in gndet_frames())


def place() -> str:
    """Return the innermost line of gndet on the stack, like "training/update.py:218 to_device"."""
    frame = next(gndet_frames(), None)
    if frame is None:
        return "?"
    return f"{frame.f_code.co_filename.rpartition('/gndet/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
