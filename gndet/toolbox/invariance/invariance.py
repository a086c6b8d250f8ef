"""`gndet invariance`: show on a user's images and model that an image trains the same whatever else is in its batch.

The images run one by one, each on its own canvas, then in other arrangements, then on two ranks.  The results are
compared: features, losses, sampled anchors and regions, gradients.  The proof is in float64, in which rounding flips
no choice; float32 (without TF32), and bf16 on a GPU, are shown next to it.
"""

import functools
import itertools
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple, cast

import safetensors.torch
import torch
from pydantic_core import to_json
from torch import Tensor

from gndet.config.schema import Config
from gndet.data.batches.stream import micro_batches
from gndet.data.batches.transforms import Sample
from gndet.data.datasets.reading import read_dataset
from gndet.distributed.collectives import all_reduce_sum
from gndet.distributed.process import Process, spawn
from gndet.errors import ConfigError, out_of_memory
from gndet.files import write_whole
from gndet.modeling.build import build_model
from gndet.modeling.classifier import Classifier
from gndet.modeling.detection_model import DetectionModel
from gndet.modeling.image_model import ImageModel
from gndet.text import text_table
from gndet.toolbox.invariance.leaks import COUPLINGS, Leak, find_leaks, kept_statistics
from gndet.toolbox.invariance.measure import (
    COSINE,
    RELATIVE,
    Difference,
    Flips,
    batch_of,
    compare,
    difference,
    flips,
    largest_difference,
    measure,
    parameter_groups,
)
from gndet.toolbox.invariance.samples import choose_samples, wider_mate, within_memory
from gndet.training.gradient_buckets import sum_gradients
from gndet.training.memory import free_memory, release
from gndet.training.update import backward
from gndet.weights.load import initial_model

MIN_IMAGES, MAX_IMAGES = 4, 16
MODEL, RESULT = "model.safetensors", "result.safetensors"  # files that two ranks share
REMEDIES = {
    "padding": "norm: {padding: masked} keeps the padding out of gn, ln, in and frozen_bn; bn cannot do this",
    "batch statistics": "norm: {kind: gn}, or ln, in, frozen_bn, does not mix the images of a batch",
    "sampling": "anchors_in_padding: false and anchor_stride: level, in model.rpn or model.dense; in code of your own, "
    "draw random numbers with ops.matching.ranks, keyed by the image's key and the candidate's id",
    "normalizer": "divide an image's loss by a number that depends on that image alone",
}


Differences = dict[str, dict[str, Difference]]  # {arrangement: {what: Difference}}


class Report(NamedTuple):
    """The outcome of `check_invariance`."""

    differences: dict[str, Differences]  # by dtype
    flips: dict[str, dict[str, Flips]]  # {dtype: {arrangement: decisions that differ}}
    leaks: list[Leak]

    @property
    def passed(self) -> bool:
        """Whether float64 shows nothing but rounding and no coupling was found."""
        proof = self.differences["float64"].values()
        flipped = any(flips["choices"][0] for flips in self.flips["float64"].values())
        return not (flipped or self.leaks) and all(diff.small for column in proof for diff in column.values())


def check_invariance(cfg: Config, num: int, proc: Process, show: Callable[[str], None]) -> Report:
    """Compare num images of data.train in all arrangements.

    show: called with each line as soon as it is known.  Raises ConfigError if num is not in 4 to 16, under torchrun
    with several ranks, and if memory runs out; DataError if the data set is broken or has fewer training images.
    """
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return _check(cfg, num, proc, show)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        release(proc.device)
        regions = "model.box_head.regions_per_image, " if cfg.model.region_heads else ""
        raise ConfigError(
            f"out of memory ({error}); lower data.max_edge, data.shortest_edge, {regions}or --images"
        ) from None


