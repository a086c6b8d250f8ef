"""Measure how well a BN network survives conversion to GN without training, and how good a start it is.

    python -m benchmarks.conversion --data ../shared/data/bn2gn [--updates 500] [--seeds 0 1 2] [--rates 0.003 0.01]
        [--momentum 0.9]

--data holds a public CIFAR-10 ResNet-20 and 1,500 test images.  First table: top-1 without training and agreement with
the BN network, by method and grouping, tested on 1,000 images; C is calibration on images, with mean and deviation over
three draws from the other 500.  Second table: short fine-tunes of all weights with a new dense head on 1,000 images in
batches of two, tested on the other 500.  A seed gives each start the same head, order and flips.  At lr 0.01 and
momentum 0.9 the frozen BN network itself may fail.  Takes about 10 minutes on one core.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gndet.modeling.norms.layers import FrozenBatchNorm, GroupNorm
from gndet.modeling.norms.valid_area import ValidArea
from gndet.weights.convert import run_twins

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the network, which the tests share

from resnet20 import MakeNorm, ResNet20, by_name, converted, group_norm, norm_layers, predict, pretrained, read_images

GROUPINGS = {"16 channels": group_norm(), "8 channels": group_norm(channels_per_group=8), "8 groups": group_norm(8)}
DAMPS = (0, 0.5, 1, 2, 4, 8)
CALIBRATION_SIZES = (8, 16, 64, 256)
BATCH = 2
WARMUP = 100  # updates; the first gradients of a new head are large
MORPH_UPDATES = 200
Rows = Iterator[tuple[str, list[ResNet20]]]


class Morph(nn.Module):
    """A frozen BN that becomes a GN: (1 - share) BN + share GN."""

    def __init__(self, bn: FrozenBatchNorm, gn: GroupNorm) -> None:
        super().__init__()
        self.bn, self.gn, self.share = bn, gn, 0.0

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        y = self.gn(x, area)
        return y if self.share == 1 else torch.lerp(self.bn(x, area), y, self.share)


def calibrated(source: ResNet20, norm: MakeNorm, damp: float, images: Tensor) -> ResNet20:
    """Return the converted network with its GN fitted on images (N, 3, 32, 32)."""
    net = converted(source, norm, damp)
    run_twins(net, norm_layers(source), lambda: net(torch.cat([images, images])), fit=True)
    return net


def morphing(source: ResNet20, norm: MakeNorm, damp: float) -> ResNet20:
    """Return the frozen network with norms that can morph into the converted ones."""
    net = converted(source, norm, damp)
    for name, layer in norm_layers(net).items():
        net.set_submodule(name, Morph(source.get_submodule(name), layer))
    return net


def methods(source: ResNet20, norm: MakeNorm, images: Tensor) -> Rows:
    """Yield the networks of each row of the first table, for one grouping."""
    yield "copy by name", [by_name(source, norm)]
    for damp in DAMPS:
        yield f"B, damp {damp:g}", [converted(source, norm, damp)]
    for damp, count in [*((1, count) for count in CALIBRATION_SIZES), (0, 64), (2, 64), (4, 64)]:
        draws = [
            torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count] for seed in (0, 1, 2)
        ]
        yield f"B, damp {damp:g}, + C on {count}", [calibrated(source, norm, damp, images[draw]) for draw in draws]


def spread(values: list[float]) -> str:
    """Return mean and standard deviation in percent."""
    mean = f"{100 * statistics.mean(values):5.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):3.1f}" if len(values) > 1 else f"{mean}      "


def print_fidelity(source: ResNet20, images: Tensor, labels: Tensor) -> None:
    """Print the first table."""
    pool, images, labels = images[:500], images[500:], labels[500:]
    expected = predict(source, images)
    print(f"{'grouping':13} {'method':24} top-1         agreement with BN")
    print(f"{'-':13} {'BN reference':24} {spread([(expected == labels).float().mean().item()])}")
    for grouping, norm in GROUPINGS.items():
        for method, nets in methods(source, norm, pool):
            predicted = [predict(net, images) for net in nets]
            top1, agreement = ([(p == truth).float().mean().item() for p in predicted] for truth in (labels, expected))
            print(f"{grouping:13} {method:24} {spread(top1)}   {spread(agreement)}", flush=True)


def fine_tune(
    net: ResNet20, images: Tensor, labels: Tensor, *, updates: int, rate: float, momentum: float, seed: int
) -> ResNet20:
    """Train all weights and a new dense head by SGD; the rate rises over WARMUP updates and falls linearly to 0."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net.linear = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=momentum, weight_decay=1e-4, fused=True)
    epochs = -(-updates * BATCH // len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    for update, batch in enumerate(order[: updates * BATCH].split(BATCH)):
        for layer in net.modules():
            if isinstance(layer, Morph):
                layer.share = min(update / MORPH_UPDATES, 1.0)
        optimizer.param_groups[0]["lr"] = rate * min((update + 1) / WARMUP, 1) * (1 - update / updates)
        flipped = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flipped, images[batch].flip(3), images[batch])
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels[batch]).backward()
        optimizer.step()
    return net


def starts(source_of: Callable[[], ResNet20], images: Tensor) -> dict[str, Callable[[], ResNet20]]:
    """Return the starts of the fine-tunes by name; GN has 16 channels per group."""
    norm = GROUPINGS["16 channels"]
    return {
        "frozen BN": source_of,
        "B, damp 0": lambda: converted(source_of(), norm, 0),
        "B, damp 1": lambda: converted(source_of(), norm, 1),
        "B, damp 4": lambda: converted(source_of(), norm, 4),
        "B, damp 1, + C on 64": lambda: calibrated(source_of(), norm, 1, images[:64]),
        "B, damp 4, + C on 64": lambda: calibrated(source_of(), norm, 4, images[:64]),
        "Morph to B, damp 1": lambda: morphing(source_of(), norm, 1),
        "copy by name": lambda: by_name(source_of(), norm),
        "GN from random": lambda: ResNet20(norm),
    }


def print_fine_tunes(
    folder: Path, images: Tensor, labels: Tensor, *, updates: int, rates: list[float], momentum: float, seeds: list[int]
) -> None:
    """Print the second table."""
    train, test = slice(0, 1000), slice(1000, 1500)
    print(
        f"{updates} updates of {BATCH} images, momentum {momentum}, seeds {seeds}: top-1 on {len(labels[test])} images"
    )
    print(f"{'start':24} " + "".join(f"lr {rate:<12g}" for rate in rates))
    for start, build in starts(lambda: pretrained(folder), images[train]).items():
        cells = []
        for rate in rates:
            scores = []
            for seed in seeds:
                torch.manual_seed(seed)
                settings = {"updates": updates, "rate": rate, "momentum": momentum, "seed": seed}
                net = fine_tune(build(), images[train], labels[train], **settings)
                scores.append((predict(net, images[test]) == labels[test]).float().mean().item())
            cells.append(spread(scores))
        print(f"{start:24} " + "   ".join(cells), flush=True)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, required=True, help="resnet20_cifar10.safetensors, cifar10_test_1500.npz")
parser.add_argument("--updates", type=int, default=500, help="updates of each fine-tune (500); 0: no fine-tunes")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01])
parser.add_argument("--momentum", type=float, default=0.9)
options = parser.parse_args()
torch.set_num_threads(1)  # more threads are slower on pictures of 32 x 32
images, labels = read_images(options.data)
print_fidelity(pretrained(options.data), images, labels)
if options.updates:
    print()
    settings = {name: getattr(options, name) for name in ("updates", "rates", "momentum", "seeds")}
    print_fine_tunes(options.data, images, labels, **settings)
