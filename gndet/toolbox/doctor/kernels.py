"""Compare the kernels of training and evaluation with an independent computation in float64, on small inputs.

B images, C channels, N boxes, R regions, (H, W) maps.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from gndet.config.data import DatasetConfig
from gndet.config.norm import NormConfig
from gndet.config.schema import Config
from gndet.data.datasets.shapes import read_shapes
from gndet.evaluation.coco_metrics import coco_metrics, coco_truths
from gndet.evaluation.results import from_coco
from gndet.modeling.norms.layers import make_norm
from gndet.modeling.norms.triton_kernels import trouble
from gndet.modeling.norms.valid_area import ValidArea
from gndet.ops import matching_kernels, nms_kernels, roi_align_kernels
from gndet.ops.conv3x3 import Convolution, Convolved, Product, Winograd
from gndet.ops.matching import nms_keep
from gndet.ops.roi_align import Pyramid, roi_align_pyramid
from gndet.toolbox.doctor.facts import Fact, Facts, reason

MAP = (2, 64, 33, 41)  # B, C, H, W
GROUPS = 16
SIZES = ((33, 41), (20, 27))  # (height, width) of two pictures, the second smaller than the map
TOLERANCES = {  # relative to the largest value: a few units in the last place of each type, and of float32 sums
    torch.float32: 3e-4, torch.bfloat16: 1.5e-2, torch.float16: 3e-3,
}  # fmt: skip
NMS_THRESHOLD = 0.5
LAYOUTS = {"plain": torch.contiguous_format, "channels last": torch.channels_last}

Errors = dict[str, float]  # largest difference of each comparison, relative to the largest value


def facts(cfg: Config | None) -> Facts:
    """Yield one fact per kernel, device and type."""
    for device in devices():
        if device.type == "cuda":
            yield f"the Triton kernels on {device}"
            yield triton_kernels(device)
        for name, tolerance, compare in comparisons(device):
            yield name
            yield judged(f"{name}, {device}", tolerance, compare)


def devices() -> list[torch.device]:
    """Return the CPU and every GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", number) for number in range(count))]


def comparisons(device: torch.device) -> Iterator[tuple[str, float, Callable[[], Errors]]]:
    """Yield the comparisons on a device: name, tolerance, function."""
    for dtype, tolerance in TOLERANCES.items():
        if dtype != torch.float16 or device.type == "cuda":  # gndet does not compute in float16 on a CPU
            yield f"group norm {str(dtype).removeprefix('torch.')}", tolerance, partial(group_norm, device, dtype)
    if device.type == "cpu":
        yield "Winograd", TOLERANCES[torch.float32], partial(convolution, Winograd)
        yield "small convolutions", TOLERANCES[torch.float32], partial(convolution, Product)
        yield "metrics", 0.0, metrics
    yield "NMS", 0.0, partial(nms, device)
    for dtype, tolerance in TOLERANCES.items():
        if dtype == torch.float32 or device.type == "cuda":
            yield f"RoIAlign {str(dtype).removeprefix('torch.')}", tolerance, partial(roi_align, device, dtype)


def judged(name: str, tolerance: float, compare: Callable[[], Errors]) -> Fact:
    """Run a comparison and judge its errors; an operator that raises is a finding too."""
    try:
        errors = compare()
    except Exception as error:  # any kind (missing operator, driver, compiler): the kernel does not work
        return Fact(name, f"fails: {reason(error)}", "wrong")
    wrong = [case for case, error in errors.items() if not error <= tolerance]  # NaN is wrong
    if wrong:
        text = ", ".join(f"{case} is off by {errors[case]:.1g}" for case in wrong)
        return Fact(name, f"{text}, expected at most {tolerance:.0e}", "wrong")
    text = f"off by at most {max(errors.values()):.0e}" if tolerance else "equal"
    return Fact(name, f"{text} ({', '.join(errors)})", "ok")


def triton_kernels(device: torch.device) -> Fact:
    """Return the result of the kernels' self-tests; if one fails, gndet uses torch's operators instead."""
    tests = trouble, nms_kernels.trouble, roi_align_kernels.trouble, matching_kernels.trouble
    try:
        wrong = "; ".join(filter(None, (test(device) for test in tests)))
    except RuntimeError as error:  # memory ran out, which says nothing about the kernels
        return Fact(f"Triton kernels, {device}", f"could not be tested: {reason(error)}", "warning")
    if wrong:
        return Fact(f"Triton kernels, {device}", f"{wrong}: torch's slower operators are used instead", "warning")
    return Fact(f"Triton kernels, {device}", "agree with torch in float64", "ok")


def group_norm(device: torch.device, dtype: torch.dtype) -> Errors:
    """Compare the norm layer, forward and backward, for each memory layout and with padding."""
    x, grad = (noise(MAP, seed).to(dtype) for seed in (0, 1))
    gamma, beta = noise((MAP[1],), 2), noise((MAP[1],), 3)
    layer: Any = make_norm(NormConfig(groups=GROUPS), MAP[1]).to(device)
    layer.load_state_dict({"weight": gamma, "bias": beta})
    errors = {}
    for case, sizes in (("", (MAP[2:],) * MAP[0]), (" padded", SIZES)):
        exact = with_gradients(partial(exact_group_norm, sizes=sizes), grad, x.double(), gamma.double(), beta.double())
        area = ValidArea.of(torch.tensor(sizes, device=device), *MAP[2:]) if case else None
        for layout, memory in LAYOUTS.items():
            leaf, slope = (tensor.to(device).contiguous(memory_format=memory) for tensor in (x, grad))
            y = layer(leaf.requires_grad_(), area)
            found = (y, *torch.autograd.grad(y, (leaf, layer.weight, layer.bias), slope))
            errors[layout + case] = max(map(relative_error, found, exact))
    return errors