def _check(cfg: Config, num: int, proc: Process, show: Callable[[str], None]) -> Report:
    if not MIN_IMAGES <= num <= MAX_IMAGES:
        raise ConfigError(f"--images: {num}, expected {MIN_IMAGES} to {MAX_IMAGES}")
    if proc.world > 1:
        raise ConfigError("gndet invariance starts its two ranks itself; run it without torchrun")
    dataset = read_dataset(cfg.data.train, cfg.data)
    # with a threshold of 0 there are detections to compare; training does not read it
    cfg = cfg.model_copy(update={"model": cfg.model.with_score_threshold(0.0)})
    model, cfg, notes, _ = initial_model(cfg, dataset.classes, images=dataset)
    model = model.to(proc.device).to(memory_format=torch.channels_last).train()
    if proc.device.type == "cuda":
        cfg = within_memory(model, dataset, cfg, num, free_memory(proc.device), show)
    samples = choose_samples(dataset, cfg, num)
    show(f"{num} images of {dataset.name}: " + ", ".join("x".join(map(str, s.image.shape[1:])) for s in samples))
    for note in [*notes, f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"]:
        show(note)
    report = Report({}, {}, [])
    precisions: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager]]] = {
        "float64": (torch.float64, nullcontext),
        "float32": (torch.float32, nullcontext),
    }
    if proc.device.type == "cuda":
        precisions["bf16"] = (torch.float32, functools.partial(torch.autocast, "cuda", torch.bfloat16))
    for name, (dtype, autocast) in precisions.items():
        model = model.to(dtype)
        report.differences[name], report.flips[name] = compare_arrangements(
            model, samples, cfg, autocast, functools.partial(_say_arrangement, show, name)
        )
        if name == "float64":
            compare_detections(report.differences[name], model, samples, cfg)
            report.differences[name]["2 processes"] = compare_two_processes(model, samples, len(dataset.classes), cfg)
        show(f"\n{name}: relative difference and 1 - cosine to each image alone\n{differences_table(report, name)}")
    model = model.to(torch.float64)
    everyone = [*samples, wider_mate(samples, cfg.model.masks)]
    singles = [batch_of([sample], model, cfg) for sample in everyone]
    report.leaks.extend(find_leaks(model, singles, batch_of(everyone, model, cfg)))
    show(f"\n{verdict(report)}")
    return report


def arrangements(num: int) -> dict[str, list[list[int]]]:
    """Return the batches of each arrangement as lists of image numbers.

    Image number num is the wider one, whose losses do not count.
    """
    images = list(range(num))
    return {
        "together": [images],
        "in twos": [images[first : first + 2] for first in range(0, num, 2)],
        f"1 and {num - 1}": [images[:1], images[1:]],
        "permuted": [images[::-1]],
        "beside a wider": [[*images, num]],
    }


def _say_arrangement(show: Callable[[str], None], precision: str, arrangement: str) -> None:
    show(f"... {precision}, {arrangement}")


def compare_arrangements(
    model: ImageModel,
    samples: list[Sample],
    cfg: Config,
    autocast: Callable[[], AbstractContextManager],
    begin: Callable[[str], None],
) -> tuple[Differences, dict[str, Flips]]:
    """Run the images alone and in every arrangement.  begin: called with the name of each arrangement.

    Returns {arrangement: {quantity: difference}} and {arrangement: flipped decisions}.
    """
    num, everyone = len(samples), [*samples, wider_mate(samples, cfg.model.masks)]
    begin("each alone")
    alone = measure(model, everyone, [[i] for i in range(num)], cfg, autocast)
    differences, flipped = {}, {}
    for name, batches in arrangements(num).items():
        begin(name)
        got = measure(model, everyone, batches, cfg, autocast)
        differences[name] = compare(got, alone)
        flipped[name] = flips(got, alone)
        del got  # otherwise it would be kept while the next arrangement is measured
    return differences, flipped


def compare_detections(differences: Differences, model: ImageModel, samples: list[Sample], cfg: Config) -> None:
    """Add the differences between detections, or logits, of images in a batch and of each image alone."""
    num, everyone = len(samples), [*samples, wider_mate(samples, cfg.model.masks)]

    def detected(places: list[int]) -> list[Tensor]:
        batch = batch_of([everyone[i] for i in places], model, cfg)
        if isinstance(model, Classifier):
            return list(model.classify(batch.images, batch.sizes, batch.padded))[:num]
        found = cast(DetectionModel, model).detect(batch.images, batch.sizes, batch.padded)
        parts = [found.boxes, found.scores[..., None], found.labels[..., None], found.masks.flatten(2)]
        return list(torch.cat([part.double() for part in parts], dim=-1).flatten(1))[:num]

    model.eval()
    alone = [detected([i])[0] for i in range(num)]
    for name, places in (("together", list(range(num))), ("beside a wider", list(range(num + 1)))):
        what = "logits" if isinstance(model, Classifier) else "detections"
        differences[name][what] = largest_difference(detected(places), alone)
    model.train()


