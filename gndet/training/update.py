"""Compute a rank's share of an update in micro-batches, which become smaller when memory runs out.

The split does not change what is learned if images do not depend on each other (ModelConfig.batch_coupling is None):
an update's gradient is the sum of its images' gradients over global_batch, for any split.
"""

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gndet.config.schema import Config
from gndet.data.batches.batch import split
from gndet.data.batches.stream import Replay
from gndet.distributed.collectives import all_gather, all_reduce_min, all_reduce_sum, broadcast, exchange
from gndet.distributed.process import Process
from gndet.distributed.signals import Stop, StopSignals
from gndet.errors import GndetError, TrainingError, out_of_memory
from gndet.structures import Batch
from gndet.training.gradient_buckets import Buckets, sum_gradients
from gndet.training.memory import MIB, limited, release
from gndet.training.optim import make_step
from gndet.training.run import Progress, Run
from gndet.training.side_by_side import add_gradients, total


def resident_bytes(run: Run) -> int:
    """Return the bytes of weights, averaged weights, gradients and the optimizer's state."""
    tensors = [*run.model.state_dict().values(), *(parameter.grad for parameter in run.model.parameters())]
    tensors += [] if run.average is None else run.average.module.state_dict().values()
    tensors += [value for state in run.optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


class Unread(NamedTuple):
    """An update that the device has applied or, if something was not finite, left out; the host does not know yet."""

    own: Tensor  # (n + 1,) float64, on the device: this rank's n losses, and the norm of the gradient
    sums: Tensor  # the same, summed over the ranks; NaN if anything on any rank was not finite
    names: tuple[str, ...]  # of the losses
    evaluation_due: bool


class Nonfinite(NamedTuple):
    """An update that was not applied because a loss or the gradient was not finite."""

    losses: dict[str, float]  # of this rank
    norm: float  # of the gradient
    evaluation_due: bool


@dataclass
class UpdateState:
    """The update in progress, and the updates whose losses have not been read from the device."""

    whole: bool = True  # False while weights change
    undo: Callable[[], None] = lambda: None  # restores what the forward passes of the last update have changed
    unread: list[Unread] = field(default_factory=list)
    halted: Tensor | None = None  # 0-dim float32: 1 from the first update that is not finite until the host reads it

    def end(self) -> None:
        """Note that all updates are complete, or skipped, and known to the host."""
        self.whole, self.undo, self.halted = True, lambda: None, None


class Share(NamedTuple):
    """A rank's share of an update; the parameters hold the gradient, summed over the ranks."""

    losses: dict[str, Tensor]  # sums over its images / global_batch
    size: int  # images at once from here on: the minimum over the ranks
    skipped: bool  # whether any rank had to leave out a picture


def compute_gradients(run: Run, state: UpdateState, batches: Replay, size: int, stop: StopSignals) -> Share:
    """Compute an update's gradient, summed over the ranks, and this rank's share of its losses.

    size: images at once.  If memory runs out, the update restarts with half as many: on this rank alone, or on all
    ranks if gradients were being sent already.  Raises, on all ranks, TrainingError if a rank has no data or cannot
    continue with fewer images, and Stop if a rank has been asked to stop; only gradients have changed then.  (In
    SyncBN's forward the other ranks wait for a rank that fails: read that rank's error.)
    """
    state.undo, proc, whole = running_statistics(run), run.proc, 0
    try:
        while not whole:
            losses, size, refusal = attempt(run, batches, size, stop, state.undo)
            if run.buckets is not None:
                run.buckets.send_rest()
            all_read = int(not any(loaded.skipped for loaded in batches.taken))
            size, going_on, all_read, whole = all_reduce_min(
                [size, int(not stop.asked), all_read, int(bool(losses))], proc
            )
            if run.buckets is not None:
                run.buckets.finish()
            if size == 0:
                raise TrainingError("\n".join(text for texts in all_gather([refusal], proc) for text in texts if text))
            if not going_on:
                raise Stop
        if run.buckets is None:
            sum_gradients(run.model, proc)
    except BaseException:
        state.undo()
        raise
    return Share(losses, size, not all_read)


def attempt(
    run: Run, batches: Replay, size: int, stop: StopSignals, undo: Callable[[], None]
) -> tuple[dict[str, Tensor], int, str]:
    """Compute this rank's gradient; retry with fewer images at once until it fits or other ranks must know.

    Returns the losses, {} if incomplete; images at once, 0 if it cannot continue; and the reason why it cannot.
    """
    at_once, poll = (stop.at_once, stop.poll) if breakable(run.cfg, run.proc) else (nullcontext, lambda: None)
    while True:
        clear_gradients(run)
        undo()
        refusal = ""
        try:
            with at_once():
                room, last = partial(_room, run), partial(_last_pass, run, stop)
                losses = backward(run.forward, run.autocast, batches, size, run.cfg, room, poll, last, run.threads)
                return losses, size, ""
        except Stop:
            return {}, size, ""
        except GndetError as error:
            refusal = str(error)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            refusal = _refusal(run, size, error)
        size = 0 if refusal else size // 2  # the exception and its tensors are freed by now
        release(run.proc.device)
        if refusal or (run.buckets is not None and run.buckets.begun):
            return {}, size, refusal


def _last_pass(run: Run, stop: StopSignals) -> AbstractContextManager:
    """Sum gradients over the ranks while the last backward pass runs, which no stop may interrupt."""
    if run.buckets is None:
        return nullcontext()
    stop.no_longer_at_once()
    return run.buckets.sending()


def clear_gradients(run: Run) -> None:
    """Clear all gradients before an update."""
    if run.buckets is None:
        run.model.zero_grad()
    else:
        run.buckets.clear()


def buckets_for(cfg: Config, model: nn.Module, proc: Process) -> Buckets | None:
    """Return buckets if gradients are sent while a backward pass runs, or for CUDA graphs, else None.

    Not with SyncBN, which also sends during that pass: the order of messages would differ from rank to rank.
    """
    together = proc.world > 1 and breakable(cfg, proc)
    return Buckets(model, proc) if together or cfg.train.compile == "reduce-overhead" else None


def breakable(cfg: Config, proc: Process) -> bool:
    """Return whether a rank alone may abandon an update: not if others wait for it in SyncBN's forward."""
    return proc.world == 1 or not any(norm.communicates_in_forward for norm in cfg.model.part_norms().values())


def running_statistics(run: Run) -> Callable[[], None]:
    """Copy BN's running statistics, which a training forward changes.  Returns a function that restores them."""
    mixed = any(norm.mixes_images for norm in run.cfg.model.part_norms().values())
    kept = [(buffer, buffer.clone()) for buffer in run.model.buffers()] if mixed else []

    def restore() -> None:
        for buffer, value in kept:
            buffer.copy_(value)

    return restore


def _room(run: Run) -> AbstractContextManager:
    limit = run.cfg.train.memory_limit_mib
    return nullcontext() if limit is None else limited(run.proc.device, int(limit * MIB), resident_bytes(run))


def _refusal(run: Run, size: int, error: RuntimeError) -> str:
    """Return why a rank that is out of memory cannot continue with fewer images at once; "" if it can."""
    coupling = run.cfg.model.batch_coupling()
    if size > 1 and not coupling:
        return ""
    text = f"out of memory with {size} image(s) at once (rank {run.proc.rank}: {error})"
    if size == 1:
        return f"{text}; lower data.max_edge or data.shortest_edge"
    return (
        f"{text}; fewer would change what is learned: {coupling}; lower train.images_per_gpu, data.max_edge or "
        "data.shortest_edge"
    )


def backward(
    model: nn.Module,
    autocast: Callable[[], AbstractContextManager],
    batches: Replay | Collection[Batch],
    size: int,
    cfg: Config,
    room: Callable[[], AbstractContextManager] = nullcontext,
    before: Callable[[], None] = lambda: None,
    last: Callable[[], AbstractContextManager] = nullcontext,
    threads: int = 1,
) -> dict[str, Tensor]:
    """Add the gradients of batches, split into parts of `size` images, to the parameters' gradients.

    before() is called before each part; room() wraps each part; last() wraps the last backward pass.  threads: compute
    so many images of a part side by side, see side_by_side.py.
    Returns the sums of the losses / global_batch, on the device; of several parts in float64, so that a split rounds
    no float32 sum.
    """
    device = next(model.parameters()).device
    canvases = cfg.data.canvas_multiple, cfg.data.exact_canvas, cfg.data.canvases

    def losses_of(part: Batch) -> dict[str, Tensor]:
        with autocast():
            losses = model(to_device(part, device))  # {name: (B,)}
        return {name: loss.sum() / cfg.train.global_batch for name, loss in losses.items()}

    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, start=1):
        parts = split(batch, size, *canvases)
        for part in parts:
            before()
            with room():
                if cfg.train.compile == "reduce-overhead":
                    torch.compiler.cudagraph_mark_step_begin()  # the outputs of the previous run may be overwritten
                shares = split(part, -(-len(part.images) // threads), *canvases)
                if len(shares) > 1:
                    means = add_gradients(losses_of, shares, model)
                else:
                    means = losses_of(part)
                    with last() if number == len(batches) and part is parts[-1] else nullcontext():
                        total(means).backward()
                means = {name: loss.detach() for name, loss in means.items()}
                sums = {name: sums[name].double() + mean if sums else mean for name, mean in means.items()}
                del means
    return sums


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a GPU asynchronously, on a separate stream that runs beside the computation."""
    if device.type == "cpu":
        return batch
    copying, computing = _copying(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        gt = type(batch.gt)(*(field.to(device, non_blocking=True) for field in batch.gt))
        images, sizes, keys = (field.to(device, non_blocking=True) for field in batch[:3])
        shares = None if batch.shares is None else batch.shares.to(device, non_blocking=True)
    computing.wait_stream(copying)
    for tensor in (images, sizes, keys, *gt, *([] if shares is None else [shares])):
        tensor.record_stream(computing)  # do not reuse its memory while it is in use
    return Batch(images, sizes, keys, gt, batch.padded, shares)


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for copies to a GPU; only one, because the allocator keeps freed memory per stream."""
    return torch.cuda.Stream(device)


def make_update(run: Run, state: UpdateState, losses: dict[str, Tensor], norm: Tensor, evaluation_due: bool) -> None:
    """Apply the gradient to the weights, and the weights to their average, unless a loss or the norm is not finite.

    The device decides, so the host need not wait for it; `read` tells the host.  After an update that is not finite,
    later updates change nothing either until `read`, so the weights remain those from which that update started.
    losses: this rank's, 0-dim each; norm: of the gradient, not finite if any part of the gradient is not.
    """
    own = torch.stack([*losses.values(), norm]).double()
    sums = all_reduce_sum(torch.where(own.isfinite().all(), own, math.nan), run.proc)  # NaN survives the all-reduce
    bad = (~sums.isfinite().all()).float()
    bad = bad if state.halted is None else torch.maximum(state.halted, bad)
    state.whole, state.halted = False, bad
    state.unread.append(Unread(own, sums, tuple(losses), evaluation_due))
    make_step(run.optimizer, state.halted)
    if run.average is not None:
        run.average.update(skip=state.halted)
    if any(norm.trains_with_running_statistics for norm in run.cfg.model.part_norms().values()):
        broadcast(run.model.buffers(), run.proc)  # a norm trains with them, so all ranks need those of the checkpoint
    state.whole = True


def reads_late(run: Run) -> bool:
    """Return whether losses are read once per log line instead of after each update, so that a GPU never waits.

    Not if a norm mixes images: later updates would change its running statistics before the host knows of a bad one.
    """
    mixed = any(norm.mixes_images for norm in run.cfg.model.part_norms().values())
    return run.proc.device.type == "cuda" and not mixed


def read(run: Run, state: UpdateState, progress: Progress) -> Nonfinite | None:
    """Copy the losses of the unread updates to the host, and add the updates to the progress: the only host sync.

    Stops before the first update that was not finite and returns it.  The updates after it were left out as well and
    must be computed again.  Every rank gets the same result.
    """
    if not state.unread:
        return None
    with exchange(run.proc) if run.proc.world > 1 else nullcontext():  # a GPU waits for the other ranks here
        rows = torch.stack([torch.stack([update.own, update.sums]) for update in state.unread]).tolist()
    unread, state.unread = state.unread, []
    for update, (own, sums) in zip(unread, rows, strict=True):
        if not all(map(math.isfinite, sums)):
            *losses, norm = own
            return Nonfinite(dict(zip(update.names, losses, strict=True)), norm, update.evaluation_due)
        progress.add(dict(zip(update.names, sums[:-1], strict=True)))
        progress.update, progress.evaluation_due = progress.update + 1, update.evaluation_due
    state.end()
    return None
