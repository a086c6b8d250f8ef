"""Compare gndet's gradient buckets with torch's DistributedDataParallel on equal work: two gloo ranks, one thread each.

    python -m benchmarks.gradients speed [--config FILE] [--size 192x256] [--rounds 5]   bits, time and memory
    python -m benchmarks.gradients faults                                         what each does when a rank is special

An update has two images per rank, one at a time.  DistributedDataParallel has the options that suit it best:
no_sync() while it accumulates, gradient_as_bucket_view, and a hook that sums instead of averaging; with static_graph
its first update is one image, because its first backward pass must not be within no_sync().
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.report import machine
from benchmarks.scene import CLASSES, make_scenes
from benchmarks.step import to_batch
from gndet.cli.arguments import height_and_width
from gndet.config.loading import load_config
from gndet.config.schema import Config
from gndet.distributed.children import safe_children
from gndet.distributed.process import Process, keep_freed_memory, place
from gndet.modeling.build import build_model
from gndet.structures import Batch
from gndet.training.gradient_buckets import Buckets
from gndet.training.memory import MIB

WAYS = ("gndet's buckets", "DDP, static_graph", "DDP")
LIMIT_S = 10.0  # for a collective; a case that needs longer would wait for ever
IMAGES = 2  # per rank and update


class Way(NamedTuple):
    """A way to sum gradients over the ranks while the last backward pass of an update runs."""

    model: nn.Module
    forward: Callable[[Batch], dict[str, Tensor]]
    clear: Callable[[], None]
    accumulating: Callable[[], AbstractContextManager[Any]]  # around forward and backward of all parts but the last
    sending: Callable[[], AbstractContextManager[Any]]  # around the last backward
    finish: Callable[[], None]


def by_buckets(model: nn.Module, proc: Process) -> Way:
    """Return gndet's way."""
    buckets = Buckets(model, proc)
    return Way(model, model, buckets.clear, nullcontext, buckets.sending, buckets.finish)


def by_ddp(model: nn.Module, proc: Process, static_graph: bool = False) -> Way:
    """Return torch's way."""
    wrapped = DistributedDataParallel(
        model, static_graph=static_graph, gradient_as_bucket_view=True, broadcast_buffers=False
    )
    wrapped.register_comm_hook(None, summed)
    return Way(model, wrapped, model.zero_grad, wrapped.no_sync, nullcontext, lambda: None)


