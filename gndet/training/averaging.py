"""The exponential moving average of a model's weights, updated on its device without the host waiting."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """The exponential moving average of a model's weights and running statistics; `module` holds it.

    The first update copies the model; after it, average = decay * average + (1 - decay) * model.  Counters are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module, self.decay = copy.deepcopy(model), decay
        self.begun = False  # whether the first update has been made
        self._pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}  # tensors of the average, of the model
        for mine, its in zip(_all_tensors(self.module), _all_tensors(model), strict=True):
            averages, values = self._pairs.setdefault(mine.dtype, ([], []))
            averages.append(mine.detach())
            values.append(its.detach())

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Add the model's present weights to the average, unless skip is 1: then no bit of the average changes.

        skip () float32 on the model's device, 0 or 1.  The host waits for it only until the first update is made.
        """
        if not self.begun:
            self.begun = skip is None or not bool(skip)
            for averages, values in self._pairs.values() if self.begun else ():
                torch._foreach_copy_(averages, values)
            return
        for dtype, (averages, values) in self._pairs.items():
            if dtype.is_floating_point:
                # SGD with the gradient (average - value) and this learning rate is the moving average; the gradient is
                # weight_decay * average - value.  This kernel is one launch for all tensors, and found_inf turns it off
                torch._fused_sgd_(
                    averages, values, [], lr=1 - self.decay, weight_decay=1.0, maximize=True, momentum=0.0,
                    dampening=0.0, nesterov=False, is_first_step=False, found_inf=skip,
                )  # fmt: skip
            elif skip is None:
                torch._foreach_copy_(averages, values)
            else:
                growth = torch._foreach_sub(values, averages)
                torch._foreach_mul_(growth, (1 - skip).to(dtype))
                torch._foreach_add_(averages, growth)


def _all_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
