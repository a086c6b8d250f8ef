"""Measure what it costs to keep padding out of the norms: a training step and its norm layers, masked and plain.

    python -m benchmarks.masked_norm [CONFIG] [--edge 320] [--rounds 7] [--device cuda]

There are two batches of two noise pictures: two of one size (no padding), and a portrait with a landscape (a third of
the canvas is padding). The variants take turns, so that a busy moment affects both, and their median times are shown.
On a GPU a layer's time is that of a CUDA graph, without launches.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from benchmarks.timing import as_graph, in_turn
from gndet.config.loading import load_config
from gndet.config.schema import Config
from gndet.data.batches.batch import collate
from gndet.data.batches.transforms import Sample
from gndet.data.records import MASK_SIDE
from gndet.distributed.process import place, process
from gndet.modeling.build import build_model
from gndet.modeling.detection_model import DetectionModel
from gndet.modeling.norms.layers import GroupNorm
from gndet.modeling.norms.valid_area import ValidArea
from gndet.structures import Batch
from gndet.training.update import backward, to_device


def noise_batch(sizes: list[tuple[int, int]]) -> Batch:
    """Return a batch of noise pictures of the given (height, width) with 8 objects each."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number, (height, width) in enumerate(sizes):
        corners = torch.rand(8, 2, generator=generator) * 0.7 * torch.tensor([width, height])
        boxes = torch.cat([corners, corners + 0.25 * torch.tensor([width, height])], dim=1)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        masks = torch.ones(8, MASK_SIDE, MASK_SIDE, dtype=torch.bool)
        samples.append(Sample(image, boxes, torch.zeros(8, dtype=torch.int64), masks, number))
    return collate(samples, 32)


def medians(plain: Callable[[], object], masked: Callable[[], object], rounds: int, device: str) -> dict[str, float]:
    """Run both variants in turn; return the median milliseconds of each."""
    times = in_turn([plain, masked], device, rounds)
    return {name: statistics.median(own) * 1e3 for name, own in zip(("plain", "masked"), times, strict=True)}


def step_times(
    cfg: Config, model: DetectionModel, autocast: Callable[[], AbstractContextManager], batch: Batch, rounds: int
) -> dict[str, float]:
    """Return the milliseconds of the model's forward and backward pass with masked and with plain norms."""
    layers = [module for module in model.modules() if isinstance(module, GroupNorm)]

    def run(masked: bool) -> None:
        for layer in layers:
            layer.masked = masked
        model.zero_grad()
        backward(model, autocast, [batch], len(batch.images), cfg)

    return medians(lambda: run(False), lambda: run(True), rounds, batch.images.device.type)


def layer_times(batch: Batch, channels: int, stride: int, rounds: int) -> dict[str, float]:
    """Return the milliseconds of one GN, forward and backward, on maps of a stride."""
    device = batch.images.device
    height, width = (-(-edge // stride) for edge in batch.images.shape[2:])
    x = torch.randn(len(batch.images), channels, height, width, device=device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    area = ValidArea.of((batch.sizes + stride - 1) // stride, height, width) if batch.padded else None
    layer, out = GroupNorm(channels, 32, 1e-5, masked=True).to(device), torch.randn_like(x)

    def run(masked: bool) -> None:
        layer.masked = masked
        layer(x, area).backward(out)

    plain, masked = (as_graph([partial(run, masked)], device.type) for masked in (False, True))
    return medians(plain, masked, rounds, device.type)


def main() -> None:
    """Print a line per part and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/mask_rcnn_r50_fpn_scratch_gn_3x.yaml")
    parser.add_argument("--edge", type=int, default=320, help="shorter edge of the pictures, pixels (320)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args()
    cfg = load_config(options.config)
    short, long = options.edge, options.edge * 3 // 2
    with process(options.device) as proc:
        model, autocast = place(build_model(cfg.model, 80).train(), cfg.train.precision, proc)
        print(f"{options.config} on {proc.device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        for name, sizes in (("nothing padded", [(short, long)] * 2), ("padded", [(short, long), (long, short)])):
            batch = to_device(noise_batch(sizes), proc.device)
            rows = {"step": step_times(cfg, model, autocast, batch, options.rounds)}
            for channels, stride in ((64, 2), (256, 4), (512, 8), (1024, 16)):
                rows[f"GN {channels} at stride {stride}"] = layer_times(batch, channels, stride, options.rounds)
            for part, ms in rows.items():
                more = 100 * (ms["masked"] / ms["plain"] - 1)
                print(
                    f"{name:15} {part:22} plain {ms['plain']:9.2f} ms   masked {ms['masked']:9.2f} ms   {more:+6.1f} %"
                )


if __name__ == "__main__":
    main()
