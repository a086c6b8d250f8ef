"""Group normalization as functions: forward, forward again from saved statistics, backward (Wu & He 2018, eq. 1 to 7).

This is the one place to add a faster kernel.  x is (B, C, H, W), channels last; G groups.  Statistics are float32 or
wider.  If an area is given, they are taken over each picture alone, and the result is zero in the padding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gndet.modeling.norms import triton_kernels as norm_kernels
from gndet.modeling.norms.triton_kernels import dense
from gndet.modeling.norms.valid_area import ValidArea, clear_padding

_WIDE = (slice(None), slice(None), None, None, None)  # (B, G) to (B, G, 1, 1, 1)


def normalize(
    x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, area: ValidArea | None, *, relu: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Normalize x (B, C, H, W) with gamma, beta (C,); add residual, like x, if there is one; relu: then apply ReLU.

    Returns y in x's type, and the mean and 1 / std of each group, (B, G), in gamma's type.
    """
    if norm_kernels.usable(x):
        residual = None if residual is None else dense(residual)
        return norm_kernels.forward(x, gamma, beta, groups, eps, _sizes(area), relu=relu, residual=residual)
    y, mean, rstd = _normalize(_cast(x, gamma.dtype), gamma, beta, groups, eps, area)
    y = _cast(y, x.dtype)
    if residual is not None:
        y += residual
    return y.relu_() if relu else y, mean, rstd


