"""Torch's fake tensors on a GPU that need not exist."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pretended.gpu import Refused
from pretended.kernels import replaced_launches
from pretended.operators import own_kernel, place, tensors_in
from pretended.replaced import apply


class _OwnKernels(TorchDispatchMode):
    """Runs gndet's operators by their kernels for CUDA, and refuses copies to the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors_in((args, kwargs)))
        if on_gpu and (own := own_kernel(func)):
            with torch.no_grad(), self:
                return own(*args, **kwargs or {})
        result = func(*args, **kwargs or {})
        if on_gpu and any(tensor.device.type == "cpu" for tensor in tensors_in(result)):
            raise Refused(f"{func} makes the host wait, {place()}")
        return result


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Make tensors fake and let them be on a GPU: only their shapes, types, layouts and devices are computed.

    An operator of tensors on two devices, or whose result the host would need, raises torch's own error or Refused.
    """

    def launch(kernel: Any, grid: Any, arguments: list[Any]) -> bool:
        if any(isinstance(argument, Tensor) and argument.device.type != "cuda" for argument in arguments):
            raise Refused(f"{kernel.__name__}: a tensor is on the CPU")
        return False

    changes: tuple[tuple[Any, str, Any], ...] = (
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
        (torch.cuda, "device_of", lambda tensor: nullcontext()),
        # without a GPU torch takes cuDNN to be absent, and with it maps whose channels are last
        (torch._C, "_conv_determine_backend_memory_format", lambda *args: torch.channels_last),
        (torch.nn.Module, "_apply", apply),
    )
    with ExitStack() as stack:
        for owner, name, replacement in changes:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(replaced_launches(launch))
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        stack.enter_context(_OwnKernels())
        yield mode
