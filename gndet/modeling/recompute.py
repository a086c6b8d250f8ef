"""Run convolutions in sequence and choose what to keep for the backward pass: less memory for a little more time.

By default autograd keeps two maps per ConvNorm: the convolution's result for the norm, and the activation for the next
convolution.  `train.memory` chooses:
    fast      keep both
    balanced  keep the convolutions' results and the norms' statistics; recompute activations in one pass over the map.
              For a `cheap` layer recompute the result as well: a bottleneck's 1x1 convolutions are half of its work
              and five sixths of its memory
    lean      for a basic block, the RPN or a head keep only the input (`recomputed`), and keep the convolutions'
              results only while its backward pass runs
Using `torch.utils.checkpoint` with a selective policy instead of `tower` takes 1.21 times as long on a CPU, because it
cannot keep the result of a convolution by minimal filtering (R50-FPN GN, 256 x 320, balanced, one thread, torch 2.14).
Letters: n samples (images or regions), C channels, (H, W) maps.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gndet.modeling.conv_norm import ConvNorm
from gndet.modeling.norms.group_norm import gradients, normalize, renormalize
from gndet.modeling.norms.layers import FrozenBatchNorm, GroupNorm, NoNorm
from gndet.modeling.norms.triton_kernels import usable
from gndet.modeling.norms.valid_area import ValidArea, clear_padding
from gndet.ops.conv3x3 import Convolution, Winograd
from gndet.ops.winograd import samples_at_once

_aten = torch.ops.aten


class Layer(NamedTuple):
    """The settings of a ConvNorm in a tower, without its tensors."""

    stride: int
    padding: int
    dilation: int
    way: type[Convolution]
    cheap: bool  # recompute its convolution instead of keeping the result
    groups: int  # 0: no statistics; a frozen norm is folded into weight and bias
    eps: float
    area: ValidArea | None  # its padding is cleared and kept out of the statistics
    relu: bool


def set_memory(model: nn.Module, memory: str) -> None:
    """Set what the model keeps for the backward pass: "fast", "balanced" or "lean" (train.memory)."""
    module: Any
    for module in model.modules():
        if hasattr(module, "memory"):
            module.memory = memory


@contextmanager
def keeping_all(model: nn.Module) -> Iterator[None]:
    """Within this context run module by module ("fast"), so that forward hooks see each module's output."""
    settings = [(module, module.memory) for module in model.modules() if hasattr(module, "memory")]
    set_memory(model, "fast")
    try:
        yield
    finally:
        for module, memory in settings:
            module.memory = memory


