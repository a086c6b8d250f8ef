"""Parts of the day about the training step: its time and memory beside torchvision's, syncs, kernels, compile modes.

The step is that of `python -m benchmarks step`, on pictures of 800 x 1344.
"""

import re
import statistics
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from benchmarks import step as benchmark
from benchmarks.gpu_day.checks import train_tiny
from benchmarks.gpu_day.notes import CPU, DEVICE, SIZE, WORK, Notes
from benchmarks.scene import make_scenes
from benchmarks.step import (
    BATCHES,
    STEPS,
    gndet_step,
    gndet_subject,
    near,
    step_config,
    step_memory,
    to_batch,
    torchvision_step,
    torchvision_subject,
)
from benchmarks.timing import WARM_UPS
from benchmarks.turns import Limits, Subject, Turn, Work, take_turns
from gndet.config.schema import Config
from gndet.training.memory import release

Step = Callable[[], dict[str, Tensor]]
SMALL = (  # on a CPU
    "model.backbone.depth=18", "model.fpn.channels=32", "model.box_head.regions_per_image=32",
    "model.box_head.conv_channels=32", "model.box_head.num_convs=1", "model.box_head.fc_channels=32",
    "model.mask_head.channels=32", "model.mask_head.num_convs=1",
)  # fmt: skip
ROUNDS = 1 if CPU else 6
CANVAS = (
    *(("data.shortest_edge=[96]", "data.max_edge=128") if CPU else ()),
    f"data.canvases=[[{SIZE[0]},{SIZE[1]}],[{SIZE[1]},{SIZE[0]}]]",
)
MODES = ("default",) if CPU else ("default", "reduce-overhead")  # a CPU has no CUDA graphs
LAUNCH = re.compile(r"cu(da)?Launch(Cooperative)?Kernel(Ex(C)?)?$")
PROFILED = 1 if CPU else 3  # steps


def config(batch: int, precision: str, *overrides: str) -> Config:
    """Return gndet's config for a step."""
    options = Namespace(batch=batch, precision=precision, norm="gn", device=DEVICE)
    return step_config(options, [*overrides, *(SMALL if CPU else ())])


def ours(name: str, batch: int, precision: str, *overrides: str) -> Subject:
    """Return a variant of gndet that takes turns."""
    return Subject(f"gndet {name}, {tag(batch, precision)}", ready, (config(batch, precision, *overrides), SIZE))


def ready(cfg: Config, size: tuple[int, int]) -> Work:
    """Build gndet's subject."""
    make_small()
    return gndet_subject(cfg, size)


def peer_ready(batch: int, precision: str, tuned: bool) -> Work:
    """Build torchvision's subject."""
    make_small()
    return torchvision_subject("gn", SIZE, batch, precision, DEVICE, tuned)


def make_small() -> None:
    """On a CPU, trace a step instead of generating code, and let torchvision sample fewer regions: it takes minutes."""
    if CPU:
        torch.compile = partial(torch.compile, backend="eager")
        benchmark.PeerMaskRCNN = partial(benchmark.PeerMaskRCNN, box_batch_size_per_image=32)


def theirs(batch: int, precision: str, tuned: bool = False) -> Subject:
    """Return torchvision; tuned: channels last."""
    name = f"torchvision{' channels last' if tuned else ''}, {tag(batch, precision)}"
    return Subject(name, peer_ready, (batch, precision, tuned))


def tag(batch: int, precision: str) -> str:
    """Return the end of a subject's name: subjects of one tag do the same work."""
    return f"batch {batch}, {precision}"


# --- time and memory


def steps(note: Notes) -> None:
    """Time steps of 1 and 2 pictures in turn with torchvision's, and note the memory of each."""
    subjects = [
        *(ours(memory, 1, "bf16", f"train.memory={memory}") for memory in ("fast", "balanced", "lean")),
        theirs(1, "bf16"), theirs(1, "bf16", tuned=True),
        ours("balanced", 2, "bf16"), theirs(2, "bf16"), theirs(2, "bf16", tuned=True),
        ours("balanced", 1, "float32"), theirs(1, "float32"),
    ]  # fmt: skip
    if CPU:  # torchvision's network does not become smaller
        subjects = [ours("lean", 1, "bf16", "train.memory=lean"), *subjects[-2:]]
    turns_of(note, subjects, 60)


def compiled(note: Notes) -> None:
    """Time train.compile's modes in turn with no compilation."""
    modes = [ours(f"compile={mode}", 1, "bf16", f"train.compile={mode}", *CANVAS) for mode in MODES]
    turns_of(note, [ours("compile=none", 1, "bf16"), *modes], 55)


def turns_of(note: Notes, subjects: Sequence[Subject], build_s: float) -> None:
    """Let the subjects take turns; note images/s, milliseconds and memory of each, and ratios to torchvision."""
    limits = Limits(200 if CPU else build_s, time.monotonic() + note.left, {})
    turns = take_turns(subjects, ROUNDS, threads=1 if CPU else 2, say=print, limits=limits)
    note("steps", {name: figures(name, own) for name, own in turns.items() if own})
    note("ratios", ratios(note.found["steps"]))
    for name, why in limits.lost.items():
        with note.attempt(name):
            raise RuntimeError(why[-1500:])