def exact_group_norm(x: Tensor, gamma: Tensor, beta: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """Normalize each picture by itself (Wu & He 2018, equations 1 to 7); the padding becomes zero."""
    y = torch.zeros_like(x)
    for image, (height, width) in enumerate(sizes):
        normal = F.instance_norm(x[image, :, :height, :width].reshape(1, GROUPS, -1), eps=1e-5).view(-1, height, width)
        y[image, :, :height, :width] = normal * gamma[:, None, None] + beta[:, None, None]
    return y


def convolution(way: type[Convolution]) -> Errors:
    """Compare a way of computing 3x3 convolutions, forward and backward, with torch's in float64."""
    x, weight, grad = noise((2, 64, 20, 25), 0), noise((96, 64, 3, 3), 1) / 24, noise((2, 96, 20, 25), 2)
    found = with_gradients(lambda x, weight: Convolved.apply(x, weight, 1, way), grad, x, weight)
    exact = with_gradients(partial(F.conv2d, padding=1), grad, x.double(), weight.double())
    names = ("result", "gradient", "gradient of the weight")
    return dict(zip(names, map(relative_error, found, exact), strict=True))


def nms(device: torch.device) -> Errors:
    """Return the share of boxes on which gndet's NMS and torchvision's in float64 disagree."""
    corners = torch.from_numpy(np.random.default_rng(0).uniform(0, 60, (150, 2))).float()
    sides = torch.from_numpy(np.random.default_rng(1).uniform(10, 50, (150, 2))).float()
    row = torch.arange(150.0)[:, None] * torch.tensor([3.0, 0.0])  # each box suppresses the next: a chain
    boxes = torch.stack([torch.cat([corners, corners + sides], dim=1), torch.cat([row, row + 10], dim=1)])  # (2, N, 4)
    scores, groups = torch.linspace(1, 0, 150), torch.stack([torch.arange(150) % 3, torch.zeros(150).long()])
    valid = torch.arange(150) < 140
    given = boxes, scores.expand(2, -1), groups, valid.expand(2, -1)
    keep = nms_keep(*(tensor.to(device) for tensor in given), NMS_THRESHOLD).cpu()
    expected = torch.zeros_like(keep)
    for image in range(2):
        best = boxes[image, valid].double(), scores[valid].double(), groups[image, valid]
        expected[image, torchvision.ops.batched_nms(*best, NMS_THRESHOLD)] = True
    return {"boxes kept": (keep != expected).double().mean().item()}


def roi_align(device: torch.device, dtype: torch.dtype) -> Errors:
    """Compare pooled regions and their gradient with torchvision's operator in float64 on the CPU."""
    feature, grad = noise((2, 32, 25, 34), 0).to(dtype), noise((6, 32, 7, 7), 1).to(dtype)
    boxes = torch.tensor([
        [3.2, 5.1, 60.7, 44.4], [-9.0, -4.0, 30.0, 99.5], [50.3, 40.9, 141.0, 103.0], [20.0, 20.0, 21.5, 22.5],
        [0.0, 0.0, 136.0, 100.0], [99.9, 1.1, 120.2, 95.7],
    ])  # fmt: skip
    image = torch.tensor([0, 1, 0, 1, 1, 0])
    rois = torch.cat([image[:, None].double(), boxes.double()], dim=1)  # (R, 5)
    errors: Errors = {}
    for case, ratio in (("", 2), (", adaptive", 0)):
        ours = partial(roi_align_pyramid, boxes=boxes.to(device), image=image.to(device), size=7, sampling_ratio=ratio)
        reference = partial(
            torchvision.ops.roi_align, boxes=rois, output_size=7, spatial_scale=0.25, sampling_ratio=ratio, aligned=True
        )
        found = with_gradients(lambda x, pool=ours: pool(Pyramid([x], [4])), grad, feature.to(device))
        exact = with_gradients(reference, grad, feature.double())
        errors[f"regions{case}"], errors[f"gradient{case}"] = map(relative_error, found, exact)
    return errors


def metrics() -> Errors:
    """Compare hotcoco with the reference, pycocotools, on objects of drawn pictures whose boxes are moved a little."""
    truths = coco_truths(read_shapes(DatasetConfig(kind="shapes", count=6, size=64)), masks=True)
    rng = np.random.default_rng(0)
    results = from_coco(
        [
            shape | {"score": rng.uniform(), "bbox": (shape["bbox"] + rng.uniform(-3, 3, 4)).tolist()}
            for shape in truths["segm"]["annotations"]
        ]
    )
    ours, reference = (
        coco_metrics(truths, results, engine=engine, max_detections=100) for engine in ("hotcoco", "pycocotools")
    )
    errors = {}
    for kind, expected in reference.items():
        values = np.array([list(part.summary.values()) for part in (ours[kind], expected)])
        errors[f"hotcoco's {kind}"] = np.ptp(np.nan_to_num(values, nan=-1), axis=0).max().item()
    return errors


def with_gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the function's result, and the gradients of its inputs given the gradient `grad` of the result."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad.to(y)))


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return normal numbers of mean 1 and standard deviation 1, so that a forgotten mean shows."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the largest difference relative to the largest exact value; infinite for NaN."""
    off = ((found.detach().double().cpu() - exact).abs().max() / exact.abs().max()).item()
    return off if off == off else float("inf")
