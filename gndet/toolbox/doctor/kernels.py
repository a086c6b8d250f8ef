"""What a training step and an evaluation stand on, on small inputs beside an independent computation.

Group norm, convolutions and regions are compared with float64, or with torchvision's operators in float64; non-maximum
suppression with a loop over boxes; the metrics of one engine with those of the other.
B images, C channels, G groups, N boxes, R regions, (H, W) maps.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from gndet.config.schema import Config, DataConfig, DatasetConfig, NormConfig
from gndet.data.datasets.shapes import read_shapes
from gndet.evaluation.coco_metrics import coco_metrics, coco_truths
from gndet.evaluation.results import from_coco
from gndet.modeling.norms.layers import make_norm
from gndet.modeling.norms.triton_kernels import trouble
from gndet.modeling.norms.valid_area import ValidArea
from gndet.ops.conv3x3 import MinimalConvolution
from gndet.ops.nms import fixed_point, nms_keep
from gndet.ops.roi_align import roi_align_pyramid
from gndet.toolbox.doctor.facts import Fact, Facts, reason

MAP = (2, 64, 33, 41)  # B, C, H, W
GROUPS = 16
SIZES = ((33, 41), (20, 27))  # of the pictures, where they do not fill the map
TOLERANCES = {  # of the largest value: a few units in the last place of each type, and of sums in float32
    torch.float32: 3e-4, torch.bfloat16: 1.5e-2, torch.float16: 3e-3,
}  # fmt: skip
NMS_THRESHOLD = 0.5
LAYOUTS = {"plain": torch.contiguous_format, "channels last": torch.channels_last}

Errors = dict[str, float]  # the largest difference of each comparison, as a part of the largest value


def facts(cfg: Config | None) -> Facts:
    """A line a kernel, device and type."""
    for device in devices():
        if device.type == "cuda":
            yield f"the Triton kernels on {device}"
            yield triton_kernels(device)
        for name, tolerance, compare in comparisons(device):
            yield name
            yield judged(f"{name}, {device}", tolerance, compare)
    yield "metrics of hotcoco and pycocotools"
    yield metrics()


def devices() -> list[torch.device]:
    """The CPU and every GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", number) for number in range(count))]


def comparisons(device: torch.device) -> Iterator[tuple[str, float, Callable[[], Errors]]]:
    """What is compared on a device: a name, how far it may be off, and what does it."""
    for dtype, tolerance in TOLERANCES.items():
        if dtype != torch.float16 or device.type == "cuda":  # no precision of gndet's on a CPU
            yield f"group norm {str(dtype).removeprefix('torch.')}", tolerance, partial(group_norm, device, dtype)
    if device.type == "cpu":
        yield "Winograd", TOLERANCES[torch.float32], winograd
    yield "NMS", 0.0, partial(nms, device)
    yield "RoIAlign", TOLERANCES[torch.float32], partial(roi_align, device)


def judged(name: str, tolerance: float, compare: Callable[[], Errors]) -> Fact:
    """Compare, and say by how much each is off; an error of an operator is a finding too."""
    try:
        errors = compare()
    except Exception as error:  # a missing operator, a driver, a compiler: whatever it is, this does not work
        return Fact(name, f"fails: {reason(error)}", "wrong")
    wrong = [case for case, error in errors.items() if not error <= tolerance]  # NaN is wrong
    if wrong:
        text = ", ".join(f"{case} is off by {errors[case]:.1g}" for case in wrong)
        return Fact(name, f"{text} of the largest value, expected {tolerance:.0e} at most", "wrong")
    return Fact(
        name,
        f"off by {max(errors.values()):.0e} at most ({', '.join(errors)})"
        if tolerance
        else f"equal ({', '.join(errors)})",
        "ok",
    )


def triton_kernels(device: torch.device) -> Fact:
    """What the kernels say of themselves; where they do not work torch's operators take their place."""
    wrong = trouble(device)
    if wrong:
        return Fact(f"Triton kernels, {device}", f"{wrong}: torch's operators take their place, slower", "warning")
    return Fact(f"Triton kernels, {device}", "as torch in float64", "ok")


# --- group norm