def compare_two_processes(
    model: ImageModel, samples: list[Sample], num_classes: int, cfg: Config
) -> dict[str, Difference]:
    """Compare losses and gradients of one rank, image by image, with those of two ranks that share the images."""
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"global_batch": len(samples)})})
    device = model.device
    release(device)  # the two ranks may have to share this process's GPU
    with tempfile.TemporaryDirectory() as folder:
        _save(model.state_dict(), folder, MODEL)
        spawn(share_of_two, 2, device.type, samples, num_classes, cfg, folder)
        got = {name: tensor.to(device) for name, tensor in safetensors.torch.load_file(f"{folder}/{RESULT}").items()}
    singles = [batch_of([sample], model, cfg) for sample in samples]
    model.zero_grad()
    with kept_statistics(model):
        expected = backward(model, nullcontext, singles, 1, cfg) | parameter_groups(model)
    model.zero_grad()
    return {name: difference(got[name], value) for name, value in expected.items()}


def share_of_two(proc: Process, samples: list[Sample], num_classes: int, cfg: Config, folder: str) -> None:
    """Run as one of two ranks: process its share of the images in one batch; rank 0 writes the sum of both ranks."""
    model = build_model(cfg.model, num_classes).to(proc.device, torch.float64)
    model = model.to(memory_format=torch.channels_last)
    model.load_state_dict(safetensors.torch.load_file(f"{folder}/{MODEL}"))
    (share,) = micro_batches(len(samples), len(samples), proc.rank, proc.world)
    batch = batch_of([samples[i] for i in share], model.train(), cfg)
    losses = backward(model, nullcontext, [batch], len(share), cfg)
    sum_gradients(model, proc)
    losses = {name: all_reduce_sum(loss, proc) for name, loss in losses.items()}
    if proc.first:
        _save(losses | parameter_groups(model), folder, RESULT)


def _save(tensors: dict[str, Tensor], folder: str, name: str) -> None:
    copies = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    write_whole(Path(folder) / name, safetensors.torch.save(copies))


def differences_table(report: Report, dtype: str) -> str:
    """Return a table with a line per quantity and a column per arrangement, and the number of flipped decisions."""
    columns = report.differences[dtype]
    rows = [["", *columns]]
    for name in dict.fromkeys(itertools.chain.from_iterable(columns.values())):
        cells = [f"{d.relative:.0e} {d.cosine:.0e}" if (d := column.get(name)) else "" for column in columns.values()]
        rows.append([name, *cells])
    for kind in ("choices", "ReLUs"):
        counts = [report.flips[dtype][name][kind] if name in report.flips[dtype] else () for name in columns]
        rows.append([f"{kind} that flip", *(" of ".join(f"{count:,}" for count in pair) for pair in counts)])
    return text_table(rows)


def verdict(report: Report) -> str:
    """Say whether the check passed, and if not, what leaks, where it first shows, and how to fix it."""
    bounds = f"relative difference below {RELATIVE:.0e}, 1 - cosine below {COSINE:.0e}"
    if report.passed:
        lines = [
            f"passed: an image trains the same whatever else is in its batch (float64: {bounds}, the same choices)"
        ]
    else:
        lines = [f"failed: how an image trains depends on what else is in its batch (expected in float64: {bounds})"]
    leaking = {leak.coupling: leak for leak in report.leaks}
    for coupling in COUPLINGS:
        if leak := leaking.get(coupling):
            lines.append(f"  {coupling} leaks, first at {leak.where}")
            lines.append(f"    by {leak.difference:.1e}; {REMEDIES[coupling]}")
        else:
            lines.append(f"  {coupling}: no leak")
    if not report.passed and not report.leaks:
        lines.append("  the cause is none of these couplings")
    return "\n".join(lines)


def json_report(report: Report) -> str:
    """Return the whole report as JSON; NaN and infinity, which JSON lacks, become null."""
    leaks = [leak._asdict() for leak in report.leaks]
    parts = {"passed": report.passed, "differences": report.differences, "flips": report.flips, "leaks": leaks}
    return to_json({"gndet": "invariance"} | parts, indent=1, inf_nan_mode="null").decode()