def summed(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket; by default DistributedDataParallel divides it by the number of ranks first."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


MAKE = dict(zip(WAYS, (by_buckets, partial(by_ddp, static_graph=True), by_ddp), strict=True))


def update(way: Way, batches: Sequence[Batch], before: Callable[[int], None] = lambda part: None) -> float:
    """Compute an update's gradient, summed over the ranks.  Returns the seconds of waiting after the last backward.

    DistributedDataParallel waits within the backward pass.
    before(part): called before each backward pass.
    """
    way.clear()
    for part, batch in enumerate(batches):
        is_last = part == len(batches) - 1
        with nullcontext() if is_last else way.accumulating():
            losses = way.forward(batch)
            before(part)
            with way.sending() if is_last else nullcontext():
                sum(loss.sum() for loss in losses.values()).backward()
    computed = time.perf_counter()
    way.finish()
    return time.perf_counter() - computed


def make(name: str, cfg: Config, proc: Process, size: tuple[int, int]) -> tuple[Way, list[Batch]]:
    """Return a way with its own model, the same for every way, and this rank's batches of one image."""
    torch.manual_seed(0)
    model, _ = place(build_model(cfg.model, CLASSES).train(), "float32", proc)
    scenes = make_scenes(size, IMAGES * proc.world, 0)
    return MAKE[name](model, proc), [to_batch([scene]) for scene in scenes[proc.rank :: proc.world]]


def join(rank: int, folder: Path, limit_s: float) -> Process:
    """Join the two ranks."""
    torch.set_num_threads(1)
    keep_freed_memory()
    meeting = f"file://{folder}/rendezvous"
    limit = timedelta(seconds=limit_s)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    return Process(rank, 2, torch.device("cpu"))


def flat(model: nn.Module) -> Tensor:
    """Return all gradients as one vector; zeros for parameters without one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


# --- speed


def speed(config: str, size: tuple[int, int], rounds: int) -> None:
    """Print bits, time and memory of all ways."""
    print(f"{config}, pictures of {size[0]}x{size[1]}, {IMAGES} x 1 image per rank and update; {machine(1)}")
    timed = launch(time_all, config, size, rounds)
    equal, count = timed["equal"], timed["count"]
    print(f"gradients of {count / 1e6:.1f} M parameters: {'equal' if equal else 'NOT equal'} in every bit")
    for name in WAYS:
        whole, busy, waited = zip(*timed[name], strict=True)
        peak = launch(peak_mib, config, size, name)
        print(
            f"{name:18s} {median(whole):6.2f} s ({min(whole):.2f} to {max(whole):.2f}), CPU {median(busy):.2f} s, "
            f"waited {median(waited):.3f} s, peak {peak:,.0f} MiB",
            flush=True,
        )
    for name in WAYS[1:]:
        pairs = list(zip(timed[WAYS[0]], timed[name], strict=True))
        wall, cpu = (median(own[kind] / other[kind] for own, other in pairs) for kind in (0, 1))
        print(f"{WAYS[0]} / {name}, median of {rounds} rounds: wall {wall:.3f}, CPU {cpu:.3f}")


def launch(function: Callable[..., None], *arguments: Any) -> Any:
    """Run function(rank, folder, *arguments) on two ranks.  Returns what rank 0 saved as folder/result."""
    with tempfile.TemporaryDirectory() as folder, safe_children():
        mp.start_processes(function, (Path(folder), *arguments), nprocs=2, start_method="fork")  # saves the imports
        return torch.load(Path(folder, "result"))


def time_all(rank: int, folder: Path, config: str, size: tuple[int, int], rounds: int) -> None:
    """Time all ways in turn on one rank, after an update of each that warms up."""
    proc, cfg = join(rank, folder, 600), load_config(config, [])
    ways = {name: make(name, cfg, proc, size) for name in WAYS}
    times: dict[str, Any] = {name: [] for name in WAYS}
    equal = True
    for way, batches in ways.values():
        update(way, batches[:1])
    for _ in range(rounds + 1):
        for name, (way, batches) in ways.items():
            dist.barrier()
            began, busy = time.perf_counter(), time.process_time()
            waited = update(way, batches)
            times[name].append((time.perf_counter() - began, time.process_time() - busy, waited))
        first, *others = (flat(way.model) for way, _ in ways.values())
        equal = equal and all(torch.equal(first, other) for other in others)
    result = {name: times[name][1:] for name in WAYS} | {"equal": equal, "count": len(first)}
    if proc.first:
        torch.save(result, folder / "result")
    dist.barrier()


def peak_mib(rank: int, folder: Path, config: str, size: tuple[int, int], name: str) -> None:
    """Save the peak memory of a process that computes three updates in one way."""
    proc, cfg = join(rank, folder, 600), load_config(config, [])
    way, batches = make(name, cfg, proc, size)
    for number in (1, 2, 2):
        update(way, batches[:number])
    if proc.first:
        torch.save(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB, folder / "result")
    dist.barrier()


# --- faults


class Net(nn.Module):
    """Two layers, of which a picture may leave the second one out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, pictures: Tensor, *, both: bool = True) -> dict[str, Tensor]:
        features = self.first(pictures)
        return {"loss": (self.second(features) if both else features).square().sum(1)}


def unused(way: Way, rank: int, seen: list[Tensor]) -> None:
    """A rank whose picture leaves parameters out, in the second of three updates."""
    for number in range(3):
        forward = way.forward
        if number == 1 and rank == 1:
            forward = lambda batch: way.forward(batch, both=False)  # noqa: E731
        seen.append(_gradient(way._replace(forward=forward), _pictures(rank, 2)))


def uneven(way: Way, rank: int, seen: list[Tensor]) -> None:
    """Ranks with one and with two parts of an update."""
    for _ in range(3):
        seen.append(_gradient(way, _pictures(rank, 1 + rank)))


