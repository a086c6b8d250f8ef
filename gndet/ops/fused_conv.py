"""A convolution on a CPU with its bias, a residual and ReLU in one pass over the map, for prediction.

oneDNN applies what follows a convolution while the results are in registers; torch's compiler calls the same operator.
It has no gradient.  Letters: n samples, C input and K output channels, (H, W) maps.
"""

import torch
from torch import Tensor

SLOPE = 1e-20  # of ReLU below zero: with a slope of exactly 0, oneDNN's ReLU turns NaN into 0, which would hide a fault


def usable(x: Tensor) -> bool:
    """Return whether x can be convolved this way: no gradient is wanted, and the CPU computes x's type."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, *, relu: bool,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Convolve x (n, C, H, W) with weight (K, C, kh, kw) and bias (K,); add residual, like the result; then ReLU."""
    sides = [padding, padding], [stride, stride], [1, 1], 1
    fused = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        after, values = ("leaky_relu", [SLOPE]) if relu else ("none", [])
        return fused(x, weight, bias, *sides, after, values, "")
    y = fused.binary(x, residual, weight, bias, *sides, "add", 1.0, None, [], "")  # its own ReLU hides NaN, too
    return y.relu_() if relu else y
