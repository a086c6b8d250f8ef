"""Measure how cost grows with the size of the data set, the length of the run, and the number of ranks.

    python -m benchmarks.scale images FOLDER [--counts 1000,10000,118000]   start-up, and input pipeline per image
    python -m benchmarks.scale updates FOLDER [--updates 2000]              memory, and time per update
    python -m benchmarks.scale processes [--size 320x416] [--rounds 3]      two gloo ranks compared with one
    python -m benchmarks.scale cluster [--step-ms 100] [--steps 8]          8 GPUs and several nodes (calculated)

The first two draw FOLDER/images.png and FOLDER/updates.png.
"""

import argparse
import json
import subprocess
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import NamedTuple

import matplotlib
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.coco_sized import make
from benchmarks.report import machine
from benchmarks.scene import CLASSES, NEAR, make_scenes
from benchmarks.step import SETTINGS, guide, near, to_batch
from gndet.cli.arguments import height_and_width
from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.loading import config_from_dict, load_config
from gndet.data.batches.stream import train_batches
from gndet.data.datasets.reading import read_dataset
from gndet.distributed.children import python_command, safe_children
from gndet.distributed.process import Process, keep_freed_memory, place
from gndet.modeling.build import build_model
from gndet.training.gradient_buckets import Buckets, sum_gradients
from gndet.training.optim import make_optimizer
from gndet.training.update import backward

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OBJECTS = 860 / 118  # per image, COCO's mean
GLOBAL_BATCH = 2  # images per update of the tiny detector
TINY = (
    "device=cpu", f"train.global_batch={GLOBAL_BATCH}", "train.images_per_gpu=1", "train.log_every=20",
    "train.eval_every=0", "train.checkpoint_every=200", "train.report=false", "data.train.count=200",
    "data.train.size=64",
    "data.val.count=3", "data.val.size=64", "data.shortest_edge=[64]", "data.shortest_edge_test=64",
    "model.fpn.channels=32", "model.box_head.fc_channels=32",
)  # fmt: skip
LOADED = 64  # images that the input pipeline is timed on


# --- the data set


def images(folder: Path, counts: list[int]) -> None:
    """Time opening data sets of these sizes, cold and from the cache, and the input pipeline on each."""
    rows = []
    for count in counts:
        home = folder / str(count)
        make(home, count, int(count * OBJECTS))
        with tempfile.TemporaryDirectory() as cache:
            data = DataConfig(root=str(home), cache=cache, workers=0)
            cold, _ = timed_read(data)
            cached, train_set = timed_read(data)
        began = time.process_time()
        stream = train_batches(
            train_set, data, seed=0, start=0, stop=LOADED, images_per_gpu=1, global_batch=1, rank=0, world=1,
            masks=True, pin_memory=False,
        )  # fmt: skip
        next(stream)
        first = time.process_time() - began
        began = time.process_time()
        loaded = sum(len(batch.batch.images) for batch in stream)
        rows.append((count, cold, cached, first, (time.process_time() - began) / loaded * 1e3))
        print(
            f"{count:7,d} images: opened in {cold:.2f} s, again in {cached:.3f} s; first batch {first:.3f} s CPU, then "
            f"{rows[-1][-1]:.2f} ms per image",
            flush=True,
        )
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    counted, cold, cached, first, each = zip(*rows, strict=True)
    left.loglog(counted, cold, "o-", label="opened")
    left.loglog(counted, cached, "o-", label="opened again")
    left.loglog(counted, first, "o-", label="first batch")
    left.set(xlabel="images", ylabel="s", title="start")
    left.legend()
    right.semilogx(counted, each, "o-")
    right.set(xlabel="images", ylabel="CPU ms per image", title="input pipeline", ylim=(0, 1.2 * max(each)))
    figure.savefig(folder / "images.png", dpi=120)


def timed_read(data: DataConfig) -> tuple[float, object]:
    """Read and check the synthetic file; return the seconds it took and the data set."""
    began = time.perf_counter()
    dataset = read_dataset(DatasetConfig(annotations="train.json", images="train"), data)
    return time.perf_counter() - began, dataset


# --- the run


