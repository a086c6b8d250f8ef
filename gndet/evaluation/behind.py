"""Make results of detections behind a detector: while a GPU computes a batch, a thread pastes the last one's masks.

B images, D detections per image, S mask side.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from gndet.evaluation.results import Results
from gndet.structures import Detections

MOST = 2  # batches on their way to results


def to_host(detections: Detections) -> Callable[[], Detections]:
    """Start to copy detections from a GPU to the host: one tensor in pinned memory, which the GPU fills in its turn.

    Returns a function that waits for the copy, not for what the GPU has been given since, and returns the detections,
    all in float32.  Any thread may call it.  Detections on a CPU are returned as they are.
    """
    device, side = detections.boxes.device, detections.masks.shape[-1]
    if device.type == "cpu":
        return lambda: detections
    packed = pack(detections).to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(device).record_event()

    def arrived() -> Detections:
        copied.synchronize()
        return unpack(packed, side)

    return arrived


def pack(detections: Detections) -> Tensor:
    """Return all fields of detections in one tensor (B, D, 7 + S * S) float32, exactly."""
    boxes, scores, labels, masks, valid = (field.float() for field in detections)
    return torch.cat((boxes, scores[..., None], labels[..., None], valid[..., None], masks.flatten(2)), dim=2)


def unpack(packed: Tensor, side: int) -> Detections:
    """Return the detections of `pack` with masks of side S, all fields in float32."""
    masks = packed[..., 7:].unflatten(2, (side, side))
    return Detections(packed[..., :4], packed[..., 4], packed[..., 5], masks, packed[..., 6])


class Behind:
    """Make results in one thread, in order, behind a detector on a GPU; leaving the context ends the thread.

    On a CPU make them at once: torch's threads wait for each other, so one that has to share its core delays them all.
    """

    def __init__(self, device: torch.device) -> None:
        self.results: list[Results] = []
        self._overlap = device.type != "cpu"
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[Future[Results]] = deque()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def add(self, detections: Detections, make: Callable[[Detections], Results]) -> None:
        """Queue a batch of detections for `make`; raise what `make` has raised for an earlier batch."""
        arrived = to_host(detections)
        if not self._overlap:
            self.results.append(make(arrived()))
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "results")
        self._pending.append(self._thread.submit(lambda: make(arrived())))
        self._wait(MOST)

    def finish(self) -> None:
        """Wait for all results and end the thread: a process forked meanwhile would inherit its locks."""
        self._wait(0)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _wait(self, most: int) -> None:
        while len(self._pending) > most:
            self.results.append(self._pending.popleft().result())