def recomputed(
    part: Any, function: Callable[..., Any], *arguments: Any, cheap: bool = False, keep: Any = None
) -> Any:  # fmt: skip
    """Call a part's function, keep only its arguments, and call it again in the backward pass.

    Applies only if the part's memory is "lean" or, if cheap, "balanced".  keep: an operator of torch, whose results are
    kept if the memory is "balanced", so that the rest is cheap.  Skipped for BN, whose running statistics would be
    updated twice.
    """
    wanted = part.memory == "lean" or ((cheap or keep) and part.memory == "balanced")
    if not wanted or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*arguments)
    if any(isinstance(module, nn.BatchNorm2d) for module in part.modules()):
        return function(*arguments)
    if keep is None or part.memory == "lean":
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, [keep])
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def tower(
    layers: Sequence[ConvNorm] | nn.ModuleList,
    x: Tensor,
    areas: Sequence[ValidArea | None] | None = None,
    residual: Tensor | None = None,
    make_input: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Run x (n, C, H, W) through the layers, keeping as little for the backward pass as their `memory` says.

    areas: of each layer's result, None if nothing is padded.  residual: added before a final ReLU, as in a residual
    block.  make_input: computes x again, so that x need not be kept.  Returns (n, out_channels, H/s, W/s).
    """
    areas = [None] * len(layers) if areas is None else areas
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not all(map(_saves_memory, layers)):
        return _plain(layers, x, areas, residual)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
    settings: list[Layer] = []
    tensors: list[Tensor | None] = []
    size = list(x.shape[2:])
    for layer, area in zip(layers, areas, strict=True):
        setting, layer_tensors = _split(layer, area, dtype)
        settings.append(setting)
        tensors += layer_tensors
        size = [(side - 1) // setting.stride + 1 for side in size]
    if residual is not None:
        settings[-1] = settings[-1]._replace(relu=True)
    if layers[0].memory == "lean":  # the whole part is recomputed already: do not compute its input a third time
        make_input = None
    in_parts = layers[0].regions and any(setting.way is Winograd for setting in settings)
    at_once = samples_at_once(size[0], size[1]) if in_parts else len(x)
    with torch.autocast(device, enabled=False):
        return _Tower.apply(tuple(settings), at_once, make_input, x, residual, *_weights_as(dtype, tensors))


def _saves_memory(layer: nn.Module) -> bool:
    """Return whether a layer should keep less than everything, and this file implements its backward pass."""
    if not isinstance(layer, ConvNorm) or layer.memory == "fast" or layer.conv.groups > 1:
        return False
    return isinstance(layer.norm, GroupNorm | FrozenBatchNorm | NoNorm)


def _plain(layers: Iterable[Any], x: Tensor, areas: Sequence[ValidArea | None], residual: Tensor | None) -> Tensor:
    *before, last = zip(layers, areas, strict=True)
    for layer, area in before:
        x = layer(x, area)
    return last[0](x, last[1], residual)


def _split(layer: Any, area: ValidArea | None, dtype: torch.dtype) -> tuple[Layer, tuple[Tensor | None, ...]]:
    """Split a ConvNorm into a Layer and its weight, bias, gamma and beta; fold a frozen norm into weight and bias."""
    norm = layer.norm
    area = area if norm.masked else None
    way = layer.way_for(dtype)
    cheap = layer.cheap and not (layer.regions and layer.memory == "lean")
    sides = layer.conv.stride[0], layer.conv.padding[0], layer.conv.dilation[0]
    plain = Layer(*sides, way, cheap, 0, 0.0, area, layer.relu)
    if isinstance(norm, GroupNorm):
        tensors = layer.weight(), layer.conv.bias, norm.weight, norm.bias
        return plain._replace(groups=norm.groups, eps=norm.eps), tensors
    return plain, (*layer.folded(), None, None)


def _weights_as(dtype: torch.dtype, tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Cast the weights and biases of layers, of which tensors holds four per layer; gamma and beta stay as they are."""
    places = [i for i, tensor in enumerate(tensors) if i % 4 < 2 and tensor is not None and tensor.dtype != dtype]
    if places:
        tensors = list(tensors)
        for i, copy in zip(places, _Cast.apply(dtype, *(tensors[i] for i in places)), strict=True):
            tensors[i] = copy
    return tensors


class _Cast(torch.autograd.Function):
    """Cast tensors, and their gradients back: on a GPU one launch for all of them instead of one for each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype, copies = tensors[0].dtype, _cast(tensors, dtype)
        wanted = zip(copies, ctx.needs_input_grad[1:], strict=True)
        ctx.mark_non_differentiable(*(copy for copy, trained in wanted if not trained))
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        copies = iter(_cast([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(copies) for grad in grads)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


class _Tower(torch.autograd.Function):
    """The tower that saves memory.  It runs `at_once` samples at a time: on a CPU, as many as fit into the cache."""

    @staticmethod
    def forward(
        ctx: Any, layers: tuple[Layer, ...], at_once: int, make_input: Callable[[], Tensor] | None, x: Tensor,
        residual: Tensor | None, *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        convs, norms = _parts(layers, tensors)
        outputs, kept = [], []
        for rows in _chunks(len(x), at_once):
            output, chunk_kept = _forward(layers, convs, norms, x[rows], None if residual is None else residual[rows])
            outputs.append(output)
            kept += chunk_kept
        output = _joined(outputs)
        ctx.fused = residual is None and _fuses_relu(layers[-1], output)
        from_output = layers[-1].relu and not ctx.fused and (residual is not None or kept[-3] is None)
        ctx.layers, ctx.at_once, ctx.make_input, ctx.num_tensors = layers, at_once, make_input, len(tensors)
        ctx.save_for_backward(x if make_input is None else None, output if from_output else None, *tensors, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        layers, (x, output, *saved) = ctx.layers, ctx.saved_tensors
        x = ctx.make_input().to(grad.dtype) if x is None else x
        tensors, kept = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        convs, norms = _parts(layers, tensors)
        sums: list[list[Tensor]] = [[] for _ in layers]  # per layer, the gradients of [gamma, beta]
        grads_x, grads_residual = [], []
        for i, rows in enumerate(_chunks(len(x), ctx.at_once)):
            part = grad[rows].contiguous(memory_format=torch.channels_last)
            chunk_kept = kept[3 * len(layers) * i : 3 * len(layers) * (i + 1)]
            if layers[-1].relu and not ctx.fused:
                active = _activation(layers[-1], norms[-1], chunk_kept[-3:]) if output is None else output[rows]
                part = _aten.threshold_backward(part, active, 0)
            grads_residual.append(part)
            wanted = ctx.needs_input_grad[3]
            grads_x.append(_backward(layers, convs, norms, part, x[rows], chunk_kept, sums, wanted, ctx.fused))
        grads: list[Tensor | None] = []
        for conv, norm_grads in zip(convs, sums, strict=True):
            grads += [*conv.gradients(), *(norm_grads or (None, None))]
        grad_x = _joined(grads_x) if ctx.needs_input_grad[3] else None
        grad_residual = _joined(grads_residual) if ctx.needs_input_grad[4] else None
        return None, None, None, grad_x, grad_residual, *grads


Part = Any  # Tensor, or None if a layer has no such part
Norms = list[tuple[Part, Part]]  # gamma and beta of each layer


def _parts(layers: Sequence[Layer], tensors: Sequence[Part]) -> tuple[list[Convolution], Norms]:
    by_layer = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
    convs = [
        layer.way(weight, bias, layer.stride, layer.padding, layer.dilation)
        for layer, (weight, bias, _, _) in zip(layers, by_layer, strict=True)
    ]
    return convs, [(gamma, beta) for _, _, gamma, beta in by_layer]


def _forward(
    layers: Sequence[Layer], convs: Sequence[Convolution], norms: Norms, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, list[Part]]:
    """Run samples through the layers.  Also returns what to keep per layer: a map, the mean and 1 / std."""
    kept: list[Part] = []
    for i, (layer, conv, (gamma, beta)) in enumerate(zip(layers, convs, norms, strict=True)):
        last = i == len(layers) - 1
        y, mean, rstd = conv.forward(x), None, None
        added = residual if last else None
        if layer.groups:
            x, mean, rstd = normalize(
                y, gamma, beta, layer.groups, layer.eps, layer.area, relu=layer.relu, residual=added
            )
        else:
            x = clear_padding(y, layer.area)
            if added is not None:
                x += added
            if layer.relu:
                x.relu_()
        if layer.groups:
            kept += [None if layer.cheap else y, mean, rstd]
        else:
            kept += [None if last else x, None, None]
    return x, kept


def _backward(
    layers: Sequence[Layer], convs: Sequence[Convolution], norms: Norms, grad: Part, x: Tensor,
    kept: Sequence[Part], sums: list[list[Tensor]], wanted: bool, relu: bool,
) -> Tensor | None:  # fmt: skip
    """Propagate grad to x if wanted; add to the sums of all parameters on the way.

    relu: whether grad is the gradient after the last layer's ReLU, which its norm's backward pass includes.
    """
    by_layer = [list(kept[i : i + 3]) for i in range(0, len(kept), 3)]  # a map, the mean and 1 / std
    inputs = [x]
    for i, (layer, conv) in enumerate(zip(layers, convs, strict=True)):
        if layer.cheap and layer.groups:
            by_layer[i][0] = conv.forward(inputs[i])
        if i < len(layers) - 1:
            inputs.append(_activation(layer, norms[i], by_layer[i]))
    for i in reversed(range(len(layers))):
        layer, conv, layer_input, (y, mean, rstd) = layers[i], convs[i], inputs.pop(), by_layer.pop()
        if layer.groups:
            gamma, beta = norms[i]
            grad, *norm_grads = gradients(grad, y, gamma, mean, rstd, layer.area, beta if relu else None)
            sums[i] = [a + b for a, b in zip(sums[i], norm_grads, strict=True)] if sums[i] else norm_grads
        else:
            grad = clear_padding(grad, layer.area)
        grad = conv.backward(grad, layer_input, wanted or i > 0)
        relu = i > 0 and _fuses_relu(layers[i - 1], layer_input)
        if i and layers[i - 1].relu and not relu:
            grad = _aten.threshold_backward(grad, layer_input, 0)
    return grad


def _fuses_relu(layer: Layer, x: Tensor) -> bool:
    """Return whether the backward pass of the layer's norm includes its ReLU; x is a map of the tower."""
    return layer.relu and layer.groups > 0 and usable(x)


def _activation(layer: Layer, norm: tuple[Part, Part], kept: Sequence[Part]) -> Tensor:
    y, mean, rstd = kept
    return renormalize(y, *norm, mean, rstd, layer.area, relu=layer.relu) if layer.groups else y


def _chunks(num: int, at_once: int) -> Iterator[slice]:
    return (slice(first, first + at_once) for first in range(0, num, at_once))


def _joined(parts: list[Part]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