def updates(folder: Path, number: int) -> None:
    """Train a tiny detector for `number` updates, and show how its memory and speed develop."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"out={folder / 'run'}", f"train.schedule.updates={number}"]
    command = python_command("gndet.cli", "train", "configs/quickstart.yaml", "--fresh", *TINY, *words)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    update = [line["update"] for line in lines]
    memory = [line["memory_mib"] for line in lines]
    each = [1e3 * GLOBAL_BATCH / line["images_per_s"] for line in lines]
    quarter = len(lines) // 4
    for name, values in (("peak memory, MiB", memory), ("ms per update", each)):
        parts = [f"{median(values[i * quarter : (i + 1) * quarter]):.1f}" for i in range(4)]
        print(f"{name}: medians of the four quarters {', '.join(parts)}")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(update, memory)
    left.set(xlabel="update", ylabel="MiB", title="peak memory so far", ylim=(0, 1.2 * max(memory)))
    right.plot(update, each, lw=0.8)
    right.set(xlabel="update", ylabel="ms", title="time per update", ylim=(0, 2 * median(each)))
    figure.savefig(folder / "updates.png", dpi=120)


# --- the ranks


def processes(size: tuple[int, int], rounds: int) -> None:
    """Time an update of 2 images on one rank, and on two: without all-reduce, with it at the end, and overlapped."""
    print(f"update of 2 images of {size[0]}x{size[1]}, R50-FPN GN, 1 thread per rank; {machine(1)}")
    alone = 0.0
    for name, world, how in (
        ("1 rank, 2 images", 1, "none"), ("2 ranks, no all-reduce", 2, "none"),
        ("2 ranks, all-reduce at the end", 2, "end"), ("2 ranks, all-reduce overlapped", 2, "meanwhile"),
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, safe_children():
            mp.spawn(timed_updates, (world, how, size, rounds, Path(folder)), nprocs=world)
            whole, waited = torch.load(Path(folder, "times"))
        alone = alone or median(whole)
        efficiency = alone / median(whole) / world
        print(
            f"{name:32s} {median(whole):7.2f} s, waited {median(waited):.3f} s, efficiency {efficiency:.0%}", flush=True
        )


def timed_updates(rank: int, world: int, how: str, size: tuple[int, int], rounds: int, folder: Path) -> None:
    """Run one rank: time its updates, and how long each waits for the all-reduce."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    proc, train = Process(rank, world, torch.device("cpu")), {"global_batch": 2, "images_per_gpu": 1}
    cfg = config_from_dict({"model": SETTINGS["gn"], "train": train, "device": "cpu"}, "benchmarks/scale.py")
    torch.manual_seed(0)
    model, autocast = place(build_model(cfg.model, CLASSES).train(), "float32", proc)
    scenes = make_scenes(size, 2, 0)
    guide(model, near(scenes[:1]), NEAR)
    batches = [to_batch([scene]) for scene in scenes[rank::world]]
    optimizer = make_optimizer(cfg.train.optimizer, model)
    buckets = Buckets(model, proc) if how == "meanwhile" else None
    times = []
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        buckets.clear() if buckets else model.zero_grad()
        backward(model, autocast, batches, 1, cfg, last=buckets.sending if buckets else nullcontext)
        computed = time.perf_counter()
        if buckets:
            buckets.finish()
        elif how == "end":
            sum_gradients(model, proc)
        waited = time.perf_counter() - computed
        optimizer.step()
        times.append((time.perf_counter() - began, waited))
    if proc.first:
        torch.save(tuple(zip(*times[1:], strict=True)), folder / "times")
    dist.destroy_process_group()


# --- the cluster


class Link(NamedTuple):
    """A connection between GPUs or nodes."""

    name: str
    gigabytes: float  # per second and direction, of which `share` is reached
    members: int
    share: float = 0.8


CONFIGS = ("configs/mask_rcnn_r50_fpn_scratch_gn_3x.yaml", "configs/quickstart.yaml")
COCO_CLASSES, SHAPES = 80, 4  # of their data
LINKS = (
    Link("8 GPUs, NVLink 4", 450, 8), Link("8 GPUs, PCIe 4 x16", 31.5, 8),
    Link("2 nodes, 400 Gb/s", 50, 2), Link("4 nodes, 100 Gb/s", 12.5, 4), Link("2 nodes, 10 Gb/s", 1.25, 2),
    Link("4 nodes, 10 Gb/s", 1.25, 4),
)  # fmt: skip


def cluster(step_ms: float, steps: int) -> None:
    """Calculate, from bytes and link rates, what the gradient all-reduce would cost between GPUs and nodes.

    A ring sends 2 (n - 1) / n of the bytes over each link, in each direction at once; several nodes form a ring of
    nodes.  The backward pass is assumed to take two thirds of a step and to hide everything but the last bucket.
    steps: accumulated per update in the last column.
    """
    for name in CONFIGS:
        size, last = gradient_bytes(name)
        print(f"{name}: {size / 1e6:.1f} MB of gradients per update, of which {last / 1e6:.1f} MB in the last bucket")
    size, last = gradient_bytes(CONFIGS[0])
    print(f"calculated for the first, not measured: {step_ms:g} ms per step on one GPU")
    for link in LINKS:
        rate = link.gigabytes * link.share * 1e9
        ring = 2 * (link.members - 1) / link.members
        whole, final = (1e3 * ring * part / rate for part in (size, last))
        exposed = max(final, whole - step_ms * 2 / 3)
        print(
            f"{link.name:22s} {ring * size / 1e6:4.0f} MB per link, {whole:8.1f} ms for the all-reduce, "
            f"{exposed:7.1f} ms not hidden: efficiency {step_ms / (step_ms + exposed):.0%} (at the end of the step: "
            f"{step_ms / (step_ms + whole):.0%}; {steps} steps per update: "
            f"{steps * step_ms / (steps * step_ms + exposed):.0%})"
        )


def gradient_bytes(config: str) -> tuple[int, int]:
    """Return the bytes of a model's gradients, which each update sums, and of its last bucket."""
    cfg = load_config(config, [])
    classes = SHAPES if cfg.data.train.kind == "shapes" else COCO_CLASSES
    buckets = Buckets(build_model(cfg.model, classes), Process(0, 1, torch.device("cpu"))).buckets
    return sum(bucket.flat.nbytes for bucket in buckets), buckets[-1].flat.nbytes


def main() -> None:
    """Parse the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("images")
    part.add_argument("folder", type=Path)
    part.add_argument("--counts", default="1000,10000,118000")
    part = parts.add_parser("updates")
    part.add_argument("folder", type=Path)
    part.add_argument("--updates", type=int, default=2000)
    part = parts.add_parser("processes")
    part.add_argument("--size", type=height_and_width, default=(320, 416))
    part.add_argument("--rounds", type=int, default=3)
    part = parts.add_parser("cluster")
    part.add_argument("--step-ms", type=float, default=100.0)
    part.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    if options.part == "images":
        images(options.folder, [int(count) for count in options.counts.split(",")])
    elif options.part == "updates":
        updates(options.folder, options.updates)
    elif options.part == "processes":
        processes(options.size, options.rounds)
    else:
        cluster(options.step_ms, options.steps)


if __name__ == "__main__":
    main()