def group_norm(device: torch.device, dtype: torch.dtype) -> Errors:
    """The norm layer, forward and backward, for each memory layout and with padding, beside float64."""
    x, grad = (noise(MAP, seed).to(dtype) for seed in (0, 1))
    gamma, beta = noise((MAP[1],), 2), noise((MAP[1],), 3)
    errors = {}
    for sizes in (None, SIZES):
        exact = exact_group_norm(x, grad, gamma, beta, sizes or (MAP[2:],) * MAP[0])
        area = None if sizes is None else ValidArea.of(torch.tensor(sizes, device=device), *MAP[2:])
        for layout, memory in LAYOUTS.items():
            layer = make_norm(NormConfig(groups=GROUPS), MAP[1]).to(device)
            layer.load_state_dict({"weight": gamma, "bias": beta})
            leaf, slope = (one.to(device).contiguous(memory_format=memory) for one in (x, grad))
            y = layer(leaf.requires_grad_(), area)
            found = (y, *torch.autograd.grad(y, (leaf, layer.weight, layer.bias), slope))
            errors[layout + (" padded" if sizes else "")] = max(map(relative_error, found, exact))
    return errors


def exact_group_norm(
    x: Tensor, grad: Tensor, gamma: Tensor, beta: Tensor, sizes: tuple[tuple[int, int], ...]
) -> tuple[Tensor, ...]:
    """y and the gradients at x, gamma, beta in float64, each picture alone, zero beside it (Wu & He 2018, eq. 1-7)."""
    x, gamma, beta = (one.double().requires_grad_() for one in (x, gamma, beta))
    y = torch.zeros_like(x)
    for image, (height, width) in enumerate(sizes):
        crop = x[image, :, :height, :width].reshape(GROUPS, -1)
        centred = crop - crop.mean(1, keepdim=True)
        normal = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        normal = normal.view(-1, height, width)
        y[image, :, :height, :width] = normal * gamma[:, None, None] + beta[:, None, None]
    return (y.detach(), *torch.autograd.grad(y, (x, gamma, beta), grad.double()))


# --- convolution, boxes, regions


def winograd() -> Errors:
    """A convolution by minimal filtering, forward and backward, beside torch's in float64."""
    x, weight, grad = noise((2, 64, 20, 25), 0), noise((96, 64, 3, 3), 1) / 24, noise((2, 96, 20, 25), 2)
    found, exact = (
        (y := convolve(leaf, factor), *torch.autograd.grad(y, (leaf, factor), grad.to(y.dtype)))
        for convolve, leaf, factor in (
            (MinimalConvolution.apply, x.clone().requires_grad_(), weight.clone().requires_grad_()),
            (partial(F.conv2d, padding=1), x.double().requires_grad_(), weight.double().requires_grad_()),
        )
    )
    names = ("result", "gradient", "gradient of the weight")
    return dict(zip(names, map(relative_error, found, exact), strict=True))


def nms(device: torch.device) -> Errors:
    """Non-maximum suppression beside a loop over the boxes: the share of boxes that are kept by one alone."""
    corners = torch.from_numpy(np.random.default_rng(0).uniform(0, 60, (2, 150, 2))).float()
    sides = torch.from_numpy(np.random.default_rng(1).uniform(10, 50, (2, 150, 2))).float()
    boxes = torch.cat([corners, corners + sides], dim=2)  # (B, N, 4)
    scores = torch.linspace(1, 0, 150).repeat(2, 1)
    groups, valid = torch.arange(150).repeat(2, 1) % 3, torch.arange(150).repeat(2, 1) < 140
    expected = greedy(boxes, groups, valid)
    here = [one.to(device) for one in (boxes, scores, groups, valid)]
    kept = nms_keep(*here, NMS_THRESHOLD).cpu()
    pairs = {"nms_keep": kept, "fixed_point": fixed_point(here[0], *here[2:], NMS_THRESHOLD).cpu()}
    pairs["torchvision"] = torch.zeros_like(valid)
    for image in range(2):
        rows = valid[image].nonzero()[:, 0].to(device)
        part = torchvision.ops.batched_nms(*(one[image, rows] for one in here[:3]), NMS_THRESHOLD)
        pairs["torchvision"][image, rows[part].cpu()] = True
    return {name: (keep != expected).double().mean().item() for name, keep in pairs.items()}


