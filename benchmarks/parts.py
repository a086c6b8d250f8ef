"""Measure the memory of a training step by part of the detector: its peak, and what it keeps for backward.

On a CPU the bytes of the tensors that operators return are counted, exactly and identically on every machine; memory
that an operator uses internally is not.  On a GPU the allocator's counters are read, after a few steps: the first needs
more memory, to choose algorithms.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.timing import WARM_UPS
from gndet.modeling.detection_model import DetectionModel
from gndet.training.memory import MIB, TensorBytes

FORWARD = {  # the methods of a part's forward pass; everything between them is "rest"
    "backbone": ("forward",),
    "fpn": ("forward",),
    "rpn": ("forward", "anchors", "sample_anchors", "loss", "propose"),
    "box_head": ("step",),
    "mask_head": ("step",),
}
REST = "rest"


@dataclass
class Part:
    """Bytes of one part."""

    kept: int = 0  # live after its forward pass but not before: needed by backward and by later parts
    forward_peak: int = 0  # of all memory while the part ran
    backward_peak: int = 0


class Ledger:
    """Record the live bytes at each border between parts, and the peak since the previous border."""

    def __init__(self, counted: TensorBytes | None, device: torch.device) -> None:
        self.counted, self.device = counted, device
        self.parts: dict[str, Part] = {}
        self.before = self.live()

    def live(self) -> int:
        """Return the bytes of all tensors."""
        return self.counted.live if self.counted else torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Return the peak since the last call."""
        if self.counted:
            peak, self.counted.peak = self.counted.peak, self.counted.live
        else:
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def forward_border(self, name: str) -> None:
        """Attribute what ran since the last border to the forward pass of this part."""
        part, live = self.parts.setdefault(name, Part()), self.live()
        part.kept += live - self.before
        part.forward_peak = max(part.forward_peak, self.peak())
        self.before = live

    def backward_border(self, name: str, *_: object) -> None:
        """Attribute what ran since the last border to the backward pass of this part."""
        part = self.parts.setdefault(name, Part())
        part.backward_peak = max(part.backward_peak, self.peak())


def memory_by_part(model: DetectionModel, step: Callable[[], object]) -> str:
    """Run a step, forward and backward without the update, with gradients and momentum allocated.

    Returns a table in MiB with one line per part and one line for the whole.
    """
    device = model.pixel_mean.device
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    trainable = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    state = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) + 2 * trainable
    with ExitStack() as stack:
        if device.type == "cuda":
            for _ in range(WARM_UPS["cuda"]):
                step()
            momentum, counted = torch.empty(trainable, dtype=torch.uint8, device=device), None
        else:
            momentum, counted = None, stack.enter_context(TensorBytes(1 << 62, state))
        ledger = Ledger(counted, device)
        ledger.peak()
        stack.enter_context(_borders(model, ledger))
        step()
        ledger.backward_border(REST)
    del momentum
    return _table(ledger.parts, state)


@contextmanager
def _borders(model: DetectionModel, ledger: Ledger) -> Iterator[None]:
    """Report the borders between a model's parts to a ledger inside the context."""
    parts = {name: part for name, part in model.named_children() if name in FORWARD}
    for name, part in parts.items():
        for method in FORWARD[name]:
            setattr(part, method, partial(_bordered, getattr(part, method), name, ledger))
    hooks = [
        parameter.register_post_accumulate_grad_hook(partial(ledger.backward_border, name.partition(".")[0]))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, part in parts.items():
            for method in FORWARD[name]:
                delattr(part, method)


def _bordered(method: Callable[..., Any], name: str, ledger: Ledger, *arguments: Any) -> Any:
    """Call a method of a part between two borders."""
    ledger.forward_border(REST)
    result = method(*arguments)
    ledger.forward_border(name)
    return result


def _table(parts: dict[str, Part], state: int) -> str:
    """Return a table of the parts in the order of the forward pass, then the whole."""
    lines = [f"{'part':12s}{'kept':>9s}{'peak forward':>15s}{'peak backward':>15s}"]
    for name in (*FORWARD, REST):
        if name in parts:
            part = parts[name]
            figures = (part.kept, part.forward_peak, part.backward_peak)
            lines.append(
                f"{name:12s}" + "".join(f"{x / MIB:{w},.0f}" for x, w in zip(figures, (9, 15, 15), strict=True))
            )
    peak = max(max(part.forward_peak, part.backward_peak) for part in parts.values())
    kept = sum(part.kept for part in parts.values())
    return "\n".join([
        *lines,
        f"kept for backward {kept / MIB:,.0f}, peak {peak / MIB:,.0f}, of which {state / MIB:,.0f} are weights, "
        "gradients and momentum",
    ])  # fmt: skip
