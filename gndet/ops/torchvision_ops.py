"""torchvision's compiled operators, without its package, which takes as long to import as torch."""

import importlib
import sys
from functools import cache
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch
from torch import Tensor

PARTS = ("version", "extension", "_autograd_registrations", "_meta_registrations")  # the third since 0.29


@cache
def operators() -> Any:
    """Return the operators, loaded as torchvision's package does; import the package if that does not work."""
    spec = find_spec("torchvision")
    if "torchvision" not in sys.modules and spec is not None:
        sys.modules["torchvision"] = module_from_spec(spec)  # the package, whose code has not run
        try:
            for part in filter(lambda part: find_spec(f"torchvision.{part}"), PARTS):
                importlib.import_module(f"torchvision.{part}")
        except (ImportError, AttributeError):
            pass
        finally:
            del sys.modules["torchvision"]  # whoever imports it runs its code
    if not hasattr(torch.ops.torchvision, "nms"):
        importlib.import_module("torchvision")
    return torch.ops.torchvision


def transforms() -> Any:
    """Return torchvision.transforms.v2, whose import takes seconds."""
    return importlib.import_module("torchvision.transforms.v2")


def roi_align(x: Tensor, rois: Tensor, size: int, scale: float, ratio: int, *, aligned: bool) -> Tensor:
    """Return torchvision.ops.roi_align of x (B, C, H, W) and rois (R, 5): (R, C, size, size)."""
    if x.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():  # its Python code takes over
        pooled: Tensor = importlib.import_module("torchvision.ops").roi_align(x, rois, size, scale, ratio, aligned)
        return pooled
    return operators().roi_align(x, rois, scale, size, size, ratio, aligned)