def greedy(boxes: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """The boxes (B, N, 4), by falling score, that no kept one of their group overlaps, in float64.  Returns (B, N)."""
    keep = valid.clone()
    for image, rows in enumerate(boxes.double().tolist()):
        for i, j in itertools.combinations(range(len(rows)), 2):
            if keep[image, i] and keep[image, j] and groups[image, i] == groups[image, j]:
                keep[image, j] = _iou(rows[i], rows[j]) <= NMS_THRESHOLD
    return keep


def _iou(a: list[float], b: list[float]) -> float:
    width, height = (max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0.0) for k in (0, 1))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - width * height
    return width * height / union


def roi_align(device: torch.device) -> Errors:
    """Pooled regions and their gradient beside torchvision's operator in float64 on the CPU."""
    feature, grad = noise((2, 32, 25, 34), 0), noise((6, 32, 7, 7), 1)
    boxes = torch.tensor([
        [3.2, 5.1, 60.7, 44.4], [-9.0, -4.0, 30.0, 99.5], [50.3, 40.9, 141.0, 103.0], [20.0, 20.0, 21.5, 22.5],
        [0.0, 0.0, 136.0, 100.0], [99.9, 1.1, 120.2, 95.7],
    ])  # fmt: skip
    image = torch.tensor([0, 1, 0, 1, 1, 0])
    leaf = feature.to(device).requires_grad_()
    pooled = roi_align_pyramid([leaf], [4], boxes.to(device), image.to(device), 7, 2)
    found = (pooled, *torch.autograd.grad(pooled, leaf, grad.to(device)))
    exact_leaf = feature.double().requires_grad_()
    rois = torch.cat([image[:, None].double(), boxes.double()], dim=1)  # (R, 5)
    exact = torchvision.ops.roi_align(exact_leaf, rois, 7, 0.25, 2, aligned=True)
    slopes = torch.autograd.grad(exact, exact_leaf, grad.double())
    return dict(zip(("regions", "gradient"), map(relative_error, found, (exact, *slopes)), strict=True))


# --- metrics


def metrics() -> Fact:
    """The metrics of made-up detections by both engines, which are to agree to the last bit."""
    name = "metrics"
    try:
        engines = _by_both_engines()
    except Exception as error:  # an engine that this NumPy does not go with
        return Fact(name, f"fail: {reason(error)}", "wrong")
    values = {
        engine: {f"{kind} {key}": value for kind, part in found.items() for key, value in part.summary.items()}
        for engine, found in engines.items()
    }
    ours, reference = values["hotcoco"], values["pycocotools"]
    wrong = [key for key in reference if not np.array_equal(ours[key], reference[key], equal_nan=True)]
    if wrong:
        text = ", ".join(f"{key} {ours[key]:.6f} by hotcoco, {reference[key]:.6f} by pycocotools" for key in wrong[:3])
        return Fact(name, f"{text}; evaluation.engine=pycocotools is the reference", "wrong")
    return Fact(name, f"hotcoco and pycocotools agree in {len(reference)} numbers, box AP {ours['bbox AP']:.3f}", "ok")


def _by_both_engines() -> dict[str, dict]:
    """Score the boxes and masks of drawn pictures, each box moved a little, by hotcoco and by pycocotools."""
    dataset = read_shapes(DatasetConfig(kind="shapes", count=6, size=64), DataConfig())
    truths = coco_truths(dataset, masks=True)
    rng = np.random.default_rng(0)
    found = [
        {
            "image_id": one["image_id"], "category_id": one["category_id"], "score": float(rng.uniform()),
            "bbox": (np.array(one["bbox"]) + rng.uniform(-3, 3, 4)).tolist(), "segmentation": one["segmentation"],
        }
        for one in truths["segm"]["annotations"]
    ]  # fmt: skip
    for one, other in itertools.pairwise(found):  # some are shapes of another class
        if one["score"] < 0.3:
            one["segmentation"] = other["segmentation"] if one["image_id"] == other["image_id"] else one["segmentation"]
    results = from_coco(found)
    return {
        engine: coco_metrics(truths, results, engine=engine, max_detections=100)
        for engine in ("hotcoco", "pycocotools")
    }


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers around 1 with a spread of 1, so that a mean that is lost shows."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The largest difference to the exact values, as a part of the largest of them; infinite for NaN."""
    off = ((found.detach().double().cpu() - exact).abs().max() / exact.abs().max()).item()
    return off if off == off else float("inf")