def fails(way: Way, rank: int, seen: list[Tensor]) -> None:
    """A rank runs out of memory on the way through its last backward pass; both compute the update again."""
    struck = []

    def strike(_: Tensor) -> None:
        if rank == 1 and len(seen) == 1 and not struck:
            struck.append(True)
            raise torch.OutOfMemoryError("a made-up end of memory")

    way.model.first.weight.register_post_accumulate_grad_hook(strike)
    seen.append(_gradient(way, _pictures(rank, 2)))
    for _ in range(2):  # gndet's ranks agree after finish() that the first of these did not count
        with suppress(torch.OutOfMemoryError):
            seen.append(_gradient(way, _pictures(rank, 2)))
            continue
        way.finish()
        seen.append(seen[0])


def stops(way: Way, rank: int, seen: list[Tensor]) -> None:
    """A rank is asked to stop between two parts, so it computes no last backward pass; both compute one more update."""

    def stop(part: int) -> None:
        if rank == 1 and len(seen) == 1:
            raise InterruptedError

    seen.append(_gradient(way, _pictures(rank, 2)))
    with suppress(InterruptedError):
        update(way, _pictures(rank, 2), stop)
    if rank == 1:
        way.finish()
    seen.append(seen[0])
    seen.append(_gradient(way, _pictures(rank, 2)))


def not_finite(way: Way, rank: int, seen: list[Tensor]) -> None:
    """A rank's picture is NaN in the first update: every rank must see that, and the next update must be whole."""
    update(way, [pictures * (torch.nan if rank else 1) for pictures in _pictures(rank, 2)])
    assert flat(way.model).isnan().all()
    for _ in range(3):
        seen.append(_gradient(way, _pictures(rank, 2)))


CASES = (uneven, unused, not_finite, fails, stops)


def faults() -> None:
    """Print what each way does in each case."""
    for case in CASES:
        print(f"{case.__doc__.splitlines()[0]}")
        for name in WAYS:
            print(f"    {name:18s} {launch(try_case, case.__name__, name)}", flush=True)


def try_case(rank: int, folder: Path, case: str, name: str) -> None:
    """Run a case in one way on one rank; save its outcome in words."""
    proc, seen = join(rank, folder, LIMIT_S), list[Tensor]()
    torch.manual_seed(0)
    way, outcome = MAKE[name](Net(), proc), ""
    try:
        update(way, _pictures(rank, 1))
        globals()[case](way, rank, seen)
    except Exception as error:
        text = str(error).splitlines()[0].rpartition("] ")[2] or str(error).splitlines()[0]
        outcome = f"rank {rank}, update {len(seen) + 1}: {text[:100]}"
    else:
        whole = all(torch.equal(gradient, seen[0]) for gradient in (seen[0], *seen[2:]))
        outcome = "the sums are whole" if whole else "WRONG sums"
    (folder / f"writing-{rank}").write_text(outcome)
    (folder / f"writing-{rank}").rename(folder / f"outcome-{rank}")
    end = time.monotonic() + 3 * LIMIT_S
    while (
        len(outcomes := [path.read_text() for path in sorted(folder.glob("outcome-*"))]) < 2 and time.monotonic() < end
    ):
        time.sleep(0.1)
    if proc.first:
        torch.save("; ".join(dict.fromkeys(outcomes)), folder / "result")


def _gradient(way: Way, batches: list[Tensor]) -> Tensor:
    update(way, batches)
    return flat(way.model).clone()


def _pictures(rank: int, count: int) -> list[Tensor]:
    return [torch.linspace(0, 1 + rank, 4)[None] + part for part in range(count)]


def main() -> None:
    """Parse the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("speed")
    part.add_argument("--config", default="configs/mask_rcnn_r50_fpn_scratch_gn_3x.yaml")
    part.add_argument("--size", type=height_and_width, default=(192, 256))
    part.add_argument("--rounds", type=int, default=5)
    parts.add_parser("faults")
    options = parser.parse_args()
    if options.part == "speed":
        speed(options.config, options.size, options.rounds)
    else:
        faults()


if __name__ == "__main__":
    main()