def figures(name: str, turns: Sequence[Turn]) -> dict[str, float]:
    """Return the figures of a subject's turns."""
    batch = int(name.partition("batch ")[2].partition(",")[0])
    ms = [turn.wall_s / STEPS[DEVICE] * 1e3 for turn in turns]
    last = turns[-1].facts
    found = {"ms": statistics.median(ms), "least ms": min(ms), "images/s": batch * 1e3 / statistics.median(ms)}
    memory = {"peak MiB": last.get("CUDA MiB", 0.0), "first step's peak MiB": last.get("first CUDA MiB", 0.0)}
    return {key: round(value, 2) for key, value in (found | memory | {"loss": last["loss"]}).items()}


def ratios(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return gndet's images/s and memory over those of the faster torchvision with the same work."""
    table = {}
    for name, own in found.items():
        work = name.partition(", ")[2]
        peers = [peer for other, peer in found.items() if other.startswith("torchvision") and other.endswith(work)]
        if name.startswith("gndet") and peers:
            best = max(peers, key=lambda peer: peer["images/s"])
            memory = own["peak MiB"] / best["peak MiB"] if best["peak MiB"] else 0.0
            table[name] = {"x images/s": round(own["images/s"] / best["images/s"], 3), "x memory": round(memory, 3)}
    return table


def compile_ahead(note: Notes) -> None:
    """Compile both modes once while other parts run, so that `compiled` finds most in Inductor's cache."""
    make_small()
    for mode in MODES:
        with note.attempt(mode):
            began = time.monotonic()
            update = gndet(config(1, "bf16", f"train.compile={mode}", *CANVAS))
            for _ in range(WARM_UPS[DEVICE]):
                update()
            note(f"seconds until 3 steps with {mode}", round(time.monotonic() - began, 1))


# --- syncs and kernels


def profile(note: Notes) -> None:
    """Note the host syncs of a step by place, launches, the GPU's busy share, the longest kernels, memory by part."""
    make_small()
    variants = {
        "gndet balanced": partial(gndet, config(1, "bf16")),
        "torchvision": partial(torchvision_step, "gn", SIZE, 1, "float32" if CPU else "bf16", DEVICE, False),
    }
    for name, build in variants.items():
        with note.attempt(name):
            update = build()
            for _ in range(WARM_UPS[DEVICE]):
                update()
            with counted_syncs() as syncs:
                update()
            note(f"syncs of {name}", {"per step": syncs.total(), "places": dict(syncs.most_common(15))})
            note(f"kernels of {name}", profiled(update))
            del update
            release(torch.device(DEVICE))
    for memory in ("balanced", "lean"):
        with note.attempt(f"memory by part, {memory}"):
            cfg = config(1, "bf16", f"train.memory={memory}")
            note(f"memory by part, {memory}", step_memory(cfg, SIZE).splitlines())


def gndet(cfg: Config) -> Step:
    """Return gndet's step."""
    scenes = [make_scenes(SIZE, cfg.train.global_batch, number) for number in range(BATCHES)]
    return gndet_step(cfg, [to_batch(some) for some in scenes], [near(some) for some in scenes])[1]


@contextmanager
def counted_syncs() -> Iterator[Counter[str]]:
    """Count, by place, how often the host waits for the GPU inside the context; the counter is filled at its end."""
    places: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not CPU:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if not CPU:
                torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            path = Path(warning.filename)
            places[f"{path.parent.name}/{path.name}:{warning.lineno}"] += 1


def waits(note: Notes) -> None:
    """Count the host syncs per update of whole runs: the difference between a long and a short one."""
    short, long = (2, 4) if CPU else (20, 60)
    common = ("train.log_every=10", "train.checkpoint_every=0", "train.vis_images=0")
    counts = {}
    train_tiny(WORK / "waits-first", "train.schedule.updates=2", *common)  # sets up libraries and kernels
    for updates in (short, long):
        with counted_syncs() as places:
            train_tiny(WORK / f"waits-{updates}", f"train.schedule.updates={updates}", *common)
        counts[updates] = places
    note("per update", round((counts[long].total() - counts[short].total()) / (long - short), 3))
    note("places", dict((counts[long] - counts[short]).most_common(20)))


def profiled(update: Step) -> dict[str, object]:
    """Return launches, the GPU's busy time, and the kernels and operators that take most of a step."""
    activities = [ProfilerActivity.CPU, *([] if CPU else [ProfilerActivity.CUDA])]
    with torch.profiler.profile(activities=activities, acc_events=True) as seen:
        began = time.perf_counter()
        for _ in range(PROFILED):
            update()
        if not CPU:
            torch.cuda.synchronize()
        wall = (time.perf_counter() - began) / PROFILED
    kernels, operators = {}, {}
    launches = graphs = 0.0
    for event in seen.key_averages():
        count = event.count / PROFILED
        if LAUNCH.match(event.key):
            launches += count
        graphs += count if "cudaGraphLaunch" in event.key else 0
        if str(event.device_type).endswith("CUDA"):
            kernels[event.key] = (event.self_device_time_total / PROFILED / 1e3, count)
        else:
            operators[event.key] = (event.self_cpu_time_total / PROFILED / 1e3, count)
    busy = sum(ms for ms, _ in kernels.values())
    return {
        "launches": round(launches), "graph launches": round(graphs, 1), "busy ms": round(busy, 2),
        "wall ms, profiled": round(wall * 1e3, 2), "busy share": round(busy / wall / 1e3, 3),
        "kernels (ms, count)": longest(kernels, 28), "operators by host (ms, count)": longest(operators, 15),
    }  # fmt: skip


def longest(table: Mapping[str, tuple[float, float]], num: int) -> list[tuple[str, float, float]]:
    """Return the rows that take most time."""
    rows = sorted(table.items(), key=lambda item: -item[1][0])[:num]
    return [(name[:90], round(ms, 3), round(count, 1)) for name, (ms, count) in rows]
