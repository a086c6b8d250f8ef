"""Lines for the log about how a GPU computes: kernels that do not work there, and TF32."""

import torch

from gndet.modeling.norms.triton_kernels import trouble as norm_trouble
from gndet.ops.matching_kernels import trouble as match_trouble
from gndet.ops.nms_kernels import trouble as nms_trouble
from gndet.ops.roi_align_kernels import trouble as roi_align_trouble


def slower_operators(device: torch.device) -> list[str]:
    """Return a line to log for each kind of kernel that does not work on a GPU, so that torch's operators run."""
    if device.type == "cpu":
        return []
    kernels = {
        "group norm": norm_trouble,
        "NMS, which makes the GPU wait": nms_trouble,
        "RoIAlign, whose gradient differs from run to run": roi_align_trouble,
        "matching": match_trouble,
    }
    wrong = {what: trouble(device) for what, trouble in kernels.items()}
    words = "by torch's own operators: the kernels do not work on this GPU"
    return [f"{what} {words} ({reason})" for what, reason in wrong.items() if reason]


def tf32(precision: str, device: torch.device) -> list[str]:
    """Return a line to log if train.precision is float32 but torch rounds the inputs of convolutions to TF32."""
    if precision != "float32" or device.type == "cpu" or not torch.backends.cudnn.allow_tf32:
        return []
    return ["float32: convolutions use TF32 if the GPU has it, torch's default, unless NVIDIA_TF32_OVERRIDE=0 is set"]
