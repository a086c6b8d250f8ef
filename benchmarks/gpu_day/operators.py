"""Part of the day: NMS and RoIAlign, equal to torchvision's, how long they take, and whether they repeat themselves.

B images, N boxes per image, R regions, C channels.
"""

from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.gpu_day.notes import CPU, DEVICE, SIZE, Notes
from benchmarks.timing import graph_s, host_s, median_s
from gndet.ops.matching import nms_keep
from gndet.ops.roi_align import Pyramid, roi_align_pyramid

STRIDES = (4, 8, 16, 32)
THRESHOLD = 0.7  # of the RPN
LEVELS = 5
NUM = 60 if CPU else 2000  # candidates per level
REGIONS = {"box head": (512, 7), "mask head": (128, 14)}  # number of regions, side of the output
CHANNELS = 8 if CPU else 256


def operators(note: Notes) -> None:
    """Compare and time NMS on pictures that need few and many rounds, and RoIAlign in both heads."""
    torch.manual_seed(0)
    works: dict[str, Callable[[], object]] = {}
    for batch in (1, 2):
        for kind, make in (("blank picture", blank_picture), ("noise", noise), ("clusters", clusters)):
            name = f"NMS, {kind}, batch {batch}"
            with note.attempt(name):
                found, works[name] = nms(*make(batch))
                note(name, found)
    for head, (num, side) in REGIONS.items():
        name = f"RoIAlign, {head}"
        with note.attempt(name):
            found, works[name] = roi_align(num, side)
            note(name, found)
    for name, work in works.items():  # last: an operator that cannot be captured leaves the GPU in a bad state
        with note.attempt(f"{name}: ms without launches"):
            note(f"{name}: ms without launches", round(graph_s([work], DEVICE) * 1e3, 3))


# --- NMS


Figures = dict[str, float | int | bool]
Candidates = tuple[Tensor, Tensor, Tensor]  # boxes (B, N, 4), scores (B, N) in descending order, groups (B, N)


def blank_picture(batch: int) -> Candidates:
    """Return the first anchors of each level, by place: all scores are equal there, and each overlaps the next."""
    levels = []
    for level in range(LEVELS):
        stride, side = 4 << level, 32 << level
        y, x = torch.meshgrid(torch.arange(0, SIZE[0], stride), torch.arange(0, SIZE[1], stride), indexing="ij")
        center = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)
        ratio = torch.tensor([0.5, 1.0, 2.0])
        half = torch.stack([side / ratio.sqrt(), side * ratio.sqrt()], dim=-1) / 2  # (3, 2)
        boxes = torch.cat([center - half, center + half], dim=-1).reshape(-1, 4)[:NUM]
        levels.append(boxes.clamp(min=0).minimum(torch.tensor([SIZE[1], SIZE[0]] * 2)))
    return together(batch, levels, torch.zeros)


def noise(batch: int) -> Candidates:
    """Return random boxes."""
    return together(batch, [random_boxes(NUM) for _ in range(LEVELS)], torch.rand)


def clusters(batch: int) -> Candidates:
    """Return boxes around few objects, as a trained detector proposes them."""
    levels = []
    for _ in range(LEVELS):
        objects = random_boxes(10)[torch.randint(10, (NUM,))]
        sides = (objects[:, 2:] - objects[:, :2]).repeat(1, 2)
        levels.append(objects + 0.1 * sides * torch.randn(NUM, 4))
    return together(batch, levels, torch.rand)


def random_boxes(num: int) -> Tensor:
    """Return boxes (num, 4) of many sizes within the picture."""
    limit = torch.tensor([SIZE[1], SIZE[0]])
    corner = torch.rand(num, 2) * limit * 0.8
    return torch.cat([corner, corner + torch.exp2(torch.rand(num, 2) * 4 - 5) * limit], dim=1)


def together(batch: int, levels: list[Tensor], scores: Callable[..., Tensor]) -> Candidates:
    """Return the boxes of all levels, for each image in another order of scores, as the RPN passes them on."""
    boxes = torch.cat(levels)
    groups = torch.arange(len(levels)).repeat_interleave(torch.tensor([len(level) for level in levels]))
    values, order = scores(batch, len(boxes)).sort(dim=1, descending=True, stable=True)
    return boxes[order].to(DEVICE).float(), values.to(DEVICE), groups[order].to(DEVICE)