def _normalize(
    x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, area: ValidArea | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same with torch's operators, in gamma's type, without residual and ReLU."""
    if area is None:
        y, mean, rstd = torch.native_group_norm(
            _for_torch(x), gamma, beta, x.shape[0], x.shape[1], x.shape[2] * x.shape[3], groups, eps
        )
        return y, mean.view(-1, groups), rstd.view(-1, groups)
    if _use_crops(x):
        return _normalize_crops(x, gamma, beta, groups, eps, area)
    grouped = x.unflatten(1, (groups, -1))  # (B, G, C/G, H, W)
    inside = area.mask[:, None]  # (B, 1, 1, H, W)
    n = _count(x, groups, area)
    mean = torch.where(inside, grouped, 0.0).sum((2, 3, 4)) / n  # (B, G)
    centered = torch.where(inside, grouped - mean[_WIDE], 0.0)
    rstd = (centered.square().sum((2, 3, 4)) / n + eps).rsqrt()  # (B, G)
    normal = (centered * rstd[_WIDE]).flatten(1, 2)
    y = torch.where(area.mask, torch.addcmul(beta[:, None, None], normal, gamma[:, None, None]), 0.0)
    return y, mean, rstd


def renormalize(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, area: ValidArea | None, *, relu: bool
) -> Tensor:
    """Compute y of `normalize` again from its statistics, in one pass; relu: then apply ReLU.  Same type as x."""
    if norm_kernels.usable(x):
        return norm_kernels.renormalize(x, gamma, beta, mean, rstd, _sizes(area), relu=relu)
    groups = mean.shape[1]
    scale = rstd[:, :, None] * gamma.view(groups, -1)  # (B, G, C/G)
    shift = beta.view(groups, -1) - mean[:, :, None] * scale
    scale, shift = (factor.flatten(1)[:, :, None, None] for factor in (scale, shift))
    y = torch.addcmul(shift, x.to(gamma.dtype), scale)
    y = y.relu_() if relu else y
    return clear_padding(y, area).to(x.dtype)


def gradients(
    grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, area: ValidArea | None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, gamma and beta, from the gradient of y and the statistics of `normalize`.

    beta: given if grad is the gradient after the ReLU of `normalize`; without kernels, ReLU costs a pass over the map.
    """
    groups = mean.shape[1]
    if norm_kernels.usable(x):
        return norm_kernels.backward(dense(grad), x, gamma, mean, rstd, _sizes(area), beta)
    if beta is not None:
        active = renormalize(x, gamma, beta, mean, rstd, area, relu=True)
        grad = torch.ops.aten.threshold_backward(grad, active, 0)
    if x.dtype != gamma.dtype:
        wide = gradients(grad.to(gamma.dtype), x.to(gamma.dtype), gamma, mean, rstd, area)
        return wide[0].to(x.dtype), wide[1], wide[2]
    if area is None:
        return torch.ops.aten.native_group_norm_backward(
            _for_torch(grad), _for_torch(x), mean, rstd, gamma, x.shape[0], x.shape[1], x.shape[2] * x.shape[3], groups,
            [True, True, True],
        )  # fmt: skip
    if _use_crops(x):
        return _gradients_of_crops(grad, x, gamma, mean, rstd, area)
    n = _count(x, groups, area)
    normal = (x.unflatten(1, (groups, -1)) - mean[_WIDE]) * rstd[_WIDE]
    normal = torch.where(area.mask[:, None], normal, 0.0)
    grad = torch.where(area.mask, grad, 0.0).unflatten(1, (groups, -1))
    weighted = grad * normal  # (B, G, C/G, H, W)
    grad_gamma = weighted.sum((0, 3, 4)).flatten()
    grad_beta = grad.sum((0, 3, 4)).flatten()
    scale = gamma.view(1, groups, -1)  # (1, G, C/G)
    mean_grad = (grad.sum((3, 4)) * scale).sum(2) / n  # (B, G)
    mean_weighted = (weighted.sum((3, 4)) * scale).sum(2) / n
    grad_x = grad * scale[..., None, None] - mean_grad[_WIDE] - normal * mean_weighted[_WIDE]
    grad_x = torch.where(area.mask[:, None], grad_x * rstd[_WIDE], 0.0).flatten(1, 2)
    return grad_x, grad_gamma, grad_beta


class Normalize(torch.autograd.Function):
    """`normalize` with its gradient; keeps x and two numbers per group for the backward pass.

    sizes, mask: the fields of a ValidArea, or None for each.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: Tensor | None, mask: Tensor | None, gamma: Tensor, beta: Tensor, groups: int,
        eps: float,
    ) -> Tensor:  # fmt: skip
        area = None if sizes is None or mask is None else ValidArea(sizes, mask)
        y, mean, rstd = normalize(x, gamma, beta, groups, eps, area)
        ctx.save_for_backward(x, gamma, mean, rstd, sizes, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, mean, rstd, sizes, mask = ctx.saved_tensors
        area = None if sizes is None else ValidArea(sizes, mask)
        grad_x, grad_gamma, grad_beta = gradients(grad, x, gamma, mean, rstd, area)
        return grad_x, None, None, grad_gamma, grad_beta, None, None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast x only if needed: torch 2.11 compiles a no-op `to` into an alias, which takes the gradient from x."""
    return x if x.dtype == dtype else x.to(dtype)


def _sizes(area: ValidArea | None) -> Tensor | None:
    return None if area is None else area.sizes


def _for_torch(x: Tensor) -> Tensor:
    """Return x as torch's own kernels read it: dense; channels last on a CPU only, which a GPU's refuse or misread."""
    return dense(x) if x.device.type == "cpu" else x.contiguous()


def _count(x: Tensor, groups: int, area: ValidArea) -> Tensor:
    """Return how many numbers the statistics of a group are taken over, (B, 1)."""
    return (area.num_cells * (x.shape[1] // groups)).to(x.dtype)


# --- on a CPU: torch's kernel on each picture's crop takes half the time of the masked arithmetic


def _use_crops(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _crop(x: Tensor, image: int, height: int, width: int) -> Tensor:
    """Return one picture of x (B, C, H, W) as (1, C, height, width), dense and channels last."""
    return dense(x[image : image + 1, :, :height, :width])


def _normalize_crops(
    x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, area: ValidArea
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.zeros_like(x)
    means, rstds = [], []
    for i, (height, width) in enumerate(area.sizes.tolist()):
        part, mean, rstd = _normalize(_crop(x, i, height, width), gamma, beta, groups, eps, None)
        y[i, :, :height, :width] = part[0]
        means.append(mean)
        rstds.append(rstd)
    return y, torch.cat(means), torch.cat(rstds)


def _gradients_of_crops(
    grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, area: ValidArea
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_gamma, grad_beta = torch.zeros_like(x), torch.zeros_like(gamma), torch.zeros_like(gamma)
    for i, (height, width) in enumerate(area.sizes.tolist()):
        grad_crop, crop = (_crop(t, i, height, width) for t in (grad, x))
        parts = gradients(grad_crop, crop, gamma, mean[i : i + 1], rstd[i : i + 1], None)
        grad_x[i, :, :height, :width] = parts[0][0]
        grad_gamma += parts[1]
        grad_beta += parts[2]
    return grad_x, grad_gamma, grad_beta