def nms(boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Figures, Callable[[], Tensor]]:
    """Return what gndet's NMS and torchvision's keep, and how long both take; and gndet's as a function."""
    valid = torch.ones_like(groups, dtype=torch.bool)
    ours = partial(nms_keep, boxes, scores, groups, valid, THRESHOLD)
    kept, again = ours(), ours()
    expected = torch.zeros_like(kept)
    for image in range(len(boxes)):
        for level in range(LEVELS):
            rows = (groups[image] == level).nonzero()[:, 0]
            expected[image, rows[torchvision.ops.nms(boxes[image, rows], scores[image, rows], THRESHOLD)]] = True

    def theirs() -> list[Tensor]:
        return [torchvision.ops.batched_nms(b, s, g, THRESHOLD) for b, s, g in zip(boxes, scores, groups, strict=True)]

    figures: Figures = {
        "kept": int(kept.sum()), "kept by torchvision": int(expected.sum()), "differ": int((kept != expected).sum()),
        "the same twice": torch.equal(kept, again), "ms": round(median_s(ours, DEVICE) * 1e3, 3),
        "torchvision ms": round(median_s(theirs, DEVICE) * 1e3, 3),
        "host us": round(host_s(ours, DEVICE, 3 if CPU else 20) * 1e6, 1),
    }  # fmt: skip
    return figures, ours


# --- RoIAlign


def roi_align(num: int, side: int) -> tuple[Figures, Callable[[], Tensor]]:
    """Return the errors of gndet's RoIAlign against torchvision's in float32, and the times of both; and a function."""
    features = [
        torch.randn(1, CHANNELS, -(-SIZE[0] // s), -(-SIZE[1] // s), device=DEVICE, dtype=torch.bfloat16)
        .contiguous(memory_format=torch.channels_last).requires_grad_()
        for s in STRIDES
    ]  # fmt: skip
    boxes, image = random_boxes(num).to(DEVICE), torch.zeros(num, dtype=torch.int64, device=DEVICE)
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], side, 2)

    def theirs(maps: list[Tensor]) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):  # which makes it float32 inside, as in a step
            return pooler({str(i): one for i, one in enumerate(maps)}, [boxes], [SIZE])

    def ours() -> Tensor:
        return roi_align_pyramid(Pyramid(features, STRIDES), boxes, image, side, 2, "unaligned")

    exact = [feature.detach().float().contiguous().requires_grad_() for feature in features]
    pooled, expected = ours(), theirs(exact)
    grad = torch.randn_like(pooled)
    backward = partial(torch.autograd.grad, pooled, features, grad, retain_graph=True)
    slopes, expected_slopes = backward(), torch.autograd.grad(expected, exact, grad.float())
    of_peer = theirs(features)  # bf16
    peer_backward = partial(torch.autograd.grad, of_peer, features, grad.to(of_peer.dtype), retain_graph=True)
    figures: Figures = {
        "forward error": error([pooled], [expected]), "backward error": error(slopes, expected_slopes),
        "the same twice": torch.equal(pooled, ours()),
        "the same gradient twice": all(torch.equal(a, b) for a, b in zip(slopes, backward(), strict=True)),
        "forward ms": round(median_s(ours, DEVICE) * 1e3, 3), "backward ms": round(median_s(backward, DEVICE) * 1e3, 3),
        "torchvision forward ms": round(median_s(partial(theirs, features), DEVICE) * 1e3, 3),
        "torchvision backward ms": round(median_s(peer_backward, DEVICE) * 1e3, 3),
        "host us": round(host_s(ours, DEVICE, 3 if CPU else 20) * 1e6, 1),
    }  # fmt: skip
    return figures, ours


@torch.no_grad()
def error(found: list[Tensor] | tuple[Tensor, ...], exact: list[Tensor] | tuple[Tensor, ...]) -> float:
    """Return the largest norm of a difference over the norm of the exact result."""
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
